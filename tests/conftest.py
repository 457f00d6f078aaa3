"""Settings that must be in place before torch and flwr are imported, here and in child processes."""

import os

# One thread: sums come out in the same order on every machine, and parallel test workers do not fight.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# No telemetry, no look for updates, no installation of dependencies for every run.
os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    RAY_USAGE_STATS_ENABLED="0",
)
