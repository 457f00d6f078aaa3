"""The rows an oracle adds to an attack: what a reconstruction of known quality must score."""

import pytest
import torch

from fedaudit.attacks.scores import score
from fedaudit.audit.attack_scores import scored
from fedaudit.models.build import build_model
from fedaudit.types import ClientUpdate, Estimate, Reconstruction, RoundContext, Skip, Truth

SHAPE, CLASSES = (1, 8, 8), 3


def images(count, seed):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def build():
    return build_model("mlp(hidden=12)", SHAPE, CLASSES, seed=0)


UPDATE = ClientUpdate(0, 1, build().state_dict(), {}, 4)


def findings(x, truth, ctx=None, **options):
    found = Reconstruction(x, torch.zeros(len(x), dtype=torch.int64), 0.0, 1, {"labels": "known"})
    ctx = ctx or RoundContext(1, reference=(images(100, 9), torch.zeros(100)), build_model=build)
    results = score(found.x, found.y, truth.x, truth.y, ctx.value_range)
    return {name: finding for name, _, finding in scored(found, truth, UPDATE, ctx, results, **options)}


def truth(count=4, others=None):
    return Truth(images(count, 0), torch.zeros(count, dtype=torch.int64), others)


def test_the_scores_that_were_there_stay_what_they_were():
    t = truth()
    guess = t.x + 0.1 * images(4, 1)
    found = findings(guess, t)
    before = score(guess, t.y, t.x, t.y)
    assert list(found)[:4] == ["psnr", "mse", "ssim", "label-accuracy"]
    for name in list(found)[:4]:
        assert found[name].value == before[name.replace("-", "_")]
        assert found[name].extra == {"labels": "known", "truth-examples": 4, "matched": 4}


def test_a_permuted_copy_is_recovered_and_identified_whole():
    t = truth()
    found = findings(t.x[[2, 0, 3, 1]], t)
    for name in ("recovered", "identifiability", "feature-identifiability"):
        assert found[name].value == 1.0, name
    assert found["registered-psnr"].value == 100.0
    assert found["identifiability"].extra == {
        "pool": 104, "pool-of-client": 4, "chance": 4 / 104, "distance": "pixels",
    }  # fmt: skip


def test_the_share_recovered_counts_examples_that_nothing_was_matched_to():
    t = truth(4)
    errors = torch.tensor([0.0, 0.099, 0.101]).reshape(3, 1, 1, 1)  # 100, 20.1 and 19.9 dB
    x = (0.8 * t.x).clone()
    found = findings(x[:3] + errors, Truth(x, t.y))
    assert found["recovered"].value == 2 / 4
    assert found["recovered"].extra == {"above-db": 20.0, "recovered-examples": 2}


def test_a_shifted_copy_is_recovered_only_after_registration():
    t = truth(1)
    found = findings(t.x.roll(1, dims=-1), t)
    assert found["psnr"].value < 12 and found["recovered"].value == 0.0
    assert found["registered-psnr"].value == 100.0


def test_the_pool_holds_the_clients_other_examples_and_the_reference():
    found = findings(images(1, 5), truth(1, others=images(7, 3)))
    assert (found["identifiability"].extra["pool"], found["identifiability"].extra["pool-of-client"]) == (
        1 + 7 + 100,
        8,
    )
    assert found["identifiability"].extra["chance"] == 1 / 108


def test_a_large_pool_is_drawn_from_and_keeps_the_true_example(monkeypatch):
    monkeypatch.setattr("fedaudit.audit.attack_scores.MOST_OTHERS", 10)
    t = truth(2, others=images(50, 3))
    found = findings(t.x, t)
    assert found["identifiability"].value == 1.0 and found["identifiability"].extra["pool"] == 12


def test_without_other_candidates_identifiability_is_skipped_and_not_one():
    found = findings(truth().x, truth(), RoundContext(1))
    assert isinstance(found["identifiability"], Skip)
    assert "not behind the update" in found["identifiability"].reason
    assert "feature-identifiability" not in found


def test_lpips_is_a_skip_with_its_reason_and_only_on_request():
    assert "lpips" not in findings(truth().x, truth())
    found = findings(truth().x, truth(), perceptual=True)["lpips"]
    assert isinstance(found, Skip) and "at least 32x32" in found.reason


def test_inputs_that_are_no_images_have_no_image_scores():
    flat = Truth(torch.rand(2, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(2))
    found = findings(flat.x, flat, RoundContext(1, reference=(torch.rand(30, 5), torch.zeros(30))))
    assert "registered-psnr" not in found and "ssim" not in found
    assert isinstance(found["identifiability"], Estimate) and found["recovered"].value == 1.0


@pytest.mark.parametrize("name", ["recovered", "registered-psnr", "identifiability"])
def test_every_score_is_described_in_the_report(name):
    from fedaudit.report.quantities import describe

    known = describe(f"dlg.{name}")
    assert known.role == "attack" and known.meaning and known.limits and not known.headline
