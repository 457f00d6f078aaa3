"""Gradient uniqueness against its leave-one-out definition, and its bound against quadrature."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from torch import nn

from fedaudit.measures.cohort import cohort_gram, parameter_blocks
from fedaudit.measures.ghost_kernels import example_gradients
from fedaudit.measures.gradient_uniqueness import (
    CohortGradientUniqueness,
    ExampleGradientUniqueness,
    diagonal_gradient_uniqueness,
    gradient_uniqueness,
    membership_bound,
    relative_ridge,
    self_influence,
)
from fedaudit.needs import Needs
from fedaudit.registry import MEASURES
from fedaudit.spec import parse_spec
from fedaudit.types import ClientUpdate, LocalEvidence, Measure, RoundContext, StepRelease


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leave_one_out(G, ridge):
    """g_i^T (S_-i + ridge I)^-1 g_i by P x P inversion, as defined."""
    values = []
    for i in range(len(G)):
        others = torch.cat([G[:i], G[i + 1 :]])
        S = others.T @ others + ridge * torch.eye(G.shape[1], dtype=G.dtype)
        values.append(G[i] @ torch.linalg.inv(S) @ G[i])
    return torch.stack(values)


@pytest.mark.parametrize(("B", "P"), [(6, 40), (12, 5), (1, 3)], ids=["wide", "tall", "single"])
@pytest.mark.parametrize("ridge", [1e-2, 1.0, 100.0])
def test_dual_form_equals_leave_one_out_inversion(B, P, ridge):
    G = gaussian(B, P)
    torch.testing.assert_close(
        gradient_uniqueness(G @ G.T, ridge), leave_one_out(G, ridge), rtol=1e-9, atol=1e-12
    )


def test_log_determinants_give_the_same_uniqueness():
    G, ridge, j = gaussian(5, 30), 0.1, 2
    K = G @ G.T
    rest = [i for i in range(5) if i != j]
    whole = torch.logdet(K + ridge * torch.eye(5))
    without = torch.logdet(K[rest][:, rest] + ridge * torch.eye(4))
    expected = whole - without - math.log(ridge)
    assert float(gradient_uniqueness(K, ridge)[j].log1p()) == pytest.approx(float(expected), rel=1e-10)


def test_small_ridge_gives_the_squared_part_nobody_else_spans():
    """GNQ -> |g_perp|^2 / ridge, far beyond where leverage / (1 - leverage) has any digit left."""
    G, ridge = gaussian(4, 10), 1e-12
    others = G[1:]
    perp = G[0] - others.T @ torch.linalg.solve(others @ others.T, others @ G[0])
    got = float(gradient_uniqueness(G @ G.T, ridge)[0])
    assert got * ridge == pytest.approx(float(perp @ perp), rel=1e-9)


def test_large_ridge_gives_the_squared_norm_over_the_ridge():
    G, ridge = gaussian(4, 10), 1e6
    squared = (G @ G.T).diagonal()
    torch.testing.assert_close(gradient_uniqueness(G @ G.T, ridge) * ridge, squared, rtol=1e-4, atol=0.0)


def test_duplicates_have_low_uniqueness():
    G = gaussian(6, 200)
    G[1] = G[0]
    values = gradient_uniqueness(G @ G.T, ridge=1e-2)
    assert float(values[:2].max()) < 1.0
    assert float(values[2:].min()) > 1000 * float(values[:2].max())


def test_pseudo_inverse_ranks_a_duplicate_above_unique_examples_and_ridge_does_not():
    """The pseudo-inverse drops exactly the part of a gradient that makes it unique: why there is a ridge."""
    G = gaussian(6, 200)
    G[1] = G[0]

    def pseudo(i):
        others = torch.cat([G[:i], G[i + 1 :]])
        return float(G[i] @ torch.linalg.pinv(others.T @ others, rtol=1e-9) @ G[i])

    assert pseudo(0) > 10 * max(pseudo(i) for i in range(2, 6))
    ridge = gradient_uniqueness(G @ G.T, ridge=1.0)
    assert float(ridge[0]) < 0.1 * float(ridge[2:].min())


def test_zero_gradients_have_zero_uniqueness():
    G = gaussian(4, 9)
    G[2] = 0
    assert float(gradient_uniqueness(G @ G.T, 0.3)[2]) == pytest.approx(0, abs=1e-14)


def test_uniqueness_follows_the_order_of_the_gradients():
    G, order = gaussian(5, 20), torch.tensor([4, 2, 0, 1, 3])
    K = G @ G.T
    torch.testing.assert_close(
        gradient_uniqueness(K[order][:, order], 0.1), gradient_uniqueness(K, 0.1)[order], rtol=1e-10, atol=0.0
    )


def test_more_examples_never_raise_uniqueness_at_a_fixed_ridge():
    G = gaussian(12, 30)
    K = G @ G.T
    few, many = gradient_uniqueness(K[:5, :5], 0.5), gradient_uniqueness(K, 0.5)[:5]
    assert bool((many <= few * (1 + 1e-12)).all())


def test_relative_ridge_makes_uniqueness_free_of_scale():
    G = gaussian(5, 20)
    K = G @ G.T
    small, large = (gradient_uniqueness(s * K, relative_ridge(s * K)) for s in (1e-6, 1e6))
    torch.testing.assert_close(small, large, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("eps", [1e-2, 3.0])
def test_diagonal_uniqueness_equals_its_definition(eps):
    G = gaussian(5, 7)
    expected = []
    for i in range(5):
        terms = (
            float(G[i, p]) ** 2 / (sum(float(G[k, p]) ** 2 for k in range(5) if k != i) + eps)
            for p in range(7)
        )
        expected.append(sum(terms))
    assert diagonal_gradient_uniqueness(G, eps).tolist() == pytest.approx(expected, rel=1e-12)


def test_diagonal_uniqueness_is_the_full_one_where_coordinates_do_not_mix():
    """One coordinate in each gradient: S_-i is diagonal."""
    G = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(
        diagonal_gradient_uniqueness(G, 0.5), gradient_uniqueness(G @ G.T, 0.5), rtol=1e-12, atol=0.0
    )


def test_diagonal_uniqueness_changes_with_the_basis_and_the_full_one_does_not():
    G = gaussian(5, 7)
    rotation, _ = torch.linalg.qr(gaussian(7, 7, seed=1))
    turned = G @ rotation
    torch.testing.assert_close(
        gradient_uniqueness(turned @ turned.T, 0.5), gradient_uniqueness(G @ G.T, 0.5), rtol=1e-9, atol=0.0
    )
    change = diagonal_gradient_uniqueness(turned, 0.5) / diagonal_gradient_uniqueness(G, 0.5) - 1
    assert float(change.abs().max()) > 0.1


def test_a_small_sum_of_others_is_not_lost_beside_a_large_gradient():
    G = torch.tensor([[1e9, 0.0], [1e-3, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert float(diagonal_gradient_uniqueness(G, 1e-9)[0]) == pytest.approx(1e18 / (1e-6 + 1e-9), rel=1e-12)


def test_self_influence_is_the_squared_norm_of_each_gradient():
    G = gaussian(5, 7)
    expected = [sum(float(value) ** 2 for value in row) for row in G]
    assert self_influence(G @ G.T).tolist() == pytest.approx(expected, rel=1e-12)


def test_unusable_gradients_are_refused():
    with pytest.raises(ValueError, match="eps is positive and finite, got 0"):
        diagonal_gradient_uniqueness(torch.eye(2), 0.0)
    with pytest.raises(ValueError, match=r"shape \(B, P\), got \(2,\)"):
        diagonal_gradient_uniqueness(torch.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"shape \(B, B\), got \(2, 3\)"):
        self_influence(torch.ones(2, 3))


def test_gram_is_not_written_to():
    K = torch.eye(3)
    gradient_uniqueness(K, 1.0)
    assert torch.equal(K, torch.eye(3))


@pytest.mark.parametrize(
    ("gram", "ridge", "message"),
    [
        (torch.eye(2), 0.0, "ridge is positive and finite, got 0"),
        (torch.eye(2), math.inf, "ridge is positive and finite, got inf"),
        (torch.ones(2, 3), 1.0, r"shape \(B, B\), got \(2, 3\)"),
        (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), 1.0, "got NaN or infinity"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 1.0, "a Gram matrix is symmetric"),
        (-torch.eye(2), 0.5, r"positive definite, got ridge=0\.5"),
    ],
)
def test_unusable_input_is_refused(gram, ridge, message):
    with pytest.raises(ValueError, match=message):
        gradient_uniqueness(gram, ridge)


def test_ridge_share_must_be_positive():
    with pytest.raises(ValueError, match="ridge share is positive, got 0"):
        relative_ridge(torch.eye(2), 0)


def channel_information(gnq, p):
    """I(b; Y) in nats for Y = b a + N(0, v), a^2 / v = GNQ / (p (1 - p)), by quadrature over y."""
    a = math.sqrt(gnq / (p * (1 - p)))

    def density(y, mean):
        return math.exp(-((y - mean) ** 2) / 2) / math.sqrt(2 * math.pi)

    def integrand(y):
        mixture = (1 - p) * density(y, 0.0) + p * density(y, a)
        return -mixture * math.log(mixture) if mixture > 0 else 0.0

    entropy, _ = quad(integrand, -12, a + 12, limit=400, points=[0.0, a])
    return entropy - math.log(2 * math.pi * math.e) / 2


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("gnq", [1e-3, 0.1, 1.0, 5.0, 50.0])
def test_membership_bound_holds_for_the_gaussian_channel(gnq, p):
    bound = float(membership_bound(torch.tensor([gnq]), p))
    assert channel_information(gnq, p) <= bound * (1 + 1e-6)


@pytest.mark.parametrize(("gnq", "information", "bound"), [(0.1, 0.04765, 0.04766), (1, 0.3368, 0.3466)])
def test_membership_bound_is_close_for_weak_channels(gnq, information, bound):
    assert channel_information(gnq, 0.5) == pytest.approx(information, abs=5e-5)
    assert float(membership_bound(torch.tensor([gnq]), 0.5)) == pytest.approx(bound, abs=5e-5)


def test_membership_bound_never_exceeds_what_is_unknown():
    assert channel_information(5, 0.5) == pytest.approx(0.6587, abs=5e-5)
    assert float(membership_bound(torch.tensor([5.0]), 0.5)) == pytest.approx(math.log(2))
    assert membership_bound(torch.tensor([5.0]), 1.0).tolist() == [0.0]
    with pytest.raises(ValueError, match=r"probability, got 1\.5"):
        membership_bound(torch.tensor([1.0]), 1.5)


def deltas(N=5, seed=0):
    shapes = {"conv": (4, 3, 3), "bias": (4,), "scalar": (), "head": (7, 2)}
    return [
        {
            name: gaussian(*shape, seed=seed + 100 * i + j).float()
            for j, (name, shape) in enumerate(shapes.items())
        }
        for i in range(N)
    ]


def rows(updates):
    return torch.stack([torch.cat([t.double().reshape(-1) for t in u.values()]) for u in updates])


@pytest.mark.parametrize("elements", [1, 5, 35, 36, 200, 10**6])
def test_blocks_of_any_size_give_the_dense_gram(elements):
    updates = deltas()
    G = rows(updates)
    torch.testing.assert_close(cohort_gram(updates, elements=elements), G @ G.T, rtol=1e-12, atol=1e-12)


def test_gram_of_more_clients_than_one_row_block_is_complete():
    updates = deltas(N=150)
    G, K = rows(updates), cohort_gram(updates, elements=1000)
    torch.testing.assert_close(K, G @ G.T, rtol=1e-12, atol=1e-12)
    assert torch.equal(K, K.T)


def test_blocks_hold_no_more_numbers_than_asked():
    sizes = [block.shape for block in parameter_blocks(deltas(), elements=40)]
    assert max(N * c for N, c in sizes) <= 40
    assert sum(c for _, c in sizes) == 36 + 4 + 1 + 14


def test_updates_are_matched_by_name_and_not_by_order():
    updates = deltas()
    shuffled = [dict(reversed(u.items())) if i % 2 else u for i, u in enumerate(updates)]
    assert torch.equal(cohort_gram(shuffled), cohort_gram(updates))


def test_updates_of_different_models_are_refused():
    first, second = deltas(2)
    with pytest.raises(ValueError, match="same shapes, got others in update 1"):
        cohort_gram([first, {**second, "bias": torch.zeros(5)}])
    with pytest.raises(ValueError, match="same shapes, got others in update 1"):
        cohort_gram([first, {"bias": second["bias"]}])
    with pytest.raises(ValueError, match="got 0 updates"):
        cohort_gram([])


def update(client_id, delta, before=None, num_examples=10):
    return ClientUpdate(client_id, 1, before or {}, delta, num_examples)


def test_cohort_measure_reports_uniqueness_of_every_client():
    updates = [update(i, d) for i, d in enumerate(deltas())]
    copies = [{name: t.clone() for name, t in u.delta.items()} for u in updates]
    estimates = CohortGradientUniqueness(ridge_share=0.05)(updates, RoundContext(1, num_updates=5))
    G = rows([u.delta for u in updates])
    ridge = 0.05 * float((G * G).sum()) / 5
    expected = leave_one_out(G, ridge)
    assert [e.value for e in estimates] == pytest.approx(expected.tolist(), rel=1e-9)
    assert [e.extra["bound-nats"] for e in estimates] == pytest.approx(
        (expected.log1p() / 2).tolist(), rel=1e-9
    )
    assert estimates[0].extra["ridge"] == pytest.approx(ridge)
    assert estimates[0].extra["ridge-rule"] == "0.05 * trace / N"
    assert {(e.unit, e.kind) for e in estimates} == {("1", "exact")}
    for u, copy in zip(updates, copies, strict=True):
        assert all(torch.equal(u.delta[name], copy[name]) for name in copy)


def test_independent_noise_raises_cohort_uniqueness():
    """Why this number is no privacy guarantee."""
    shared = gaussian(300, seed=5)
    measure, ctx = CohortGradientUniqueness(), RoundContext(1, num_updates=6)
    alike = [update(i, {"w": shared + 0.1 * gaussian(300, seed=i)}) for i in range(6)]
    noised = [update(i, {"w": u.delta["w"] + gaussian(300, seed=50 + i)}) for i, u in enumerate(alike)]
    plain, protected = (min(e.value for e in measure(u, ctx)) for u in (alike, noised))
    assert protected > 5 * plain


def test_cohort_of_zero_updates_is_not_unique():
    updates = [update(i, {"w": torch.zeros(4)}) for i in range(3)]
    estimates = CohortGradientUniqueness()(updates, RoundContext(1, num_updates=3))
    assert [e.value for e in estimates] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("spec", "needs", "observers"),
    [
        ("cohort-gradient-uniqueness(ridge-share=0.1)", Needs.COHORT, ("server",)),
        ("example-gradient-uniqueness(examples=8)", Needs.EVIDENCE | Needs.MODEL, ("client", "oracle")),
    ],
)
def test_registered_measures_are_built_from_specs(spec, needs, observers):
    measure = MEASURES.build(parse_spec(spec))
    assert isinstance(measure, Measure)
    assert measure.name == parse_spec(spec).name
    assert all(measure.needs(observer) == needs for observer in measure.observers)
    assert measure.observers == observers


@pytest.mark.parametrize(
    "spec", ["cohort-gradient-uniqueness(ridge-share=0)", "example-gradient-uniqueness(chunk=0)"]
)
def test_unusable_options_are_refused(spec):
    with pytest.raises(Exception, match=r"cannot be used: .*got 0"):
        MEASURES.build(parse_spec(spec))


def cross_entropy(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="sum")


def build_model():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()


class Federation:
    """Two clients with their data, and the context of an oracle."""

    def __init__(self, release, n=10, factory=build_model):
        torch.manual_seed(3)
        self.models_built = 0
        self.factory = factory
        self.before = {name: t.clone() for name, t in factory().state_dict().items()}
        self.data = {c: (gaussian(n, 6, seed=c), torch.arange(n) % 3) for c in (4, 9)}
        self.release = release
        self.updates = [update(c, {"w": torch.ones(1)}, self.before) for c in self.data]

    def build(self):
        self.models_built += 1
        return self.factory()

    def context(self, seed=0):
        return RoundContext(
            1,
            build_model=self.build,
            loss=cross_entropy,
            evidence=lambda u: LocalEvidence(*self.data[u.client_id], self.release),
            observer="oracle",
            seed=seed,
        )

    def gradients(self, client, clip_norm=None):
        model = self.factory().eval()
        model.load_state_dict(self.before)
        return example_gradients(model, cross_entropy, *self.data[client], clip_norm=clip_norm)


def test_example_measure_uses_the_broadcast_weights_and_the_relative_ridge_without_noise():
    federation = Federation(StepRelease(clip_norm=None, noise_std=0.0, sample_rate=0.2))
    estimates = ExampleGradientUniqueness(ridge_share=0.02, chunk=3)(federation.updates, federation.context())
    for client, estimate in zip((4, 9), estimates, strict=True):
        G = federation.gradients(client)
        ridge = 0.02 * float((G * G).sum()) / 10
        expected = leave_one_out(G, ridge)
        assert estimate.value == pytest.approx(float(expected.mean()), rel=1e-8)
        assert estimate.extra["max"] == pytest.approx(float(expected.max()), rel=1e-8)
        assert estimate.extra["median"] == pytest.approx(float(np.median(expected)), rel=1e-8)
        entropy = -0.2 * math.log(0.2) - 0.8 * math.log(0.8)
        bounds = (expected.log1p() / 2).clamp(max=entropy)
        assert estimate.extra["bound-nats"] == pytest.approx(float(bounds.mean()), rel=1e-8)
        assert estimate.extra["bound-nats-max"] == pytest.approx(float(bounds.max()), rel=1e-8)
        assert estimate.extra["ridge-rule"] == "0.02 * trace / B"
        squared_norms = [float(row @ row) for row in G]
        assert estimate.extra["trace-in-self"] == pytest.approx(sum(squared_norms) / 10, rel=1e-8)
        assert (estimate.kind, estimate.extra["examples"], estimate.extra["sample-rate"]) == (
            "exact",
            10,
            0.2,
        )
    assert federation.models_built == 1


def test_noise_and_clipping_of_the_release_set_the_ridge_and_the_gradients():
    federation = Federation(StepRelease(clip_norm=0.5, noise_std=0.3, sample_rate=0.2))
    (estimate, _) = ExampleGradientUniqueness()(federation.updates, federation.context())
    ridge = 0.3**2 / (0.2 * 0.8)
    assert float(federation.gradients(4).norm(dim=1).max()) > 0.5
    expected = leave_one_out(federation.gradients(4, clip_norm=0.5), ridge)
    assert estimate.value == pytest.approx(float(expected.mean()), rel=1e-8)
    assert estimate.extra["ridge"] == pytest.approx(ridge)
    assert estimate.extra["ridge-rule"] == "noise variance / (p (1 - p))"


def test_full_batches_are_judged_with_a_fair_prior():
    federation = Federation(StepRelease(clip_norm=0.5, noise_std=0.3, sample_rate=1.0))
    (estimate, _) = ExampleGradientUniqueness()(federation.updates, federation.context())
    assert estimate.extra["ridge"] == pytest.approx(4 * 0.3**2)
    assert (estimate.extra["prior"], estimate.extra["sample-rate"]) == (0.5, 1.0)
    assert 0 < estimate.extra["bound-nats"] <= math.log(2)


def test_more_noise_lowers_the_membership_bound():
    bounds = []
    for noise in (0.01, 0.1, 1.0, 10.0):
        federation = Federation(StepRelease(clip_norm=0.5, noise_std=noise, sample_rate=0.3))
        bounds.append(
            ExampleGradientUniqueness()(federation.updates, federation.context())[0].extra["bound-nats"]
        )
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] < 0.01 < bounds[0]


def test_subset_of_examples_depends_on_seed_and_client_alone():
    federation = Federation(StepRelease(None, 0.0, 0.2), n=40)
    federation.data[9] = federation.data[4]
    measure = ExampleGradientUniqueness(examples=8)
    values = [e.value for e in measure(federation.updates, federation.context(seed=1))]
    torch.manual_seed(99)
    again = [e.value for e in measure(federation.updates[::-1], federation.context(seed=1))]
    other = [e.value for e in measure(federation.updates, federation.context(seed=2))]
    assert values == again[::-1]
    assert values[0] != values[1] and values[0] != other[0]
    estimate = measure(federation.updates, federation.context())[0]
    assert (estimate.kind, estimate.extra["examples"]) == ("estimate", 8)


def test_example_measure_writes_into_nothing():
    federation = Federation(StepRelease(0.5, 0.3, 0.2))
    before = {name: t.clone() for name, t in federation.before.items()}
    data = {c: (x.clone(), y.clone()) for c, (x, y) in federation.data.items()}
    state = torch.get_rng_state()
    ctx = federation.context()
    model = federation.factory()
    federation.factory = lambda: model  # building draws initial weights
    torch.set_rng_state(state)
    ExampleGradientUniqueness()(federation.updates, ctx)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in federation.before.items())
    assert all(torch.equal(a, b) for c in data for a, b in zip(data[c], federation.data[c], strict=True))


def test_models_with_batch_norm_are_refused_with_the_reason():
    def with_batch_norm():
        return nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double()

    federation = Federation(StepRelease(None, 0.0, 0.2), factory=with_batch_norm)
    with pytest.raises(ValueError, match="batch statistics couple the examples"):
        ExampleGradientUniqueness()(federation.updates, federation.context())


def test_example_measure_without_evidence_says_what_is_missing():
    with pytest.raises(ValueError, match="needs the model, got a context without"):
        ExampleGradientUniqueness()([], RoundContext(1))


def test_impossible_sample_rates_are_refused():
    federation = Federation(StepRelease(None, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"sample rate is in \(0, 1\], got 0"):
        ExampleGradientUniqueness()(federation.updates, federation.context())
