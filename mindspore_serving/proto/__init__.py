"""The public messages and the service."""
