"""A separable critic that scores how well a batch of examples explains a noisy sum of their gradients.

    f(batch, observation) = phi(batch) . psi(observation) + a(batch)

The batch side encodes every example, adds the codes up (so the order of examples does not matter) and
maps the sum; the observation side maps the noisy sum. K batches against K observations cost one product.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedaudit.measures.mi_bounds import infonce

_GROUP = 16  # clients that share one training step: more only cost time
# noise variance assumed on top of the channel's, relative to the strongest coordinate's signal: of a critic
# that is told the gradients only against rounding, of one that learns them for what it gets wrong
_ROUNDING, _LEARNED = 1e-8, 0.01
_PATIENCE = 30  # steps without a better held-out value after which training stops
_TEMPERATURES = 2.0 ** torch.arange(-6, 7)


@dataclass(frozen=True, eq=False)
class Pool:
    """Examples from which batches are drawn, and how a batch's gradient is observed.

    Attributes:
        features: what the critic sees of an example (n, F).
        coordinates: an example's gradient (n, d), centred.
        variance: variance of each coordinate over examples (d,).
        noise_std: standard deviation added to each coordinate of the SUM over the batch.
        batch: examples per batch, b <= n.
    """

    features: Tensor
    coordinates: Tensor
    variance: Tensor
    noise_std: float
    batch: int

    def draw(self, batches: int, generator: torch.Generator) -> Tensor:
        """Memberships (batches, n) in {0, 1}, b ones per row, uniform over subsets; rows may coincide."""
        return self._members(self._subsets(batches, generator))

    def draw_distinct(self, batches: int, generator: torch.Generator) -> Tensor:
        """As `draw` without coinciding rows; fewer rows if there are not as many subsets."""
        wanted = min(batches, math.comb(len(self.features), self.batch))
        seen: dict[tuple[int, ...], None] = {}
        while len(seen) < wanted:
            seen.update(dict.fromkeys(map(tuple, self._subsets(batches, generator).tolist())))
        return self._members(torch.tensor(list(seen)[:wanted]))

    def _subsets(self, batches: int, generator: torch.Generator) -> Tensor:
        keys = torch.rand(batches, len(self.features), generator=generator)
        return keys.topk(self.batch, dim=1).indices.sort(dim=1).values

    def _members(self, subsets: Tensor) -> Tensor:
        zeros = torch.zeros(len(subsets), len(self.features))
        return zeros.scatter_(1, subsets, 1.0).to(self.features)

    def observe(self, members: Tensor, generator: torch.Generator) -> Tensor:
        """The noisy sums (K, d) of the batches' coordinates, as released."""
        return self.noisy(members @ self.coordinates, generator)

    def noisy(self, sums: Tensor, generator: torch.Generator) -> Tensor:
        """Sums of coordinates (..., d) with the release's noise added."""
        return sums + self.noise_std * torch.randn(sums.shape, generator=generator).to(sums)


@dataclass(frozen=True, eq=False)
class _Channel:
    """What the critic knows of how a batch is observed; leading dimensions are those of the pools."""

    batch: Tensor  # (..., 1, 1)
    signal: Tensor  # (..., 1, d), variance of the noiseless sums
    noise: Tensor  # (..., 1, 1), variance of the noise

    @classmethod
    def of(cls, *pools: Pool) -> "_Channel":
        """The channels of these pools, stacked."""
        like = pools[0].features
        batch = like.new_tensor([float(pool.batch) for pool in pools])[:, None, None]
        noise = like.new_tensor([pool.noise_std**2 for pool in pools])[:, None, None]
        return cls(batch, batch * torch.stack([pool.variance for pool in pools]).unsqueeze(1), noise)

    def __getitem__(self, group: Tensor | int) -> "_Channel":
        return _Channel(self.batch[group], self.signal[group], self.noise[group])

    def floored(self, floor: float) -> Tensor:
        """Noise variance with a floor (..., 1, 1): no coordinate is trusted beyond it."""
        return self.noise + floor * self.signal.amax(-1, keepdim=True)


