"""Real data that comes with scikit-learn: nothing is downloaded, so examples and tests run anywhere."""

import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_images

from fedaudit.data.dataset import Dataset

SIZE = 32


def digits(root: str = "", download: bool = False) -> Dataset:
    """1797 handwritten digits, (1, 8, 8), grey levels 0 to 16 divided by 16, ten classes.

    The test part of the UCI "Optical Recognition of Handwritten Digits" set (Alpaydin, Kaynak 1998).

    Args:
        root: unused; the data are embedded.
        download: unused.

    >>> digits().x.shape
    torch.Size([1797, 1, 8, 8])
    """
    bunch = load_digits()
    x = torch.from_numpy((bunch.images / 16.0).astype(np.float32)).unsqueeze(1)
    y = torch.from_numpy(bunch.target.astype(np.int64))
    return Dataset("digits", x, y, num_classes=10, class_names=tuple(map(str, range(10))))


def patches(root: str = "", download: bool = False, stride: int | None = None, size: int = SIZE) -> Dataset:
    """RGB patches of two photographs (a temple, a flower), whose photograph is the label.

    Natural image content for reconstruction attacks. By default patches are 32x32 and do not overlap:
    there are 2 * 13 * 20 = 520; with `size=16` there are 2 * 26 * 40 = 2080. With a stride below the size
    neighbours share pixels, and a random split then puts shared pixels on both sides: test accuracy and
    membership inference on it mean little.

    Args:
        root: unused; the photographs come with scikit-learn.
        download: unused.
        stride: pixels between the corners of neighbouring patches; `size` if left out.
        size: height and width of a patch.

    Raises:
        ValueError: if `size` is not from 8 to 213, or `stride` leaves fewer than two rows of patches.

    >>> patches().x.shape
    torch.Size([520, 3, 32, 32])
    """
    photographs = load_sample_images().images  # type: ignore[no-untyped-call]
    height = min(min(p.shape[:2]) for p in photographs)
    if not 8 <= size <= height // 2:
        raise ValueError(f"size must be from 8 to {height // 2} pixels, got {size}: use e.g. {SIZE}")
    most = height - size
    step = size if stride is None else stride
    if not 1 <= step <= most:
        raise ValueError(f"stride must be from 1 to {most} pixels, got {step}: use e.g. {size}")
    pieces = []
    for photograph in photographs:
        pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)  # (3, height, width)
        windows = pixels.unfold(1, size, step).unfold(2, size, step)  # (3, rows, columns, size, size)
        pieces.append(windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size))
    x = torch.cat(pieces).to(torch.float32) / 255.0
    y = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor([len(p) for p in pieces]))
    return Dataset("patches", x, y, num_classes=2, class_names=("china", "flower"))
