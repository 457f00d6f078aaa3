"""L-BFGS on several independent problems whose functions are evaluated together.

Every problem has a history, a step length and a line search of its own. A problem is a coroutine that asks
for the value and the slope at one point; a round answers all that are still running in one call, which may be
vectorised. What a problem does therefore depends neither on how many others run nor on which of them end.
"""

import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedaudit.progress import heartbeat

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes points (K, D) and which starts they belong to (K,), returns values (K,) and slopes (K, D)."""
_Asking = Generator[Tensor, tuple[float, Tensor], None]

_DECREASE, _CURVATURE = 1e-4, 0.9  # the strong Wolfe conditions
_TRIALS = 25  # evaluations of one line search
_LOOK = 50  # iterations between two looks at the progress
_PATIENCE = 2  # looks over which the objective must fall by at least _PROGRESS
_PROGRESS = 0.01


@dataclass(frozen=True)
class Quasi:
    """How L-BFGS runs.

    Attributes:
        iterations: most iterations of each problem.
        history: pairs of steps and slope differences it remembers.
        tolerance: value at which a problem has converged and ends.

    Raises:
        ValueError: if iterations or history are not positive.
    """

    iterations: int
    history: int = 100
    tolerance: float = -math.inf

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.history < 1:
            raise ValueError(
                f"iterations and history must be positive, got {self.iterations} and {self.history}: use "
                f"e.g. 400 and 100"
            )


@dataclass(frozen=True, eq=False)
class Minima:
    """Where the problems ended.

    Attributes:
        points: (R, D), the lowest of each problem.
        values: (R,), infinite where the start was not finite.
        iterations: of each problem (R,).
        survivors: how many ran after each reduction and at which evaluation it came, "8, 4@50, ...".
    """

    points: Tensor
    values: Tensor
    iterations: Tensor
    survivors: str


def minimise(
    evaluate: Evaluate,
    starts: Tensor,
    settings: Quasi,
    *,
    rungs: Mapping[int, int] | None = None,
    accept: float = -math.inf,
    deadline: float = math.inf,
) -> Minima:
    """The lowest points that L-BFGS finds from several starts.

    A problem ends at the tolerance, after its iterations, where no step lowers it, or once 100 iterations
    gain less than 1 %. A local minimum is NOT a global one.

    Source: Nocedal, Wright 2006, Numerical Optimization, algorithms 3.5, 3.6 and 7.5; the product with the
    inverse Hessian in compact form, equation 7.24 (Byrd, Nocedal, Schnabel 1994).

    Args:
        evaluate: values and slopes at several points.
        starts: (R, D).
        settings: of every problem.
        rungs: evaluation -> problems that go on from there: those with the lowest values; by then all that
            run had equally many evaluations.
        accept: all end once one has ended at or below this value.
        deadline: `time.monotonic()` after which to stop; the starts are always evaluated.

    >>> bowl = lambda x, _: ((x - 1).square().sum(dim=1), 2 * (x - 1))
    >>> minimise(bowl, torch.tensor([[3.0], [9.0]]), Quasi(9)).points.tolist()
    [[1.0], [1.0]]
    """
    paths = [_Path(start.detach().clone(), settings) for start in starts]
    alive, rounds, survivors = list(range(len(paths))), 0, str(len(paths))
    while alive and (not rounds or time.monotonic() < deadline):
        most = (rungs or {}).get(rounds, len(alive))
        if most < len(alive):
            alive = sorted(sorted(alive, key=lambda i: paths[i].value)[:most])
            survivors += f", {most}@{rounds}"
        values, slopes = evaluate(torch.stack([paths[i].wanted for i in alive]), torch.tensor(alive))
        numbers: list[float] = values.tolist()
        for row, i in enumerate(alive):
            paths[i].answer(numbers[row], slopes[row])
        rounds += 1
        furthest = max(paths[i].iterations for i in alive)
        heartbeat(furthest, settings.iterations, restarts=f"{len(alive)} of {len(paths)}")
        if any(paths[i].ended and paths[i].value <= accept for i in alive):
            break
        alive = [i for i in alive if not paths[i].ended]
    return Minima(
        torch.stack([path.point for path in paths]),
        torch.tensor([path.value for path in paths], dtype=torch.float64),
        torch.tensor([path.iterations for path in paths]),
        survivors,
    )


class _Path:
    """One problem: its lowest point so far, and the point at which it wants to know value and slope."""

    def __init__(self, start: Tensor, settings: Quasi) -> None:
        self.point, self.value, self.iterations, self.ended = start, math.inf, 0, False
        self._asking = self._descend(settings)
        self.wanted = next(self._asking)

    def answer(self, value: float, slope: Tensor) -> None:
        try:
            self.wanted = self._asking.send((value, slope))
        except StopIteration:
            self.ended = True

    def _descend(self, settings: Quasi) -> _Asking:
        value, slope = yield self.point
        if not math.isfinite(value):
            return
        self.value, memory, trace = value, _Memory(settings.history), [value]
        length = min(1.0, 1 / max(float(slope.abs().sum()), 1e-300))
        while self.value > settings.tolerance and self.iterations < settings.iterations:
            direction = -memory.times(slope)
            if not float(direction @ slope) < 0:  # rounding spoilt the history
                memory.forget()
                direction = -slope
            trial = yield from _line_search(self.point, direction, self.value, slope, length)
            if trial is None:
                if not memory.count:
                    return
                memory.forget()
                length = min(1.0, 1 / max(float(slope.abs().sum()), 1e-300))
                continue
            step = trial.length * direction
            memory.add(step, trial.slope - slope)
            self.point, self.value, slope, length = self.point + step, trial.value, trial.slope, 1.0
            self.iterations += 1
            if self.iterations % _LOOK == 0:
                trace.append(self.value)
                if len(trace) > _PATIENCE and trace[-1] > (1 - _PROGRESS) * trace[-1 - _PATIENCE]:
                    return


class _Memory:
    """The last steps s and slope differences y, and products with the inverse Hessian they imply."""

    def __init__(self, most: int) -> None:
        self.most, self.count, self._end = most, 0, 0
        self._steps = self._turns = self._cross = self._inner = torch.empty(0)

    def forget(self) -> None:
        self.count = 0

    def add(self, step: Tensor, turn: Tensor) -> None:
        """Remember a pair, unless rounding hid the curvature along it."""
        curvature = float(step @ turn)
        if not curvature > 1e-14 * float(step.norm() * turn.norm()):
            return
        if not len(self._steps):
            self._steps, self._turns = (step.new_empty(2 * self.most, len(step)) for _ in range(2))
            self._cross, self._inner = (step.new_zeros(2 * self.most, 2 * self.most) for _ in range(2))
        if not self.count:
            self._end = 0
        if self._end == 2 * self.most:  # rows stay in order: move the last ones to the front, now and then
            kept = slice(self._end - self.most, self._end)
            for rows in (self._steps, self._turns):
                rows[: self.most] = rows[kept].clone()
            for table in (self._cross, self._inner):
                table[: self.most, : self.most] = table[kept, kept].clone()
            self._end = self.most
        row = self._end
        self._steps[row], self._turns[row] = step, turn
        self._end, self.count = row + 1, min(self.count + 1, self.most)
        now = slice(self._end - self.count, self._end)
        self._cross[now, row] = self._steps[now] @ turn
        self._inner[now, row] = self._inner[row, now] = self._turns[now] @ turn

    def times(self, slope: Tensor) -> Tensor:
        """H g, (D,); g itself with an empty memory."""
        if not self.count:
            return slope
        now = slice(self._end - self.count, self._end)
        steps, turns, cross, inner = (
            self._steps[now],
            self._turns[now],
            self._cross[now, now],
            self._inner[now, now],
        )
        scale = cross[-1, -1] / inner[-1, -1]
        right = cross.triu()
        inside = torch.linalg.solve_triangular(right, (steps @ slope).unsqueeze(1), upper=True)
        outside = right.diagonal().unsqueeze(1) * inside + scale * (
            inner @ inside - (turns @ slope).unsqueeze(1)
        )
        outside = torch.linalg.solve_triangular(right.T, outside, upper=False)
        product: Tensor = scale * (slope - inside.squeeze(1) @ turns) + outside.squeeze(1) @ steps
        return product


@dataclass(frozen=True, eq=False)
class _Trial:
    """What is known at one step length; `along` is the slope along the direction."""

    length: float
    value: float
    along: float
    slope: Tensor

    @property
    def finite(self) -> bool:
        return math.isfinite(self.value) and math.isfinite(self.along)


def _line_search(
    point: Tensor, direction: Tensor, value: float, slope: Tensor, length: float
) -> Generator[Tensor, tuple[float, Tensor], _Trial | None]:
    """A step that satisfies the strong Wolfe conditions, the best one found, or None if none is lower."""
    start = low = _Trial(0.0, value, float(direction @ slope), slope)
    high: _Trial | None = None
    for _ in range(_TRIALS):
        found, gradient = yield point + length * direction
        trial = _Trial(length, found, float(gradient @ direction), gradient)
        armijo = value + _DECREASE * length * start.along
        if not trial.finite or trial.value > armijo or trial.value >= low.value:
            high = trial
        elif abs(trial.along) <= -_CURVATURE * start.along:
            return trial
        elif high is not None:
            if trial.along * (high.length - trial.length) >= 0:
                high = low
            low = trial
        elif trial.along >= 0:
            high, low = low, trial
        else:
            least, most = length + 0.01 * (length - low.length), 10 * length
            length, low = min(max(_cubic(low, trial), least), most), trial
            continue
        span = high.length - low.length
        if abs(span) <= 1e-10 * max(high.length, low.length):
            break
        inner = _cubic(low, high) if high.finite else low.length + 0.1 * span
        edges = sorted((low.length + 0.1 * span, high.length - 0.1 * span))
        length = min(max(inner, edges[0]), edges[1])
    return low if low.length else None


def _cubic(a: _Trial, b: _Trial) -> float:
    """Minimiser of the cubic through two values and slopes (Nocedal, Wright, eq. 3.59), or the middle."""
    reach = b.length - a.length
    d1 = a.along + b.along - 3 * (b.value - a.value) / reach
    square = d1 * d1 - a.along * b.along
    if square < 0:
        return b.length if abs(b.along) < abs(a.along) and b.value < a.value else a.length + reach / 2
    d2 = math.copysign(math.sqrt(square), reach)
    bottom = b.along - a.along + 2 * d2
    return b.length - reach * (b.along + d2 - d1) / bottom if bottom else a.length + reach / 2
