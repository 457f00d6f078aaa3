import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedaudit.attacks.imprint import Imprint, expected_recoveries, imprint, recover_imprinted, thresholds
from fedaudit.attacks.scores import match, score
from fedaudit.data.embedded import patches
from fedaudit.models.build import build_model
from tests.attacks.planted import context, examples, largest_error, planted, trained

SHAPE, CLASSES = (3, 32, 32), 2


def imprinted(bins: int = 128, reference: Tensor | None = None, gain: float = 100.0) -> nn.Module:
    model = build_model("cnn(width=4)", SHAPE, CLASSES, seed=0)
    g = torch.Generator().manual_seed(0)
    return imprint(model, SHAPE, bins, g, reference=reference, gain=gain)


def photographs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch, its labels, and other patches of the same photographs."""
    data = patches()
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(3))
    return data.x[order[:batch]], data.y[order[:batch]], data.x[order[batch:]]


def alone(x: Tensor, ends: Tensor) -> Tensor:
    """Which examples are alone in their bin (B,)."""
    bins = torch.bucketize(x.flatten(1).double().mean(dim=1), ends)
    return torch.bincount(bins, minlength=len(ends) + 1)[bins] == 1


@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32-client"])
def test_examples_alone_in_their_bin_are_recovered(exact: bool) -> None:
    x, y, others = photographs(16)

    def build() -> nn.Module:
        made = imprinted(64, others)
        return made.double() if exact else made

    update = planted(build, x, y) if exact else trained(build, x, y)
    found = Imprint().reconstruct(update, context(build, x, CLASSES))
    singles = alone(x, thresholds(64, others.flatten(1).double().mean(dim=1)))
    assert 8 <= int(singles.sum()) < 16  # natural images share bins: the test must not be about all of them
    assert largest_error(found.x, x[singles]) < (1e-6 if exact else 1e-3)
    occupied = torch.bucketize(
        x.flatten(1).double().mean(dim=1), thresholds(64, others.flatten(1).double().mean(dim=1))
    ).unique()
    assert found.conditions["bins-hit"] == len(occupied)
    assert found.conditions["active"] is True


def test_bins_of_a_gaussian_serve_an_observer_without_data() -> None:
    x, y, _ = photographs(8)
    update = trained(imprinted, x, y)
    found = Imprint().reconstruct(update, context(imprinted, x, CLASSES))
    singles = alone(x, thresholds(128, mean=0.5, std=0.15))
    assert int(singles.sum()) >= 3
    assert largest_error(found.x, x[singles]) < 1e-3


def test_gain_lifts_the_gradient_above_rounding_and_leaves_the_function_alone() -> None:
    x, y, _ = photographs(8)
    plain, lifted = (lambda: imprinted(gain=1.0)), (lambda: imprinted(gain=100.0))
    assert torch.allclose(plain()(x), lifted()(x), atol=1e-4)
    errors = []
    for build in (plain, lifted):
        found = Imprint().reconstruct(trained(build, x, y), context(build, x, CLASSES))
        errors.append(float(match(found.x, x)[2].median()))
    assert errors[1] < errors[0] / 10


def test_strong_noise_defeats_the_attack() -> None:
    x, y, others = photographs(8)

    def build() -> nn.Module:
        return imprinted(64, others).double()

    found = Imprint().reconstruct(planted(build, x, y, noise=1.0), context(build, x, CLASSES))
    assert score(found.x, found.y, x, y)["psnr"] < 15
    assert float(found.conditions["relative-objective"]) > 0.1


@pytest.mark.parametrize(("bins", "batch"), [(8, 4), (32, 16), (64, 64), (1, 1)])
def test_expected_recoveries_agree_with_simulation(bins: int, batch: int) -> None:
    g = torch.Generator().manual_seed(bins)
    trials = 2000
    drawn = torch.randint(0, bins, (trials, batch), generator=g)
    singles = (F.one_hot(drawn, bins).sum(dim=1) == 1).sum(dim=1).double()
    expected = expected_recoveries(bins, batch)
    assert expected == pytest.approx(batch * (1 - 1 / bins) ** (batch - 1))
    assert float(singles.mean()) == pytest.approx(
        expected, abs=4 * float(singles.std()) / math.sqrt(trials) + 1e-9
    )


def test_the_attack_recovers_as_many_as_expected_where_bins_are_equally_likely() -> None:
    """Random images: the statistic is near-Gaussian and the bins fit."""
    singles, batch, trials = [], 12, 12
    reference = examples(3000, (1, 8, 8), 2, seed=99)[0]
    for seed in range(trials):

        def build() -> nn.Module:
            made = imprint(
                build_model("mlp(hidden=8)", (1, 8, 8), 2, seed=0),
                (1, 8, 8),
                32,
                torch.Generator().manual_seed(0),
                reference=reference,
            )
            return made.double()

        x, y = examples(batch, (1, 8, 8), 2, seed=seed)
        found = Imprint().reconstruct(planted(build, x, y), context(build, x, 2))
        apart = (found.x.flatten(1)[None] - x.flatten(1)[:, None]).abs().amax(dim=2).amin(dim=1)
        singles.append(float((apart < 1e-5).sum()))
    mean = sum(singles) / trials
    spread = float(torch.tensor(singles).std()) / math.sqrt(trials)
    assert mean == pytest.approx(expected_recoveries(32, batch), abs=4 * spread)


def test_a_bin_with_two_examples_gives_their_mixture() -> None:
    x = torch.tensor([[0.2, 0.4], [0.6, 0.0], [0.9, 0.9]], dtype=torch.float64)
    on = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)  # two units, three examples
    d = torch.tensor([1.0, 3.0, -2.0], dtype=torch.float64)
    found, bins = recover_imprinted((on * d) @ x, (on * d).sum(dim=1))
    assert bins.tolist() == [0, 1]
    assert torch.allclose(found[0], (x[0] + 3 * x[1]) / 4)
    assert torch.allclose(found[1], x[2])


def test_bins_hold_equal_shares_and_leave_nobody_out() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double() * 0.1 + 0.5
    for ends in (thresholds(10, values), thresholds(10, mean=0.5, std=0.1)):
        counts = torch.bincount(torch.bucketize(values, ends), minlength=11)
        assert int(counts[0]) == 0
        assert float((counts[1:] - 400).abs().max()) < 4 * math.sqrt(400)


def test_a_model_that_was_not_changed_and_wrong_numbers_are_answered_in_a_sentence() -> None:
    x, y = examples(2, (1, 8, 8), 3)

    def build() -> nn.Module:
        return build_model("mlp", (1, 8, 8), 3, seed=0)

    with pytest.raises(ValueError, match="imprint is an active attack: it needs a model built with imprint"):
        Imprint().reconstruct(trained(build, x, y), context(build, x, 3))
    with pytest.raises(ValueError, match="bins >= 1 and a spread > 0, got 0"):
        thresholds(0)
    with pytest.raises(ValueError, match="got 3 and 0"):
        thresholds(3, torch.ones(5))
    with pytest.raises(ValueError, match="strength and gain must be positive, got 0"):
        imprint(build(), (1, 8, 8), 4, torch.Generator(), strength=0.0)
    with pytest.raises(ValueError, match="bins and batch must be positive, got 0"):
        expected_recoveries(0, 3)
