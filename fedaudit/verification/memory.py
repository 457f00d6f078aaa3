"""Noise used twice: between clients, between rounds, and between the tensors of one release."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedaudit.verification.noise import Vector, correlation_interval, prefix_pairs
from fedaudit.verification.residuals import Residual

SMALLEST = 16
"""Coordinates below which two tensors are not compared: so few cannot show a correlation."""
KEPT = 20_000
"""Coordinates of a release that are remembered, evenly spaced; one more in each tensor at most."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Coordinates of one release that are kept to be compared with others.

    Attributes:
        round: server round.
        client_id: whose; None for the aggregate.
        parts: by tensor name, each (P,), in units of the claimed noise.
    """

    round: int
    client_id: int | None
    parts: dict[str, Vector]

    @classmethod
    def of(cls, residual: Residual, round_number: int, client_id: int | None) -> "Sample":
        """The same coordinates of every release of one model."""
        step = math.ceil(residual.size / KEPT) if residual.size else 1
        # copies: a view would keep the whole release
        return cls(
            round_number, client_id, {name: part[::step].copy() for name, part in residual.parts.items()}
        )

    @property
    def size(self) -> int:
        """Coordinates that are kept."""
        return sum(part.size for part in self.parts.values())


@dataclass(frozen=True)
class MixingEvidence:
    """How far aggregates lean towards one deviation from the claimed mixture, added up over rounds.

    Attributes:
        score: sum of the residuals' inner products with the change that the deviation would make, over the
            noise's variance; N(0, information) if the claim holds.
        information: sum of that change's squared norms, over the same.
        rounds: rounds added up.
    """

    score: float = 0.0
    information: float = 0.0
    rounds: int = 0

    def __add__(self, other: "MixingEvidence") -> "MixingEvidence":
        return MixingEvidence(
            self.score + other.score, self.information + other.information, self.rounds + other.rounds
        )

    @property
    def z(self) -> float:
        """Standard normal if the claim holds, about sqrt(information) if the deviation does."""
        return self.score / self.information**0.5 if self.information > 0 else 0.0


@dataclass
class NoiseMemory:
    """What `verify_round` keeps of earlier rounds; give every round of a run the same one.

    It does not grow with the rounds: at most `window` samples of each kind of at most 20 000 coordinates in
    float64 each, 64 MB for 400 of them.

    Attributes:
        window: samples of each kind of release that are kept, newest first to stay.
        update: samples of updates.
        aggregate: samples of aggregates.
        mixing: what rounds so far say for each usual deviation from the claimed mixture.
    """

    window: int = 400
    update: list[Sample] = field(default_factory=list)
    aggregate: list[Sample] = field(default_factory=list)
    mixing: dict[str, MixingEvidence] = field(default_factory=dict)

    def keep(self, kind: str, samples: Sequence[Sample]) -> None:
        """Remember samples of a round."""
        store = self.update if kind == "update" else self.aggregate
        store.extend(samples)
        del store[: max(0, len(store) - self.window)]


@dataclass(frozen=True)
class Repetition:
    """The pair of noises that comes closest to being one.

    Attributes:
        low: lower end of the interval of their correlation.
        high: upper end.
        tests: how many pairs were compared.
        text: which pair.
        repeated: whether the interval leaves out 0.
        blind: whether some pair may hold equal noise without having been noticed.
    """

    low: float
    high: float
    tests: int
    text: str
    repeated: bool
    blind: bool


def count_pairs(new: Sequence[Sample], old: Sequence[Sample]) -> int:
    """Tests that `compare` makes: of every pair, the whole and each tensor that is long enough."""
    pairs = len(new) * len(old) if old else len(new) * (len(new) - 1) // 2
    return pairs * (1 + len(_long(new[0]))) if new else 0


def compare(new: Sequence[Sample], old: Sequence[Sample], level: float) -> Repetition:
    """Compare every new release with every old one, or with each other where `old` is empty.

    Raises:
        ValueError: if there are no two releases to compare.
    """
    if not new or (not old and len(new) < 2):
        raise ValueError(f"two releases are compared, got {len(new)} new and {len(old)} old: give more")
    other = old or new
    grams, first, second = {}, {}, {}
    for name in new[0].parts:
        left = np.stack([sample.parts[name] for sample in new])
        right = np.stack([sample.parts[name] for sample in other])
        grams[name] = left @ right.T
        first[name], second[name] = (left**2).sum(1)[:, None], (right**2).sum(1)[None, :]
    pairs = np.ones((len(new), len(other)), dtype=bool) if old else np.tri(len(new), k=-1, dtype=bool)
    worst, blind = (-np.inf, 0.0, 0.0, ""), False
    for scope in ("", *_long(new[0])):
        chosen = [scope] if scope else list(grams)
        size = sum(new[0].parts[name].size for name in chosen)
        low, high = correlation_interval(
            np.add.reduce([first[name] for name in chosen]),
            np.add.reduce([second[name] for name in chosen]),
            np.add.reduce([grams[name] for name in chosen]),
            size,
            level,
        )
        if not scope:
            blind = bool((high[pairs] >= 1).any())
        away = np.where(pairs, np.maximum(low, -high), -np.inf)
        i, j = divmod(int(away.argmax()), away.shape[1])
        if away[i, j] > worst[0]:
            where = f" in {scope!r}" if scope else ""
            text = f"{_name(new[i])} and {_name(other[j])}{where}"
            worst = (float(away[i, j]), float(low[i, j]), float(high[i, j]), text)
    away_from_0, lowest, highest, text = worst
    return Repetition(lowest, highest, count_pairs(new, old), text, away_from_0 > 0, blind)


def fitting(samples: Sequence[Sample], like: Sample) -> list[Sample]:
    """Those samples whose tensors have the sizes of `like`'s."""
    sizes = {name: part.size for name, part in like.parts.items()}
    return [s for s in samples if {name: part.size for name, part in s.parts.items()} == sizes]


def compare_tensors(sample: Sample, level: float) -> Repetition | None:
    """Compare the first coordinates of every pair of tensors; None where no two are long enough.

    A generator that is seeded anew for each tensor draws the same first numbers for all of them.
    """
    names = list(sample.parts)
    worst: tuple[float, float, float, str] | None = None
    pairs = prefix_pairs(list(sample.parts.values()), SMALLEST)
    longest, blind = max((size for *_, size in pairs), default=0), False
    for i, j, size in pairs:
        x, y = sample.parts[names[i]][:size], sample.parts[names[j]][:size]
        ends = correlation_interval(np.asarray(x @ x), np.asarray(y @ y), np.asarray(x @ y), size, level)
        low, high = float(ends[0]), float(ends[1])
        blind = blind or (size == longest and high >= 1)  # a short pair could never be seen
        away = max(low, -high)
        if worst is None or away > worst[0]:
            worst = (away, low, high, f"{names[i]!r} and {names[j]!r}")
    if worst is None:
        return None
    away, low, high, text = worst
    return Repetition(low, high, len(pairs), text, away > 0, blind)


def count_tensor_pairs(sample: Sample) -> int:
    """Tests that `compare_tensors` makes."""
    return len(prefix_pairs(list(sample.parts.values()), SMALLEST))


def _long(sample: Sample) -> list[str]:
    return [name for name, part in sample.parts.items() if part.size >= SMALLEST]


def _name(sample: Sample) -> str:
    client = "the aggregate" if sample.client_id is None else f"client {sample.client_id}"
    return f"{client} in round {sample.round}"
