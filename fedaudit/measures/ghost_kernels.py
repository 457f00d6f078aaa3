"""Inner products of per-example gradients, without holding the per-example gradients.

The gradient of a weight in a linear map is, for example a, G_a = sum_t d_at x_at^T: inputs x times gradients
d of the output, summed over the T places (tokens, pixels, repeated uses) where the map is applied. Then

    <G_a, G_b> = sum_ts (x_at . x_bs) (d_at . d_bs)

needs x and d only. A convolution is a linear map of patches, an embedding one of one-hot vectors.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedaudit.measures.watched_calls import Call, Loss, find_calls, per_example, random_state_kept, spans

BLOCK = 2**23  # numbers in one temporary: 64 MB in float64


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
    their present values, in the model's present mode; nothing is averaged over B. Weights used by linear, 2-d
    convolution and embedding calls go through their ghost kernel or, where shapes make that cheaper, through
    per-example gradients of that weight alone, block by block. Every other parameter (norm layers, bare
    parameters, a weight that is also used in another way) takes the exact slower path of `torch.func`, which
    holds (B, size of that parameter). The model is left as it was, and so are the global generators.

    Ghost norms: Li et al. 2022, arXiv 2110.05679; batch-space gradient uniqueness: Abdelghafar et al. 2026,
    arXiv 2510.10902v2. Differs from [2510.10902]: its code multiplies the Gram matrices of flattened
    sequences, which is not the inner product for T > 1; here it is the double sum over t and s.

    Args:
        model: any module that `torch.func.vmap` can run; dropout in training mode draws one mask per example.
        loss: sum-reduced loss (outputs, labels) -> scalar.
        x: inputs (B, ...).
        y: labels (B, ...).
        parameters: names of the trainable parameters to include; None is all of them. Frozen never count.
        chunk: examples per forward and backward pass, and at most that many in a block of the ghost kernel;
            None is all. What stays for all B are the inputs and output gradients of the watched calls and the
            gradients of the parameters on the slower path.

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
    trainable = _trainable(model, x, y, parameters, chunk)
    with random_state_kept(x):
        calls = find_calls(model, loss, x, y, trainable)
        uses = _ghost_uses(calls)
        taps = {i: calls[i] for i in sorted({i for used in uses.values() for i in used})}
        direct = [name for name in trainable if name not in uses]
        found = per_example(model, loss, x, y, list(trainable), taps, direct, chunk)
    gram = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    for name, used in uses.items():
        maps = [_LinearMap(calls[i], found.inputs[i], found.signals[i]) for i in used]
        if calls[used[0]].weight == name:
            _add_weight(gram, maps, chunk)
        else:  # the gradient of a bias is the sum of the signals
            _add_outer(gram, torch.stack([m.signals(0, len(x)).double().sum(3) for m in maps]).sum(0))
    for gradients in found.direct.values():
        _add_outer(gram, gradients)
    return (gram + gram.T) / 2


def example_gradients(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    *,
    chunk: int | None = None,
    clip_norm: float | None = None,
) -> Tensor:
    """The per-example gradients of a sum-reduced loss, materialised: (B, P).

    Columns follow `model.named_parameters()` without the frozen ones. This costs B times the memory of the
    model: use `example_gram` where inner products are enough.

    Args:
        model: any module that `torch.func.vmap` can run.
        loss: sum-reduced loss (outputs, labels) -> scalar.
        x: inputs (B, ...).
        y: labels (B, ...).
        chunk: examples per forward and backward pass; None is all.
        clip_norm: a gradient longer than this is scaled down to it; None leaves all as they are.

    Returns:
        (B, P) in the dtype of the parameters.

    Raises:
        ValueError: as `example_gram`, and if clip_norm is not positive.
    """
    trainable = list(_trainable(model, x, y, None, chunk))
    with random_state_kept(x):
        found = per_example(model, loss, x, y, trainable, {}, trainable, chunk)
    rows = torch.cat([found.direct[name].flatten(1) for name in trainable], dim=1)
    if clip_norm is None:
        return rows
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


def _trainable(
    model: nn.Module, x: Tensor, y: Tensor, names: Collection[str] | None, chunk: int | None
) -> dict[str, nn.Parameter]:
    """The parameters in question, once the request is known to make sense."""
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(
            f"x and y hold the same examples, at least one, got {len(x)} and {len(y)}: match them"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk holds at least one example, got chunk={chunk}: give 1 or more, or None")
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


def _ghost_uses(calls: Sequence[Call]) -> dict[str, list[int]]:
    """The calls that use each parameter, for parameters all of whose uses are of one kind."""
    uses: dict[str, list[int]] = {}
    kinds: dict[str, set[tuple[object, ...]]] = {}
    for index, call in enumerate(calls):
        for role, name in (("weight", call.weight), ("bias", call.bias)):
            if name is not None:
                uses.setdefault(name, []).append(index)
                kind = (role, call.function, call.options.get("groups"), call.options.get("padding_idx"))
                kinds.setdefault(name, set()).add(kind)
    return {name: used for name, used in uses.items() if len(kinds[name]) == 1}


@dataclass(frozen=True)
class _LinearMap:
    """A watched call as G linear maps at T places: features (b, G, d_in, T), signals (b, G, d_out, T)."""

    call: Call
    x: Tensor
    d: Tensor

    @property
    def is_embedding(self) -> bool:
        return self.call.function is F.embedding

    @property
    def groups(self) -> int:
        return int(self.call.options.get("groups", 1))

    @property
    def d_out(self) -> int:
        return self.call.kernel[1] if self.is_embedding else self.call.kernel[0] // self.groups

    @property
    def d_in(self) -> int:
        return self.call.kernel[0] if self.is_embedding else math.prod(self.call.kernel[1:])

    @property
    def places(self) -> int:
        return math.prod(self.call.shape) // (self.groups * self.d_out)

    def signals(self, start: int, stop: int) -> Tensor:
        d = self.d[start:stop]
        if self.call.function is not F.conv2d:
            return d.reshape(len(d), 1, -1, self.d_out).mT
        height, width = d.shape[-2:]
        return _frames_joined(d.reshape(len(d), -1, self.groups, self.d_out, height * width))

    def features(self, start: int, stop: int) -> Tensor:
        x = self.x[start:stop]
        if self.is_embedding:
            return x.reshape(len(x), 1, 1, -1)
        if self.call.function is not F.conv2d:
            return x.reshape(len(x), 1, -1, self.d_in).mT
        patches = _patches(x.flatten(0, -4), self.call.kernel[2:], self.call.options)
        return _frames_joined(patches.reshape(len(x), -1, self.groups, self.d_in, patches.shape[-1]))


def _frames_joined(t: Tensor) -> Tensor:
    """(b, frames, G, d, pixels) to (b, G, d, T) with T = frames * pixels; no copy for a single frame."""
    return t.squeeze(1) if t.shape[1] == 1 else t.permute(0, 2, 3, 1, 4).flatten(3)


def _patches(x: Tensor, size: Sequence[int], options: Mapping[str, Any]) -> Tensor:
    """What each output pixel of a convolution sees: (n, C, H, W) to (n, C * kh * kw, pixels)."""
    stride, dilation = _pair(options.get("stride", 1)), _pair(options.get("dilation", 1))
    padding = options.get("padding", 0)
    if padding == "same":  # of an odd total, the larger half goes to the right and the bottom
        total = [step * (extent - 1) for step, extent in zip(dilation, size, strict=True)]
        x = F.pad(x, [n for t in reversed(total) for n in (t // 2, t - t // 2)])
    outside = (0, 0) if isinstance(padding, str) else _pair(padding)
    return F.unfold(x, (size[0], size[1]), dilation, outside, stride)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _add_weight(gram: Tensor, maps: Sequence[_LinearMap], chunk: int | None) -> None:
    """Add one weight's share of the Gram matrix, by whichever form costs fewer multiplications."""
    first, places, B = maps[0], sum(m.places for m in maps), len(gram)
    ghost_cost = B * places**2 * (first.d_in + first.d_out)
    direct_cost = (B + places) * first.d_in * first.d_out
    fits = first.groups * places**2 <= BLOCK
    if first.is_embedding or (ghost_cost <= direct_cost and fits):
        _add_ghost(gram, maps, places, chunk)
    else:
        _add_materialised(gram, maps, places)


