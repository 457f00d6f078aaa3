"""Spearman's rho against scipy, within strata against a loop, and its interval's coverage."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from fedaudit.studies.rank_correlation import rank_correlation, spearman


def test_one_stratum_is_scipys_rho() -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 8, 40)  # with ties
    y = x + generator.normal(size=40) * 3
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_differences_between_strata_count_nothing() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=60), generator.normal(size=60)
    strata = [i // 20 for i in range(60)]
    shifted = spearman(x + 100 * np.asarray(strata), y + 100 * np.asarray(strata), strata)
    assert shifted == pytest.approx(spearman(x, y, strata), abs=1e-12)
    assert spearman(x + 100 * np.asarray(strata), y + 100 * np.asarray(strata)) > 0.8


def test_equal_strata_give_the_mean_of_their_rhos() -> None:
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=30), generator.normal(size=30)
    strata = np.repeat([0, 1, 2], 10)
    alone = [spearmanr(x[strata == s], y[strata == s]).statistic for s in range(3)]
    assert spearman(x, y, strata.tolist()) == pytest.approx(np.mean(alone), abs=1e-12)


def test_a_side_that_does_not_vary_has_no_rho() -> None:
    assert math.isnan(spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
    assert math.isnan(rank_correlation([1.0, math.nan], [math.nan, 2.0]).value)


def test_too_few_clusters_have_no_interval() -> None:
    found = rank_correlation(range(10), range(10), clusters=[i // 5 for i in range(10)])
    assert found.value == 1 and math.isnan(found.low) and (found.points, found.clusters) == (10, 2)


def test_pairs_of_one_cluster_are_not_independent() -> None:
    """Copies of a pair tell nothing new: the interval is that of the clusters, not of the copies."""
    generator = np.random.default_rng(3)
    x, y = generator.normal(size=15), generator.normal(size=15)
    alone = rank_correlation(x, y)
    copies = rank_correlation(np.repeat(x, 8), np.repeat(y, 8), clusters=np.repeat(range(15), 8).tolist())
    assert copies.high - copies.low == pytest.approx(alone.high - alone.low, rel=0.15)
    naive = rank_correlation(np.repeat(x, 8), np.repeat(y, 8))
    assert naive.high - naive.low < 0.6 * (alone.high - alone.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Independent sides: rho is 0; 100 tries at 90 % cover it 90 times, three standard deviations are 9."""
    generator = np.random.default_rng(4)
    covered = 0
    for seed in range(100):
        x, y = generator.normal(size=(2, 30))
        found = rank_correlation(x, y, level=0.9, replicates=300, seed=seed)
        covered += found.low <= 0 <= found.high
    assert 79 <= covered <= 98


def test_lengths_and_level_are_checked() -> None:
    with pytest.raises(ValueError, match="pairs need one length, got 2"):
        spearman([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="pairs need one length"):
        rank_correlation([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"a level lies inside \(0, 1\), got 1"):
        rank_correlation([1, 2], [1, 2], level=1)
