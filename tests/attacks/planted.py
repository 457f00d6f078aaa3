"""Updates with a known batch behind them: planted in float64, and sent by a client that trains in float32."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedaudit.training.local import TrainSettings, train_locally
from fedaudit.types import ClientUpdate, RoundContext

LR = 0.1
Build = Callable[[], nn.Module]


def sum_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def seeded(model: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """The model in float64 with Gaussian weights."""
    g = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(std * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return model


def examples(batch: int, shape: tuple[int, ...], classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, *shape, generator=g), torch.randint(0, classes, (batch,), generator=g)


def planted(build: Build, x: Tensor, y: Tensor, noise: float = 0.0) -> ClientUpdate:
    """One step without any rounding; noise is relative to each parameter's gradient."""
    model = build().double()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    gradient = torch.autograd.grad(F.cross_entropy(model(x.double()), y), list(model.parameters()))
    g = torch.Generator().manual_seed(9)
    delta = {}
    for (name, _), slope in zip(model.named_parameters(), gradient, strict=True):
        error = torch.randn(slope.shape, generator=g, dtype=torch.float64) * slope.square().mean().sqrt()
        delta[name] = -LR * (slope + noise * error)
    return ClientUpdate(0, 1, before, delta, len(x))


def trained(build: Build, x: Tensor, y: Tensor, steps: int = 1) -> ClientUpdate:
    """What a client of a federation sends: local SGD in float32, the batch split over the steps."""
    model = build().float()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    settings = TrainSettings(lr=LR, batch_size=-(-len(x) // steps))
    train_locally(model, x, y, list(torch.arange(len(x)).chunk(steps)), settings)
    delta = {name: value.detach() - before[name] for name, value in model.state_dict().items()}
    return ClientUpdate(0, 1, before, delta, len(x))


def context(build: Build, x: Tensor, classes: int, **changes: object) -> RoundContext:
    known = RoundContext(
        round=1,
        build_model=build,
        loss=sum_loss,
        lr=LR,
        local_steps=1,
        batch_size=len(x),
        input_shape=tuple(x.shape[1:]),
        num_classes=classes,
        seed=1,
    )
    return replace(known, **changes)  # type: ignore[arg-type]


def largest_error(found: Tensor, x: Tensor) -> float:
    """Largest deviation of each example from its nearest recovered one, the worst over examples."""
    apart = (found.flatten(1)[None].double() - x.flatten(1)[:, None].double()).abs().amax(dim=2)
    return float(apart.amin(dim=1).max())
