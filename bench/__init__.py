"""Benchmarks: Inflight beside its peers and beside the bare libraries it stands on, in one run on one machine."""
