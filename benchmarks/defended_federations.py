"""What each defense does in one overfitted federation: membership by one score, and test accuracy."""

import math
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.membership import pooled, shown
from fedaudit.attacks.membership import average_over_rounds
from fedaudit.attacks.roc import auc
from fedaudit.audit.secure_sum import SUM
from fedaudit.config import RunConfig
from fedaudit.federation.execution import execute
from fedaudit.federation.setup import Setup, setup
from fedaudit.inference.candidate_scores import Score, candidate_scores
from fedaudit.kept_files import load_update, sum_file, update_file
from fedaudit.records import Run
from fedaudit.types import ClientUpdate

CLIENTS, EXAMPLES, EPOCHS, ROUNDS = 10, 20, 30, 4
SCORE: Score = "matched-filter"


def federations(
    defended: Mapping[str, str], released: str, model: str, layers: Mapping[str, Any]
) -> dict[str, Any]:
    """Membership and accuracy under each defense, by how the figure names it.

    Args:
        defended: specs by name; those that begin with `released` are seen through the global model alone.
        released: see there.
        model: the network.
        layers: what specs may name in braces.
    """
    rows: dict[str, Any] = {}
    runs: dict[str, tuple[Run, Setup]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, template in defended.items():
            spec = template.removeprefix(released).format(**layers)
            if spec not in runs:
                config = overfitted(spec, model, f"{folder}/{len(runs)}")
                runs[spec] = execute(config), setup(config.flat())
            rows[name] = described(*runs[spec], only_released=template.startswith(released))
    settings = {
        "clients": CLIENTS,
        "examples-of-each": EXAMPLES,
        "local-epochs": EPOCHS,
        "rounds": ROUNDS,
        "lr": 0.2,
        "batch-size": 16,
        "score": f"{SCORE}, mean over rounds",
        "interval": "value, low, high: 95 % bootstrap over clients; over candidates where one sum is seen",
    }
    return {"settings": settings, "rows": rows}


def overfitted(defense: str, model: str, folder: str) -> RunConfig:
    """The federation of `benchmarks.membership`, smaller: what no client holds is the server's reference."""
    rest = 1797 - round(1797 * RunConfig().data.test_fraction)
    return RunConfig.from_flat(
        {
            "data.reference-fraction": 1 - CLIENTS * EXAMPLES / rest,
            "model.name": model,
            "federation.clients": CLIENTS,
            "federation.rounds": ROUNDS,
            "federation.device": "cpu",
            "train.lr": 0.2,
            "train.batch-size": 16,
            "train.local-epochs": EPOCHS,
            "defense.name": defense,
            "audit.measures": "update-norm",
            "audit.save-updates": True,
            "output.directory": folder,
        }
    )


def described(run: Run, made: Setup, *, only_released: bool) -> dict[str, Any]:
    """Accuracy at the end, what is guaranteed, and how well members are told from others."""
    rows = run.records
    last = rows[rows["round"] == rows["round"].max()]
    accuracy = float(last[last["quantity"] == "accuracy"]["value"].iloc[0])
    rounds = released_rounds(run, made) if only_released else seen_rounds(run, made)
    found: dict[str, Any] = {
        "accuracy-test": round(accuracy, 3),
        "auc": membership(rounds, made),
        "updates-seen-in-a-round": len(rounds[0]),
    }
    stated = last.dropna(subset=["epsilon"])
    if len(stated) and math.isfinite(stated["epsilon"].max()):
        worst = stated.loc[stated["epsilon"].idxmax()]
        found |= {
            "epsilon-reached": round(float(worst["epsilon"]), 3),
            "delta": float(worst["delta"]),
            "unit": str(worst["privacy_unit"]),
            "accountant": str(worst["accountant"]),
        }
    return found


def seen_rounds(run: Run, made: Setup) -> list[list[ClientUpdate]]:
    """What the server saw of each round: every client's update, or their sum."""
    folder = run.path / "updates"
    return [
        [load_update(sum_file(folder, number))]
        if made.secure is not None
        else [load_update(update_file(folder, number, client)) for client in range(made.clients)]
        for number in range(1, ROUNDS + 1)
    ]


def released_rounds(run: Run, made: Setup) -> list[list[ClientUpdate]]:
    """The changes of the global model between broadcasts, which everybody sees."""
    folder = run.path / "updates"
    models = [load_update(update_file(folder, number, 0)).before for number in range(1, ROUNDS + 1)]
    total = sum(made.num_examples(client) for client in range(made.clients))
    return [
        [
            ClientUpdate(
                SUM,
                number,
                before,
                {name: after[name] - value for name, value in before.items()},
                total,
                summed=tuple(range(made.clients)),
            )
        ]
        for number, (before, after) in enumerate(pairwise(models), 1)
    ]


def used(client: int, rounds: list[list[ClientUpdate]], made: Setup) -> tuple[Tensor, Tensor]:
    """The examples a client trained on in some round: all it holds, unless its defense leaves some out."""
    x, y = made.client_data(client)
    rows = torch.unique(torch.cat([made.rows(client, updates[0].before) for updates in rounds]))
    return x[rows], y[rows]


def membership(rounds: list[list[ClientUpdate]], made: Setup) -> list[float]:
    """Area under the ROC, with its interval, of examples that clients used against the reference."""
    reference = made.data.reference
    assert reference is not None
    own = [used(client, rounds, made) for client in range(made.clients)]
    x = torch.cat([*(inputs for inputs, _ in own), reference.x])
    y = torch.cat([*(labels for _, labels in own), reference.y])
    scores = average_over_rounds(
        [candidate_scores(SCORE, updates, made.context(n), x, y) for n, updates in enumerate(rounds, 1)]
    )
    columns = torch.split(scores, [*(len(labels) for _, labels in own), len(reference.y)], dim=1)
    inside: list[Tensor] = [
        torch.cat([columns[client][row] for client in update.summed or (update.client_id,)])
        for row, update in enumerate(rounds[0])
    ]
    values, members, owners = pooled(inside, list(columns[-1]))
    return shown(auc(values, members, clusters=owners if len(inside) > 1 else None))
