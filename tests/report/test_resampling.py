"""What the bootstrap interval covers, against simulation, closed forms and a naive two-stage draw."""

import math

import numpy as np
import pytest

from fedaudit.report.resampling import MIN_SEEDS, bootstrap_interval
from fedaudit.report.seeds import t_interval


def cells(values: np.ndarray) -> list[np.ndarray]:
    """Seeds of clients that have one number each."""
    return [np.stack([seed, np.ones_like(seed)], axis=1) for seed in values]


def coverage(n: int, between: float, repetitions: int = 300) -> tuple[float, float]:
    """Share of bootstrap and of t intervals that hold the true mean 0; variance 1, ten clients."""
    draw = np.random.default_rng(n)
    held = np.zeros(2)
    for k in range(repetitions):
        seeds = math.sqrt(between) * draw.standard_normal((n, 1))
        values = seeds + math.sqrt(1 - between) * draw.standard_normal((n, 10))
        low, high = bootstrap_interval(cells(values), replicates=300, seed=k)
        mean, half, _ = t_interval(values.mean(axis=1).tolist())
        held += [low <= 0 <= high, abs(mean) <= half]
    return tuple(held / repetitions)


@pytest.mark.parametrize(
    ("n", "between", "expected"),
    [(3, 0.0, 0.97), (3, 0.1, 0.91), (3, 0.5, 0.79), (10, 0.1, 0.97), (10, 0.5, 0.93)],
)
def test_coverage_is_what_the_module_states_and_t_covers_everywhere(n, between, expected):
    bootstrap, t = coverage(n, between)
    # four standard errors of a share over 300 repetitions, and of the 2000 behind the statement
    room = 4 * math.sqrt(expected * (1 - expected) * (1 / 300 + 1 / 2000))
    assert bootstrap == pytest.approx(expected, abs=room)
    assert t == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 300))


def test_a_bootstrap_of_seeds_alone_needs_six_because_the_range_of_few_misses_the_middle():
    draw = np.random.default_rng(0)
    for n in (3, MIN_SEEDS):
        values = draw.standard_normal((20000, n))
        held = np.mean((values.min(axis=1) < 0) & (values.max(axis=1) > 0))
        assert held == pytest.approx(1 - 2 ** (1 - n), abs=4 * math.sqrt(0.25 / 20000))
        low, high = bootstrap_interval([np.array([[v, 1.0]]) for v in values[0]])
        assert math.isnan(low) == math.isnan(high) == (n < MIN_SEEDS)
        if n >= MIN_SEEDS:
            assert values[0].min() <= low < high <= values[0].max()
    assert 1 - 2 ** (1 - MIN_SEEDS) > 0.95 > 1 - 2 ** (2 - MIN_SEEDS)


def test_the_draws_have_the_variance_of_two_stages():
    draw = np.random.default_rng(3)
    values = draw.normal(size=(4, 1)) + draw.normal(size=(4, 8))
    low, high = bootstrap_interval(cells(values), level=0.6827, replicates=40000)
    means = values.mean(axis=1)
    expected = np.sqrt(means.var() / 4 + values.var(axis=1).mean() / 8 / 4)  # between, and within
    assert (high - low) / 2 == pytest.approx(expected, rel=0.05)  # one standard deviation if normal


def test_one_seed_has_no_interval_however_many_clients():
    assert all(map(math.isnan, bootstrap_interval(cells(np.random.default_rng(0).normal(size=(1, 50))))))
    assert all(map(math.isnan, bootstrap_interval([])))


def test_pairs_are_drawn_together():
    base = np.random.default_rng(0).normal(size=(3, 6)) * 100
    pairs = [np.stack([b + 1.0, np.ones(6), b, np.ones(6)], axis=1) for b in base]
    assert bootstrap_interval(pairs) == pytest.approx((1.0, 1.0))


def test_clients_count_by_their_rows():
    # a client with 99 rows of 1 and one with a single row of 0: never outside, and mostly near 0.99
    seeds = [np.array([[99.0, 99.0], [0.0, 1.0]])] * 3
    low, high = bootstrap_interval(seeds, level=0.5)
    assert 0.6 < low < high <= 1.0


def test_intervals_repeat_with_their_seed_and_leave_their_input_alone():
    seeds = cells(np.random.default_rng(0).normal(size=(3, 5)))
    before = [rows.copy() for rows in seeds]
    assert bootstrap_interval(seeds, seed=1) == bootstrap_interval(seeds, seed=1)
    assert bootstrap_interval(seeds, seed=1) != bootstrap_interval(seeds, seed=2)
    assert all((a == b).all() for a, b in zip(before, seeds, strict=True))


def test_a_level_that_is_no_share_is_an_error():
    with pytest.raises(ValueError, match="a level lies between 0 and 1, got 95"):
        bootstrap_interval([], level=95)
