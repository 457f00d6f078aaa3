"""Federated averaging as one would write it with PyTorch alone, and well: the yardstick for the engine."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batches = Callable[[int, int], Sequence[Tensor]]  # of a client in a round


def federated_averaging(
    model: nn.Module,
    clients: Sequence[tuple[Tensor, Tensor]],
    cohorts: Iterable[Sequence[int]],
    batches: Batches,
    lr: float,
) -> Iterator[dict[str, Tensor]]:
    """Global weights after each round, one per cohort; one model and one optimizer serve every client.

    Args:
        model: initial weights; its last client's weights afterwards.
        clients: examples and labels of each client.
        cohorts: clients of each round.
        batches: indices of the examples of each local step.
        lr: learning rate of plain SGD.
    """
    state = model.state_dict()
    weights = {name: tensor.clone() for name, tensor in state.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, fused=True)
    model.train()
    for round_number, cohort in enumerate(cohorts, 1):
        total = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        examples = sum(len(clients[client][1]) for client in cohort)
        for client in cohort:
            x, y = clients[client]
            with torch.no_grad():
                for name, tensor in state.items():
                    tensor.copy_(weights[name])
            for indices in batches(client, round_number):
                optimizer.zero_grad(set_to_none=True)
                cross_entropy(model(x[indices]), y[indices]).backward()
                optimizer.step()
            with torch.no_grad():
                for name, tensor in state.items():
                    total[name].add_(tensor, alpha=len(y) / examples)
        weights = total
        yield weights


def shuffled(examples: int, batch_size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """The batches of one epoch in random order."""
    return torch.randperm(examples, generator=generator).split(batch_size)
