"""What the gradient of a classification head says about the labels of the batch it came from.

Exact: `idlg_label` for one example, and `label_counts` for a batch if the client's mean softmax is known.
Estimates: `label_counts` with `estimate_mean_softmax`, `llg_labels`, and `yin_labels` for distinct labels.
"""

import math

import torch
from torch import Tensor, nn

from fedaudit.types import Loss


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


def uniform_inputs(
    count: int, input_shape: tuple[int, ...], value_range: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Dummy inputs (count, *input_shape), each value uniform in the range: for an observer without data.

    Raises:
        ValueError: if `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"a number of dummy inputs must be positive, got {count}: use e.g. 64")
    low, high = value_range
    return low + (high - low) * torch.rand(count, *input_shape, generator=generator)


def estimate_mean_softmax(model: nn.Module, x: Tensor, chunk: int = 256) -> Tensor:
    """Mean predicted probabilities (C,) of inputs (n, *input_shape) at the model's weights.

    Stands in for the client's in `label_counts`: inputs of the client's kind (reference data) serve best,
    `uniform_inputs` are what an observer without data has. At fresh weights any inputs do; at trained
    weights the estimate misses by as much as the client's classes differ from those of `x`. Training mode is
    kept and running statistics are not, so normalisation layers in training mode mix the inputs of a chunk.

    Raises:
        ValueError: if there is no input.

    >>> estimate_mean_softmax(nn.Identity(), torch.zeros(3, 2)).tolist()
    [0.5, 0.5]
    """
    if not len(x):
        raise ValueError("a mean softmax needs inputs, got none: pass reference or dummy inputs")
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad():
            total = torch.stack([model(part).softmax(dim=-1).sum(dim=0) for part in torch.split(x, chunk)])
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])
    return total.sum(dim=0) / len(x)


def llg_labels(
    weight_gradient: Tensor, batch_size: int, impact: float | None = None, offset: Tensor | None = None
) -> Tensor:
    """Labels (B,) of a batch by the Label Leakage from Gradients rule, ascending.

    With g_c = sum_d dL/dW_cd of the head, the impact m < 0 is what one example adds to its class, by default
    (1 + 1/C) / B times the sum of the negative g_c. First every class with a negative g_c is taken once and
    m is subtracted from its g_c; then the offset; then the class with the smallest g_c is taken, and m
    subtracted from ITS g_c, until there are B labels. (A widely used implementation subtracts in this last
    stage from whatever class the first stage ended with, so that one class can take all that are left; this
    one does not.)

    An estimate, good at fresh weights if features are not negative; NOT exact for any B > 1.

    Source: Wainakh, Ventola, Müßig, Keim, Garcia Cordero, Zimmer, Grube, Kersting, Mühlhäuser 2022,
    PoPETs 2022(2), arXiv 2105.09369.

    Args:
        weight_gradient: gradient of the MEAN loss with respect to the head's weight (C, D).
        batch_size: B.
        impact: m, negative; see `llg_parameters`.
        offset: what g_c is without any example of class c (C,); 0 by default.

    Raises:
        ValueError: if a shape is wrong, a value not finite, or the impact not negative.

    >>> llg_labels(torch.tensor([[-0.9, -0.6], [0.3, 0.2], [0.3, 0.2]]), 2).tolist()
    [0, 0]
    """
    _check(weight_gradient, 2, "weight gradient (C, D)")
    if batch_size < 1:
        raise ValueError(f"a batch size must be positive, got {batch_size}: give the client's")
    g = weight_gradient.to(torch.float64).sum(dim=1)
    negative = g < 0
    if impact is None:
        impact = float(g[negative].sum()) * (1 + 1 / len(g)) / batch_size
        if impact == 0:  # no class stands out: take classes in the order of g
            impact = -float(g.abs().max()) or -1.0
    if not impact < 0:
        raise ValueError(
            f"the impact of an example on its class is negative, got {impact}: see llg_parameters"
        )
    first = negative.nonzero()[:, 0]
    labels = first[g[first].argsort()][:batch_size].tolist()
    g[labels] -= impact
    if offset is not None:
        _check(offset, 1, "offset (C,)")
        g = g - offset.to(g)
    while len(labels) < batch_size:
        label = int(g.argmin())
        labels.append(label)
        g[label] -= impact
    return torch.tensor(sorted(labels))


def llg_parameters(
    model: nn.Module, loss: Loss, x: Tensor, num_classes: int, batch_size: int
) -> tuple[float, Tensor]:
    """Impact and offset (C,) for `llg_labels`, from the observer's own or dummy inputs at the weights.

    For each class c, the gradient of `x` (n, *input_shape) labelled c throughout: the mean over c of g_c is B
    times the impact of an example, up to (1 + 1/C), and the mean of g_c under all other labels is the offset.

    Source: as `llg_labels`, the variant with the model and auxiliary data.

    Args:
        model: at the broadcast weights; its last parameter with two dimensions is the head.
        loss: SUM-reduced.
        x: inputs.
        num_classes: C.
        batch_size: B of the client.

    Raises:
        ValueError: if the model has no head of C rows.
    """
    heads = [p for p in model.parameters() if p.dim() == 2]
    if not heads or len(heads[-1]) != num_classes:
        shape = tuple(heads[-1].shape) if heads else None
        raise ValueError(f"the last weight matrix must be a head of {num_classes} rows, got {shape}: no head")
    outputs = model(x)
    rows = []
    for label in range(num_classes):
        total = loss(outputs, torch.full((len(x),), label, device=x.device)) / len(x)
        rows.append(torch.autograd.grad(total, heads[-1], retain_graph=True)[0].sum(dim=1))
    table = torch.stack(rows).detach().to(torch.float64)  # (label, class)
    own = table.diagonal()
    offset = (table.sum(dim=0) - own) / max(num_classes - 1, 1)
    return float(own.mean()) * (1 + 1 / num_classes) / batch_size, offset


def yin_labels(weight_gradient: Tensor, batch_size: int) -> Tensor:
    """Labels (B,) of a batch whose labels all differ: the classes with the smallest row minimum, ascending.

    Exact for distinct labels as long as each present class has an entry below all those of absent ones. For
    features that are not negative the rows of absent classes hold sum_n p_nc h_n >= 0, and a row of a
    present class goes below zero unless the other examples' p_c h cover its own (1 - p_c) h in every feature.
    NOT a rule for repeated labels, of which it returns each once and fills up with wrong classes.

    Source: Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov 2021, arXiv 2104.07586.

    Args:
        weight_gradient: gradient of the head's weight (C, D).
        batch_size: B, at most C.

    Raises:
        ValueError: if a shape is wrong, a value not finite, or B is not from 1 to C.

    >>> yin_labels(torch.tensor([[0.2, 0.1], [-0.4, 0.3], [0.1, -0.2]]), 2).tolist()
    [1, 2]
    """
    _check(weight_gradient, 2, "weight gradient (C, D)")
    if not 1 <= batch_size <= len(weight_gradient):
        raise ValueError(
            f"distinct labels need a batch from 1 to C = {len(weight_gradient)}, got {batch_size}: use "
            f"label_counts"
        )
    return weight_gradient.amin(dim=1).argsort(stable=True)[:batch_size].sort().values


def _check(value: Tensor, dimensions: int, what: str) -> None:
    if value.dim() != dimensions or value.numel() == 0:
        raise ValueError(
            f"a {what} has {dimensions} dimension(s), got shape {tuple(value.shape)}: reshape it"
        )
    if not math.isfinite(float(value.abs().sum())):
        raise ValueError(f"a {what} must be finite, got NaN or infinity: drop this update")
