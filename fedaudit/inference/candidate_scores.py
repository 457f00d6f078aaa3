"""Scores of candidate examples against a round's updates: what an honest-but-curious server can compute.

It knows the weights it sent, the weights that came back, and the candidates; not who is a member.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import vmap

from fedaudit.attacks.membership import (
    against_others,
    average_over_rounds,
    cosine,
    gradient_difference,
    length_along,
)
from fedaudit.measures.cohort import same_weights
from fedaudit.measures.ghost_kernels import example_gradients
from fedaudit.measures.round_examples import broadcast_model
from fedaudit.types import ClientUpdate, Loss, RoundContext, StepRelease

Score = Literal[
    "loss",
    "gradient-norm",
    "cosine",
    "gradient-difference",
    "matched-filter",
    "fedmia-loss",
    "fedmia-cosine",
]
SCORES: tuple[Score, ...] = get_args(Score)
BLOCK = 2**22  # numbers in one block of per-example gradients: 16 MB
AGAINST_OTHERS = "fedmia-"  # begins the names of scores that compare with the round's other updates


@dataclass(frozen=True, eq=False)
class Alignment:
    """How candidates' gradients, at the broadcast weights, lie to the updates with their sign turned.

    Attributes:
        products: inner products (R, n), float64.
        norms: of the gradients (n,).
        update_norms: of the updates (R,).
    """

    products: Tensor
    norms: Tensor
    update_norms: Tensor


def candidate_scores(
    score: Score, updates: Sequence[ClientUpdate], ctx: RoundContext, x: Tensor, y: Tensor
) -> Tensor:
    """How much each candidate looks like a member of each client's data, larger for a member: (R, n).

    "loss" and "gradient-norm", with their sign turned, are taken at the weights a client RETURNED; "cosine",
    "gradient-difference" and "matched-filter" compare the gradient at the weights it was SENT with its update
    (see `fedaudit.attacks.membership`). For the difference an update is brought to the unit of one example,
    -delta * examples / (lr * steps), and gradients are clipped as the release clips them. "fedmia-loss" and
    "fedmia-cosine" compare a score with what the round's other updates give the same candidate.

    The model is in evaluation mode. Gradients are computed a few candidates at a time: what stays is (R, n).

    Args:
        score: one of `SCORES`.
        updates: R updates that started from the same weights.
        ctx: with the model and the loss; with lr and steps for "gradient-difference".
        x: candidates (n, *input_shape).
        y: their labels (n,).

    Raises:
        ValueError: if the updates started from different weights, the context lacks something, there are
            fewer than three updates for a score against the others, or per-example gradients are undefined.
    """
    base = score.removeprefix(AGAINST_OTHERS)
    if base in ("loss", "gradient-norm"):
        found = _returned_scores(base, updates, ctx, x, y)
    else:
        found = _aligned_scores(base, updates, ctx, x, y)
    return against_others(found) if score.startswith(AGAINST_OTHERS) else found


def scores_over_rounds(
    score: Score, rounds: Sequence[tuple[Sequence[ClientUpdate], RoundContext]], x: Tensor, y: Tensor
) -> Tensor:
    """The mean of `candidate_scores` over recorded rounds: (R, n), e.g. of updates kept by a run.

    Args:
        score: one of `SCORES`.
        rounds: each round's updates, of the same R clients in the same order, and its context.
        x: candidates (n, *input_shape).
        y: their labels (n,).

    Raises:
        ValueError: if rounds hold different clients, and as `candidate_scores`.
    """
    clients = {tuple(update.client_id for update in updates) for updates, _ in rounds}
    if len(clients) != 1:
        raise ValueError(
            f"rounds are averaged for the same clients, got {len(clients)} different groups in {len(rounds)} "
            "rounds: keep the clients that took part in every round"
        )
    return average_over_rounds([candidate_scores(score, updates, ctx, x, y) for updates, ctx in rounds])


def align(
    updates: Sequence[ClientUpdate],
    ctx: RoundContext,
    x: Tensor,
    y: Tensor,
    *,
    clipped: StepRelease | None = None,
) -> Alignment:
    """Inner products of the candidates' gradients with the updates, without holding all gradients.

    Args:
        updates: R updates that started from the same weights.
        ctx: with the model and the loss.
        x: candidates (n, *input_shape).
        y: their labels (n,).
        clipped: a release whose clipping the gradients go through first; None leaves them as they are.

    Raises:
        ValueError: as `candidate_scores`.
    """
    _check_start(updates)
    model, loss = broadcast_model(ctx, updates[0].before)
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    deltas = [update.delta for update in updates]
    squared = [sum(float(delta[name].double().square().sum()) for name in trainable) for delta in deltas]
    products, norms = [], []
    for gradients in _gradients(model, loss, x, y, ctx.device, clipped):
        block = torch.zeros(len(updates), len(gradients), dtype=torch.float64, device=gradients.device)
        parts = torch.split(gradients, list(trainable.values()), dim=1)
        for name, part in zip(trainable, parts, strict=True):
            rows = torch.stack([delta[name].reshape(-1) for delta in deltas])
            block -= rows.to(part.device, torch.float64) @ part.double().T
        products.append(block.cpu())
        norms.append(torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64).cpu())
    update_norms = torch.tensor(squared, dtype=torch.float64).sqrt()
    return Alignment(torch.cat(products, 1), torch.cat(norms), update_norms)


def _aligned_scores(
    base: str, updates: Sequence[ClientUpdate], ctx: RoundContext, x: Tensor, y: Tensor
) -> Tensor:
    """Scores (R, n) made of inner products."""
    aligned = align(updates, ctx, x, y)
    if base == "cosine":
        return cosine(aligned.products, aligned.norms, aligned.update_norms)
    if base == "matched-filter":
        return length_along(aligned.products, aligned.norms)
    rows = []
    for products, update in zip(aligned.products, updates, strict=True):
        steps = ctx.steps(update)
        if not ctx.lr or not steps:
            raise ValueError(
                f"gradient-difference needs lr > 0 and steps > 0 of plain SGD, got lr={ctx.lr}, "
                f"steps={steps}: state both, or choose the cosine"
            )
        release = ctx.release(update) if ctx.release is not None else None
        unit, norms, shrunk = (
            update.num_examples / (ctx.lr * steps),
            aligned.norms,
            torch.ones_like(aligned.norms),
        )
        if release is not None and release.per_layer:  # no factor for the whole gradient: align anew
            alone = align([update], ctx, x, y, clipped=release)
            products, norms = alone.products[0], alone.norms
        elif release is not None and release.clip_norm is not None:
            shrunk = (release.clip_norm / norms).clamp(max=1)
        rows.append(gradient_difference(unit * shrunk * products, shrunk * norms))
    return torch.stack(rows)


def _returned_scores(
    base: str, updates: Sequence[ClientUpdate], ctx: RoundContext, x: Tensor, y: Tensor
) -> Tensor:
    """Minus the loss, or the gradient norm, of each candidate at the weights each client returned (R, n)."""
    _check_start(updates)
    model, loss = broadcast_model(ctx, updates[0].before)
    rows = []
    for update in updates:
        returned = {name: value + update.delta.get(name, 0) for name, value in update.before.items()}
        model.load_state_dict(returned)
        if base == "loss":
            with torch.no_grad():
                outputs = torch.cat([model(part.to(ctx.device)) for part in torch.split(x, 512)])
                values = vmap(lambda o, label: loss(o[None], label[None]))(outputs, y.to(ctx.device))
            rows.append(-values.double().cpu())
        else:
            norms = [gradients.norm(dim=1) for gradients in _gradients(model, loss, x, y, ctx.device)]
            rows.append(-torch.cat(norms).double().cpu())
    return torch.stack(rows)


def _gradients(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, device: str, clipped: StepRelease | None = None
) -> Iterator[Tensor]:
    """Per-example gradients (c, P), a few candidates at a time."""
    size = max(1, BLOCK // sum(p.numel() for p in model.parameters() if p.requires_grad))
    for some, labels in zip(torch.split(x, size), torch.split(y, size), strict=True):
        yield example_gradients(
            model,
            loss,
            some.to(device),
            labels.to(device),
            clip_norm=clipped.clip_norm if clipped is not None else None,
            per_layer=clipped is not None and clipped.per_layer,
        )


def _check_start(updates: Sequence[ClientUpdate]) -> None:
    groups = len(same_weights(updates))
    if groups != 1:
        raise ValueError(
            f"candidates are compared at one set of weights, got {groups} among {len(updates)} updates: "
            "score updates that started from the same weights together"
        )
