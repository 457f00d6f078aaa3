"""How each attack's success falls with batch size, local steps, training progress and defense.

    python -m benchmarks.attack_conditions [--chromium chromium]

One client of a federation on handwritten digits; the network is a ReLU perceptron, which all attacks here
can take. From the usual case (two examples, one step, untrained, no defense) one condition changes at a time.
Every point is the mean PSNR over `--repeats` updates of different examples, with the smallest and the
largest; an attack that refuses an update counts as "refused", not as 0 dB. Images are matched to the truth.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measurement import keep
from benchmarks.picture import write_figure
from fedaudit.attacks.scores import score
from fedaudit.config import RunConfig
from fedaudit.federation.setup import Setup, setup
from fedaudit.registry import ATTACKS, DEFENSES
from fedaudit.report.style import OKABE_ITO, SYMBOLS, new_figure, style_figure
from fedaudit.spec import parse_spec
from fedaudit.training.local import TrainSettings, train_locally
from fedaudit.types import ClientUpdate, StepRelease

TRAINED_STEPS = (0, 50, 200, 800)
CONDITIONS: dict[str, tuple[str | int, ...]] = {
    "batch size": (1, 2, 4, 8, 16),
    "local steps": (1, 2, 4),
    "steps of training before": TRAINED_STEPS,
    "defense": ("none", "dp-sgd(epsilon=100, clip-norm=1)", "dp-sgd(epsilon=8, clip-norm=1)"),
}
USUAL = {"batch size": 2, "local steps": 1, "steps of training before": 0, "defense": "none"}
LR = 0.1
MODEL = "mlp(hidden=128, activation=relu)"


def main() -> None:
    """Attack under every condition and keep what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=400, help="of attacks by gradient descent")
    parser.add_argument("--chromium", help="a browser that turns the figure into a PNG")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = setup(
        RunConfig.from_flat(
            {"model.name": "mlp(hidden=128, activation=relu)", "federation.clients": 4}
        ).flat()
    )
    stages = weights_over_training(made)
    attacks = {
        "dlg": f"dlg(restarts=1, iterations={options.iterations})",
        "inverting-gradients": f"inverting-gradients(restarts=4, iterations={options.iterations})",
        "local-steps": f"local-steps(restarts=4, iterations={options.iterations})",
        "linear-layer": "linear-layer",
        "spear": "spear(seconds=5)",
    }
    rows = [
        {
            "condition": condition,
            "value": value,
            "attack": name,
            **attacked(made, stages, spec, changed, options),
        }
        for condition, values in CONDITIONS.items()
        for value in values
        for changed in [USUAL | {condition: value}]
        for name, spec in attacks.items()
    ]
    settings = {
        "attacks": attacks,
        "usual": USUAL,
        "repeats": options.repeats,
        "lr": LR,
        "model": "mlp, 128 ReLU",
    }
    keep("attack_conditions", {"settings": settings, "rows": rows})
    draw(rows, list(attacks), options.chromium)


