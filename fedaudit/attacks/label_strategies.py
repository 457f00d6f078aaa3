"""How an attack comes by the labels of a batch: told, derived from the head's gradient, or optimised."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fedaudit.attacks.labels import estimate_mean_softmax, idlg_label, label_counts, uniform_inputs
from fedaudit.types import RoundContext

Labels = Literal["known", "idlg", "counts", "joint"]
"""known: stated by whoever runs the attack; idlg: the sign rule, one example; counts: label counts of a
batch from the head's bias and an estimated mean softmax; joint: soft labels optimised with the inputs."""

_DUMMIES = 64  # inputs that estimate the mean softmax where the observer has no reference data


def labels_for(
    strategy: Labels,
    stated: str,
    gradient: Mapping[str, Tensor],
    models: Sequence[nn.Module],
    batch: int,
    ctx: RoundContext,
) -> Tensor | None:
    """The labels (B,) by this strategy, sorted if derived; None if they are to be optimised.

    Labels known to the attacker are a strong assumption: results that use them say so.

    Args:
        strategy: one of `Labels`.
        stated: the known labels joined by hyphens, as in ``"3-1-4"``; only for "known".
        gradient: mean gradient by parameter name.
        models: the model at the weights whose mean softmax is averaged: the broadcast ones, and for
            several local steps the returned ones too.
        batch: B.
        ctx: the observer's reference data, if it has any, estimate the mean softmax.

    Raises:
        ValueError: if the stated labels do not fit, "idlg" is asked of a batch, or there is no usable head.
    """
    classes = ctx.num_classes or 0
    if strategy == "joint":
        return None
    if strategy == "known":
        return _stated(stated, batch, classes)
    if strategy == "idlg" and batch > 1:
        raise ValueError(f"labels=idlg is exact for one example, got a batch of {batch}: use labels=counts")
    return head_labels(gradient, models, batch, ctx, classes, use_reference=True)


def head_labels(
    gradient: Mapping[str, Tensor],
    models: Sequence[nn.Module],
    batch: int,
    ctx: RoundContext,
    num_classes: int,
    *,
    use_reference: bool = False,
) -> Tensor:
    """The labels (B,) that the gradient of the head, the model's last parameter, gives away.

    Exact for one example. For a batch the counts are exact only if the mean softmax is; it is estimated on
    the observer's reference data if asked for and there, and else on uniform noise.

    Raises:
        ValueError: if the model's last parameter is no head for `num_classes`, or a batch's head has no bias.
    """
    name = [name for name, _ in models[0].named_parameters()][-1]
    head = gradient.get(name)
    if head is None or head.dim() not in (1, 2) or len(head) != num_classes:
        raise ValueError(
            f"labels=idlg needs the head ({num_classes} classes) as the model's last parameter, got "
            f"{name!r} of shape {None if head is None else tuple(head.shape)}: use labels=joint"
        )
    if batch == 1:
        label = idlg_label(head) if head.dim() == 1 else idlg_label(weight_gradient=head)
        return torch.tensor([label])
    if head.dim() == 2:
        raise ValueError("labels=idlg for a batch needs a head with a bias, got none: use labels=joint")
    inputs = ctx.reference[0] if use_reference and ctx.reference is not None else _noise(ctx)
    inputs = inputs.to(next(models[0].parameters()))
    softmax = [estimate_mean_softmax(model, inputs) for model in models]
    counts = label_counts(head, torch.stack(softmax).mean(dim=0).to(head.device), batch)
    return torch.repeat_interleave(torch.arange(num_classes), counts.cpu())


def _noise(ctx: RoundContext) -> Tensor:
    generator = torch.Generator().manual_seed(ctx.seed)
    return uniform_inputs(_DUMMIES, ctx.input_shape or (), ctx.value_range, generator)


def _stated(text: str, batch: int, classes: int) -> Tensor:
    """Labels written as ``3-1-4``."""
    pieces = text.split("-") if text else []
    if len(pieces) != batch or not all(p.isdecimal() and int(p) < classes for p in pieces):
        raise ValueError(
            f"labels=known needs {batch} labels from 0 to {classes - 1} joined by hyphens, got {text!r}: "
            f"write e.g. classes={'-'.join(['0'] * batch)}"
        )
    return torch.tensor([int(p) for p in pieces])
