"""DLG and breaching's on the same images, weights and updates, with the same processor time for each."""

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attack_cases import CLASSES, FLAT, LR, Build, mean_colour_psnr, sum_loss, train
from fedaudit.attacks.scores import score
from fedaudit.data.embedded import patches
from fedaudit.models.build import build_model
from fedaudit.registry import ATTACKS
from fedaudit.spec import parse_spec
from fedaudit.types import RoundContext


def victim(k: int) -> tuple[Tensor, Tensor, Build]:
    """Image, label and fresh LeNet of the k-th single example; each has weights of its own."""

    def build() -> nn.Module:
        return build_model("lenet", (3, 32, 32), CLASSES, k)

    return patches().x[26 * k + 7][None], torch.tensor([k % CLASSES]), build


def dlg_alone(k: int, device: str) -> dict[str, float]:
    """What `dlg` recovers of the k-th victim from one step, and the seconds it takes."""
    x, y, build = victim(k)
    ctx = RoundContext(
        round=1,
        build_model=build,
        loss=sum_loss,
        lr=LR,
        local_steps=1,
        batch_size=1,
        input_shape=(3, 32, 32),
        num_classes=CLASSES,
        seed=k,
        device=device,
    )
    begin = time.process_time()
    found = ATTACKS.build(parse_spec("dlg")).reconstruct(train(build, x, y, 1, LR), ctx)
    seconds = time.process_time() - begin
    scores = score(found.x, found.y, x, y)
    return {"psnr": scores["psnr"], "labels": scores["label_accuracy"], "seconds": seconds}


class OutOfTime(KeyboardInterrupt):
    """Ends breaching's optimisation, which answers an interruption with the best it has."""


def breaching_dlg(k: int, seconds: float, device: str) -> dict[str, float]:
    """What breaching's `deepleakage` recovers of the same victim in these processor seconds."""
    import breaching
    from omegaconf import OmegaConf

    folder = Path(breaching.__file__).parent / "config" / "attack"
    names = ("_default_optimization_attack", "deepleakage")
    config = OmegaConf.merge(*(OmegaConf.load(folder / f"{name}.yaml") for name in names))
    x, y, build = victim(k)
    model = build().to(device)
    gradient = train(build, x, y, 1, LR).gradient(RoundContext(round=1, lr=LR, local_steps=1))
    end = time.process_time() + seconds

    class Watched(nn.CrossEntropyLoss):
        def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
            if time.process_time() > end:
                raise OutOfTime
            return super().forward(outputs, labels)

    setup = {"dtype": torch.float, "device": torch.device(device)}
    metadata = Metadata()
    payload = [{"parameters": [p.detach() for p in model.parameters()], "buffers": [], "metadata": metadata}]
    unknown = {"labels": None, "num_data_points": 1, "local_hyperparams": None}
    shared = [{"gradients": [g.to(device) for g in gradient.values()], "buffers": None, "metadata": unknown}]
    best, image, trials = float("inf"), torch.zeros_like(x), 0
    torch.manual_seed(k)  # breaching draws its starts from the global generator
    while time.process_time() < end:
        attacker = breaching.attacks.prepare_attack(model, Watched(), config, setup)
        try:
            found, stats = attacker.reconstruct(payload, shared, {})
        except OutOfTime:  # between its trial and its score
            break
        trials += 1
        values = [v for v in stats["Trial_0_Val"] if v == v] if "Trial_0_Val" in stats else []
        if values and min(values) < best:
            best, image = min(values), found["data"].cpu()
    return {"psnr": score(image.nan_to_num(0), y, x, y)["psnr"], "starts": trials, "objective": best}


class Metadata(dict[str, Any]):
    """What breaching reads of a data set, by key or as an attribute."""

    shape, modality, classes, mean, std = (3, 32, 32), "vision", CLASSES, (0.0,) * 3, (1.0,) * 3

    def __init__(self) -> None:
        super().__init__(task="classification", modality="vision", classes=CLASSES)


def duel(count: int, device: str) -> Iterator[dict[str, Any]]:
    """DLG and breaching's on single images, the same processor time for each."""
    from fedaudit.vision import import_torchvision

    import_torchvision()
    for k in range(count):
        mine = dlg_alone(k, device)
        row = {"image": 26 * k + 7, "dlg": mine, "breaching": breaching_dlg(k, mine["seconds"], device)}
        print(row, flush=True)
        yield row


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts above 30 dB and PSNR of both, of all images and of those that are not nearly one colour."""
    flat = mean_colour_psnr(patches().x[[row["image"] for row in rows]]) >= FLAT
    shown = [row for row, plain in zip(rows, flat.tolist(), strict=True) if not plain]
    found: dict[str, Any] = {}
    for name in ("dlg", "breaching"):
        decibels = [row[name]["psnr"] for row in rows]
        found[name] = {
            "above-30-dB": sum(value > 30 for value in decibels),
            "of": len(rows),
            "not-of-one-colour": len(shown),
            "of-these-above-30-dB": sum(row[name]["psnr"] > 30 for row in shown),
            "psnr-mean": round(statistics.fmean(decibels), 2),
            "psnr-min": round(min(decibels), 2),
            "psnr-max": round(max(decibels), 2),
        }
    return found
