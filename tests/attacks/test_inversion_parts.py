"""Distances, priors and label strategies against their formulas."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedaudit.attacks.bn_prior import bn_statistics
from fedaudit.attacks.label_strategies import labels_for
from fedaudit.attacks.local_training import epoch_batches, imagined_update
from fedaudit.attacks.objectives import cosine_distance, distance_of, layer_scale, squared_distance
from fedaudit.attacks.priors import clip_penalty, epoch_disagreement, random_filters, total_variation
from fedaudit.types import RoundContext


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sum_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def test_the_cosine_distance_is_one_minus_the_cosine_and_blind_to_length() -> None:
    a, b = drawn(50), drawn(50, seed=1)
    expected = 1 - float(F.cosine_similarity(a, b, dim=0))
    assert float(cosine_distance(a, b)) == pytest.approx(expected)
    assert float(cosine_distance(7 * a, b)) == pytest.approx(expected)


def test_the_cosine_distance_resolves_what_single_precision_cancels() -> None:
    a = drawn(1000).float()
    b = a + 1e-5 * drawn(1000, seed=1).float()
    exact = 1 - float(F.cosine_similarity(a.double(), b.double(), dim=0))
    assert exact < 1e-9
    assert float(cosine_distance(a, b)) == pytest.approx(exact, rel=0.05)


def test_euclidean_distances_are_relative_so_that_a_zero_update_gets_one() -> None:
    a, b = drawn(10), drawn(10, seed=1)
    assert float(squared_distance(a, b)) == pytest.approx(float(((a - b) ** 2).sum() / (b**2).sum()))
    assert float(squared_distance(0 * b, b)) == 1.0
    layers = distance_of("layer-norms", [4, 6])
    by_hand = ((a - b)[:4].norm() + (a - b)[4:].norm()) / (b[:4].norm() + b[4:].norm())
    assert float(layers(a, b)) == pytest.approx(float(by_hand))


def test_a_layer_that_is_matched_exactly_has_a_finite_slope() -> None:
    b = drawn(10)
    a = torch.cat([b[:4], drawn(6, seed=1)]).requires_grad_()
    (slope,) = torch.autograd.grad(distance_of("layer-norms", [4, 6])(a, b), a)
    assert slope.isfinite().all()


def test_layer_weights_multiply_the_squared_distance_of_their_layer() -> None:
    a, b, sizes = drawn(10), drawn(10, seed=1), [4, 6]
    scale = layer_scale(sizes, "linear")
    assert scale is not None
    weighted = float((scale * (a - b)).square().sum())
    assert weighted == pytest.approx(float((a - b)[:4].square().sum() + (a - b)[4:].square().sum() / 2))
    assert layer_scale(sizes, "equal") is None
    exponential = layer_scale(sizes, "exponential")
    assert exponential is not None
    assert float(exponential[-1] ** 2) == pytest.approx(2.718281828**-2)


def test_total_variation_is_the_mean_absolute_difference_of_neighbours() -> None:
    x = drawn(2, 3, 4, 5)
    across = [
        abs(float(x[b, c, i, j + 1] - x[b, c, i, j]))
        for b, c, i, j in torch.cartesian_prod(
            torch.arange(2), torch.arange(3), torch.arange(4), torch.arange(4)
        ).tolist()
    ]
    down = [
        abs(float(x[b, c, i + 1, j] - x[b, c, i, j]))
        for b, c, i, j in torch.cartesian_prod(
            torch.arange(2), torch.arange(3), torch.arange(3), torch.arange(5)
        ).tolist()
    ]
    assert float(total_variation(x)) == pytest.approx(sum(across) / len(across) + sum(down) / len(down))
    assert float(total_variation(torch.full((1, 1, 4, 4), 3.0))) == 0.0
    assert float(total_variation(drawn(2, 7))) == 0.0  # no image, no neighbours


def test_rounded_total_variation_is_smooth_at_zero_and_off_by_less_than_the_rounding() -> None:
    x = drawn(2, 3, 5, 6)
    rounded, plain = float(total_variation(x, 0.1)), float(total_variation(x))
    assert plain - 0.2 < rounded < plain
    flat_image = torch.zeros(1, 1, 4, 4, requires_grad=True)
    assert float(total_variation(flat_image.detach(), 0.1)) == pytest.approx(0, abs=1e-7)
    assert bool(torch.autograd.grad(total_variation(flat_image, 0.1), flat_image)[0].isfinite().all())
    step = torch.tensor([[[[0.0, 0.3], [0.0, 0.3]]]])
    assert float(total_variation(step, 0.4)) == pytest.approx(0.5 - 0.4)


def test_the_clip_penalty_is_zero_inside_the_range_and_pulls_back_outside() -> None:
    assert float(clip_penalty(torch.tensor([0.0, 1.0]), 0.0, 1.0)) == 0.0
    x = torch.tensor([1.5, -0.5, 0.5], requires_grad=True)
    (slope,) = torch.autograd.grad(clip_penalty(x, 0.0, 1.0), x)
    assert slope[0] > 0 > slope[1]
    assert slope[2] == 0


@pytest.mark.parametrize("conv", [False, True], ids=["mean", "conv"])
def test_the_epoch_prior_ignores_order_and_sees_another_set(conv: bool) -> None:
    filters = random_filters((2, 6, 6), seed=0) if conv else None
    filters = None if filters is None else filters.double()
    x, y = drawn(4, 2, 6, 6), drawn(4, 2, 6, 6, seed=1)
    assert float(epoch_disagreement([x, x[[2, 0, 3, 1]]], filters)) < 1e-25
    found = float(epoch_disagreement([x, y, x], filters))
    features = [e if filters is None else F.conv2d(e, filters).relu() for e in (x, y, x)]
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    gaps = [(features[i].mean(0) - features[j].mean(0)).square().mean() for i, j in pairs]
    assert found == pytest.approx(float(sum(gaps)) / len(pairs))
    assert float(epoch_disagreement([x], filters)) == 0.0


def test_the_batch_norm_prior_is_zero_on_the_batch_whose_statistics_were_kept() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=1.0), nn.ReLU()).double()
    x = drawn(4, 1, 6, 6)
    model(x)  # momentum 1 keeps this batch's statistics; the variance kept is the unbiased one
    norm = model[1]
    norm.running_var *= (4 * 16 - 1) / (4 * 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prior = bn_statistics(model)
    assert prior is not None
    assert float(prior(x)) < 1e-10
    other = drawn(4, 1, 6, 6, seed=1)
    features = model[0](other).transpose(0, 1).flatten(1)
    gap = (features.mean(1) - norm.running_mean).norm() + (
        features.var(1, unbiased=False) - norm.running_var
    ).norm()
    assert float(prior(other).detach()) == pytest.approx(10 * float(gap.detach()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert bn_statistics(nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(3, 3))) is None


@pytest.mark.parametrize("vectorisable", [True, False])
@pytest.mark.parametrize("withheld", [False, True], ids=["all", "withheld"])
def test_the_imagined_update_is_what_local_training_sends(vectorisable: bool, withheld: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y, lr = drawn(5, 5), torch.tensor([0, 2, 1, 1, 0]), 0.5
    names = [name for name, _ in model.named_parameters()][2 if withheld else 0 :]
    batches = [slice(0, 2), slice(2, 4), slice(4, 5)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = imagined_update(model, sum_loss, names, batches, lr, vectorisable=vectorisable)(x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    sent = torch.cat(
        [(before[n] - p.detach()).reshape(-1) for n, p in model.named_parameters() if n in names]
    )
    torch.testing.assert_close(found.detach(), sent / (3 * lr))


def test_epochs_are_cut_into_batches_as_training_does() -> None:
    assert epoch_batches(8, 2, 4) == [[2, 2, 2, 2]]
    assert epoch_batches(3, 5, 2) == [[3], [3]]
    with pytest.raises(ValueError, match="must be positive, got 0, 2 and 1"):
        epoch_batches(0, 2, 1)


def head(seed: int, batch: int, bias: bool = True) -> tuple[nn.Module, Mapping[str, Tensor], Tensor, Tensor]:
    torch_generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4, bias=bias))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5, generator=torch_generator)
    x = torch.rand(batch, 6, generator=torch_generator)
    y = torch.randint(0, 4, (batch,), generator=torch_generator)
    slopes = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return model, dict(zip([n for n, _ in model.named_parameters()], slopes, strict=True)), x, y


@pytest.mark.parametrize("strategy", ["idlg", "counts"])
def test_the_label_of_one_example_is_exact_by_either_rule(strategy: str) -> None:
    for seed in range(20):
        model, gradient, _, y = head(seed, 1)
        ctx = RoundContext(1, input_shape=(6,), num_classes=4)
        assert torch.equal(labels_for(strategy, "", gradient, [model], 1, ctx), y)  # type: ignore[arg-type]


def test_counts_are_exact_where_reference_data_give_the_true_softmax() -> None:
    wrong = 0
    for seed in range(20):
        model, gradient, x, y = head(seed, 8)
        ctx = RoundContext(1, input_shape=(6,), num_classes=4, reference=(x, y))
        found = labels_for("counts", "", gradient, [model], 8, ctx)
        assert torch.equal(found, y.sort().values)
        noise = labels_for(
            "counts", "", gradient, [model], 8, RoundContext(1, input_shape=(6,), num_classes=4)
        )
        wrong += not torch.equal(noise, found)
    assert wrong  # an estimate from noise is not exact: the reference was used


def test_known_labels_are_read_in_order_and_joint_ones_are_left_open() -> None:
    model, gradient, _, _ = head(0, 3)
    ctx = RoundContext(1, input_shape=(6,), num_classes=4)
    found = labels_for("known", "3-1-3", gradient, [model], 3, ctx)
    assert found is not None
    assert found.tolist() == [3, 1, 3]
    assert labels_for("joint", "", gradient, [model], 3, ctx) is None


def test_label_strategies_refuse_what_they_cannot_do() -> None:
    model, gradient, _, _ = head(0, 3)
    ctx = RoundContext(1, input_shape=(6,), num_classes=4)
    for text in ("", "1-2", "1-2-9", "a-b-c"):
        with pytest.raises(ValueError, match="labels=known needs 3 labels from 0 to 3"):
            labels_for("known", text, gradient, [model], 3, ctx)
    with pytest.raises(ValueError, match="exact for one example, got a batch of 3"):
        labels_for("idlg", "", gradient, [model], 3, ctx)
    bare, slopes, _, _ = head(0, 3, bias=False)
    with pytest.raises(ValueError, match="use labels=joint"):
        labels_for("counts", "", slopes, [bare], 3, ctx)


def test_unknown_names_of_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="objective must be cosine"):
        distance_of("angle", [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer weights must be equal"):
        layer_scale([1], "quadratic")  # type: ignore[arg-type]
