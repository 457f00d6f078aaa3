"""Mutual-information estimators where the truth is known, and how often the measure's null is rejected.

    python -m benchmarks.mutual_information

First the Gaussian staircase: x and y in twenty dimensions with the same correlation in each, such that
I = 2, 4, 6, 8, 10 nats; "cubic" replaces y by y^3, which changes no information but every critic's task.
Every estimator is evaluated on fresh batches of K pairs, once with the OPTIMAL critic (ln p(y|x)/p(y), for
NWJ one more, for CLUB the true conditional), which shows the estimator's own bias and spread, and once with
a trained separable critic, which adds the critic's. Cubing is undone by an optimal critic: it has one table.

Then false alarms: clients whose examples' gradients are independent of all that the critic sees.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from benchmarks.measurement import keep
from benchmarks.picture import write_figure
from fedaudit.measures.club import club, fit_conditional
from fedaudit.measures.critics import Estimator, fit_critic
from fedaudit.measures.mi_bounds import donsker_varadhan, gaussian_channel, infonce, nwj, smile
from fedaudit.measures.mutual_information import MutualInformation
from fedaudit.types import ClientUpdate, Estimate, LocalEvidence, RoundContext, StepRelease

D = 20
TRUTHS = (2.0, 4.0, 6.0, 8.0, 10.0)
VALUES: dict[Estimator, Callable[[Tensor], Tensor]] = {
    "infonce": infonce,
    "nwj": nwj,
    "mine": donsker_varadhan,
    "smile": smile,
}
SHOWN = {"infonce": "InfoNCE", "nwj": "NWJ", "mine": "DV (MINE)", "smile": "SMILE(5)", "club": "CLUB"}
FAINT = 1e-7


def main() -> None:
    """Fill both tables and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of a critic")
    parser.add_argument("--batch", type=int, default=64, help="K, pairs per training step and per estimate")
    parser.add_argument("--evaluations", type=int, default=100, help="held-out estimates per trained critic")
    parser.add_argument("--repetitions", type=int, default=400, help="estimates with the optimal critic")
    parser.add_argument("--null-rounds", type=int, default=20, help="of ten clients each")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--chromium", help="a browser that turns the figure into a PNG")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter(), time.process_time()
    staircase = {
        "optimal critic": [optimal(truth, options) for truth in TRUTHS],
        "trained critic, plain": [trained(truth, 1, options) for truth in TRUTHS],
        "trained critic, cubic": [trained(truth, 3, options) for truth in TRUTHS],
    }
    settings = {
        "dimensions": D,
        "K": options.batch,
        "ln-K": round(math.log(options.batch), 3),
        "estimates-with-the-optimal-critic": options.repetitions,
        "critic": "separable, 2 hidden layers of 256, embedding 32",
        "conditional-of-club": "Gaussian, mean and log-variance: 2 hidden layers of 256, no tanh",
        "steps": options.steps,
        "lr": options.lr,
        "mine": "moving average with momentum 0.9, penalty 0.1 on the squared log-partition",
        "smile-clip": 5.0,
        "held-out-estimates-per-trained-critic": options.evaluations,
        "trained-critics-per-cell": 1,
    }
    results = {
        "settings": settings,
        "note": "mean and sd of single estimates from K pairs, nats; the mean's own error is sd/sqrt(count)",
        "staircase": staircase,
        "false-alarms": false_alarms(options.null_rounds),
        "wall-seconds": round(time.perf_counter() - started[0], 1),
        "cpu-seconds": round(time.process_time() - started[1], 1),
    }
    keep("mutual_information", results, options.output)
    if options.output is None:
        figure = draw(staircase, math.log(options.batch))
        write_figure(figure, "mutual_information", options.chromium, 1200, 560)


