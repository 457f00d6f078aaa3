"""The registered measure of gradient sensitivity: one estimate per round, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedaudit.measures.cohort import same_weights
from fedaudit.measures.draws import generator_for
from fedaudit.measures.options import check_at_least
from fedaudit.measures.probes import (
    MINIMUM_PROBES,
    ProbeMean,
    interval,
    mean_over_examples,
    random_subset,
)
from fedaudit.measures.sensitivity import batch_sensitivity, gradient_sensitivity
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Estimate, Observer, RoundContext

Extra = dict[str, float | int | str | bool]


@dataclass(frozen=True)
class GradientSensitivity:
    """How strongly the gradient of one example, and each layer's part of it, responds to that example.

    The value is the mean over examples of |J|_F |x| / |g| (relative) or |J|_F (not), J the derivative by
    the input of the whole gradient g of one example, at the broadcast weights and in evaluation mode;
    `layers` holds the same for each layer's own gradient. See `fedaudit.measures.sensitivity`; in the
    spirit of Mo et al. 2021 (arXiv 2105.13929). It says where in the model a gradient reacts to its input,
    before clipping, noise or other protection. It is no bound on what an attack recovers, and the absolute
    one follows the scale of loss, inputs and stage of training: compare layers or rounds of one task.

    The whole gradient's relative value is not a mean of the layers': each is relative to its own gradient.

    `extra` has the other of the two, the probes' standard errors, and a batch of min(batch size, examples):
    "batch-absolute" is the response of the batch's MEAN gradient to one of its examples (root mean square),
    which is smaller by "batch-factor" = 1 / "batch-size" than an example's own gradient's; "batch-relative"
    the response to all inputs, relative to the mean gradient and to all inputs. Examples whose gradient is
    exactly zero although J is not have no relative value: they are left out of its means and counted
    ("infinite").

    Observers: a server uses its reference examples, a client its own, an oracle examples of all clients, as
    evenly as possible and `examples` in total. A client that reports the value gives away a function of its
    examples that no noise covers.

    (low, high) is the 95 % interval of the probes for the chosen examples, not of the choice of examples.

    Attributes:
        probes: random vectors per example.
        relative: whether value and layers are relative.
        examples: largest number of examples, drawn at random.
    """

    probes: int = 8
    relative: bool = True
    examples: int = 64

    name: ClassVar[str] = "gradient-sensitivity"
    unit: ClassVar[str] = "1"
    scope: ClassVar[Literal["client", "round"]] = "round"
    observers: ClassVar[tuple[Observer, ...]] = ("server", "client", "oracle")

    def __post_init__(self) -> None:
        check_at_least(self, probes=MINIMUM_PROBES, examples=1)

    def needs(self, observer: Observer) -> Needs:
        """The model and examples: the client's own, or a server's reference."""
        return Needs.MODEL | (Needs.REFERENCE if observer == "server" else Needs.EVIDENCE)

    def __call__(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Estimate]:
        """Exactly one estimate.

        Raises:
            ValueError: if the clients started from different weights.
        """
        if ctx.build_model is None or ctx.loss is None:
            raise ValueError(f"{self.name} needs the model and the loss: give build_model and loss")
        starts = len(same_weights(updates))
        if starts != 1:
            raise ValueError(
                f"{self.name} is a quantity of the weights broadcast to all clients of a round, got {starts} "
                "different ones: measure clients that started alike"
            )
        with torch.random.fork_rng(devices=[]):  # initial weights are not used: leave no trace of them
            model = ctx.build_model().to(ctx.device).eval()
        model.load_state_dict(dict(updates[0].before))
        x, y, origin, key = self._examples(updates, ctx)
        found = gradient_sensitivity(
            model, ctx.loss, x, y, self.probes, generator_for(ctx, self.name, "probes", key)
        )
        whole = found.whole()
        both = {"absolute": whole.absolute(), "relative": whole.relative()}
        means = {name: _mean(_row(each, 0)) for name, each in both.items()}
        chosen = "relative" if self.relative else "absolute"
        value, error = means[chosen]
        by_layer = found.relative() if self.relative else found.absolute()
        extra: Extra = {"value-is": chosen, "standard-error": error, "probes": self.probes}
        for name, (mean, deviation) in means.items():
            extra |= {name: mean, f"{name}-standard-error": deviation}
        extra |= {"method": found.method, "examples": len(x), **origin}
        extra["infinite"] = int(both["relative"].mean.isinf().sum())

        size = min(ctx.batch_size or len(x), len(x))
        batch = random_subset(len(x), size, generator_for(ctx, self.name, "batch", key)).to(x.device)
        signs = generator_for(ctx, self.name, "batch-probes", key)
        mean_gradient = batch_sensitivity(model, ctx.loss, x[batch], y[batch], self.probes, signs).whole()
        extra |= {
            "batch-size": size,
            "batch-factor": 1 / size,
            "batch-absolute": float(mean_gradient.absolute().mean) / size**0.5,
            "batch-relative": float(mean_gradient.relative().mean),
        }
        layers = {layer: _mean(_row(by_layer, place))[0] for place, layer in enumerate(found.layers)}
        return [Estimate(value, self.unit, "estimate", *interval(value, error), extra, layers)]

    def _examples(
        self, updates: Sequence[ClientUpdate], ctx: RoundContext
    ) -> tuple[Tensor, Tensor, Extra, int]:
        """The chosen examples, whose they are, and the key of their random draws."""
        key = updates[0].client_id if ctx.observer == "client" else -1
        generator = generator_for(ctx, self.name, "examples", key)
        if ctx.observer == "server" and ctx.reference is not None:
            sources = [ctx.reference]
        elif ctx.observer != "server" and ctx.evidence is not None:
            found = [ctx.evidence(update) for update in updates]
            sources = [(evidence.x, evidence.y) for evidence in found]
        else:
            raise ValueError(f"{self.name} lacks what observer {ctx.observer!r} needs: see needs()")
        shares = even_shares([len(x) for x, _ in sources], self.examples, generator)
        parts = []
        for (x, y), share in zip(sources, shares, strict=True):
            chosen = random_subset(len(x), share, generator).to(x.device)
            parts.append((x[chosen].to(ctx.device), y[chosen].to(ctx.device)))
        origin: Extra = {"examples-of": "reference" if ctx.observer == "server" else "client"}
        if ctx.observer == "oracle":
            origin["clients"] = sum(share > 0 for share in shares)
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]), origin, key


def even_shares(sizes: Sequence[int], total: int, generator: torch.Generator) -> list[int]:
    """How many of each party's examples to take: at most `total`, as evenly as sizes allow.

    Parties take turns, in random order, until `total` are taken or none has more.

    >>> even_shares([2, 9, 9], 8, torch.Generator())
    [2, 3, 3]
    """
    shares = [0] * len(sizes)
    left = min(total, sum(sizes))
    order = torch.randperm(len(sizes), generator=generator).tolist()
    while left:
        for party in order:
            if left and shares[party] < sizes[party]:
                shares[party] += 1
                left -= 1
    return shares


def _row(values: ProbeMean, layer: int) -> ProbeMean:
    """One layer's values (B,)."""
    return ProbeMean(values.mean[layer], values.standard_error[layer])


def _mean(values: ProbeMean) -> tuple[float, float]:
    """Mean over the examples that have a value, and its standard error."""
    finite = values.mean.isfinite()
    if not bool(finite.any()):
        return float(values.mean.mean()), 0.0
    return mean_over_examples(ProbeMean(values.mean[finite], values.standard_error[finite]))
