"""Integer entries are no part of an update, and are looked at all the same."""

import pytest
import torch

from fedaudit.claims import HOLDS, UNCHECKED, VIOLATED, ClipNorm, GaussianNoise
from fedaudit.kept_files import load_update, save_update, update_file
from fedaudit.types import ClientUpdate
from fedaudit.verification import verify_round

from . import federation as f

STD = 0.2
BATCHES = torch.tensor(3)


def update(integers, change=None):
    """A clipped update beside a counter that was sent as 3."""
    floats = f.weights_of(1)
    sent = f.received(1, 0, change or f.clip(f.signal(1, 0)), floats)
    return ClientUpdate(0, 1, {**floats, "batches": BATCHES}, sent.delta, 10, integers=integers)


def noised(integers):
    return update(integers, f.plus(f.clip(f.signal(1, 0)), f.draw(f.generator("noise"), STD)))


def only(claim, seen):
    (finding,) = verify_round([claim], [seen])
    return finding


def test_a_counter_that_moved_is_longer_than_the_clip_norm():
    finding = only(ClipNorm(f.C), update({"batches": torch.tensor(13)}))
    assert finding.verdict == VIOLATED and "'batches' moved by 10 and was not clipped" in finding.reason
    assert finding.measured == pytest.approx((10**2 + f.C**2) ** 0.5, rel=1e-3)


def test_a_counter_that_moved_within_the_clip_norm_keeps_it():
    assert only(ClipNorm(20.0), update({"batches": torch.tensor(13)})).verdict == HOLDS


def test_each_tensor_is_judged_by_itself_where_clipping_is_per_layer():
    moved = update({"batches": torch.tensor(4)})
    assert only(ClipNorm(0.9, over="layer"), moved).verdict == VIOLATED
    assert only(ClipNorm(1.0, over="layer"), moved).verdict == HOLDS


def test_no_noise_fits_into_a_counter_that_moved():
    finding = only(GaussianNoise(STD, signal=f.C), noised({"batches": torch.tensor(4)}))
    assert finding.verdict == VIOLATED and "'batches' was sent as trained" in finding.reason


def test_a_counter_that_came_back_as_it_was_sent_gives_nothing_away():
    seen = noised({"batches": BATCHES.clone()})
    assert only(GaussianNoise(STD, signal=f.C), seen).verdict == HOLDS
    assert only(ClipNorm(f.C), update({"batches": BATCHES.clone()})).verdict == HOLDS


@pytest.mark.parametrize("claim", [GaussianNoise(STD, signal=f.C), ClipNorm(f.C)], ids=["noise", "clipping"])
def test_a_counter_that_nobody_kept_is_named_and_left_open(claim):
    seen = noised({}) if isinstance(claim, GaussianNoise) else update({})
    finding = only(claim, seen)
    assert finding.verdict == UNCHECKED and "integer entries (batches)" in finding.reason


def test_clipping_of_single_examples_does_not_speak_of_counters():
    finding = only(ClipNorm(f.C, of="example"), update({"batches": torch.tensor(13)}))
    assert finding.verdict == UNCHECKED and "single gradients" in finding.reason


def test_counters_are_kept_with_the_update(tmp_path):
    save_update(tmp_path, update({"batches": torch.tensor(7)}))
    kept = load_update(update_file(tmp_path, 1, 0))
    assert kept.integers.keys() == {"batches"} and int(kept.integers["batches"]) == 7
