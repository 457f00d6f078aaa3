"""Usable information: closed forms, planted and absent leaks, what held-out means, and the measure itself."""

import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedaudit.measures.usable_information as module
from fedaudit.config import RunConfig
from fedaudit.federation.execution import execute
from fedaudit.measures.draws import generator_for
from fedaudit.measures.usable_information import (
    UsableInformation,
    split_examples,
    usable_attribute_information,
    usable_input_information,
)
from fedaudit.needs import Needs
from fedaudit.registry import MEASURES
from fedaudit.spec import parse_spec
from fedaudit.types import ClientUpdate, Estimate, LocalEvidence, RoundContext, Skip, StepRelease


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def plain_split(n: int) -> tuple[Tensor, Tensor, Tensor]:
    return split_examples(torch.zeros(n), seeded(0))


@pytest.mark.parametrize("snr", [0.1, 1.0, 10.0])
def test_a_gaussian_channel_gives_half_the_log_of_one_plus_snr_per_dimension(snr: float) -> None:
    n, D = 8000, 3
    x = gaussian(n, D, seed=1)
    features = (x * snr**0.5 + gaussian(n, D, seed=2)) @ gaussian(D, D, seed=3)  # any invertible mixture
    found = usable_input_information([features], x, plain_split(n), seeded(0))
    # two log variances of 2400 examples each, halved, in D dimensions: at most sqrt(D 2 / 2400)
    tolerance = 4 * (D * 2 / 2400) ** 0.5
    assert found.nats == pytest.approx(D / 2 * math.log(1 + snr), abs=tolerance)
    assert found.low < found.nats < found.high
    assert found.high - found.low < 2 * tolerance


def test_unrelated_features_say_nothing_about_the_input() -> None:
    for seed in range(5):
        x, features = gaussian(400, 20, seed=seed), gaussian(400, 10, seed=100 + seed)
        found = usable_input_information([features], x, plain_split(400), seeded(0))
        assert (
            -0.3 < found.nats < 0.1
        )  # 20 x 10 coefficients of 200 examples cost 20 * 10 / 400 without ridge


def test_a_misled_decoder_is_reported_as_negative() -> None:
    x = gaussian(100, 2, seed=0)
    parts = plain_split(100)
    features = x.clone()
    features[parts[2]] *= -1.0
    assert usable_input_information([features], x, parts, seeded(0)).nats < -1


def test_validation_chooses_among_alternatives() -> None:
    x = gaussian(300, 2, seed=0)
    useless = gaussian(300, 4, seed=1)
    parts = plain_split(300)
    assert usable_input_information([useless, x], x, parts, seeded(0)).alternative == 1
    assert usable_input_information([x, useless], x, parts, seeded(0)).alternative == 0
    assert usable_attribute_information([useless, x], x[:, 0] > 0, parts, seeded(0)).alternative == 1
    with_itself = usable_input_information([x, x], x, parts, seeded(0))
    assert with_itself.alternative == 0  # of equals the first


def test_a_planted_linear_leak_gives_nearly_the_entropy_of_the_attribute() -> None:
    n = 400
    z = torch.rand(n, generator=seeded(0)) < 0.3
    features = gaussian(n, 8, seed=1)
    features[:, 5] += 12.0 * z
    parts = split_examples(z, seeded(0))
    found = usable_attribute_information([features], z, parts, seeded(0))
    share = float(z.double().mean())
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert 0.95 * entropy < found.nats <= 1.02 * entropy  # parts differ from the whole by rounding


def test_a_probe_of_gaussian_classes_finds_their_mutual_information() -> None:
    """Logistic regression is Bayes-optimal between N(-m, 1) and N(m, 1): I(Z; G) by quadrature."""
    n, m = 6000, 0.8
    z = torch.arange(n) % 2 == 0
    features = torch.where(z, m, -m).double()[:, None] + gaussian(n, 1, seed=1)
    grid = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-((grid - m) ** 2) / 2) / (2 * math.pi) ** 0.5
    conditional = float(torch.trapezoid(density * torch.log1p(torch.exp(-2 * m * grid)), grid))
    found = usable_attribute_information([features], z, split_examples(z, seeded(0)), seeded(0))
    # gains of 1800 examples: their standard deviation is below 0.6
    assert found.nats == pytest.approx(math.log(2) - conditional, abs=4 * 0.6 / 1800**0.5)
    assert found.low < math.log(2) - conditional < found.high


def test_an_absent_attribute_gives_almost_nothing_and_sometimes_less() -> None:
    values = []
    for seed in range(8):
        z = torch.rand(400, generator=seeded(seed)) < 0.5
        features = gaussian(400, 10, seed=100 + seed)
        found = usable_attribute_information([features], z, split_examples(z, seeded(0)), seeded(0))
        values.append(found.nats)
    assert max(abs(value) for value in values) < 0.05  # ten coefficients of 200 examples cost 10 / 400
    assert min(values) < 0