def weights_over_training(made: Setup) -> dict[int, dict[str, Tensor]]:
    """Weights after so many plain steps on the training data."""
    model, data = made.build_model(), made.data.train
    generator = torch.Generator().manual_seed(1)
    found = {}
    for step in range(max(TRAINED_STEPS) + 1):
        if step in TRAINED_STEPS:
            found[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rows = torch.randint(len(data.y), (32,), generator=generator)
        settings = TrainSettings(lr=LR, batch_size=32, local_steps=1)
        train_locally(model, data.x[rows], data.y[rows], [torch.arange(32)], settings)
    return found


def attacked(
    made: Setup, stages: dict[int, dict[str, Tensor]], spec: str, case: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """PSNR of one attack over several updates made under one case."""
    batch, steps = int(case["batch size"]), int(case["local steps"])
    values, refused = [], 0
    for x, y, update in victims(made, stages[case["steps of training before"]], case, repeats):
        usual = replace(made.context(1), lr=LR, local_steps=steps, batch_size=batch, num_updates=1)
        try:
            found = ATTACKS.build(parse_spec(spec)).reconstruct(update, usual)
        except ValueError:
            refused += 1
            continue
        values.append(score(found.x, found.y, x, y, usual.value_range)["psnr"])
    spread = {"mean": statistics.fmean(values), "min": min(values), "max": max(values)} if values else {}
    rounded = {name: round(value, 2) for name, value in spread.items()}
    return {**rounded, "refused": refused, "updates": repeats}


def victims(
    made: Setup, weights: dict[str, Tensor], case: dict[str, Any], repeats: int
) -> Iterator[tuple[Tensor, Tensor, ClientUpdate]]:
    """Examples and the update of one local round on them, by the recipe: consecutive examples of client 0."""
    batch, steps = int(case["batch size"]), int(case["local steps"])
    defense = DEFENSES.build(parse_spec(str(case["defense"])))
    xs, ys = made.client_data(0)
    for repeat in range(repeats):
        rows = torch.arange(repeat * batch * steps, (repeat + 1) * batch * steps) % len(ys)
        x, y = xs[rows], ys[rows]
        model = made.build_model()
        model.load_state_dict(weights)
        release: StepRelease = defense.release(len(ys), batch, 40)
        train_locally(
            model,
            x,
            y,
            list(torch.arange(len(y)).chunk(steps)),
            TrainSettings(lr=LR, batch_size=batch, local_steps=steps),
            defense=defense,
            release=release,
            generator=torch.Generator().manual_seed(repeat),
        )
        delta = {name: tensor.detach() - weights[name] for name, tensor in model.state_dict().items()}
        yield x, y, ClientUpdate(0, 1, weights, delta, len(y))


def short(value: object) -> str:
    """A value as it fits an axis.

    >>> short("dp-sgd(epsilon=8, clip-norm=1)")
    'dp-sgd ε=8'
    """
    return str(value).replace("(epsilon=", " ε=").partition(",")[0]


def draw(rows: list[dict[str, Any]], attacks: list[str], chromium: str | None) -> None:
    """One panel per condition, one line per attack; a refused update has no point."""
    titles = list(CONDITIONS)
    figure = new_figure(rows=2, cols=2, subplot_titles=titles, vertical_spacing=0.16, horizontal_spacing=0.09)
    for place, condition in enumerate(CONDITIONS):
        for number, attack in enumerate(attacks):
            mine = [r for r in rows if (r["condition"], r["attack"]) == (condition, attack) and "mean" in r]
            figure.add_scatter(
                x=[short(row["value"]) for row in mine],
                y=[row["mean"] for row in mine],
                error_y={
                    "array": [row["max"] - row["mean"] for row in mine],
                    "arrayminus": [row["mean"] - row["min"] for row in mine],
                    "thickness": 1,
                },
                name=attack,
                mode="lines+markers",
                line={"color": OKABE_ITO[number]},
                marker={"symbol": SYMBOLS[number], "size": 8},
                legendgroup=attack,
                showlegend=place == 0,
                row=place // 2 + 1,
                col=place % 2 + 1,
            )
        order = [short(value) for value in CONDITIONS[condition]]
        figure.update_xaxes(
            type="category",
            categoryorder="array",
            categoryarray=order,
            row=place // 2 + 1,
            col=place % 2 + 1,
        )
    note = "PSNR in dB: mean, smallest, largest; one condition changes at a time; refused updates left out"
    style_figure(figure, "How attacks fail", note, attacks, 760)
    figure.update_layout(width=1180, margin={"t": 110, "b": 90}, legend={"orientation": "h"})
    figure.update_yaxes(title_text="PSNR [dB]", col=1)
    write_figure(figure, "attack_conditions", chromium, 1200, 780)


if __name__ == "__main__":
    main()
