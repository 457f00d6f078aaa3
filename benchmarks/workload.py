"""The federation that every benchmark runs: embedded real data, a small network, one local epoch.

The images are scikit-learn's handwritten digits (1797 of 8x8), resized to 28x28 and repeated with shifts of
up to two pixels until there are enough: nothing is downloaded, and no result here is about accuracy.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from fedaudit.config import RunConfig

SIDE = 28
TEST_EXAMPLES = 256
SHIFTS = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (2, 0), (-2, 0), (0, 2), (0, -2)]


def write_digits(path: Path, examples: int) -> Path:
    """Write `examples` shifted digits of 1x28x28 as an .npz file; more than there are shifts repeat."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    pixels, labels = [], []
    while sum(map(len, labels)) < examples:
        shift = SHIFTS[len(labels) % len(SHIFTS)]
        pixels.append(torch.roll(images, shift, dims=(2, 3)))
        labels.append(torch.from_numpy(digits.target))
    x = (torch.cat(pixels)[:examples] * 255).round().to(torch.uint8).numpy()
    np.savez(path, x=x, y=torch.cat(labels)[:examples].numpy())
    return path


def federation(folder: Path, clients: int, per_client: int, cohort: int, **changes: Any) -> RunConfig:
    """`clients` with `per_client` examples each, `cohort` of them a round, batches of 8, one epoch of SGD.

    Args:
        folder: where data and runs go.
        clients: number of clients.
        per_client: examples of each.
        cohort: clients of a round.
        **changes: other configuration keys, ``__`` for the dot and ``_`` for the hyphen.
    """
    examples = clients * per_client + TEST_EXAMPLES
    data = folder / f"digits-{examples}.npz"
    if not data.exists():
        write_digits(data, examples)
    base = RunConfig.from_flat(
        {
            "data.name": "npz",
            "data.root": str(data),
            "data.partitioner": "iid",
            "data.test-fraction": TEST_EXAMPLES / examples,
            "data.reference-fraction": 0.0,
            "model.name": "cnn",
            "federation.clients": clients,
            "federation.fraction-train": cohort / clients,
            "federation.evaluate-every": 10_000,  # only before the first and after the last round
            "federation.device": "cpu",
            "train.optimizer": "sgd",
            "train.lr": 0.05,
            "train.batch-size": 8,
            "train.local-epochs": 1,
            "output.directory": str(folder / "runs"),
        }
    )
    return base.with_(**changes)
