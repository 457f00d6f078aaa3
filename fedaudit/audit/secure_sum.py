"""What secure aggregation leaves a server to see: one update that stands for all clients of a round."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from fedaudit.defenses.secure_aggregation import (
    MaskKeys,
    SecureAggregation,
    mask_graph,
    masked_vectors,
    unmasked_sum,
)
from fedaudit.training.local import client_seed
from fedaudit.types import ClientUpdate, Guarantee, RoundContext, StepRelease

SUM = -1
"""Stands where a single client's number would."""
_ROUNDING = 5  # keeps the draws of rounding apart from a client's other draws


@dataclass(frozen=True)
class SecureSum:
    """Runs secure aggregation on behalf of clients and server.

    Attributes:
        part: the defense.
        seed: seed of the run; masks and rounding follow from it.
    """

    part: SecureAggregation
    seed: int

    def most_examples(self, clients: int) -> int:
        """Examples that one of so many clients may state."""
        return self.part.most_examples(clients)

    def __call__(self, updates: Sequence[ClientUpdate], asked: Sequence[int]) -> ClientUpdate:
        """The weighted mean of these updates, as the server computes it from their masked sum.

        Args:
            updates: of the clients that answered, one each, from the same broadcast.
            asked: numbers of all clients that agreed on masks; those without an update dropped out.

        Returns:
            An update with `summed` set and client_id -1: delta is the mean by examples, num_examples their
            total. What clients reported beside their updates is not part of it.

        Raises:
            TooFewClientsError: if fewer clients than the threshold answered.
        """
        first, answered = updates[0], {update.client_id: update for update in updates}
        keys = MaskKeys(self.seed, first.round)
        everybody = sorted({*asked, *answered})
        graph = mask_graph(
            everybody, self.part.neighbours, client_seed(self.seed, len(everybody), first.round)
        )
        vectors = {client: self._vector(update) for client, update in answered.items()}
        sent = masked_vectors(vectors, graph, keys, self.part.ring_bits)
        total = unmasked_sum(sent, graph, keys, self.part.ring_bits, self.part.threshold)
        weight = sum(update.num_examples for update in answered.values())
        return ClientUpdate(
            client_id=SUM,
            round=first.round,
            before=first.before,
            delta=_parted(self.part.mean(total, weight), first),
            num_examples=weight,
            summed=tuple(sorted(vectors)),
        )

    def _vector(self, update: ClientUpdate) -> Tensor:
        own = client_seed(self.seed, update.client_id, update.round)
        generator = Generator().manual_seed(client_seed(own, _ROUNDING, update.round))
        flat = [change.detach().cpu().double().reshape(-1) for change in update.delta.values()]
        return self.part.quantized(torch.cat(flat), update.num_examples, generator)


def _parted(flat: Tensor, like: ClientUpdate) -> dict[str, Tensor]:
    """A vector (P,) as tensors of an update's names, shapes and types."""
    pieces = torch.split(flat, [change.numel() for change in like.delta.values()])
    return {
        name: piece.reshape(change.shape).to(change.dtype)
        for (name, change), piece in zip(like.delta.items(), pieces, strict=True)
    }


def context_of_sum(ctx: RoundContext, update: ClientUpdate) -> RoundContext:
    """What a server knows of the sum, given what it knows of single clients.

    N clients that take their first step from the same weights take one step together: on N B examples, with
    N independent draws of noise on the sum of gradients, so sqrt(N) times the noise of one. Exact for one
    local step of clients with equally many examples; else B and the release are those of the mean client, and
    several steps are N separate trainings and no long one. The guarantee is that of the worst client
    (disjoint data: a maximum, not a sum); None if some client has none.

    Args:
        ctx: what is known of every single client.
        update: a sum.
    """
    count = len(update.summed)
    single, known = ctx.release, ctx.guarantee
    typical = replace(update, summed=(), num_examples=max(1, round(update.num_examples / count)))

    def summed(step: StepRelease) -> StepRelease:
        return replace(step, noise_std=math.sqrt(count) * step.noise_std)

    def guarantee(of: ClientUpdate) -> Guarantee | None:
        stated = [known(replace(of, client_id=client, summed=())) for client in of.summed] if known else []
        worst = [each for each in stated if each is not None]
        return max(worst, key=lambda each: each.epsilon) if len(worst) == count else None

    return replace(
        ctx,
        local_steps=ctx.steps(typical),
        batch_size=min(ctx.batch_size * count, update.num_examples) if ctx.batch_size else None,
        release=(lambda _: summed(single(typical))) if single else None,
        guarantee=guarantee,
        num_updates=1,
        summed=count,
    )
