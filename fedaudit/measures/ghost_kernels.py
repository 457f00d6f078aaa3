"""Inner products of per-example gradients, without holding the per-example gradients.

The gradient of a weight in a linear map is, for example a, G_a = sum_t d_at x_at^T: inputs x times gradients
d of the output, summed over the T places (tokens, pixels, repeated uses) where the map is applied. Then

    <G_a, G_b> = sum_ts (x_at . x_bs) (d_at . d_bs)

needs x and d only. A convolution is a linear map of patches, an embedding one of one-hot vectors.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from fedaudit.maths.example_clipping import clip_by_tensor
from fedaudit.measures.gram_shares import Use, add_outer, add_share, uses_by_parameter
from fedaudit.measures.watched_calls import (
    Gradients,
    Loss,
    Replay,
    find_calls,
    per_example,
    random_state_kept,
    spans,
)

KEPT = 2**27  # numbers held for all examples together: 512 MB of float32; above, chunks run again


def example_gram(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    *,
    parameters: Collection[str] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Inner products of the per-example gradients of a sum-reduced loss: K_ab = <g_a, g_b>.

    g_i is the gradient of loss(model(x[i : i + 1]), y[i : i + 1]) with respect to the trainable parameters at
    their present values, in the model's present mode; nothing is averaged over B. Weights used by linear,
    convolution and embedding calls go through their ghost kernel or, where shapes make that cheaper, through
    per-example gradients of that weight alone, block by block; scales and shifts of norm layers are summed
    from inputs and output gradients. Every other parameter (attention's projections, recurrent and transposed
    layers, bare parameters, a weight that is also used in another way) takes the exact slower path of
    `torch.func`, which holds (B, size of that parameter). A model that `torch.func.vmap` cannot run, as one
    with fused recurrent layers, runs example by example: exact, B times the overhead, noted in the log. The
    model is left as it was, and so are the global generators.

    Ghost norms: Li et al. 2022, arXiv 2110.05679; batch-space gradient uniqueness: Abdelghafar et al. 2026,
    arXiv 2510.10902v2. Differs from [2510.10902]: its code multiplies the Gram matrices of flattened
    sequences, which is not the inner product for T > 1; here it is the double sum over t and s.

    Args:
        model: any module; dropout in training mode draws one mask per example.
        loss: sum-reduced loss (outputs, labels) -> scalar.
        x: inputs (B, ...).
        y: labels (B, ...).
        parameters: names of the trainable parameters to include; None is all of them. Frozen never count.
        chunk: examples per forward and backward pass, and at most that many in a block of the ghost kernel;
            None is all. Memory is that of two chunks, whatever B is: where inputs, output gradients and
            slower gradients of all B are too many to hold (KEPT numbers), every pair of chunks is run
            again, with the same random numbers, which multiplies the time of the passes by B / chunk / 2.

    Returns:
        K (B, B), float64, symmetric, in the loss's unit squared per parameter unit squared.

    Raises:
        ValueError: if per-example gradients are undefined (batch normalisation by batch statistics, an
            embedding scaled by frequency), if a named parameter is not trainable or none is, or if x and y
            differ in length.

    >>> line = nn.Linear(1, 1, bias=False)
    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.ones(2, 1)
    >>> example_gram(line, lambda outputs, labels: (outputs * labels).sum(), x, y).tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """
    _check_request(x, y, chunk)
    trainable = trainable_parameters(model, parameters)
    with random_state_kept(x):
        calls = find_calls(model, loss, x, y, trainable)
        uses = uses_by_parameter(calls)
        taps = {i: calls[i] for i in sorted({i for used in uses.values() for i in used})}
        direct = [name for name in trainable if name not in uses]
        run = Replay(
            lambda start, stop: per_example(
                model, loss, x[start:stop], y[start:stop], list(trainable), taps, direct
            ),
            x.device,
        )
        gram = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
        for examples, found in _blocks(run, list(spans(len(x), chunk))):
            part = torch.zeros(len(examples), len(examples), dtype=torch.float64, device=x.device)
            for name, used in uses.items():
                add_share(part, name, [Use(calls[i], found.inputs[i], found.signals[i]) for i in used], chunk)
            for gradients in found.direct.values():
                add_outer(part, gradients)
            gram[examples[:, None], examples] = part
    return (gram + gram.T) / 2


