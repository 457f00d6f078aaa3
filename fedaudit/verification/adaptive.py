"""Does an adaptive clip norm move towards its target?"""

import math
from collections.abc import Sequence

import numpy as np

from fedaudit.claims import HOLDS, UNCHECKED, VIOLATED, AdaptiveClipping, Finding
from fedaudit.types import ClientUpdate
from fedaudit.verification.checks import Check, Scene


def adaptive_check(
    claim: AdaptiveClipping,
    updates: Sequence[ClientUpdate],
    clip_norms: tuple[float, float] | None,
    scene: Scene,
) -> Check:
    """The step of the clip norm against the share of updates within it.

    The step C' / C gives back the share b that was used, which N(0, (count_std / n)^2) may part from the
    share of updates with norm <= C. If the share of clipped updates fits instead, the norm moves away from
    its target. With a cohort fixed beforehand, b = 1/2 + sum(+-1/2) / n over the replies: a missing update
    counts as half.
    """
    if clip_norms is None or not updates:
        reason = "the clip norms of two rounds and the updates are needed; the server knows both"
        return scene.without_tests(claim, UNCHECKED, reason)
    now, following = clip_norms
    norms = np.array([float(np.linalg.norm(u.flat.double().numpy())) for u in updates])
    cohort = claim.cohort or len(norms)
    within = 0.5 + float(np.where(norms <= now, 0.5, -0.5).sum()) / cohort
    implied = claim.quantile - math.log(following / now) / claim.lr
    unit = claim.count_std / cohort

    def at(level: float) -> Finding:
        from scipy.stats import norm

        half = unit * float(norm.isf(level / 2)) + 1e-6
        ends = (implied, implied - half, implied + half)
        if abs(implied - within) <= half:
            if abs(1 - 2 * within) <= 2 * half:
                reason = "about half the updates are within the norm, so both directions look alike"
                return scene.finding(claim, UNCHECKED, reason, *ends)
            return scene.finding(claim, HOLDS, f"{within:.3g} of the updates are within the norm", *ends)
        reason = f"the step is that of a share of {implied:.3g} within the norm, but {within:.3g} are"
        if abs(implied - (1 - within)) <= half:
            reason += ": the share of clipped updates took its place, so the norm moves the wrong way"
        return scene.finding(claim, VIOLATED, reason, *ends)

    return Check(1, at)
