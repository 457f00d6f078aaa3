"""Client side of the reference Flower App."""
