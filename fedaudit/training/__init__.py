"""Local training of a client in one round, and what its defense changes in it."""
