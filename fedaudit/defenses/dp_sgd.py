"""Opacus DP-SGD inside the client: an example-level guarantee, also against the server."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from fedaudit.accounting import Accountant, Ledger, epsilon, noise_multiplier_for
from fedaudit.defenses.base import Settings
from fedaudit.errors import BudgetExhaustedError
from fedaudit.types import Guarantee, StepRelease

GradSample = Literal["hooks", "ghost", "auto"]


@dataclass(frozen=True)
class DPSGD:
    """Every local step clips each example's gradient and adds Gaussian noise to their sum.

    A step releases sum_i b_i g_i min(1, C/||g_i||) + N(0, (sigma C)^2 I) with b_i ~ Bernoulli(q),
    q = min(1, batch size / examples), and divides it by the expected batch size (Abadi et al. 2016,
    arXiv 1607.00133, through Opacus).

    Threat model: the presence of one example (add or remove) is protected against everybody who sees
    the updates, the server included. It is not a guarantee for a client as a whole, and it is the
    client's own: over a federation with disjoint data the largest epsilon counts, not the sum. The
    guarantee covers the weights a client sends, not scalars it reports beside them (a training loss
    is not noised). Number of examples and participation are taken to be public. No amplification from
    sampling clients is claimed. It requires Poisson sampled batches (`poisson`). Momentum, Adam,
    weight decay, a proximal term and several local steps are post-processing and cost nothing.

    With `clipping="per-layer"` each of the L trainable parameter tensors is clipped by itself, at
    C_l = C / sqrt(L) (Opacus' `per_layer`). An example still moves the sum by at most
    sqrt(sum_l C_l^2) = C, so sigma C on every coordinate gives the same epsilon. What changes is the
    bias: long layers are cut more, short ones less (`fedaudit.maths.example_clipping`).

    `grad_sample` says how the clipped sum is computed, not what it is: "hooks" is Opacus' way, with
    the gradients of every example held; "ghost" reads norms and sum off one backward pass
    (`fedaudit.defenses.ghost_clipping`), equal up to rounding; "auto" is ghost for every model whose
    layers can be watched so, else hooks. On eight models of this package ghost took 0.06 to 1 times the
    time of hooks on one CPU thread, least where linear layers are wide.

    Noise comes from the generator that is handed in. A seeded generator is for simulation: whoever
    knows the seed removes the noise. With `secure_rng` it comes from the operating system's
    cryptographic generator and resists attacks on floating-point noise (`secure_gaussian`); such a run
    cannot be repeated, and its run.toml says so. The batches still follow the run's seed.

    Attributes:
        epsilon: target and budget. The noise is the least that keeps a client that takes part in
            every round within it; a client that would exceed it stops. 0 means no target.
        delta: 0 means min(1e-5, 1 / (10 examples)): the same for all clients with up to 10 000
            examples, so that their epsilons can be compared, and always under 1 / examples.
        noise_multiplier: sigma; 0 means from epsilon. If both are given, sigma is used and epsilon is
            the budget only.
        clip_norm: C, the largest norm of one example's gradient over all parameters.
        accountant: "rdp", "prv" or "pld", see `fedaudit.accounting.epsilon`.
        clipping: "flat", or "per-layer": every parameter tensor by itself.
        grad_sample: "hooks", "ghost" or "auto".
        secure_rng: noise from the operating system, not from a seed.
        lr: learning rate of clients under this defense; 0 means the run's. Its decay stays the run's.
        batch_size: (expected) batch size of clients under this defense; 0 means the run's.

    Raises:
        ValueError: for an option out of range, or neither epsilon nor noise multiplier.

    >>> DPSGD(noise_multiplier=1.5, clip_norm=2.0).release(100, batch_size=10, planned_steps=50)
    StepRelease(clip_norm=2.0, noise_std=3.0, sample_rate=0.1)
    """

    epsilon: float = 8.0
    delta: float = 0.0
    noise_multiplier: float = 0.0
    clip_norm: float = 1.0
    accountant: Accountant = "rdp"
    clipping: Literal["flat", "per-layer"] = "flat"
    grad_sample: GradSample = "hooks"
    secure_rng: bool = False
    lr: float = 0.0
    batch_size: int = 0

    name: ClassVar[str] = "dp-sgd"
    poisson: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option in ("epsilon", "noise_multiplier", "lr", "batch_size"):
            value = getattr(self, option)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{option.replace('_', '-')} must be a number >= 0, got {value}")
        if not (self.clip_norm > 0 and math.isfinite(self.clip_norm)):
            raise ValueError(f"clip-norm must be a number > 0, got {self.clip_norm}: choose e.g. 1")
        if not 0 <= self.delta < 1:
            raise ValueError(f"delta must lie in [0, 1), got {self.delta}: 0 chooses it from the data's size")
        if not self.epsilon and not self.noise_multiplier:
            raise ValueError(
                "dp-sgd needs epsilon > 0 or noise-multiplier > 0, got 0 for both: give at least one"
            )
        if self.accountant not in ("rdp", "prv", "pld"):
            raise ValueError(f"accountant must be rdp, prv or pld, got {self.accountant!r}: choose one")
        if self.clipping not in ("flat", "per-layer"):
            raise ValueError(f"clipping must be flat or per-layer, got {self.clipping!r}: choose one")
        if self.grad_sample not in ("hooks", "ghost", "auto"):
            raise ValueError(
                f"grad-sample must be hooks, ghost or auto, got {self.grad_sample!r}: choose one"
            )

    def settings(self, agreed: Settings) -> Settings:
        """The agreed training, with this defense's own learning rate and batch size where it has them."""
        own: dict[str, Any] = {"lr": self.lr, "batch_size": self.batch_size}
        return replace(agreed, **{name: value for name, value in own.items() if value})

    def delta_for(self, num_examples: int) -> float:
        """The delta that a client's epsilon is stated at.

        Raises:
            ValueError: if the chosen delta is not under 1 / num_examples.
        """
        if num_examples < 1:
            raise ValueError(f"a client needs at least one example, got {num_examples}")
        if not self.delta:
            return min(1e-5, 1 / (10 * num_examples))
        if self.delta >= 1 / num_examples:
            raise ValueError(
                f"delta must be under 1 / examples = {1 / num_examples:.3g}, got {self.delta}: "
                "a larger one allows publishing an example outright; lower delta or set it to 0"
            )
        return self.delta

    def release(self, num_examples: int, batch_size: int, planned_steps: int) -> StepRelease:
        """Clip norm, noise on the sum, and sampling rate of one step of this client.

        Raises:
            ValueError: if delta is too large for this client or no noise reaches the target.
        """
        delta = self.delta_for(num_examples)
        sample_rate = min(1.0, batch_size / num_examples)
        noise = self.noise_multiplier or noise_multiplier_for(
            self.epsilon, delta, sample_rate, planned_steps, self.accountant
        )
        return StepRelease(
            self.clip_norm, noise * self.clip_norm, sample_rate, per_layer=self.clipping == "per-layer"
        )

    def charge(self, ledger: Ledger, release: StepRelease, steps: int, num_examples: int) -> Ledger:
        """The ledger after `steps` more steps; call it before training.

        Raises:
            BudgetExhaustedError: if its epsilon would exceed the target.
            ValueError: if the release has no noise.
        """
        after = ledger.add(release.noise_std / _clip_norm(release), release.sample_rate, steps)
        if self.epsilon:
            delta = self.delta_for(num_examples)
            reached = epsilon(after, delta, self.accountant)
            if reached > self.epsilon * (1 + 1e-6):
                spent = epsilon(ledger, delta, self.accountant)
                raise BudgetExhaustedError(
                    f"{steps} more steps would raise the client's epsilon from {spent:.4g} to {reached:.4g}, "
                    f"above its budget of {self.epsilon:.4g} at delta={delta:.1e}: it must not train again"
                )
        return after

    def guarantee(self, ledger: Ledger, num_examples: int) -> Guarantee:
        """Example-level guarantee for everything in the ledger."""
        delta = self.delta_for(num_examples)
        return Guarantee(epsilon(ledger, delta, self.accountant), delta, "example", self.accountant)

    def prepare(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        release: StepRelease,
        expected_batch_size: int,
        generator: Generator | None,
    ) -> tuple[nn.Module, Optimizer]:
        """The model with per-example gradients and an optimizer that clips, sums, noises and divides.

        Expects a mean-reduced loss. Costs a fraction of a millisecond; `restore` undoes it.

        Raises:
            ValueError: if a layer mixes examples or is not supported by Opacus, the release is not
                clipped, or there is no generator on the model's device for the noise.
        """
        from fedaudit.defenses.clipped_steps import ClippedSteps
        from fedaudit.defenses.ghost_clipping import GhostModule, takes_ghosts
        from fedaudit.defenses.per_example import PerExampleModule
        from fedaudit.opacus_parts import DPOptimizer

        clip_norm = _clip_norm(release)
        device = next(model.parameters()).device
        if (
            release.noise_std
            and not self.secure_rng
            and (generator is None or generator.device.type != device.type)
        ):
            found = "none" if generator is None else f"one on {generator.device}"
            raise ValueError(
                f"dp-sgd needs a torch.Generator on {device} for its noise, got {found}: give one"
            )
        model.train()
        _check_model(model)
        watchable = takes_ghosts(model)
        if self.grad_sample == "ghost" and not watchable:
            raise ValueError(
                "grad-sample=ghost needs layers of torch.nn, got one of opacus.layers: "
                "use grad-sample=hooks or auto"
            )
        options: dict[str, Any] = {
            "noise_multiplier": release.noise_std / clip_norm,
            "max_grad_norm": clip_norm,
            "expected_batch_size": expected_batch_size,
            "loss_reduction": "mean",
            "generator": generator,
        }
        ghosts = GhostModule(model) if watchable and self.grad_sample != "hooks" else None
        private: Optimizer
        if ghosts is None and not release.per_layer and not self.secure_rng:
            private = DPOptimizer(optimizer, **options)
        else:
            private = ClippedSteps(
                optimizer, per_layer=release.per_layer, ghosts=ghosts, secure=self.secure_rng, **options
            )
        return ghosts if ghosts is not None else PerExampleModule(model), private

    def empty_step(self, model: nn.Module) -> None:
        """No per-example gradients: the step is noise alone, and counts like any other."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]

    def restore(self, model: nn.Module) -> None:
        """Remove hooks, per-example gradients and their sums from the original model."""
        from fedaudit.defenses.per_example import PerExampleModule

        if isinstance(model, PerExampleModule):
            for parameter in model.to_standard_module().parameters():
                parameter.__dict__.pop("summed_grad", None)

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The update itself: its steps are protected already."""
        return dict(delta)


def _clip_norm(release: StepRelease) -> float:
    if release.clip_norm is None:
        raise ValueError("dp-sgd needs a clip norm, got a release without one: use this defense's release")
    return release.clip_norm


def _check_model(model: nn.Module) -> None:
    """Raise for layers that mix examples or keep statistics of them, trainable or not."""
    from fedaudit.opacus_parts import ModuleValidator

    # Opacus looks at trainable layers only: BatchNorm(affine=False) would slip through
    mixing = [
        type(layer).__name__
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) or getattr(layer, "track_running_stats", False)
    ]
    problems = [f"it has {mixing[0]}"] if mixing else [str(p) for p in ModuleValidator.validate(model)]
    if problems:
        raise ValueError(
            f"dp-sgd needs layers that treat every example by itself, but {problems[0]}: "
            "replace the layer, e.g. BatchNorm by GroupNorm"
        )
