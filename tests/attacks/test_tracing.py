import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedaudit.attacks.tracing import trace

X = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))


class Functional(nn.Module):
    """A first layer whose ReLU is a function, with a second use of its output on request."""

    def __init__(self, reuse: bool) -> None:
        super().__init__()
        self.first = nn.Linear(9, 4)
        self.last = nn.Linear(4, 2)
        self.reuse = reuse

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x.flatten(1))
        h = F.relu(z)
        return self.last(h + z if self.reuse else h)


class Permuted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x.transpose(2, 3).flatten(1))


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True)], ids=["copy", "in-place"])
def test_a_relu_module_behind_the_first_layer_is_seen(relu: nn.Module) -> None:
    found = trace(nn.Sequential(nn.Flatten(), nn.Linear(9, 4), relu, nn.Linear(4, 2)), X)
    layer = found.first_linear("test")
    assert (layer.name, found.feeds_relu_only(layer)) == ("1", True)


@pytest.mark.parametrize("reuse", [False, True])
def test_a_functional_relu_counts_unless_the_output_goes_elsewhere_too(reuse: bool) -> None:
    found = trace(Functional(reuse), X)
    assert found.feeds_relu_only(found.first_linear("test")) is not reuse


@pytest.mark.parametrize(
    "after", [nn.Tanh(), nn.LeakyReLU(0.1), nn.Identity()], ids=lambda m: type(m).__name__
)
def test_another_function_behind_the_first_layer_is_no_relu(after: nn.Module) -> None:
    found = trace(nn.Sequential(nn.Flatten(), nn.Linear(9, 4), after, nn.Linear(4, 2)), X)
    assert not found.feeds_relu_only(found.first_linear("test"))


def test_a_head_alone_feeds_no_relu() -> None:
    found = trace(nn.Sequential(nn.Flatten(), nn.Linear(9, 4)), X)
    assert not found.feeds_relu_only(found.first_linear("test"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2)), r"got '0' \(Conv2d\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(9, 4, bias=False)), r"got '1' \(Linear\) without a bias"),
        (nn.Sequential(nn.AvgPool2d(3), nn.Flatten(), nn.Linear(1, 4)), r"'2' \(Linear\) on something else"),
        (Permuted(), r"'first' \(Linear\) on something else of shape \(2, 9\)"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "needs a trainable layer, got none"),
    ],
    ids=["conv", "no-bias", "pooled", "permuted", "nothing"],
)
def test_other_first_layers_are_refused_by_name(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(model, X).first_linear("test")


def test_a_trace_leaves_no_hook_behind() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    trace(model, X)
    assert not any(module._forward_hooks for module in model.modules())
