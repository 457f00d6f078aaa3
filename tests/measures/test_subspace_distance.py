"""Distance of gradient subspaces: equal distributions, planted subspaces, noise, and the measure itself."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedaudit.measures.subspace_distance import SubspaceDistance, compare_subspaces
from fedaudit.needs import Needs
from fedaudit.registry import MEASURES
from fedaudit.spec import parse_spec
from fedaudit.types import ClientUpdate, Estimate, LocalEvidence, RoundContext, Skip, StepRelease

SIZES = {"batches": 12, "repetitions": 10}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def planted(n: int, basis: Tensor, noise: float, seed: int) -> Tensor:
    """Gradients (n, P) spread over the rows of `basis` (k, P), with some noise in all directions."""
    return gaussian(n, len(basis), seed=seed) @ basis + noise * gaussian(n, basis.shape[1], seed=seed + 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_equal_distributions_are_no_further_apart_than_their_halves(batch: int) -> None:
    basis = torch.linalg.qr(gaussian(40, 3, seed=0)).Q.T
    for seed in range(5):
        without, having = planted(60, basis, 0.3, 100 + seed), planted(40, basis, 0.3, 200 + seed)
        found = compare_subspaces(without, having, 3, batch=batch, **SIZES, generator=seeded(seed))
        assert found.distance > 0.3  # chance alone
        # the mean of 40 distances between pools of two finite samples: within two spreads of a single one
        assert abs(found.corrected) < 2 * found.null_std
        assert abs(found.projection) < 2 * found.null_std


def test_orthogonal_subspaces_are_as_far_apart_as_can_be() -> None:
    basis = torch.linalg.qr(gaussian(40, 6, seed=0)).Q.T
    without, having = planted(60, basis[:3], 1e-4, 1), planted(60, basis[3:], 1e-4, 2)
    found = compare_subspaces(without, having, 3, **SIZES, generator=seeded(0))
    assert found.distance == pytest.approx(math.pi / 2 * math.sqrt(3), abs=0.01)
    assert found.null_mean < 0.01
    assert found.projection == pytest.approx(math.sqrt(3), abs=0.01)


def test_a_planted_angle_is_recovered() -> None:
    basis = torch.linalg.qr(gaussian(40, 4, seed=0)).Q.T
    turned = math.cos(0.5) * basis[:2] + math.sin(0.5) * basis[2:]
    without, having = planted(60, basis[:2], 1e-4, 1), planted(60, turned, 1e-4, 2)
    found = compare_subspaces(without, having, 2, **SIZES, generator=seeded(0))
    assert found.corrected == pytest.approx(0.5 * math.sqrt(2), abs=0.01)


def test_no_single_long_gradient_leads() -> None:
    basis = torch.linalg.qr(gaussian(40, 3, seed=0)).Q.T
    without, having = planted(60, basis, 0.1, 1), planted(60, basis, 0.1, 2)
    lengths = torch.logspace(-3, 3, 60).double()[:, None]
    plain = compare_subspaces(without, having, 3, **SIZES, generator=seeded(0))
    scaled = compare_subspaces(lengths * without, having / lengths, 3, **SIZES, generator=seeded(0))
    assert scaled.distance == pytest.approx(plain.distance, rel=1e-6)


def test_noise_hides_the_difference() -> None:
    basis = torch.linalg.qr(gaussian(40, 6, seed=0)).Q.T
    without, having = planted(60, basis[:3], 0.01, 1), planted(60, basis[3:], 0.01, 2)
    by_noise = [
        compare_subspaces(
            without, having, 3, **SIZES, noise_std=std, dimensions=5000, generator=seeded(0)
        ).corrected
        for std in (0.0, 0.02, 0.1, 10.0)
    ]
    assert by_noise[0] > by_noise[1] > by_noise[2] + 0.3
    assert abs(by_noise[3]) < 0.1


def test_noise_beside_the_span_is_as_noise_in_all_dimensions() -> None:
    """The same gradients with 300 explicit dimensions and with 20 that span them, under the same noise."""
    basis = torch.linalg.qr(gaussian(300, 20, seed=0)).Q.T
    without, having = gaussian(30, 20, seed=1), gaussian(30, 20, seed=2)
    options = {"noise_std": 0.5, "dimensions": 300, "batches": 10, "repetitions": 60}
    short = compare_subspaces(without, having, 2, **options, generator=seeded(0))  # type: ignore[arg-type]
    long = compare_subspaces(without @ basis, having @ basis, 2, **options, generator=seeded(1))  # type: ignore[arg-type]
    assert short.null_mean == pytest.approx(long.null_mean, abs=4 * short.null_std * (2 / 60) ** 0.5)
    assert short.distance == pytest.approx(long.distance, abs=4 * short.null_std * (2 / 60) ** 0.5)


def test_too_few_examples_are_refused_with_the_numbers() -> None:
    rows = gaussian(20, 10, seed=0)
    with pytest.raises(ValueError, match="got 7 and 20 for k=4, batch=1, batches=12"):
        compare_subspaces(rows[:7], rows, 4, **SIZES, generator=seeded(0))
    with pytest.raises(ValueError, match="hold max"):
        compare_subspaces(rows, rows, 2, batch=11, **SIZES, generator=seeded(0))
    with pytest.raises(ValueError, match="at least 2, got 1"):
        compare_subspaces(rows, rows, 2, batches=4, repetitions=1, generator=seeded(0))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3, bias=False), Scale())


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum")


with torch.random.fork_rng():
    torch.manual_seed(0)
    WEIGHTS = build_model().state_dict()


def update(client: int) -> ClientUpdate:
    return ClientUpdate(client, 1, WEIGHTS, {}, 40)


def examples(key: int, n: int) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 12, generator=seeded(key)), torch.randint(3, (n,), generator=seeded(key + 1))


def context(observer: str, n: int = 40, noise: float = 0.0, seed: int = 0) -> RoundContext:
    release = StepRelease(1.0, noise, 0.1)
    private = observer != "server"
    return RoundContext(
        round=1,
        build_model=build_model,
        loss=loss,
        reference=None if private else examples(50, n),
        release=None if private else lambda u: release,
        evidence=(lambda u: LocalEvidence(*examples(u.client_id, n), release)) if private else None,
        observer=observer,  # type: ignore[arg-type]
        seed=seed,
    )


@pytest.mark.parametrize("observer", ["server", "client", "oracle"])
def test_every_observer_measures_the_round_from_what_it_states_to_need(observer: str) -> None:
    measure = SubspaceDistance(k=3, repetitions=4)
    ctx = context(observer)
    assert measure.needs(ctx.observer) in ctx.known
    assert (Needs.EVIDENCE in measure.needs(ctx.observer)) == (observer != "server")
    updates = [update(0)] if observer == "client" else [update(0), update(3)]
    (found,) = measure(updates, ctx)
    assert isinstance(found, Estimate)
    assert found.unit == "rad"
    assert found.extra["examples"] == 40 * (2 if observer == "oracle" else 1)
    assert found.value == float(found.extra["distance"]) - float(found.extra["null-mean"])
    assert list(found.layers) == ["0", "2"]
    assert found.extra["layers-left-out"] == "3"  # three parameters are all in a subspace of k=3
    assert found.extra["attribute-is-label"] is False


def test_a_label_is_further_apart_than_a_property_without_trace() -> None:
    ctx = context("oracle", n=60)
    updates = [update(0), update(3)]
    label, bright = (
        SubspaceDistance(attribute=attribute, k=1, batch=1, repetitions=10)(updates, ctx)[0]
        for attribute in ("label:0", "contrast")
    )
    assert isinstance(label, Estimate)
    assert isinstance(bright, Estimate)
    assert label.extra["attribute-is-label"] is True
    assert label.value > 3 * float(label.extra["null-std"])
    assert label.value > bright.value


def test_the_releases_noise_hides_the_label() -> None:
    measure = SubspaceDistance(attribute="label:0", k=1, batch=1, repetitions=10)
    (bare,), (noisy,) = (measure([update(0)], context("oracle", 60, noise)) for noise in (0.0, 100.0))
    assert isinstance(bare, Estimate)
    assert isinstance(noisy, Estimate)
    assert abs(noisy.value) < 0.2 * bare.value
    assert noisy.extra["noise-std"] == 100.0


def test_numbers_follow_from_the_seed_and_leave_global_generators_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (
        SubspaceDistance(k=2, repetitions=4)([update(0)], context("oracle", seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert first == again
    assert first != other


def test_too_few_examples_are_a_skip_that_names_the_minimum() -> None:
    (few,) = SubspaceDistance(k=4)([update(0)], context("client", n=14))
    assert isinstance(few, Skip)
    assert "at least 8 examples with and without brightness, got 7 and 7" in few.reason
    (none,) = SubspaceDistance(attribute="label:9")([update(0)], context("client"))
    assert isinstance(none, Skip)
    assert "which none of 40 have" in none.reason
    assert SubspaceDistance()([], context("client")) == []


def test_options_are_written_in_the_spec_and_checked() -> None:
    built = MEASURES.build(parse_spec("subspace-distance(attribute=label:3, k=2, batches=8, batch=1)"))
    assert built == SubspaceDistance(attribute="label:3", k=2, batches=8, batch=1)
    with pytest.raises(ValueError, match="batches must be at least 4, got 3"):
        SubspaceDistance(batches=3)
    with pytest.raises(ValueError, match="examples must be at least 16, got 15"):
        SubspaceDistance(examples=15)
    with pytest.raises(ValueError, match="an attribute is one of"):
        SubspaceDistance(attribute="hair")
