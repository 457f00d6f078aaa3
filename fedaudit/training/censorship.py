"""Datapoint censorship at work: audit, remove the most unique examples, audit those that stay again.

A defense says how many examples go (`RemovesExamples.removals`); here they are chosen. What is chosen follows
from the client's examples and the weights it starts from, or, if the client decides once, from its examples
and the configuration. Whoever may look at the examples, an oracle in simulation, can say afterwards which
were used, and a resumed run chooses as the interrupted one did. Examples whose uniqueness differs by rounding
alone may be ordered otherwise on another machine.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedaudit.defenses.base import RemovesExamples
from fedaudit.measures.ghost_kernels import example_gram
from fedaudit.measures.gradient_uniqueness import gradient_uniqueness, relative_ridge
from fedaudit.training.local import TrainSettings, client_seed, plan_batches, train_locally
from fedaudit.types import Estimate, Loss

Audit = Callable[[Tensor], Tensor]
"""The uniqueness (m,) of some rows (m,) of a client's examples among one another."""
CHUNK = 64


@dataclass(frozen=True, eq=False)
class Peeled:
    """Which of n examples are left after the most unique were removed, and how unique they are.

    Attributes:
        rows: positions of those left (m,), ascending.
        before: their uniqueness (m,) among all n.
        after: their uniqueness (m,) among one another.
        removed: uniqueness of the others (n - m,) among all n.
    """

    rows: Tensor
    before: Tensor
    after: Tensor
    removed: Tensor


def peel(audit: Audit, num_examples: int, removals: Sequence[int]) -> Peeled:
    """Remove the most unique examples in passes, with an audit before each and after the last.

    Which of several equally unique examples goes is a matter of rounding; where they are the same number, the
    first.

    Args:
        audit: says how unique rows are among one another; called once per pass and once more.
        num_examples: n.
        removals: how many go in each pass.

    Raises:
        ValueError: if nothing would be left.

    >>> weights = torch.tensor([1.0, 9.0, 2.0])
    >>> peel(lambda rows: weights[rows], 3, [1]).rows
    tensor([0, 2])
    """
    if sum(removals) >= num_examples:
        raise ValueError(f"one example stays at least, got {sum(removals)} of {num_examples} to remove")
    rows = torch.arange(num_examples)
    first = current = audit(rows)
    for count in removals:
        order = current.argsort(descending=True, stable=True)
        rows = rows[order[count:].sort().values]
        current = audit(rows)
    gone = torch.ones(num_examples, dtype=torch.bool)
    gone[rows] = False
    return Peeled(rows, first[rows], current, first[gone])


def compare(audit: Audit, num_examples: int, rows: Tensor) -> Peeled:
    """The same numbers for rows that were chosen already."""
    first = audit(torch.arange(num_examples))
    gone = torch.ones(num_examples, dtype=torch.bool)
    gone[rows] = False
    return Peeled(rows, first[rows], audit(rows), first[gone])


def audit_of_gram(gram: Tensor, ridge_share: float) -> Audit:
    """Uniqueness by the Gram matrix (n, n) of the examples' gradients, at one ridge for every audit.

    The ridge is ridge_share times the mean squared norm of all n gradients, so that numbers before and after
    a removal can be compared: then GNQ of an example can only rise when others go. All are 0 if all gradients
    are zero.
    """
    ridge = relative_ridge(gram, ridge_share)

    def audit(rows: Tensor) -> Tensor:
        if ridge == 0:
            return torch.zeros(len(rows), dtype=torch.float64)
        return gradient_uniqueness(gram[rows][:, rows], ridge)

    return audit


