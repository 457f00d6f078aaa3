"""Hub data: conversion of in-memory rows, and a local folder through Flower Datasets where installed."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fedaudit.config.sections import DataConfig
from fedaudit.data.dataset import load_dataset
from fedaudit.data.hub import from_rows
from fedaudit.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


class MemoryRows(list):
    """Rows as `datasets.Dataset` presents them."""

    def __init__(self, rows, names=None):
        super().__init__(rows)
        self.column_names = list(rows[0]) if rows else ["image", "label"]
        self.features = {column: SimpleNamespace() for column in self.column_names}
        if names is not None:
            self.features["label"] = SimpleNamespace(names=names)


def rows_of(pixels, labels, column="label"):
    return [{"image": Image.fromarray(p), column: v} for p, v in zip(pixels, labels, strict=True)]


def test_images_become_channels_first_values_between_zero_and_one():
    pixels = RNG.integers(0, 256, size=(3, 4, 5, 3), dtype=np.uint8)
    dataset = from_rows(MemoryRows(rows_of(pixels, [0, 1, 0]), names=["cat", "dog", "owl"]))
    assert np.array_equal((dataset.x * 255).round().to(torch.uint8).numpy(), pixels.transpose(0, 3, 1, 2))
    assert dataset.y.tolist() == [0, 1, 0]
    assert dataset.class_names == ("cat", "dog", "owl")


def test_texts_are_numbered_in_alphabetical_order():
    rows = MemoryRows(rows_of(np.zeros((3, 4, 4), dtype=np.uint8), ["b", "a", "b"], column="kind"))
    dataset = from_rows(rows, label="kind", grey=True)
    assert dataset.x.shape == (3, 1, 4, 4)
    assert dataset.y.tolist() == [1, 0, 1]
    assert dataset.class_names == ("a", "b")


def test_images_of_several_sizes_need_a_size():
    rows = MemoryRows([{"image": Image.new("L", (w, 4)), "label": 0} for w in (4, 6)])
    with pytest.raises(
        DataError, match=r"of one size, got 2 from \(3, 4, 4\) to \(3, 4, 6\): set hub\(size="
    ):
        from_rows(rows)
    assert from_rows(rows, size=5).x.shape == (2, 3, 5, 5)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"img": 1, "label": 0}], {}, r"hub\(image=image\) names no column: choose one of img, label"),
        ([{"image": 1, "y": 0}], {}, r"hub\(label=label\) names no column: choose one of image, y"),
        ([{"image": 1, "label": 0}], {}, "must hold images, got a int"),
        ([], {}, "at least one row, got none"),
        ([{"image": Image.new("L", (4, 4)), "label": 0.5}], {}, "whole numbers or texts, got float"),
        (
            [{"image": Image.new("L", (4, 4)), "label": v} for v in (1, "a")],
            {},
            "got int, str: choose another",
        ),
    ],
)
def test_rows_that_cannot_be_used_say_why(rows, options, message):
    with pytest.raises(DataError, match=message):
        from_rows(MemoryRows(rows), **options)


def test_an_unlabelled_row_of_a_labelled_set_is_refused():
    rows = MemoryRows(rows_of(np.zeros((2, 4, 4), dtype=np.uint8), [0, -1]), names=["a", "b"])
    with pytest.raises(DataError, match="labels must be 0 to 1, got -1 to 0"):
        from_rows(rows)


def test_the_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(DataError, match=r"needs Flower Datasets, .*: pip install 'fedaudit\[datasets\]'"):
        load_dataset(DataConfig(name="hub(id=owner/name)"))


def test_the_id_is_required():
    with pytest.raises(ConfigError, match=r"hub needs id: write hub\(id=...\)"):
        load_dataset(DataConfig(name="hub"))


@pytest.fixture
def flower_datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    pytest.importorskip("flwr_datasets", reason="the extra fedaudit[datasets] is not installed")
    return str(tmp_path / "cache")


def test_a_local_folder_is_read_through_flower_datasets(flower_datasets, tmp_path):
    pixels = RNG.integers(0, 256, size=(2, 3, 6, 6, 3), dtype=np.uint8)
    for number, name in enumerate(("ants", "bees")):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(pixels[number, i]).save(tmp_path / "images" / "train" / name / f"{i}.png")
    dataset = load_dataset(DataConfig(name=f"hub(id={tmp_path / 'images'})", root=flower_datasets))
    assert dataset.class_names == ("ants", "bees")
    for number in range(2):
        own = (dataset.x[dataset.y == number] * 255).round().to(torch.uint8).numpy()
        assert np.array_equal(own, pixels[number].transpose(0, 3, 1, 2))


def test_the_hub_is_not_asked_unless_downloads_are_allowed(flower_datasets):
    with pytest.raises(DataError, match=r"'no/such' is no local folder, .*: set data\.download=true"):
        load_dataset(DataConfig(name="hub(id=no/such)", root=flower_datasets))


def test_a_split_that_is_not_there_is_an_error_that_names_it(flower_datasets, tmp_path):
    (tmp_path / "images" / "train" / "ants").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "train" / "ants" / "0.png")
    with pytest.raises(DataError, match=r"split 'other' of dataset .*cannot be loaded"):
        load_dataset(DataConfig(name=f"hub(id={tmp_path / 'images'}, split=other)", root=flower_datasets))
