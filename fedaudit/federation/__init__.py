"""One federation: what its configuration describes, the checks before it runs, its run and its folder."""
