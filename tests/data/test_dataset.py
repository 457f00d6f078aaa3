"""What a dataset must hold, loading it once, and splitting it between server and clients."""

import dataclasses

import numpy as np
import pytest
import torch

from fedaudit.config.sections import DataConfig
from fedaudit.data.dataset import Dataset, draw_stratified, load_dataset, split
from fedaudit.errors import ConfigError, DataError
from fedaudit.registry import DATASETS


def numbered(n, num_classes=2, test=None):
    """n examples that hold their own index, so that it can be seen where each one went."""
    x = torch.arange(n, dtype=torch.float32).reshape(n, 1) / n
    return Dataset("numbered", x, torch.arange(n) % num_classes, num_classes, test=test)


def identities(dataset):
    return set(dataset.x.flatten().tolist())


@pytest.fixture
def own_dataset(monkeypatch):
    """A function that registers a factory for the time of a test."""
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))

    def register(name, factory):
        DATASETS.register(name, "made in a test", factory)

    return register


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 2, dtype=torch.float64)}, "x must be float32 and y int64, got torch.float64"),
        ({"y": torch.zeros(3, dtype=torch.int32)}, "got torch.float32 and torch.int32"),
        ({"x": torch.zeros(4, 2)}, r"got \(4, 2\) and \(3,\): reshape"),
        ({"x": torch.zeros(3)}, r"got \(3,\) and \(3,\): reshape"),
        ({"x": torch.zeros(0, 2), "y": torch.zeros(0, dtype=torch.int64)}, "at least one example, got none"),
        ({"x": torch.tensor([[0.0], [float("nan")], [float("inf")]])}, "must be finite, got 2 other values"),
        ({"x": torch.full((3, 2), 1.5)}, r"x must lie in \[0, 1\], got values in \[1.5, 1.5\]"),
        ({"x": torch.full((3, 2), -0.5)}, r"got values in \[-0.5, -0.5\]"),
        ({"y": torch.tensor([0, 1, 2])}, "labels must be 0 to 1, got 0 to 2"),
        ({"y": torch.tensor([0, 1, -1])}, "labels must be 0 to 1, got -1 to 1"),
        ({"class_names": ("a",)}, "each of 2 classes needs a name, got 1 names"),
    ],
)
def test_a_malformed_dataset_is_refused_with_what_was_found(change, message):
    good = Dataset("toy", torch.zeros(3, 2), torch.tensor([0, 1, 0]), num_classes=2)
    with pytest.raises(DataError, match=f"dataset 'toy': .*{message}"):
        dataclasses.replace(good, **change)


def test_another_value_range_is_respected():
    x = torch.full((2, 1), -0.5)
    assert Dataset("toy", x, torch.tensor([0, 1]), 2, value_range=(-1.0, 1.0)).input_shape == (1,)


def test_loading_again_returns_the_same_object():
    assert load_dataset(DataConfig()) is load_dataset(DataConfig(test_fraction=0.5))


def test_a_factory_gets_root_and_download_and_its_own_options(own_dataset):
    received = {}

    def factory(root: str, download: bool, classes: int = 2) -> Dataset:
        received.update(root=root, download=download, classes=classes)
        return numbered(12, classes)

    own_dataset("own", factory)
    config = DataConfig(name="own(classes=3)", root="somewhere", download=True)
    assert load_dataset(config).num_classes == 3
    assert received == {"root": "somewhere", "download": True, "classes": 3}


def test_a_factory_that_returns_something_else_is_refused(own_dataset):
    own_dataset("wrong", lambda root, download: (torch.zeros(1), torch.zeros(1)))
    with pytest.raises(DataError, match="factory of 'wrong' must return a fedaudit Dataset, got a tuple"):
        load_dataset(DataConfig(name="wrong"))


def test_an_unknown_option_is_refused_and_root_is_none():
    with pytest.raises(ConfigError, match="digits has no option 'root': its options are none"):
        load_dataset(DataConfig(name="digits(root=x)"))


def test_max_examples_keeps_exactly_so_many_in_equal_class_shares():
    everything, some = load_dataset(DataConfig()), load_dataset(DataConfig(max_examples=200))
    assert len(some) == 200
    exact = 200 * np.bincount(everything.y) / len(everything)
    assert np.abs(np.bincount(some.y) - exact).max() < 1


