"""Many restarts of one first-order attack in one vectorised loop; the worst are dropped on the way.

Restarts are independent: a restart's start and path depend neither on how many others run nor on which of
them are dropped, up to rounding. Everything is decided by the attack's own objective.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from fedaudit.attacks.lbfgs import Quasi, minimise
from fedaudit.attacks.signed_adam import Descent, SignedAdam
from fedaudit.progress import heartbeat

_log = logging.getLogger(__name__)

Objective = Callable[..., Tensor]
"""Takes the variables of one restart and what it was given, returns a scalar."""
Box = tuple[Tensor | float, Tensor | float] | None


@dataclass(frozen=True, eq=False)
class Descended:
    """Where the restarts ended.

    Attributes:
        variables: of the best restart, at its lowest objective.
        given: what that restart was given.
        objective: there; infinite if no restart had a finite one.
        restart: which restart that was, from 0.
        steps: iterations, summed over restarts.
        objectives: lowest objective of each restart (R,), also of dropped ones.
        survivors: how many restarts ran after each halving and at which iteration (of L-BFGS: evaluation) it
            came, "8, 4@50, ...".
        together: whether the restarts ran in one vectorised loop.
        hindrance: why not, if they did not.
    """

    variables: tuple[Tensor, ...]
    given: tuple[Tensor, ...]
    objective: float
    restart: int
    steps: int
    objectives: Tensor
    survivors: str
    together: bool
    hindrance: str


def start_generator(name: str, seed: int, restart: int) -> torch.Generator:
    """A CPU generator for one restart's start; it depends on the arguments alone."""
    digest = hashlib.sha256(f"{name}/{seed}/{restart}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def halvings(restarts: int, iterations: int) -> dict[int, int]:
    """Iteration -> restarts that go on from there: halved at even distances over the first half.

    Source: successive halving, Jamieson, Talwalkar 2016, arXiv 1502.07943.

    >>> halvings(8, 600)
    {100: 4, 200: 2, 300: 1}
    """
    rungs = max(restarts - 1, 0).bit_length()
    found: dict[int, int] = {}
    for rung in range(1, rungs + 1):
        restarts = (restarts + 1) // 2
        found[max(1, iterations * rung // (2 * rungs))] = restarts
    return found


def descend(
    objective: Objective,
    starts: Sequence[Tensor],
    descent: Descent,
    *,
    boxes: Sequence[Box],
    given: Sequence[Tensor] = (),
    halve: bool = True,
    deadline: float = math.inf,
    one_by_one: Objective | None = None,
    together: bool = True,
) -> Descended:
    """Minimise an objective from several starts at once and return the best end.

    Args:
        objective: takes one restart's variables, then what it was given; `torch.func.vmap` must be able
            to vectorise it.
        starts: each variable's starts, stacked (R, ...).
        descent: the optimiser's settings.
        boxes: for each variable the smallest and largest value allowed, or None; starts are projected too.
        given: further arguments of each restart, stacked (R, ...), that are not optimised.
        halve: drop the worse half, by the lowest objective so far, at the iterations of `halvings`.
        deadline: `time.monotonic()` after which to stop; the starts are always evaluated.
        one_by_one: the same objective for plain autograd, used where `objective` cannot be vectorised;
            None takes `objective` itself.
        together: False runs the restarts of every iteration one after the other from the beginning.
    """
    count = len(starts[0])
    variables = [_project(s.detach().clone(), box) for s, box in zip(starts, boxes, strict=True)]
    alive, constants = torch.arange(count), list(given)
    lowest = torch.full((count,), math.inf, dtype=torch.float64)
    kept = [v.clone() for v in variables]
    adam = SignedAdam(variables)
    rungs = halvings(count, descent.iterations) if halve else {}
    survivors, steps = str(count), 0
    evaluate = _Evaluation(objective, one_by_one or objective, together)
    for iteration in range(descent.iterations + 1):
        if iteration in rungs:
            rows = lowest[alive].argsort(stable=True)[: rungs[iteration]].sort().values
            alive = alive[rows]
            rows = rows.to(variables[0].device)
            variables, constants = [v[rows] for v in variables], [c[rows] for c in constants]
            adam.keep(rows)
            survivors += f", {len(alive)}@{iteration}"
        values, slopes = evaluate(variables, constants)
        numbers = values.to("cpu", torch.float64)
        better = numbers < lowest[alive]  # False for NaN
        lowest[alive[better]] = numbers[better]
        places = better.to(variables[0].device)
        rows = alive[better].to(variables[0].device)
        for best, now in zip(kept, variables, strict=True):
            best[rows] = now[places]
        heartbeat(iteration, descent.iterations, restarts=f"{len(alive)} of {count}")
        if iteration == descent.iterations or time.monotonic() > deadline:
            break
        moves = adam.step(slopes, descent)
        variables = [_project(v + m, box) for v, m, box in zip(variables, moves, boxes, strict=True)]
        steps += len(alive)
    winner = int(lowest.argmin())
    return Descended(
        tuple(v[winner] for v in kept),
        tuple(c[winner] for c in given),
        float(lowest[winner]),
        winner,
        steps,
        lowest,
        survivors,
        evaluate.together,
        evaluate.hindrance,
    )


def descend_quasi_newton(
    objective: Objective,
    starts: Sequence[Tensor],
    settings: Quasi,
    *,
    given: Sequence[Tensor] = (),
    halve: bool = True,
    accept: float = -math.inf,
    deadline: float = math.inf,
    one_by_one: Objective | None = None,
    together: bool = True,
) -> Descended:
    """The same by L-BFGS; there is no box, and the variables need one dtype.

    Args:
        objective: as in `descend`; it should be smooth.
        starts: each variable's starts, stacked (R, ...).
        settings: of every restart.
        given: further arguments of each restart, stacked (R, ...), that are not optimised.
        halve: drop the worse half at the evaluations of `halvings`.
        accept: all end once one has ended at or below this objective.
        deadline: `time.monotonic()` after which to stop; the starts are always evaluated.
        one_by_one: the same objective for plain autograd, as in `descend`.
        together: False evaluates the restarts one after the other from the beginning.
    """
    count, shapes = len(starts[0]), [s.shape[1:] for s in starts]
    sizes = [shape.numel() for shape in shapes]
    evaluate = _Evaluation(objective, one_by_one or objective, together)

    def unpacked(points: Tensor) -> list[Tensor]:
        pieces = torch.split(points, sizes, dim=1)
        return [p.reshape(len(points), *shape) for p, shape in zip(pieces, shapes, strict=True)]

    def asked(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        values, slopes = evaluate(unpacked(points), [c[rows.to(c.device)] for c in given])
        return values, torch.cat([s.flatten(1) for s in slopes], dim=1)

    found = minimise(
        asked,
        torch.cat([s.detach().flatten(1) for s in starts], dim=1),
        settings,
        rungs=halvings(count, settings.iterations) if halve else {},
        accept=accept,
        deadline=deadline,
    )
    winner = int(found.values.argmin())
    return Descended(
        tuple(v[winner] for v in unpacked(found.points)),
        tuple(c[winner] for c in given),
        float(found.values[winner]),
        winner,
        int(found.iterations.sum()),
        found.values,
        found.survivors,
        evaluate.together,
        evaluate.hindrance,
    )


class _Evaluation:
    """Objectives and slopes of several restarts: at once where the model can be vectorised, or in turn."""

    def __init__(self, objective: Objective, one_by_one: Objective, together: bool) -> None:
        self.objective, self.one_by_one = objective, one_by_one
        self.together, self.hindrance, self._worked = together, "", False

    def __call__(
        self, variables: Sequence[Tensor], given: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        if self.together and len(variables[0]) > 1:  # alone, plain autograd takes half the time
            try:
                found = _vectorised(self.objective, variables, given)
                self._worked = True
                return found
            except (RuntimeError, NotImplementedError, ValueError) as error:
                if self._worked:  # it worked before, so the model is not to blame
                    raise
                self.together, self.hindrance = (
                    False,
                    f"{type(error).__name__}: {error}".splitlines()[0][:160],
                )
                _log.info("restarts run one after the other: %s", self.hindrance)
        return _in_turn(self.one_by_one, variables, given)


def _vectorised(
    objective: Objective, variables: Sequence[Tensor], given: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Objectives (K,) and their slopes: rows are independent, so the sum's slope holds each row's own."""
    leaves = [v.detach().requires_grad_() for v in variables]
    values = vmap(objective)(*leaves, *given)
    slopes = torch.autograd.grad(values.sum(), leaves, materialize_grads=True)
    return values.detach(), list(slopes)


def _in_turn(
    objective: Objective, variables: Sequence[Tensor], given: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The same numbers, one restart after the other."""
    values: list[Tensor] = []
    rows: list[tuple[Tensor, ...]] = []
    for k in range(len(variables[0])):
        leaves = [v[k].detach().requires_grad_() for v in variables]
        value = objective(*leaves, *(c[k] for c in given))
        rows.append(torch.autograd.grad(value, leaves, materialize_grads=True))
        values.append(value.detach())
    return torch.stack(values), [torch.stack(column) for column in zip(*rows, strict=True)]


def _project(variable: Tensor, box: Box) -> Tensor:
    return variable if box is None else variable.clamp(*box)  # type: ignore[arg-type]
