"""Labelled examples in memory: how they are named, loaded once, and split between server and clients."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedaudit.errors import DataError


@dataclass(frozen=True, eq=False)
class Dataset:
    """n labelled examples. Nobody writes into them: every client of a simulation shares them.

    Attributes:
        name: the registered name it was loaded under.
        x: examples (n, *input_shape), float32 within `value_range`.
        y: labels (n,), int64 from 0 to C - 1.
        num_classes: C.
        value_range: smallest and largest value an input can take.
        class_names: a name per class, or empty.
        test: the indices (n_test,) of the set's own test examples; None if it has no such split.
    """

    name: str
    x: Tensor
    y: Tensor
    num_classes: int
    value_range: tuple[float, float] = (0.0, 1.0)
    class_names: tuple[str, ...] = ()
    test: Tensor | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise DataError(f"dataset {self.name!r}: {problem}")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.x.shape[1:])

    def subset(self, indices: Tensor) -> "Dataset":
        """The examples at `indices` (m,), in that order; a test split of its own is dropped."""
        return replace(self, x=self.x[indices], y=self.y[indices], test=None)

    def _problem(self) -> str:
        x, y, (low, high) = self.x, self.y, self.value_range
        if x.dtype != torch.float32 or y.dtype != torch.int64:
            return f"x must be float32 and y int64, got {x.dtype} and {y.dtype}: convert them"
        if x.ndim < 2 or y.ndim != 1 or len(x) != len(y):
            shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
            return f"x must be (n, *shape) and y (n,), got {shapes}: reshape them"
        if len(y) == 0:
            return "there must be at least one example, got none: check the source"
        if not torch.isfinite(x).all():
            return f"x must be finite, got {int((~torch.isfinite(x)).sum())} other values: clean them"
        if x.min() < low or x.max() > high:
            found = f"[{float(x.min()):g}, {float(x.max()):g}]"
            return f"x must lie in [{low:g}, {high:g}], got values in {found}: rescale it"
        if y.min() < 0 or y.max() >= self.num_classes:
            found = f"{int(y.min())} to {int(y.max())}"
            return f"labels must be 0 to {self.num_classes - 1}, got {found}: renumber them"
        if self.class_names and len(self.class_names) != self.num_classes:
            return f"each of {self.num_classes} classes needs a name, got {len(self.class_names)} names"
        return ""
