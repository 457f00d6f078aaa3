"""What one parameter adds to a Gram matrix, from the inputs and output gradients of the calls that use it.

A linear map is applied at T places (tokens, pixels, repeated uses) of an example with features x_t and
signals d_t, the gradients of its outputs. The example's gradient is sum_t d_t x_t^T, so two examples have the
inner product sum_ts (x_at . x_bs)(d_at . d_bs): the ghost form, which forms no gradient. The materialised
form multiplies the gradients, block by block. A bias's gradient is sum_t d_t, a norm's scale has sum_t d_t *
x_t; both are no larger than the bias or the scale and are formed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedaudit.measures.watched_calls import CONVOLUTIONS, NORMS, Call, joined, spans

BLOCK = 2**23  # numbers in one temporary: 64 MB in float64
SMALL = 2**20  # numbers in a temporary that is used at once: small enough to stay in a cache
_SINGLE = 1024  # columns over which float32 products are summed in float32
_TRIANGLE = 32  # rows of a Gram matrix at a time


@dataclass(frozen=True)
class Use:
    """A watched call of B examples: as a linear map, G groups of features (b, G, d_in, T) and signals.

    Attributes:
        call: what was called, for one example.
        x: its inputs (B, ...); of a norm, the normalised inputs.
        d: the gradients of its output (B, ...).
    """

    call: Call
    x: Tensor
    d: Tensor

    @property
    def is_embedding(self) -> bool:
        """Whether features are indices of one-hot vectors."""
        return self.call.function is F.embedding

    @property
    def groups(self) -> int:
        """G, the number of maps side by side."""
        return int(self.call.options.get("groups", 1))

    @property
    def d_out(self) -> int:
        """Outputs of one group."""
        return self.call.kernel[1] if self.is_embedding else self.call.kernel[0] // self.groups

    @property
    def d_in(self) -> int:
        """Inputs of one group."""
        return self.call.kernel[0] if self.is_embedding else math.prod(self.call.kernel[1:])

    @property
    def places(self) -> int:
        """T, how often one example uses the map."""
        return math.prod(self.call.shape) // (self.groups * self.d_out)

    def signals(self, start: int, stop: int) -> Tensor:
        """(b, G, d_out, T) of the examples in a range."""
        d = self.d[start:stop]
        space = CONVOLUTIONS.get(self.call.function)
        if space is None:
            return d.reshape(len(d), 1, -1, self.d_out).mT
        return _frames_joined(d.reshape(len(d), -1, self.groups, self.d_out, math.prod(d.shape[-space:])))

    def features(self, start: int, stop: int) -> Tensor:
        """(b, G, d_in, T) of the examples in a range; of an embedding (b, 1, 1, T) indices."""
        x = self.x[start:stop]
        space = CONVOLUTIONS.get(self.call.function)
        if self.is_embedding:
            return x.reshape(len(x), 1, 1, -1)
        if space is None:
            return x.reshape(len(x), 1, -1, self.d_in).mT
        patches = _patches(x.flatten(0, -space - 2), self.call)
        return _frames_joined(patches.reshape(len(x), -1, *patches.shape[1:]))

    def sums(self, weight: bool, start: int, stop: int) -> Tensor:
        """Gradients (b, ...) of a bias or, with `weight`, of a norm's scale, of the examples in a range."""
        if self.call.function not in NORMS:
            return self.signals(start, stop).sum(3)
        d = self.d[start:stop]
        d = d * self.x[start:stop] if weight else d
        if self.call.function is F.layer_norm:
            return d.reshape(len(d), -1, self.call.kernel.numel()).sum(1)
        return d.reshape(*d.shape[:3], -1).sum(3).sum(1)  # (b, examples of the call, C, ...)


def uses_by_parameter(calls: Sequence[Call]) -> dict[str, list[int]]:
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