def test_no_example_serves_two_purposes_and_both_values_are_in_every_part() -> None:
    z = torch.arange(50) % 5 == 0
    parts = split_examples(z, seeded(3))
    assert torch.cat(parts).sort().values.tolist() == list(range(50))
    assert [(len(part), int(z[part].sum())) for part in parts] == [(25, 5), (10, 2), (15, 3)]


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum")


with torch.random.fork_rng():
    torch.manual_seed(0)
    WEIGHTS = build_model().state_dict()


def update(client: int) -> ClientUpdate:
    return ClientUpdate(client, 1, WEIGHTS, {}, 60)


def examples(key: int, n: int) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 12, generator=seeded(key)), torch.randint(3, (n,), generator=seeded(key + 1))


def context(
    observer: str = "oracle",
    n: int = 100,
    noise: float = 0.0,
    seed: int = 0,
    clip_norm: float | None = 1.0,
    data: tuple[Tensor, Tensor] | None = None,
) -> RoundContext:
    release = StepRelease(clip_norm, noise, 0.1)
    private = observer != "server"
    return RoundContext(
        round=1,
        build_model=build_model,
        loss=loss,
        reference=None if private else data or examples(50, n),
        release=None if private else lambda u: release,
        evidence=(lambda u: LocalEvidence(*(data or examples(u.client_id, n)), release)) if private else None,
        observer=observer,  # type: ignore[arg-type]
        seed=seed,
    )


def measured(measure: UsableInformation, ctx: RoundContext, *clients: int) -> Estimate:
    (found,) = measure([update(client) for client in clients or (0,)], ctx)
    assert isinstance(found, Estimate)
    return found


LABEL = UsableInformation("attribute", "label:0")


@pytest.mark.parametrize("observer", ["server", "client", "oracle"])
@pytest.mark.parametrize("target", ["input", "attribute"])
def test_every_observer_measures_the_round_from_what_it_states_to_need(observer: str, target: str) -> None:
    measure = UsableInformation(target)  # type: ignore[arg-type]
    ctx = context(observer)
    assert measure.needs(ctx.observer) in ctx.known
    assert (Needs.EVIDENCE in measure.needs(ctx.observer)) == (observer != "server")
    found = measured(measure, ctx, *([0] if observer == "client" else [0, 3]))
    assert found.unit == "nats"
    assert list(found.layers) == ["0", "2"]
    assert found.extra["examples"] == (200 if observer == "oracle" else 100)
    assert found.extra["best-layer-nats"] == max(found.layers.values())
    assert found.layers[str(found.extra["best-layer"])] == found.extra["best-layer-nats"]


def test_a_bare_gradient_gives_away_label_and_input() -> None:
    label, pixels = measured(LABEL, context(n=250)), measured(UsableInformation(), context(n=250))
    assert float(label.extra["normalised"]) > 0.9
    assert label.value == pytest.approx(float(label.extra["normalised"]) * float(label.extra["entropy"]))
    assert label.extra["attribute-is-label"] is True
    assert pixels.low is not None
    assert pixels.low > 1.0
    assert pixels.extra["inputs"] == 12
    assert pixels.value == pytest.approx(12 * float(pixels.extra["nats-per-input"]))


@pytest.mark.parametrize("measure", [LABEL, UsableInformation()], ids=["label", "input"])
def test_noise_and_larger_batches_take_it_away(measure: UsableInformation) -> None:
    bare = measured(measure, context(n=250)).value
    some = measured(measure, context(n=250, noise=0.5)).value
    much = measured(measure, context(n=250, noise=100.0))
    batch = UsableInformation(measure.target, measure.attribute, batch=8)
    assert bare > some + 0.1
    assert abs(much.value) < 0.2 * bare
    assert much.low is not None
    assert much.low - 0.1 < 0
    assert measured(batch, context(n=250)).value < 0.7 * bare


def test_an_attribute_without_trace_is_not_found() -> None:
    """Labels drawn apart from the inputs, and an attribute that is a coin tossed for each example."""
    x, y = examples(0, 250)
    constant = torch.full_like(x, 0.5)
    constant[:, 0] += 1e-4 * torch.rand(250, generator=seeded(9))  # a brightness without effect
    found = measured(UsableInformation("attribute", "brightness"), context(data=(constant, y), noise=0.05))
    assert abs(found.value) < 0.08
    assert abs(float(found.extra["normalised"])) < 0.12


