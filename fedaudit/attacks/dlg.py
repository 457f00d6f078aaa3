"""Deep Leakage from Gradients: inputs and labels whose gradient matches the one a client sent."""

import copy
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedaudit.attacks.attacked_model import broadcast_model, flat, forget_running_statistics, paired
from fedaudit.attacks.label_strategies import head_labels
from fedaudit.attacks.lbfgs import Quasi
from fedaudit.attacks.local_training import imagined_update
from fedaudit.attacks.objectives import squared_distance
from fedaudit.attacks.restarts import Objective, descend_quasi_newton
from fedaudit.needs import Needs
from fedaudit.progress import heartbeat
from fedaudit.types import ClientUpdate, Loss, Reconstruction, RoundContext

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Match:
    """Where the optimiser ended from the best of its starts.

    Attributes:
        x: inputs (B, *input_shape), not clamped.
        y: labels (B,): the largest soft label, or the labels that were given.
        objective: sum of squared gradient differences at `x`; infinite if the start was not finite.
        relative: `objective` over the squared norm of the gradient sought; 1 is what a zero gradient gets.
        steps: L-BFGS iterations, over all starts.
        converged: whether `relative` came down to the tolerance.
    """

    x: Tensor
    y: Tensor
    objective: float
    relative: float
    steps: int
    converged: bool


def match_gradient(
    model: nn.Module,
    loss: Loss,
    gradient: Mapping[str, Tensor],
    x0: Tensor,
    y0: Tensor,
    *,
    iterations: int = 3000,
    history: int = 100,
    tolerance: float = 1e-9,
    deadline: float = math.inf,
) -> Match:
    """Inputs and labels whose mean gradient is closest to `gradient`, by L-BFGS from one start.

    As `match_gradients`, with x0 (B, *input_shape) and y0 (B, C) or (B,).
    """
    return match_gradients(
        model,
        loss,
        gradient,
        x0.unsqueeze(0),
        y0.unsqueeze(0),
        iterations=iterations,
        history=history,
        tolerance=tolerance,
        deadline=deadline,
    )


def match_gradients(
    model: nn.Module,
    loss: Loss,
    gradient: Mapping[str, Tensor],
    x0: Tensor,
    y0: Tensor,
    *,
    iterations: int = 3000,
    history: int = 100,
    tolerance: float = 1e-9,
    accept: float = 0.0,
    halve: bool = False,
    deadline: float = math.inf,
) -> Match:
    """The best of several starts, run side by side: inputs and labels whose mean gradient is closest.

    Minimises sum_l || d/dW_l (1/B) loss(model(x), softmax(z)) - g_l ||^2 over x and the label logits z, in
    float64, from every start. The objective is divided by ||g||^2 for the optimiser, which does not move the
    minimum but makes one tolerance fit confident and untrained models. A start ends at the tolerance, after
    `iterations`, at the deadline, or once 100 iterations gain less than 1 %. Gradients of all starts are
    taken in one vectorised pass where the model allows it; each start's path is its own.

    A small objective is NOT proof of a good reconstruction: where the gradient does not determine the
    input (dead units, symmetric batches), other inputs match as well. The order of a batch is arbitrary.

    Source: Zhu, Liu, Han 2019, arXiv 1906.08935.
    Differs from Zhu et al.: a strong-Wolfe line search instead of full steps, float64, and a long history;
    full steps diverge from about half of all starts.

    Args:
        model: weights as broadcast, in the mode (train or eval) to attack; it is copied, not changed.
        loss: SUM-reduced; must accept class probabilities (B, C) as target if `y0` are logits, as
            `torch.nn.functional.cross_entropy` does.
        gradient: gradient of the MEAN loss by parameter name; parameters it lacks are not matched.
        x0: first inputs of R starts (R, B, *input_shape).
        y0: first label logits (R, B, C), to be optimised; or integer labels (R, B), taken as known.
        iterations: most L-BFGS iterations of a start.
        history: number of steps L-BFGS remembers.
        tolerance: relative objective at which the match counts as exact.
        accept: relative objective at which a start that ended ends the others, too.
        halve: drop the worse half of the starts now and then, by their objective.
        deadline: `time.monotonic()` after which to stop.

    Raises:
        ValueError: if no parameter is matched, or the gradient is zero or not finite.
    """
    attacked = copy.deepcopy(model).to(x0.device, torch.float64)
    forget_running_statistics(attacked)
    _, target = paired(attacked, gradient)
    names = [name for name, p in attacked.named_parameters() if p.requires_grad]
    sought = flat(target)
    norm = float(sought.square().sum())
    if not math.isfinite(norm) or norm == 0:
        raise ValueError(f"a gradient to match must be finite and not zero, got squared norm {norm}: skip it")
    joint = y0.is_floating_point()

    def distance(*, vectorisable: bool) -> Objective:
        whole = [slice(0, x0.shape[1])]
        imagine = imagined_update(attacked, loss, names, whole, 0.0, vectorisable=vectorisable)

        def objective(x: Tensor, y: Tensor) -> Tensor:
            return squared_distance(imagine(x, y.softmax(dim=-1) if joint else y), sought)

        return objective

    x = x0.detach().to(torch.float64)
    y = y0.detach().to(torch.float64 if joint else torch.int64)
    found = descend_quasi_newton(
        distance(vectorisable=True),
        [x, y] if joint else [x],
        Quasi(iterations, history, tolerance),
        given=[] if joint else [y],
        halve=halve,
        accept=accept,
        deadline=deadline,
        one_by_one=distance(vectorisable=False),
    )
    labels = found.variables[1].argmax(dim=-1) if joint else found.given[0]
    relative = found.objective
    return Match(found.variables[0], labels, relative * norm, relative, found.steps, relative <= tolerance)


