"""Any image dataset of the Hugging Face Hub, through Flower Datasets (extra ``fedaudit[datasets]``)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from fedaudit.data.dataset import Dataset
from fedaudit.data.files import square_pixels
from fedaudit.errors import DataError


class Rows(Protocol):
    """The part of `datasets.Dataset` that the conversion reads."""

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        ...

    @property
    def features(self) -> Mapping[str, Any]:
        """Type of each column; one of type ClassLabel has `names`."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...


def hub(
    root: str,
    download: bool,
    id: str,
    image: str = "image",
    label: str = "label",
    split: str = "train",
    size: int = 0,
    grey: bool = False,
) -> Dataset:
    """One split of a Hub dataset, e.g. ``"hub(id=ylecun/mnist, grey=true)"``.

    The split is read whole into memory as float32. Flower Datasets reports each loading to Flower's
    telemetry unless the environment has ``FLWR_TELEMETRY_ENABLED=0``.

    Args:
        root: cache folder of the downloaded files.
        download: must be true unless `id` is a local folder: even for cached data the Hub is asked first.
        id: name on the Hub, ``owner/name``, or the path of a local folder that `datasets` can read.
        image: column of the images.
        label: column of the labels: class numbers or texts.
        split: which split to read; the federation's test set is taken from it too.
        size: pixels of a side after cropping to the central square; 0 keeps images, which must then be
            of one size.
        grey: one channel instead of three.

    Raises:
        DataError: if the extra is not installed, or the dataset or a column is missing or unusable.
    """
    try:
        from flwr_datasets import FederatedDataset
    except ImportError as error:
        raise DataError(
            f"data.name='hub' needs Flower Datasets, which cannot be imported ({error}): "
            "pip install 'fedaudit[datasets]'"
        ) from error
    if not download and not Path(id).is_dir():
        raise DataError(
            f"dataset {id!r} is no local folder, so the Hub must be asked for it, and data.download=false "
            f"forbids that: set data.download=true (what data.root={root!r} holds is not fetched again)"
        )
    source = FederatedDataset(dataset=id, partitioners={}, shuffle=False, cache_dir=root)
    try:
        rows: Rows = source.load_split(split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"split {split!r} of dataset {id!r} cannot be loaded into data.root={root!r} ({error}): "
            "check both names and the connection"
        ) from error
    return from_rows(rows, image=image, label=label, size=size, grey=grey)


def from_rows(
    rows: Rows, image: str = "image", label: str = "label", size: int = 0, grey: bool = False
) -> Dataset:
    """A dataset from rows that hold a PIL image and a label each.

    Class numbers are kept where the label column names its classes; other labels are numbered in sorted
    order.

    Raises:
        DataError: if a column is missing, there are no rows, or images are not of one size.
    """
    for option, column in (("image", image), ("label", label)):
        if column not in rows.column_names:
            found = ", ".join(rows.column_names)
            raise DataError(f"hub({option}={column}) names no column: choose one of {found}")
    if len(rows) == 0:
        raise DataError("a hub dataset needs at least one row, got none: choose another split")
    pixels: list[npt.NDArray[np.uint8]] = []
    values: list[Any] = []
    for row in rows:
        pixels.append(_pixels(row[image], size, grey))
        values.append(row[label])
    shapes = sorted({p.shape for p in pixels})
    if len(shapes) > 1:
        raise DataError(
            f"images must be of one size, got {len(shapes)} from {shapes[0]} to {shapes[-1]}: "
            "set hub(size=...)"
        )
    labels, names = _numbered(values, getattr(rows.features[label], "names", None))
    x = torch.from_numpy(np.stack(pixels)).to(torch.float32) / 255.0
    return Dataset("hub", x, torch.tensor(labels), num_classes=len(names), class_names=names)


def _pixels(image: Any, size: int, grey: bool) -> npt.NDArray[np.uint8]:
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise DataError(
            f"the image column must hold images, got a {kind}: choose another with hub(image=...)"
        )
    if size:
        return square_pixels(image, size, grey)
    pixels = np.asarray(image.convert("L" if grey else "RGB"), dtype=np.uint8)
    return pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _numbered(values: list[Any], names: list[str] | None) -> tuple[list[int], tuple[str, ...]]:
    if names is not None:
        return [int(value) for value in values], tuple(names)
    kinds = {type(value) for value in values}
    if len(kinds) > 1 or not kinds <= {int, str, bool}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"labels must be whole numbers or texts, got {found}: choose another hub(label=...)")
    distinct = sorted(set(values))
    numbers = {value: number for number, value in enumerate(distinct)}
    return [numbers[value] for value in values], tuple(map(str, distinct))
