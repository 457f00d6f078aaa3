"""Gradient inversion: how well attacks recover natural images, and how fast restarts run.

    python -m benchmarks.attacks                      four minutes of one core, seven of a busy one
    python -m benchmarks.attacks --size smoke         seconds: does it run?
    python -m benchmarks.attacks --part large         the 2.9M ConvNet alone, an hour of one core
    python -m benchmarks.attacks --part steps         several local steps, and L-BFGS, five minutes
    python -m benchmarks.attacks --part dlg           DLG beside breaching's on 20 images, ten minutes
    python -m benchmarks.attacks --size full --device cuda

The images are the first ten of a seeded permutation of the embedded 32x32 patches that are not nearly one
colour (`steps`: the next ten); labels are 0 to 9 in that order. Batches are consecutive images, the last
one wraps around. Models are untrained. The default size gives attacks a hundredth of the published
iterations: PSNR is then bounded by the budget, not by what the update gives away; `full` has the published
numbers and wants a GPU.
`speed` compares restarts x iterations per second with breaching 0.1.2
(`pip install breaching==0.1.2 hydra-core`, needed here only), on the same images, model, loss and settings,
one after the other in turns, on one thread; without it that part is left out and says so.
`dlg` gives breaching's `deepleakage` preset the processor time that `dlg` took on the same image: new starts
until the time is over, the lowest objective of its own decides. Both optimise the label with the image, and
neither is told it.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.attack_cases import CLASSES, LR, SEED, attack, groups, images
from benchmarks.dlg_duel import duel, summary
from benchmarks.measurement import keep, spread
from fedaudit.models.build import build_model

RECOVERED = 20.0  # dB


@dataclass(frozen=True)
class Size:
    """How much is attacked.

    Attributes:
        groups: batches of LeNet that are attacked, at most; 0 is as many as cover ten images.
        iterations: of Inverting Gradients, and of local-steps by signed Adam, on LeNet.
        dlg_iterations: of DLG on LeNet.
        restarts: of Inverting Gradients and local-steps on LeNet.
        width: of the narrow ConvNet.
        convnet_batches: batch sizes for ConvNets.
        convnet_groups: batches of ConvNets that are attacked.
        convnet_iterations: of Inverting Gradients on ConvNets, one restart.
        convnet_dlg_iterations: of DLG on the narrow ConvNet.
        ladder: iterations of Inverting Gradients on the 2.9M ConvNet in the part `large`.
        ladder_groups: batches of one, four and eight images it attacks there.
        victims: images in the part `dlg`.
        steps_iterations: of L-BFGS in the part `steps`, for four images.
        speed_iterations: of each timed piece; a quarter of it on the ConvNet.
        turns: how often each contestant is timed.
    """

    groups: int = 0
    iterations: int = 300
    dlg_iterations: int = 300
    restarts: int = 4
    width: int = 16
    convnet_batches: tuple[int, ...] = (1, 4)
    convnet_groups: int = 2
    convnet_iterations: int = 120
    convnet_dlg_iterations: int = 10
    ladder: int = 400
    ladder_groups: tuple[int, ...] = (3, 1, 1)
    victims: int = 20
    steps_iterations: int = 1200
    speed_iterations: int = 40
    turns: int = 3


SIZES = {
    "smoke": Size(1, 10, 10, 2, 4, (1,), 1, 5, 2, 2, (1, 1, 1), 1, 8, 2, 1),
    "default": Size(),
    "full": Size(0, 24_000, 3000, 8, 64, (1, 4, 8), 10, 4800, 300, 24_000, (10, 3, 2), 20, 10_000, 100, 5),
}


def cell(
    spec: str, model: str, batches: Sequence[Sequence[int]], device: str, **local: Any
) -> dict[str, Any]:
    """One row of the table: PSNR over batches, mean over a batch's images first.

    "KNOWN" in the attack's options stands for the labels of each batch.
    """
    epochs = local.get("epochs", 1)
    found = []
    for chosen in batches:
        known = spec.replace("KNOWN", f"labels=known, classes={'-'.join(str(i % CLASSES) for i in chosen)}")
        batch, lr = local.get("batch", len(chosen)), local.get("lr", LR)
        held_out = local.get("held_out", False)
        found.append(attack(known, model, chosen, batch, lr, device, epochs, held_out))
    decibels = [one["psnr"] for one in found]
    row = {
        "attack": spec,
        "model": model,
        "local-steps": epochs * -(-len(batches[0]) // local.get("batch", len(batches[0]))),
        "local-epochs": epochs,
        "images-per-step": local.get("batch", len(batches[0])),
        "updates": len(batches),
        "psnr-mean": round(statistics.fmean(decibels), 2),
        "psnr-min": round(min(decibels), 2),
        "psnr-max": round(max(decibels), 2),
        "psnr-of-mean-colours": round(statistics.fmean(one["mean-colour"] for one in found), 2),
        "updates-above-20-dB": sum(value > RECOVERED for value in decibels),
        "label-accuracy": round(statistics.fmean(one["labels"] for one in found), 3),
        "seconds-per-update": round(statistics.fmean(one["seconds"] for one in found), 2),
    }
    print(row, flush=True)
    return row


def table(size: Size, device: str) -> Iterator[dict[str, Any]]:
    """Rows for LeNet and the narrow ConvNet, one step."""
    ig = f"inverting-gradients(restarts={size.restarts}, iterations={size.iterations})"
    dlg = f"dlg(restarts=1, iterations={size.dlg_iterations})"
    for spec in (dlg, ig):
        for batch in (1, 4, 8):
            yield cell(spec, "lenet", groups(batch, size.groups), device)
    ig = f"inverting-gradients(restarts=1, iterations={size.convnet_iterations})"
    dlg = f"dlg(restarts=1, iterations={size.convnet_dlg_iterations})"
    narrow = f"convnet(width={size.width})"
    yield cell(dlg, narrow, groups(1, 1), device)
    for batch in size.convnet_batches:
        yield cell(ig, narrow, groups(batch, size.convnet_groups), device)


def large(size: Size, device: str) -> Iterator[dict[str, Any]]:
    """Rows for the 2.9M ConvNet."""
    ig = f"inverting-gradients(restarts=1, iterations={size.ladder})"
    for batch, most in zip((1, 4, 8), size.ladder_groups, strict=True):
        yield cell(ig, "convnet", groups(batch, most), device)
    yield cell(f"dlg(restarts=1, iterations={-(-size.ladder // 10)})", "convnet", groups(1, 1), device)


def several_steps(size: Size, device: str) -> Iterator[dict[str, Any]]:
    """Rows for FedAvg updates of two images a step, and for the same optimiser on single gradients.

    Four images in two epochs of two steps: every batch of four. Then eight images in one epoch of four steps.
    The settings were chosen on the first ten images, so these are of the next ten.
    """
    count = size.steps_iterations
    held = {"held_out": True}
    smooth = (
        "optimizer=lbfgs, objective=euclidean, precision=double, restarts=1, spread=0.05, anneal=3, tv=0.03"
    )
    fixed = f"local-steps({smooth}, iterations={count}, epoch-order=fixed, KNOWN)"
    local: dict[str, Any] = {"batch": 2, "lr": 0.01, **held}
    yield cell(fixed, "lenet", groups(4, size.groups), device, **local, epochs=2)
    adam = f"local-steps(restarts={size.restarts}, iterations={size.iterations}, KNOWN)"
    yield cell(adam, "lenet", groups(4, size.groups), device, **local, epochs=2)
    unknown = f"local-steps({smooth}, iterations={count}, epoch-prior=1, KNOWN)"
    yield cell(unknown, "lenet", groups(4, size.groups), device, **local, epochs=2)
    yield cell(unknown, "lenet", groups(8, size.groups), device, **local)
    single = f"inverting-gradients({smooth}, iterations={-(-count // 2)})"
    for batch in (1, 4, 8):
        yield cell(single, "lenet", groups(batch, size.groups), device, **held)


ROWS = {"table": table, "large": large, "steps": several_steps}
FILES = {"table": "attacks_table", "large": "attacks_convnet", "steps": "attacks_steps"}


def ours(model: str, batch: int, restarts: int, iterations: int, device: str) -> float:
    """Restarts x iterations per second of Inverting Gradients."""
    settings = f"restarts={restarts}, iterations={iterations}, tv=0.2, halve=false, labels=known"
    classes = "-".join(map(str, range(batch)))
    spec = f"inverting-gradients({settings}, classes={classes})"
    found = attack(spec, model, range(batch), batch, LR, device)
    return restarts * (iterations + 1) / found["seconds"]  # the end is evaluated, too


def breaching_rate(model_spec: str, batch: int, restarts: int, iterations: int, device: str) -> float:
    """The same of breaching's `invertinggradients`, whose restarts run one after the other."""
    import breaching
    from omegaconf import OmegaConf

    folder = Path(breaching.__file__).parent / "config" / "attack"
    config = OmegaConf.merge(
        *(
            OmegaConf.load(folder / f"{n}.yaml")
            for n in ("_default_optimization_attack", "invertinggradients")
        ),
        {"restarts": {"num_trials": restarts}, "optim": {"max_iterations": iterations}},
    )
    model, loss = build_model(model_spec, (3, 32, 32), CLASSES, SEED).to(device), nn.CrossEntropyLoss()
    x, y = images()[:batch].to(device), torch.arange(batch, device=device)
    gradients = list(torch.autograd.grad(loss(model(x), y), list(model.parameters())))
    metadata = argparse.Namespace(shape=(3, 32, 32), modality="vision", mean=(0.0,) * 3, std=(1.0,) * 3)
    setup = {"dtype": torch.float, "device": torch.device(device)}
    attacker = breaching.attacks.prepare_attack(model, loss, config, setup)
    payload = [{"parameters": [p.detach() for p in model.parameters()], "buffers": [], "metadata": metadata}]
    known = {"labels": y, "num_data_points": batch, "local_hyperparams": None}
    shared = [{"gradients": gradients, "buffers": None, "metadata": known}]
    clock = time.process_time if device == "cpu" else time.perf_counter
    begin = clock()
    attacker.reconstruct(payload, shared, {})
    return restarts * iterations / (clock() - begin)


