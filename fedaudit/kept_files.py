"""Files that an audit keeps only if it is asked to: clients' raw updates, and what attacks reconstructed."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedaudit.errors import RecordError
from fedaudit.types import ClientUpdate, Reconstruction, RoundContext

_UPDATE = "update"


def update_file(folder: Path, round_number: int, client: int) -> Path:
    """Where a client's update of a round is kept."""
    return folder / f"round-{round_number:05d}-client-{client}.safetensors"


def sum_file(folder: Path, round_number: int) -> Path:
    """Where the sum of a round's updates is kept, if the server saw nothing else."""
    return folder / f"round-{round_number:05d}-sum.safetensors"


def save_update(folder: Path, update: ClientUpdate) -> None:
    """Keep one client's update, or a sum, as safetensors; what is no tensor goes into the metadata."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"before/{name}": tensor.contiguous() for name, tensor in update.before.items()}
    tensors |= {f"delta/{name}": tensor.contiguous() for name, tensor in update.delta.items()}
    said = {
        "client_id": update.client_id,
        "node_id": update.node_id,
        "round": update.round,
        "num_examples": update.num_examples,
        "reported": dict(update.reported),
        "summed": list(update.summed),
        "before": list(update.before),  # safetensors sorts names
        "delta": list(update.delta),
    }
    path = update_file(folder, update.round, update.client_id)
    if update.summed:
        path = sum_file(folder, update.round)
    save_file(tensors, path, metadata={_UPDATE: json.dumps(said)})


def load_update(path: Path) -> ClientUpdate:
    """An update that `save_update` kept.

    Raises:
        RecordError: if the file is damaged or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()[_UPDATE])
            before = {name: file.get_tensor(f"before/{name}") for name in said["before"]}
            delta = {name: file.get_tensor(f"delta/{name}") for name in said["delta"]}
        fields = {name: said[name] for name in ("client_id", "node_id", "round", "num_examples", "reported")}
        fields["summed"] = tuple(said.get("summed", ()))  # files of earlier versions lack it
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"a kept update is read from {path}, got {error}: record it again") from error
    return ClientUpdate(before=before, delta=delta, **fields)


def save_images(
    folder: Path,
    name: str,
    found: Reconstruction,
    originals: Tensor | None,
    update: ClientUpdate,
    ctx: RoundContext,
    results: Mapping[str, float],
) -> None:
    """Keep originals, if there are any, and their matched reconstructions, scaled to [0, 1]."""
    from safetensors.torch import save_file

    from fedaudit.attacks import scores

    low, high = ctx.value_range
    clamped = found.x.detach().cpu().clamp(low, high)
    kept = {"reconstruction": clamped}
    if originals is not None:
        rows, columns, _ = scores.match(clamped, originals)
        kept = {"original": originals[columns], "reconstruction": clamped[rows]}
    folder.mkdir(parents=True, exist_ok=True)
    whose = "sum" if update.summed else f"client-{update.client_id}"
    save_file(
        {name: ((images - low) / (high - low)).float().contiguous() for name, images in kept.items()},
        folder / f"round-{update.round:05d}-{whose}-{name}.safetensors",
        metadata={
            "attack": name,
            "round": str(update.round),
            "client": f"sum of {len(update.summed)} clients" if update.summed else str(update.client_id),
            "psnr": f"{results.get('psnr', math.nan):.4f}",
            "conditions": json.dumps(dict(found.conditions), sort_keys=True),
        },
    )
