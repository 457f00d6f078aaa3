"""Usable information: nats that a stated family of decoders finds in each layer's released gradient.

    I_V(G -> Z) = H_V(Z) - H_V(Z | G),    H_V(Z | G) = inf over f in V of E[-ln f[G](Z)]

with H_V(Z) the same without G (Xu et al. 2020, arXiv 2002.10689), estimated as the mean gain in likelihood on
held-out examples by the f fitted to others. Layer by layer in the spirit of Mo et al., arXiv 2105.13929.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fedaudit.maths.linear_probes import LogisticProbe, RidgeDecoder, fit_logistic, fit_ridge, log_ratio
from fedaudit.measures.attributes import check_attribute, follows_label, latent_attribute
from fedaudit.measures.draws import generator_for
from fedaudit.measures.layer_coordinates import layer_coordinates
from fedaudit.measures.options import check_at_least
from fedaudit.measures.released_directions import (
    batch_members,
    direction_features,
    second_degree_features,
)
from fedaudit.measures.round_examples import RoundExamples, broadcast_model, round_examples
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Estimate, Observer, RoundContext, Skip

MINIMUM_EXAMPLES = 40
MINIMUM_EACH = 10  # with and without an attribute: five to train on, two to validate, three held out
_SHARES = (0.5, 0.2)  # of the examples, to train and to validate on; the rest is held out
_RESAMPLES = 200
_VARIES = 0.01  # a pixel whose training variance is below this share of the pixels' mean is left out
_NAMES = {"input": "usable-information", "attribute": "usable-attribute-information"}

Parts = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Usable:
    """Usable information on held-out examples, and the decoder that found it.

    Attributes:
        nats: the estimate; negative where the decoder is misled.
        low: lower end of the 95 % bootstrap interval over held-out examples.
        high: upper end.
        alternative: position of the features that the decoder uses.
        decoder: the fitted one.
    """

    nats: float
    low: float
    high: float
    alternative: int
    decoder: RidgeDecoder | LogisticProbe


def split_examples(groups: Tensor, generator: torch.Generator) -> Parts:
    """Disjoint positions to train on (50 %), to validate on (20 %) and to hold out (30 %) of every group.

    Args:
        groups: group of each example (n,), e.g. whether it has an attribute; all alike for a plain split.
        generator: source of the draws.

    >>> parts = split_examples(torch.zeros(40), torch.Generator().manual_seed(0))
    >>> [len(part) for part in parts]
    [20, 8, 12]
    """
    pieces: list[tuple[Tensor, ...]] = []
    for group in sorted(set(groups.tolist())):
        (members,) = torch.nonzero(groups == group, as_tuple=True)
        members = members[torch.randperm(len(members), generator=generator)]
        sizes = [round(share * len(members)) for share in _SHARES]
        pieces.append(torch.split(members, [*sizes, len(members) - sum(sizes)]))
    train, validation, held_out = (torch.cat(part) for part in zip(*pieces, strict=True))
    return train, validation, held_out


def usable_input_information(
    alternatives: Sequence[Tensor], x: Tensor, parts: Parts, generator: torch.Generator
) -> Usable:
    """Nats that ridge regression finds about the input: sum over d of 1/2 ln(Var(x_d) / MSE_d).

    V: Gaussian decoders whose mean is linear in one of the `alternatives` (`fit_ridge`), with one variance
    per target. Var and MSE are of the held-out examples, Var about the training mean, so the value is 0 for a
    decoder that ignores its features. It is monotone in the quality of the decoded input. It is not mutual
    information: what neighbouring pixels share counts in each, and another V finds more or less.

    Args:
        alternatives: one or more sets of features (n, d), of which the validation rows choose one.
        x: targets (n, D).
        parts: positions to train on, to validate on and to hold out.
        generator: source of the bootstrap.

    Raises:
        ValueError: if features are not finite.

    >>> x = torch.randn(400, 1, generator=torch.Generator().manual_seed(0))
    >>> parts = (torch.arange(200), torch.arange(200, 300), torch.arange(300, 400))
    >>> usable_input_information([2 * x + 1], x, parts, torch.Generator()).nats > 5
    True
    """
    train, validation, held_out = parts
    x = x.double()
    found: list[tuple[float, int, RidgeDecoder]] = []
    for position, features in enumerate(alternatives):
        rows = features.double()
        decoder = fit_ridge((rows[train], x[train]), (rows[validation], x[validation]))
        found.append((decoder.score, -position, decoder))
    _, position, decoder = max(found, key=lambda entry: entry[:2])
    predicted = decoder(alternatives[-position][held_out].double())
    without, error = (x[held_out] - decoder.offset).square(), (x[held_out] - predicted).square()
    nats = log_ratio(without.mean(0), error.mean(0)).sum()
    counts = _resampled(len(held_out), generator)
    values = log_ratio(counts @ without, counts @ error).sum(1)
    return Usable(float(nats), *_interval(values), -position, decoder)


def usable_attribute_information(
    alternatives: Sequence[Tensor], attribute: Tensor, parts: Parts, generator: torch.Generator
) -> Usable:
    """Nats that logistic regression finds about a binary attribute: CE(prior) - CE(f), at most about H(Z).

    V: logistic regression with an L2 penalty on one of the `alternatives` (`fit_logistic`). Both
    cross-entropies are of the held-out examples; the prior is the attribute's share among training examples.

    Args:
        alternatives: one or more sets of features (n, d), of which the validation rows choose one.
        attribute: booleans (n,).
        parts: positions to train on, to validate on and to hold out.
        generator: source of the bootstrap.

    Raises:
        ValueError: if the training examples all agree on the attribute, or features are not finite.
    """
    train, validation, held_out = parts
    found: list[tuple[float, int, LogisticProbe]] = []
    for position, features in enumerate(alternatives):
        rows = features.double()
        probe = fit_logistic((rows[train], attribute[train]), (rows[validation], attribute[validation]))
        found.append((probe.score, -position, probe))
    _, position, probe = max(found, key=lambda entry: entry[:2])
    z = attribute[held_out].double()
    prior = torch.logit(attribute[train].double().mean()).expand_as(z)
    odds = probe(alternatives[-position][held_out].double())
    gains = binary_cross_entropy_with_logits(prior, z, reduction="none")
    gains = gains - binary_cross_entropy_with_logits(odds, z, reduction="none")
    values = _resampled(len(z), generator) @ gains / len(z)
    return Usable(float(gains.mean()), *_interval(values), -position, probe)


def binary_entropy(share: float) -> float:
    """Entropy in nats of a binary attribute that this share of examples has.

    >>> binary_entropy(0.5)
    0.693147
    """
    return -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)


def _resampled(n: int, generator: torch.Generator) -> Tensor:
    """How often each of n examples is in each bootstrap sample (resamples, n)."""
    drawn = torch.randint(n, (_RESAMPLES, n), generator=generator)
    counts = torch.zeros(_RESAMPLES, n, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def _interval(values: Tensor) -> tuple[float, float]:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


@dataclass
class UsableInformation:
    """Nats that decoders find in one step's released gradient about an example (server, client, oracle).

    target "input": Gaussian decoders reconstruct the example's pixels (`usable_input_information`); measure
    "usable-information". target "attribute": a logistic probe tells a latent attribute
    (`usable_attribute_information`), beside H(Z) and the value as a share of it; measure
    "usable-attribute-information". The value is that of the whole gradient, `layers` has each layer alone.

    What is released: the sum of clipped per-example gradients of `batch` examples at the broadcast weights
    plus the noise of one step. Z belongs to one example of the batch, the others are drawn at random among
    the examples of the same part. With batch=1 everybody else in the step is known and subtracted, which is
    the observer of differential privacy; a larger batch hides an example among others. A layer may tell more
    than the whole, whose direction is mostly that of the layers with the longest gradients.

    V, the decoders: ridge (or L2-penalised logistic) regression on at most `dims` principal components of
    the gradient's direction, or of products of pairs of them, degree and penalty chosen on validation
    examples. Components, decoder and penalty never see held-out examples. Another V finds more or less: an
    attack that optimises per example is not in it, so a low value is no bound on what can be recovered. The
    value grows with the number of training examples: compare rounds, layers and defenses only at equal sizes.
    Held-out estimates may be negative and stay so; low and high are a bootstrap over held-out examples.

    Observers: a client uses its own examples, an oracle those of all clients, a server its reference examples
    under the least protected release among the clients. A server's value says what the clients' gradients
    would tell about data like the reference.

    Sources: Xu et al. 2020, arXiv 2002.10689; per layer in the spirit of Mo et al., arXiv 2105.13929.

    Attributes:
        target: "input" or "attribute".
        attribute: "brightness", "contrast" or "label:K", for target "attribute".
        batch: examples in the step.
        dims: largest number of features.
        examples: largest number of examples, drawn evenly from the clients.
        chunk: examples per forward and backward pass.
    """

    target: Literal["input", "attribute"] = "input"
    attribute: str = "brightness"
    batch: int = 1
    dims: int = 64
    examples: int = 256
    chunk: int = 64
    name: str = field(default=_NAMES["input"], init=False, repr=False)
    unit: str = field(default="nats", init=False, repr=False)
    scope: Literal["client", "round"] = field(default="round", init=False, repr=False)
    observers: tuple[Observer, ...] = field(default=("server", "client", "oracle"), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.target not in _NAMES:
            raise ValueError(f"target is input or attribute, got {self.target!r}: choose one")
        check_attribute(self.attribute)
        check_at_least(self, batch=1, dims=1, examples=MINIMUM_EXAMPLES, chunk=1)
        self.name = _NAMES[self.target]

    def needs(self, observer: Observer) -> Needs:
        """Examples, the model, and how a single client's step is released."""
        if observer == "server":
            return Needs.REFERENCE | Needs.MODEL | Needs.RELEASE | Needs.SINGLE
        return Needs.EVIDENCE | Needs.MODEL

    def __call__(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Estimate | Skip]:
        """One estimate for the round, or a Skip where there are too few examples."""
        if not updates:
            return []
        used = round_examples(updates, ctx, self.examples, self.name)
        try:
            z = self._attribute(used)
            parts = split_examples(z, generator_for(ctx, self.name, "split", used.key))
            members = batch_members(parts, self.batch, generator_for(ctx, self.name, "batches", used.key))
        except ValueError as error:
            return [Skip(f"{self.name} cannot split its examples: {error}")]
        pixels = used.x.flatten(1).cpu().double()
        variances = pixels[parts[0]].var(0, correction=0)
        pixels = pixels[:, variances > _VARIES * variances.mean()]
        if self.target == "input" and not pixels.shape[1]:
            return [Skip(f"{self.name} needs inputs that vary, got {len(parts[0])} equal ones to train on")]
        model, loss = broadcast_model(ctx, used.weights)
        release, noise_std = used.release, used.release.noise_std
        found = layer_coordinates(
            model,
            loss,
            used.x,
            used.y,
            clip_norm=release.clip_norm,
            per_layer=release.per_layer,
            chunk=self.chunk,
        )

        def measured(rows: Tensor, dimensions: int, where: str) -> Usable:
            generator = generator_for(ctx, self.name, where, used.key)
            first = direction_features(
                members @ rows,
                parts[0],
                self.dims,
                noise_std=noise_std,
                dimensions=dimensions,
                generator=generator,
            )
            alternatives = [first, second_degree_features(first, parts[0], self.dims)]
            if self.target == "input":
                return usable_input_information(alternatives, pixels, parts, generator)
            return usable_attribute_information(alternatives, z, parts, generator)

        whole = measured(found.whole, sum(found.sizes.values()), "whole")
        layers = {
            layer: measured(rows, found.sizes[layer], layer).nats for layer, rows in found.layers.items()
        }
        best = max(layers, key=lambda layer: layers[layer])
        extra: dict[str, float | int | str | bool] = {
            "target": self.target,
            "decoder": "ridge" if self.target == "input" else "logistic",
            "degree": whole.alternative + 1,
            "dims": self.dims,
            "batch": self.batch,
            "examples-train": len(parts[0]),
            "examples-validation": len(parts[1]),
            "examples-held-out": len(parts[2]),
            "best-layer": best,
            "best-layer-nats": layers[best],
            **self._about_target(whole, z, pixels.shape[1], used),
            **used.described,
        }
        return [Estimate(whole.nats, self.unit, "estimate", whole.low, whole.high, extra, layers)]

    def _attribute(self, used: RoundExamples) -> Tensor:
        """The attribute of each example, all alike where it is not the target.

        Raises:
            ValueError: if there are too few examples, or too few with or without the attribute.
        """
        n = len(used.x)
        if n < MINIMUM_EXAMPLES:
            raise ValueError(f"at least {MINIMUM_EXAMPLES} are needed, got {n}: give more examples")
        if self.target == "input":
            return torch.zeros(n, dtype=torch.bool)
        z = latent_attribute(self.attribute, used.x, used.y).cpu()
        have = int(z.sum())
        if min(have, n - have) < MINIMUM_EACH:
            raise ValueError(
                f"at least {MINIMUM_EACH} with and without {self.attribute} are needed, got {have} and "
                f"{n - have}: give more examples or choose another attribute"
            )
        return z

    def _about_target(
        self, whole: Usable, z: Tensor, pixels: int, used: RoundExamples
    ) -> dict[str, float | int | str | bool]:
        if isinstance(whole.decoder, RidgeDecoder):
            return {
                "inputs": pixels,
                "nats-per-input": whole.nats / pixels,
                "ridge-share": whole.decoder.share,
            }
        entropy = binary_entropy(float(z.double().mean()))
        return {
            "attribute": self.attribute,
            "attribute-is-label": follows_label(z, used.y.cpu()),
            "entropy": entropy,
            "normalised": whole.nats / entropy,
            "penalty": whole.decoder.penalty,
        }


def usable_attribute(
    attribute: str = "brightness", batch: int = 1, dims: int = 64, examples: int = 256, chunk: int = 64
) -> UsableInformation:
    """The measure about a latent attribute, registered as "usable-attribute-information"."""
    return UsableInformation("attribute", attribute, batch, dims, examples, chunk)
