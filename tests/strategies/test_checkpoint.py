"""A checkpoint holds all that the next round depends on, and is whole or not there."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.numpy import load_file, save_file

from fedaudit.audit.auditor import Auditor
from fedaudit.errors import RecordError
from fedaudit.flower.strategy import AuditStrategy
from fedaudit.simulation.in_process import InProcessGrid
from strategies import checkpoint
from strategies.rounds import SeededRounds
from tests.strategies.federation import N, app, initial, strategy

ADAPTIVE = "DifferentialPrivacyServerSideAdaptiveClipping(noise-multiplier=0.1, inner={})"
STATEFUL = [
    "FedAvg",
    "FedAdam(eta=0.1)",
    "FedYogi",
    "FedAdagrad",
    "FedAvgM(server-momentum=0.9)",
    ADAPTIVE.format("FedAvg"),
    ADAPTIVE.format("FedAdam"),
]


def audited(text):
    return AuditStrategy(strategy(text, 0.6), Auditor(None, ""))


def run(wrapped, rounds, done=0, arrays=None, folder=None):
    def after(number, current):
        if folder is not None and number:
            checkpoint.save(folder, number + done, current, wrapped, grid.node_states())

    with InProcessGrid(app, N, seed=1) as grid:
        result = SeededRounds(wrapped, 3, done).start(
            grid, arrays or initial(), num_rounds=rounds, evaluate_fn=after
        )
    return result.arrays


@pytest.mark.parametrize("text", STATEFUL)
def test_a_restored_strategy_continues_bit_for_bit(text, tmp_path):
    whole = run(audited(text), rounds=5)
    run(audited(text), rounds=3, folder=tmp_path / "checkpoint")
    start = checkpoint.load(tmp_path / "checkpoint")
    fresh = audited(text)
    checkpoint.restore(fresh, start.strategy)
    rest = run(fresh, rounds=2, done=start.round, arrays=start.arrays)
    assert start.round == 3
    assert list(rest) == list(whole)
    for name in whole:
        assert rest[name].numpy().tobytes() == whole[name].numpy().tobytes(), name


@pytest.mark.parametrize("text", STATEFUL[1:])
def test_a_strategy_that_is_not_restored_ends_elsewhere(text, tmp_path):
    """Otherwise the test above would say nothing about the strategy's state."""
    whole = run(audited(text), rounds=5)
    middle = run(audited(text), rounds=3)
    rest = run(audited(text), rounds=2, done=3, arrays=middle)
    assert rest["w"].numpy().tobytes() != whole["w"].numpy().tobytes()


def test_settings_come_from_the_configuration_and_not_from_the_checkpoint(tmp_path):
    run(audited("FedAdam(eta=0.1)"), rounds=1, folder=tmp_path / "checkpoint")
    changed = audited("FedAdam(eta=0.7)")
    checkpoint.restore(changed, checkpoint.load(tmp_path / "checkpoint").strategy)
    assert changed.strategy.eta == 0.7
    assert set(changed.strategy.m_t) == set(initial())


def small(folder, number=1, value=1.0):
    arrays = ArrayRecord({"w": Array(np.full(2, value, np.float32))})
    checkpoint.save(folder, number, arrays, strategy("FedAvg"), {})


ARRAYS = {
    "no dimension": np.asarray(2.5, np.float32),
    "counter": np.asarray(7, np.int64),
    "one dimension": np.asarray([2.5], np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "column-major": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "half": np.ones((2, 2), np.float16),
    "truth": np.asarray([True, False]),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_comes_back_with_its_shape_dtype_and_values(kind, tmp_path):
    saved = ARRAYS[kind]
    checkpoint.save(tmp_path / "c", 1, ArrayRecord({"a": Array(saved)}), strategy("FedAvg"), {})
    loaded = checkpoint.load(tmp_path / "c").arrays["a"].numpy()
    assert (loaded.shape, loaded.dtype) == (saved.shape, saved.dtype)
    np.testing.assert_array_equal(loaded, saved)


def test_final_weights_keep_an_array_of_no_dimension(tmp_path):
    checkpoint.write_arrays(tmp_path / "w.safetensors", {"steps": np.asarray(3, np.int64)})
    assert load_file(tmp_path / "w.safetensors")["steps"].shape == ()


def test_the_order_of_arrays_is_kept(tmp_path):
    names = ["z", "a", "m.1", "m.0"]
    arrays = ArrayRecord({name: Array(np.zeros(1, np.float32)) for name in names})
    checkpoint.save(tmp_path / "c", 1, arrays, strategy("FedAvg"), {})
    assert list(checkpoint.load(tmp_path / "c").arrays) == names


def test_client_states_come_back(tmp_path):
    state = RecordDict(
        {
            "ledger": ConfigRecord({"noise": [0.1, 1 / 3], "accountant": "rdp", "steps": [1, 2], "on": True}),
            "seen": MetricRecord({"rounds": 4}),
        }
    )
    nodes = {2**63 - 1: state, 5: RecordDict()}
    checkpoint.save(tmp_path / "c", 1, initial(), strategy("FedAvg"), nodes)
    assert checkpoint.load(tmp_path / "c").nodes == nodes


def test_a_client_state_with_arrays_is_refused(tmp_path):
    nodes = {5: RecordDict({"weights": initial()})}
    with pytest.raises(RecordError, match="holds metrics and settings, got ArrayRecord in 'weights'"):
        checkpoint.save(tmp_path / "c", 1, initial(), strategy("FedAvg"), nodes)


def test_only_the_last_round_is_kept(tmp_path):
    small(tmp_path / "c", 1, 1.0)
    small(tmp_path / "c", 2, 2.0)
    loaded = checkpoint.load(tmp_path / "c")
    assert (loaded.round, loaded.arrays["w"].numpy().tolist()) == (2, [2.0, 2.0])
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.load(tmp_path / "c") is None


def test_a_crash_before_the_rename_leaves_the_round_before(tmp_path, monkeypatch):
    small(tmp_path / "c", 1, 1.0)
    monkeypatch.setattr(type(tmp_path), "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small(tmp_path / "c", 2, 2.0)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "c").round == 1
    small(tmp_path / "c", 3, 3.0)
    assert checkpoint.load(tmp_path / "c").round == 3
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_crash_while_writing_leaves_the_round_before(tmp_path, monkeypatch):
    small(tmp_path / "c", 1)
    monkeypatch.setattr(json, "dumps", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small(tmp_path / "c", 2)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "c").round == 1


def _state(text):
    """A whole file whose state is another text."""
    return lambda path: save_file({"arrays/w": np.zeros(2, np.float32)}, path, {"state": text})


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff" * 64),
    "no state": lambda path: save_file({"arrays/w": np.zeros(2, np.float32)}, path),
    "cut state": _state('{"order": ["w"'),
    "other state": _state("[]"),
    "no round": _state("{}"),
    "unknown array": _state('{"order": ["v"], "round": 1}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_a_record_error(damage, tmp_path):
    small(tmp_path / "c")
    DAMAGE[damage](tmp_path / "c")
    with pytest.raises(RecordError, match=r"holds no readable checkpoint .*: start the run anew"):
        checkpoint.load(tmp_path / "c")
