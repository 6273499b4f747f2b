"""Benchmarks: Inflight, its peers and the bare libraries that it uses, side by side in one run on one machine."""
