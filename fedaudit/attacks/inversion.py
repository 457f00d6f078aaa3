"""First-order gradient inversion from parts: distance, priors, labels, optimiser, restarts.

The presets (`inverting_gradients`, `see_through_gradients`, `local_steps`) choose the parts and are named
after their papers; this module puts them together.
"""

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedaudit.attacks.attacked_model import (
    batch_norms,
    broadcast_model,
    flat,
    forget_running_statistics,
    paired,
    returned_model,
)
from fedaudit.attacks.bn_prior import bn_statistics
from fedaudit.attacks.epoch_copies import averaged, dealt
from fedaudit.attacks.label_strategies import Labels, labels_for
from fedaudit.attacks.lbfgs import Quasi
from fedaudit.attacks.local_training import epoch_batches, imagined_update
from fedaudit.attacks.objectives import Distance, LayerWeights, Objective, distance_of, layer_scale
from fedaudit.attacks.priors import (
    clip_penalty,
    epoch_disagreement,
    mean_square,
    random_filters,
    total_variation,
)
from fedaudit.attacks.restarts import Descended, descend, descend_quasi_newton, start_generator
from fedaudit.attacks.signed_adam import Descent, Schedule, Signed
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Reconstruction, RoundContext

_log = logging.getLogger(__name__)

UNIT = 0.25
"""What the optimiser calls 1, as a share of the value range: about one standard deviation of a photograph."""
BOUND = 0.5 / UNIT
"""Ends of the value range in these units."""
ROUNDING = 0.016
"""Where the absolute differences of total variation are rounded for L-BFGS: 1/250 of the value range."""
Optimizer = Literal["signed-adam", "lbfgs"]
MULTI_STEP = "single-gradient attack on a multi-step update: not expected to work"


