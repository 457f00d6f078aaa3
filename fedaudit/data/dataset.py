"""Labelled examples in memory: how they are named, loaded once, and split between server and clients."""

import threading
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedaudit.config.sections import DataConfig
from fedaudit.errors import DataError
from fedaudit.registry import DATASETS
from fedaudit.spec import parse_spec

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """n labelled examples. Nobody writes into them: every client of a simulation shares them.

    Attributes:
        name: the registered name it was loaded under.
        x: examples (n, *input_shape), float32 within `value_range`.
        y: labels (n,), int64 from 0 to C - 1.
        num_classes: C.
        value_range: smallest and largest value an input can take.
        class_names: a name per class, or empty.
        test: the indices (n_test,) of the set's own test examples; None if it has no such split.
    """

    name: str
    x: Tensor
    y: Tensor
    num_classes: int
    value_range: tuple[float, float] = (0.0, 1.0)
    class_names: tuple[str, ...] = ()
    test: Tensor | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise DataError(f"dataset {self.name!r}: {problem}")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.x.shape[1:])

    def subset(self, indices: Tensor) -> "Dataset":
        """The examples at `indices` (m,), in that order; a test split of its own is dropped."""
        return replace(self, x=self.x[indices], y=self.y[indices], test=None)

    def _problem(self) -> str:
        x, y, (low, high) = self.x, self.y, self.value_range
        if x.dtype != torch.float32 or y.dtype != torch.int64:
            return f"x must be float32 and y int64, got {x.dtype} and {y.dtype}: convert them"
        if x.ndim < 2 or y.ndim != 1 or len(x) != len(y):
            shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
            return f"x must be (n, *shape) and y (n,), got {shapes}: reshape them"
        if len(y) == 0:
            return "there must be at least one example, got none: check the source"
        if not torch.isfinite(x).all():
            return f"x must be finite, got {int((~torch.isfinite(x)).sum())} other values: clean them"
        if x.min() < low or x.max() > high:
            found = f"[{float(x.min()):g}, {float(x.max()):g}]"
            return f"x must lie in [{low:g}, {high:g}], got values in {found}: rescale it"
        if y.min() < 0 or y.max() >= self.num_classes:
            found = f"{int(y.min())} to {int(y.max())}"
            return f"labels must be 0 to {self.num_classes - 1}, got {found}: renumber them"
        if self.class_names and len(self.class_names) != self.num_classes:
            return f"each of {self.num_classes} classes needs a name, got {len(self.class_names)} names"
        return ""


@dataclass(frozen=True, eq=False)
class Split:
    """Who holds which examples; the three share none.

    Attributes:
        train: what the clients hold together.
        test: what the server evaluates the global model on; validation data where some were asked for.
        reference: the auditing server's own public data; None if it has none.
    """

    train: Dataset
    test: Dataset
    reference: Dataset | None


def load_dataset(config: DataConfig, seed: int = 0) -> Dataset:
    """The dataset that `config` names, loaded once per process and then shared.

    A factory registered in `DATASETS` is called with ``root`` and ``download`` from the configuration
    and with the options written in ``data.name``, and returns a `Dataset`. With ``data.max-examples`` a
    stratified subset of that size is kept, drawn from `seed` alone.

    Args:
        config: ``name``, ``root``, ``download`` and ``max_examples`` are read.
        seed: seed of the subset; every process of a federation must use the same one.

    Raises:
        ConfigError: if the dataset or one of its options is unknown.
        DataError: if the data are missing or malformed.

    >>> len(load_dataset(DataConfig(max_examples=100)))
    100
    """
    with _LOADING:  # two threads that both miss the cache would load it twice
        return _load(config.name, config.root, config.download, config.max_examples, seed)


def split(dataset: Dataset, config: DataConfig, seed: int) -> Split:
    """The examples divided, class by class at random, between clients and server.

    The test set is the dataset's own test split where it has one (``data.test-fraction`` is then not
    used), else the share ``test_fraction`` of all examples. The reference set is the share
    ``reference_fraction`` of what remains. Shares are met exactly in total and within one example in
    each class. With ``data.validation-fraction`` that share of the clients' examples takes the place of the
    test set, so that settings are chosen without it; test and reference examples stay what they are without
    it, and nobody holds the test examples. The last splits are kept, so that asking again costs nothing.

    Args:
        dataset: what to divide.
        config: ``test_fraction``, ``reference_fraction`` and ``validation_fraction`` are read.
        seed: seed of the division; every process of a federation must use the same one.

    Raises:
        DataError: if a share is so small, or so large, that it leaves a part without examples.

    >>> parts = split(load_dataset(DataConfig()), DataConfig(), seed=0)
    >>> len(parts.train), len(parts.test), len(parts.reference)
    (1294, 359, 144)
    """
    with _LOADING:
        return _split(
            dataset, config.test_fraction, config.reference_fraction, config.validation_fraction, seed
        )


