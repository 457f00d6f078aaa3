"""Critics of pairs of vectors, and their training by any of the estimators' objectives."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from fedaudit.measures.mi_bounds import infonce, nwj
from fedaudit.measures.mi_objectives import PartitionAverage, js_objective, mine_objective, smile_objective

Estimator = Literal["infonce", "nwj", "mine", "smile", "js"]
Objective = Callable[[Tensor], Tensor]
_NAMES = ("infonce", "nwj", "mine", "smile", "js")


def perceptron(inputs: int, hidden: int, outputs: int, layers: int, generator: torch.Generator) -> nn.Module:
    """`layers` hidden layers of width `hidden` with ReLU; He-normal weights, zero biases."""
    widths = [inputs, *[hidden] * layers, outputs]
    modules: list[nn.Module] = []
    for index, (rows, columns) in enumerate(pairwise(widths)):
        # on "meta" the constructor draws nothing from the global generator
        linear = nn.Linear(rows, columns, device="meta").to_empty(device="cpu")
        last = index == layers
        gain = math.sqrt((1 if last else 2) / rows)
        with torch.no_grad():
            linear.weight.copy_(gain * torch.randn(columns, rows, generator=generator))
            linear.bias.zero_()
        modules += [linear] if last else [linear, nn.ReLU()]
    return nn.Sequential(*modules)


class SeparableCritic(nn.Module):
    """f(x, y) = g(x) . h(y) / sqrt(embedding): K^2 scores for 2K passes.

    Args:
        x_dims: features of x.
        y_dims: features of y.
        generator: source of the initial weights, on the CPU.
        hidden: width of the hidden layers.
        layers: how many hidden layers each side has.
        embedding: dimension of g and h; f has at most this rank.
    """

    def __init__(
        self,
        x_dims: int,
        y_dims: int,
        generator: torch.Generator,
        hidden: int = 256,
        layers: int = 2,
        embedding: int = 32,
    ) -> None:
        super().__init__()
        self.x_side = perceptron(x_dims, hidden, embedding, layers, generator)
        self.y_side = perceptron(y_dims, hidden, embedding, layers, generator)
        self.scale = embedding**-0.5

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores (K, K): row i = y_i, column j = x_j."""
        scores: Tensor = self.scale * self.y_side(y) @ self.x_side(x).T
        return scores


