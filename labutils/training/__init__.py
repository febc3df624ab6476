"""One training: the loop, its checkpoints, the store of finished runs."""
