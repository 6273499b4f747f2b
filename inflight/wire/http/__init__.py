"""HTTP/1.1: connections, bodies, event streams."""
