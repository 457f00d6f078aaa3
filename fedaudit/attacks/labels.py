"""What the gradient of a classification head says about the labels of the batch it came from."""

import math

import torch
from torch import Tensor


def idlg_label(bias_gradient: Tensor | None = None, *, weight_gradient: Tensor | None = None) -> int:
    """The label of the single example behind a gradient of softmax cross-entropy.

    dL/db_c = p_c - 1[c = y] for one example with a hard label, so only the true class has a negative
    entry: exact for any weights as long as the head has a bias and p_y < 1 in floating point. Without a
    bias the rows are dL/dW_c = (p_c - 1[c = y]) h, all multiples of one feature vector h with the row of
    y pointing the other way and being the longest (its factor equals the sum of the others), which is
    used here and needs no sign assumption on h.

    It is NOT a rule for batches (see `label_counts`), soft labels, other losses or noisy gradients; it
    always answers with some class.

    Source: Zhao, Mopuri, Bilen 2020, arXiv 2001.02610.
    Differs from Zhao et al.: the fallback takes the row of the largest norm rather than the most
    negative row sum, which would need features that are not negative.

    Args:
        bias_gradient: gradient of the head's bias (C,), or None if it has none.
        weight_gradient: gradient of the head's weight (C, D); read only if there is no bias gradient.

    Raises:
        ValueError: if neither is given, a shape is wrong or a value is not finite.

    >>> idlg_label(torch.tensor([0.2, -0.7, 0.5]))
    1
    """
    if bias_gradient is not None:
        _check(bias_gradient, 1, "bias gradient (C,)")
        return int(bias_gradient.argmin())
    if weight_gradient is None:
        raise ValueError("a label needs the head's bias or weight gradient, got neither: give one")
    _check(weight_gradient, 2, "weight gradient (C, D)")
    # With two classes both rows are equally long: the sign of the row sum decides, as in iDLG.
    if weight_gradient.shape[0] == 2:
        return int(weight_gradient.sum(dim=1).argmin())
    return int(weight_gradient.norm(dim=1).argmax())


def label_counts(bias_gradient: Tensor, mean_softmax: Tensor, batch_size: int) -> Tensor:
    """How many examples of each class (C,) a batch held, as integers that sum to `batch_size`.

    The mean loss of a batch has dL/db_c = mean_n p_nc - count_c / B, hence
    count_c = B (mean_softmax_c - dL/db_c). The counts are exact if `mean_softmax` is the client's; an
    observer can only estimate it from its own or dummy inputs at the same weights, and the counts are
    then an estimate that is bad once the network is confident. Rounded by the largest remainder after
    negative counts were set to zero.

    Source: the identity is elementary; its use with estimated softmax and this rounding follow
    Dimitrov, Balunovic, Konstantinov, Vechev 2022, arXiv 2206.12395.

    Args:
        bias_gradient: gradient of the MEAN loss with respect to the head's bias (C,).
        mean_softmax: mean predicted probabilities (C,).
        batch_size: B.

    Returns:
        Integer tensor (C,).

    Raises:
        ValueError: if shapes differ, a value is not finite or `batch_size` is not positive.

    >>> label_counts(torch.tensor([-0.5, 0.25, 0.25]), torch.tensor([0.5, 0.25, 0.25]), 4).tolist()
    [4, 0, 0]
    """
    _check(bias_gradient, 1, "bias gradient (C,)")
    _check(mean_softmax, 1, "mean softmax (C,)")
    if bias_gradient.shape != mean_softmax.shape:
        raise ValueError(
            f"the bias gradient and the mean softmax need one entry per class each, got "
            f"{tuple(bias_gradient.shape)} and {tuple(mean_softmax.shape)}: use the same head"
        )
    if batch_size < 1:
        raise ValueError(f"a batch size must be positive, got {batch_size}: give the client's")
    raw = batch_size * (mean_softmax.to(bias_gradient) - bias_gradient).to(torch.float64)
    shares = raw.clamp_min(0)
    total = float(shares.sum())
    # Where nothing is positive the gradient says nothing: all classes share equally.
    shares = shares * (batch_size / total) if total > 0 else torch.full_like(raw, batch_size / raw.numel())
    counts = torch.floor(shares + 1e-9).to(torch.int64)
    missing = batch_size - int(counts.sum())
    if missing > 0:
        order = torch.argsort(shares - counts, descending=True, stable=True)
        counts[order[:missing]] += 1
    return counts


def _check(value: Tensor, dimensions: int, what: str) -> None:
    if value.dim() != dimensions or value.numel() == 0:
        raise ValueError(
            f"a {what} has {dimensions} dimension(s), got shape {tuple(value.shape)}: reshape it"
        )
    if not math.isfinite(float(value.abs().sum())):
        raise ValueError(f"a {what} must be finite, got NaN or infinity: drop this update")
