"""Every strategy of Flower's that can be named can be run, and the others say why not."""

import gc
import logging

import numpy as np
import pytest
from flwr.serverapp import strategy as flower

from fedaudit.errors import ConfigError
from fedaudit.simulation.in_process import InProcessGrid
from strategies.flower_strategies import strategy_names
from tests.strategies.federation import N, app, initial, strategy

NEEDED = {
    "QFedAvg": "QFedAvg(client-learning-rate=0.1)",
    "FedProx": "FedProx(proximal-mu=0.1)",
    "DifferentialPrivacyServerSideFixedClipping": "DifferentialPrivacyServerSideFixedClipping"
    "(noise-multiplier=1, clipping-norm=1)",
    "DifferentialPrivacyServerSideAdaptiveClipping": "DifferentialPrivacyServerSideAdaptiveClipping"
    "(noise-multiplier=0.1)",
}


@pytest.fixture
def no_garbage_collection(monkeypatch):
    """Some strategies collect garbage for every reply, which costs seconds where torch is loaded."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("name", strategy_names())
def test_every_named_strategy_aggregates_a_round(name):
    built = strategy(NEEDED.get(name, name))
    assert type(built).__name__ == name
    with InProcessGrid(app, N, seed=1) as grid:
        arrays = built.start(grid, initial(), num_rounds=1).arrays
    assert list(arrays) == list(initial())
    assert all(np.isfinite(array.numpy()).all() for array in arrays.values())
    assert not np.array_equal(arrays["w"].numpy(), initial()["w"].numpy())


def test_names_are_those_of_flower_that_suit_the_reference_client():
    left_out = {
        name for name in flower.__all__ if name.startswith(("FedXgb", "DifferentialPrivacyClientSide"))
    }
    assert len(left_out) == 4
    assert set(strategy_names()) == set(flower.__all__) - left_out - {"Strategy", "Result"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FedSomething", "no strategy is named 'FedSomething': choose one of Bulyan, .*QFedAvg"),
        ("FedXgbBagging", "FedXgbBagging cannot be used: it aggregates trees"),
        ("DifferentialPrivacyClientSideFixedClipping", "clipping that the reference client does not do"),
        ("FedAdam(eta=fast)", r"FedAdam\(eta=fast\) is not allowed: it must be a valid number"),
        ("FedAdam(etta=1)", "FedAdam has no option 'etta': its options are .*eta"),
        ("FedAvg(fraction-train=0.5)", "no option 'fraction-train'"),
        ("FedAvg(arrayrecord-key=weights)", "no option 'arrayrecord-key'"),
        ("FedAvg(train-metrics-aggr-fn=mean)", "is not allowed: it must be callable"),
        ("QFedAvg", r"QFedAvg needs client-learning-rate: write QFedAvg\(client-learning-rate=...\)"),
        ("FedTrimmedAvg(beta=0.2), FedAvg", "exactly one name"),
        (
            "DifferentialPrivacyServerSideFixedClipping(noise-multiplier=-1, clipping-norm=1)",
            "noise multiplier should be a non-negative",
        ),
        (
            "DifferentialPrivacyServerSideFixedClipping(noise-multiplier=1, clipping-norm=1, inner=FedSum)",
            "no strategy is named 'FedSum'",
        ),
    ],
)
def test_what_cannot_be_built_is_a_configuration_error(text, message):
    with pytest.raises(ConfigError, match=message):
        strategy(text)


def test_a_wrapper_takes_its_inner_strategy_by_name_and_the_number_of_sampled_clients():
    options = "noise-multiplier=1, clipping-norm=2, inner=FedMedian"
    wrapped = strategy(f"DifferentialPrivacyServerSideFixedClipping({options})", fraction_train=0.6)
    assert type(wrapped.strategy) is flower.FedMedian
    assert (wrapped.clipping_norm, wrapped.num_sampled_clients) == (2.0, 4)  # floor(0.6 * 7)
    assert wrapped.strategy.min_train_nodes == 4 and wrapped.strategy.min_available_nodes == N


def test_options_reach_the_strategy():
    built = strategy("FedAdam(eta=0.25, beta-1=0.8)", fraction_train=0.5)
    assert (built.eta, built.beta_1, built.fraction_train, built.fraction_evaluate) == (0.25, 0.8, 0.5, 0.0)


def test_a_small_share_still_samples_one_client():
    assert strategy("FedAvg", fraction_train=0.01).min_train_nodes == 1


def test_flower_does_not_warn_that_clients_do_not_evaluate(caplog):
    with caplog.at_level(logging.WARNING, logger="flwr"):
        strategy("FedAvg")
        assert not caplog.records
        flower.FedAvg(fraction_evaluate=0.0)
        assert len(caplog.records) == 1  # Flower still warns whoever builds it
