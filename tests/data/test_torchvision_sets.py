"""torchvision's sets, from tiny files in their real on-disk formats; nothing is downloaded."""

import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from fedaudit.config.sections import DataConfig
from fedaudit.data.dataset import load_dataset, split
from fedaudit.errors import ConfigError, DataError
from fedaudit.vision import torchvision

NAMES = ["mnist", "fashion-mnist", "cifar10", "cifar100", "celeba"]
RNG = np.random.default_rng(0)


def write_idx(path, array):
    """The IDX format: two zero bytes, type 8 (unsigned byte), number of dimensions, sizes, data."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files_are_read_with_their_own_test_part(tmp_path, name, folder):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    images = {
        part: RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, n in (("train", 6), ("t10k", 3))
    }
    labels = {part: np.arange(len(own), dtype=np.uint8) for part, own in images.items()}
    for part in images:
        write_idx(raw / f"{part}-images-idx3-ubyte", images[part])
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels[part])

    config = DataConfig(name=name, root=str(tmp_path), reference_fraction=0.0)
    dataset = load_dataset(config)
    assert dataset.x.shape == (9, 1, 28, 28)
    both = np.concatenate([images["train"], images["t10k"]])
    assert np.array_equal((dataset.x[:, 0] * 255).round().to(torch.uint8).numpy(), both)
    assert dataset.y.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert (dataset.num_classes, len(dataset.class_names)) == (10, 10)
    parts = split(dataset, config, seed=0)
    assert torch.equal(parts.test.x, dataset.x[6:])
    assert torch.equal(parts.train.x, dataset.x[:6])


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision without its checksums, which no fabricated file can have."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    monkeypatch.setattr(torchvision.datasets.CelebA, "_check_integrity", lambda self: True)


@pytest.mark.parametrize(
    ("name", "folder", "files", "key", "meta", "names"),
    [
        ("cifar10", "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "labels", "batches.meta",
         "label_names"),
        ("cifar100", "cifar-100-python", ["train"], "fine_labels", "meta", "fine_label_names"),
    ],
    ids=["cifar10", "cifar100"],
)  # fmt: skip
def test_cifar_batches_are_read_with_channels_first(
    tmp_path, unchecked, name, folder, files, key, meta, names
):
    base = tmp_path / folder
    base.mkdir()
    num_classes = 10 if name == "cifar10" else 100
    rows = {}
    for file in [*files, "test" if name == "cifar100" else "test_batch"]:
        rows[file] = RNG.integers(0, 256, size=(2, 3072), dtype=np.uint8)
        (base / file).write_bytes(pickle.dumps({"data": rows[file], key: [1, num_classes - 1]}))
    (base / meta).write_bytes(pickle.dumps({names: [f"class {i}" for i in range(num_classes)]}))

    dataset = load_dataset(DataConfig(name=name, root=str(tmp_path)))
    expected = np.concatenate(list(rows.values())).reshape(-1, 3, 32, 32)
    assert np.array_equal((dataset.x * 255).round().to(torch.uint8).numpy(), expected)
    assert dataset.num_classes == num_classes
    assert dataset.class_names[1] == "class 1"
    assert dataset.test.tolist() == [len(expected) - 2, len(expected) - 1]


@pytest.fixture
def faces(tmp_path, unchecked):
    """CelebA's folder with six images, four for training and two for testing; odd ones are Male."""
    base = tmp_path / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(6)]
    for i, name in enumerate(names):
        Image.new("RGB", (178, 218), (40 * i, 0, 0)).save(base / "img_align_celeba" / name)
    parts = {0: 0, 1: 0, 2: 0, 3: 0, 4: 2, 5: 2}

    def table(values, header=None):
        lines = [f"{name} {' '.join(map(str, values(i)))}" for i, name in enumerate(names)]
        return "\n".join([*(header or []), *lines]) + "\n"

    (base / "list_eval_partition.txt").write_text(table(lambda i: [parts[i]]))
    (base / "identity_CelebA.txt").write_text(table(lambda i: [i]))
    (base / "list_bbox_celeba.txt").write_text(table(lambda i: [0, 0, 1, 1], ["6", "image_id x y w h"]))
    (base / "list_landmarks_align_celeba.txt").write_text(table(lambda i: [0] * 10, ["6", "l " * 10]))
    (base / "list_attr_celeba.txt").write_text(
        table(lambda i: [-1, 1 if i % 2 else -1], ["6", "Smiling Male "])
    )
    return tmp_path


def test_celeba_faces_are_labelled_by_the_attribute(faces):
    dataset = load_dataset(DataConfig(name="celeba(size=8)", root=str(faces)))
    assert dataset.x.shape == (6, 3, 8, 8)
    assert dataset.y.tolist() == [0, 1, 0, 1, 0, 1]
    assert dataset.class_names == ("not Male", "Male")
    assert dataset.test.tolist() == [4, 5]
    red = dataset.x[:, 0].mean(dim=(1, 2)) * 255
    assert (red - 40 * torch.arange(6)).abs().max() < 4  # JPEG is lossy


def test_another_attribute_gives_other_labels(faces):
    dataset = load_dataset(DataConfig(name="celeba(attribute=Smiling, size=8)", root=str(faces)))
    assert dataset.y.tolist() == [0] * 6


def test_celeba_reads_the_number_of_examples_asked_for_from_both_parts(faces):
    dataset = load_dataset(DataConfig(name="celeba(size=8, examples=3)", root=str(faces)))
    assert len(dataset) == 3
    assert len(dataset.test) == 1


def test_an_unknown_attribute_is_an_error_that_lists_the_known(faces):
    with pytest.raises(DataError, match="celeba has no attribute 'Old': choose one of Smiling, Male"):
        load_dataset(DataConfig(name="celeba(attribute=Old)", root=str(faces)))


def test_a_celeba_option_out_of_range_is_refused(faces):
    with pytest.raises(ConfigError, match="size must be positive and examples 0 or >= 2, got 64 and 1"):
        load_dataset(DataConfig(name="celeba(examples=1)", root=str(faces)))


@pytest.mark.parametrize("name", NAMES)
def test_missing_data_is_an_error_that_names_both_keys_and_their_values(tmp_path, name):
    with pytest.raises(DataError) as caught:
        load_dataset(DataConfig(name=name, root=str(tmp_path)))
    text = str(caught.value)
    assert text.startswith(
        f"dataset {name!r} is not complete in data.root={str(tmp_path)!r}, and data.download=false"
    )
    assert "set data.download=true, or point data.root at torchvision's files" in text


def test_a_damaged_file_is_an_error(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.zeros(2, dtype=np.uint8))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(DataError, match="dataset 'mnist' is not complete"):
        load_dataset(DataConfig(name="mnist", root=str(tmp_path)))


def test_a_failed_download_is_an_error_that_names_both_keys(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    with pytest.raises(
        DataError, match=r"could not be downloaded into data\.root=.* with data\.download=true \(no"
    ):
        load_dataset(DataConfig(name="cifar10", root=str(tmp_path), download=True))
