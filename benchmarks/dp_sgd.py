"""Client trainings with DP-SGD per second: fedaudit's client against Opacus' plain recipe.

    python -m benchmarks.dp_sgd

Clients with 32 or 100 handwritten digits (8x8), one local epoch in batches of 8, and the client's epsilon
asked for after every round. The plain recipe copies the model, calls `PrivacyEngine().make_private` and asks
the engine for `get_epsilon` in every round, with Opacus' default accountant and with its Rényi accountant. It
forgets earlier rounds; fedaudit's number counts all of them. fedaudit's clients use `grad-sample=auto`;
"grad-sample" sets that against hooks, which hold every example's gradients. Each pair alternates round by
round (A B A B); "ratio" is the second's time over the first's. Training without privacy stands beside them:
neither can be faster, so that the ratio falls as training grows beside the rest.

"accounting" is the share of clients' time that choosing noise, checking the budget and stating epsilon take
over 20 rounds, from cold caches, for ten clients of one size and for ten of different sizes.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.measurement import Rounds, compare, keep, spread, timed
from fedaudit.accounting import Ledger, noise_multiplier_for
from fedaudit.data.embedded import digits
from fedaudit.defenses.adaptive_noise import LeakageAdaptive
from fedaudit.defenses.base import Defense, RunPlan, adaptive
from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.defenses.none import NoDefense
from fedaudit.models.build import build_model
from fedaudit.training.local import TrainSettings, client_seed, plan_batches, steps_per_round, train_locally

BATCH, EPSILON, ROUNDS = 8, 8.0, 20
SETTINGS = TrainSettings(lr=0.05, batch_size=BATCH)
CASES = (("mlp", 32), ("mlp", 100), ("cnn", 32), ("cnn", 100))
Client = tuple[Tensor, Tensor]


def clients_of(sizes: Sequence[int]) -> list[Client]:
    """Consecutive examples of the digits, as many as each client has."""
    data = digits()
    ends = list(itertools.accumulate(sizes))
    return [(data.x[end - n : end], data.y[end - n : end]) for n, end in zip(sizes, ends, strict=True)]


class Audited:
    """What fedaudit's client does in a round, without the message around it."""

    def __init__(self, model: nn.Module, clients: Sequence[Client], defense: Defense) -> None:
        self.model, self.clients, self.defense = model, clients, defense
        self.start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.ledgers = [Ledger() for _ in clients]
        self.accounting = 0.0
        self.round = 0

    def __call__(self) -> None:
        self.round += 1
        for number, client in enumerate(self.clients):
            self.train(number, *client)

    def train(self, number: int, x: Tensor, y: Tensor) -> float:
        steps = steps_per_round(len(y), SETTINGS)
        began = time.perf_counter()
        changing = adaptive(self.defense)
        if changing is not None:
            told = 0.8 + 0.1 * (self.round % 5)
            release = changing.release_in_round(len(y), self.round, self.ledgers[number], told)
        else:
            release = self.defense.release(len(y), BATCH, steps * ROUNDS)
        self.ledgers[number] = self.defense.charge(self.ledgers[number], release, steps, len(y))
        self.accounting += time.perf_counter() - began
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(self.start[name])
        seed = client_seed(0, number, self.round)
        batches = plan_batches(len(y), SETTINGS, poisson=self.defense.poisson, seed=seed)
        noise = torch.Generator().manual_seed(seed ^ 1)
        train_locally(
            self.model, x, y, batches, SETTINGS, defense=self.defense, release=release, generator=noise
        )
        began = time.perf_counter()
        guarantee = self.defense.guarantee(self.ledgers[number], len(y))
        self.accounting += time.perf_counter() - began
        return guarantee.epsilon if guarantee else 0.0


class PlainRecipe:
    """Opacus as its introduction has it, once per client and round."""

    def __init__(self, model: nn.Module, clients: Sequence[Client], accountant: str) -> None:
        self.template, self.clients, self.accountant = model, clients, accountant
        self.start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def __call__(self) -> None:
        for x, y in self.clients:
            self.train(x, y)

    def train(self, x: Tensor, y: Tensor) -> float:
        from opacus import PrivacyEngine
        from torch.utils.data import DataLoader, TensorDataset

        import fedaudit.opacus_parts  # noqa: F401 - keeps the root logger as it is

        model = copy.deepcopy(self.template)
        model.load_state_dict(self.start)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=SETTINGS.lr)
        loader: Any = DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True)
        noise = noise_multiplier_for(EPSILON, 1e-5, BATCH / len(y), len(loader) * ROUNDS)
        engine = PrivacyEngine(accountant=self.accountant)
        private, stepper, batches = engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=noise, max_grad_norm=1.0
        )
        for inputs, labels in batches:
            stepper.zero_grad()
            cross_entropy(private(inputs), labels).backward()
            stepper.step()
        return float(engine.get_epsilon(1e-5))


