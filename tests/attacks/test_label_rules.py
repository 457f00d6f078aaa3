"""Label rules for batches, against what theory says and the accuracies of a simulated head."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedaudit.attacks.labels import (
    estimate_mean_softmax,
    label_counts,
    llg_labels,
    llg_parameters,
    uniform_inputs,
    yin_labels,
)
from tests.attacks.planted import sum_loss

C, D, TRIALS = 10, 64, 60
Rule = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def head(std: float, batch: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight and bias gradient, labels and predictions of a head on features |N(0, 1)|."""
    weight = std * torch.randn(C, D, generator=g)
    features = torch.randn(batch, D, generator=g).abs()
    y = torch.randint(0, C, (batch,), generator=g)
    predicted = (features @ weight.T).softmax(dim=1)
    slopes = (predicted - F.one_hot(y, C)) / batch
    return slopes.T @ features, slopes.sum(dim=0), y, predicted


def uniform_rule(_weight: Tensor, bias: Tensor, _mean: Tensor, batch: int) -> Tensor:
    return label_counts(bias, torch.full((C,), 1 / C), batch).double()


def true_rule(_weight: Tensor, bias: Tensor, mean: Tensor, batch: int) -> Tensor:
    return label_counts(bias, mean, batch).double()


def raw_rule(_weight: Tensor, bias: Tensor, _mean: Tensor, batch: int) -> Tensor:
    """The bias rule with p = 1/C, rounded only: counts may be negative and need not sum to B."""
    return (batch * (1 / C - bias)).round().double()


def llg_rule(weight: Tensor, _bias: Tensor, _mean: Tensor, batch: int) -> Tensor:
    return torch.bincount(llg_labels(weight, batch), minlength=C).double()


def accuracies(rule: Rule, std: float, batch: int) -> Tensor:
    """1 - sum_c |count - truth| / 2B in each trial: the share of right labels where counts sum to B."""
    g = torch.Generator().manual_seed(batch)
    found = []
    for _ in range(TRIALS):
        weight, bias, y, predicted = head(std, batch, g)
        counts = rule(weight, bias, predicted.mean(dim=0), batch)
        found.append(1 - (counts - torch.bincount(y, minlength=C)).abs().sum() / (2 * batch))
    return torch.stack(found)


@pytest.mark.parametrize("batch", [8, 32, 128])
@pytest.mark.parametrize("std", [0.01, 0.3], ids=["fresh", "peaked"])
def test_the_bias_rule_with_the_true_mean_softmax_is_exact_always(std: float, batch: int) -> None:
    assert float(accuracies(true_rule, std, batch).min()) == 1.0


@pytest.mark.parametrize(
    ("rule", "std", "expected"),
    [
        pytest.param(uniform_rule, 0.01, (1.0, 0.999, 0.977), id="bias-fresh"),
        pytest.param(llg_rule, 0.01, (0.98, 0.60, 0.54), id="llg-fresh"),
        pytest.param(raw_rule, 0.3, (0.45, 0.54, 0.53), id="raw-bias-peaked"),
        pytest.param(llg_rule, 0.3, (0.79, 0.66, 0.65), id="llg-peaked"),
    ],
)
def test_rules_have_the_accuracies_of_the_published_simulation(
    rule: Rule, std: float, expected: tuple[float, ...]
) -> None:
    for batch, accuracy in zip((8, 32, 128), expected, strict=True):
        found = accuracies(rule, std, batch)
        error = float(found.std()) * math.sqrt(1 / TRIALS + 1 / 200)  # theirs were 200 trials
        assert float(found.mean()) == pytest.approx(accuracy, abs=3 * error + 0.006)  # printed to two digits


def test_counts_that_are_clamped_to_the_simplex_are_right_more_often_than_rounded_ones() -> None:
    for batch in (8, 32, 128):
        clamped, raw = accuracies(uniform_rule, 0.3, batch), accuracies(raw_rule, 0.3, batch)
        assert float(clamped.mean()) > float(raw.mean()) + 0.1


def test_llg_takes_each_negative_class_once_and_then_always_the_smallest() -> None:
    # impact -0.1 (1 + 1/3) ... given here: -0.2. After one each: -0.5, 0.1, 0.3, so class 0 three times more
    g = torch.tensor([[-0.7], [-0.1], [0.3]])
    assert llg_labels(g, 5, impact=-0.2).tolist() == [0, 0, 0, 0, 1]
    # what subtracting from the class the first stage ended with would answer: class 0 for ever
    assert llg_labels(g, 7, impact=-0.2).tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert llg_labels(g, 2).tolist() == [0, 1]
    assert llg_labels(
        torch.tensor([[-0.9], [0.1], [0.3]]), 3, -0.2, torch.tensor([0.0, 2.0, 0.0])
    ).tolist() == [
        0,
        1,
        1,
    ]