class BatchCritic(nn.Module):
    """Encoders of batches and observations, with a linear path beside every hidden layer.

    The last d features may hold the example's own coordinates in units of their standard deviation
    (`informed`). The linear paths then start as the identity on them and the hidden layers add nothing, so
    scores start as EXACTLY the Gaussian log-likelihood of the observation given the batch; the hidden
    layers learn what that misses. (Started at random instead, however small, they drown it on held-out
    examples that lie many standard deviations from the critic-train ones, as in a model that has fitted
    those.) Otherwise the map from examples to gradients is learned from nothing. Weights take the dtype of
    the features they are fitted to; float64 keeps the likelihood of a noiseless sum exact.

    Args:
        features: F, features per example.
        dims: d, coordinates of an observation.
        hidden: width of the hidden layers.
        informed: whether the last d features are the example's coordinates.
        generator: source of the initial weights, on the CPU.
    """

    def __init__(
        self, features: int, dims: int, hidden: int, informed: bool, generator: torch.Generator
    ) -> None:
        super().__init__()

        def weight(rows: int, columns: int, gain: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) * gain / math.sqrt(rows))

        def start(gain: float) -> float:
            return 0.0 if informed else gain

        self.floor = _ROUNDING if informed else _LEARNED
        self.example_in = weight(features, hidden, math.sqrt(2))
        self.example_bias = nn.Parameter(torch.zeros(hidden))
        self.example_out = weight(hidden, dims, start(0.5))
        self.example_skip = weight(features, dims, start(0.5))
        if informed:
            self.example_skip.data[features - dims :] = torch.eye(dims)
        self.batch_in = weight(dims, hidden, math.sqrt(2))
        self.batch_bias = nn.Parameter(torch.zeros(hidden))
        self.batch_out = weight(hidden, dims + 1, start(0.05))
        self.observation_in = weight(dims, hidden, math.sqrt(2))
        self.observation_bias = nn.Parameter(torch.zeros(hidden))
        self.observation_out = weight(hidden, dims, start(0.05))
        self.observation_skip = nn.Parameter(torch.eye(dims))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.log_curvature = nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor, members: Tensor, observations: Tensor, channel: _Channel) -> Tensor:
        """Scores (..., M, K): row i = observation i, column j = batch j.

        Args:
            features: (..., n, F).
            members: memberships of the batches (..., K, n).
            observations: noisy sums (..., M, d).
            channel: how these batches are observed.
        """
        hidden = torch.relu(features @ self.example_in + self.example_bias)
        codes = hidden @ self.example_out + features @ self.example_skip
        pooled = members @ codes / channel.batch.sqrt()
        mapped = torch.relu(pooled @ self.batch_in + self.batch_bias) @ self.batch_out
        phi = pooled + mapped[..., :-1]
        noise = channel.floored(self.floor)
        spread = (channel.signal + noise).sqrt()
        seen = observations / spread
        psi = seen @ self.observation_skip + (
            torch.relu(seen @ self.observation_in + self.observation_bias) @ self.observation_out
        )
        # with phi = mean / sqrt(signal) and psi = observation / spread these weights give the Gaussian
        # log-likelihood mean.observation / noise - mean^2 / (2 noise); both vanish as noise grows
        cross = spread * channel.signal.sqrt() / noise
        own = -0.5 * self.log_curvature.exp() * (channel.signal / noise * phi.square()).sum(-1)
        own = own + mapped[..., -1] * cross.mean(-1)
        return self.log_scale.exp() * (psi @ (cross * phi).transpose(-1, -2) + own.unsqueeze(-2))


def train_critic(
    train: Sequence[Pool],
    validation: Sequence[Pool],
    *,
    pairs: int,
    steps: int,
    hidden: int,
    informed: bool,
    lr: float,
    generator: torch.Generator,
) -> tuple[BatchCritic, int]:
    """A critic fitted to batches of `train` by InfoNCE, with the weights that did best on `validation`.

    Every step draws new batches and new noise; mismatched pairs come from the same pool, so that telling
    pools apart earns nothing. At most 16 pools share a step.

    Args:
        train: one pool per client.
        validation: pools of other examples of the same clients.
        pairs: batches per client and step.
        steps: largest number of steps.
        hidden: width of the hidden layers.
        informed: whether the last d features are the example's own coordinates.
        lr: peak learning rate of Adam, decayed to zero along a cosine.
        generator: source of weights, batches and noise, on the CPU.

    Returns:
        The critic and the step its weights are from; 0 is the untrained critic.
    """
    first = train[0]
    critic = BatchCritic(first.features.shape[1], first.coordinates.shape[1], hidden, informed, generator)
    critic.to(first.features)
    stacked = _Stack(train)
    held = _Stack(validation)
    every = torch.arange(len(validation))
    members = held.draw(every, pairs, generator)
    observed = held.observe(every, members, generator)

    def held_out() -> float:
        with torch.no_grad():
            scores = critic(held.features, members, observed, held.channel)
            return float(infonce(scores).mean())

    optimiser = torch.optim.AdamW(critic.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
    )
    best, best_step, best_state = held_out(), 0, copy.deepcopy(critic.state_dict())
    if best >= math.log(pairs) - 1e-6:  # at the ceiling nothing is left to learn
        steps = 0
    for step in range(1, steps + 1):
        group = torch.randperm(len(train), generator=generator)[:_GROUP]
        drawn = stacked.draw(group, pairs, generator)
        observations = stacked.observe(group, drawn, generator)
        scores = critic(stacked.features[group], drawn, observations, stacked.channel[group])
        value = infonce(scores).mean()
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(-value)
        optimiser.step()
        schedule.step()
        if step % 10 == 0 or step == steps:
            now = held_out()
            if now > best:
                best, best_step, best_state = now, step, copy.deepcopy(critic.state_dict())
            elif step - best_step >= _PATIENCE:
                break
    critic.load_state_dict(best_state)
    return critic, best_step