def test_what_is_held_out_changes_neither_features_nor_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    original = module.fit_logistic

    def spying(training, validation):  # type: ignore[no-untyped-def]
        rows = torch.cat([training[0], validation[0]])
        seen.append(rows @ rows.T)  # features are defined up to the signs of their directions
        return original(training, validation)

    monkeypatch.setattr(module, "fit_logistic", spying)
    x, y = examples(0, 100)
    x = x.double()
    ctx = context(data=(x, y))
    ctx = RoundContext(**{**vars(ctx), "build_model": lambda: build_model().double()})
    first = measured(LABEL, ctx)
    drawn = torch.randperm(100, generator=generator_for(ctx, LABEL.name, "examples", 0))
    parts = split_examples(y[drawn] == 0, generator_for(ctx, LABEL.name, "split", -1))
    changed = x.clone()
    changed[drawn[parts[2]]] = torch.rand(len(parts[2]), 12, dtype=x.dtype, generator=seeded(77))
    evidence = LocalEvidence(changed, y, StepRelease(1.0, 0.0, 0.1))
    second = measured(LABEL, RoundContext(**{**vars(ctx), "evidence": lambda u: evidence}))
    assert len(seen) == 12  # two degrees, for the whole and two layers, twice
    for before, after in zip(seen[:6], seen[6:], strict=True):
        torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-8)
    assert second.extra["penalty"] == first.extra["penalty"]
    assert second.value != pytest.approx(first.value, rel=1e-6)


def test_constant_pixels_are_left_out() -> None:
    x, y = examples(0, 100)
    x[:, 3:8] = 0.25
    x[:, 8] = 0.25 + 1e-3 * x[:, 8]
    found = measured(UsableInformation(), context(data=(x, y)))
    assert found.extra["inputs"] == 6


def test_numbers_follow_from_the_seed_and_leave_global_generators_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (measured(LABEL, context(noise=0.3, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert first == again
    assert first != other


def test_too_few_examples_are_a_skip_that_names_the_minimum() -> None:
    for measure, ctx, reason in (
        (UsableInformation(), context("client", n=39), "at least 40 are needed, got 39"),
        (LABEL, context("client", n=20), "at least 40 are needed, got 20"),
        (
            UsableInformation("attribute", "label:2"),
            context(data=(examples(0, 60)[0], (torch.arange(60) < 9).long() * 2)),
            "at least 10 with and without label:2 are needed, got 9 and 51",
        ),
        (UsableInformation("attribute", "label:9"), context(), "which none of 100 have"),
        (UsableInformation(batch=9), context(n=40), "as many as the smallest part, got 9"),
        (
            UsableInformation(),
            context(data=(torch.ones(50, 12), examples(0, 50)[1])),
            "needs inputs that vary",
        ),
    ):
        (found,) = measure([update(0)], ctx)
        assert isinstance(found, Skip)
        assert reason in found.reason
    assert LABEL([], context()) == []


def test_options_are_written_in_the_spec_and_checked() -> None:
    built = MEASURES.build(parse_spec("usable-information(target=attribute, attribute=contrast, dims=8)"))
    assert built == UsableInformation("attribute", "contrast", dims=8)
    assert built.name == "usable-attribute-information"
    assert MEASURES.build(parse_spec("usable-information")).name == "usable-information"
    with pytest.raises(ValueError, match="target is input or attribute, got 'both'"):
        UsableInformation("both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="examples must be at least 40, got 39"):
        UsableInformation(examples=39)
    with pytest.raises(ValueError, match="an attribute is one of"):
        UsableInformation(attribute="hair")


def test_a_federation_records_whole_and_layers_for_every_observer(tmp_path) -> None:  # type: ignore[no-untyped-def]
    flat = {
        "model.name": "mlp(hidden=8)",
        "federation.clients": 3,
        "federation.rounds": 1,
        "data.max-examples": 600,
        "audit.measures": "subspace-distance(attribute=brightness), usable-information, "
        "usable-information(target=attribute, attribute=brightness)",
        "audit.observers": "server, client, oracle",
        "defense.name": "dp-sgd(epsilon=8)",
        "output.directory": str(tmp_path),
    }
    records = execute(RunConfig.from_flat(flat)).records
    names = ("subspace-distance", "usable-information", "usable-attribute-information")
    for name in names:
        rows = records[records["quantity"] == name]
        assert set(rows["status"]) == {"ok"}, rows["reason"].tolist()
        assert sorted(rows["observer"]) == ["client"] * 3 + ["oracle", "server"]
        assert rows["client_id"].isna().sum() == 2  # the round's own rows: server and oracle
        assert all(json.loads(extra)["noise-std"] > 0 for extra in rows["extra"])
        layers = records[records["quantity"] == f"{name}.layer"]
        assert len(layers) == 2 * 5
        assert set(layers["layer"]) == {"fc1", "fc2"}
