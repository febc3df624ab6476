"""Data sets as tensors: where they come from, how they are cut, changed and drawn."""