def correlated(truth: float, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """x, y (n, D) and their correlation."""
    rho = math.sqrt(1 - math.exp(-2 * truth / D))
    x, other = torch.randn(2, n, D, generator=generator, dtype=torch.float64)
    return x, rho * x + math.sqrt(1 - rho**2) * other, rho


def optimal(truth: float, options: argparse.Namespace) -> dict[str, Any]:
    """Every estimator with the critic that would be perfect."""
    found: dict[str, list[Tensor]] = {name: [] for name in [*VALUES, "club", "gaussian-channel"]}
    for repetition in range(options.repetitions):
        x, y, rho = correlated(truth, options.batch, torch.Generator().manual_seed(repetition))
        square = (y[:, None] - rho * x[None]).square() / (1 - rho**2) - y[:, None].square()
        ratio = (-0.5 * square - 0.5 * math.log(1 - rho**2)).sum(-1)
        for name, value in VALUES.items():
            found[name].append(value(ratio + (name == "nwj")))
        found["club"].append(club(rho * x, torch.full_like(x, math.log(1 - rho**2)), y))
        channel = gaussian_channel(rho * x, 1, math.sqrt(1 - rho**2))
        found["gaussian-channel"].append(torch.tensor(channel, dtype=torch.float64))
    cells = {name: cell(torch.stack(values)) for name, values in found.items()}
    expected = D * rho**2 / (1 - rho**2)
    return {"truth": truth, **cells, "club-in-expectation": round(expected, 3)}


def trained(truth: float, power: int, options: argparse.Namespace) -> dict[str, Any]:
    """Every estimator with a critic trained for it, on pairs it was not fitted to."""
    K, fitted, held = options.batch, options.batch * options.steps, options.batch * options.evaluations
    x, y, rho = correlated(truth, fitted + held, torch.Generator().manual_seed(int(10 * truth)))
    x, seen = x.float(), (y**power).float()
    row: dict[str, Any] = {"truth": truth}
    for name, value in VALUES.items():
        scores = fit_critic(
            x,
            seen,
            estimator=name,
            steps=options.steps,
            batch=K,
            lr=options.lr,
            held_out=(held + 0.5) / (fitted + held),
            generator=torch.Generator().manual_seed(1),
        )
        row[name] = cell(value(scores.double()))
    seen = (seen - seen[:fitted].mean(0)) / seen[:fitted].std(0)
    conditional = fit_conditional(
        x[:fitted],
        seen[:fitted],
        steps=options.steps,
        batch=K,
        lr=options.lr,
        generator=torch.Generator().manual_seed(1),
    )
    with torch.no_grad():
        parts = zip(x[fitted:].split(K), seen[fitted:].split(K), strict=True)
        row["club"] = cell(torch.stack([club(*conditional(a), b).double() for a, b in parts]))
    if power == 1:  # needs additive noise of known size: not applicable to y^3
        channel = gaussian_channel(rho * x, 1, math.sqrt(1 - rho**2))
        row["gaussian-channel"] = {"mean": round(channel, 3), "pairs": len(x)}
    return row


def cell(values: Tensor) -> dict[str, float | int]:
    """Mean and standard deviation of single estimates."""
    return {
        "mean": float(f"{float(values.mean()):.4g}"),
        "sd": float(f"{float(values.std()):.3g}"),
        "count": len(values),
    }


class FaintPixels(nn.Module):
    """Depends on pixels too faint to count as varying: nothing the critic sees tells of the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 6:] @ self.weight / FAINT


def false_alarms(rounds: int, clients: int = 10) -> dict[str, Any]:
    """Share of clients at or below each level, where the measure's null is true."""
    cases = {
        "gradients unrelated to what the critic sees": (0.3, False),
        "noise a thousand times the gradient, critic told the gradients": (1e3, True),
    }
    found: dict[str, Any] = {}
    for case, (noise, informed) in cases.items():
        measure = MutualInformation(steps=20, pairs=16, permutations=199, hidden=8, informed=informed)
        p_values: list[float] = []
        for number in range(rounds):
            updates = [
                ClientUpdate(number * clients + i, 1, {"weight": torch.zeros(6)}, {}, 30)
                for i in range(clients)
            ]
            results = measure(updates, unrelated(number, noise))
            p_values += [float(r.extra["p-value"]) for r in results if isinstance(r, Estimate)]
        share = {
            f"at-{level}": sum(p <= level for p in p_values) / len(p_values) for level in (0.01, 0.05, 0.25)
        }
        found[case] = {"p-values": len(p_values), "held-out examples": 12, **share}
    return found


def unrelated(seed: int, noise: float) -> RoundContext:
    """What an oracle knows of clients whose gradients the critic cannot see coming."""

    def evidence(update: ClientUpdate) -> LocalEvidence:
        generator = torch.Generator().manual_seed(update.client_id)
        x, y = torch.randn(30, 12, generator=generator), torch.arange(30) % 3
        x[:, 6:] *= FAINT
        return LocalEvidence(x, y, StepRelease(None, noise, 4 / 30))

    return RoundContext(
        round=1,
        build_model=FaintPixels,
        loss=lambda outputs, labels: outputs.sum(),
        batch_size=4,
        num_classes=3,
        evidence=evidence,
        observer="oracle",
        seed=seed,
    )


def draw(staircase: dict[str, list[dict[str, Any]]], ceiling: float) -> go.Figure:
    """Estimates against the truth, one panel per critic."""
    colours = dict(
        zip([*VALUES, "club"], ("#1b6ca8", "#d1495b", "#edae49", "#3a7d44", "#6d597a"), strict=True)
    )
    figure = go.Figure().set_subplots(1, len(staircase), subplot_titles=list(staircase), shared_yaxes=True)
    for column, rows in enumerate(staircase.values(), start=1):
        figure.add_scatter(
            x=TRUTHS,
            y=TRUTHS,
            name="truth",
            row=1,
            col=column,
            line={"color": "black"},
            showlegend=column == 1,
        )
        figure.add_hline(y=ceiling, line_dash="dot", row=1, col=column, annotation_text="ln K")
        for name, colour in colours.items():
            figure.add_scatter(
                x=TRUTHS,
                y=[row[name]["mean"] for row in rows],
                error_y={"array": [row[name]["sd"] for row in rows]},
                name=SHOWN[name],
                legendgroup=name,
                showlegend=column == 1,
                line={"color": colour},
                row=1,
                col=column,
            )
    figure.update_layout(margin={"t": 50, "b": 60, "l": 70, "r": 20}, template="plotly_white")
    figure.update_xaxes(title="information, nats").update_yaxes(range=[-1, 22])
    return figure.update_yaxes(title="estimate, nats (mean, one standard deviation)", col=1)


if __name__ == "__main__":
    main()
