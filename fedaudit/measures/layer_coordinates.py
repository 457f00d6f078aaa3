"""Per-example gradients layer by layer in as few coordinates as they span, without loss.

n gradients in R^P span at most n directions. With their Gram matrix K = U diag(v) U^T, the rows of
U diag(v)^1/2 are their coordinates in an orthonormal basis of that span: sums of rows, inner products, norms,
principal directions and angles are those of the gradients themselves, and Gaussian noise N(0, s^2 I_P) seen
in the basis is N(0, s^2 I_r). So all that follows costs n, not P.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedaudit.maths.example_clipping import tensor_clip_norm
from fedaudit.measures.ghost_kernels import clip_gram, example_gradients, example_gram
from fedaudit.measures.layers import layers_of
from fedaudit.types import Loss

BUDGET = 2**25  # numbers in the per-example gradients held at a time: 128 MB
_BLOCK = 2**22  # numbers in one block of them in float64
_RESOLVED = 1e-13  # of the largest squared norm of a direction: below is what float32 gradients round away


@dataclass(frozen=True, eq=False)
class LayerCoordinates:
    """The gradients of n examples, each layer's in a basis of its own; on the CPU, for they are small.

    Attributes:
        whole: coordinates (n, r) of the gradient of all trainable parameters, float64.
        layers: coordinates (n, r) of each layer's part, by module name.
        sizes: number of parameters P of each layer, by module name.
    """

    whole: Tensor
    layers: Mapping[str, Tensor]
    sizes: Mapping[str, int]


def layer_coordinates(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    *,
    clip_norm: float | None = None,
    per_layer: bool = False,
    chunk: int = 64,
) -> LayerCoordinates:
    """Coordinates of per-example gradients of a SUM-reduced loss, whole and for each layer.

    Clipping scales an example's whole gradient, all layers alike, or, with `per_layer`, each parameter
    tensor by itself. Directions whose share of the squared norm
    is below what float32 gradients resolve (1e-13 of the largest) are left out.

    Args:
        model: at the weights and in the mode to differentiate in; it is left as it was.
        loss: SUM-reduced loss (outputs, labels) -> scalar.
        x: examples (n, *input_shape).
        y: labels (n,).
        clip_norm: largest norm of an example's whole gradient; None leaves all as they are.
        per_layer: whether it is shared among the parameter tensors (`tensor_clip_norm`).
        chunk: examples per forward and backward pass.

    Raises:
        ValueError: if per-example gradients are undefined (see `example_gram`) or not finite.

    >>> line, total = nn.Linear(2, 1), lambda outputs, labels: outputs.sum()
    >>> found = layer_coordinates(line, total, torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.zeros(2))
    >>> (found.whole @ found.whole.T).round(decimals=6).tolist()
    [[10.0, 1.0], [1.0, 17.0]]
    """
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(
            f"a clipping norm is positive, got {clip_norm}: give None to leave gradients unclipped"
        )
    if clip_norm is not None and per_layer:
        grams = _by_layer(clipped_tensor_grams(model, loss, x, y, clip_norm, chunk=chunk))
    else:
        grams = layer_grams(model, loss, x, y, chunk=chunk)
    whole = torch.stack(list(grams.values())).sum(0)
    if not bool(whole.isfinite().all()):
        raise ValueError("gradients must be finite, got NaN or infinity: check the weights and the loss")
    if clip_norm is not None and not per_layer:
        factors = (clip_norm / whole.diagonal().clamp(min=0).sqrt()).clamp(max=1)  # C / 0 = inf becomes 1
        scales = factors[:, None] * factors
        whole, grams = whole * scales, {layer: gram * scales for layer, gram in grams.items()}
    sizes = _sizes(model)
    return LayerCoordinates(
        spanning_coordinates(whole.cpu(), sum(sizes.values())),
        {layer: spanning_coordinates(gram.cpu(), sizes[layer]) for layer, gram in grams.items()},
        sizes,
    )


def spanning_coordinates(gram: Tensor, dimensions: int) -> Tensor:
    """Coordinates (n, r) of vectors with this Gram matrix (n, n) in an orthonormal basis of their span.

    r is at most `dimensions`, the length of the vectors; 0 if all are zero. Columns go from the direction
    with the largest share of the squared norm to that with the smallest.

    >>> spanning_coordinates(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), 9).abs().tolist()
    [[2.0], [0.0]]
    """
    values, vectors = torch.linalg.eigh(gram.double())
    keep = values > _RESOLVED * values[-1:].clamp_min(0)
    keep[: max(0, len(values) - dimensions)] = False
    coordinates: Tensor = (vectors[:, keep] * values[keep].sqrt()).flip(1)
    return coordinates


def layer_grams(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, *, chunk: int = 64, budget: int = BUDGET
) -> dict[str, Tensor]:
    """Inner products (n, n) of per-example gradients for each layer alone, float64, by module name.

    Gradients are held for as many layers at a time as fit in `budget` numbers: one pass over the examples
    for a small model, several for a large one; a layer that does not fit alone goes through `example_gram`.

    Args:
        model: at the weights and in the mode to differentiate in; it is left as it was.
        loss: SUM-reduced loss (outputs, labels) -> scalar.
        x: examples (n, *input_shape).
        y: labels (n,).
        chunk: examples per forward and backward pass.
        budget: numbers in the per-example gradients held at a time.

    Raises:
        ValueError: as `example_gram`.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return _grams(model, loss, x, y, layers_of(names), chunk, budget)


