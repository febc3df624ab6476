"""The methods of series 2: what is done with a trained network."""
