"""One's own data from files: a folder of images per class, or arrays in one .npz file."""

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from fedaudit.data.dataset import Dataset
from fedaudit.errors import DataError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def image_folder(root: str, download: bool = False, size: int = 32, grey: bool = False) -> Dataset:
    """Images under ``root/<class>/``, cropped to the central square and resized to size x size.

    Classes are the sub-folders in alphabetical order. Files without an image's extension are ignored;
    an image that cannot be read is an error, never left out.

    Args:
        root: folder that holds one sub-folder per class.
        download: unused.
        size: pixels of a side.
        grey: one channel instead of three.

    Raises:
        DataError: if `root` is no folder, has fewer than two class folders, one of them holds no image,
            or an image cannot be read.
        ValueError: if `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"size must be a positive number of pixels, got {size}: use e.g. 32")
    base = Path(root)
    folders = sorted(p for p in base.glob("*") if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        names = ", ".join(folder.name for folder in folders) or "none"
        raise DataError(
            f"image-folder needs one sub-folder per class, two or more, got {names} in data.root={root!r}: "
            "sort the images into them"
        )
    pixels: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
        if not files:
            allowed = ", ".join(sorted(EXTENSIONS))
            raise DataError(f"each class folder needs images ({allowed}), got none in {folder}: add some")
        pixels += [_read_image(file, size, grey) for file in files]
        labels += [label] * len(files)
    x = torch.from_numpy(np.stack(pixels)).to(torch.float32) / 255.0
    classes = tuple(folder.name for folder in folders)
    return Dataset("image-folder", x, torch.tensor(labels), num_classes=len(classes), class_names=classes)


def square_pixels(image: Image.Image, size: int, grey: bool) -> npt.NDArray[np.uint8]:
    """Pixels (1 or 3, size, size) of the image's central square, resized bilinearly."""
    converted = ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
    fitted = ImageOps.fit(converted, (size, size), method=Image.Resampling.BILINEAR)
    pixels = np.asarray(fitted, dtype=np.uint8)
    return pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def npz(root: str, download: bool = False) -> Dataset:
    """Arrays ``x`` (n, *shape) and ``y`` (n,) from one .npz file; pickled objects are refused.

    ``x`` is uint8, divided by 255, or floating point within [0, 1]. Images go as (n, channels, height,
    width). ``y`` holds whole numbers, and each of 0 to C - 1 occurs.

    Args:
        root: path of the file.
        download: unused.

    Raises:
        DataError: naming what is wrong with the file, its arrays, shapes or values.
    """
    arrays = _read_arrays(root)
    x, y = arrays["x"], arrays["y"]
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y) or not len(y):
        raise DataError(
            f"x must be (n, *shape) and y (n,) with n > 0, got {x.shape} and {y.shape} in {root}: "
            "reshape them"
        )
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"x must be uint8 or floating point, got {x.dtype} in {root}: convert it")
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"y must hold whole numbers, got {y.dtype} in {root}: convert it")
    classes = np.unique(y)
    if classes[0] != 0 or classes[-1] != len(classes) - 1:
        raise DataError(
            f"the labels of C classes must be 0 to C - 1, each used, got {len(classes)} distinct labels from "
            f"{classes[0]} to {classes[-1]} in {root}: renumber them"
        )
    scale = 255.0 if x.dtype == np.uint8 else 1.0
    scaled = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)) / scale
    return Dataset("npz", scaled, torch.from_numpy(y.astype(np.int64)), num_classes=len(classes))


def _read_image(file: Path, size: int, grey: bool) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            return square_pixels(image, size, grey)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} is not a readable image ({error}): repair or remove it") from error


def _read_arrays(root: str) -> dict[str, npt.NDArray[np.generic]]:
    if not Path(root).is_file():
        raise DataError(
            f"npz reads one .npz file, got data.root={root!r}, which is none: give the file's path"
        )
    try:
        archive = np.load(root, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{root} holds one bare array: save x and y with numpy.savez")
        with archive:
            missing = [name for name in ("x", "y") if name not in archive.files]
            if missing:
                found = ", ".join(archive.files) or "none"
                raise DataError(f"{root} must hold arrays x and y, got {found}: save them with numpy.savez")
            return {name: archive[name] for name in ("x", "y")}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{root} is not a plain .npz file ({error}): save x and y with numpy.savez"
        ) from error
