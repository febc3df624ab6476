"""What a trained network is worth, and what it looks like inside."""
