"""Secure aggregation: the server learns the weighted sum of the clients' updates and no single one."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from fedaudit.defenses.plain_steps import PlainSteps
from fedaudit.defenses.quantize import round_at_random

WEIGHT_BITS = 24
"""A round's examples together number at most 2^24: room that the ring leaves above `bits`."""
_SEED_BYTES = 8  # of a run's seed, a round or a client's number: all have 64 bits at most
Graph = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class MaskKeys:
    """The secrets of one round: each client's own, and one for each pair that both ends know.

    Attributes:
        seed: seed of the run.
        round: server round.
    """

    seed: int
    round: int

    def own(self, client: int) -> bytes:
        """What only this client knows."""
        return self._secret(b"own", client)

    def pair(self, a: int, b: int) -> bytes:
        """What these two clients agreed on; the same from both ends."""
        return self._secret(b"pair", min(a, b), max(a, b))

    def _secret(self, kind: bytes, *clients: int) -> bytes:
        numbers = b"".join(n.to_bytes(_SEED_BYTES, "big") for n in (self.seed, self.round, *clients))
        return hashlib.sha256(kind + numbers).digest()


class TooFewClientsError(ValueError):
    """Fewer clients than the threshold sent something: no sum is released."""


def mask(secret: bytes, size: int, ring_bits: int) -> Tensor:
    """A vector (size,) of whole numbers, uniform in [0, 2^ring_bits), int64: SHAKE-256 of the secret.

    >>> mask(b"a", 3, 8).tolist() == mask(b"a", 3, 8).tolist() != mask(b"b", 3, 8).tolist()
    True
    """
    stream = bytearray(hashlib.shake_256(secret).digest(8 * size))
    drawn = torch.frombuffer(stream, dtype=torch.int64) if size else torch.empty(0, dtype=torch.int64)
    return drawn.bitwise_and(2**ring_bits - 1)