def _blocks(run: Replay, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Gradients]]:
    """Positions and results of examples such that every pair of examples is together in one of them.

    All examples at once where that is little to hold, else every pair of chunks, run once more for each.
    """
    first = run(*ranges[0])
    if len(ranges) < 3 or first.numbers * len(ranges) <= KEPT:
        pieces = [first, *(run(*span) for span in ranges[1:])]
        yield torch.arange(ranges[-1][1]), Gradients.joined(pieces)
        return
    for i, span in enumerate(ranges):
        mine = run(*span) if i else first
        for other in ranges[:i]:
            examples = torch.cat([torch.arange(*other), torch.arange(*span)])
            yield examples, Gradients.joined([run(*other), mine])


def example_gradients(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    *,
    chunk: int | None = None,
    clip_norm: float | None = None,
    per_layer: bool = False,
) -> Tensor:
    """The per-example gradients of a sum-reduced loss, materialised: (B, P).

    Columns follow `model.named_parameters()` without the frozen ones. This costs B times the memory of the
    model: use `example_gram` where inner products are enough.

    Args:
        model: any module.
        loss: sum-reduced loss (outputs, labels) -> scalar.
        x: inputs (B, ...).
        y: labels (B, ...).
        chunk: examples per forward and backward pass; None is all.
        clip_norm: a gradient longer than this is scaled down to it; None leaves all as they are.
        per_layer: whether `clip_norm` is shared among the parameter tensors (`clip_by_tensor`).

    Returns:
        (B, P) in the dtype of the parameters.

    Raises:
        ValueError: as `example_gram`, and if clip_norm is not positive.
    """
    _check_request(x, y, chunk)
    trainable = list(trainable_parameters(model, None))
    with random_state_kept(x):
        found = [
            per_example(model, loss, x[start:stop], y[start:stop], trainable, {}, trainable).direct
            for start, stop in spans(len(x), chunk)
        ]
    rows = torch.cat([torch.cat([part[name].flatten(1) for name in trainable], dim=1) for part in found])
    if clip_norm is None:
        return rows
    if per_layer:
        return clip_by_tensor(rows, [found[0][name][0].numel() for name in trainable], clip_norm)
    squared = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
    return rows * _clip_factors(squared, clip_norm).to(rows.dtype)[:, None]


def clip_gram(gram: Tensor, clip_norm: float) -> Tensor:
    """The Gram matrix (B, B) of gradients scaled to norm at most C: K_ab s_a s_b with s = min(1, C / norm).

    Raises:
        ValueError: if clip_norm is not positive.

    >>> clip_gram(torch.tensor([[4.0, 1.0], [1.0, 0.25]]), 1.0).tolist()
    [[1.0, 0.5], [0.5, 0.25]]
    """
    factors = _clip_factors(gram.diagonal(), clip_norm)
    return gram * factors[:, None] * factors


def _clip_factors(squared_norms: Tensor, clip_norm: float) -> Tensor:
    if not clip_norm > 0:
        raise ValueError(
            f"a clipping norm is positive, got {clip_norm}: give None to leave gradients unclipped"
        )
    return (clip_norm / squared_norms.clamp(min=0).sqrt()).clamp(max=1)  # C / 0 = inf becomes 1


def trainable_parameters(model: nn.Module, names: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The parameters in question, by name.

    Raises:
        ValueError: if the model normalises by batch statistics, or a named parameter is not trainable, or
            none is.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise ValueError(
                "per-example gradients are undefined where batch statistics couple the examples, got layer "
                f"{name!r} ({type(module).__name__}): use GroupNorm, or eval() with running statistics"
            )
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("a gradient needs a trainable parameter, got none: leave at least one unfrozen")
    if names is None:
        return trainable
    unknown = sorted(set(names) - set(trainable))
    if unknown or not names:
        raise ValueError(
            f"parameters are chosen among the trainable ones, got {', '.join(unknown) or 'none'}: "
            f"choose from {', '.join(trainable)}"
        )
    return {name: p for name, p in trainable.items() if name in set(names)}


def _check_request(x: Tensor, y: Tensor, chunk: int | None) -> None:
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(
            f"x and y hold the same examples, at least one, got {len(x)} and {len(y)}: match them"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk holds at least one example, got chunk={chunk}: give 1 or more, or None")
