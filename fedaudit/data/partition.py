"""How training examples are dealt to clients, from identically distributed to one class each."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedaudit.errors import DataError
from fedaudit.registry import PARTITIONERS
from fedaudit.spec import parse_spec

Labels = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int64]
Assign = Callable[[Labels, int, np.random.Generator], list[Indices]]

SMALLEST = 2


@dataclass(frozen=True)
class Partitioner:
    """A rule that deals examples to clients, and what to change if it leaves a client too few.

    Attributes:
        assign: (labels (n,), number of clients, generator) -> one index array per client.
        remedy: advice that names the rule's own option.
    """

    assign: Assign
    remedy: str


def partition(spec_text: str, y: Labels, num_clients: int, seed: int) -> list[Indices]:
    """One sorted index array per client; together they hold every example exactly once.

    Nothing is drawn again to make a partition pass: that would change its distribution unseen.

    Args:
        spec_text: a registered partitioner and its options, e.g. ``"dirichlet(alpha=0.1)"``.
        y: labels of the training examples (n,).
        num_clients: how many clients share them.
        seed: the partition depends on it and on the arguments alone.

    Raises:
        ConfigError: if the partitioner or an option is unknown or out of range.
        DataError: if a client gets fewer than two examples, or the rule loses or repeats examples.

    >>> [part.tolist() for part in partition("one-class", np.array([0, 1, 0, 1]), 2, seed=0)]
    [[0, 2], [1, 3]]
    """
    spec = parse_spec(spec_text)
    partitioner: Partitioner = PARTITIONERS.build(spec)
    labels = np.asarray(y, dtype=np.int64)
    parts = partitioner.assign(labels, num_clients, np.random.default_rng([seed, 2]))
    parts = [np.sort(part).astype(np.int64) for part in parts]
    dealt = np.concatenate(parts)
    if len(parts) != num_clients or not np.array_equal(np.sort(dealt), np.arange(len(labels))):
        raise DataError(
            f"a partitioner must give {num_clients} clients each of {len(labels)} examples exactly once, "
            f"got {len(parts)} parts with {len(dealt)} examples ({len(np.unique(dealt))} distinct) "
            f"from {spec}: correct its rule"
        )
    sizes = [len(part) for part in parts]
    if min(sizes) < SMALLEST:
        few = sum(size < SMALLEST for size in sizes)
        raise DataError(
            f"every client needs at least {SMALLEST} examples, got {few} of {num_clients} clients with fewer "
            f"(the smallest has {min(sizes)} of {len(labels)}) from data.partitioner={str(spec)!r}: "
            f"{partitioner.remedy}, or lower federation.clients"
        )
    return parts


def iid() -> Partitioner:
    """Equal shares (within one example) of a random order."""

    def assign(y: Labels, num_clients: int, rng: np.random.Generator) -> list[Indices]:
        return list(np.array_split(rng.permutation(len(y)), num_clients))

    return Partitioner(assign, "use more data (data.max-examples)")


def dirichlet(alpha: float = 0.5) -> Partitioner:
    """For each class, clients' shares p ~ Dirichlet(alpha, ..., alpha) over the N clients.

    A share has mean 1/N and variance (N - 1) / (N^2 (N alpha + 1)): equal shares as alpha grows, one
    client per class as it vanishes. Clients therefore differ in size as well as in classes. This is the
    per-class form of Yurochkin et al. 2019 (arXiv:1905.12022); Hsu et al. 2019 (arXiv:1909.06335)
    instead draw every client's class proportions and keep sizes equal.

    Args:
        alpha: concentration, above 0.

    Raises:
        ValueError: if alpha is not positive and finite.
    """
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be positive and finite, got {alpha}: use e.g. 0.5")

    def assign(y: Labels, num_clients: int, rng: np.random.Generator) -> list[Indices]:
        pieces: list[list[Indices]] = [[] for _ in range(num_clients)]
        for label in np.unique(y):
            members = rng.permutation(np.flatnonzero(y == label))
            shares = rng.dirichlet(np.full(num_clients, alpha))
            cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for own, piece in zip(pieces, np.split(members, cuts), strict=True):
                own.append(piece)
        return [np.concatenate(own) for own in pieces]

    return Partitioner(assign, "raise its alpha")


def shards(per_client: int = 2) -> Partitioner:
    """Examples sorted by label, cut into N * per_client equal shards, dealt at random.

    The pathological partition of McMahan et al. 2016 (arXiv:1602.05629): with two shards a client sees
    mostly two classes. A shard may straddle the border of two classes.

    Args:
        per_client: shards per client, at least 1.

    Raises:
        ValueError: if per_client is below 1.
    """
    if per_client < 1:
        raise ValueError(f"per-client must be at least 1, got {per_client}: use e.g. 2")

    def assign(y: Labels, num_clients: int, rng: np.random.Generator) -> list[Indices]:
        shuffled = rng.permutation(len(y))
        by_label = shuffled[np.argsort(y[shuffled], kind="stable")]
        pieces = np.array_split(by_label, num_clients * per_client)
        order = rng.permutation(len(pieces)).reshape(num_clients, per_client)
        return [np.concatenate([pieces[i] for i in row]) for row in order]

    return Partitioner(assign, "lower its per-client")


def one_class() -> Partitioner:
    """Client i holds class i mod C only; clients of one class share it equally (within one example).

    Fewer clients than classes would leave examples out, which is refused (DataError).
    """

    def assign(y: Labels, num_clients: int, rng: np.random.Generator) -> list[Indices]:
        classes = np.unique(y)
        if num_clients < len(classes):
            raise DataError(
                f"data.partitioner='one-class' needs a client per class, got federation.clients="
                f"{num_clients} for {len(classes)} classes: use {len(classes)} clients or more"
            )
        parts: list[Indices] = [np.empty(0, dtype=np.int64)] * num_clients
        for k, label in enumerate(classes):
            owners = range(k, num_clients, len(classes))
            members = rng.permutation(np.flatnonzero(y == label))
            for owner, piece in zip(owners, np.array_split(members, len(owners)), strict=True):
                parts[owner] = piece
        return parts

    return Partitioner(assign, "use more data (data.max-examples)")
