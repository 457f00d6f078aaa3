"""One round of central privacy: its sensitivity, its noise, and where the clip norm goes."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest

from fedaudit.defenses.central_mechanism import (
    AdaptiveNorm,
    CentralMechanism,
    next_clip_norm,
    split_noise_multiplier,
)

SILENT = 1e-12
LIKE = {
    "a.weight": torch.zeros(6, 5),
    "a.scale": torch.zeros(()),
    "bn.running_mean": torch.zeros(7),
    "bn.num_batches_tracked": torch.tensor(3),
}
FLOATS = [name for name, tensor in LIKE.items() if tensor.is_floating_point()]


def update(seed=0, norm=1.0):
    source = torch.Generator().manual_seed(seed)
    raw = {name: torch.randn(LIKE[name].shape, generator=source) for name in FLOATS}
    return {name: change * norm / length(raw) for name, change in raw.items()}


def length(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def source(seed=0):
    return np.random.default_rng(seed)


def release(mechanism, updates, examples=None, seed=0, clip=None, like=LIKE):
    examples = examples or [10] * len(updates)
    return mechanism.release(updates, examples, like, clip or mechanism.clip_norm, source(seed))


def adapting(z=1.0, clip=1.0, cohort=4, count_noise=1.0, **options):
    return CentralMechanism(z, clip, cohort, adaptive=AdaptiveNorm(cohort, count_noise, **options))


# --- sum and sensitivity ------------------------------------------------------------------------------


def test_updates_are_clipped_over_all_entries_scalars_and_buffers_too():
    long = {**update(), "a.scale": torch.tensor(1000.0), "bn.running_mean": torch.full((7,), -50.0)}
    made = release(CentralMechanism(SILENT, 0.5, 4), [long]).change
    assert length(made) == pytest.approx(0.5 / 4, rel=1e-9)
    whole = length(long)
    assert float(made["a.scale"]) == pytest.approx(1000 * 0.5 / whole / 4, rel=1e-9)


def test_integer_entries_are_no_part_of_a_release():
    assert list(release(CentralMechanism(1.0, 0.5, 4), [update()]).change) == FLOATS


@pytest.mark.parametrize("most", [0, 25], ids=["uniform", "capped"])
@pytest.mark.parametrize("examples", [1, 25, 10_000])
@pytest.mark.parametrize("norm", [1e-3, 0.7, 1e4])
def test_one_more_client_moves_a_release_by_its_weight_and_never_above_the_sensitivity(most, examples, norm):
    """With equal noise the difference of two releases is what the client did."""
    mechanism = CentralMechanism(1.0, 0.7, 100.0, most_examples=most)
    others = [update(seed, 2.0) for seed in (1, 2, 3)]
    without = release(mechanism, others, [5, 7, 900]).change
    joined = release(mechanism, [*others, update(9, norm)], [5, 7, 900, examples]).change
    moved = length({name: joined[name] - without[name] for name in FLOATS})
    weight = min(examples, most) if most else 1
    assert moved == pytest.approx(weight * min(norm, 0.7) / 100, rel=1e-5)
    assert moved <= mechanism.sensitivity(0.7) * (1 + 1e-9)


def test_the_sensitivity_is_reached_by_a_long_update_of_a_large_client():
    mechanism = CentralMechanism(1.0, 0.7, 100.0, most_examples=25)
    moved = length(release(CentralMechanism(SILENT, 0.7, 100.0, 25), [update(1, 9.0)], [10_000]).change)
    assert moved == pytest.approx(mechanism.sensitivity(0.7), rel=1e-9)
    assert mechanism.sensitivity(0.7) == 25 * 0.7 / 100


def test_a_missing_client_leaves_the_divisor_and_counts_as_a_zero_update():
    mechanism = CentralMechanism(1.0, 0.7, 4)
    zero = {name: torch.zeros_like(change) for name, change in update().items()}
    missing = release(mechanism, [update(1), update(2)]).change
    silent = release(mechanism, [update(1), update(2), zero, zero]).change
    assert all(torch.equal(missing[name], silent[name]) for name in FLOATS)


def test_updates_are_paired_by_name():
    forward, backward = update(1), dict(reversed(update(1).items()))
    mechanism = CentralMechanism(1.0, 0.7, 4)
    one, other = release(mechanism, [forward]).change, release(mechanism, [backward]).change
    assert all(torch.equal(one[name], other[name]) for name in FLOATS)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_counts_as_zero(bad):
    mechanism = CentralMechanism(1.0, 0.7, 4)
    broken = {**update(), "a.scale": torch.tensor(bad)}
    made, empty = release(mechanism, [broken]).change, release(mechanism, []).change
    assert all(torch.equal(made[name], empty[name]) for name in FLOATS)


def test_inputs_stay_as_they_were_and_a_seed_gives_the_same_release():
    given = update(1, 5.0)
    kept = {name: change.clone() for name, change in given.items()}
    first, again, other = (release(CentralMechanism(1.0, 0.7, 4), [given], seed=s).change for s in (3, 3, 4))
    assert all(torch.equal(given[name], kept[name]) for name in FLOATS)
    assert all(torch.equal(first[name], again[name]) for name in FLOATS)
    assert not any(torch.equal(first[name], other[name]) for name in FLOATS)


# --- noise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mechanism",
    [
        CentralMechanism(1.5, 0.4, 8),
        CentralMechanism(1.5, 0.4, 800, most_examples=100),
        adapting(1.5, 0.4, 8, count_noise=0.9),
    ],
    ids=["uniform", "capped", "adaptive"],
)
def test_empirical_noise_has_the_standard_deviation_of_theory_in_every_tensor(mechanism):
    """Chi-square interval of 20 000 coordinates at 1e-6: 2.4 % to either side."""
    like = {"w": torch.zeros(100, 150), "b": torch.zeros(5000), "s": torch.zeros(())}
    made = release(mechanism, [], like=like, seed=5)
    split = (1.5**-2 - (2 * 0.9) ** -2) ** -0.5 if mechanism.adaptive else 1.5
    theory = split * 0.4 / 8
    assert made.noise_std == pytest.approx(theory, rel=1e-12)
    for name in ("w", "b"):
        size, squared = made.change[name].numel(), float((made.change[name] / theory).square().sum())
        assert chi2.ppf(5e-7, size) < squared < chi2.isf(5e-7, size)
    pooled = (torch.cat([made.change[n].reshape(-1) for n in ("w", "b")]) / theory).numpy()
    assert kstest(pooled, "norm").pvalue > 1e-4


def test_a_scalar_is_noised_like_every_other_entry():
    mechanism = CentralMechanism(1.0, 0.4, 8)
    drawn = [
        float(release(mechanism, [], seed=s, like={"s": torch.zeros(())}).change["s"]) for s in range(400)
    ]
    squared = sum((value / (0.4 / 8)) ** 2 for value in drawn)
    assert chi2.ppf(5e-7, 400) < squared < chi2.isf(5e-7, 400)


def test_a_round_without_a_reply_is_noise_of_the_usual_size():
    """Releasing nothing would tell an empty round from one with a client."""
    empty, full = (release(CentralMechanism(2.0, 0.4, 8), given) for given in ([], [update(1), update(2)]))
    assert empty.noise_std == full.noise_std and length(empty.change) > 0


def test_noise_is_that_of_the_clip_norm_that_was_applied_and_not_of_the_next():
    mechanism = adapting(1.0, 1.0, cohort=2, count_noise=0.6, lr=0.5)
    made = release(mechanism, [update(1, 9.0), update(2, 9.0)], clip=1.0, seed=7)
    drawn, expected = source(7), {}
    for name in FLOATS:
        mean = (update(1, 9.0)[name].double() / 9 + update(2, 9.0)[name].double() / 9) / 2
        expected[name] = mean + (1 - 1.2**-2) ** -0.5 * 1.0 / 2 * torch.from_numpy(
            np.asarray(drawn.standard_normal(LIKE[name].shape))
        )
    assert all(torch.allclose(made.change[n], expected[n], atol=1e-6) for n in FLOATS)
    assert made.next_clip_norm != 1.0 and made.clip_norm == 1.0


# --- adaptive clipping --------------------------------------------------------------------------------


def test_the_split_costs_what_the_whole_does():
    for z, count in ((1.0, 0.6), (0.3, 4.0), (7.0, 3.6)):
        assert split_noise_multiplier(z, count) ** -2 + (0.5 / count) ** 2 == pytest.approx(z**-2)
        assert split_noise_multiplier(z, count) > z


@pytest.mark.parametrize(("norm", "within"), [(0.2, 1.0), (5.0, 0.0)], ids=["all short", "all clipped"])
def test_the_clip_norm_shrinks_where_no_update_is_clipped_and_grows_where_all_are(norm, within):
    mechanism = CentralMechanism(1e-7, 1.0, 4, adaptive=AdaptiveNorm(4, 1e-6))
    made = release(mechanism, [update(seed, norm) for seed in range(4)])
    assert made.next_clip_norm == pytest.approx(math.exp(-0.2 * (within - 0.5)), abs=1e-5)
    assert (made.next_clip_norm < 1) == (norm < 1)


def test_a_missing_update_counts_as_half():
    mechanism = CentralMechanism(1e-7, 1.0, 4, adaptive=AdaptiveNorm(4, 1e-6, quantile=0.3, lr=1.0))
    made = release(mechanism, [update(1, 0.2)])
    assert math.log(made.next_clip_norm) == pytest.approx(-(0.5 + 0.5 / 4 - 0.3), abs=1e-5)


def test_one_client_moves_the_count_by_a_half():
    mechanism = adapting(lr=1.0)
    alone = release(mechanism, []).next_clip_norm
    moved = [math.log(release(mechanism, [update(1, n)]).next_clip_norm / alone) for n in (0.2, 5.0)]
    assert moved == pytest.approx([-0.5 / 4, 0.5 / 4])


@pytest.mark.parametrize("start", [0.1, 0.9, 1.1, 3.0])
def test_the_clip_norm_comes_to_the_median_of_the_norms_from_either_side(start):
    """Norms 0.5 to 1.45, from which a norm that moves the wrong way runs to 0.002 or to 160."""
    norms = np.linspace(0.5, 1.45, 20)
    mechanism, clip = adapting(0.1, start, cohort=20, count_noise=1.0, lr=0.5), start
    updates = [update(seed, norm) for seed, norm in enumerate(norms)]
    for number in range(60):
        clip = release(mechanism, updates, clip=clip, seed=number).next_clip_norm
    assert np.quantile(norms, 0.3) < clip < np.quantile(norms, 0.7)


def test_the_noise_on_the_count_has_its_standard_deviation():
    mechanism = adapting(cohort=10, count_noise=2.0, lr=1.0)
    drawn = [math.log(release(mechanism, [], seed=s, like={}).next_clip_norm) for s in range(400)]
    squared = sum((value / 0.2) ** 2 for value in drawn)  # quantile 0.5: an empty round stays where it is
    assert chi2.ppf(5e-7, 400) < squared < chi2.isf(5e-7, 400)


def test_a_zero_update_is_short_and_survives():
    zero = {name: torch.zeros_like(change) for name, change in update().items()}
    made = release(CentralMechanism(1e-7, 1.0, 1, adaptive=AdaptiveNorm(1, 1e-6, lr=1.0)), [zero])
    assert made.next_clip_norm == pytest.approx(math.exp(-0.5), rel=1e-4)
    assert all(bool(change.isfinite().all()) for change in made.change.values())


def test_a_fixed_norm_stays():
    assert release(CentralMechanism(1.0, 0.7, 4), [update(1)]).next_clip_norm == 0.7
    assert next_clip_norm(0.7, share_within=0.5, quantile=0.5, lr=3.0) == 0.7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CentralMechanism(0.0, 1.0, 4), "noise-multiplier must be a number > 0, got 0.0"),
        (lambda: CentralMechanism(1.0, math.inf, 4), "clip-norm must be a number > 0, got inf"),
        (lambda: CentralMechanism(1.0, 1.0, 0), "divisor must be a number > 0, got 0"),
        (lambda: CentralMechanism(1.0, 1.0, 4, -1), "most-examples must be >= 0, got -1"),
        (lambda: adapting(2.0, count_noise=1.0), "above half the noise multiplier 2, got 1: .* raise count"),
        (lambda: AdaptiveNorm(4, 1.0, quantile=1.5), r"quantile must lie in \[0, 1\], got 1.5"),
        (lambda: AdaptiveNorm(4, 1.0, lr=0.0), "lr must be a number > 0, got 0.0"),
        (lambda: AdaptiveNorm(4, 0.0), "count-noise must be a number > 0, got 0.0"),
        (
            lambda: release(CentralMechanism(1.0, 1.0, 4), [{"a.weight": torch.zeros(6, 5)}]),
            r"names and shapes of the weights, got \['a.weight'\]",
        ),
    ],
)
def test_impossible_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
