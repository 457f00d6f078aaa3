"""ROC curves, their intervals and the Gaussian envelope, against naive loops and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta, norm
from torch import Tensor

from fedaudit.attacks.gaussian_envelope import gaussian_auc, gaussian_tpr
from fedaudit.attacks.membership import matched_filter
from fedaudit.attacks.roc import auc, roc, split_in_half, true_positives_at


def draws(m: int, n: int, shift: float, seed: int) -> tuple[Tensor, Tensor]:
    """Normal scores of m members, shifted, and n others, in mixed order."""
    generator = torch.Generator().manual_seed(seed)
    members = torch.randperm(m + n, generator=generator) < m
    return torch.randn(m + n, generator=generator) + shift * members, members


def rounded(shift: float = 0.7) -> tuple[Tensor, Tensor]:
    scores, members = draws(23, 31, shift, 0)
    return (2 * scores).round() / 2, members  # many ties


def test_the_curve_counts_scores_at_or_above_every_threshold() -> None:
    scores, members = rounded()
    fpr, tpr = roc(scores, members)
    thresholds = sorted(set(scores.tolist()), reverse=True)
    for side, rates in ((members, tpr), (~members, fpr)):
        naive = [0.0] + [sum(s >= t for s in scores[side].tolist()) / int(side.sum()) for t in thresholds]
        assert rates.tolist() == pytest.approx(naive)
    assert float(torch.trapezoid(tpr, fpr)) == pytest.approx(auc(scores, members).value)


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    scores, members = rounded()
    pairs = [(a > b) + (a == b) / 2 for a in scores[members].tolist() for b in scores[~members].tolist()]
    assert auc(scores, members).value == pytest.approx(sum(pairs) / len(pairs))


def test_the_interval_of_the_area_is_the_naive_formula_of_delong() -> None:
    scores, members = rounded()
    inside, outside = scores[members].numpy(), scores[~members].numpy()
    wins = (inside[:, None] > outside) + (inside[:, None] == outside) / 2
    variance = wins.mean(1).var(ddof=1) / len(inside) + wins.mean(0).var(ddof=1) / len(outside)
    found = auc(scores, members)
    assert found.high - found.value == pytest.approx(1.959964 * math.sqrt(variance))
    assert found.value - found.low == pytest.approx(found.high - found.value)


def coverage(truth: float, intervals: list[tuple[float, float]]) -> float:
    return sum(low <= truth <= high for low, high in intervals) / len(intervals)


def test_the_interval_of_the_area_covers_the_gaussian_truth() -> None:
    found = [auc(*draws(60, 90, 1.0, seed)) for seed in range(300)]
    share = coverage(float(norm.cdf(1 / math.sqrt(2))), [(rate.low, rate.high) for rate in found])
    assert share == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 300))


def test_perfect_separation_is_not_certainty() -> None:
    scores = torch.arange(50.0)
    found = auc(scores, scores >= 30)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 20))  # 20 disjoint pairs, all in order
    reverse = auc(-scores, scores >= 30)
    assert (reverse.value, reverse.low) == (0.0, 0.0)
    assert reverse.high == pytest.approx(1 - 0.025 ** (1 / 20))
    clusters = torch.arange(50) % 5
    assert auc(scores, scores >= 30, clusters=clusters).low == pytest.approx(0.025 ** (1 / 5))


def test_one_member_alone_has_no_interval() -> None:
    found = auc(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([True, False, False]))
    assert found.value == 0.5 and math.isnan(found.low) and math.isnan(found.high)


def shared_levels(seed: int, level: float) -> tuple[Tensor, Tensor, Tensor]:
    """Twelve clients; membership raises all scores of a client's members by a level of the client's own."""
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.arange(12).repeat_interleave(40)
    members = torch.arange(480) % 2 == 0
    gains = 1 + level * torch.randn(12, generator=generator)
    return torch.randn(480, generator=generator) + gains[clusters] * members, members, clusters


def test_an_interval_over_clients_is_wider_where_clients_differ() -> None:
    """Members' scores have variance 1 + 2^2 in all and a mean that 12 clients set."""
    truth = float(norm.cdf(1 / math.sqrt(2 + 4)))
    cases = [shared_levels(seed, 2.0) for seed in range(100)]
    blind = [auc(scores, members) for scores, members, _ in cases]
    aware = [auc(scores, members, clusters=clusters) for scores, members, clusters in cases]
    assert coverage(truth, [(rate.low, rate.high) for rate in blind]) < 0.6
    # a percentile bootstrap of 12 clusters is a little short; four standard errors below 0.90
    assert coverage(truth, [(rate.low, rate.high) for rate in aware]) > 0.90 - 4 * math.sqrt(0.09 / 100)


