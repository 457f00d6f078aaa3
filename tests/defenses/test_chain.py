"""Several defenses in a stated order."""

import pytest
import torch
from torch import Generator, nn

from fedaudit.accounting import Ledger
from fedaudit.claims import (
    ClipNorm,
    GaussianNoise,
    IndependentNoise,
    NothingBeside,
    PoissonSampling,
    QuantizationLevels,
    Sparsity,
)
from fedaudit.config import RunConfig
from fedaudit.defenses.base import Defense
from fedaudit.defenses.chain import Chain, claims_left
from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.defenses.gaussian import GaussianUpdate
from fedaudit.defenses.sparsify import TopK
from fedaudit.errors import ConfigError
from fedaudit.federation.execution import execute
from fedaudit.registry import DEFENSES, MEASURES
from fedaudit.spec import Spec, parse_spec, parse_specs
from fedaudit.verification.recorded import verify_run

NOISY = "gaussian(noise-multiplier=1.0, epsilon=0.0)"


def built(text):
    return DEFENSES.build(parse_spec(text))


def test_a_chain_is_one_item_of_a_list_and_is_written_as_it_is_read():
    text = "none, dp-sgd(epsilon=8) then top-k(fraction=0.1) then sign"
    plain, chained = parse_specs(text)
    assert [part.name for part in chained.chain] == ["dp-sgd", "top-k", "sign"]
    assert plain.chain == (Spec("none"),)
    assert f"{plain}, {chained}" == text and parse_spec(str(chained)) == chained


@pytest.mark.parametrize(
    "text", ["top-k then", "then then", "top-k thensign", "top-k then , sign", "top-k sign"]
)
def test_a_chain_that_breaks_off_is_refused(text):
    with pytest.raises(ConfigError, match=r"a part is written 'name' or 'name\(key=value, ...\)'"):
        parse_specs(text)


def test_a_name_that_ends_in_then_is_a_name():
    assert parse_specs("strengthen")[0] == Spec("strengthen")


def test_only_defenses_are_chained():
    with pytest.raises(ConfigError, match="a measure stands alone, got 'update-norm then update-cosine'"):
        MEASURES.build(parse_spec("update-norm then update-cosine"))
    chained = {"audit.measures": "update-norm then update-cosine", "model.name": "mlp then mlp"}
    for key, text in {**chained, "strategy.name": "FedAvg then FedAdam"}.items():
        with pytest.raises(ConfigError, match="only defenses are chained by 'then'"):
            RunConfig.from_flat({key: text})
    with pytest.raises(ConfigError, match="no defense is named 'tip-k'"):
        RunConfig.from_flat({"defense.name": "sign then tip-k"})


def test_parts_act_from_left_to_right():
    delta = {"w": torch.tensor([4.0, -1.0, 2.0, 0.5])}
    first, second = built("top-k(fraction=0.5) then sign"), built("sign then top-k(fraction=0.5)")
    assert first.protect(delta, Generator())["w"].tolist() == [1.5, 0.0, 1.5, 0.0]
    assert sorted(second.protect(delta, Generator())["w"].abs().tolist()) == [0, 0, 1.875, 1.875]
    noised = built(f"top-k(fraction=0.5) then {NOISY}").protect(delta, Generator().manual_seed(0))["w"]
    assert int(noised.count_nonzero()) == 4
    pruned = built(f"{NOISY} then top-k(fraction=0.5)").protect(delta, Generator().manual_seed(0))["w"]
    assert int(pruned.count_nonzero()) == 2


