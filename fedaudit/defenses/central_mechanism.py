"""A noised sum of clipped client updates, and the clip norm of the next one: central, client-level privacy.

One round releases (sum_i w_i clip_C(u_i) + N(0, s^2 I)) / D with 0 <= w_i <= w and a divisor D that depends
on nobody's data. Adding one update to the sum, or taking one away, moves the result by at most w C / D: noise
of standard deviation z w C / D on every coordinate makes it a Gaussian mechanism with multiplier z. A client
that fails counts as one that sent zero: the divisor stays, so the sensitivity does, and the mean is shorter
than that of the clients who replied.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedaudit.defenses.gaussian import clip_update

HALF = 0.5
"""What a client moves the count of short updates by: each counts +1/2 or -1/2."""


def split_noise_multiplier(noise_multiplier: float, count_noise: float) -> float:
    """Noise multiplier z_u of the updates where a count with noise s is released beside them, both costing z.

    z_u = (z^-2 - (2 s)^-2)^(-1/2) (Andrew et al. 2019, arXiv 1905.03871, theorem 1): sum and count together
    are one Gaussian release, of squared sensitivity over noise 1 / z_u^2 + (1/2)^2 / s^2, which is 1 / z^2.

    Args:
        noise_multiplier: z, what the pair costs.
        count_noise: s, standard deviation of the noise on the count.

    Raises:
        ValueError: if 2 s <= z: the count alone would spend it all.

    >>> round(split_noise_multiplier(1.0, count_noise=1.0), 4)
    1.1547
    """
    if not 2 * count_noise > noise_multiplier:
        raise ValueError(
            f"noise on the count must be above half the noise multiplier {noise_multiplier:.4g}, got "
            f"{count_noise:.4g}: the count alone would spend more than the pair may; raise count-noise"
        )
    return float((noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5)


def next_clip_norm(clip_norm: float, share_within: float, quantile: float, lr: float) -> float:
    """The clip norm after a geometric step: C exp(-lr (b - quantile)), b the share of updates NOT clipped.

    More short updates than wanted shrink it, fewer let it grow (Andrew et al. 2019, arXiv 1905.03871,
    algorithm 1). b may leave [0, 1], as it is noised.

    >>> round(next_clip_norm(1.0, share_within=1.0, quantile=0.5, lr=0.2), 4)
    0.9048
    """
    return clip_norm * math.exp(-lr * (share_within - quantile))


@dataclass(frozen=True)
class AdaptiveNorm:
    """How the clip norm follows a quantile of the update norms.

    Attributes:
        cohort: planned number of updates, which the count is divided by; a missing one counts as half.
        count_noise: standard deviation of the noise on the count of updates within the norm.
        quantile: share of updates that shall not be clipped, in [0, 1].
        lr: step size of the clip norm's logarithm.

    Raises:
        ValueError: for a value out of range.
    """

    cohort: float
    count_noise: float
    quantile: float = 0.5
    lr: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must lie in [0, 1], got {self.quantile}: it is a share of updates")
        for option in ("cohort", "count_noise", "lr"):
            value = getattr(self, option)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{option.replace('_', '-')} must be a number > 0, got {value}")


@dataclass(frozen=True, eq=False)
class CentralRelease:
    """What one round makes public, and what it was made with.

    Attributes:
        change: of the global weights by name, float64, noise included.
        clip_norm: C that was applied.
        noise_std: standard deviation of the noise on every coordinate of `change`.
        next_clip_norm: C of the next round.
    """

    change: Mapping[str, Tensor]
    clip_norm: float
    noise_std: float
    next_clip_norm: float


@dataclass(frozen=True)
class CentralMechanism:
    """Clips updates over all entries, adds them up with bounded weights, adds noise, divides by a constant.

    The weight of an update is 1 ("uniform"), or min(n_i, most_examples) for a client of n_i examples. With w
    the largest weight, the sensitivity is w C / divisor: capped weights may therefore not be divided by the
    sum of the weights that came in, which depends on who replied.

    Attributes:
        noise_multiplier: z, noise over sensitivity of all that a round releases.
        clip_norm: C of the first round, over ALL floating-point entries, scalars and buffers too.
        divisor: D; the planned number of updates, or of (capped) examples.
        most_examples: cap on the examples that a client counts with; 0 weights uniformly.
        adaptive: how C changes; None keeps it.

    Raises:
        ValueError: for a value out of range.

    >>> CentralMechanism(2.0, 0.5, divisor=10).noise_std(0.5)
    0.1
    """

    noise_multiplier: float
    clip_norm: float
    divisor: float
    most_examples: int = 0
    adaptive: AdaptiveNorm | None = None

    def __post_init__(self) -> None:
        for option in ("noise_multiplier", "clip_norm", "divisor"):
            value = getattr(self, option)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{option.replace('_', '-')} must be a number > 0, got {value}")
        if self.most_examples < 0:
            raise ValueError(f"most-examples must be >= 0, got {self.most_examples}: 0 weights uniformly")
        if self.adaptive is not None:
            split_noise_multiplier(self.noise_multiplier, self.adaptive.count_noise)

    @property
    def heaviest(self) -> float:
        """w, the largest weight before division."""
        return float(self.most_examples or 1)

    @property
    def update_multiplier(self) -> float:
        """Noise over sensitivity of the sum of updates alone; above z where a count is released beside it."""
        if self.adaptive is None:
            return self.noise_multiplier
        return split_noise_multiplier(self.noise_multiplier, self.adaptive.count_noise)

    def sensitivity(self, clip_norm: float) -> float:
        """How far one client's update moves the released change, at most: w C / D."""
        return self.heaviest * clip_norm / self.divisor

    def noise_std(self, clip_norm: float) -> float:
        """Standard deviation of the noise on every coordinate of the change when C is `clip_norm`."""
        return self.update_multiplier * self.sensitivity(clip_norm)

    def weight(self, num_examples: int) -> float:
        """What an update of so many examples is multiplied with before division."""
        return float(min(num_examples, self.most_examples)) if self.most_examples else 1.0

    def release(
        self,
        updates: Sequence[Mapping[str, Tensor]],
        examples: Sequence[int],
        like: Mapping[str, Tensor],
        clip_norm: float,
        source: np.random.Generator,
    ) -> CentralRelease:
        """The noised change of one round, whatever came in; with no update at all it is noise alone.

        Releasing nothing in an empty round would tell it from a round with one client. Everything is float64;
        rounding to the weights' precision comes after the noise. Integer entries of `like` are no part of it.

        Args:
            updates: one mapping per client, paired with `like` by name; an update that is not finite counts
                as zero.
            examples: number of examples behind each.
            like: the weights that were broadcast; their floating-point entries are what is released.
            clip_norm: C of this round.
            source: of the noise. Whoever knows its seed removes the noise.

        Raises:
            ValueError: if an update has other names or shapes than the floating-point entries of `like`.
        """
        shapes = {name: tensor.shape for name, tensor in like.items() if tensor.is_floating_point()}
        total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        within = 0.0
        for update, count in zip(updates, examples, strict=True):
            if {name: change.shape for name, change in update.items()} != shapes:
                raise ValueError(
                    f"an update has the names and shapes of the weights, got {sorted(update)} for "
                    f"{sorted(shapes)}: leave it out"
                )
            clipped, weight = clip_update(update, clip_norm), self.weight(count)
            for name in shapes:
                total[name] += weight * clipped[name]
            within += HALF if _norm(update) <= clip_norm else -HALF
        std, change = self.noise_std(clip_norm), {}
        for name, shape in shapes.items():
            noise = torch.from_numpy(np.asarray(source.standard_normal(shape)))
            change[name] = total[name] / self.divisor + std * noise
        return CentralRelease(change, clip_norm, std, self._following(clip_norm, within, source))

    def _following(self, clip_norm: float, within: float, source: np.random.Generator) -> float:
        """The next clip norm; moved only after this round's noise was scaled to this round's norm."""
        if self.adaptive is None:
            return clip_norm
        counted = within + self.adaptive.count_noise * float(source.standard_normal())
        share = HALF + counted / self.adaptive.cohort
        return next_clip_norm(clip_norm, share, self.adaptive.quantile, self.adaptive.lr)


def _norm(update: Mapping[str, Tensor]) -> float:
    squares = [float(torch.linalg.vector_norm(change.detach().double())) for change in update.values()]
    return math.hypot(*squares)