class ConcatenatedCritic(nn.Module):
    """f(x, y) = MLP([x, y]): no restriction on f, K^2 scores for K^2 passes.

    Args:
        x_dims: features of x.
        y_dims: features of y.
        generator: source of the initial weights, on the CPU.
        hidden: width of the hidden layers.
        layers: how many.
    """

    def __init__(
        self, x_dims: int, y_dims: int, generator: torch.Generator, hidden: int = 256, layers: int = 2
    ) -> None:
        super().__init__()
        self.of_pair = perceptron(x_dims + y_dims, hidden, 1, layers, generator)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores (K, K): row i = y_i, column j = x_j."""
        K = len(x)
        pairs = torch.cat([x.expand(K, *x.shape), y[:, None].expand(K, K, y.shape[1])], -1)
        scores: Tensor = self.of_pair(pairs).squeeze(-1)
        return scores


def objective_of(
    estimator: Estimator, clip: float = 5.0, momentum: float = 0.9, drift: float = 0.1
) -> Objective:
    """What one critic is trained by to serve an estimator: a function of scores (K, K) to maximise.

    For "mine" it holds the moving average of one training run: ask for a new one per critic.

    Raises:
        ValueError: if the estimator is unknown.
    """
    if estimator == "mine":
        average = PartitionAverage(momentum)
        return lambda scores: mine_objective(scores, average, drift)
    if estimator == "smile":
        return lambda scores: smile_objective(scores, clip)
    plain: dict[str, Objective] = {"infonce": infonce, "nwj": nwj, "js": js_objective}
    if estimator not in plain:
        raise ValueError(f"estimator must be one of {', '.join(_NAMES)}, got {estimator!r}")
    return plain[estimator]


def train_pair_critic(
    critic: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    *,
    steps: int,
    batch: int,
    generator: torch.Generator,
    lr: float = 5e-4,
) -> None:
    """Adam on the objective of batches of pairs; learning rate decayed to zero, gradient norm at most 1.

    Changes the critic. A batch holds distinct pairs of the n given, so no mismatched pair is a true one.

    Args:
        critic: maps x (K, .), y (K, .) to scores (K, K).
        x: (n, x_dims).
        y: (n, y_dims).
        objective: as `objective_of`.
        steps: how many.
        batch: K, pairs per step, at most n.
        generator: source of the batches, on the CPU.
        lr: peak learning rate.

    Raises:
        ValueError: if n differs between x and y or is smaller than the batch.
    """
    _check_pairs(x, y, batch)
    optimiser = torch.optim.Adam(critic.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    order, position = torch.empty(0, dtype=torch.int64), 0
    for _ in range(steps):
        if position + batch > len(order):
            order, position = torch.randperm(len(x), generator=generator).to(x.device), 0
        rows = order[position : position + batch]
        position += batch
        loss = -objective(critic(x[rows], y[rows]))
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(critic.parameters(), 1.0)  # one unlucky e^f must not undo the rest
        optimiser.step()
        schedule.step()


def fit_critic(
    x: Tensor,
    y: Tensor,
    *,
    estimator: Estimator = "infonce",
    critic: Literal["separable", "concatenated"] = "separable",
    steps: int = 2000,
    batch: int = 128,
    generator: torch.Generator,
    held_out: float = 0.2,
    hidden: int = 256,
    layers: int = 2,
    lr: float = 5e-4,
    clip: float = 5.0,
    momentum: float = 0.9,
    drift: float = 0.1,
) -> Tensor:
    """Scores (E, K, K) of held-out pairs by a critic fitted to the other pairs, K = batch.

    Give the scores to `mi_bounds`: `infonce`, `nwj`, `donsker_varadhan` (for "mine"), `smile`; each of the
    E matrices is one estimate. x and y are standardised by the mean and standard deviation of the pairs
    the critic is fitted to.

    It is not early-stopped: with few pairs and many steps the critic overfits, held-out values fall, and
    they stay valid. Values on the pairs it was fitted to would not be.

    Args:
        x: (n, x_dims).
        y: (n, y_dims), row i belongs to x_i; rows are independent draws.
        estimator: what trains the critic; "js" learns the log density ratio.
        critic: "separable" (cheap) or "concatenated" (K^2 passes).
        steps: training steps.
        batch: K, pairs per step and per held-out matrix.
        generator: source of split, weights and batches, on the CPU.
        held_out: fraction of the pairs to score; at least one batch of them is used.
        hidden: width of the critic's hidden layers.
        layers: how many.
        lr: peak learning rate of Adam.
        clip: tau of "smile".
        momentum: of MINE's moving average.
        drift: weight of the penalty on MINE's log-partition; 0 diverges where the information exceeds ln K.

    Raises:
        ValueError: if either part holds fewer pairs than a batch, or estimator or critic are unknown.
    """
    objective = objective_of(estimator, clip, momentum, drift)
    build = {"separable": SeparableCritic, "concatenated": ConcatenatedCritic}
    if critic not in build:
        raise ValueError(f"critic must be one of {', '.join(build)}, got {critic!r}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie inside (0, 1), got {held_out}: use e.g. 0.2")
    _check_pairs(x, y, batch)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    evaluations = int(len(x) * held_out) // batch
    scored, fitted = order[: evaluations * batch], order[evaluations * batch :]
    if evaluations < 1 or len(fitted) < batch:
        raise ValueError(
            f"{len(x)} pairs with held_out={held_out} leave no batch of {batch} to fit or to score: "
            "give more pairs or a smaller batch"
        )
    x, y = _standardised(x, fitted), _standardised(y, fitted)
    model = build[critic](x.shape[1], y.shape[1], generator, hidden=hidden, layers=layers).to(x)
    train_pair_critic(
        model, x[fitted], y[fitted], objective, steps=steps, batch=batch, generator=generator, lr=lr
    )
    with torch.no_grad():
        return torch.stack([model(x[rows], y[rows]) for rows in scored.view(evaluations, batch)])


def _standardised(rows: Tensor, fitted: Tensor) -> Tensor:
    mean, std = rows[fitted].mean(0), rows[fitted].std(0, correction=0)
    return (rows - mean) / torch.where(std > 0, std, 1.0)


def _check_pairs(x: Tensor, y: Tensor, batch: int) -> None:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not 2 <= batch <= len(x):
        raise ValueError(
            "x and y must be (n, features) with the same n, at least a batch of 2 or more, got shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)} and batch {batch}"
        )