@dataclass(frozen=True)
class Inversion:
    """Inputs whose update looks most like the one a client sent, under image priors.

    Minimises distance(update(x), update sent) + sum of weighted priors(x). The attack knows what the server
    knows: the broadcast weights, the loss, the training settings and the input shape; it never sees the
    client's data, and among restarts it keeps the one with the lowest objective of its own. Inputs are
    optimised in units of a quarter of the value range around its middle, from standard normal starts:
    the papers use the mean and standard deviation of the private data, which an observer cannot know.

    A failure is NOT evidence of privacy. Only plain SGD without momentum sends the update assumed here.

    Attributes:
        restarts: starts, all optimised at once.
        iterations: steps of each start that is not dropped, over all stages.
        optimizer: "signed-adam", or "lbfgs" with a line search, for smooth models. It has no box,
            and uses neither `lr`, `signed`, `schedule` nor `warmup`.
        history: steps that L-BFGS remembers.
        spread: standard deviation of the starts, in the units above; little of it helps L-BFGS.
        anneal: how often the weight of total variation is divided by ten, at even distances. The restarts
            compete in the first stage; the best of them goes through the others alone.
        objective: "cosine", "euclidean" (squared, relative) or "layer-norms" (sum of norms, relative).
        layer_weights: "equal", or more weight on the first layers: "linear", "exponential".
        tv: weight of total variation.
        l2: weight of the mean square.
        clip: weight of the penalty outside the value range; only without a box.
        bn: weight of the batch-normalisation prior; without running statistics there is none.
        epoch_prior: weight of the disagreement between local epochs; only with several.
        epoch_order: "unknown" gives every local epoch copies of its own; "fixed" lets all epochs visit the
            same images in the same order, which an attacker must know, and which is then exact.
        epoch_features: what is compared between epochs: the "mean" image, or the mean of "conv" features.
        lr: step size, in the units above.
        signed: "hard", "soft" or "none": how gradients reach Adam.
        schedule: "step", "cosine" or "constant".
        warmup: iterations of warm-up of the cosine schedule.
        boxed: keep inputs inside the value range after every step of Adam.
        labels: "known" (stated in `classes`), "idlg" (one example), "counts" (head's bias and estimated
            mean softmax; exact for one example) or "joint" (optimised too).
        classes: known labels joined by hyphens, as in ``3-1-4``; in the order in which local steps used them.
        halve: drop the worse half of the restarts now and then.
        mode: "train" or "eval": how normalisation layers ran in the client; dropout is always off.
        precision: "single" or "double" floating point.
        seconds: time budget per update; 0 is no limit. With a limit the result depends on the machine.

    Raises:
        ValueError: for a value out of range.
    """

    restarts: int = 8
    iterations: int = 1000
    optimizer: Optimizer = "signed-adam"
    history: int = 100
    spread: float = 1.0
    anneal: int = 0
    objective: Objective = "cosine"
    layer_weights: LayerWeights = "equal"
    tv: float = 0.0
    l2: float = 0.0
    clip: float = 0.0
    bn: float = 0.0
    epoch_prior: float = 0.0
    epoch_order: Literal["unknown", "fixed"] = "unknown"
    epoch_features: Literal["mean", "conv"] = "mean"
    lr: float = 0.1
    signed: Signed = "hard"
    schedule: Schedule = "step"
    warmup: int = 0
    boxed: bool = True
    labels: Labels = "counts"
    classes: str = ""
    halve: bool = True
    mode: Literal["train", "eval"] = "train"
    precision: Literal["single", "double"] = "single"
    seconds: float = 0.0

    name: ClassVar[str] = "inversion"
    unrolls: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs.MODEL | Needs.TRAINING | Needs.SHAPE

    def __post_init__(self) -> None:
        if self.restarts < 1:
            raise ValueError(f"restarts must be positive, got {self.restarts}: use 1 or more")
        for option in ("tv", "l2", "clip", "bn", "epoch_prior", "seconds"):
            if getattr(self, option) < 0:
                raise ValueError(f"{option} must not be negative, got {getattr(self, option)}: use 0")
        if not self.spread > 0:
            raise ValueError(f"spread must be positive, got {self.spread}: use e.g. 0.05")
        if self.classes and self.labels != "known":
            raise ValueError(f"classes belongs to labels=known, got labels={self.labels}: drop one")
        if not 0 <= self.anneal < self.iterations:
            raise ValueError(
                f"anneal must be from 0 to iterations - 1, got {self.anneal} with {self.iterations} "
                f"iterations: use e.g. 3"
            )
        self._descent()
        Quasi(self.iterations, self.history)

    @property
    def has_box(self) -> bool:
        """Whether inputs are kept inside the value range."""
        return self.boxed and self.optimizer == "signed-adam"

    def _descent(self) -> Descent:
        return Descent(self.iterations // (self.anneal + 1), self.lr, self.signed, self.schedule, self.warmup)

    def reconstruct(self, update: ClientUpdate, ctx: RoundContext) -> Reconstruction:
        """The reconstruction with the lowest objective among the restarts.

        Raises:
            ValueError: if the context lacks what `needs` names, the update is zero or not finite, the
                labels cannot be derived, or no restart had a finite objective.
        """
        deadline = time.monotonic() + self.seconds if self.seconds else math.inf
        problem = _Problem.of(self, update, ctx)
        starts, given = problem.starts()
        stages = [self._minimised(problem, starts, given, 0, deadline)]
        for stage in range(1, self.anneal + 1):
            if not math.isfinite(stages[-1].objective):
                break
            starts, given = ([v.unsqueeze(0) for v in vs] for vs in (stages[-1].variables, stages[-1].given))
            stages.append(self._minimised(problem, starts, given, stage, deadline))
        last = stages[-1]
        found = replace(
            stages[0],
            variables=last.variables,
            given=last.given,
            objective=last.objective,
            steps=sum(stage.steps for stage in stages),
        )
        if not math.isfinite(found.objective):
            raise ValueError(
                f"no start of {self.name} had a finite objective in {self.restarts} starts: check the update"
            )
        _log.debug("%s: objective %.2e after %d iterations", self.name, found.objective, found.steps)
        return problem.result(found)

    def _minimised(
        self,
        problem: "_Problem",
        starts: Sequence[Tensor],
        given: Sequence[Tensor],
        stage: int,
        deadline: float,
    ) -> Descended:
        objective = problem.objective(vectorisable=True, stage=stage)
        one_by_one = problem.objective(vectorisable=False, stage=stage)
        if self.optimizer == "lbfgs":
            return descend_quasi_newton(
                objective,
                starts,
                Quasi(self.iterations // (self.anneal + 1), self.history),
                given=given,
                halve=self.halve,
                deadline=deadline,
                one_by_one=one_by_one,
            )
        box = (-BOUND, BOUND) if self.has_box else None
        return descend(
            objective,
            starts,
            self._descent(),
            boxes=[box, None][: len(starts)],
            given=given,
            halve=self.halve,
            deadline=deadline,
            one_by_one=one_by_one,
        )


@dataclass(frozen=True, eq=False)
class _Problem:
    """One update to invert: the model, what is sought, and how its examples are laid out in time."""

    attack: Inversion
    ctx: RoundContext
    model: nn.Module
    names: list[str]
    sought: Tensor
    sizes: list[int]
    epochs: list[list[int]]
    shared: bool
    labels: Tensor | None
    steps: int
    bn_layers: int
    bn: Callable[[Tensor], Tensor] | None = field(default=None)

    @classmethod
    def of(cls, attack: Inversion, update: ClientUpdate, ctx: RoundContext) -> "_Problem":
        if ctx.build_model is None or ctx.loss is None or ctx.input_shape is None or ctx.num_classes is None:
            raise ValueError(
                f"{attack.name} needs the model, the loss, the input shape and the classes: state them"
            )
        if not ctx.batch_size:
            raise ValueError(f"{attack.name} needs a positive batch size, got {ctx.batch_size}: state it")
        dtype = torch.float64 if attack.precision == "double" else torch.float32
        model = broadcast_model(update, ctx.build_model(), attack.mode).to(ctx.device, dtype)
        gradient = update.gradient(ctx)
        steps = ctx.steps(update) or 1
        known = update.num_examples if update.num_examples > 0 else ctx.batch_size
        batch = min(ctx.batch_size, known)
        epochs = epoch_batches(known, ctx.batch_size, steps) if attack.unrolls else [[batch]]
        models = [model] if len(epochs) == len(epochs[0]) == 1 else [model, returned_model(model, update)]
        labels = labels_for(attack.labels, attack.classes, gradient, models, sum(epochs[0]), ctx)
        bn_layers = len(batch_norms(model))
        bn = bn_statistics(model) if attack.bn else None
        forget_running_statistics(model)
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        matched = [name for name in trainable if name in gradient]
        _, target = paired(copy.deepcopy(model), gradient)
        sought = flat(target)
        norm = float(sought.norm())
        if not math.isfinite(norm) or norm == 0:
            raise ValueError(f"an update to invert must be finite and not zero, got norm {norm}: skip it")
        return cls(
            attack,
            ctx,
            model,
            matched,
            sought,
            [t.numel() for t in target],
            epochs,
            # one batch an epoch: order does not matter, so epochs share their images
            len(epochs[0]) == 1 or attack.epoch_order == "fixed",
            None if labels is None else labels.to(ctx.device),
            steps,
            bn_layers,
            bn,
        )

    @property
    def per_epoch(self) -> list[int]:
        """Images of each epoch that has its own."""
        return [sum(sizes) for sizes in (self.epochs[:1] if self.shared else self.epochs)]

    def batches(self) -> list[slice]:
        """Which of the images each step uses."""
        runs = self.epochs if self.shared else [list(itertools.chain.from_iterable(self.epochs))]
        ends = [list(itertools.accumulate(sizes, initial=0)) for sizes in runs]
        return [slice(a, b) for run in ends for a, b in itertools.pairwise(run)]

    def starts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Variables and constants of each restart.

        Standard normal inputs (R, N, *input_shape), and label logits (R, N, C) where labels are optimised;
        otherwise the labels (R, N) are constants.
        """
        count, shape, classes = sum(self.per_epoch), self.ctx.input_shape or (), self.ctx.num_classes or 0
        inputs: list[Tensor] = []
        logits: list[Tensor] = []
        labels: list[Tensor] = []
        for restart in range(self.attack.restarts):
            generator = start_generator(self.attack.name, self.ctx.seed, restart)
            inputs.append(
                self.attack.spread * torch.randn(count, *shape, generator=generator).to(self.sought)
            )
            if self.labels is None:
                logits.append(torch.randn(count, classes, generator=generator).to(self.sought))
            else:
                labels.append(self._slots(self.labels, restart, generator))
        if self.labels is None:
            return [torch.stack(inputs), torch.stack(logits)], []
        return [torch.stack(inputs)], [torch.stack(labels)]

    def inputs(self, z: Tensor) -> Tensor:
        """The optimiser's variables in the units of the data."""
        low, high = self.ctx.value_range
        return (low + high) / 2 + UNIT * (high - low) * z

    def _slots(self, labels: Tensor, restart: int, generator: torch.Generator) -> Tensor:
        """A label for each image: those of an epoch, the same in every epoch.

        Which batch a derived label was in is unknown: the first restart deals them to the batches in turn,
        the others at random.
        """
        if self.attack.labels != "known" and len(self.epochs[0]) > 1:
            order = torch.randperm(len(labels), generator=generator).to(labels.device)
            labels = labels[order] if restart else dealt(labels, self.epochs[0])
        return torch.cat([labels[:n] for n in self.per_epoch])

    def objective(self, *, vectorisable: bool, stage: int = 0) -> Callable[..., Tensor]:
        """What one restart minimises: a function of its inputs, and of its labels or label logits."""
        attack, loss = self.attack, self.ctx.loss
        assert loss is not None
        imagine = imagined_update(
            self.model, loss, self.names, self.batches(), self.ctx.lr or 0.0, vectorisable=vectorisable
        )
        distance: Distance = distance_of(attack.objective, self.sizes)
        scale = layer_scale(self.sizes, attack.layer_weights)
        if scale is not None:
            scale = scale.to(self.sought)
        sought = self.sought if scale is None else scale * self.sought
        complete = [n for n in self.per_epoch if n == self.per_epoch[0]]
        tv, rounding = attack.tv / 10**stage, ROUNDING if attack.optimizer == "lbfgs" else 0.0
        filters = None
        if attack.epoch_features == "conv" and attack.epoch_prior:
            filters = random_filters(self.ctx.input_shape or (), self.ctx.seed)
            filters = None if filters is None else filters.to(self.sought)

        def objective(z: Tensor, y: Tensor) -> Tensor:
            x = self.inputs(z)
            found = imagine(x, y.softmax(dim=-1) if y.is_floating_point() else y)
            value = distance(found if scale is None else scale * found, sought)
            if tv:
                value = value + tv * total_variation(z, rounding)
            if attack.l2:
                value = value + attack.l2 * mean_square(z)
            if attack.clip and not attack.has_box:
                value = value + attack.clip * clip_penalty(z, -BOUND, BOUND)
            if self.bn is not None:
                value = value + attack.bn * self.bn(x)
            if attack.epoch_prior and len(complete) > 1:
                epochs = torch.split(z[: sum(complete)], complete)
                value = value + attack.epoch_prior * epoch_disagreement(epochs, filters)
            return value

        return objective

    def result(self, found: Descended) -> Reconstruction:
        """The images of one epoch, epochs averaged, and what was assumed."""
        attack = self.attack
        x = self.inputs(found.variables[0]).to("cpu", torch.float32)
        y = found.given[0] if found.given else found.variables[1].argmax(dim=-1)
        images = averaged(list(torch.split(x, self.per_epoch)))
        conditions: dict[str, float | int | str | bool] = {
            "labels": attack.labels,
            "optimizer": attack.optimizer,
            "batch-size": max(self.epochs[0]),
            "local-steps": self.steps,
            "batchnorm-mode": attack.mode,
            "bn-layers": self.bn_layers,
            "restarts": attack.restarts,
            "survivors": found.survivors,
            "best-restart": found.restart,
            "restarts-together": found.together,
        }
        if found.hindrance:
            conditions["not-vectorised"] = found.hindrance
        if attack.unrolls:
            conditions |= {"unrolled-steps": sum(map(len, self.epochs)), "local-epochs": len(self.epochs)}
            if len(self.epochs) > 1:
                conditions["epoch-order"] = attack.epoch_order
        elif self.steps > 1:
            conditions["warning"] = MULTI_STEP
        return Reconstruction(images, y[: len(images)].cpu(), found.objective, found.steps, conditions)