def _add_ghost(gram: Tensor, maps: Sequence[_LinearMap], places: int, chunk: int | None) -> None:
    """sum_ts (x_at . x_bs)(d_at . d_bs), for blocks of pairs of examples."""
    B, T, groups = len(gram), places, maps[0].groups
    size = max(1, min(B, chunk or B, math.isqrt(BLOCK // (groups * T**2))))
    for start, stop in spans(B, size):
        features, signals = _rows(_features(maps, start, stop)), _rows(_signals(maps, start, stop))
        for other, end in spans(stop, size):
            products = _feature_products(features, _rows(_features(maps, other, end)), maps[0])
            products *= signals @ _rows(_signals(maps, other, end)).mT
            block = products.reshape(groups, stop - start, T, end - other, T).sum((0, 2, 4))
            gram[start:stop, other:end] += block
            if other < start:
                gram[other:end, start:stop] += block.T


def _add_materialised(gram: Tensor, maps: Sequence[_LinearMap], places: int) -> None:
    """Inner products of this weight's per-example gradients, for blocks of its output rows.

    The gradients have the model's precision, as from a backward pass; their products are in float64.
    """
    B, first = len(gram), maps[0]
    rows = max(1, BLOCK // (B * first.groups * first.d_in))
    size = max(1, BLOCK // (first.groups * places * first.d_in))
    for low, high in spans(first.d_out, rows):
        gradients = [
            (_signals(maps, start, stop)[:, :, low:high] @ _features(maps, start, stop).mT).flatten(1)
            for start, stop in spans(B, size)
        ]
        _add_outer(gram, torch.cat(gradients))


def _add_outer(gram: Tensor, gradients: Tensor) -> None:
    """Add the inner products of the rows of (B, ...), in float64, for blocks of columns."""
    rows = gradients.flatten(1)
    for start, stop in spans(rows.shape[1], max(1, BLOCK // len(rows))):
        block = rows[:, start:stop].double()
        gram += block @ block.T


def _feature_products(a: Tensor, b: Tensor, kind: _LinearMap) -> Tensor:
    """Inner products of the features of two blocks: (G, aT, d_in) and (G, bT, d_in) to (G, aT, bT)."""
    if not kind.is_embedding:
        return a @ b.mT
    same = a == b.mT  # one-hot vectors
    padding = kind.call.options.get("padding_idx")
    if padding is not None:  # this row's gradient is zero by definition
        same &= a != int(padding) % kind.d_in
    return same.double()


def _rows(t: Tensor) -> Tensor:
    """(b, G, d, T) to (G, b * T, d) in float64."""
    return t.double().permute(1, 0, 3, 2).flatten(1, 2)


def _features(maps: Sequence[_LinearMap], start: int, stop: int) -> Tensor:
    return _joined([m.features(start, stop) for m in maps])


def _signals(maps: Sequence[_LinearMap], start: int, stop: int) -> Tensor:
    return _joined([m.signals(start, stop) for m in maps])


def _joined(uses: Sequence[Tensor]) -> Tensor:
    """The places of several uses of one weight, one after the other."""
    return uses[0] if len(uses) == 1 else torch.cat(list(uses), dim=3)
