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
    found = has_attribute(spec, x, y, x)
    count = int(found.sum())
    if count in (0, len(found)):
        whose = "all" if count else "none"
        raise ValueError(
            f"an attribute must split the examples, got {spec!r} which {whose} of {len(found)} have: "
            "choose another attribute or more examples"
        )
    return found


def has_attribute(spec: str, x: Tensor, y: Tensor, among: Tensor) -> Tensor:
    """The same with the median of other examples, so that "bright" means the same for every client: (B,).

    Args:
        spec: "brightness", "contrast" or "label:K".
        x: examples (B, ...).
        y: class indices (B,).
        among: examples (n, ...) whose median is compared with; "label:K" does not use them.

    Raises:
        ValueError: if the spec names no attribute, or there is nothing to take the median of.

    >>> import torch
    >>> has_attribute("brightness", torch.tensor([[0.9]]), torch.zeros(1), torch.tensor([[0.1], [0.5]]))
    tensor([True])
    """
    check_attribute(spec)
    label = _LABEL.fullmatch(spec)
    if label:
        return y == int(label[1])
    own, others = _statistic(spec, x), _statistic(spec, among)
    if not len(own):
        return own > 0
    if not len(others):
        raise ValueError("a median needs examples, got none: give the examples to compare with")
    return own > others.quantile(0.5)


def _statistic(spec: str, x: Tensor) -> Tensor:
    pixels = x.detach().flatten(1).double()
    return pixels.mean(1) if spec == "brightness" else pixels.std(1, correction=0)


def follows_label(attribute: Tensor, y: Tensor) -> bool:
    """Whether the attribute (B,) is a function of the label (B,) on these examples.

    >>> import torch
    >>> follows_label(torch.tensor([True, False, True]), torch.tensor([1, 0, 1]))
    True
    """
    return all(len(set(attribute[y == label].tolist())) == 1 for label in set(y.tolist()))