def test_the_bootstrap_of_the_area_is_that_of_pooled_scores() -> None:
    """The same 1000 samples of clusters, their scores pooled and ranked anew."""
    scores, members, clusters = shared_levels(7, 1.0)
    drawn = torch.randint(12, (1000, 12), generator=torch.Generator().manual_seed(3))
    values = []
    for sample in drawn[:1000]:
        rows = torch.cat([(clusters == cluster).nonzero().flatten() for cluster in sample])
        inside, outside = scores[rows][members[rows]], scores[rows][~members[rows]]
        place = torch.searchsorted(outside.sort().values, inside).double()
        values.append(float(place.mean()) / len(outside))
    expected = np.quantile(values, [0.025, 0.975])
    found = auc(scores, members, clusters=clusters, seed=3)
    assert [found.low, found.high] == pytest.approx(expected, abs=1e-6)


def test_true_positives_lie_above_the_allowed_non_members() -> None:
    scores, members = draws(40, 200, 1.5, 1)
    threshold = sorted(scores[~members].tolist(), reverse=True)[10]  # ten of 200 lie above it
    naive = sum(s > threshold for s in scores[members].tolist()) / 40
    assert true_positives_at(0.05, scores, members).value == naive


def test_ties_with_the_threshold_are_not_named() -> None:
    scores, members = torch.tensor([0.0] * 100 + [0.0] * 10), torch.arange(110) >= 100
    assert true_positives_at(0.05, scores, members).value == 0.0


def test_too_few_non_members_resolve_no_small_rate() -> None:
    found = true_positives_at(0.01, *draws(50, 99, 1.0, 0))
    assert math.isnan(found.value) and math.isnan(found.low) and math.isnan(found.high)
    assert found.reason == "a false-positive rate of 0.01 needs at least 100 non-members, got 99"
    assert not math.isnan(true_positives_at(0.01, *draws(50, 100, 1.0, 0)).value)


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.2])
def test_the_interval_of_true_positives_covers_the_gaussian_truth(fpr: float) -> None:
    truth = float(norm.sf(norm.isf(fpr) - 1.5))
    found = [true_positives_at(fpr, *draws(80, 600, 1.5, seed)) for seed in range(200)]
    assert coverage(truth, [(rate.low, rate.high) for rate in found]) >= 0.95
    blind = []  # a binomial interval that takes the estimated threshold for the true one
    for seed, rate in enumerate(found):
        hits = round(rate.value * 80)
        blind.append((beta.ppf(0.025, hits, 81 - hits), beta.ppf(0.975, hits + 1, 80 - hits)))
        assert rate.low <= rate.value <= rate.high, seed
    if fpr == 0.01:
        assert coverage(truth, blind) < 0.93


def test_few_non_members_leave_the_interval_open_below() -> None:
    """The largest of 144 non-members' scores is no sure threshold for 1 %: that needs 437 of them."""
    assert true_positives_at(0.01, *draws(80, 144, 9.0, 0)).low == 0.0
    assert true_positives_at(0.01, *draws(80, 436, 9.0, 0)).low == 0.0
    assert true_positives_at(0.01, *draws(80, 437, 9.0, 0)).low > 0.9


