"""The registered measures of curvature and sensitivity: whose examples, at which weights, what beside."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedaudit.audit.measuring import run_measure
from fedaudit.config import RunConfig
from fedaudit.federation.execution import execute
from fedaudit.measures.curvature import closed_form_traces, hessian_probes, memorisation_ceiling
from fedaudit.measures.draws import generator_for
from fedaudit.measures.gradient_sensitivity import GradientSensitivity, even_shares
from fedaudit.measures.input_curvature import InputCurvature, weights_of
from fedaudit.measures.sensitivity import gradient_sensitivity
from fedaudit.needs import Needs
from fedaudit.registry import MEASURES
from fedaudit.spec import parse_spec
from fedaudit.types import (
    ClientUpdate,
    Estimate,
    Guarantee,
    LocalEvidence,
    Loss,
    Measure,
    Observer,
    RoundContext,
    Skip,
    StepRelease,
)

D, C = 6, 3
MEASURED = [InputCurvature(probes=4, examples=10), GradientSensitivity(probes=4, examples=10)]
each_measure = pytest.mark.parametrize("measure", MEASURED, ids=lambda measure: measure.name)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum")


def weighted(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, weight=torch.tensor([1.0, 2.0, 3.0]), reduction="sum")


def relu_net() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, C))


def tanh_net() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C))


WEIGHTS = {
    name: 0.7 * torch.randn(w.shape, generator=seeded(0)) for name, w in tanh_net().state_dict().items()
}
RELU_WEIGHTS = {name.replace("2.", "3."): w for name, w in WEIGHTS.items()}


def update(client: int, weights: dict[str, Tensor] | None = None) -> ClientUpdate:
    before = weights or WEIGHTS
    delta = {n: 0.3 * torch.randn(w.shape, generator=seeded(10 + client)) for n, w in before.items()}
    return ClientUpdate(client, 1, before, delta, 12)


def examples(client: int, n: int = 12) -> tuple[Tensor, Tensor]:
    generator = seeded(100 + client)
    return torch.randn(n, D, generator=generator), torch.randint(C, (n,), generator=generator)


def context(
    observer: Observer,
    build=tanh_net,
    *,
    used_loss: Loss = loss,
    guarantees: dict[int, Guarantee] | None = None,
    sizes: Sequence[int] = (12, 12, 12),
    batch_size: int | None = 4,
) -> RoundContext:
    def evidence(u: ClientUpdate) -> LocalEvidence:
        return LocalEvidence(*examples(u.client_id, sizes[u.client_id]), StepRelease(None, 0.0, 1.0))

    return RoundContext(
        round=1,
        build_model=build,
        loss=used_loss,
        batch_size=batch_size,
        reference=examples(50, 20) if observer == "server" else None,
        evidence=None if observer == "server" else evidence,
        guarantee=(lambda u: guarantees.get(u.client_id)) if guarantees is not None else None,
        observer=observer,
    )


def model_at(build, weights: dict[str, Tensor]) -> nn.Module:
    model = build()
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("variant", ["trace", "trace-squared", "norm"])
def test_a_clients_curvature_is_the_mean_of_the_pure_function_over_its_examples(variant: str) -> None:
    measure = MEASURES.build(parse_spec(f"input-curvature(probes=6, variant={variant})"))
    ctx = context("oracle")
    for number, estimate in enumerate(measure([update(0), update(1)], ctx)):
        x, y = examples(number)
        model = model_at(tanh_net, weights_of(update(number), "after"))
        found = hessian_probes(model, loss, x, y, 6, generator_for(ctx, "input-curvature", "probes", number))
        by_name = {"trace": found.trace(), "trace-squared": found.trace_squared(), "norm": found.norm()}
        expected = by_name[variant]
        assert estimate.value == pytest.approx(float(expected.mean.mean()), rel=1e-6)
        assert estimate.extra["max"] == pytest.approx(float(expected.mean.max()), rel=1e-6)
        assert estimate.extra["median"] == pytest.approx(float(expected.mean.quantile(0.5)), rel=1e-6)
        error = float(expected.standard_error.square().sum().sqrt()) / 12
        assert estimate.extra["standard-error"] == pytest.approx(error, rel=1e-6)
        assert estimate.low == pytest.approx(estimate.value - 1.96 * error)
        for name, each in by_name.items():
            assert estimate.extra[name] == pytest.approx(float(each.mean.mean()), rel=1e-6)
        assert (estimate.extra["method"], estimate.kind, estimate.extra["examples"]) == (
            "Hutchinson",
            "estimate",
            12,
        )


def test_piecewise_linear_logits_give_the_exact_value_without_interval() -> None:
    u = update(0, RELU_WEIGHTS)
    (estimate,) = InputCurvature()([u], context("client", relu_net))
    model = model_at(relu_net, weights_of(u, "after"))
    trace, squared = closed_form_traces(model, examples(0)[0])
    assert estimate.value == pytest.approx(float(trace.mean()), rel=1e-6)
    assert estimate.extra["trace-squared"] == pytest.approx(float(squared.mean()), rel=1e-6)
    assert (estimate.extra["method"], estimate.kind, estimate.low) == ("closed form", "exact", None)
    (fewer,) = InputCurvature(examples=5)([u], context("client", relu_net))
    assert (fewer.kind, fewer.extra["examples"]) == ("estimate", 5)


@pytest.mark.parametrize("given", [weighted, lambda o, y: 2 * loss(o, y)], ids=["weighted", "doubled"])
def test_another_loss_than_cross_entropy_does_not_get_cross_entropys_closed_form(given: Loss) -> None:
    u = update(0, RELU_WEIGHTS)
    (estimate,) = InputCurvature(probes=64)([u], context("oracle", relu_net, used_loss=given))
    (plain,) = InputCurvature(probes=64)([u], context("oracle", relu_net))
    assert (estimate.extra["method"], plain.extra["method"]) == ("Hutchinson", "closed form")
    # every label weighs at least 1, and labels above 0 more
    assert estimate.value > plain.value + 3 * float(estimate.extra["standard-error"])


def test_many_classes_are_probed_rather_than_differentiated_one_by_one() -> None:
    u = update(0, RELU_WEIGHTS)
    ctx = context("oracle", relu_net)
    (exact,) = InputCurvature(probes=2)([u], ctx)
    assert exact.extra["method"] == "closed form"
    wide = RoundContext(**{**vars(ctx), "build_model": lambda: nn.Linear(D, 17)})
    weights = {"weight": torch.randn(17, D, generator=seeded(3)), "bias": torch.zeros(17)}
    for probes, method in ((2, "Hutchinson"), (3, "closed form")):
        (estimate,) = InputCurvature(probes=probes)([update(0, weights)], wide)
        assert estimate.extra["method"] == method


def test_a_server_sees_each_clients_returned_weights_and_one_value_for_the_broadcast_ones() -> None:
    updates = [update(i) for i in range(3)]
    after = InputCurvature(probes=4)(updates, context("server"))
    before = InputCurvature(probes=4, at="before")(updates, context("server"))
    assert len({e.value for e in after}) == 3
    assert len({e.value for e in before}) == 1
    assert {e.extra["examples-of"] for e in after} == {"reference"}
    reversed_order = InputCurvature(probes=4)(updates[::-1], context("server"))
    assert [e.value for e in reversed_order] == [e.value for e in after][::-1]


def test_equal_returned_weights_have_equal_curvature_on_a_server() -> None:
    same = [ClientUpdate(i, 1, WEIGHTS, update(0).delta, 12) for i in range(2)]
    first, second = InputCurvature(probes=2)(same, context("server"))
    assert first == second


def test_before_and_after_are_the_weights_a_client_received_and_returned() -> None:
    u = update(0)
    still = ClientUpdate(0, 1, weights_of(u, "after"), {n: 0 * d for n, d in u.delta.items()}, 12)
    at = {
        where: InputCurvature(probes=4, at=where)([u], context("oracle"))[0].value
        for where in ("before", "after")
    }  # type: ignore[arg-type]
    (moved,) = InputCurvature(probes=4, at="before")([still], context("oracle"))
    assert moved.value == at["after"] != at["before"]


def test_counters_keep_their_type_when_weights_are_put_together() -> None:
    u = ClientUpdate(0, 1, {"w": torch.ones(1), "n": torch.tensor(3)}, {"w": torch.ones(1)}, 1)
    assert weights_of(u, "after") == {"w": torch.tensor([2.0]), "n": torch.tensor(3)}
    assert weights_of(u, "before") == {"w": torch.ones(1), "n": torch.tensor(3)}


def test_the_memorisation_ceiling_stands_beside_an_example_level_guarantee_only() -> None:
    guarantees = {0: Guarantee(2.0, 1e-5, "example", "prv"), 1: Guarantee(2.0, 1e-5, "client", "prv")}
    for observer in ("server", "oracle"):
        stated, of_client, none = InputCurvature(probes=2)(
            [update(i) for i in range(3)],
            context(observer, guarantees=guarantees),  # type: ignore[arg-type]
        )
        assert stated.extra["memorisation-ceiling"] == pytest.approx(1 - math.exp(-2))
        keys = ("epsilon", "delta", "privacy-unit", "accountant")
        assert tuple(stated.extra[key] for key in keys) == (2.0, 1e-5, "example", "prv")
        for other in (of_client, none):
            assert not {"memorisation-ceiling", *keys} & set(other.extra)
    assert memorisation_ceiling(2.0) == stated.extra["memorisation-ceiling"]


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_a_rounds_sensitivity_is_the_mean_of_the_pure_function_whole_and_by_layer(relative: bool) -> None:
    text = str(relative).lower()
    measure = MEASURES.build(parse_spec(f"gradient-sensitivity(probes=6, relative={text}, examples=20)"))
    ctx = context("server")
    (estimate,) = measure([update(0), update(1)], ctx)
    x, y = examples(50, 20)
    model = model_at(tanh_net, WEIGHTS)
    found = gradient_sensitivity(
        model, loss, x, y, 6, generator_for(ctx, "gradient-sensitivity", "probes", -1)
    )
    each = found.relative() if relative else found.absolute()
    whole = found.whole()
    for name, expected in (("relative", whole.relative()), ("absolute", whole.absolute())):
        assert estimate.extra[name] == pytest.approx(float(expected.mean.mean()), rel=1e-6)
    assert estimate.value == estimate.extra["relative" if relative else "absolute"]
    assert list(estimate.layers) == ["0", "2"]
    assert list(estimate.layers.values()) == pytest.approx(each.mean.mean(1).tolist(), rel=1e-6)
    if not relative:  # parts of a norm; means of roots are not exactly a root of a mean
        assert math.hypot(*estimate.layers.values()) == pytest.approx(estimate.value, rel=0.05)


def test_the_batch_factor_is_the_measured_ratio() -> None:
    """Response of the mean gradient to one example over that of single gradients, with the same examples."""
    (estimate,) = GradientSensitivity(probes=200, relative=False, examples=12)(
        [update(0)], context("oracle", batch_size=12)
    )
    assert (estimate.extra["batch-size"], estimate.extra["batch-factor"]) == (12, 1 / 12)
    x, y = examples(0)
    found = gradient_sensitivity(model_at(tanh_net, WEIGHTS), loss, x, y, 200, seeded(1)).whole()
    root_mean_square = float(found.squares.mean().sqrt())
    # |J v|^2 has a relative deviation of at most sqrt(2) per probe, and the root half of it: 5 % at 200
    assert float(estimate.extra["batch-absolute"]) == pytest.approx(root_mean_square / 12, rel=0.2)
    (alone,) = GradientSensitivity(probes=4)([update(0)], context("oracle", batch_size=None))
    assert alone.extra["batch-size"] == 12


def test_an_oracle_draws_evenly_from_all_clients() -> None:
    (estimate,) = GradientSensitivity(probes=2, examples=10)(
        [update(i) for i in range(3)], context("oracle", sizes=(2, 40, 40))
    )
    assert (estimate.extra["examples"], estimate.extra["clients"]) == (10, 3)
    (few,) = GradientSensitivity(probes=2, examples=2)([update(i) for i in range(3)], context("oracle"))
    assert (few.extra["examples"], few.extra["clients"]) == (2, 2)


@pytest.mark.parametrize(
    ("sizes", "total"), [([5, 5, 5], 7), ([1, 9], 100), ([0, 3, 8, 8], 11), ([4], 2)], ids=str
)
def test_shares_are_even_and_take_no_more_than_there_is(sizes: list[int], total: int) -> None:
    shares = even_shares(sizes, total, seeded(0))
    assert sum(shares) == min(total, sum(sizes))
    for share, size in zip(shares, sizes, strict=True):
        assert share <= size
        assert share == size or share >= max(shares) - 1


def test_an_infinite_relative_value_is_counted_and_left_out() -> None:
    def squared(outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs[:, 0] - labels).square().sum()

    x, y = torch.eye(D)[:3], torch.tensor([2.0, 7.0, 9.0])  # the first residual is exactly zero
    ctx = RoundContext(1, lambda: nn.Linear(D, 1), squared, reference=(x, y))
    u = ClientUpdate(0, 1, {"weight": 2 * torch.ones(1, D), "bias": torch.zeros(1)}, {}, 3)
    (estimate,) = GradientSensitivity(probes=4)([u], ctx)
    assert estimate.extra["infinite"] == 1
    assert math.isfinite(estimate.value)
    assert math.isfinite(estimate.layers["model"])


def test_clients_that_started_apart_have_no_common_sensitivity() -> None:
    other = {name: 2 * w for name, w in WEIGHTS.items()}
    with pytest.raises(ValueError, match="got 2 different ones: measure clients that started alike"):
        GradientSensitivity()([update(0), update(1, other)], context("server"))


@each_measure
def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(measure: Measure) -> None:
    ctx = context("server")
    other = RoundContext(**{**vars(ctx), "seed": 1})
    assert measure([update(0)], ctx) == measure([update(0)], ctx)
    assert measure([update(0)], ctx) != measure([update(0)], other)


@each_measure
def test_measuring_leaves_updates_and_the_global_random_state_alone(measure: Measure) -> None:
    torch.manual_seed(3)
    state, u = torch.get_rng_state(), update(0)
    copies = {name: w.clone() for name, w in u.before.items()}
    measure([u], context("oracle"))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(w, copies[name]) for name, w in u.before.items())


@each_measure
@pytest.mark.parametrize("observer", ["server", "client", "oracle"])
def test_each_observer_states_what_it_needs_and_is_measured(measure: Measure, observer: Observer) -> None:
    assert isinstance(measure, Measure)
    assert observer in measure.observers
    other = Needs.REFERENCE if observer == "server" else Needs.EVIDENCE
    assert measure.needs(observer) == Needs.MODEL | other
    found, _ = run_measure(measure, observer, [update(0)], context(observer))
    assert [type(each) for each in found] == [Estimate]
    bare = RoundContext(**{**vars(context(observer)), "reference": None, "evidence": None})
    skipped, _ = run_measure(measure, observer, [update(0)], bare)
    assert isinstance(skipped[0], Skip)
    with pytest.raises(ValueError, match=f"{measure.name} lacks what observer '{observer}' needs"):
        measure([update(0)], bare)
    with pytest.raises(ValueError, match=f"{measure.name} needs the model and the loss"):
        measure([update(0)], RoundContext(1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: InputCurvature(probes=1), "probes must be at least 2, got 1"),
        (lambda: InputCurvature(examples=0), "examples must be at least 1, got 0"),
        (lambda: InputCurvature(variant="eigen"), "one of trace, trace-squared, norm, got 'eigen'"),
        (lambda: InputCurvature(at="during"), "one of before, after, got 'during'"),
        (lambda: GradientSensitivity(probes=1), "probes must be at least 2, got 1"),
        (lambda: GradientSensitivity(examples=0), "examples must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_federation_records_curvature_per_client_and_sensitivity_per_layer(tmp_path) -> None:
    flat = {
        "data.name": "digits",
        "data.max-examples": 120,
        "model.name": "mlp(hidden=8)",
        "federation.clients": 3,
        "federation.rounds": 2,
        "train.local-steps": 1,
        "defense.name": "dp-sgd(epsilon=8)",
        "audit.measures": "input-curvature, gradient-sensitivity",
        "audit.observers": "server, client, oracle",
        "output.directory": str(tmp_path),
        "output.name": "run",
    }
    records = execute(RunConfig.from_flat(flat)).records
    assert set(records["status"]) == {"ok"}
    counts = records.groupby(["quantity", "observer"]).size()
    # two rounds of three clients; the round's own value once, by each client about itself three times
    for observer, clients in (("server", 1), ("client", 3), ("oracle", 1)):
        assert counts["input-curvature", observer] == 6
        assert counts["gradient-sensitivity", observer] == 2 * clients
        assert counts["gradient-sensitivity.layer", observer] == 2 * clients * 2
    layers = records[records["quantity"] == "gradient-sensitivity.layer"]
    assert set(layers["layer"]) == {"fc1", "fc2"}
    assert bool((layers["value"] > 0).all())
    curvature = records[records["quantity"] == "input-curvature"]
    assert bool(curvature["extra"].str.contains('"memorisation-ceiling"').all())
    assert bool((curvature["value"] > 0).all())