def test_llg_is_exact_for_one_example_with_features_that_are_not_negative() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        weight, _, y, _ = head(0.3, 1, g)
        assert llg_labels(weight, 1).tolist() == y.tolist()


def test_impact_and_offset_from_auxiliary_data_beat_the_plain_rule() -> None:
    model = nn.Sequential(nn.Linear(20, D), nn.ReLU(), nn.Linear(D, C))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.15 * torch.randn(p.shape, generator=g))
    impact, offset = llg_parameters(model, sum_loss, torch.rand(64, 20, generator=g), C, 32)
    assert impact < 0
    plain, informed = [], []
    for _ in range(30):
        x, y = torch.rand(32, 20, generator=g), torch.randint(0, C, (32,), generator=g)
        weight = torch.autograd.grad(sum_loss(model(x), y) / 32, model[2].weight)[0]
        truth = torch.bincount(y, minlength=C)
        for found, options in ((plain, {}), (informed, {"impact": impact, "offset": offset})):
            counts = torch.bincount(llg_labels(weight, 32, **options), minlength=C)  # type: ignore[arg-type]
            found.append(float((counts - truth).abs().sum()) / 64)
    assert sum(informed) / 30 < 0.6 * sum(plain) / 30


def test_yin_is_exact_for_distinct_labels_at_fresh_weights() -> None:
    g = torch.Generator().manual_seed(0)
    for batch in (1, 3, 6, 10):
        for _ in range(20):
            features = torch.randn(batch, D, generator=g).relu()
            y = torch.randperm(C, generator=g)[:batch]
            slopes = (features @ (0.01 * torch.randn(D, C, generator=g))).softmax(dim=1) - F.one_hot(y, C)
            assert yin_labels(slopes.T @ features, batch).tolist() == y.sort().values.tolist()


def test_yin_names_a_repeated_label_once_only() -> None:
    features = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    slopes = torch.full((2, C), 0.1) - F.one_hot(torch.tensor([4, 4]), C)
    found = yin_labels(slopes.T @ features, 2).tolist()
    assert found.count(4) == 1


def test_the_mean_softmax_of_reference_data_gives_counts_that_dummy_inputs_do_not() -> None:
    """A trained model is confident on data, not on dummies."""
    g = torch.Generator().manual_seed(0)
    centres = torch.rand(4, 12, generator=g)

    def data(count: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(0, 4, (count,), generator=g)
        return centres[y] + 0.1 * torch.randn(count, 12, generator=g), y

    model = nn.Linear(12, 4)
    with torch.no_grad():
        model.weight.copy_(2.5 * centres)
        model.bias.copy_(-1.25 * centres.square().sum(dim=1) + torch.tensor([1.0, 0.0, 0.0, -1.0]))
    reference = estimate_mean_softmax(model, data(400)[0])
    dummies = estimate_mean_softmax(model, uniform_inputs(400, (12,), (0.0, 1.0), g))
    wrong = {"reference": 0.0, "dummies": 0.0}
    for _ in range(20):
        x, y = data(64)
        bias = torch.autograd.grad(sum_loss(model(x), y) / 64, model.bias)[0]
        truth = torch.bincount(y, minlength=4)
        for name, mean in (("reference", reference), ("dummies", dummies)):
            wrong[name] += float((label_counts(bias, mean, 64) - truth).abs().sum())
    assert wrong["reference"] < wrong["dummies"]


def test_an_estimate_of_the_softmax_leaves_running_statistics_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = uniform_inputs(9, (3,), (-1.0, 1.0), torch.Generator().manual_seed(0))
    found = estimate_mean_softmax(model, x, chunk=9)
    assert float(found.sum()) == pytest.approx(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert float(x.min()) < -0.5


def test_rules_refuse_what_they_cannot_read() -> None:
    with pytest.raises(ValueError, match="from 1 to C = 3, got 4"):
        yin_labels(torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match=r"impact of an example on its class is negative, got 0\.1"):
        llg_labels(torch.zeros(3, 2), 4, impact=0.1)
    with pytest.raises(ValueError, match="batch size must be positive, got 0"):
        llg_labels(torch.zeros(3, 2), 0)
    with pytest.raises(ValueError, match=r"head of 5 rows, got \(4, 3\)"):
        llg_parameters(nn.Linear(3, 4), sum_loss, torch.zeros(1, 3), 5, 2)
    with pytest.raises(ValueError, match="needs inputs, got none"):
        estimate_mean_softmax(nn.Identity(), torch.zeros(0, 2))
    with pytest.raises(ValueError, match="must be positive, got 0"):
        uniform_inputs(0, (2,), (0.0, 1.0), torch.Generator())