def dlg_rate(batch: int, at_once: int, iterations: int, device: str) -> float:
    """Iterations per second of eight starts of DLG, summed over starts."""
    spec = f"dlg(restarts=8, at-once={at_once}, iterations={iterations}, halve=false, tolerance=0, accept=0)"
    found = attack(spec, "lenet", range(batch), batch, LR, device)
    return found["steps"] / found["seconds"]


def dlg_speed(size: Size, device: str) -> Iterator[tuple[str, Any]]:
    """Eight starts of DLG side by side and one after the other, in turns."""
    iterations = size.speed_iterations
    for batch in (1, 4):
        pairs = [
            [dlg_rate(batch, at_once, iterations, device) for at_once in (8, 1)] for _ in range(size.turns)
        ]
        together, alone = zip(*pairs, strict=True)
        yield (
            f"dlg, lenet, batch {batch}",
            {
                "eight-at-once": spread(together),
                "one": spread(alone),
                "ratio-to-one": spread([a / b for a, b in pairs]),
            },
        )


def speed(size: Size, device: str) -> dict[str, Any]:
    """Rates of eight restarts at once, of one restart, and of breaching, in turns."""
    try:
        from fedaudit.vision import import_torchvision

        import_torchvision()  # breaching imports it, which needs help beside a CPU build of torch
        import breaching  # noqa: F401
    except ImportError as error:
        return {"breaching": f"not installed: {error}"}
    found: dict[str, Any] = {"unit": "restarts x iterations per second of processor time"}
    for model, batch in (("lenet", 1), ("lenet", 4), ("cnn", 1), (f"convnet(width={size.width})", 1)):
        rates: dict[str, list[float]] = {"eight-at-once": [], "one": [], "breaching": []}
        iterations = max(1, size.speed_iterations // (4 if model.startswith("convnet") else 1))
        ours(model, batch, 8, 1, device)  # kernels are prepared at their first use
        for _ in range(size.turns):
            rates["eight-at-once"].append(ours(model, batch, 8, iterations, device))
            rates["one"].append(ours(model, batch, 1, iterations, device))
            rates["breaching"].append(breaching_rate(model, batch, 1, iterations, device))
        at_once = rates["eight-at-once"]
        found[f"{model}, batch {batch}"] = {
            **{name: spread(values) for name, values in rates.items()},
            "ratio-to-breaching": spread([a / b for a, b in zip(at_once, rates["breaching"], strict=True)]),
            "ratio-to-one": spread([a / b for a, b in zip(at_once, rates["one"], strict=True)]),
        }
        print(model, batch, found[f"{model}, batch {batch}"], flush=True)
    return found | dict(dlg_speed(size, device))


def main() -> None:
    """Run both parts and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--part", choices=("both", "table", "speed", "large", "steps", "dlg"), default="both")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--packages", type=Path, help="folder that holds breaching, if it is not installed")
    parser.add_argument("--output", type=Path)
    for field in fields(Size):
        if field.type is int:
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.packages:
        sys.path.append(str(options.packages))
    given = {f.name: getattr(options, f.name, None) for f in fields(Size)}
    size = replace(SIZES[options.size], **{k: v for k, v in given.items() if v is not None})
    results: dict[str, Any] = {"size": options.size, "device": options.device}
    wanted = ("speed", "table") if options.part == "both" else (options.part,)
    for part in wanted:  # a file each, so that one is renewed without the others
        if part == "speed":
            keep("attacks_speed", {**results, "speed": speed(size, options.device)}, options.output)
        elif part == "dlg":
            images: list[dict[str, Any]] = []
            for row in duel(size.victims, options.device):
                images.append(row)
                found = {**results, "images": images, "summary": summary(images)}
                keep("attacks_dlg", found, options.output)
        else:
            rows: list[dict[str, Any]] = []
            for row in ROWS[part](size, options.device):
                rows.append(row)
                keep(
                    FILES[part], {**results, "table": rows}, options.output
                )  # a long run is not lost half-way


if __name__ == "__main__":
    main()
