"""One test of one claim: how many tests it makes, and what it concludes at a given level."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedaudit.claims import HOLDS, UNCHECKED, VIOLATED, Claim, Finding, GaussianNoise, Verdict, Watcher
from fedaudit.verification.residuals import Residual

NOTICED = 0.5
"""Noise is held to be there only if half of it missing would have been noticed."""


@dataclass(frozen=True)
class Check:
    """A test that waits to hear how many others there are.

    Attributes:
        tests: chances of a false alarm; 0 for a comparison without randomness.
        conclude: the finding, given the level of each test.
    """

    tests: int
    conclude: Callable[[float], Finding]


@dataclass(frozen=True)
class Scene:
    """Whose release is looked at, in which round, by whom; makes findings about it.

    Attributes:
        observer: who looks.
        round: server round.
        client_id: whose update; None for the round as a whole.
    """

    observer: Watcher
    round: int
    client_id: int | None = None

    def of(self, client_id: int | None) -> "Scene":
        """The same scene, another client."""
        return replace(self, client_id=client_id)

    def finding(
        self,
        claim: Claim,
        verdict: Verdict,
        reason: str,
        measured: float | None = None,
        low: float | None = None,
        high: float | None = None,
    ) -> Finding:
        """A finding of this scene."""
        return Finding(claim, measured, low, high, verdict, self.observer, reason, self.round, self.client_id)

    def without_tests(self, claim: Claim, verdict: Verdict, reason: str, *numbers: float | None) -> Check:
        """A check that is settled already."""
        finding = self.finding(claim, verdict, reason, *numbers)
        return Check(0, lambda _level: finding)


def noise_check(
    claim: GaussianNoise, residual: Residual, scene: Scene, others: str, blame_signal: bool = False
) -> Check:
    """Whether every coordinate of a residual holds the claimed noise.

    Args:
        claim: the noise.
        residual: in its units.
        scene: whose.
        others: who could see more, where this observer sees too little.
        blame_signal: whether too large a residual is another claim's concern, because a signal is in it.
    """

    def at(level: float) -> Finding:
        low, high = residual.whole_interval(level)
        std = claim.std
        measured = std * residual.norm / max(1, residual.size - residual.lost) ** 0.5
        ends = (measured, low * std, high * std)

        def found(verdict: Verdict, reason: str, numbers: Sequence[float] = ends) -> Finding:
            return scene.finding(claim, verdict, reason, *numbers)

        crowded = {name: p for name, p in residual.crowding.items() if p <= level}
        if high < 1:
            return found(VIOLATED, _too_small(high, crowded))
        tensors = {} if residual.lost else residual.tensor_intervals(level)
        missing = {name: ends for name, ends in tensors.items() if ends[1] < 1}
        if missing:
            name = min(missing, key=lambda key: missing[key][1])
            numbers = (
                std * residual.norms[name] / residual.parts[name].size ** 0.5,
                *(std * end for end in missing[name]),
            )
            return found(
                VIOLATED,
                f"tensor {name!r} holds at most {missing[name][1]:.3g} of the claimed std"
                f"{_and_others(missing)}",
                numbers,
            )
        if crowded:
            where = min(crowded, key=lambda key: crowded[key])
            named = f"in tensor {where!r}" if where else "over all tensors"
            return found(
                VIOLATED,
                f"coordinates {named} share values as noised ones do not (p <= {crowded[where]:.1e})",
            )
        if low > 1 and not blame_signal:
            return found(VIOLATED, f"the noise is at least {low:.3g} times the claimed std")
        larger = {name: ends for name, ends in tensors.items() if ends[0] > 1}
        if larger and not blame_signal:
            name = max(larger, key=lambda key: larger[key][0])
            numbers = (
                std * residual.norms[name] / residual.parts[name].size ** 0.5,
                *(std * end for end in larger[name]),
            )
            return found(
                VIOLATED,
                f"tensor {name!r} is off by at least {larger[name][0]:.3g} times the claimed std"
                f"{_and_others(larger)}",
                numbers,
            )
        if residual.shape <= level:
            return found(
                VIOLATED,
                f"the noise is not Gaussian of the claimed std (Kolmogorov-Smirnov p = {residual.shape:.1e})",
            )
        if low < NOTICED:
            return found(
                UNCHECKED,
                f"nothing contradicts the claim, but the signal may be all of it: half the noise could be "
                f"missing unnoticed; {others}",
            )
        small = [name for name, part in residual.parts.items() if part.size < 16]
        note = f"; tensors of under 16 entries ({_names(small)}) can only be refuted" if small else ""
        return found(HOLDS, f"noise between {low:.3g} and {high:.3g} times the claimed std{note}")

    return Check(residual.tests, at)


def _too_small(high: float, crowded: dict[str, float]) -> str:
    if high < 1e-3 or ("" in crowded and high < 0.05):
        return f"there is no noise to speak of: at most {high:.1e} of the claimed std"
    return f"the noise is at most {high:.3g} of the claimed std"


def _and_others(found: dict[str, tuple[float, float]]) -> str:
    return f" ({len(found)} tensors in all)" if len(found) > 1 else ""


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown}, ..."
