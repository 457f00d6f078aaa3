import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedaudit.attacks.conv_layer import RGAP, layer_matrices, solve
from fedaudit.attacks.scores import score
from fedaudit.data.embedded import digits
from tests.attacks.planted import context, examples, largest_error, planted, seeded, trained

SHAPE, CLASSES = (1, 6, 6), 5
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky": lambda: nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def network(activation: str, bias: bool = True, side: int = 6, classes: int = CLASSES) -> nn.Module:
    made = ACTIVATIONS[activation]
    return seeded(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=bias),
            made(),
            nn.Conv2d(4, 8, 3, padding=1, stride=2, bias=bias),
            made(),
            nn.Flatten(),
            nn.Dropout(0.0),
            nn.Linear(8 * (side // 2) ** 2, classes, bias=bias),
        )
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_planted_example_is_recovered_through_two_convolutions(activation: str, bias: bool) -> None:
    def build() -> nn.Module:
        return network(activation, bias)

    x, y = examples(1, SHAPE, CLASSES, seed=2)
    found = RGAP().reconstruct(planted(build, x, y), context(build, x, CLASSES))
    assert largest_error(found.x, x) < 1e-6  # float32 of the reconstruction
    assert found.objective < 1e-20
    assert found.y.tolist() == y.tolist()
    assert found.conditions["uniquely-invertible"] is True
    assert found.conditions["ranks"] == "0: 36 of 36; 2: 144 of 144"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_client_that_trains_in_float32_is_read_up_to_the_error_it_states(activation: str) -> None:
    data = digits()

    def build() -> nn.Module:
        return network(activation, side=8, classes=10).float()

    x, y = data.x[4:5], data.y[4:5]
    found = RGAP().reconstruct(trained(build, x, y), context(build, x, 10))
    assert score(found.x, found.y, x, y)["psnr"] > 80
    assert float((found.x - x).square().mean().sqrt()) < 6 * float(found.conditions["expected-error"])
    assert found.y.tolist() == y.tolist()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strong_noise_defeats_the_recursion_and_its_objective_says_so(activation: str) -> None:
    def build() -> nn.Module:
        return network(activation)

    x, y = examples(1, SHAPE, CLASSES)
    found = RGAP().reconstruct(planted(build, x, y, noise=1.0), context(build, x, CLASSES))
    assert found.objective > 0.05
    assert score(found.x, found.y, x, y)["psnr"] < 15
    assert float(found.conditions["expected-error"]) > 0.05


def test_too_few_weights_make_a_layer_not_uniquely_invertible_and_it_says_so() -> None:
    """One 3x3 filter of stride 3: 4 outputs and 9 weights for 36 pixels, less <W, dW> = <slopes, W x>."""

    def build() -> nn.Module:
        return seeded(
            nn.Sequential(nn.Conv2d(1, 1, 3, stride=3), nn.Tanh(), nn.Flatten(), nn.Linear(4, CLASSES))
        )

    x, y = examples(1, SHAPE, CLASSES)
    found = RGAP().reconstruct(planted(build, x, y), context(build, x, CLASSES))
    assert found.conditions["uniquely-invertible"] is False
    assert found.conditions["ranks"] == "0: 12 of 36"
    assert "not uniquely invertible" in str(found.conditions["warning"])
    assert found.objective < 1e-15  # it explains the update
    assert largest_error(found.x, x) > 0.1  # and yet is not the input
    assert float(found.conditions["expected-error"]) == pytest.approx(0.5 * math.sqrt(24 / 36), rel=0.01)


def test_fully_connected_chains_are_inverted_too() -> None:
    def build() -> nn.Module:
        return seeded(
            nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.Sigmoid(), nn.Linear(20, CLASSES, bias=False))
        )

    x, y = examples(1, SHAPE, CLASSES)
    found = RGAP().reconstruct(planted(build, x, y), context(build, x, CLASSES))
    assert largest_error(found.x, x) < 1e-6


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 2, 2)])
def test_the_two_matrices_of_a_convolution_are_its_output_and_its_weight_gradient(
    stride: int, padding: int, dilation: int
) -> None:
    g = torch.Generator().manual_seed(0)
    layer = seeded(nn.Conv2d(2, 3, 3, stride, padding, dilation, bias=False))
    x = torch.rand(1, 2, 7, 6, generator=g, dtype=torch.float64)
    output = layer(x)
    slopes = torch.randn(output.shape, generator=g, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((output * slopes).sum(), list(layer.parameters()))
    A, K = layer_matrices(layer, (2, 7, 6), slopes[0])
    assert torch.allclose(A @ x.flatten(), output.detach().flatten())
    assert torch.allclose(K @ x.flatten(), gradient.flatten())


def test_a_solution_is_the_posterior_mean_with_its_spread_and_rank() -> None:
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 5, generator=g, dtype=torch.float64)
    right = torch.randn(3, generator=g, dtype=torch.float64)
    found = solve(1e5 * matrix, 1e5 * right, middle=0.5, width=0.2)
    # the point closest to the middle on the plane, and a spread of the prior's in the two open directions
    inverse = torch.linalg.pinv(matrix)
    assert torch.allclose(found.x, 0.5 + inverse @ (right - matrix.sum(dim=1) * 0.5), atol=1e-6)
    spread = 0.2 * (torch.eye(5, dtype=torch.float64) - inverse @ matrix).diagonal().sqrt()
    assert torch.allclose(found.error, spread, atol=1e-6)
    assert (found.rank, found.misfit) == (3, 1.0)


