"""Server side of the reference Flower App."""
