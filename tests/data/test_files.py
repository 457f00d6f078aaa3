"""Data from one's own files: class folders of images, and .npz files, good and broken."""

import numpy as np
import pytest
import torch
from PIL import Image

from fedaudit.config.sections import DataConfig
from fedaudit.data.dataset import load_dataset
from fedaudit.data.files import image_folder, npz, square_pixels
from fedaudit.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    """Two classes: cats/ with two uniform images, dogs/ with one; one file that is no image."""
    for name, colour in (
        ("cats/a.png", (255, 0, 0)),
        ("cats/sub/b.PNG", (0, 255, 0)),
        ("dogs/c.png", (0, 0, 51)),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (7, 5), colour).save(tmp_path / name)
    (tmp_path / "dogs" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_sub_folders_are_classes_in_alphabetical_order(folder):
    dataset = load_dataset(DataConfig(name="image-folder(size=4)", root=str(folder)))
    assert dataset.x.shape == (3, 3, 4, 4)
    assert dataset.class_names == ("cats", "dogs")
    assert dataset.y.tolist() == [0, 0, 1]
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0.2]])
    assert torch.equal(dataset.x, colours[:, :, None, None].expand(3, 3, 4, 4))


def test_grey_images_have_one_channel(folder):
    assert image_folder(str(folder), size=4, grey=True).x.shape == (3, 1, 4, 4)


def test_a_wide_image_is_cropped_to_its_centre():
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, 2:6] = 200
    assert (square_pixels(Image.fromarray(pixels), size=4, grey=False) == 200).all()


def test_square_pixels_are_the_image_itself_where_nothing_must_change():
    pixels = RNG.integers(0, 256, size=(6, 6, 3), dtype=np.uint8)
    assert np.array_equal(square_pixels(Image.fromarray(pixels), 6, grey=False), pixels.transpose(2, 0, 1))


def test_a_class_folder_without_images_is_an_error(folder):
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"each class folder needs images .*, got none in .*empty"):
        image_folder(str(folder))


@pytest.mark.parametrize("root", ["", "missing"], ids=["no-sub-folders", "no-folder"])
def test_a_root_without_class_folders_is_an_error_that_names_the_key(tmp_path, root):
    with pytest.raises(
        DataError, match=r"needs one sub-folder per class, two or more, got none in data.root="
    ):
        image_folder(str(tmp_path / root))


def test_an_image_that_cannot_be_read_is_not_left_out(folder):
    (folder / "dogs" / "d.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"d\.png is not a readable image .*: repair or remove it"):
        image_folder(str(folder))


def test_a_size_out_of_range_is_refused(folder):
    with pytest.raises(ConfigError, match="size must be a positive number of pixels, got 0"):
        load_dataset(DataConfig(name="image-folder(size=0)", root=str(folder)))


@pytest.fixture
def saved(tmp_path):
    """A function that saves arrays and returns the file's path."""

    def save(**arrays):
        np.savez(tmp_path / "data.npz", **arrays)
        return str(tmp_path / "data.npz")

    return save


def test_bytes_are_divided_by_255(saved):
    x = RNG.integers(0, 256, size=(4, 1, 3, 3), dtype=np.uint8)
    dataset = load_dataset(DataConfig(name="npz", root=saved(x=x, y=np.array([0, 2, 1, 0], dtype=np.uint8))))
    assert np.array_equal((dataset.x.numpy() * 255).round().astype(np.uint8), x)
    assert dataset.y.tolist() == [0, 2, 1, 0]
    assert dataset.num_classes == 3


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floating_point_values_are_kept(saved, dtype):
    x = np.array([[0.0, 0.25], [0.5, 1.0]], dtype=dtype)
    assert npz(saved(x=x, y=np.array([0, 1]))).x.tolist() == [[0.0, 0.25], [0.5, 1.0]]


X, Y = np.zeros((4, 2), dtype=np.float32), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "must hold arrays x and y, got x: save them"),
        ({"images": X, "labels": Y}, "got images, labels"),
        ({"x": X, "y": Y[:3]}, r"got \(4, 2\) and \(3,\)"),
        ({"x": X[:, 0], "y": Y}, r"x must be \(n, \*shape\) and y \(n,\) with n > 0, got \(4,\) and \(4,\)"),
        ({"x": X[:0], "y": Y[:0]}, r"got \(0, 2\) and \(0,\)"),
        ({"x": X.astype(np.int32), "y": Y}, "x must be uint8 or floating point, got int32"),
        ({"x": X, "y": Y.astype(np.float32)}, "y must hold whole numbers, got float32"),
        ({"x": X, "y": Y + 1}, "got 2 distinct labels from 1 to 2 in .*: renumber"),
        ({"x": X, "y": 2 * Y}, "got 2 distinct labels from 0 to 2"),
        ({"x": X, "y": Y - 1}, "got 2 distinct labels from -1 to 0"),
        ({"x": np.where(Y[:, None] > 0, np.nan, X), "y": Y}, "x must be finite, got 4 other values"),
        ({"x": X + 2, "y": Y}, r"x must lie in \[0, 1\], got values in \[2, 2\]"),
        ({"x": np.array([[None], [1]], dtype=object), "y": Y[:2]}, "is not a plain .npz file .*allow_pickle"),
    ],
)
def test_a_malformed_archive_says_what_is_wrong(saved, arrays, message):
    with pytest.raises(DataError, match=message):
        npz(saved(**arrays))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"], ids=["empty", "text", "cut"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"is not a plain \.npz file"):
        npz(str(tmp_path / "data.npz"))


def test_a_bare_array_is_refused(tmp_path):
    np.save(tmp_path / "data.npy", X)
    with pytest.raises(DataError, match="holds one bare array: save x and y"):
        npz(str(tmp_path / "data.npy"))


def test_a_missing_file_is_an_error_that_names_the_key(tmp_path):
    with pytest.raises(DataError, match=r"reads one \.npz file, got data\.root=.*which is none"):
        npz(str(tmp_path))
