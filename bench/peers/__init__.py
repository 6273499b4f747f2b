"""The servers and libraries that Inflight is compared with, each in a process of its own."""
