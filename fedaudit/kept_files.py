"""Files that an audit keeps only if it is asked to: clients' raw updates, and what attacks reconstructed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedaudit.types import ClientUpdate, Reconstruction, RoundContext


def save_update(folder: Path, update: ClientUpdate) -> None:
    """Keep one client\'s update, before and delta, as safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"before/{name}": tensor.contiguous() for name, tensor in update.before.items()}
    tensors |= {f"delta/{name}": tensor.contiguous() for name, tensor in update.delta.items()}
    save_file(tensors, folder / f"round-{update.round:05d}-client-{update.client_id}.safetensors")


def save_images(
    folder: Path,
    name: str,
    found: Reconstruction,
    originals: Any,
    update: ClientUpdate,
    ctx: RoundContext,
    results: Mapping[str, float],
) -> None:
    """Keep originals and their matched reconstructions, scaled to [0, 1], as safetensors."""
    from safetensors.torch import save_file

    from fedaudit.attacks import scores

    low, high = ctx.value_range
    clamped = found.x.detach().cpu().clamp(low, high)
    rows, columns, _ = scores.match(clamped, originals)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "original": ((originals[columns] - low) / (high - low)).float().contiguous(),
            "reconstruction": ((clamped[rows] - low) / (high - low)).float().contiguous(),
        },
        folder / f"round-{update.round:05d}-client-{update.client_id}-{name}.safetensors",
        metadata={
            "attack": name,
            "round": str(update.round),
            "client": str(update.client_id),
            "psnr": f"{results['psnr']:.4f}",
            "conditions": json.dumps(dict(found.conditions), sort_keys=True),
        },
    )
