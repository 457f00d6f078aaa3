"""Mutual information through privacy tokens: the paper's statistic, and what is left of it held out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedaudit.measures.batch_pools import no_batch_of_sum, split_examples
from fedaudit.measures.cohort import by_weights
from fedaudit.measures.draws import generator_for
from fedaudit.measures.local_release import LocalTraining
from fedaudit.measures.mi_bounds import (
    bootstrap_interval,
    donsker_varadhan,
    infonce,
    permutation_p_value,
    top1_accuracy,
)
from fedaudit.measures.options import check_at_least
from fedaudit.measures.token_critic import EXTRACTOR_LR, LR, SHARE, TokenCritic, Trained, train_and_validate
from fedaudit.measures.token_networks import HIDDEN, LATENT, Extractor, training_bytes
from fedaudit.measures.token_pairs import TokenPairs, draw_batches, one_party, standardised
from fedaudit.measures.watched_gradients import LayerVectors, feature_module, watched_layers
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Estimate, Observer, RoundContext, Skip

MINIMUM_EXAMPLES = 24
BUDGET = 500 * 2**20  # bytes
_GROUP = 16  # parties the critic is fitted to: more only cost time and memory

Extra = dict[str, float | int | str | bool]
Parts = list[TokenPairs]  # critic-train, validation, held-out


@dataclass(frozen=True, eq=False)
class _Party:
    """Examples of one party by purpose, and how its gradients come about."""

    x: tuple[Tensor, ...]
    y: tuple[Tensor, ...]
    training: LocalTraining
    size: int  # examples of a batch
    key: int


@dataclass(frozen=True)
class PrivacyTokens:
    """Nats by which an embedded gradient tells its batch from others, with the paper's statistic beside.

    A pair is a batch and what local training gives away of it in the watched layers' gradients. One critic
    per round and set of weights is trained on pairs of all clients (16 drawn ones if there are more) by
    Algorithm 1 of Meng et al.: data features are the model's own activations, the gradient's token comes from
    an autoencoder or a Transformer, and mismatched pairs stay within a client. Examples are split first: 40 %
    critic-train, 20 % validation, 40 % held-out, no example in two parts.

    The value is InfoNCE on `candidates` held-out batches of the client, with its ceiling ln K, permutation
    p-value, Donsker-Varadhan value and 95 % bootstrap interval: the critic with the weights that did best on
    validation batches, its mean score per batch times the factor that does best there. In `extra`:
    "paper-difference", matched minus mismatched on the critic's own training batches after all steps, as in
    the paper's table 1, "paper-value" (Algorithm 1's return), and both again on held-out batches.

    It is not what an attack can reconstruct and no upper bound: a critic that learned little gives a low
    value. The paper's difference is no mutual information; it grows with the critic's training, so values
    of critics trained for different numbers of steps cannot be compared. It is about one example of a batch.
    p-value and interval cover the chance of which held-out batches were drawn, given the examples: batches
    share a few dozen of them, and a chance relation among those counts as dependence.

    Client and oracle: the batch is one local batch, its gradient what ONE step at the broadcast weights
    releases for it, clipped and noised as the release says; later steps are not covered. Server: pairs of
    reference data. As in the client's training: weights, plain SGD, learning rate, number of steps, batch
    size, clipping, noise, division by the batch size. Not the same: the examples, of which a pair has at
    most steps times batch size and half of a part; batches are shuffled epochs, not Poisson samples; the
    model is in evaluation mode; no protection after training. One value per distinct release.

    Source: Meng et al., "Real-Time Privacy Risk Measurement with Privacy Tokens for Gradient Leakage",
    algorithm 1, section 4, appendix A.
    Differs from [Meng et al.]: gradients and features are standardised; layers above `coordinates` entries
    are hashed; a step takes at most 64 pairs of each kind; gradients are shuffled anew every 20 steps; one
    critic per round, where theirs goes on through training (`TokenCritic` does that).

    Attributes:
        extractor: "autoencoder" or "transformer" (several times slower).
        steps: critic steps, N_MINE.
        batch: examples per batch; 0 takes the federation's. Never more than half the held-out examples.
        batches: critic-train batches per client.
        candidates: K, held-out batches per client, and as many for validation.
        examples: largest number of a client's examples to use, drawn at random.
        layers: auto (the last three convolutions, or all layers if there are none), conv, all, or names
            joined by "+".
        features: auto or the name of the module whose output an example's features are.
        coordinates: largest number of entries per layer, more are hashed; 0 keeps all.
        local_steps: steps per pair of a server; 0 takes the agreed ones.
        lr: learning rate of everything but the extractor.
        extractor_lr: learning rate of the extractor.
        share: share of the pairs in one step.
        hidden: width of the autoencoder's hidden layers.
        latent: width of the autoencoder's token.
        permutations: shuffles behind the p-value.
    """

    extractor: Extractor = "autoencoder"
    steps: int = 200
    batch: int = 0
    batches: int = 32
    candidates: int = 32
    examples: int = 256
    layers: str = "auto"
    features: str = "auto"
    coordinates: int = 4096
    local_steps: int = 0
    lr: float = LR
    extractor_lr: float = EXTRACTOR_LR
    share: float = SHARE
    hidden: int = HIDDEN
    latent: int = LATENT
    permutations: int = 999

    name: ClassVar[str] = "privacy-tokens"
    unit: ClassVar[str] = "nats"
    scope: ClassVar[Literal["client", "round"]] = "client"
    observers: ClassVar[tuple[Observer, ...]] = ("client", "oracle", "server")

    def __post_init__(self) -> None:
        if self.extractor not in ("autoencoder", "transformer"):
            raise ValueError(
                f"extractor must be autoencoder or transformer, got {self.extractor!r}: choose one"
            )
        check_at_least(
            self,
            steps=0,
            batch=0,
            batches=4,
            candidates=4,
            examples=MINIMUM_EXAMPLES,
            coordinates=0,
            local_steps=0,
            hidden=1,
            latent=1,
            permutations=1,
        )
        if not (self.lr > 0 and self.extractor_lr > 0 and 0 < self.share <= 1):
            raise ValueError(
                "lr and extractor-lr must be positive and share inside (0, 1], "
                f"got {self.lr}, {self.extractor_lr} and {self.share}: use e.g. 1e-4, 1e-5 and 0.1"
            )

    def needs(self, observer: Observer) -> Needs:
        """The client's examples and the model; for a server reference data and the stated settings."""
        if observer == "server":
            return Needs.REFERENCE | Needs.MODEL | Needs.RELEASE | Needs.TRAINING
        return Needs.EVIDENCE | Needs.MODEL

    def __call__(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Estimate | Skip]:
        """One estimate per update, in order; a Skip where a client has too few examples.

        Raises:
            ValueError: if no update has enough examples, or the critic would take more than 500 MB.
        """
        return by_weights(updates, lambda group: self._group(group, ctx))

    def _group(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Estimate | Skip]:
        """The entries of updates that started from the same weights."""
        parties: list[_Party] = []
        owner: list[int | Skip] = []
        seen: dict[tuple[LocalTraining, int], int] = {}
        for update in updates:
            party = self._party(update, ctx)
            if isinstance(party, Skip):
                owner.append(party)
                continue
            kind = (party.training, party.size)
            if ctx.observer == "server" and kind in seen:
                owner.append(seen[kind])
                continue
            owner.append(len(parties))
            seen[kind] = len(parties)
            parties.append(party)
        if not parties:
            return [entry for entry in owner if isinstance(entry, Skip)]
        estimates = _Round(self, ctx, updates[0].before, parties).estimates()
        return [entry if isinstance(entry, Skip) else estimates[entry] for entry in owner]

    def _party(self, update: ClientUpdate, ctx: RoundContext) -> _Party | Skip:
        """Whose examples, split by purpose, under which local training."""
        if ctx.observer != "server" and ctx.evidence is not None:
            evidence = ctx.evidence(update)
            x, y, release, key, steps = evidence.x, evidence.y, evidence.release, update.client_id, 1
        elif ctx.observer == "server" and ctx.reference is not None and ctx.release is not None:
            x, y = ctx.reference
            release, key, steps = ctx.release(update), -1, self.local_steps or ctx.steps(update) or 1
        else:
            raise ValueError(f"privacy tokens lack what observer {ctx.observer!r} needs: see needs()")
        if len(x) < MINIMUM_EXAMPLES:
            rule = f"privacy tokens need at least {MINIMUM_EXAMPLES} examples to split"
            return Skip(f"{rule}, got {len(x)}: give this party more examples")
        parts = split_examples(len(x), self.examples, generator_for(ctx, self.name, "split", key))
        batch = self.batch or ctx.batch_size or max(1, round(release.sample_rate * len(x)))
        if ctx.summed and steps > 1:
            return Skip(f"the sum of {ctx.summed} clients' trainings of {steps} steps is no single training")
        size = min(steps * batch, len(parts[2]) // 2)
        if unfit := no_batch_of_sum(size, ctx):
            return unfit
        if ctx.observer == "server":
            size = max(1, min(size, update.num_examples))
        lr = ctx.lr if steps > 1 and ctx.lr is not None else 1.0  # one step's gradient does not depend on it
        rows = [part.to(x.device) for part in parts]
        inputs = x.to(ctx.device, torch.float32) if x.is_floating_point() else x.to(ctx.device)
        labels = y.to(ctx.device)
        return _Party(
            tuple(inputs[part] for part in rows),
            tuple(labels[part] for part in rows),
            LocalTraining(steps, min(batch, size), lr, release),
            size,
            key,
        )


class _Round:
    """One critic and the parties it serves, at one set of weights."""

    def __init__(
        self,
        options: PrivacyTokens,
        ctx: RoundContext,
        weights: Mapping[str, Tensor],
        parties: Sequence[_Party],
    ) -> None:
        if ctx.build_model is None or ctx.loss is None:
            raise ValueError("privacy tokens need the model and the loss: give build_model and loss")
        self.options, self.ctx, self.loss, self.parties = options, ctx, ctx.loss, parties
        with torch.random.fork_rng(devices=[]):  # initial weights are not used: leave no trace of them
            self.model: nn.Module = ctx.build_model().to(ctx.device).eval()
        self.weights = {name: value.to(ctx.device) for name, value in weights.items()}
        self.layers = watched_layers(self.model, options.layers)
        self.features = feature_module(self.model, options.features)
        self.vectors = LayerVectors(
            self.layers, self.weights, options.coordinates, generator_for(ctx, options.name, "hash", 0)
        )
        self._check_memory()

    def estimates(self) -> list[Estimate]:
        """One per party, in order."""
        chosen = torch.randperm(len(self.parties), generator=self._draws("parties", 0))[:_GROUP].tolist()
        kept = {index: self._pairs(self.parties[index]) for index in sorted(chosen)}
        trained = self._train(list(kept.values()))
        estimates = []
        for index, party in enumerate(self.parties):
            parts = kept[index] if index in kept else self._pairs(party)
            extra: Extra = {
                "critic-step": trained.step,
                "temperature": trained.temperature,
                "parties-in-training": len(kept),
            }
            trained.critic.restore(trained.final)
            draws = self._draws("paper", party.key)
            for name, pairs in (("", parts[0] if index in kept else None), ("-held-out", parts[2])):
                if pairs is not None:
                    value, difference = trained.critic.paper(pairs, draws)
                    extra |= {f"paper-value{name}": value, f"paper-difference{name}": difference}
            trained.critic.restore(trained.best)
            estimates.append(self._evaluate(trained, party, parts, extra))
        return estimates

    def _draws(self, purpose: str, key: int) -> torch.Generator:
        return generator_for(self.ctx, self.options.name, purpose, key)

    def _pairs(self, party: _Party) -> Parts:
        """Critic-train, validation and held-out pairs of a party, in the units of the first."""
        options, draws = self.options, self._draws("pairs", party.key)
        counts = (options.batches, options.candidates, options.candidates)
        parts = []
        for x, y, count in zip(party.x, party.y, counts, strict=True):
            members = draw_batches(len(x), min(party.size, len(x) - 1), count, draws)
            parts.append(
                one_party(
                    self.model,
                    self.weights,
                    self.loss,
                    x,
                    y,
                    members,
                    party.training,
                    self.vectors,
                    self.features,
                    draws,
                )
            )
        return standardised(parts, self.vectors.widths)

    def _train(self, parties: Sequence[Parts]) -> Trained:
        options, draws = self.options, self._draws("critic", 0)
        critic = TokenCritic(
            parties[0][0].features.shape[1],
            self.vectors.widths,
            options.extractor,
            draws,
            hidden=options.hidden,
            latent=options.latent,
            lr=options.lr,
            extractor_lr=options.extractor_lr,
            device=self.ctx.device,
        )
        train, validation, _ = zip(*parties, strict=True)
        return train_and_validate(critic, train, validation, options.steps, draws, options.share)

    def _evaluate(self, trained: Trained, party: _Party, parts: Parts, extra: Extra) -> Estimate:
        options, release = self.options, party.training.release
        scores = trained.temperature * trained.critic.pair_scores(parts[2]).double()
        draws = self._draws("evaluate", party.key)
        p_value, null_mean = permutation_p_value(scores, options.permutations, draws)
        low, high = bootstrap_interval(scores, draws)
        extra |= {
            "ceiling": math.log(len(scores)),
            "candidates": len(scores),
            "p-value": p_value,
            "null-mean": null_mean,
            "top-1": float(top1_accuracy(scores)),
            "donsker-varadhan": float(donsker_varadhan(scores)),
            "extractor": options.extractor,
            "layers": "+".join(self.layers),
            "gradient-entries": self.vectors.entries,
            "gradient-coordinates": sum(self.vectors.widths),
            "feature-width": parts[0].features.shape[1],
            "batch": party.size,
            "batches": len(parts[0]),
            "examples-of": "reference" if self.ctx.observer == "server" else "client",
            "examples-train": len(party.x[0]),
            "examples-validation": len(party.x[1]),
            "examples-held-out": len(party.x[2]),
            "local-steps": party.training.steps,
            "noise-std": release.noise_std,
            "clip-norm": "none" if release.clip_norm is None else release.clip_norm,
        }
        return Estimate(float(infonce(scores)), options.unit, "estimate", low, high, extra)

    def _check_memory(self) -> None:
        """Refuse before anything is computed what would not fit."""
        options = self.options
        features = 1024  # of the order of what models have; a small part of the sum
        network = training_bytes(
            features, self.vectors.widths, options.extractor, options.hidden, options.latent
        )
        pairs = min(len(self.parties), _GROUP) * 2 * (options.batches + options.candidates)
        held = 4 * pairs * sum(self.vectors.widths)
        if network + held > BUDGET:
            raise ValueError(
                f"the critic and its pairs must fit in {BUDGET // 2**20} MB, got {network // 2**20} MB for "
                f"the {options.extractor} and {held // 2**20} MB for {pairs} gradients of "
                f"{sum(self.vectors.widths)} entries: watch fewer layers or lower coordinates"
            )
