"""What notebooks are written with, and how they are executed without a person."""
