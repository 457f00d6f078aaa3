.PHONY: check slow format

# What every commit must pass.
check:
	ruff check
	ruff format --check
	mypy
	pytest -q

# Packaging, Ray, SuperLink and long replications.
slow:
	pytest -q -m "slow and not gpu and not network"

format:
	ruff check --fix
	ruff format
