"""The images, models and updates that the benchmark of attacks uses, and one attack on one of them."""

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedaudit.attacks.scores import score
from fedaudit.data.embedded import patches
from fedaudit.models.build import build_model
from fedaudit.registry import ATTACKS
from fedaudit.spec import parse_spec
from fedaudit.types import ClientUpdate, RoundContext

SEED = 0
IMAGES = 10
FLAT = 20.0  # dB
CLASSES = 10
LR = 0.1
Build = Callable[[], nn.Module]


def images(held_out: bool = False) -> Tensor:
    """Ten natural images (10, 3, 32, 32), by recipe; the next ten if attacks were tuned on the first.

    The first of a seeded permutation of all patches in which there is something to see: an image that its
    mean colour reproduces at 20 dB or better (sky, 60 % of the patches) would make a failed attack look good.
    """
    data = patches().x
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(SEED))
    shuffled = data[order]
    shown = shuffled[mean_colour_psnr(shuffled) < FLAT]
    return shown[IMAGES : 2 * IMAGES] if held_out else shown[:IMAGES]


def mean_colour_psnr(x: Tensor) -> Tensor:
    """PSNR in dB of each image (N, 3, H, W) of values in [0, 1] with its own mean colour, (N,)."""
    error = (x - x.mean((2, 3), keepdim=True)).square().mean((1, 2, 3))
    return -10 * error.log10()


def groups(batch: int, most: int) -> list[list[int]]:
    """Consecutive images in batches, wrapping around, until each was used once."""
    starts = range(0, IMAGES, batch)
    found = [[(start + i) % IMAGES for i in range(batch)] for start in starts]
    return found[:most] if most else found


def sum_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, summed."""
    return F.cross_entropy(outputs, labels, reduction="sum")


def train(build: Build, x: Tensor, y: Tensor, batch: int, lr: float, epochs: int = 1) -> ClientUpdate:
    """Local epochs of plain SGD, each in the same order."""
    model = build()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for inputs, labels in epochs * list(zip(x.split(batch), y.split(batch), strict=True)):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    delta = {name: value.detach() - before[name] for name, value in model.state_dict().items()}
    return ClientUpdate(0, 1, before, delta, len(x))


def attack(
    spec: str,
    model: str,
    chosen: Sequence[int],
    batch: int,
    lr: float,
    device: str,
    epochs: int = 1,
    held_out: bool = False,
) -> dict[str, float]:
    """Scores of one attack on one update, its seconds, and what each image's mean colour would score."""
    x, y = images(held_out)[list(chosen)], torch.tensor(list(chosen)) % CLASSES

    def build() -> nn.Module:
        return build_model(model, (3, 32, 32), CLASSES, SEED)

    steps = epochs * -(-len(x) // batch)
    ctx = RoundContext(
        round=1,
        build_model=build,
        loss=sum_loss,
        lr=lr,
        local_steps=steps,
        batch_size=batch,
        input_shape=(3, 32, 32),
        num_classes=CLASSES,
        seed=SEED,
        device=device,
    )
    begin = time.process_time() if device == "cpu" else time.perf_counter()
    found = ATTACKS.build(parse_spec(spec)).reconstruct(train(build, x, y, batch, lr, epochs), ctx)
    end = time.process_time() if device == "cpu" else time.perf_counter()
    scores = score(found.x, found.y, x, y)
    return {
        "psnr": scores["psnr"],
        "mean-colour": float(mean_colour_psnr(x).mean()),
        "labels": scores["label_accuracy"],
        "seconds": end - begin,
        "steps": found.steps,
    }
