"""Latent attributes: properties of an example that nobody set out to share, written as one word in a spec."""

import re

from torch import Tensor

ATTRIBUTES = {
    "brightness": "mean intensity above the median of the examples used",
    "contrast": "standard deviation of intensities above the median of the examples used",
    "label:K": "the example has class K",
}
"""What can be written, and what it means."""

_LABEL = re.compile(r"label:(\d+)")


def check_attribute(spec: str) -> None:
    """Refuse a text that names no attribute.

    Raises:
        ValueError: naming what is allowed.
    """
    if spec not in ("brightness", "contrast") and not _LABEL.fullmatch(spec):
        raise ValueError(
            f"an attribute is one of {', '.join(ATTRIBUTES)} (K a class), got {spec!r}: choose one"
        )


def latent_attribute(spec: str, x: Tensor, y: Tensor) -> Tensor:
    """Whether each example has the attribute: booleans (B,), some true and some false.

    "brightness" and "contrast" compare with the median of these B examples, so that both values are about
    equally frequent; whether one example has them depends on the others. "label:K" is no secret where the
    label is not: it shows what a gradient gives away about a class at most.

    Args:
        spec: "brightness", "contrast" or "label:K".
        x: examples (B, ...).
        y: class indices (B,).

    Raises:
        ValueError: if the spec names no attribute, or all examples agree on it.

    >>> import torch
    >>> latent_attribute("brightness", torch.tensor([[0.0, 0.1], [0.9, 1.0]]), torch.zeros(2))
    tensor([False,  True])
    """
    check_attribute(spec)
    label = _LABEL.fullmatch(spec)
    if label:
        found = y == int(label[1])
    else:
        pixels = x.detach().flatten(1).double()
        statistic = pixels.mean(1) if spec == "brightness" else pixels.std(1, correction=0)
        found = statistic > statistic.quantile(0.5) if len(statistic) else statistic > 0
    count = int(found.sum())
    if count in (0, len(found)):
        whose = "all" if count else "none"
        raise ValueError(
            f"an attribute must split the examples, got {spec!r} which {whose} of {len(found)} have: "
            "choose another attribute or more examples"
        )
    return found


def follows_label(attribute: Tensor, y: Tensor) -> bool:
    """Whether the attribute (B,) is a function of the label (B,) on these examples.

    >>> import torch
    >>> follows_label(torch.tensor([True, False, True]), torch.tensor([1, 0, 1]))
    True
    """
    return all(len(set(attribute[y == label].tolist())) == 1 for label in set(y.tolist()))