def clipped_tensor_grams(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    clip_norm: float,
    *,
    chunk: int | None = 64,
    budget: int = BUDGET,
) -> dict[str, Tensor]:
    """The same (n, n) for each parameter tensor alone, clipped to C / sqrt(L), by parameter name.

    Their sum is the Gram matrix of gradients under per-layer clipping.

    Args:
        model: at the weights and in the mode to differentiate in; it is left as it was.
        loss: SUM-reduced loss (outputs, labels) -> scalar.
        x: examples (n, *input_shape).
        y: labels (n,).
        clip_norm: C, over all L tensors together.
        chunk: examples per forward and backward pass; None is all.
        budget: numbers in the per-example gradients held at a time.

    Raises:
        ValueError: as `example_gram`, and if clip_norm is not positive.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    largest = tensor_clip_norm(clip_norm, len(names))
    grams = _grams(model, loss, x, y, {name: [name] for name in names}, chunk, budget)
    return {name: clip_gram(gram, largest) for name, gram in grams.items()}


def _by_layer(grams: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors' Gram matrices added up for each layer."""
    return {
        layer: torch.stack([grams[name] for name in names]).sum(0)
        for layer, names in layers_of(grams).items()
    }


def _grams(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    parts: Mapping[str, list[str]],
    chunk: int | None,
    budget: int,
) -> dict[str, Tensor]:
    """Inner products (n, n) for each part, a set of parameters, by the part's name."""
    owner = {name: part for part, names in parts.items() for name in names}
    numbers = {name: p.numel() for name, p in model.named_parameters() if name in owner}
    sizes = {part: sum(numbers[name] for name in names) for part, names in parts.items()}
    grams: dict[str, Tensor] = {}
    for group in _groups({part: len(x) * size for part, size in sizes.items()}, budget):
        if len(x) * sizes[group[0]] > budget:
            grams[group[0]] = example_gram(model, loss, x, y, parameters=parts[group[0]], chunk=chunk)
            continue
        with _only(model, [name for part in group for name in parts[part]]) as order:
            rows = example_gradients(model, loss, x, y, chunk=chunk)
        start = 0
        for name, size in order:
            layer = owner[name]
            gram = _outer(rows[:, start : start + size])
            grams[layer] = grams[layer] + gram if layer in grams else gram
            start += size
    return {part: grams[part] for part in parts}


def _sizes(model: nn.Module) -> dict[str, int]:
    """Number of trainable parameters of each layer."""
    counts = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return {layer: sum(counts[name] for name in names) for layer, names in layers_of(counts).items()}


def _groups(costs: Mapping[str, int], budget: int) -> Iterator[list[str]]:
    """Consecutive layers whose costs add up to at most the budget; one that exceeds it stands alone."""
    group: list[str] = []
    spent = 0
    for layer, cost in costs.items():
        if group and spent + cost > budget:
            yield group
            group, spent = [], 0
        group.append(layer)
        spent += cost
    if group:
        yield group


@contextmanager
def _only(model: nn.Module, names: Sequence[str]) -> Iterator[list[tuple[str, int]]]:
    """Freeze all other parameters for a while; names and sizes of these in the model's order."""
    free = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = [p for name, p in free.items() if name not in names]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield [(name, p.numel()) for name, p in free.items() if name in names]
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _outer(rows: Tensor) -> Tensor:
    """Inner products (n, n) of rows (n, P) in float64, block of columns by block of columns."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for block in torch.split(rows, max(1, _BLOCK // len(rows)), dim=1):
        wide = block.double()
        gram.addmm_(wide, wide.T)
    return gram