def evaluate_critic(
    critic: BatchCritic, pool: Pool, candidates: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of distinct batches of a pool, the batches and what was observed of them.

    Returns:
        Scores (K, K) with row = observation, memberships (K, n), noisy sums (K, d).
    """
    members = pool.draw_distinct(candidates, generator)
    observations = pool.observe(members, generator)
    return score_batches(critic, pool, members, observations), members, observations


def score_batches(critic: BatchCritic, pool: Pool, members: Tensor, observations: Tensor) -> Tensor:
    """Scores (..., M, K) of observations (..., M, d) against batches of a pool (K, n), without gradients."""
    with torch.no_grad():
        scores: Tensor = critic(pool.features, members, observations, _Channel.of(pool)[0])
    return scores


def log_normaliser(
    critic: BatchCritic,
    pool: Pool,
    batches: int,
    observations: Tensor,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """ln mean_j e^{f_ij} of observations against batches drawn afresh from their pool (K, 1).

    Donsker-Varadhan needs scores near ln p(y|x)/p(y); InfoNCE leaves a term of y alone free. Subtracting
    this one, an estimate of that term from batches other than those evaluated, fixes it.
    """
    scores = temperature * score_batches(critic, pool, pool.draw(batches, generator), observations)
    return scores.logsumexp(-1, keepdim=True) - math.log(batches)


def best_temperature(critic: BatchCritic, pool: Pool, candidates: int, generator: torch.Generator) -> float:
    """The factor on the scores that gives the largest InfoNCE on this pool (a validation pool)."""
    scores, _, _ = evaluate_critic(critic, pool, candidates, generator)
    factors = _TEMPERATURES.to(scores)
    return float(factors[infonce(factors[:, None, None] * scores).argmax()])


class _Stack:
    """Pools of different sizes as padded tensors."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        pad = nn.utils.rnn.pad_sequence
        self.features: Tensor = pad([pool.features for pool in pools], batch_first=True)
        self.coordinates: Tensor = pad([pool.coordinates for pool in pools], batch_first=True)
        self.channel = _Channel.of(*pools)
        self.sizes = [len(pool.features) for pool in pools]
        self.batches = [pool.batch for pool in pools]

    def draw(self, group: Tensor, batches: int, generator: torch.Generator) -> Tensor:
        """Memberships (G, batches, n) of uniform subsets of each pool's own examples."""
        n = self.features.shape[1]
        keys = torch.rand(len(group), batches, n, generator=generator)
        sizes = torch.tensor([self.sizes[i] for i in group.tolist()])[:, None, None]
        wanted = torch.tensor([self.batches[i] for i in group.tolist()])[:, None, None]
        keys.masked_fill_(torch.arange(n) >= sizes, -1.0)  # padding is never drawn
        chosen = keys.topk(int(wanted.max()), dim=-1).indices
        ones = (torch.arange(chosen.shape[-1]) < wanted).to(keys).expand(chosen.shape)
        return torch.zeros_like(keys).scatter_(-1, chosen, ones).to(self.features)

    def observe(self, group: Tensor, members: Tensor, generator: torch.Generator) -> Tensor:
        """Noisy sums (G, batches, d)."""
        sums: Tensor = members @ self.coordinates[group]
        noise = torch.randn(sums.shape, generator=generator).to(sums)
        return sums + self.channel.noise[group].sqrt() * noise
