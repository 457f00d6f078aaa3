"""How examples are dealt to clients: what holds for every partitioner, and what makes each one itself."""

import numpy as np
import pytest

from fedaudit.data.partition import Partitioner, partition
from fedaudit.errors import ConfigError, DataError
from fedaudit.registry import PARTITIONERS

SPECS = ["iid", "dirichlet(alpha=0.5)", "shards(per-client=2)", "one-class"]
each_partitioner = pytest.mark.parametrize("spec", SPECS)
LABELS = np.random.default_rng(7).integers(0, 5, size=1003)


def class_counts(y, parts):
    """(N, C) how many examples of each class each client holds."""
    return np.stack([np.bincount(y[part], minlength=int(y.max()) + 1) for part in parts])


def test_every_registered_partitioner_is_covered_here():
    assert {spec.partition("(")[0] for spec in SPECS} == set(PARTITIONERS)


@each_partitioner
@pytest.mark.parametrize("num_clients", [5, 8, 23])
def test_every_example_goes_to_exactly_one_client(spec, num_clients):
    parts = partition(spec, LABELS, num_clients, seed=3)
    assert len(parts) == num_clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(LABELS)))


@each_partitioner
def test_the_partition_depends_on_the_seed_alone(spec):
    first = partition(spec, LABELS, 10, seed=1)
    np.random.seed(0)
    again, other = partition(spec, LABELS.copy(), 10, seed=1), partition(spec, LABELS, 10, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@each_partitioner
def test_labels_are_not_modified(spec):
    labels = LABELS.copy()
    partition(spec, labels, 10, seed=1)
    assert np.array_equal(labels, LABELS)


def test_iid_sizes_differ_by_one_at_most():
    sizes = [len(part) for part in partition("iid", LABELS, 10, seed=0)]
    assert sorted(sizes) == [100] * 7 + [101] * 3


def test_iid_class_counts_are_hypergeometric():
    counts = class_counts(LABELS, partition("iid", LABELS, 10, seed=0))
    n, own, k = len(LABELS), np.bincount(LABELS), counts.sum(axis=1, keepdims=True)
    variance = k * own / n * (1 - own / n) * (n - k) / (n - 1)
    assert np.abs((counts - k * own / n) / np.sqrt(variance)).max() < 4.5


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_shares_have_the_variance_of_a_symmetric_dirichlet(alpha):
    N, C, per_class = 8, 2000, 100
    y = np.repeat(np.arange(C), per_class)
    shares = class_counts(y, partition(f"dirichlet(alpha={alpha})", y, N, seed=0)) / per_class
    expected = (N - 1) / (N**2 * (N * alpha + 1))
    per_class_mean_square = ((shares - 1 / N) ** 2).mean(axis=0)
    error = per_class_mean_square.std() / np.sqrt(C)
    # rounding a share to whole examples adds at most 1 / per_class, and on average its square / 6
    assert abs(per_class_mean_square.mean() - expected) < 5 * error + 1 / per_class**2


def test_a_large_alpha_gives_every_client_nearly_equal_shares_of_each_class():
    counts = class_counts(LABELS, partition("dirichlet(alpha=1e6)", LABELS, 10, seed=0))
    assert np.abs(counts - np.bincount(LABELS) / 10).max() <= 2


def test_a_small_alpha_gives_nearly_every_class_to_one_client():
    y = np.repeat(np.arange(200), 20)
    counts = class_counts(y, partition("dirichlet(alpha=0.001)", y, 4, seed=0))
    assert np.mean(counts.max(axis=0) == 20) > 0.95


def test_shards_give_a_client_at_most_one_class_more_per_shard_than_its_shards():
    y = np.repeat(np.arange(10), 100)
    counts = class_counts(y, partition("shards(per-client=2)", y, 50, seed=0))
    assert (counts.sum(axis=1) == 20).all()
    assert ((counts > 0).sum(axis=1) <= 2).all()  # ten shards of ten fit in a class of a hundred exactly


def test_shards_of_one_class_are_drawn_at_random_from_it():
    y = np.repeat([0, 1], 500)
    parts = partition("shards(per-client=1)", y, 4, seed=0)
    for part in parts:  # a shard of 250 that were consecutive indices would span 250 only
        assert part.max() - part.min() > 400


@pytest.mark.parametrize("num_clients", [5, 7, 15])
def test_one_class_clients_hold_one_class_in_equal_shares(num_clients):
    parts = partition("one-class", LABELS, num_clients, seed=0)
    for client, part in enumerate(parts):
        assert set(LABELS[part]) == {client % 5}
    for label in range(5):
        sizes = [len(part) for part in parts[label::5]]
        assert max(sizes) - min(sizes) <= 1


def test_one_class_deals_the_classes_that_occur():
    parts = partition("one-class", np.array([3, 8, 3, 8, 3, 8]), 2, seed=0)
    assert [part.tolist() for part in parts] == [[0, 2, 4], [1, 3, 5]]


def test_one_class_refuses_fewer_clients_than_classes():
    with pytest.raises(DataError, match=r"got federation.clients=4 for 5 classes: use 5 clients or more"):
        partition("one-class", LABELS, 4, seed=0)


@pytest.mark.parametrize(
    ("spec", "smallest", "remedy"),
    [
        ("dirichlet(alpha=0.01)", 0, "raise its alpha"),
        ("shards(per-client=6)", 0, "lower its per-client"),
        ("iid", 1, "use more data"),
        ("one-class", 1, "use more data"),
    ],
)
def test_a_client_with_fewer_than_two_examples_is_an_error_that_says_what_to_change(spec, smallest, remedy):
    with pytest.raises(DataError) as caught:
        partition(spec, np.arange(12) % 2, 9, seed=0)
    text = str(caught.value)
    assert f"of 9 clients with fewer (the smallest has {smallest} of 12)" in text
    assert f"from data.partitioner='{spec}': {remedy}" in text


def test_two_examples_per_client_are_enough():
    assert [len(part) for part in partition("iid", np.zeros(8, dtype=int), 4, seed=0)] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dirichlet(alpha=0)", "alpha must be positive and finite, got 0"),
        ("dirichlet(alpha=inf)", "got inf"),
        ("shards(per-client=0)", "per-client must be at least 1, got 0"),
        ("iid(alpha=1)", "iid has no option 'alpha'"),
        ("sorted", "no partitioner is named 'sorted': choose one of iid, dirichlet, shards, one-class"),
    ],
)
def test_an_option_out_of_range_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        partition(spec, LABELS, 10, seed=0)


@pytest.mark.parametrize(
    "assign",
    [
        lambda y, n, rng: [np.arange(len(y))] * n,
        lambda y, n, rng: [np.arange(2), np.arange(2, 4)],
        lambda y, n, rng: [np.arange(len(y))],
    ],
    ids=["repeats", "loses", "too-few-parts"],
)
def test_a_partitioner_of_ones_own_that_loses_or_repeats_examples_is_refused(assign, monkeypatch):
    monkeypatch.setattr(PARTITIONERS, "_entries", dict(PARTITIONERS._entries))
    PARTITIONERS.register("own", "made in a test", lambda: Partitioner(assign, "change it"))
    with pytest.raises(
        DataError, match=r"each of 8 examples exactly once, got .* from own: correct its rule"
    ):
        partition("own", np.zeros(8, dtype=int), 2, seed=0)
