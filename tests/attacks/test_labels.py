import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedaudit.attacks.labels import idlg_label, label_counts


def head_gradient(
    seed: int, batch: int, classes: int, bias: bool = True
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of a random head (tanh features, of both signs), the labels and the mean softmax."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, classes, bias=bias)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5, generator=g)
    x = torch.randn(batch, 6, generator=g, dtype=torch.float64)
    y = torch.randint(0, classes, (batch,), generator=g)
    outputs = model(x)
    gradient = torch.autograd.grad(F.cross_entropy(outputs, y), list(model[2].parameters()))
    return list(gradient), y, outputs.softmax(-1).mean(0).detach()


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_bias_gradient_gives_the_label_of_every_single_example(classes: int) -> None:
    for seed in range(100):
        (_, bias), y, _ = head_gradient(seed, 1, classes)
        assert idlg_label(bias) == int(y)
        assert int((bias < 0).sum()) == 1  # the reason why the rule is exact


def test_weight_rows_give_the_label_where_there_is_no_bias() -> None:
    for seed in range(100):
        (weight,), y, _ = head_gradient(seed, 1, 10, bias=False)
        assert idlg_label(weight_gradient=weight) == int(y)


def test_weight_rows_of_two_classes_give_the_label_if_features_are_positive() -> None:
    features = torch.tensor([0.2, 0.9, 0.1])
    assert idlg_label(weight_gradient=torch.stack([0.3 * features, -0.3 * features])) == 1


def test_counts_are_exact_with_the_true_mean_softmax() -> None:
    for seed in range(100):
        (_, bias), y, mean_softmax = head_gradient(seed, 9, 5)
        expected = torch.bincount(y, minlength=5)
        assert torch.equal(label_counts(bias, mean_softmax, 9), expected)


def test_counts_sum_to_the_batch_even_with_a_wrong_softmax() -> None:
    for seed in range(50):
        (_, bias), _, _ = head_gradient(seed, 7, 5)
        counts = label_counts(bias, torch.full((5,), 0.2, dtype=torch.float64), 7)
        assert int(counts.sum()) == 7
        assert int(counts.min()) >= 0


def test_rounding_gives_the_missing_example_to_the_largest_remainder() -> None:
    # raw counts 1.4, 1.3, 0.3: floors 1, 1, 0 leave one example, and 0.4 is the largest remainder
    raw = torch.tensor([1.4, 1.3, 0.3]) / 3
    assert label_counts(-raw, torch.zeros(3), 3).tolist() == [2, 1, 0]


def test_negative_counts_do_not_take_examples_from_other_classes() -> None:
    assert label_counts(torch.tensor([-1.5, 0.5]), torch.zeros(2), 4).tolist() == [4, 0]


def test_label_rules_refuse_what_they_cannot_read() -> None:
    with pytest.raises(ValueError, match="needs the head's bias or weight gradient"):
        idlg_label()
    with pytest.raises(ValueError, match=r"bias gradient \(C,\) has 1 dimension"):
        idlg_label(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="must be finite"):
        idlg_label(torch.tensor([float("nan"), 1.0]))
    with pytest.raises(ValueError, match="one entry per class"):
        label_counts(torch.zeros(3), torch.zeros(4), 2)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        label_counts(torch.zeros(3), torch.zeros(3), 0)