def test_the_accounting_part_accounts_for_the_chain():
    sgd = built("dp-sgd(epsilon=3) then top-k")
    alone = DPSGD(epsilon=3)
    assert isinstance(sgd, Defense) and sgd.poisson and sgd.name == "dp-sgd then top-k"
    release = sgd.release(100, 10, 50)
    assert release == alone.release(100, 10, 50)
    ledger = sgd.charge(Ledger(), release, 10, 100)
    assert sgd.guarantee(ledger, 100) == alone.guarantee(ledger, 100)
    late = built("top-k then gaussian").over_rounds(2)
    ledger = late.charge(Ledger(), release, 10, 100)
    assert (
        late.guarantee(ledger, 100) == GaussianUpdate(rounds=2).guarantee(ledger, 100) and ledger.steps == 1
    )
    assert built("top-k then sign").guarantee(Ledger(), 100) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dp-sgd then gaussian", "one part of a chain accounts for privacy, got dp-sgd and gaussian"),
        ("leakage-adaptive then top-k", "steps differ between rounds stands alone, got leakage-adaptive"),
        ("top-k then dp-sgd", "dp-sgd protects local steps, got it after top-k: write it first"),
    ],
)
def test_chains_whose_order_or_guarantee_means_nothing_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        built(text)


def test_a_chain_of_one_is_refused_without_the_grammar_too():
    with pytest.raises(ValueError, match="two parts or more, got 1"):
        Chain((TopK(),))


def test_a_chain_asks_every_part_whether_it_fits_the_model_and_restores_it():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    good = built("dp-sgd(noise-multiplier=1) then withhold(layers=0)")
    release = good.release(10, 5, 3)
    private, _ = good.prepare(model, optimizer, release, 5, Generator())
    assert private is not model
    good.restore(private)
    assert all(not layer._forward_hooks for layer in model.modules())
    bad = built("dp-sgd(noise-multiplier=1) then withhold(layers=7)")
    with pytest.raises(ValueError, match="withhold names layers of the model, got '7'"):
        bad.prepare(model, optimizer, release, 5, Generator())


def test_a_later_defense_hides_what_it_overwrites_and_leaves_the_rest():
    noise, levels, zeros = GaussianNoise(1.0), QuantizationLevels(3), Sparsity(0.1)
    steps = [
        noise,
        IndependentNoise("rounds"),
        ClipNorm(1.0, of="example"),
        PoissonSampling(0.1),
        NothingBeside(),
    ]
    assert claims_left([steps, [zeros]]) == ([*steps[2:], zeros], steps[:2])
    assert claims_left([[zeros], [levels]]) == ([zeros, levels], [])
    assert claims_left([[levels], [zeros]]) == ([levels, zeros], [])
    assert claims_left([[zeros], [levels], [ClipNorm(1.0), noise]]) == (
        [ClipNorm(1.0), noise],
        [zeros, levels],
    )
    assert claims_left([[ClipNorm(1.0), noise], [zeros]]) == ([zeros], [ClipNorm(1.0), noise])


@pytest.mark.parametrize(
    "text",
    [
        "dp-sgd(noise-multiplier=1, epsilon=0) then top-k(fraction=0.2)",
        f"top-k(fraction=0.2) then {NOISY}",
        f"{NOISY} then quantize(bits=4)",
        "top-k(fraction=0.2) then sign",
    ],
)
def test_a_chained_federation_is_repeated_and_keeps_the_claims_that_are_left(tmp_path, text):
    runs = []
    for name in ("a", "b"):
        flat = {
            "defense.name": text,
            "data.max-examples": 200,
            "model.name": "mlp(hidden=8)",
            "federation.clients": 2,
            "federation.rounds": 2,
            "train.batch-size": 8,
            "train.local-steps": 2,
            "audit.measures": "update-norm",
            "audit.save-updates": True,
            "output.directory": str(tmp_path),
            "output.name": name,
        }
        runs.append(execute(RunConfig.from_flat(flat)))
    first, second = ((run.path / "weights.safetensors").read_bytes() for run in runs)
    assert first == second
    findings = verify_run(runs[0].path)
    assert not [str(x) for x in findings if x.verdict == "violated"]
    hidden = [x for x in findings if "hides it" in x.reason]
    assert bool(hidden) == (not text.startswith("top-k(fraction=0.2) then sign"))
