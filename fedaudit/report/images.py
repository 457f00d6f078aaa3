"""Recorded reconstructions to pictures: original above reconstruction, as PNG data that a page can hold."""

import base64
import io
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open

from fedaudit.errors import RecordError

logger = logging.getLogger(__name__)
Array = NDArray[np.floating[Any]]
SIDE = 96
"""Target side of a picture in pixels: smaller images are enlarged by a whole factor."""


@dataclass(frozen=True)
class Recorded:
    """One attacked update: pairs of images and what the attack assumed.

    Attributes:
        original: true images (B, C, H, W) in [0, 1]; None where nobody knows them.
        reconstruction: what the attack recovered, in the same order.
        attack: its name.
        round: server round.
        client: client id as text.
        conditions: what the attack assumed.
    """

    original: Array | None
    reconstruction: Array
    attack: str
    round: int
    client: str
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def psnr(self) -> list[float]:
        """PSNR of each pair in dB; NaN without originals."""
        if self.original is None:
            return [math.nan] * len(self.reconstruction)
        return [psnr(a, b) for a, b in zip(self.original, self.reconstruction, strict=True)]

    @property
    def uniform_psnr(self) -> list[float]:
        """PSNR in dB that a uniform image of each original's own mean would have; NaN without originals."""
        if self.original is None:
            return [math.nan] * len(self.reconstruction)
        return [psnr(image, np.full_like(image, image.mean())) for image in self.original]


def psnr(original: Array, reconstruction: Array) -> float:
    """10 log10(1 / mean squared error) in dB for values in [0, 1]; infinite if equal.

    >>> psnr(np.zeros((1, 2, 2)), np.full((1, 2, 2), 0.1))
    20.0
    """
    mse = float(np.mean((np.asarray(original, float) - np.asarray(reconstruction, float)) ** 2))
    if math.isnan(mse):
        return math.nan
    return math.inf if mse == 0 else round(10 * math.log10(1 / mse), 10)


def recorded_files(run_folder: Path) -> list[Path]:
    """The files with reconstructions of a run, by round and client."""
    return sorted((run_folder / "attacks").glob("*.safetensors"))


def read_recorded(path: Path) -> Recorded:
    """One file of reconstructions.

    Raises:
        RecordError: if it cannot be read, or does not hold two equal image batches.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118
        conditions = json.loads(meta.get("conditions", "{}"))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise RecordError(f"{path.name} is not a readable file of reconstructions: {error}") from error
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    original, reconstruction = tensors.get("original"), tensors.get("reconstruction")
    if reconstruction is None or len(set(shapes.values())) != 1 or reconstruction.ndim != 4:
        raise RecordError(
            f"reconstructions are two equal batches (B, C, H, W), got {shapes} in {path.name}: "
            "record images only"
        )
    return Recorded(
        original=original,
        reconstruction=reconstruction,
        attack=meta.get("attack", "attack"),
        round=int(meta.get("round", "0")),
        client=meta.get("client", "?"),
        conditions=conditions if isinstance(conditions, dict) else {},
    )


def picture(image: Array, side: int = SIDE) -> str:
    """An image (C, H, W) in [0, 1] as a data URI of a PNG, enlarged by nearest neighbour to about `side`.

    Values outside [0, 1] are clamped for display only; NaN is shown as black.
    """
    pixels = np.clip(np.nan_to_num(np.asarray(image, float), nan=0.0), 0, 1)
    pixels = pixels if pixels.shape[0] == 3 else pixels[:1].repeat(3, axis=0)
    drawn = Image.fromarray((255 * pixels).round().astype(np.uint8).transpose(1, 2, 0))
    longest = max(drawn.size)
    if longest < side:
        factor = max(1, side // longest)
        drawn = drawn.resize((drawn.width * factor, drawn.height * factor), Image.Resampling.NEAREST)
    elif longest > 2 * side:
        drawn.thumbnail((2 * side, 2 * side))
    if image.shape[0] != 3:
        drawn = drawn.convert("L")
    buffer = io.BytesIO()
    drawn.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
