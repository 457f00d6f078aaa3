"""Mutual information between a local batch and the protected gradient released for it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedaudit.measures.batch_critic import (
    BatchCritic,
    Pool,
    best_temperature,
    evaluate_critic,
    log_normaliser,
    train_critic,
)
from fedaudit.measures.batch_null import example_permutation_null, exceedance
from fedaudit.measures.batch_pools import (
    Holding,
    build_pools,
    gradient_coordinates,
    no_batch_of_sum,
    split_examples,
)
from fedaudit.measures.cohort import by_weights
from fedaudit.measures.draws import generator_for
from fedaudit.measures.mi_bounds import (
    bootstrap_interval,
    donsker_varadhan,
    gaussian_channel,
    infonce,
    top1_accuracy,
)
from fedaudit.measures.options import check_at_least
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Estimate, Observer, RoundContext, Skip, StepRelease

MINIMUM_EXAMPLES = 24
_REFERENCE = 512  # batches that set the level of the scores for Donsker-Varadhan


@dataclass(frozen=True)
class MutualInformation:
    """Nats that one local step's protected gradient gives about the batch it was computed from.

    X is a batch of b of the client's examples with their labels; Y is what one local step at the
    broadcast weights releases for it, (sum_i clip(g_i, C) + N(0, s^2 I)) / b, seen in at most `dims`
    orthonormal coordinates of gradient space. One critic per round scores pairs (X, Y). It is fitted to
    batches of one part of every client's examples, stopped on a second part and evaluated, client by
    client, on K distinct batches of a third: no example serves two purposes, and mismatched pairs come
    from the same client at the same weights. The critic sees an example's pixels, its label and, because
    every observer has the model, its gradient (`informed`). It starts as the Gaussian likelihood of the
    release and is trained from there; training is kept only where validation examples gain by it. With
    `informed=false` it must learn the map from examples to gradients from a few hundred examples: that
    value is far lower, does not decrease with noise everywhere, and says what such a critic finds, not
    what the gradient gives away.

    The value is InfoNCE on the held-out batches: how well the gradient tells WHICH OF K BATCHES produced
    it, at most ln K (`extra["ceiling"]`). Without noise, gradients of continuous data have infinite
    mutual information, so near the ceiling the value says "at least about this much", never how much
    more. It is a lower bound on I(X;Y) in expectation over the held-out batches of this client's finite
    pool, and a single value may lie above it: hence kind "estimate". It is no bound on what an attack can
    reconstruct, and says nothing about steps after the first (`extra["local-steps"]` is 1 whatever the
    client did) or about protection added to the update after training.

    Beside it: the Donsker-Varadhan value of the same scores, clipped to +-ln 512 about the level that 512
    fresh batches give (no bound at finite K, and without noise only "large"), the p-value, the top-1
    accuracy (chance 1/K), InfoNCE under the known Gaussian likelihood of Y in the same coordinates
    ("known-likelihood", where there is noise: what a perfect critic would reach), and the Gaussian-channel
    value 1/2 logdet(I + b Cov(g)/s^2) of those coordinates, which no estimate of it should exceed by more
    than its interval. The 95 % interval (low, high) covers the chance of which noise and batches were
    evaluated, given the critic and the examples; that the examples are few it does not cover.

    The p-value answers "does this gradient say anything about this batch". Its null is that what the
    critic sees of an example says nothing about the gradient the example contributes (or that the noise
    hides all of it), and it is drawn by permuting EXAMPLES: each permutation gives the held-out examples
    each other's gradients, sums the same batches from them, adds fresh noise and scores them ("null-mean"
    is their mean). Shuffling which batch goes with which observation would ask something else, whether
    THESE examples happen to be related to their gradients: batches share a few dozen examples, so a chance
    relation among those is in every batch, and twice the nominal number of false alarms follows. A large
    p-value does not say that there is no information.

    Observers: a client and an oracle use the client's own examples and release. A server does not have
    them: it uses its reference examples under each client's stated release, so its value depends on a
    client's protection and on the weights but not on that client's data; it is computed once per
    distinct release (batch size is the agreed one).

    Sources: van den Oord et al. 2018 (arXiv 1807.03748); Belghazi et al. 2018 (arXiv 1801.04062); Meng
    et al., "Real-Time Privacy Risk Measurement with Privacy Tokens". Differs from the last: evaluated on
    held-out examples against a null, where theirs is the value on the critic's own training batches.

    Attributes:
        pairs: batches per client in one critic step.
        candidates: K, held-out batches per client; fewer if a client has not as many subsets.
        batch: examples per batch b; 0 takes the federation's. Never more than half the held-out examples.
        steps: largest number of critic steps.
        hidden: width of the critic's hidden layers.
        dims: largest number of gradient coordinates, and of pixel components.
        lr: peak learning rate of the critic.
        permutations: permutations of examples behind the p-value; the smallest p is 1/(1 + permutations).
        examples: largest number of a client's examples to use, drawn at random.
        informed: whether the critic sees an example's own gradient beside its pixels and label.
    """

    pairs: int = 64
    candidates: int = 64
    batch: int = 0
    steps: int = 150
    hidden: int = 64
    dims: int = 64
    lr: float = 3e-3
    permutations: int = 199
    examples: int = 256
    informed: bool = True

    name: ClassVar[str] = "mutual-information"
    unit: ClassVar[str] = "nats"
    scope: ClassVar[Literal["client", "round"]] = "client"
    observers: ClassVar[tuple[Observer, ...]] = ("client", "oracle", "server")

    def __post_init__(self) -> None:
        check_at_least(
            self,
            pairs=2,
            candidates=2,
            batch=0,
            steps=0,
            hidden=1,
            dims=1,
            permutations=1,
            examples=MINIMUM_EXAMPLES,
        )
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}: use e.g. 0.003")

    def needs(self, observer: Observer) -> Needs:
        """The client's examples and the model; for a server reference data and the stated settings."""
        if observer == "server":
            return Needs.REFERENCE | Needs.MODEL | Needs.RELEASE | Needs.TRAINING
        return Needs.EVIDENCE | Needs.MODEL

    def __call__(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Estimate | Skip]:
        """One estimate per update, in order; a Skip where a client has too few examples.

        Raises:
            ValueError: if no update has enough examples.
        """
        return by_weights(updates, lambda group: self._group(group, ctx))

    def _group(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Estimate | Skip]:
        """The entries of updates that started from the same weights."""
        keys: list[int] = []
        holdings: list[Holding] = []
        owner: list[int | Skip] = []
        seen: dict[StepRelease, int] = {}
        for update in updates:
            x, y, release, key = self._examples(update, ctx)
            if ctx.observer == "server" and release in seen:
                owner.append(seen[release])
            elif len(x) < MINIMUM_EXAMPLES:
                rule = f"mutual information needs at least {MINIMUM_EXAMPLES} examples to split"
                owner.append(Skip(f"{rule}, got {len(x)}: give this party more examples"))
            else:
                holding = self._holding(x, y, release, key, ctx)
                if unfit := no_batch_of_sum(holding.batch, ctx):
                    owner.append(unfit)
                    continue
                seen[release] = len(holdings)
                owner.append(len(holdings))
                keys.append(key)
                holdings.append(holding)
        if not holdings:
            return [entry for entry in owner if isinstance(entry, Skip)]
        estimates = self._estimates(holdings, keys, updates[0].before, ctx)
        return [entry if isinstance(entry, Skip) else estimates[entry] for entry in owner]

    @staticmethod
    def _examples(update: ClientUpdate, ctx: RoundContext) -> tuple[Tensor, Tensor, StepRelease, int]:
        """Whose examples under which release, and the key of their random draws."""
        if ctx.observer != "server" and ctx.evidence is not None:
            evidence = ctx.evidence(update)
            return evidence.x, evidence.y, evidence.release, update.client_id
        if ctx.observer == "server" and ctx.reference is not None and ctx.release is not None:
            return (*ctx.reference, ctx.release(update), -1)
        raise ValueError(f"mutual information lacks what observer {ctx.observer!r} needs: see needs()")

    def _holding(self, x: Tensor, y: Tensor, release: StepRelease, key: int, ctx: RoundContext) -> Holding:
        parts = split_examples(len(x), self.examples, generator_for(ctx, self.name, "split", key))
        used = torch.cat(parts).to(x.device)
        batch = self.batch or ctx.batch_size or max(1, round(release.sample_rate * len(x)))
        return Holding(
            x[used].to(ctx.device, torch.float32),
            y[used].to(ctx.device),
            (len(parts[0]), len(parts[1]), len(parts[2])),
            release,
            min(batch, len(parts[2]) // 2),
        )

    def _estimates(
        self,
        holdings: Sequence[Holding],
        keys: Sequence[int],
        weights: Mapping[str, Tensor],
        ctx: RoundContext,
    ) -> list[Estimate]:
        if ctx.build_model is None or ctx.loss is None:
            raise ValueError("mutual information needs the model and the loss: give build_model and loss")
        with torch.random.fork_rng(devices=[]):  # initial weights are not used: leave no trace of them
            model = ctx.build_model().to(ctx.device).eval()
        placed = {name: value.to(ctx.device) for name, value in weights.items()}
        coordinates, energies = gradient_coordinates(
            holdings, model, placed, ctx.loss, self.dims, generator_for(ctx, self.name, "basis", 0)
        )
        classes = ctx.num_classes or max(int(holding.y.max()) for holding in holdings) + 1
        pools = build_pools(holdings, coordinates, classes, self.dims, self.informed)
        critic, step = train_critic(
            [train for train, _, _ in pools],
            [validation for _, validation, _ in pools],
            pairs=self.pairs,
            steps=self.steps,
            hidden=self.hidden,
            informed=self.informed,
            lr=self.lr,
            generator=generator_for(ctx, self.name, "critic", 0),
        )
        of = "reference" if ctx.observer == "server" else "client"
        estimates = []
        for holding, key, split, energy in zip(holdings, keys, pools, energies, strict=True):
            settings: dict[str, float | int | str | bool] = {
                "examples-of": of,
                "examples-train": holding.sizes[0],
                "examples-validation": holding.sizes[1],
                "examples-held-out": holding.sizes[2],
                "local-steps": 1,
                "noise-std": holding.release.noise_std,
                "clip-norm": "none" if holding.release.clip_norm is None else holding.release.clip_norm,
                "dims": split[2].coordinates.shape[1],
                "energy": energy,
                "informed": self.informed,
                "critic-step": step,
            }
            estimates.append(
                self._evaluate(critic, split, settings, generator_for(ctx, self.name, "evaluate", key))
            )
        return estimates

    def _evaluate(
        self,
        critic: BatchCritic,
        pools: tuple[Pool, Pool, Pool],
        settings: Mapping[str, float | int | str | bool],
        generator: torch.Generator,
    ) -> Estimate:
        _, validation, held = pools
        temperature = best_temperature(critic, validation, self.candidates, generator)
        scores, batches, observed = evaluate_critic(critic, held, self.candidates, generator)
        scores = (temperature * scores).double()
        value = float(infonce(scores))
        normaliser = log_normaliser(critic, held, _REFERENCE, observed, temperature, generator)
        most = math.log(_REFERENCE)  # a density ratio estimated from so many batches resolves no more
        ratio = (scores - normaliser).clamp(-most, most)
        null = example_permutation_null(critic, held, batches, temperature, self.permutations, generator)
        low, high = bootstrap_interval(scores, generator)
        extra: dict[str, float | int | str | bool] = {
            "ceiling": math.log(len(scores)),
            "candidates": len(scores),
            "batch": held.batch,
            "p-value": exceedance(value, null),
            "null-mean": float(null.mean()),
            "top-1": float(top1_accuracy(scores)),
            "donsker-varadhan": float(donsker_varadhan(ratio)),
            "temperature": temperature,
            **settings,
        }
        if held.noise_std > 0:
            means = (batches @ held.coordinates).double()
            likelihood = -torch.cdist(observed.double(), means).square() / (2 * held.noise_std**2)
            extra["known-likelihood"] = float(infonce(likelihood))
            rows = torch.cat([pool.coordinates for pool in pools])
            extra["gaussian-channel"] = gaussian_channel(rows, held.batch, held.noise_std)
        return Estimate(value, self.unit, "estimate", low, high, extra)
