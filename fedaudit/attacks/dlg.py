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

from fedaudit.attacks.attacked_model import broadcast_model, paired
from fedaudit.attacks.label_strategies import head_labels
from fedaudit.needs import Needs
from fedaudit.progress import heartbeat
from fedaudit.types import ClientUpdate, Loss, Reconstruction, RoundContext

_log = logging.getLogger(__name__)

_CHUNK = 50  # iterations between two looks at the objective and the clock
_PATIENCE = 2  # chunks over which the objective must fall by at least _PROGRESS
_PROGRESS = 0.01
_SCALE = 1e4  # L-BFGS forgets steps with s.y < 1e-10: keep the optimised objective well above that


@dataclass(frozen=True, eq=False)
class Match:
    """Where one run of the optimiser ended.

    Attributes:
        x: inputs (B, *input_shape), not clamped.
        y: labels (B,): the largest soft label, or the labels that were given.
        objective: sum of squared gradient differences at `x`; infinite if the start was not finite.
        relative: `objective` over the squared norm of the gradient sought; 1 is what a zero gradient gets.
        steps: L-BFGS iterations.
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

    Minimises sum_l || d/dW_l (1/B) loss(model(x), softmax(z)) - g_l ||^2 over x and the label logits z, in
    float64, starting at (x0, y0). The objective is divided by ||g||^2 for the optimiser, which does not
    move the minimum but makes one tolerance fit confident and untrained models. It stops at the tolerance,
    after `iterations`, at the deadline, or once 100 iterations gain less than 1 %.

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
        x0: first inputs (B, *input_shape).
        y0: first label logits (B, C), to be optimised; or integer labels (B,), taken as known.
        iterations: most L-BFGS iterations.
        history: number of steps L-BFGS remembers.
        tolerance: relative objective at which the match counts as exact.
        deadline: `time.monotonic()` after which to stop, checked every 50 iterations.

    Raises:
        ValueError: if no parameter is matched, or the gradient is zero or not finite.
    """
    attacked = copy.deepcopy(model).to(x0.device, torch.float64)
    parameters, target = paired(attacked, gradient)
    norm = math.fsum(float(t.square().sum()) for t in target)
    if not math.isfinite(norm) or norm == 0:
        raise ValueError(f"a gradient to match must be finite and not zero, got squared norm {norm}: skip it")
    joint = y0.is_floating_point()
    x = x0.detach().to(torch.float64, copy=True).requires_grad_()
    y = y0.detach().to(torch.float64 if joint else torch.int64, copy=True).requires_grad_(joint)
    variables = [x, y] if joint else [x]

    def closure() -> Tensor:
        mean_loss = loss(attacked(x), y.softmax(dim=-1) if joint else y) / len(x)
        found = torch.autograd.grad(mean_loss, parameters, create_graph=True, materialize_grads=True)
        distance = torch.stack([(a - b).square().sum() for a, b in zip(found, target, strict=True)]).sum()
        scaled = distance * (_SCALE / norm)
        slopes = torch.autograd.grad(scaled, variables, materialize_grads=True)
        for variable, slope in zip(variables, slopes, strict=True):
            variable.grad = slope
        return scaled.detach()

    def look() -> float:
        return float(closure()) / _SCALE

    optimizer = torch.optim.LBFGS(
        variables,
        max_iter=_CHUNK,
        max_eval=2 * _CHUNK,
        history_size=history,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )
    trace, steps = [look()], 0
    best, best_x, best_y = trace[0], x.detach().clone(), y.detach().clone()
    while (
        math.isfinite(trace[-1])
        and best > tolerance
        and steps < iterations
        and time.monotonic() < deadline
        and not (len(trace) > _PATIENCE and trace[-1] > (1 - _PROGRESS) * trace[-1 - _PATIENCE])
    ):
        optimizer.param_groups[0]["max_iter"] = min(_CHUNK, iterations - steps)
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        steps = int(optimizer.state[x]["n_iter"])
        trace.append(look())
        heartbeat(steps, iterations)
        if trace[-1] < best and bool(torch.isfinite(x).all()):
            best, best_x, best_y = trace[-1], x.detach().clone(), y.detach().clone()
    if not math.isfinite(best):
        best = math.inf
    labels = best_y.argmax(dim=-1) if joint else best_y
    return Match(best_x, labels, best * norm, best, steps, best <= tolerance)


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
        labels: "joint" optimises soft labels with the inputs; "idlg" derives them first from the head's
            gradient: exactly for one example, and for a batch through estimated label counts.
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
    labels: Literal["joint", "idlg"] = "joint"
    history: int = 100
    spread: float = 0.01
    tolerance: float = 1e-9
    accept: float = 1e-7
    mode: Literal["train", "eval"] = "train"
    seconds: float = 0.0

    name = "dlg"
    needs = Needs.MODEL | Needs.TRAINING | Needs.SHAPE

    def __post_init__(self) -> None:
        for option in ("restarts", "iterations", "history"):
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
        fixed = head_labels(gradient, [model], batch, ctx, ctx.num_classes) if self.labels == "idlg" else None
        best: Match | None = None
        steps = used = 0
        while used < self.restarts and (
            best is None or not (best.relative <= self.accept or time.monotonic() > deadline)
        ):
            x0, logits = self._start((batch, *ctx.input_shape), ctx.num_classes, ctx, generator)
            y0 = logits if fixed is None else fixed
            heartbeat(0, self.iterations, restarts=f"{used + 1} of {self.restarts}")
            found = match_gradient(
                model,
                ctx.loss,
                gradient,
                x0.to(ctx.device),
                y0.to(ctx.device),
                iterations=self.iterations,
                history=self.history,
                tolerance=self.tolerance,
                deadline=deadline,
            )
            used, steps = used + 1, steps + found.steps
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
