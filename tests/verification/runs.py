"""Runs of a tiny federation, by the command's own code."""

from fedaudit.config import RunConfig
from fedaudit.federation.execution import execute

SMALL = {
    "data.max-examples": 300,
    "model.name": "mlp(hidden=16)",
    "federation.clients": 3,
    "federation.rounds": 3,
    "federation.evaluate-every": 3,
    "train.batch-size": 8,
    "train.local-steps": 1,
    "audit.measures": "",
    "audit.verify": True,
}
ADAPTIVE = "DifferentialPrivacyServerSideAdaptiveClipping"
FIXED = "DifferentialPrivacyServerSideFixedClipping(noise-multiplier=0.05, clipping-norm=0.1)"


def run(folder, name="run", **changes):
    """A finished run; `changes` are dotted keys, a double underscore for the dot."""
    dotted = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    place = {"output.directory": str(folder), "output.name": name}
    return execute(RunConfig.from_flat({**SMALL, **place, **dotted}))
