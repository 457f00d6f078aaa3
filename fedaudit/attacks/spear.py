"""SPEAR: whole batches, exactly, from the gradient of a fully connected first layer followed by ReLU."""

import logging
import math
import time
from dataclasses import dataclass

import torch

from fedaudit.attacks.replay import (
    Intercepted,
    Mode,
    gradient_residual,
    intercept,
    labels_by_slopes,
    obstacle_of,
    rounding,
)
from fedaudit.attacks.separation import numerical_rank, separate
from fedaudit.attacks.tracing import Call
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Reconstruction, RoundContext

_log = logging.getLogger(__name__)

_ONE_STEP, _SEVERAL_STEPS = 0.003, 0.1  # shares of units that may contradict the slopes


@dataclass(frozen=True)
class Spear:
    """Exact recovery of a whole batch from the first fully connected layer, if ReLU follows it.

    The number of examples is the numerical rank of that layer's gradient. Known rounding of the update's
    number format sets the tolerances; where the rank exceeds the examples that can be behind the update,
    the rest is taken as noise. Labels are those whose gradient at the layer fits the slopes found. Only
    plain SGD sends the gradient assumed here. Several local steps still have this structure, one direction
    per distinct example, but weights that move between steps blur the labels and the objective.

    A failure is NOT evidence of privacy: it says that this search ended without success.

    Source: Dimitrov, Baader, Mueller, Vechev 2024, arXiv 2403.03945; see `separate` for what differs.

    Attributes:
        tau: smallest share of units that are off for an example.
        submatrices: budget of the search.
        mode: "train" or "eval": how normalisation layers ran in the client; dropout is always off.
        seconds: time budget per update; 0 is no limit.
    """

    tau: float = 0.1
    submatrices: int = 30_000
    mode: Mode = "train"
    seconds: float = 0.0

    survives_steps = True
    name = "spear"
    needs = Needs.MODEL | Needs.TRAINING | Needs.SHAPE

    def __post_init__(self) -> None:
        if not 0 <= self.tau < 1:
            raise ValueError(f"tau is a share of units from 0 to below 1, got {self.tau}: use e.g. 0.1")
        if self.submatrices < 1:
            raise ValueError(f"submatrices must be positive, got {self.submatrices}: use e.g. 30000")
        if self.seconds < 0:
            raise ValueError(f"seconds must not be negative, got {self.seconds}: use 0 for no limit")

    def obstacle(self, update: ClientUpdate, ctx: RoundContext) -> str:
        """Why this model or batch is out of its reach; empty if it is not."""
        return obstacle_of(lambda: self._layer(intercept(self.name, update, ctx, self.mode)))

    def _layer(self, seen: Intercepted) -> tuple[Call, torch.nn.Linear]:
        """The first layer, if it is Linear with ReLU behind it and large enough for the batch."""
        layer = seen.seen.first_linear(self.name)
        if not seen.seen.feeds_relu_only(layer):
            raise ValueError(
                f"spear needs ReLU, and nothing else, behind {layer}: choose linear-layer or dlg"
            )
        linear = seen.model.get_submodule(layer.name)
        assert isinstance(linear, torch.nn.Linear)
        most = min(linear.weight.shape)
        if seen.examples > most:
            raise ValueError(
                f"spear separates at most min(units, inputs) = {most} examples of {layer}, got "
                f"{seen.examples}: choose another attack"
            )
        return layer, linear

    def reconstruct(self, update: ClientUpdate, ctx: RoundContext) -> Reconstruction:
        """The batch (b, *input_shape) in no particular order; b is the numerical rank.

        Raises:
            ValueError: if the first layer is not Linear with bias and ReLU, more examples than min(M, N) can
                be behind the update, or the search ends without all of them.
        """
        deadline = time.monotonic() + self.seconds if self.seconds else math.inf
        seen = intercept(self.name, update, ctx, self.mode)
        layer, linear = self._layer(seen)
        weight, bias = seen.of(layer.name)
        if not bool(weight.any()):
            raise ValueError(f"the gradient of {layer} must not be zero, got zero: skip this update")
        key = f"{layer.name}.weight" if layer.name else "weight"
        noise = rounding(update, ctx, key)
        rank, _ = numerical_rank(weight, noise)
        stated, steps = seen.examples, ctx.steps(update) or 1
        if rank > stated:  # noise that the number format does not explain
            rest = torch.linalg.svdvals(weight)[stated:].square().sum()
            noise = math.sqrt(float(rest) / math.prod(side - stated for side in weight.shape))
            rank = min(stated, numerical_rank(weight, noise)[0])
            if rank == 0:
                raise ValueError(f"the gradient of {layer} does not stand above its noise: skip this update")
        parts = separate(
            weight,
            bias,
            linear.weight.detach(),
            linear.bias.detach(),
            rank,
            torch.Generator().manual_seed(ctx.seed),
            noise=noise,
            tau=self.tau,
            mismatch=_ONE_STEP if steps == 1 else _SEVERAL_STEPS,
            submatrices=self.submatrices,
            deadline=deadline,
        )
        x = parts.x.reshape(rank, *seen.seen.x.shape[1:])
        y = labels_by_slopes(seen, layer.name, x, parts.slopes * stated)
        on = linear(parts.x) > 0
        agreement = float((on == (parts.slopes != 0)).double().mean())
        objective = gradient_residual(seen, x, y)
        _log.debug("spear: residual %.2e after %d submatrices", objective, parts.submatrices)
        conditions: dict[str, float | int | str | bool] = {
            "labels": "estimated",
            "batch-size": stated,
            "local-steps": steps,
            "batchnorm-mode": self.mode,
            "layer": layer.name,
            "numerical-rank": rank,
            "sparsity": float(parts.zeros.mean()),
            "relu-agreement": agreement,
            "noise-std": noise,
            "submatrices": parts.submatrices,
        }
        if steps > 1:
            conditions["warning"] = "weights moved between local steps: labels and objective are approximate"
        return Reconstruction(x.cpu().to(torch.float32), y.cpu(), objective, parts.submatrices, conditions)
