"""The registered measure of input-loss curvature: per client, on its own or on reference examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedaudit.measures.cohort import same_weights
from fedaudit.measures.curvature import STEP, closed_form_traces, hessian_probes, memorisation_ceiling
from fedaudit.measures.draws import generator_for
from fedaudit.measures.options import check_at_least
from fedaudit.measures.piecewise_linear import curved_module
from fedaudit.measures.probes import (
    MINIMUM_PROBES,
    ProbeMean,
    interval,
    mean_over_examples,
    random_subset,
)
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Estimate, Loss, Observer, RoundContext

Extra = dict[str, float | int | str | bool]
_CLASSES_PER_PROBE = 8  # above this many the closed form's C backward passes cost more than it is worth


@dataclass(frozen=True)
class InputCurvature:
    """Mean curvature of the loss by the input, over examples, at a client's weights.

    Ravikumar et al. 2024 (arXiv 2402.18726) links it to memorisation: examples a model has memorised lie
    where the loss curves most. The value ranks clients, examples and rounds of ONE task; it depends on the
    scale of inputs, on the model and on the stage of training, and is no bound on anything. Their
    inequalities hold up to constants that grow with the number of examples and are not known.

    Observers: client and oracle use the client's own examples. A server uses its reference examples, at the
    weights each client RETURNED (at="after"): the value then differs per client because its weights do, and
    says how the client's model curves around examples that are not the client's. With at="before" all clients
    of a round have the same value on the server. The same examples and probes serve all clients there, so
    differences between clients are not due to the draw. The model is in evaluation mode.

    A client that reports the value gives away a function of its examples that no noise covers.

    For cross-entropy of logits that are piecewise linear in the input (`extra["method"]` "closed form")
    trace and trace-squared are exact; else, and for the norm always, they are means over random probes
    ("Hutchinson"), and (low, high) is the 95 % interval of the probes for the chosen examples, not of the
    choice of examples.

    Beside it, where the client states an example-level guarantee: "memorisation-ceiling",
    1 - exp(-epsilon), with its epsilon, delta, unit and accountant. It limits memorisation as Feldman defines
    it (how much having trained on an example raises the chance to classify it rightly), by theorem and
    whatever the curvature is; it is not a limit on extraction, reconstruction or membership inference. See
    `curvature.memorisation_ceiling`.

    Attributes:
        probes: random vectors per example, where probes are used.
        variant: "trace" (tr H), "trace-squared" (tr H^2) or "norm" (h E|H v|, h = 0.001).
        at: weights before local training (broadcast) or after (returned).
        examples: largest number of examples, drawn at random.
        chunk: examples per pass where probes are used; few suit a CPU's caches, a GPU likes more.
    """

    probes: int = 16
    variant: Literal["trace", "trace-squared", "norm"] = "trace"
    at: Literal["before", "after"] = "after"
    examples: int = 64
    chunk: int = 16

    name: ClassVar[str] = "input-curvature"
    unit: ClassVar[str] = "1"
    scope: ClassVar[Literal["client", "round"]] = "client"
    observers: ClassVar[tuple[Observer, ...]] = ("server", "client", "oracle")

    def __post_init__(self) -> None:
        check_at_least(self, probes=MINIMUM_PROBES, examples=1, chunk=1)
        for option, allowed in (
            ("variant", ("trace", "trace-squared", "norm")),
            ("at", ("before", "after")),
        ):
            if getattr(self, option) not in allowed:
                raise ValueError(
                    f"{option} must be one of {', '.join(allowed)}, got {getattr(self, option)!r}: choose one"
                )

    def needs(self, observer: Observer) -> Needs:
        """The model and examples: the client's own, or a server's reference."""
        return Needs.MODEL | (Needs.REFERENCE if observer == "server" else Needs.EVIDENCE)

    def __call__(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Estimate]:
        """One mean curvature per update, in order."""
        if ctx.build_model is None or ctx.loss is None:
            raise ValueError(f"{self.name} needs the model and the loss: give build_model and loss")
        with torch.random.fork_rng(devices=[]):  # initial weights are not used: leave no trace of them
            model = ctx.build_model().to(ctx.device).eval()
        shared = ctx.observer == "server" and self.at == "before"
        groups = same_weights(updates) if shared else [[position] for position in range(len(updates))]
        results: dict[int, Estimate] = {}
        for group in groups:
            update = updates[group[0]]
            model.load_state_dict(weights_of(update, self.at))
            x, y, total, key = self._examples(update, ctx)
            values, extra, exact = self._values(model, ctx.loss, x, y, ctx, key)
            extra |= {
                "at": self.at,
                "examples": len(x),
                "examples-of": "reference" if ctx.observer == "server" else "client",
            }
            for position in group:
                ceiling = _ceiling(updates[position], ctx)
                results[position] = self._estimate(values, extra | ceiling, exact and len(x) == total)
        return [results[position] for position in range(len(updates))]

    def per_example(self, update: ClientUpdate, ctx: RoundContext) -> Tensor:
        """The variant for each of the client's own examples (n,)."""
        if ctx.build_model is None or ctx.loss is None or ctx.evidence is None:
            raise ValueError(f"{self.name} needs the model, the loss and evidence: give all")
        with torch.random.fork_rng(devices=[]):
            model = ctx.build_model().to(ctx.device).eval()
        model.load_state_dict(weights_of(update, self.at))
        evidence = ctx.evidence(update)
        x, y = evidence.x.to(ctx.device), evidence.y.to(ctx.device)
        return self._values(model, ctx.loss, x, y, ctx, update.client_id)[0].mean

    def _examples(self, update: ClientUpdate, ctx: RoundContext) -> tuple[Tensor, Tensor, int, int]:
        """The chosen examples, out of how many, and the key of their random draws."""
        if ctx.observer != "server" and ctx.evidence is not None:
            evidence = ctx.evidence(update)
            x, y, key = evidence.x, evidence.y, update.client_id
        elif ctx.observer == "server" and ctx.reference is not None:
            (x, y), key = ctx.reference, -1
        else:
            raise ValueError(f"{self.name} lacks what observer {ctx.observer!r} needs: see needs()")
        chosen = random_subset(len(x), self.examples, generator_for(ctx, self.name, "examples", key))
        chosen = chosen.to(x.device)
        return x[chosen].to(ctx.device), y[chosen].to(ctx.device), len(x), key

    def _values(
        self, model: nn.Module, loss: Loss, x: Tensor, y: Tensor, ctx: RoundContext, key: int
    ) -> tuple[ProbeMean, Extra, bool]:
        """The variant for every example, what stands beside it, and whether it is free of probes."""
        if self.variant != "norm" and self._has_closed_form(model, loss, x, y):
            found = dict(zip(("trace", "trace-squared"), closed_form_traces(model, x), strict=True))
            extra: Extra = {name: float(each.mean()) for name, each in found.items()}
            value = found[self.variant]
            return ProbeMean(value, torch.zeros_like(value)), {"method": "closed form", **extra}, True
        probed = hessian_probes(
            model, loss, x, y, self.probes, generator_for(ctx, self.name, "probes", key), chunk=self.chunk
        )
        variants = {
            "trace": probed.trace(),
            "trace-squared": probed.trace_squared(),
            "norm": probed.norm(STEP),
        }
        extra = {name: float(each.mean.mean()) for name, each in variants.items()}
        extra |= {"method": "Hutchinson", "probes": self.probes, "norm-step": STEP}
        return variants[self.variant], extra, False

    def _has_closed_form(self, model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> bool:
        if curved_module(model) is not None or not x.is_floating_point():
            return False
        with torch.no_grad():
            logits = model(x)
        few = logits.ndim == 2 and logits.shape[1] <= _CLASSES_PER_PROBE * self.probes
        return few and _is_cross_entropy(loss, logits, y)

    def _estimate(self, values: ProbeMean, extra: Extra, exact: bool) -> Estimate:
        value, error = mean_over_examples(values)
        low, high = (None, None) if extra["method"] == "closed form" else interval(value, error)
        beside: Extra = {
            "variant": self.variant,
            "median": float(values.mean.quantile(0.5)),
            "max": float(values.mean.max()),
            "standard-error": error,
        }
        return Estimate(value, self.unit, "exact" if exact else "estimate", low, high, extra | beside)


def weights_of(update: ClientUpdate, at: Literal["before", "after"]) -> dict[str, Tensor]:
    """The weights a client received or returned, by name.

    >>> update = ClientUpdate(0, 1, {"w": torch.ones(1)}, {"w": torch.ones(1)}, 1)
    >>> weights_of(update, "after")
    {'w': tensor([2.])}
    """
    if at == "before":
        return dict(update.before)
    return {n: w + update.delta[n] if n in update.delta else w for n, w in update.before.items()}


def _is_cross_entropy(loss: Loss, logits: Tensor, y: Tensor) -> bool:
    """Whether the loss has cross-entropy's gradient by the logits at all these examples."""
    if y.shape != logits.shape[:1] or y.is_floating_point():
        return False
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        value = loss(leaf, y)
        if not value.requires_grad:
            return False
        (found,) = torch.autograd.grad(value, leaf)
        (expected,) = torch.autograd.grad(cross_entropy(leaf, y, reduction="sum"), leaf)
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def _ceiling(update: ClientUpdate, ctx: RoundContext) -> Extra:
    """The memorisation ceiling with all that an epsilon must travel with; empty without a guarantee."""
    guarantee = ctx.guarantee(update) if ctx.guarantee is not None else None
    if guarantee is None or guarantee.unit != "example":
        return {}
    return {
        "memorisation-ceiling": memorisation_ceiling(guarantee.epsilon),
        "epsilon": guarantee.epsilon,
        "delta": guarantee.delta,
        "privacy-unit": guarantee.unit,
        "accountant": guarantee.accountant,
    }
