"""The networks, and a registry that builds them by name."""