def test_max_examples_depends_on_the_seed_alone():
    config = DataConfig(max_examples=50)
    first = load_dataset(config, seed=1).x
    load_dataset(config, seed=2), load_dataset(DataConfig(max_examples=51))
    assert torch.equal(first, load_dataset(config, seed=1).x)
    assert not torch.equal(first, load_dataset(config, seed=2).x)


def test_max_examples_above_the_size_keeps_everything():
    assert len(load_dataset(DataConfig(max_examples=10_000))) == 1797


def test_max_examples_keeps_the_share_and_identity_of_a_sets_own_test_examples(own_dataset):
    test = torch.arange(80, 100)
    own_dataset("tested", lambda root, download: numbered(100, test=test))
    some = load_dataset(DataConfig(name="tested", max_examples=50))
    assert len(some) == 50
    assert len(some.test) == 10
    assert (some.x[some.test] >= 0.8).all()


@pytest.mark.parametrize("own_test", [False, True], ids=["drawn", "own"])
def test_train_test_and_reference_are_disjoint_and_cover_everything(own_test):
    dataset = numbered(103, test=torch.arange(5, 40) if own_test else None)
    parts = split(dataset, DataConfig(test_fraction=0.3, reference_fraction=0.2), seed=0)
    sets = [identities(part) for part in (parts.train, parts.test, parts.reference)]
    assert set.union(*sets) == identities(dataset)
    assert sum(map(len, sets)) == 103


def test_shares_are_met_in_total_and_within_one_example_per_class():
    dataset = load_dataset(DataConfig())
    parts = split(dataset, DataConfig(test_fraction=0.25, reference_fraction=0.5), seed=0)
    assert len(parts.test) == round(0.25 * 1797)
    assert len(parts.reference) == round(0.5 * (1797 - len(parts.test)))
    per_class = len(parts.test) / 1797 * np.bincount(dataset.y)
    assert np.abs(np.bincount(parts.test.y) - per_class).max() < 1


def test_labels_stay_with_their_examples():
    parts = split(numbered(60, 3), DataConfig(), seed=5)
    for part in (parts.train, parts.test, parts.reference):
        assert torch.equal((part.x.flatten() * 60).round().long() % 3, part.y)


def test_a_sets_own_test_part_is_the_test_set():
    dataset = numbered(50, test=torch.arange(40, 50))
    parts = split(dataset, DataConfig(test_fraction=0.9), seed=0)
    assert torch.equal(parts.test.x, dataset.x[40:])


def test_no_reference_fraction_means_no_reference():
    assert split(numbered(20), DataConfig(reference_fraction=0.0), seed=0).reference is None


def test_the_split_depends_on_the_seed_alone():
    config, dataset = DataConfig(), numbered(60)
    first = split(dataset, config, seed=1)
    assert identities(split(numbered(60), config, seed=1).test) == identities(first.test)
    assert identities(split(dataset, config, seed=2).test) != identities(first.test)


def test_asking_for_the_same_split_again_returns_the_same_object():
    dataset = numbered(60)
    assert split(dataset, DataConfig(), seed=1) is split(dataset, DataConfig(), seed=1)


@pytest.mark.parametrize(
    ("test", "reference", "found"),
    [(0.01, 0.5, "got 5, 0 and 5 of 10"), (0.5, 0.05, "got 5, 5 and 0"), (0.96, 0.0, "got 0, 10 and 0")],
)
def test_a_part_without_examples_is_an_error_that_names_the_shares(test, reference, found):
    config = DataConfig(test_fraction=test, reference_fraction=reference)
    with pytest.raises(DataError, match=rf"{found}.* data.test-fraction={test:g} and .*={reference:g}"):
        split(numbered(10), config, seed=0)


def test_every_example_is_equally_likely_to_be_drawn():
    strata = np.array([0] * 7 + [1] * 3)
    rng = np.random.default_rng(0)
    times = sum(np.bincount(draw_stratified(strata, 4, rng), minlength=10) for _ in range(2000))
    # 2.8 and 1.2 of the strata: 3 and 1 are drawn, so 3/7 and 1/3 of the time
    rates = np.where(strata == 0, 3 / 7, 1 / 3)
    assert np.abs(times / 2000 - rates).max() < 5 * np.sqrt(0.25 / 2000)


def test_ties_of_the_remainders_are_broken_by_chance():
    rng = np.random.default_rng(0)
    drawn = [int(draw_stratified(np.array([0, 1]), 1, rng)[0]) for _ in range(100)]
    assert abs(sum(drawn) - 50) < 5 * 5  # standard deviation of a fair coin in 100 throws is 5