def test_true_positives_over_clients_are_resampled_by_client() -> None:
    scores, members, clusters = shared_levels(1, 3.0)
    found = true_positives_at(0.05, scores, members, clusters=clusters)
    plain = true_positives_at(0.05, scores, members)
    assert found.value == plain.value
    assert found.low < found.value < found.high
    naive = []
    for sample in torch.randint(12, (1000, 12), generator=torch.Generator().manual_seed(0)):
        rows = torch.cat([(clusters == cluster).nonzero().flatten() for cluster in sample])
        naive.append(true_positives_at(0.05, scores[rows], members[rows]).value)
    assert [found.low, found.high] == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=1e-9)


def test_no_member_named_in_any_client_is_not_proof_of_none() -> None:
    _, members, clusters = shared_levels(1, 1.0)
    found = true_positives_at(0.05, -members.double(), members, clusters=clusters)
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 12))


def test_two_clients_give_no_interval_over_clients() -> None:
    scores, members = draws(60, 60, 1.0, 0)
    for found in (
        auc(scores, members, clusters=torch.arange(120) % 2),
        true_positives_at(0.05, scores, members, clusters=torch.arange(120) % 2),
    ):
        assert not math.isnan(found.value) and math.isnan(found.low) and math.isnan(found.high)


def test_the_envelope_of_one_step_is_the_trade_off_of_mu_gdp() -> None:
    mu = torch.tensor([1.2])
    for fpr in (0.001, 0.01, 0.3):
        assert gaussian_tpr(mu, fpr) == pytest.approx(norm.cdf(1.2 - norm.ppf(1 - fpr)))
    grid = np.linspace(1e-6, 1 - 1e-6, 20001)
    area = np.trapezoid([gaussian_tpr(mu, float(fpr)) for fpr in grid[::40]], grid[::40])
    assert gaussian_auc(mu) == pytest.approx(area, abs=1e-3)


def test_the_matched_filter_reaches_the_envelope_and_not_more() -> None:
    """Sums of T noisy steps with the candidate in Binomial(T, q) of them, everything else known."""
    generator = torch.Generator().manual_seed(0)
    R, P, T, q, noise = 6000, 5, 6, 0.4, 1.1
    gradient = torch.randn(1, P, generator=generator)
    inside = torch.arange(R) % 2 == 0
    uses = (torch.rand(R, T, generator=generator) < q).sum(1) * inside
    observed = uses[:, None] * gradient + noise * math.sqrt(T) * torch.randn(R, P, generator=generator)
    scores = matched_filter(gradient, observed)[:, 0]
    mu = gradient.norm(dim=1) / noise
    assert auc(scores, inside).value == pytest.approx(
        gaussian_auc(mu, steps=T, rate=q), abs=4 / math.sqrt(6 * R)
    )
    found = true_positives_at(0.05, scores, inside)
    assert found.low < gaussian_tpr(mu, 0.05, steps=T, rate=q) < found.high
    assert gaussian_auc(mu, steps=T, rate=1.0) == pytest.approx(gaussian_auc(math.sqrt(T) * mu))


def test_halves_of_non_members_do_not_differ() -> None:
    halves = split_in_half(400, torch.Generator().manual_seed(0))
    assert int(halves.sum()) == 200
    scores = torch.randn(400, generator=torch.Generator().manual_seed(1))
    assert auc(scores, halves).value == pytest.approx(0.5, abs=4 / math.sqrt(12 * 100))


def test_what_is_no_set_of_scores_is_refused() -> None:
    yes = torch.tensor([True, False])
    with pytest.raises(ValueError, match="needs members and non-members, got 2 and 0"):
        roc(torch.zeros(2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        auc(torch.tensor([math.nan, 0.0]), yes)
    with pytest.raises(ValueError, match=r"need one boolean each, got \(3,\) and \(2,\)"):
        true_positives_at(0.1, torch.zeros(3), yes)
    with pytest.raises(ValueError, match="a level lies inside"):
        auc(torch.zeros(2), yes, level=1.0)
    for ask in (
        lambda: true_positives_at(1.0, torch.zeros(2), yes),
        lambda: gaussian_tpr(torch.ones(1), 0.0),
    ):
        with pytest.raises(ValueError, match="a false-positive rate lies inside"):
            ask()
    with pytest.raises(ValueError, match="needs separations >= 0, steps >= 1"):
        gaussian_auc(torch.tensor([-1.0]))
