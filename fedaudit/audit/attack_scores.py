"""Scores of one reconstruction against the truth, as findings: what an oracle adds to an attack's row."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedaudit.attacks import scores
from fedaudit.attacks.attacked_model import broadcast_model
from fedaudit.attacks.identifiability import chance_level, head_features, nearest_is_own
from fedaudit.attacks.perceptual import hindrance, lpips, present
from fedaudit.attacks.registration import reach_of, registered_psnr
from fedaudit.measures.draws import generator_for
from fedaudit.types import ClientUpdate, Estimate, Reconstruction, RoundContext, Skip, Truth

RECOVERED_DB = 20.0
"""PSNR above which an example counts as recovered, as in Dimitrov et al. 2022, arXiv 2206.12395."""
MOST_OTHERS = 200
"""Candidates beside the true examples, at most: each costs a forward pass, which a large model feels."""
_BASIC = (("psnr", "dB"), ("mse", "1"), ("ssim", "1"), ("label_accuracy", "1"))


@dataclass(frozen=True, eq=False)
class Matched:
    """Reconstructions beside the examples they were matched to.

    Attributes:
        x: reconstructions (M, *input_shape), clamped to the value range.
        truth: the example each was matched to (M, *input_shape).
        places: which of the true examples that is (M,).
        mse: of each pair (M,).
    """

    x: Tensor
    truth: Tensor
    places: Tensor
    mse: Tensor


def scored(
    found: Reconstruction,
    truth: Truth,
    update: ClientUpdate,
    ctx: RoundContext,
    results: dict[str, float],
    *,
    perceptual: bool = False,
) -> Iterator[tuple[str, str, Estimate | Skip | Exception]]:
    """Name, unit and finding of every score of a reconstruction, those of `scores.score` first.

    "recovered": share of the true examples that a reconstruction shows with more than 20 dB, after matching.
    "registered-psnr": see `registered_psnr`. "identifiability", and "feature-identifiability" by the model's
    own features at the broadcast weights: share of reconstructions whose nearest neighbour is the true one
    among the batch, the client's other examples and the server's reference examples (`nearest_is_own`), with
    the pool's size and chance level beside it. "lpips" only on request. Scores that images alone have are
    missing where inputs are none.

    Args:
        found: what the attack recovered.
        truth: the examples behind the update.
        update: what was attacked.
        ctx: the value range, the reference and, for features, the model.
        results: what `scores.score` says of `found` and `truth`.
        perceptual: whether to compute LPIPS.
    """
    extra = {**found.conditions, "truth-examples": len(truth.y), "matched": int(results["matched"])}
    for key, unit in _BASIC:
        if key in results:
            yield key.replace("_", "-"), unit, Estimate(results[key], unit, "exact", extra=extra)
    clamped = found.x.detach().to("cpu", torch.float64).clamp(*ctx.value_range)
    true = truth.x.detach().cpu()
    rows, places, mse = scores.match(clamped, true)
    pairs = Matched(clamped[rows], true[places], places, mse)
    yield "recovered", "1", recovered(pairs, len(true), ctx.value_range)
    reach = reach_of(tuple(true.shape[1:]))
    if reach is not None:
        value = registered_psnr(pairs.x, pairs.truth, ctx.value_range, reach=reach).mean()
        yield (
            "registered-psnr",
            "dB",
            Estimate(float(value), "dB", "exact", extra={"largest-shift": reach, "mirrored": True}),
        )
    yield from _identified(pairs, true, truth.others, update, ctx)
    if perceptual:
        yield "lpips", "1", _perceptual(pairs, ctx.value_range)


def recovered(pairs: Matched, truth: int, value_range: tuple[float, float]) -> Estimate:
    """The share of `truth` examples whose matched reconstruction has more than 20 dB."""
    above = int((scores.psnr(pairs.mse, value_range) > RECOVERED_DB).sum())
    return Estimate(
        above / truth, "1", "exact", extra={"above-db": RECOVERED_DB, "recovered-examples": above}
    )


def _identified(
    pairs: Matched, true: Tensor, others: Tensor | None, update: ClientUpdate, ctx: RoundContext
) -> Iterator[tuple[str, str, Estimate | Skip | Exception]]:
    sides = [
        side for side in (others, None if ctx.reference is None else ctx.reference[0]) if side is not None
    ]
    counts = [len(side) for side in sides]
    if not sum(counts):
        yield "identifiability", "1", Skip("identifiability needs examples that are not behind the update")
        return
    order = torch.randperm(sum(counts), generator=generator_for(ctx, "identifiability", update.client_id))
    drawn = order[:MOST_OTHERS].sort().values
    starts = [sum(counts[:place]) for place in range(len(counts))]
    chosen = [
        side[(drawn[(drawn >= start) & (drawn < start + len(side))] - start).to(side.device)].cpu()
        for side, start in zip(sides, starts, strict=True)
    ]
    pool = torch.cat([true, *chosen])
    extra: dict[str, float | int | str | bool] = {
        "pool": len(pool),
        "pool-of-client": len(true) + (len(chosen[0]) if others is not None else 0),
        "chance": chance_level(len(true), len(pool)),
    }
    hits = nearest_is_own(pairs.x, pairs.places, pool).double().mean()
    yield (
        "identifiability",
        "1",
        Estimate(float(hits), "1", "estimate", extra={**extra, "distance": "pixels"}),
    )
    if ctx.build_model is None:
        return
    try:
        with torch.random.fork_rng(devices=[]):
            model = broadcast_model(update, ctx.build_model(), "eval").to(ctx.device)
        features = head_features(model, pool), head_features(model, pairs.x)
        hits = nearest_is_own(features[1], pairs.places, features[0]).double().mean()
    except Exception as error:
        yield "feature-identifiability", "1", error
        return
    yield (
        "feature-identifiability",
        "1",
        Estimate(float(hits), "1", "estimate", extra={**extra, "distance": "features of the model"}),
    )


def _perceptual(pairs: Matched, value_range: tuple[float, float]) -> Estimate | Skip:
    reason = hindrance(tuple(pairs.truth.shape[1:]))
    if reason:
        return Skip(reason)
    value = lpips(pairs.x, pairs.truth, value_range)
    return Estimate(value, "1", "exact", extra={"network": str(present())})
