"""Pictures of reconstructions."""

import base64
import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from fedaudit.errors import RecordError
from fedaudit.records import Run
from fedaudit.report.images import picture, psnr, read_recorded, recorded_files


def _decode(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_pixels_are_enlarged_without_blending():
    image = np.array([[[0.0, 1.0], [0.5, 0.25]]])
    drawn = _decode(picture(image, side=8))
    assert drawn.shape == (8, 8)
    assert set(np.unique(drawn)) == {0, 64, 128, 255}
    assert (drawn[:4, 4:] == 255).all()


def test_colour_images_keep_their_channels():
    image = np.zeros((3, 4, 4))
    image[1] = 1.0
    assert _decode(picture(image))[0, 0].tolist() == [0, 255, 0]


def test_values_outside_the_range_and_nan_can_be_drawn():
    drawn = _decode(picture(np.array([[[-3.0, 7.0, math.nan]]]), side=3))
    assert drawn[0].tolist() == [0, 255, 0]


def test_large_images_are_reduced():
    assert max(_decode(picture(np.zeros((1, 900, 600)), side=96)).shape) == 192


@pytest.mark.parametrize(
    ("error", "decibel"), [(0.1, 20.0), (0.01, 40.0), (0.0, math.inf)], ids=["tenth", "hundredth", "equal"]
)
def test_psnr_of_a_constant_error_has_a_closed_form(error: float, decibel: float):
    image = np.full((1, 4, 4), 0.5)
    assert psnr(image, image + error) == pytest.approx(decibel)


def test_uniform_image_scores_the_images_own_variance(runs: list[Run]):
    recorded = read_recorded(recorded_files(runs[0].path)[0])
    expected = [10 * math.log10(1 / image.var()) for image in recorded.original]
    assert recorded.uniform_psnr == pytest.approx(expected)
    assert (recorded.attack, recorded.round, recorded.client) == ("dlg", 1, "3")
    assert recorded.conditions["labels"] == "known"


def test_file_that_is_no_safetensors_is_a_record_error(tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(RecordError, match=r"x\.safetensors is not a readable file"):
        read_recorded(tmp_path / "x.safetensors")


def test_reconstruction_of_another_shape_is_a_record_error(tmp_path: Path):
    batch = np.zeros((2, 1, 4, 4), np.float32)
    save_file({"original": batch, "reconstruction": batch[:1].copy()}, tmp_path / "x.safetensors")
    with pytest.raises(RecordError, match=r"two equal batches .* got .*\(2, 1, 4, 4\).*\(1, 1, 4, 4\)"):
        read_recorded(tmp_path / "x.safetensors")
