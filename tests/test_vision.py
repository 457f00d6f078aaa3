"""The torchvision shim: it imports torchvision anywhere and declares operators only where needed."""

import subprocess
import sys

import pytest
import torch

from fedaudit import vision
from fedaudit.vision import torchvision


def test_transforms_resize_an_image():
    resized = torchvision.transforms.functional.resize(torch.zeros(3, 8, 8), [4, 4])
    assert resized.shape == (3, 4, 4)


def test_models_run_a_forward_pass():
    model = torchvision.models.squeezenet1_1(num_classes=3)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_datasets_produce_images_and_labels():
    image, label = torchvision.datasets.FakeData(size=1, image_size=(3, 5, 5), num_classes=2)[0]
    assert image.size == (5, 5)
    assert label in (0, 1)


def test_importing_again_declares_nothing_more():
    before = list(vision._declared)
    assert vision.import_torchvision() is torchvision
    assert vision._declared == before


def test_operators_are_declared_exactly_where_the_plain_import_has_failed():
    code = (
        "try:\n    import torchvision\n    plain = True\n"
        "except RuntimeError:\n    plain = False\n"
        "from fedaudit import vision\n"
        "print(plain, bool(vision._declared), vision.torchvision.datasets.MNIST.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() in ("True False MNIST", "False True MNIST"), done.stderr


def test_another_reason_for_a_failing_import_is_not_hidden(monkeypatch):
    def fail(name):
        raise RuntimeError("a broken installation")

    monkeypatch.setattr(vision.importlib, "import_module", fail)
    monkeypatch.setattr(vision, "_declared", [])
    with pytest.raises(RuntimeError, match="a broken installation"):
        vision.import_torchvision()
    assert vision._declared == []
