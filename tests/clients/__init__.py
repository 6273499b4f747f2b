"""Scripts that `tests/e2e/test_clients.py` runs in the environments that `make clients` makes."""