def alternate(first: Callable[[], None], second: Callable[[], None], rounds: int) -> tuple[Rounds, Rounds]:
    """Wall and CPU seconds of both, round by round in turn."""
    found: tuple[Rounds, Rounds] = ([], [])
    for _ in range(rounds):
        found[0].append(timed(first))
        found[1].append(timed(second))
    return found


def measure(name: str, examples: int, options: argparse.Namespace) -> dict[str, Any]:
    """Client trainings per second for one model and number of examples."""
    clients = clients_of([examples] * options.clients)
    model = build_model(name, (1, 8, 8), 10, seed=0)
    found: dict[str, Any] = {"model": name, "examples-per-client": examples}
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["steps"] = steps_per_round(examples, SETTINGS)
    for accountant in ("prv", "rdp"):
        mine = Audited(model, clients, DPSGD(EPSILON, grad_sample="auto"))
        recipe = PlainRecipe(copy.deepcopy(model), clients, accountant)
        mine()  # imports and caches of both
        recipe()
        pairs = [alternate(mine, recipe, options.rounds) for _ in range(options.pairs)]
        found[accountant] = compare(pairs, ("fedaudit", "opacus-recipe"), options.clients)
    modes = [Audited(model, clients, DPSGD(EPSILON, grad_sample=mode)) for mode in ("auto", "hooks")]
    for mode in modes:
        mode()
    pairs = [alternate(modes[0], modes[1], options.rounds) for _ in range(options.pairs)]
    found["grad-sample"] = compare(pairs, ("auto", "hooks"), options.clients)
    plain = Audited(model, clients, NoDefense())
    plain()
    seconds = [timed(plain)[0] for _ in range(options.pairs * options.rounds)]
    found["without-dp-clients-per-second"] = spread([options.clients / second for second in seconds])
    return found


def accounting_share(name: str, sizes: Sequence[int], defense: Defense) -> dict[str, Any]:
    """Share of training time that accounting takes over a run, and its milliseconds per client and round."""
    clients = clients_of(sizes)
    model = build_model(name, (1, 8, 8), 10, seed=0)
    Audited(model, clients, DPSGD(0.0, noise_multiplier=1.0))()  # imports
    mine = Audited(model, clients, defense)
    shares: list[float] = []
    first = 0.0
    began = time.perf_counter()
    for _ in range(ROUNDS):
        before, started = mine.accounting, time.perf_counter()
        mine()
        shares.append((mine.accounting - before) / (time.perf_counter() - started))
        first = first or mine.accounting
    return {
        "model": name,
        "sizes": f"{min(sizes)} to {max(sizes)}" if len(set(sizes)) > 1 else str(sizes[0]),
        "share-of-the-run": round(mine.accounting / (time.perf_counter() - began), 5),
        "share-of-a-round": spread(shares[1:]),
        "ms-in-the-first-round": round(1000 * first / len(clients), 4),
        "ms-in-later-rounds": round(1000 * (mine.accounting - first) / len(clients) / (ROUNDS - 1), 4),
    }


def main() -> None:
    """Measure all cases and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds of each in a pair")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = [measure(name, examples, options) for name, examples in CASES]
    plan = RunPlan(ROUNDS, BATCH, lambda n: steps_per_round(n, SETTINGS))
    shares = []
    targets = itertools.count(1)  # another budget each time: nothing is remembered from the case before
    for name, (kind, sizes) in itertools.product(
        ("mlp", "cnn"), (("one size", [100] * 10), ("ten sizes", list(range(82, 120, 4))))
    ):
        budget = 8.0 + 0.01 * next(targets)
        defenses: dict[str, Defense] = {
            "dp-sgd": DPSGD(budget),
            "leakage-adaptive": LeakageAdaptive(budget + 0.5).planned(plan),
        }
        for label, defense in defenses.items():
            shares.append({"defense": label, "clients": kind, **accounting_share(name, sizes, defense)})
    method = (
        "round by round in turn (A B A B); ratio = time of Opacus' recipe, re-created and asked for epsilon "
        "in every round, / time of fedaudit, with epsilon over all rounds"
    )
    keep(
        "dp_sgd",
        {"opacus": metadata.version("opacus"), "method": method, "cases": cases, "accounting": shares},
        options.output,
    )


if __name__ == "__main__":
    main()
