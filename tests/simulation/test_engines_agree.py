"""The reference app in this process and in Ray's actors; `test_loopback.py` has the third engine."""

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from fedaudit.config import RunConfig
from fedaudit.federation.execution import execute

CONFIG = {
    "data.name": "digits",
    "data.max-examples": 600,
    "model.name": "mlp(hidden=16, activation=tanh)",
    "federation.clients": 4,
    "federation.rounds": 3,
    "federation.device": "cpu",
    "train.lr": 0.5,
    "train.batch-size": 8,
    "defense.name": "dp-sgd(epsilon=8)",  # noise, and a privacy ledger in the nodes' states
    "audit.measures": "example-gradient-uniqueness, cohort-gradient-uniqueness, update-norm, update-cosine",
    "audit.observers": "server, oracle",
}


@pytest.mark.slow
def test_in_process_and_two_ray_actors_give_the_same_weights_and_records(tmp_path):
    pytest.importorskip("ray")
    weights, records = {}, {}
    for engine, workers in (("in-process", 1), ("ray", 2)):
        place = {"output.directory": str(tmp_path), "output.name": engine}
        how = {"federation.engine": engine, "federation.workers": workers}
        run = execute(RunConfig.from_flat({**CONFIG, **place, **how}))
        weights[engine] = load_file(run.path / "weights.safetensors")
        rows = run.records[run.records["quantity"] != "round-seconds"]
        assert set(rows["status"]) == {"ok"}
        index = ["round", "quantity", "observer", "client_id"]
        records[engine] = rows.set_index(index)[["value", "epsilon", "unit", "kind"]].sort_index()
    for name, expected in weights["in-process"].items():
        np.testing.assert_allclose(weights["ray"][name], expected, rtol=0, atol=1e-5)
    moved = max(float(np.abs(values).max()) for values in weights["ray"].values())
    assert moved > 0.1
    pd.testing.assert_frame_equal(records["ray"], records["in-process"], rtol=1e-5, atol=0)
    measured = set(records["ray"].index.get_level_values("quantity"))
    assert measured >= {"epsilon", "example-gradient-uniqueness", "cohort-gradient-uniqueness", "update-norm"}
