"""Image sets through torchvision; a set's own test part becomes the test set of the federation.

Nothing is downloaded unless ``data.download`` is true. torchvision checks the files' checksums before it
opens them, which matters for CIFAR, whose files are pickles.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedaudit.data.dataset import Dataset
from fedaudit.data.files import square_pixels
from fedaudit.errors import DataError
from fedaudit.vision import torchvision

Pixels = npt.NDArray[np.uint8]


def mnist(root: str, download: bool = False) -> Dataset:
    """MNIST (LeCun et al. 1998): 60 000 + 10 000 grey 28x28 digits, ten classes.

    Args:
        root: folder of torchvision's files (it reads ``root/MNIST/raw``).
        download: fetch them if they are missing.

    Raises:
        DataError: if the files are missing or damaged and not downloaded.
    """
    return _in_memory("mnist", torchvision.datasets.MNIST, root, download)


def fashion_mnist(root: str, download: bool = False) -> Dataset:
    """FashionMNIST (Xiao et al. 2017, arXiv:1708.07747): 60 000 + 10 000 grey 28x28 images, ten classes.

    Args and errors as for `mnist`; files under ``root/FashionMNIST/raw``.
    """
    return _in_memory("fashion-mnist", torchvision.datasets.FashionMNIST, root, download)


def cifar10(root: str, download: bool = False) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): 50 000 + 10 000 colour 32x32 images, ten classes.

    Args and errors as for `mnist`; files under ``root/cifar-10-batches-py``.
    """
    return _in_memory("cifar10", torchvision.datasets.CIFAR10, root, download)


def cifar100(root: str, download: bool = False) -> Dataset:
    """CIFAR-100 (Krizhevsky 2009): 50 000 + 10 000 colour 32x32 images, a hundred classes.

    Args and errors as for `mnist`; files under ``root/cifar-100-python``.
    """
    return _in_memory("cifar100", torchvision.datasets.CIFAR100, root, download)


def celeba(
    root: str, download: bool = False, attribute: str = "Male", size: int = 64, examples: int = 20_000
) -> Dataset:
    """CelebA faces (Liu et al. 2015, arXiv:1411.7766), cropped to a square, one of 40 attributes as label.

    The training and test parts are used, the validation part is not. All 182 637 images at 64x64 would
    take 9 GB as float32, so `examples` of them, evenly spaced, are read.

    Args:
        root: folder of torchvision's files (it reads ``root/celeba``).
        download: fetch them if they are missing.
        attribute: whose absence is class 0 and presence class 1.
        size: pixels of a side.
        examples: how many images to read of both parts together; 0 is all.

    Raises:
        DataError: if the files are missing and not downloaded, or there is no such attribute.
        ValueError: if `size` or `examples` is out of range.
    """
    if size < 1 or examples < 0 or examples == 1:
        raise ValueError(
            f"size must be positive and examples 0 or >= 2, got {size} and {examples}: change them"
        )
    parts = [
        _opened("celeba", torchvision.datasets.CelebA, root, download, split=part)
        for part in ("train", "test")
    ]
    names = [name for name in parts[0].attr_names if name]
    if attribute not in names:
        raise DataError(f"celeba has no attribute {attribute!r}: choose one of {', '.join(names)}")
    column = names.index(attribute)
    total = sum(map(len, parts))
    share = min(1.0, examples / total) if examples else 1.0
    pixels, labels = [], []
    for part in parts:
        chosen = np.linspace(0, len(part) - 1, max(1, round(share * len(part)))).astype(int)
        pixels.append(np.stack([square_pixels(part[int(i)][0], size, grey=False) for i in chosen]))
        labels.append([int(part.attr[int(i), column]) for i in chosen])
    return _joined("celeba", pixels, labels, (f"not {attribute}", attribute))


def _in_memory(name: str, kind: Callable[..., Any], root: str, download: bool) -> Dataset:
    """A set that torchvision holds whole as uint8, in (n, height, width) or (n, height, width, 3)."""
    parts = [_opened(name, kind, root, download, train=train) for train in (True, False)]
    names = tuple(parts[0].classes)
    pixels = [_channels_first(np.asarray(part.data)) for part in parts]
    return _joined(name, pixels, [list(map(int, part.targets)) for part in parts], names)


def _joined(name: str, pixels: list[Pixels], labels: list[list[int]], names: tuple[str, ...]) -> Dataset:
    """Training part then test part as one dataset that knows which examples are for testing."""
    train, test = pixels
    x = torch.empty(len(train) + len(test), *train.shape[1:])
    x[: len(train)] = torch.from_numpy(train)
    x[len(train) :] = torch.from_numpy(test)
    return Dataset(
        name,
        x.div_(255.0),
        torch.tensor(labels[0] + labels[1], dtype=torch.int64),
        num_classes=len(names),
        class_names=names,
        test=torch.arange(len(train), len(x)),
    )


def _channels_first(pixels: Pixels) -> Pixels:
    return pixels[:, None] if pixels.ndim == 3 else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _opened(name: str, kind: Callable[..., Any], root: str, download: bool, **options: Any) -> Any:
    try:
        return kind(root=root, download=download, **options)
    except (RuntimeError, OSError, ValueError, AssertionError, EOFError) as error:
        if download:
            raise DataError(
                f"dataset {name!r} could not be downloaded into data.root={root!r} with data.download=true "
                f"({error}): check the connection, or put torchvision's files there"
            ) from error
        raise DataError(
            f"dataset {name!r} is not complete in data.root={root!r}, and data.download=false forbids "
            f"fetching it ({error}): set data.download=true, or point data.root at torchvision's files"
        ) from error
