"""gRPC: procedures, framing, statuses, and the engines that speak HTTP/2."""
