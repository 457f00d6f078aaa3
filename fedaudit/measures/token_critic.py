"""Training and evaluating the privacy-token critic: Algorithm 1 of Meng et al. and its statistic.

A pair is (batch of examples, gradient released for it); the critic scores every example of the batch against
the gradient, T (K, B). Sources: Meng et al., "Real-Time Privacy Risk Measurement with Privacy Tokens for
Gradient Leakage"; Belghazi et al. 2018 (MINE, arXiv 1801.04062).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedaudit.measures.mi_bounds import infonce
from fedaudit.measures.token_networks import EMBEDDING, HIDDEN, LATENT, Extractor, build_network
from fedaudit.measures.token_pairs import TokenPairs, join_pairs, mismatched

MOST_PAIRS = 64  # matched pairs, and as many mismatched ones, in one step
LR, EXTRACTOR_LR, SHARE = 1e-4, 1e-5, 0.1
_BLOCK = 2**22  # entries of the head's input at a time
_SHUFFLE = 20  # steps after which gradients are shuffled anew and validation pairs looked at
_TEMPERATURES = 2.0 ** torch.arange(-6, 13)


def algorithm_one(
    matched: Tensor, shuffled: Tensor, weights: Tensor, shuffled_weights: Tensor | None = None
) -> Tensor:
    """The value Algorithm 1 returns, in nats: E_pos - ln E_neg over all pairs and their examples together.

    E_pos = 1/L sum_l 1/|x_l| sum_i T(x_l, g_l)_i, E_neg the same of e^T with shuffled gradients. Both average
    over examples, so this is the Donsker-Varadhan value for ONE example of a batch and the gradient, not for
    the batch as a whole. On pairs the critic was fitted to it is no bound on anything.

    Args:
        matched: scores of matched pairs (L, B).
        shuffled: scores with shuffled gradients (L, B).
        weights: 1 / |x_l| for the examples of a batch (L, B), 0 for padding.
        shuffled_weights: the same for `shuffled`, where its batches are others.

    >>> float(algorithm_one(torch.ones(2, 2), torch.zeros(2, 2), torch.full((2, 2), 0.5)))
    1.0
    """
    terms = (shuffled + (weights if shuffled_weights is None else shuffled_weights).log()).flatten()
    return (weights * matched).sum(-1).mean() - (terms.logsumexp(0) - math.log(len(shuffled)))


def batch_values(matched: Tensor, shuffled: Tensor, weights: Tensor) -> Tensor:
    """The same value with each pair as a set of its own, in nats (L,): what the paper plots per batch."""
    return (weights * matched).sum(-1) - (shuffled + weights.log()).logsumexp(-1)


def paper_difference(
    matched: Tensor, shuffled: Tensor, wrong: Tensor, wrong_shuffled: Tensor, weights: Tensor
) -> Tensor:
    """I(X;G) - I(X;G'), averaged over batches, in nats: the statistic of the paper's table 1.

    I(X;G) is `batch_values` of matched pairs, I(X;G') the same function of mismatched pairs whose gradients
    are shuffled once more. The second logarithm estimates what the first does, so in expectation this is the
    mean score of matched minus that of mismatched pairs: not a mutual information, and not a bound on one.

    Args:
        matched: scores of matched pairs (L, B).
        shuffled: scores of the same batches with shuffled gradients (L, B).
        wrong: scores of mismatched pairs (L, B).
        wrong_shuffled: scores of the mismatched pairs with gradients shuffled once more (L, B).
        weights: 1 / |x_l| for the examples of a batch (L, B), 0 for padding.
    """
    values = batch_values(matched, shuffled, weights) - batch_values(wrong, wrong_shuffled, weights)
    return values.mean()


class TokenCritic:
    """A critic that can be trained over sub-epochs and evaluated at any time.

    Adam with learning rate `extractor_lr` on the gradient's feature extractor and `lr` on the rest; each step
    takes a tenth of the matched and as many of the mismatched pairs, at most 64 of each; the loss is -E_pos +
    ln E_neg, plus the reconstruction error of an autoencoder on the gradients of the step's matched pairs.

    Args:
        features: D, features per example.
        widths: gradient entries per layer.
        extractor: "autoencoder" or "transformer".
        generator: source of the initial weights, on the CPU.
        hidden: width of the autoencoder's hidden layers.
        latent: width of the autoencoder's token.
        lr: learning rate of everything but the extractor.
        extractor_lr: learning rate of the extractor.
        device: where to compute.
    """

    def __init__(
        self,
        features: int,
        widths: Sequence[int],
        extractor: Extractor,
        generator: torch.Generator,
        *,
        hidden: int = HIDDEN,
        latent: int = LATENT,
        lr: float = LR,
        extractor_lr: float = EXTRACTOR_LR,
        device: str | torch.device = "cpu",
    ) -> None:
        network = build_network(features, widths, extractor, generator, hidden=hidden, latent=latent)
        self.network = network.to(device).eval()
        slow = list(network.extractor.parameters())
        chosen = {id(parameter) for parameter in slow}
        fast = [parameter for parameter in network.parameters() if id(parameter) not in chosen]
        self._optimiser = torch.optim.Adam(
            [{"params": slow, "lr": extractor_lr}, {"params": fast, "lr": lr}], fused=True
        )
        self.steps = 0

    def fit(self, pairs: TokenPairs, steps: int, generator: torch.Generator, share: float = SHARE) -> None:
        """One sub-epoch: shuffle the gradients to mismatched pairs once, then `steps` steps.

        Args:
            pairs: the matched pairs D_pos.
            steps: N_MINE.
            generator: source of shuffles, step batches and dropout, on the CPU.
            share: share of the pairs in one step.

        Raises:
            ValueError: if a group of pairs has less than two.
        """
        device = pairs.members.device
        (partner,) = mismatched(pairs.groups, generator)
        size = min(MOST_PAIRS, max(1, round(share * len(pairs))))
        weights = pairs.weights
        network = self.network.train()
        for _ in range(steps):
            drawn = [torch.randperm(len(pairs), generator=generator)[:size].to(device) for _ in range(2)]
            positive, negative = drawn
            gradients = pairs.gradients[torch.cat([positive, partner[negative]])]
            tokens = network.extractor(gradients, generator)
            data = network.of_data(pairs.features[pairs.members[torch.cat(drawn)]])
            scores = network(data, network.of_gradient(tokens))
            value = algorithm_one(scores[:size], scores[size:], weights[positive], weights[negative])
            loss = network.extractor.loss(gradients[:size], tokens[:size]) - value
            self._optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            self._optimiser.step()
        self.steps += steps
        self._optimiser.zero_grad(set_to_none=True)
        network.eval()

    def scores(self, pairs: TokenPairs, partner: Tensor | None = None) -> Tensor:
        """T of each batch's examples (K, B) against its own gradient, or that of pair `partner` (K,)."""
        table = self._table(pairs)
        rows = torch.arange(len(pairs), device=table.device) if partner is None else partner
        return table[rows.unsqueeze(1), pairs.members]

    def pair_scores(self, pairs: TokenPairs) -> Tensor:
        """Mean of T over the examples of batch j against gradient i: (K, K), row = gradient."""
        table, weights = self._table(pairs), pairs.weights
        columns = [table[:, m] @ w for m, w in zip(pairs.members, weights, strict=True)]
        return torch.stack(columns, dim=1)

    def paper(self, pairs: TokenPairs, generator: torch.Generator) -> tuple[float, float]:
        """Algorithm 1's value and the paper's difference on these pairs, in nats.

        Raises:
            ValueError: if a group of pairs has less than four.
        """
        shuffles = mismatched(pairs.groups, generator, 3)
        weights = pairs.weights.double()
        table = self._table(pairs).double()
        matched, shuffled, wrong, again = (
            table[rows.unsqueeze(1), pairs.members]
            for rows in (torch.arange(len(pairs), device=table.device), *shuffles)
        )
        value = algorithm_one(matched, shuffled, weights)
        return float(value), float(paper_difference(matched, shuffled, wrong, again, weights))

    def state(self) -> dict[str, Tensor]:
        """A copy of the network's weights."""
        return copy.deepcopy(self.network.state_dict())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back weights from `state`; the optimiser goes on from where it is."""
        self.network.load_state_dict(state)

    def _table(self, pairs: TokenPairs) -> Tensor:
        """T of every gradient (rows) and every example (columns): (K, n)."""
        network = self.network
        with torch.no_grad():
            data = network.of_data(pairs.features)
            gradients = network.of_gradient(network.extractor(pairs.gradients))
            step = max(1, _BLOCK // (2 * EMBEDDING * len(data)))
            return torch.cat([network(data, part) for part in torch.split(gradients, step)])


@dataclass(frozen=True, eq=False)
class Trained:
    """A critic after all its steps, and as it was when it did best on validation pairs.

    Attributes:
        critic: the critic; its weights are whatever was restored last.
        final: weights after all steps.
        best: weights with the largest InfoNCE on validation pairs, at the best factor on their scores.
        step: steps before those weights.
        temperature: that factor.
    """

    critic: TokenCritic
    final: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    step: int
    temperature: float


def train_and_validate(
    critic: TokenCritic,
    train: Sequence[TokenPairs],
    validation: Sequence[TokenPairs],
    steps: int,
    generator: torch.Generator,
    share: float = SHARE,
) -> Trained:
    """Train on all parties' pairs, shuffling anew every 20 steps, and keep what does best on others.

    Args:
        critic: trained in place.
        train: pairs of each party.
        validation: pairs of other examples of the same parties.
        steps: further steps.
        generator: source of shuffles, step batches and dropout, on the CPU.
        share: share of the pairs in one step.
    """
    pairs = join_pairs(train)
    until = critic.steps + steps
    value, temperature = _best_infonce(critic, validation)
    best, step = critic.state(), critic.steps
    while critic.steps < until:
        critic.fit(pairs, min(_SHUFFLE, until - critic.steps), generator, share)
        now, factor = _best_infonce(critic, validation)
        if now > value:
            value, temperature, best, step = now, factor, critic.state(), critic.steps
    return Trained(critic, critic.state(), best, step, temperature)


def _best_infonce(critic: TokenCritic, parties: Sequence[TokenPairs]) -> tuple[float, float]:
    """The largest InfoNCE over factors on the scores, averaged over parties, and its factor."""
    values = []
    for pairs in parties:
        scores = critic.pair_scores(pairs).double().cpu()
        values.append(infonce(_TEMPERATURES[:, None, None] * scores))
    value, place = torch.stack(values).mean(0).max(0)
    return float(value), float(_TEMPERATURES[place])
