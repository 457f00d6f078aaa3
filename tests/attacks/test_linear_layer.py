import pytest
import torch
from torch import nn

from fedaudit.attacks.linear_layer import LinearLayer, explain, invert_linear, outside, row_ratios
from fedaudit.attacks.scores import score
from fedaudit.data.embedded import digits
from fedaudit.models.build import build_model
from tests.attacks.planted import context, examples, largest_error, planted, seeded, trained

SHAPE, CLASSES = (1, 5, 5), 4


def relu_net(classes: int = CLASSES) -> nn.Module:
    return seeded(nn.Sequential(nn.Flatten(), nn.Linear(25, 128), nn.ReLU(), nn.Linear(128, classes)))


def smooth_net() -> nn.Module:
    return seeded(nn.Sequential(nn.Flatten(), nn.Linear(25, 64), nn.Tanh(), nn.Linear(64, CLASSES)))


@pytest.mark.parametrize("build", [relu_net, smooth_net])
def test_the_input_of_a_single_example_is_exact_whatever_lies_behind(build: object) -> None:
    x, y = examples(1, SHAPE, CLASSES)
    found = LinearLayer().reconstruct(planted(build, x, y), context(build, x, CLASSES))  # type: ignore[arg-type]
    assert largest_error(found.x, x) < 1e-6  # float32 of the reconstruction
    assert found.objective < 1e-25
    assert float(found.conditions["relative-objective"]) < 1e-25
    assert found.y.tolist() == y.tolist()


def test_all_rows_count_so_that_errors_average_out() -> None:
    g = torch.Generator().manual_seed(0)
    d, x = torch.randn(400, generator=g), torch.rand(30, generator=g)
    errors = 0.01 * torch.randn(400, 30, generator=g)
    every = (invert_linear(torch.outer(d, x) + errors, d) - x).norm()
    best = int(d.abs().argmax())
    single = ((torch.outer(d, x) + errors)[best] / d[best] - x).norm()
    # error of the least-squares solution: sigma sqrt(N) / |d|, of one row sigma sqrt(N) / |d_i|
    assert float(every) == pytest.approx(0.01 * 30**0.5 / float(d.norm()), rel=0.4)
    assert float(every) < float(single) / 3


def test_examples_that_reach_a_unit_alone_are_read_off_a_batch() -> None:
    x, y = examples(4, SHAPE, CLASSES)
    found = LinearLayer().reconstruct(planted(relu_net, x, y), context(relu_net, x, CLASSES))
    assert largest_error(found.x, x) < 1e-6
    assert found.conditions["confirmed"] == 4
    assert found.objective < 1e-20
    assert sorted(found.y.tolist()) == sorted(y.tolist())


def test_rows_are_grouped_by_the_example_they_share() -> None:
    x = torch.tensor([[0.1, 0.9], [0.8, 0.3]], dtype=torch.float64)
    d = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [-0.5, 0.0], [0.0, 0.0]]).double()
    found = row_ratios(d @ x, d.sum(dim=1))
    assert found.rows.tolist() == [3, 1, 1]
    assert torch.allclose(found.ratios[0], x[0])
    assert found.members.tolist() == [0, 0, 1, 2, 0, -1]
    assert torch.allclose(found.ratios[2], x.mean(dim=0))  # one row: an example or a mixture, nobody can tell


def test_with_two_classes_rows_of_the_same_mixture_agree_too() -> None:
    """The limit that `row_ratios` states."""
    x, y = examples(2, SHAPE, 2)
    y = torch.tensor([0, 1])
    update = planted(lambda: relu_net(2), x, y)
    groups = row_ratios(update.delta["1.weight"], update.delta["1.bias"])
    several = groups.ratios[groups.rows > 1]
    apart = (several[:, None] - x.flatten(1).double()).abs().amax(dim=2).amin(dim=1)
    assert len(several) == 3
    assert int((apart > 0.01).sum()) == 1


def test_smooth_activations_hide_a_batch_and_nothing_is_confirmed() -> None:
    x, y = examples(4, SHAPE, CLASSES)
    found = LinearLayer().reconstruct(planted(smooth_net, x, y), context(smooth_net, x, CLASSES))
    assert found.conditions["confirmed"] == 0
    assert score(found.x, found.y, x, y)["psnr"] < 25


@pytest.mark.parametrize("batch", [1, 3])
def test_strong_noise_defeats_the_attack_and_its_objective_says_so(batch: int) -> None:
    x, y = examples(batch, SHAPE, CLASSES)
    update = planted(relu_net, x, y, noise=3.0)
    found = LinearLayer().reconstruct(update, context(relu_net, x, CLASSES))
    assert found.objective > 0.1
    assert score(found.x, found.y, x, y)["psnr"] < 15


@pytest.mark.parametrize(("batch", "precision"), [(1, 1e-6), (2, 1e-5)])
def test_a_client_that_trains_in_float32_is_read_up_to_rounding(batch: int, precision: float) -> None:
    data = digits()
    x, y = data.x[10 : 10 + batch], data.y[10 : 10 + batch]

    def build() -> nn.Module:
        return build_model("mlp(hidden=128)", (1, 8, 8), 10, seed=0)

    found = LinearLayer().reconstruct(trained(build, x, y), context(build, x, 10))
    assert largest_error(found.x, x) < precision
    assert found.y.sort().values.tolist() == y.sort().values.tolist()


def test_local_steps_are_reported_and_warned_about() -> None:
    x, y = examples(4, SHAPE, CLASSES)
    update = trained(relu_net, x, y, steps=2)
    ctx = context(lambda: relu_net().float(), x, CLASSES, local_steps=2, batch_size=2)
    found = LinearLayer(mode="eval").reconstruct(update, ctx)
    assert found.conditions["local-steps"] == 2
    assert found.conditions["batch-size"] == 4
    assert found.conditions["batchnorm-mode"] == "eval"
    assert "approximate" in str(found.conditions["warning"])


def test_slopes_explain_what_the_inputs_span() -> None:
    x, d = torch.rand(2, 6).double(), torch.rand(2, 9).double()
    slopes, rest = explain(d.T @ x, d.sum(dim=0), x)
    assert torch.allclose(slopes, d)
    assert rest < 1e-25
    assert explain(d.T @ x, d.sum(dim=0), x[:1])[1] > 1e-3
    assert outside(torch.tensor([[0.0, 1.5], [0.2, 0.3]]), (0.0, 1.0)).tolist() == [0.5, 0.0]


def test_what_cannot_be_inverted_is_answered_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="must not be zero, got zero"):
        invert_linear(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"\(M, N\) with a bias of \(M,\), got \(2, 3\) and \(3,\)"):
        invert_linear(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="must be finite"):
        row_ratios(torch.full((2, 3), torch.nan), torch.ones(2))
    with pytest.raises(ValueError, match="no row of the layer's gradient stands above its noise"):
        row_ratios(torch.rand(2, 3), torch.rand(2), bias_noise=10.0)