def gram_at(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """Inner products (n, n) of the examples' gradients in evaluation mode, on the CPU; the mode is put back.

    Args:
        model: at the weights in question.
        loss: SUM-reduced loss (outputs, labels) -> scalar.
        x: examples (n, ...) on the model's device.
        y: labels (n,) there.

    Raises:
        ValueError: if a gradient is not finite.
    """
    training = model.training
    model.eval()
    try:
        gram = example_gram(model, loss, x, y, chunk=CHUNK).cpu()
    finally:
        model.train(training)
    if not bool(gram.isfinite().all()):
        raise ValueError("an audit needs finite gradients, got NaN or infinity: lower the learning rate")
    return gram


def rehearsed(
    build_model: Callable[[], nn.Module],
    loss: Loss,
    x: Tensor,
    y: Tensor,
    settings: TrainSettings,
    *,
    rounds: int,
    ridge_share: float,
    seed: int,
) -> Audit:
    """Uniqueness summed over audits before and after each of some rounds of plain local training.

    Every audit of rows trains a fresh model on these rows alone: what is left is trained without what went.
    The ridge of each of the rounds + 1 audits stays that of the first rehearsal.

    Args:
        build_model: returns the model at the weights a rehearsal starts from, on the device of the examples.
        loss: SUM-reduced loss.
        x: the client's examples (n, ...).
        y: labels (n,).
        settings: how a round trains.
        rounds: rounds of the rehearsal.
        ridge_share: as in `audit_of_gram`.
        seed: decides the order of the examples.
    """
    ridges: list[float] = []

    def audit(rows: Tensor) -> Tensor:
        model, chosen = build_model(), rows.to(x.device)
        mine, labels = x[chosen], y[chosen]
        total = torch.zeros(len(rows), dtype=torch.float64)
        for number in range(rounds + 1):
            gram = gram_at(model, loss, mine, labels)
            if number == len(ridges):
                ridges.append(relative_ridge(gram, ridge_share))
            if ridges[number] > 0:
                total += gradient_uniqueness(gram, ridges[number])
            if number < rounds:
                mixed = client_seed(seed, 0, number)
                batches = plan_batches(len(rows), settings, poisson=False, seed=mixed)
                train_locally(model, mine, labels, batches, settings, device=x.device)
        return total

    return audit


def findings(found: Peeled) -> dict[str, Estimate]:
    """What a client says of a removal: how many went, and how unique the others were and are.

    `uniqueness-before` and `uniqueness-after` are means over the examples that are left, `-max` their maxima.
    Where the maximum after comes near the extra "removed-min", the least unique example that went, removal
    exposed the next layer.
    """
    said = {"left": len(found.rows), "removed": len(found.removed)}
    gone: dict[str, float | int | str | bool] = {}
    if len(found.removed):
        gone = {"removed-min": float(found.removed.min()), "removed-mean": float(found.removed.mean())}
    rows = {"censored-examples": Estimate(len(found.removed), "1", "exact", extra=said)}
    for name, values in (("uniqueness-before", found.before), ("uniqueness-after", found.after)):
        rows[name] = Estimate(float(values.mean()), "1", "exact", extra={**said, **gone})
        rows[f"{name}-max"] = Estimate(float(values.max()), "1", "exact", extra={**said, **gone})
    return rows


class Censorship:
    """Which examples the clients of one federation use; what was audited once is remembered.

    Args:
        defense: how many are removed, and when it is decided.
        build_model: returns a model with the run's initial weights, on the device to compute on.
        loss: SUM-reduced loss.
        settings: local training, for rehearsals.
        seed: the run's.
        remembered: audits to remember.
    """

    def __init__(
        self,
        defense: RemovesExamples,
        build_model: Callable[[], nn.Module],
        loss: Loss,
        settings: TrainSettings,
        seed: int,
        remembered: int = 64,
    ) -> None:
        self.defense, self.build_model, self.loss = defense, build_model, loss
        self.settings, self.seed, self.remembered = settings, seed, remembered
        self._kept: OrderedDict[tuple[int, str], Peeled] = OrderedDict()
        self._lock = threading.Lock()
        self._last: tuple[Mapping[str, Tensor], str] = ({}, "")

    def left(self, num_examples: int) -> int:
        """How many of so many examples a client trains on."""
        return num_examples - sum(self.defense.removals(num_examples))

    def rows(self, client: int, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Positions (m,), ascending, of the examples a client trains on from these weights.

        Args:
            client: whose.
            x: all of its examples (n, ...).
            y: their labels (n,).
            weights: what was broadcast; without effect where a client decides once.
        """
        if not self.defense.removals(len(y)):
            return torch.arange(len(y))
        return self._chosen(client, x, y, weights).rows

    def peeled(self, client: int, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Peeled:
        """How unique a client's examples are at these weights, with and without those it leaves out."""
        if self.defense.removals(len(y)) and not self.defense.permanent:
            return self._chosen(client, x, y, weights)
        return compare(self._audit_at(x, y, weights), len(y), self.rows(client, x, y, weights))

    def _chosen(self, client: int, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Peeled:
        key = client, "" if self.defense.permanent else self._digest(weights)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        audit = self._rehearsal(client, x, y) if self.defense.permanent else self._audit_at(x, y, weights)
        found = peel(audit, len(y), self.defense.removals(len(y)))
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > self.remembered:
                self._kept.popitem(last=False)
        return found

    def _audit_at(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Audit:
        model = self.build_model()
        model.load_state_dict(dict(weights))
        device = next(model.parameters()).device
        return audit_of_gram(gram_at(model, self.loss, x.to(device), y.to(device)), self.defense.ridge_share)

    def _rehearsal(self, client: int, x: Tensor, y: Tensor) -> Audit:
        device = next(self.build_model().parameters()).device
        return rehearsed(
            self.build_model,
            self.loss,
            x.to(device),
            y.to(device),
            self.settings,
            rounds=self.defense.rehearsal,
            ridge_share=self.defense.ridge_share,
            seed=client_seed(self.seed, client, 0),  # a run's rounds begin with 1
        )

    def _digest(self, weights: Mapping[str, Tensor]) -> str:
        """A name for these weights; a round's are one object, whose name is computed once."""
        last, known = self._last
        if last is weights and known:
            return known
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in weights.items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._last = weights, digest.hexdigest()
        return self._last[1]
