"""Membership inference round by round: how well a server tells a client's examples from others by its update.

A server computes the scores; who really is a member only the oracle knows, so only the oracle measures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedaudit.attacks.gaussian_envelope import gaussian_auc, gaussian_tpr
from fedaudit.attacks.roc import Rate, auc, split_in_half, true_positives_at
from fedaudit.inference.candidate_scores import AGAINST_OTHERS, SCORES, Score, align, candidate_scores
from fedaudit.measures.cohort import same_weights
from fedaudit.measures.draws import generator_for
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Estimate, Observer, RoundContext, Skip, StepRelease

FALSE_POSITIVES = (0.01, 0.001)
MINIMUM_CANDIDATES = 5


@dataclass(frozen=True, eq=False)
class Scored:
    """One client's candidates by its update.

    Attributes:
        inside: scores of examples the client holds (m,).
        outside: scores of examples it does not hold (k,).
        control: which of those play the members in the control, booleans (k,).
        estimate: the area under the curve, with what belongs beside it.
    """

    inside: Tensor
    outside: Tensor
    control: Tensor
    estimate: Estimate


def matched_by_label(
    members: Tensor, others: Tensor, most: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """As many non-members as there are with the members' shares of labels, at most `most`, drawn at random.

    A client's data differ from a reference in their classes before they do in anything else, and every score
    tells classes apart: unmatched, it finds which classes a client holds and calls it membership.

    Args:
        members: labels of the members (m,).
        others: labels of the non-members to draw from (n,).
        most: largest number to draw.
        generator: source of the draws.

    Returns:
        Which members have a label that occurs among the others (m,), boolean; and the sorted positions of the
        drawn non-members (k,), whose labels have the shares of those members' within one example each.

    >>> members, others = torch.tensor([0, 0, 1, 7]), torch.tensor([0, 0, 0, 1, 1, 2])
    >>> kept, drawn = matched_by_label(members, others, 10, torch.Generator().manual_seed(0))
    >>> kept.tolist(), others[drawn].tolist()
    ([True, True, True, False], [0, 0, 0, 1])
    """
    members, others = members.cpu(), others.cpu()
    kept = torch.isin(members, others)
    labels, counts = torch.unique(members[kept], return_counts=True)
    if not len(labels):
        return kept, torch.empty(0, dtype=torch.int64)
    available = torch.stack([(others == label).sum() for label in labels])
    shares = counts.double() / counts.sum()
    total = min(most, int((available / shares + 1e-9).min()))
    taken = (shares * total).floor()
    by_remainder = (shares * total - taken).argsort(descending=True, stable=True)
    taken[by_remainder[: total - int(taken.sum())]] += 1
    drawn = []
    for label, count in zip(labels, taken.int().tolist(), strict=True):
        own = torch.nonzero(others == label).flatten()
        drawn.append(own[torch.randperm(len(own), generator=generator)[:count]])
    return kept, torch.cat(drawn).sort().values


@dataclass
class MembershipInference:
    """Area under the ROC curve of a server that tells a client's examples from others by its update (oracle).

    Members are examples the client HOLDS, whether or not its local steps drew them this round; non-members
    are the server's reference examples, which no client holds. Both are drawn at random, at most `candidates`
    each, and scored as a server would (`candidate_scores`). 0.5 is guessing; below it the score misleads.

    With `match_labels` non-members have the members' shares of labels (`matched_by_label`), and members whose
    label the reference lacks are left out: otherwise every score tells which classes a client holds, and
    calls that membership. It leaves fewer non-members where a client holds few classes.

    The value is an average over thresholds and one attack's success: it is not a bound on what another attack
    finds. The settings hold the true-positive rates at 1 % and 0.1 % false positives (too few non-members
    resolve neither: the reason stands there), and "control-auc", the same for two random halves of the
    non-members, which must lie near 0.5. Where a client's data differ from the reference in more than labels
    (another camera), every score also tells that difference, and the control does not show it. A score at
    this round's weights tells about earlier rounds too, which left their mark on the broadcast weights.

    Where a local step is clipped and noised, "envelope-auc" is the area that the update of this round leaves
    to an observer who knows all other examples, with weights taken as constant within the round: exact for
    one step, see `gaussian_tpr`. Scores may exceed it by what earlier rounds left.

    Under secure aggregation the server sees the sum of a round's updates: there is one area then, for the
    examples of all clients together, and scores that compare clients are skipped.

    One round at a time: nothing is kept between rounds, so that a resumed run measures the same. For an
    average over rounds use `scores_over_rounds` on kept updates.

    Sources: Li, Li and Ribeiro, ICLR 2023; FedMIA, Zhu et al., CVPR 2025, arXiv 2402.06289.

    Attributes:
        score: "loss", "gradient-norm", "cosine", "gradient-difference", "matched-filter", "fedmia-loss" or
            "fedmia-cosine".
        candidates: largest number of members, and of non-members, per client.
        match_labels: whether non-members have the members' shares of labels; labels must be class indices.
    """

    score: Score = "matched-filter"
    candidates: int = 256
    match_labels: bool = True

    name: ClassVar[str] = "membership-inference"
    unit: ClassVar[str] = "1"
    scope: ClassVar[Literal["client", "round"]] = "client"
    observers: ClassVar[tuple[Observer, ...]] = ("oracle",)
    of_server_view: ClassVar[bool] = True
    """Whether what the server sees is measured, under secure aggregation too; else every single update."""

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score is one of {', '.join(SCORES)}, got {self.score!r}: choose one")
        if self.candidates < MINIMUM_CANDIDATES:
            raise ValueError(
                f"candidates must be at least {MINIMUM_CANDIDATES}, got {self.candidates}: raise it"
            )

    def needs(self, observer: Observer) -> Needs:
        """The clients' examples and the model; other updates or the settings for some scores.

        Reference examples are needed too, but an oracle's needs do not name them: without any, every update
        becomes a Skip.
        """
        needs = Needs.EVIDENCE | Needs.MODEL
        if self.score.startswith(AGAINST_OTHERS):
            return needs | Needs.COHORT
        return needs | Needs.TRAINING if self.score == "gradient-difference" else needs

    def __call__(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Estimate | Skip]:
        """One area per update, in order; a Skip where there is too little to compare."""
        return [each.estimate if isinstance(each, Scored) else each for each in self.scored(updates, ctx)]

    def scored(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Scored | Skip]:
        """The candidates' scores behind each area, in order.

        Which candidates these are depends on `ctx.seed`, `ctx.round` and the client, not on the score: with
        both held fixed over rounds, scores of different rounds are of the same candidates in the same order.
        """
        if ctx.reference is None:
            return [Skip(f"{self.name} needs reference examples as non-members")] * len(updates)
        found: list[Scored | Skip] = [Skip("")] * len(updates)
        for positions in same_weights(updates):
            group = [updates[i] for i in positions]
            for position, result in zip(positions, self._group(group, ctx, *ctx.reference), strict=True):
                found[position] = result
        return found

    def _group(
        self, updates: Sequence[ClientUpdate], ctx: RoundContext, x: Tensor, y: Tensor
    ) -> list[Scored | Skip]:
        """The entries of updates that started from the same weights, given the reference examples."""
        if self.score.startswith(AGAINST_OTHERS) and len(updates) < 3:
            reason = f"{self.score} needs three updates from the same weights, got {len(updates)}"
            return [Skip(reason)] * len(updates)
        if ctx.evidence is None:
            raise ValueError(f"{self.name} lacks what observer {ctx.observer!r} needs: see needs()")
        held = [ctx.evidence(update) for update in updates]
        own, others = [], []
        for each, update in zip(held, updates, strict=True):
            order = torch.randperm(len(each.y), generator=self._generator(ctx, "members", update))
            rows = order[: self.candidates].sort().values.to(each.y.device)
            kept, positions = self._non_members(each.y[rows], y, self._generator(ctx, "others", update))
            own.append((each.x[rows][kept], each.y[rows][kept]))
            others.append(positions)
        pairs = self._scores(updates, own, others, x, y, ctx)
        found: list[Scored | Skip] = []
        for update, each, mine, pair in zip(updates, held, own, pairs, strict=True):
            if min(map(len, pair)) < MINIMUM_CANDIDATES:
                found.append(Skip(_few(*map(len, pair))))
            elif not all(bool(side.isfinite().all()) for side in pair):
                found.append(Skip(f"{self.score} of this client's candidates is not finite"))
            else:
                control = split_in_half(len(pair[1]), self._generator(ctx, "control", update))
                noise = self._envelope(update, each.release, mine, ctx)
                found.append(Scored(*pair, control, self._estimate(*pair, control, noise)))
        return found

    def _generator(self, ctx: RoundContext, purpose: str, update: ClientUpdate) -> torch.Generator:
        return generator_for(ctx, self.name, purpose, update.client_id)

    def _non_members(
        self, labels: Tensor, reference: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Which of the members to keep, and positions in the reference of the non-members."""
        if self.match_labels:
            return matched_by_label(labels, reference, self.candidates, generator)
        order = torch.randperm(len(reference), generator=generator)[: self.candidates]
        return torch.ones(len(labels), dtype=torch.bool), order.sort().values

    def _scores(
        self,
        updates: Sequence[ClientUpdate],
        own: Sequence[tuple[Tensor, Tensor]],
        others: Sequence[Tensor],
        x: Tensor,
        y: Tensor,
        ctx: RoundContext,
    ) -> list[tuple[Tensor, Tensor]]:
        """Scores of each client's members and of its non-members, at positions in x and y, by its update."""
        if self.score in ("loss", "gradient-norm"):  # each at other weights: score only one's own
            alone = []
            for update, (inputs, labels), rows in zip(updates, own, others, strict=True):
                both = torch.cat([inputs, x[rows]]), torch.cat([labels, y[rows]])
                scores = torch.empty(0)
                if len(both[1]):
                    scores = candidate_scores(self.score, [update], ctx, *both)[0]
                alone.append((scores[: len(labels)], scores[len(labels) :]))
            return alone
        used, places = torch.unique(torch.cat(list(others)), return_inverse=True)
        pools = [*own, (x[used], y[used])]
        inputs, labels = (torch.cat([pool[part] for pool in pools]) for part in (0, 1))
        if not len(labels):
            return [(torch.empty(0), torch.empty(0))] * len(updates)
        scores = candidate_scores(self.score, updates, ctx, inputs, labels)
        pieces = torch.split(scores, [len(each) for _, each in pools], dim=1)
        columns = torch.split(places, [len(rows) for rows in others])
        return [(pieces[row][row], pieces[-1][row][columns[row]]) for row in range(len(updates))]

    def _envelope(
        self, update: ClientUpdate, release: StepRelease, own: tuple[Tensor, Tensor], ctx: RoundContext
    ) -> dict[str, float | int | str | bool]:
        """What noise of known size leaves to the best test; nothing where there is no noise."""
        steps = ctx.steps(update)
        if not release.noise_std:
            return {}
        if not steps:
            return {"envelope-reason": "the number of local steps is unknown"}
        norms = align([update], ctx, *own, clipped=release if release.per_layer else None).norms
        if release.clip_norm is not None:
            norms = norms.clamp(max=release.clip_norm)
        mu = norms / release.noise_std
        curve = {
            f"envelope-tpr-at-fpr-{fpr:g}": gaussian_tpr(mu, fpr, steps=steps, rate=release.sample_rate)
            for fpr in FALSE_POSITIVES
        }
        return {
            "envelope-auc": gaussian_auc(mu, steps=steps, rate=release.sample_rate),
            **curve,
            "noise-std": release.noise_std,
            "sample-rate": release.sample_rate,
            "steps": steps,
        }

    def _estimate(
        self,
        inside: Tensor,
        outside: Tensor,
        control: Tensor,
        noise: dict[str, float | int | str | bool],
    ) -> Estimate:
        """The area of members against non-members, and what belongs beside it."""
        scores = torch.cat([inside, outside])
        members = torch.arange(len(scores)) < len(inside)
        area, halves = auc(scores, members), auc(outside, control)
        extra: dict[str, float | int | str | bool] = {
            "score": self.score,
            "members": len(inside),
            "members-are": "held by the client",
            "non-members": len(outside),
            "non-members-are": "reference",
            "labels-matched": self.match_labels,
        }
        for fpr in FALSE_POSITIVES:
            extra |= _described(f"tpr-at-fpr-{fpr:g}", true_positives_at(fpr, scores, members))
        extra |= {**_described("control-auc", halves), **noise}
        return Estimate(area.value, self.unit, "estimate", area.low, area.high, extra)


def _described(name: str, rate: Rate) -> dict[str, float | int | str | bool]:
    """A rate as side results of a record: its ends, or the reason why there is none."""
    if rate.reason:
        return {f"{name}-reason": rate.reason}
    return {name: rate.value, f"{name}-low": rate.low, f"{name}-high": rate.high}


def _few(members: int, others: int) -> str:
    rule = f"membership inference needs at least {MINIMUM_CANDIDATES} members and non-members"
    return f"{rule}, got {members} and {others}"