def mask_graph(clients: Sequence[int], neighbours: int, seed: int) -> dict[int, tuple[int, ...]]:
    """Whom each client shares a mask with: everybody else, or so many neighbours on a random circle.

    Args:
        clients: distinct numbers.
        neighbours: even; 0, or as many as there are others or more, means everybody.
        seed: of the circle's order.

    Returns:
        Neighbours of every client, sorted; being neighbours is mutual.

    >>> mask_graph([1, 2, 3], 0, seed=0)
    {1: (2, 3), 2: (1, 3), 3: (1, 2)}
    """
    circle = sorted(clients)
    if not neighbours or neighbours >= len(circle) - 1:
        return {client: tuple(other for other in circle if other != client) for client in circle}
    random.Random(seed).shuffle(circle)
    reach = [step for step in range(-(neighbours // 2), neighbours // 2 + 1) if step]
    near = {
        client: tuple(sorted(circle[(place + step) % len(circle)] for step in reach))
        for place, client in enumerate(circle)
    }
    return dict(sorted(near.items()))


def masked_vectors(
    vectors: Mapping[int, Tensor], graph: Graph, keys: MaskKeys, ring_bits: int
) -> dict[int, Tensor]:
    """What each client sends: y_i = x_i + own mask + sum_{j > i} m_ij - sum_{j < i} m_ij, modulo 2^ring_bits.

    j runs over the neighbours of i in the graph, those that drop out later among them. To whoever lacks the
    client's own secret, or one of its pairs', y_i is uniform whatever x_i is.

    Args:
        vectors: whole numbers in the ring (P,) by client.
        graph: neighbours of every client of the round.
        keys: the round's secrets; a pair's mask is computed once for both ends.
        ring_bits: bits of the ring.
    """
    sizes = {client: len(vector) for client, vector in vectors.items()}
    sent = {i: x + mask(keys.own(i), len(x), ring_bits) for i, x in vectors.items()}
    for a, b in sorted({(min(i, j), max(i, j)) for i in vectors for j in graph[i]}):
        shared = mask(keys.pair(a, b), sizes[a] if a in sizes else sizes[b], ring_bits)
        if a in sent:
            sent[a] += shared
        if b in sent:
            sent[b] -= shared
    return {client: vector.bitwise_and(2**ring_bits - 1) for client, vector in sent.items()}


def unmasked_sum(
    sent: Mapping[int, Tensor], graph: Graph, keys: MaskKeys, ring_bits: int, threshold: int
) -> Tensor:
    """The sum of the vectors behind these masked ones, modulo 2^ring_bits (P,).

    Masks of two clients that both sent cancel. What remains is taken away with the secrets that survivors
    reveal for this: the own secret of every client that sent, and the pair secrets with those that did not.

    Args:
        sent: masked vectors (P,) by client.
        graph: neighbours of every client of the round, those that dropped out among them.
        keys: the round's secrets, of which only those just named are used.
        ring_bits: bits of the ring.
        threshold: fewest clients that reveal anything.

    Raises:
        TooFewClientsError: if fewer clients than the threshold sent a vector.
    """
    if len(sent) < max(threshold, 1):
        raise TooFewClientsError(
            f"secure aggregation releases no sum of fewer than {threshold} clients, got {len(sent)}: "
            "the round is given up"
        )
    total = torch.stack(list(sent.values())).sum(0)
    for client in sent:
        total -= mask(keys.own(client), len(total), ring_bits)
        for gone in (other for other in graph[client] if other not in sent):
            left = mask(keys.pair(client, gone), len(total), ring_bits)
            total += left if gone < client else -left
    return total.bitwise_and(2**ring_bits - 1)


@dataclass(frozen=True)
class SecureAggregation(PlainSteps):
    """The server sees the sum of at least `threshold` clients' updates and no single one; they still leak.

    Client i rounds its weighted update at random, without bias, to whole numbers
    q_i = round(n_i (clip(delta_i, -c, c) + c) s), s = (2^bits - 1) / (2 c), n_i its examples, and masks them
    in the ring of integers modulo 2^(bits + 24) with a mask of its own and one for each neighbour, added by
    one end and taken away by the other. The masks cancel in the sum (Bonawitz et al. 2017, CCS, "Practical
    secure aggregation for privacy-preserving machine learning"; sparse graphs of neighbours: Bell et al.
    2020, CCS, "Secure single-server aggregation with (poly)logarithmic overhead"), which the server divides:
    sum_i q_i / (s sum_i n_i) - c is the mean of FedAvg. Rounding moves a coordinate of the mean by less than
    N / (s sum_i n_i); what is larger than c is clipped. Buffers count; integer entries stay as broadcast.

    A faithful simulation of the VIEW, not of the cryptography: the vectors are quantised, masked, summed
    and unmasked as said, between receipt and audit, and the auditing server is shown nothing else. Key
    agreement, secret sharing and an active server are not simulated: secrets follow from the run's seed, and
    a client that fails drops out after it agreed on masks, which its neighbours reveal. So it exists in
    simulations only. Flower's SecAgg+ belongs to its legacy API and has no path to strategies of
    `flwr.serverapp`.

    No formal guarantee: who contributed what is hidden, what the sum says about all is not. Elkordy et al.
    2022, arXiv 2208.02304, "How much privacy does federated learning with secure aggregation guarantee?",
    bound what leaks of one client under assumptions about the others' updates, and find that it falls with
    the number of clients. After "dp-sgd" or "gaussian" in a chain their guarantee stands, as after any
    post-processing.

    Differs from [Bell et al.]: the weight multiplies before rounding, so that more examples mean less
    rounding, and no largest weight is agreed on.

    Attributes:
        bits: bits per coordinate of an update, before it is weighted.
        clip_range: c, the largest magnitude of a coordinate.
        threshold: fewest clients of which a sum is released.
        neighbours: how many others a client shares a mask with, an even number; 0 is everybody.

    Raises:
        ValueError: if an option is out of range.
    """

    bits: int = 22
    clip_range: float = 8.0
    threshold: int = 2
    neighbours: int = 0

    name: ClassVar[str] = "secure-aggregation"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 28:
            raise ValueError(f"bits must lie between 2 and 28, got {self.bits}: choose e.g. 22")
        if not 0 < self.clip_range < float("inf"):
            raise ValueError(f"clip-range must be a number > 0, got {self.clip_range}: choose e.g. 8")
        if self.threshold < 2:
            raise ValueError(
                f"threshold must be at least 2, got {self.threshold}: the sum of one client is its update"
            )
        if self.neighbours < 0 or self.neighbours % 2:
            raise ValueError(
                f"neighbours must be an even number or 0 for everybody, got {self.neighbours}: choose e.g. 10"
            )

    @property
    def ring_bits(self) -> int:
        """Bits of the ring, and of each coordinate that is sent."""
        return self.bits + WEIGHT_BITS

    @property
    def _levels(self) -> int:
        return (1 << self.bits) - 1

    @property
    def _scale(self) -> float:
        return self._levels / (2 * self.clip_range)

    def most_examples(self, clients: int) -> int:
        """Examples of one client for which the ring has room in a sum of so many clients."""
        return (1 << WEIGHT_BITS) // clients

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The update as it is: masking takes the other clients, and happens on the way to the server."""
        return dict(delta)

    def quantized(self, update: Tensor, weight: int, generator: Generator) -> Tensor:
        """n (clip(update) + c) s, rounded at random to whole numbers from 0 to n (2^bits - 1); int64 (P,).

        Args:
            update: coordinates (P,).
            weight: n, the client's examples.
            generator: source of the rounding.

        Raises:
            ValueError: if an entry is not finite or the weight does not fit the ring.
        """
        if not 0 < weight <= 2**WEIGHT_BITS:
            raise ValueError(f"a weight lies between 1 and 2^{WEIGHT_BITS}, got {weight}: state examples")
        if not bool(update.isfinite().all()):
            raise ValueError("an update is finite, got NaN or infinity: leave this client out")
        shifted = update.detach().double().clamp(-self.clip_range, self.clip_range) + self.clip_range
        rounded = round_at_random(shifted * (weight * self._scale), generator)
        return rounded.clamp(max=weight * self._levels).to(torch.int64)

    def mean(self, total: Tensor, weight: int) -> Tensor:
        """The weighted mean update behind a sum of quantised ones (P,), float64.

        Args:
            total: sum of `quantized` updates (P,).
            weight: sum of their weights.
        """
        return total.double() / (weight * self._scale) - self.clip_range