def add_share(gram: Tensor, name: str, uses: Sequence[Use], chunk: int | None) -> None:
    """Add the inner products (B, B) of the gradients of the parameter of this name, all uses of one kind."""
    first, B = uses[0].call, len(gram)
    if first.weight == name and first.function not in NORMS:
        _add_weight(gram, uses, chunk)
        return
    size = max(1, SMALL // sum(math.prod(use.call.shape) for use in uses))
    is_scale = first.weight == name
    sums = [
        torch.stack([use.sums(is_scale, start, stop) for use in uses]).sum(0)
        for start, stop in spans(B, size)
    ]
    add_outer(gram, joined(sums))


def add_outer(gram: Tensor, gradients: Tensor) -> None:
    """Add the inner products of the rows of (B, ...) for blocks of columns.

    Products of float32 gradients are summed in float32 over at most 1024 columns, and these sums in float64:
    the error is a few units of float32's rounding of |g_a| |g_b|, the size of the gradients' own. Products in
    float64 throughout would cost as much as the training step of a small network. A ridge far below 1e-6 of
    the gradients' mean square needs a model in float64.
    """
    rows = gradients.flatten(1)
    B = len(rows)
    single = rows.dtype == torch.float32
    for start, stop in spans(rows.shape[1], _SINGLE if single else max(1, BLOCK // B)):
        block = rows[:, start:stop] if single else rows[:, start:stop].double()
        for low, high in spans(B, B if single else _TRIANGLE):  # nothing above the diagonal blocks
            product = (block[low:high] @ block[:high].T).double()
            gram[low:high, :high] += product
            gram[:low, low:high] += product[:, :low].T


def _add_weight(gram: Tensor, uses: Sequence[Use], chunk: int | None) -> None:
    """Add one weight's share of the Gram matrix, by whichever form costs fewer multiplications."""
    first, places, B = uses[0], sum(use.places for use in uses), len(gram)
    ghost_cost = B * places**2 * (first.d_in + first.d_out)
    direct_cost = (B + places) * first.d_in * first.d_out
    fits = first.groups * places**2 <= BLOCK
    if first.is_embedding or (ghost_cost <= direct_cost and fits):
        _add_ghost(gram, uses, places, chunk)
    else:
        _add_materialised(gram, uses, places)


def _add_ghost(gram: Tensor, uses: Sequence[Use], places: int, chunk: int | None) -> None:
    """sum_ts (x_at . x_bs)(d_at . d_bs), for blocks of pairs of examples on and below the diagonal."""
    B, T, groups = len(gram), places, uses[0].groups
    quarter = max(_TRIANGLE // T, math.ceil(B / 4))
    size = max(1, min(chunk or B, math.isqrt(BLOCK // (groups * T**2)), quarter))
    widths = uses[0].d_out + (1 if uses[0].is_embedding else uses[0].d_in)

    def rows(start: int, stop: int) -> tuple[Tensor, Tensor]:
        return _rows(_features(uses, start, stop)), _rows(_signals(uses, start, stop))

    fits = groups * B * T * max(widths, size * T) <= BLOCK
    whole = rows(0, B) if fits else None  # of all examples, once; else of each block of pairs
    for start, stop in spans(B, size):
        features, signals = _between(whole, start * T, stop * T) if whole else rows(start, stop)
        for other, end in spans(stop, stop if whole else size):
            others, against = _between(whole, other * T, end * T) if whole else rows(other, end)
            products = _feature_products(features, others, uses[0])
            products *= signals @ against.mT
            block = products.reshape(groups, stop - start, T, end - other, T).sum((0, 2, 4))
            gram[start:stop, other:end] += block
            above = min(end, start)  # the rest of the block is in the rows already
            gram[other:above, start:stop] += block[:, : max(0, above - other)].T


def _between(rows: tuple[Tensor, Tensor], start: int, stop: int) -> tuple[Tensor, Tensor]:
    return rows[0][:, start:stop], rows[1][:, start:stop]


def _add_materialised(gram: Tensor, uses: Sequence[Use], places: int) -> None:
    """Inner products of this weight's per-example gradients, for blocks of its output rows.

    The gradients have the model's precision, as from a backward pass.
    """
    B, first = len(gram), uses[0]
    rows = min(first.d_out, max(1, BLOCK // (B * first.groups * first.d_in)))
    size = max(1, SMALL // (first.groups * places * first.d_in))
    for low, high in spans(first.d_out, rows):
        parts = [
            _signals(uses, start, stop)[:, :, low:high] @ _features(uses, start, stop).mT
            for start, stop in spans(B, size)
        ]
        add_outer(gram, joined(parts))


def _feature_products(a: Tensor, b: Tensor, kind: Use) -> Tensor:
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


def _features(uses: Sequence[Use], start: int, stop: int) -> Tensor:
    """The places of several uses of one weight, one after the other."""
    return joined([use.features(start, stop) for use in uses], dim=3)


def _signals(uses: Sequence[Use], start: int, stop: int) -> Tensor:
    return joined([use.signals(start, stop) for use in uses], dim=3)


def _frames_joined(t: Tensor) -> Tensor:
    """(b, frames, G, d, pixels) to (b, G, d, T) with T = frames * pixels; no copy for a single frame."""
    return t.squeeze(1) if t.shape[1] == 1 else t.permute(0, 2, 3, 1, 4).flatten(3)


def _patches(x: Tensor, call: Call) -> Tensor:
    """What each output pixel of a convolution sees: (n, C, *space) to (n, G, d_in, pixels).

    The order within d_in is the weight's or, where there are enough channels for a faster copy, has the
    channels last: it depends on the weight alone, and inner products do not depend on it.
    """
    size, options, dims = call.kernel[2:], call.options, len(call.kernel) - 2
    groups, channels = int(options.get("groups", 1)), call.kernel[1]
    stride = _per_dimension(options.get("stride", 1), dims)
    dilation = _per_dimension(options.get("dilation", 1), dims)
    padding = options.get("padding", 0)
    if padding == "same":  # of an odd total, the larger half goes to the right and the bottom
        total = [step * (extent - 1) for step, extent in zip(dilation, size, strict=True)]
        x = F.pad(x, [n for t in reversed(total) for n in (t // 2, t - t // 2)])
    elif not isinstance(padding, str):
        x = F.pad(x, [n for each in reversed(_per_dimension(padding, dims)) for n in (each, each)])
    pixels = [
        (length - step * (extent - 1) - 1) // hop + 1
        for length, step, extent, hop in zip(x.shape[2:], dilation, size, stride, strict=True)
    ]
    n, last = len(x), channels >= 4
    x = x.reshape(len(x), groups, channels, *x.shape[2:])
    x = (x.movedim(2, -1) if last else x).contiguous()
    along = x.stride()[2:-1] if last else x.stride()[3:]
    windows = [s * step for s, step in zip(along, dilation, strict=True)]
    places = [s * hop for s, hop in zip(along, stride, strict=True)]
    if last:  # (n, G, *pixels, *size, C)
        shape, strides = (*pixels, *size, channels), (*places, *windows, 1)
        patches = x.as_strided((n, groups, *shape), (*x.stride()[:2], *strides))
        return patches.reshape(n, groups, math.prod(pixels), -1).mT
    shape, strides = (channels, *size, *pixels), (x.stride(2), *windows, *places)
    patches = x.as_strided((n, groups, *shape), (*x.stride()[:2], *strides))
    return patches.reshape(n, groups, -1, math.prod(pixels))


def _per_dimension(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) if len(value) == dims else (value[0],) * dims