def draw_stratified(strata: Indices, size: int, rng: np.random.Generator) -> Indices:
    """Sorted indices (size,) drawn without replacement, every stratum in proportion.

    A stratum with k of n examples gives floor(size k / n) or one more; the examples left over by the
    rounding go to the largest remainders, ties by chance.

    Args:
        strata: stratum of each example (n,).
        size: how many to draw, at most n.
        rng: source of randomness.
    """
    if not size:
        return np.empty(0, dtype=np.int64)
    _, inverse, counts = np.unique(strata, return_inverse=True, return_counts=True)
    taken, remainder = np.divmod(size * counts, len(strata))
    by_remainder = np.lexsort((rng.random(len(counts)), -remainder))
    taken[by_remainder[: size - int(taken.sum())]] += 1
    shuffled = rng.permutation(len(strata))
    drawn = [shuffled[inverse[shuffled] == stratum][:k] for stratum, k in enumerate(taken)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


_LOADING = threading.RLock()


@lru_cache(maxsize=2)
def _load(name: str, root: str, download: bool, max_examples: int, seed: int) -> Dataset:
    dataset = DATASETS.build(parse_spec(name), root=root, download=download)
    if not isinstance(dataset, Dataset):
        kind = type(dataset).__name__
        raise DataError(f"the factory of {name!r} must return a fedaudit Dataset, got a {kind}: convert it")
    if not 0 < max_examples < len(dataset):
        return dataset
    own_test = np.zeros(len(dataset), dtype=np.int64)
    if dataset.test is not None:
        own_test[dataset.test.numpy()] = 1
    strata = 2 * dataset.y.numpy() + own_test
    kept = draw_stratified(strata, max_examples, np.random.default_rng([seed, 0]))
    smaller = dataset.subset(torch.from_numpy(kept))
    if dataset.test is None:
        return smaller
    return replace(smaller, test=torch.from_numpy(np.flatnonzero(own_test[kept])))


@lru_cache(maxsize=2)
def _split(
    dataset: Dataset, test_fraction: float, reference_fraction: float, validation_fraction: float, seed: int
) -> Split:
    rng = np.random.default_rng([seed, 1])
    everything = np.arange(len(dataset))
    if dataset.test is not None:
        test = dataset.test.numpy()
    else:
        test = draw_stratified(dataset.y.numpy(), round(test_fraction * len(dataset)), rng)
    rest = np.setdiff1d(everything, test)
    chosen = draw_stratified(dataset.y.numpy()[rest], round(reference_fraction * len(rest)), rng)
    reference = rest[chosen]
    train = np.setdiff1d(rest, reference)
    if not len(train) or not len(test) or (reference_fraction and not len(reference)):
        raise DataError(
            f"train, test and reference data need at least one example each, got {len(train)}, {len(test)} "
            f"and {len(reference)} of {len(dataset)} with data.test-fraction={test_fraction:g} and "
            f"data.reference-fraction={reference_fraction:g}: change the shares or data.max-examples"
        )
    if validation_fraction:
        own = np.random.default_rng([seed, 2])  # of its own: the other parts stay what they are without it
        drawn = draw_stratified(dataset.y.numpy()[train], round(validation_fraction * len(train)), own)
        test, train = train[drawn], np.setdiff1d(train, train[drawn])
        if not len(train) or not len(test):
            raise DataError(
                f"clients and validation need at least one example each, got {len(train)} and {len(test)} "
                f"with data.validation-fraction={validation_fraction:g}: change it or data.max-examples"
            )
    parts = [dataset.subset(torch.from_numpy(part)) for part in (train, test)]
    public = dataset.subset(torch.from_numpy(reference)) if len(reference) else None
    return Split(parts[0], parts[1], public)