def test_equations_that_disagree_are_trusted_less() -> None:
    matrix: Tensor = torch.ones(4, 1, dtype=torch.float64)
    found = solve(matrix, torch.tensor([9.0, -9.0, 9.0, -9.0], dtype=torch.float64), 0.0, 1e3)
    assert found.misfit == pytest.approx(math.sqrt(4 * 81 / 3), rel=1e-6)
    assert float(found.error) == pytest.approx(found.misfit / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)], r"got '1' \(ReLU\)"),
        ([nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 5)], r"got '1' \(BatchNorm2d\)"),
        ([nn.AvgPool2d(2), nn.Flatten(), nn.Linear(9, 5)], r"got '0' \(AvgPool2d\)"),
        ([nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 5)], "no activation between '0'"),
        ([nn.Conv2d(1, 5, 6), nn.Sigmoid(), nn.Flatten()], "a Linear layer last"),
        ([nn.Conv2d(1, 5, 6), nn.Flatten()], r"a Linear layer last, got '0' \(Conv2d\)"),
        (
            [nn.Conv2d(1, 2, 3, padding="same"), nn.Tanh(), nn.Flatten(), nn.Linear(72, 5)],
            "needs convolutions of one group",
        ),
    ],
    ids=["relu", "batch-norm", "pool", "no-activation", "activation-last", "conv-last", "padding"],
)
def test_other_networks_are_refused_by_the_part_that_does_not_fit(
    layers: list[nn.Module], message: str
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(*layers).double()

    x, y = examples(1, SHAPE, CLASSES)
    with pytest.raises(ValueError, match=message):
        RGAP().reconstruct(planted(build, x, y), context(build, x, CLASSES))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 36), nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return self.last(torch.sigmoid(self.first(flat)) + flat)


def test_operations_between_the_layers_and_batches_are_refused() -> None:
    x, y = examples(1, SHAPE, CLASSES)
    with pytest.raises(ValueError, match=r"got other operations before 'first' \(Linear\)"):
        RGAP().reconstruct(planted(Residual, x, y), context(Residual, x, CLASSES))

    def build() -> nn.Module:
        return network("tanh")

    x, y = examples(2, SHAPE, CLASSES)
    with pytest.raises(ValueError, match="inverts a single example, got 2"):
        RGAP().reconstruct(planted(build, x, y), context(build, x, CLASSES))