@dataclass(frozen=True)
class DLG:
    """Joint reconstruction of inputs and labels from one update by gradient matching.

    The attack knows what the server knows: the broadcast weights, the loss, the training settings and the
    input shape. It never sees the client's data; among restarts it keeps the one with the lowest objective.
    Starts are mid-range inputs plus noise of `spread` times the value range: from there the objective is
    far better behaved than from standard normal inputs. Reconstructions are returned unclamped (the raw
    minimiser); scoring clamps them to the value range.

    A failure is NOT evidence of privacy: stronger attacks exist. Only plain SGD with a single step sends
    the gradient assumed here; for several steps the average pseudo-gradient is used and `conditions` warns.

    Source: Zhu, Liu, Han 2019, arXiv 1906.08935; label rule: Zhao et al. 2020, arXiv 2001.02610.
    Differs from Zhu et al.: line search, precision and start, as said above and in `match_gradient`.

    Attributes:
        restarts: most starts; later ones are skipped once one has reached `accept`.
        iterations: most L-BFGS iterations per start.
        at_once: starts that run side by side. One after the other is best where the first start mostly
            does: in double precision, on one thread of a processor, eight at once run 1.4 times as many
            iterations per second for one example and 1.1 times as many for a batch of four.
        halve: drop the worse half of those side by side now and then, by their objective.
        labels: "joint" optimises soft labels with the inputs; "idlg" derives them first from the head's
            gradient: exactly for one example, and for a batch through label counts, whose mean softmax is
            estimated on noise; "counts" estimates it on the observer's reference data if there is any.
        history: steps that L-BFGS remembers.
        spread: standard deviation of the start, relative to the value range.
        tolerance: relative objective at which a start has converged and stops.
        accept: relative objective below which no further start is made. Single examples are recovered there;
            a batch of eight may still be poor.
        mode: "train" or "eval": how normalisation layers ran in the client; dropout is always off.
        seconds: time budget per update over all restarts; 0 is no limit. With a limit the result depends
            on the machine's speed.
    """

    restarts: int = 2
    iterations: int = 3000
    at_once: int = 1
    halve: bool = True
    labels: Literal["joint", "idlg", "counts"] = "joint"
    history: int = 100
    spread: float = 0.01
    tolerance: float = 1e-9
    accept: float = 1e-7
    mode: Literal["train", "eval"] = "train"
    seconds: float = 0.0

    name = "dlg"
    needs = Needs.MODEL | Needs.TRAINING | Needs.SHAPE

    def __post_init__(self) -> None:
        for option in ("restarts", "at_once", "iterations", "history"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be positive, got {getattr(self, option)}: use 1 or more")
        if not self.spread > 0:
            raise ValueError(f"spread must be positive, got {self.spread}: use e.g. 0.01")
        if self.seconds < 0 or self.tolerance < 0:
            raise ValueError(
                f"seconds and tolerance must not be negative, got {self.seconds} and {self.tolerance}: use 0"
            )

    def reconstruct(self, update: ClientUpdate, ctx: RoundContext) -> Reconstruction:
        """The match with the lowest objective among the restarts.

        Raises:
            ValueError: if the context lacks what `needs` names, the update's gradient cannot be matched,
                or no start had a finite objective.
        """
        if ctx.build_model is None or ctx.loss is None or ctx.input_shape is None or ctx.num_classes is None:
            raise ValueError("dlg needs the model, the loss, the input shape and the classes: state them")
        if not ctx.batch_size:
            raise ValueError(f"dlg needs a positive batch size, got {ctx.batch_size}: state it")
        deadline = time.monotonic() + self.seconds if self.seconds else math.inf
        batch = min(ctx.batch_size, update.num_examples) if update.num_examples > 0 else ctx.batch_size
        model = broadcast_model(update, ctx.build_model(), self.mode).to(ctx.device)
        gradient = update.gradient(ctx)
        generator = torch.Generator().manual_seed(ctx.seed)
        fixed: Tensor | None = None
        if self.labels != "joint":
            informed = self.labels == "counts"
            fixed = head_labels(gradient, [model], batch, ctx, ctx.num_classes, use_reference=informed)
        best: Match | None = None
        steps = used = 0
        while used < self.restarts and (
            best is None or not (best.relative <= self.accept or time.monotonic() > deadline)
        ):
            count = min(self.at_once, self.restarts - used)
            shape = (batch, *ctx.input_shape)
            starts = [self._start(shape, ctx.num_classes, ctx, generator) for _ in range(count)]
            x0, logits = (torch.stack(parts).to(ctx.device) for parts in zip(*starts, strict=True))
            heartbeat(0, self.iterations, starts=f"{used + 1} to {used + count} of {self.restarts}")
            found = match_gradients(
                model,
                ctx.loss,
                gradient,
                x0,
                logits if fixed is None else fixed.to(ctx.device).expand(count, batch),
                iterations=self.iterations,
                history=self.history,
                tolerance=self.tolerance,
                accept=self.accept,
                halve=self.halve,
                deadline=deadline,
            )
            used, steps = used + count, steps + found.steps
            if math.isfinite(found.objective) and (best is None or found.objective < best.objective):
                best = found
        if best is None:
            raise ValueError(f"no start of dlg had a finite objective in {used} restarts: check the update")
        _log.debug("dlg: relative objective %.2e after %d iterations", best.relative, steps)
        local_steps = ctx.steps(update) or 1
        conditions: dict[str, float | int | str | bool] = {
            "labels": self.labels,
            "batch-size": batch,
            "local-steps": local_steps,
            "batchnorm-mode": self.mode,
            "restarts": used,
            "relative-objective": best.relative,
            "converged": best.converged,
        }
        if local_steps > 1:
            conditions["warning"] = "single-gradient attack on a multi-step update: not expected to work"
        return Reconstruction(best.x.cpu().to(torch.float32), best.y.cpu(), best.objective, steps, conditions)

    def _start(
        self, shape: tuple[int, ...], num_classes: int, ctx: RoundContext, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Inputs (B, *input_shape) around the middle of the value range, and label logits around zero."""
        low, high = ctx.value_range
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        logits = torch.randn(shape[0], num_classes, generator=generator, dtype=torch.float64)
        return (low + high) / 2 + self.spread * (high - low) * noise, 0.1 * logits
