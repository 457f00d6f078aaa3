"""The imprint module of "Robbing the Fed": an ACTIVE attack, in which the server changes the model.

Nothing here is honest but curious: a server that does it breaks the protocol, and a client that looks at the
model's first layer can see it. Use it to learn what a dishonest server could take.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedaudit.attacks.linear_layer import explain, outside
from fedaudit.attacks.replay import (
    Intercepted,
    Mode,
    gradient_residual,
    intercept,
    labels_by_slopes,
    obstacle_of,
    rounding,
)
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Reconstruction, RoundContext

_SIGMAS = 6.0


class ImprintBlock(nn.Module):
    """Adds to the input (B, *input_shape) a pattern times the mean of K units that switch on one by one.

    Unit k is relu(<h, x> - c_k) with the same h and rising thresholds c_k, and all units have the same
    influence on the output. So an example gives all units it switches on the same gradient, and the
    difference of neighbouring units' gradients holds the examples between their thresholds alone.

    Differs from Fowl et al.: the units go out through a fixed pattern added to the input, in place of a
    second linear layer, so that their influence stays equal over local steps; and `gain` makes weights small
    and the way out large, which leaves the function as it is and lifts the gradient above the weights'
    rounding.

    Args:
        direction: h (N,), of the flat input.
        thresholds: c (K,), rising.
        pattern: what is added to the flat input (N,).
        gain: weights and thresholds are divided by it, the output multiplied.
    """

    pattern: Tensor

    def __init__(self, direction: Tensor, thresholds: Tensor, pattern: Tensor, gain: float) -> None:
        super().__init__()
        self.units = nn.utils.skip_init(nn.Linear, len(direction), len(thresholds))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.units.weight.copy_(direction.expand(len(thresholds), -1) / gain)
            self.units.bias.copy_(-thresholds / gain)
        self.register_buffer("pattern", pattern * gain)

    def forward(self, x: Tensor) -> Tensor:
        """The input with its imprint added, in the input's shape."""
        flat = x.flatten(1)
        push: Tensor = self.units(flat).relu().mean(dim=1, keepdim=True)
        return (flat + push * self.pattern).reshape(x.shape)


def thresholds(bins: int, statistic: Tensor | None = None, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Lower ends (K,) of K bins of equal probability for a scalar statistic of the inputs.

    Quantiles of the statistic (n,) where one is given, of a Gaussian otherwise. The lowest end lies below all
    values to be expected, so that no example escapes.

    Raises:
        ValueError: if there is no bin, no value or no spread.

    >>> thresholds(2, torch.tensor([0.0, 1.0, 2.0])).tolist()
    [-4.0, 1.0]
    """
    spread = std if statistic is None else float(statistic.max() - statistic.min()) if len(statistic) else 0.0
    if bins < 1 or not spread > 0:
        raise ValueError(f"thresholds need bins >= 1 and a spread > 0, got {bins} and {spread}: state both")
    shares = torch.arange(bins, dtype=torch.float64) / bins
    if statistic is None:
        ends: Tensor = mean + std * torch.special.ndtri(shares)
        ends[0] = mean - 8 * std
    else:
        ends = torch.quantile(statistic.to(torch.float64), shares)
        ends[0] -= 2 * spread
    return ends


def imprint(
    model: nn.Module,
    input_shape: tuple[int, ...],
    bins: int,
    generator: torch.Generator,
    *,
    reference: Tensor | None = None,
    mean: float = 0.5,
    std: float = 0.15,
    strength: float = 1.0,
    gain: float = 100.0,
) -> nn.Sequential:
    """ACTIVE: the model behind an imprint block of K bins; parameters "imprint.units.*" and "model.*".

    The statistic is the mean of an input's values, and the pattern is random signs.

    Source: Fowl, Geiping, Czaja, Goldblum, Goldstein 2021, arXiv 2110.13057. `ImprintBlock` says what
    differs.

    Args:
        model: takes inputs (B, *input_shape); used, not copied.
        input_shape: shape of one example.
        bins: K.
        generator: draws the pattern.
        reference: inputs of the same kind (n, *input_shape) whose statistic sets the bins.
        mean: mean of the statistic, where there is no reference.
        std: its standard deviation over examples, where there is no reference.
        strength: size of the pattern; the larger, the further the gradient above rounding and noise.
        gain: see `ImprintBlock`.

    Raises:
        ValueError: if a number is out of range.
    """
    if not strength > 0 or not gain > 0:
        raise ValueError(f"strength and gain must be positive, got {strength} and {gain}: use e.g. 1 and 100")
    size = int(torch.Size(input_shape).numel())
    statistic = None if reference is None else reference.flatten(1).to(torch.float64).mean(dim=1)
    ends = thresholds(bins, statistic, mean=mean, std=std)
    signs = 2.0 * torch.randint(0, 2, (size,), generator=generator) - 1.0
    block = ImprintBlock(torch.full((size,), 1.0 / size), ends, strength * signs, gain)
    return nn.Sequential(OrderedDict([("imprint", block), ("model", model)]))


def recover_imprinted(
    weight_gradient: Tensor, bias_gradient: Tensor, floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The inputs (R, N) that sit in the bins of an imprint, and the bins they were found in (R,).

    Row k of the units' gradient sums d_n [x_n, 1] over the examples above threshold k, so that the
    difference of rows k and k + 1 is the sum over bin k, and its ratio is exact where one example is in it. A
    bin with several examples gives a mixture of them, which looks like any other result.

    Args:
        weight_gradient: of the units' weight (K, N).
        bias_gradient: of the units' bias (K,).
        floor: differences of bias gradients up to this count as empty bins.
    """
    below = torch.cat([bias_gradient[1:], bias_gradient.new_zeros(1)])
    below_weight = torch.cat([weight_gradient[1:], weight_gradient.new_zeros(1, weight_gradient.shape[1])])
    slopes = bias_gradient - below
    bins = (slopes.abs() > floor).nonzero()[:, 0]
    return (weight_gradient - below_weight)[bins] / slopes[bins, None], bins


def expected_recoveries(bins: int, batch: int) -> float:
    """Expected number of examples that are alone in their bin: n (1 - 1/K)^(n - 1).

    For n independent examples and K equally likely bins. Each of them is recovered up to rounding. Real bins
    are not equally likely, which lowers it.

    Raises:
        ValueError: if a number is not positive.

    >>> round(expected_recoveries(128, 64), 2)
    39.05
    """
    if bins < 1 or batch < 1:
        raise ValueError(f"bins and batch must be positive, got {bins} and {batch}: use 1 or more")
    return float(batch * (1 - 1 / bins) ** (batch - 1))


@dataclass(frozen=True)
class Imprint:
    """ACTIVE: reads the examples out of a model that the server had put an `ImprintBlock` into.

    Applies only where the federation's model is one built with `imprint`; it changes no model itself. Returns
    at most B candidates, those in the value range first; "bins-hit" says how many bins were occupied, which
    is at most the number of examples, and equal to it if no two met. One local step is assumed: later steps
    start from units that have moved apart.

    Source: as `imprint`.

    Attributes:
        mode: "train" or "eval": how normalisation layers ran in the client; dropout is always off.
    """

    mode: Mode = "train"

    name = "imprint"
    needs = Needs.MODEL | Needs.TRAINING | Needs.SHAPE
    active: ClassVar[bool] = True

    def obstacle(self, update: ClientUpdate, ctx: RoundContext) -> str:
        """Why this model cannot have been imprinted; empty if it is."""
        return obstacle_of(lambda: self._units(intercept(self.name, update, ctx, self.mode)))

    def _units(self, seen: Intercepted) -> str:
        """Name of the imprint's layer."""
        names = [name for name, module in seen.model.named_modules() if isinstance(module, ImprintBlock)]
        if not names:
            raise ValueError(
                "imprint is an active attack: it needs a model built with imprint(), got another"
            )
        return f"{names[0]}.units" if names[0] else "units"

    def reconstruct(self, update: ClientUpdate, ctx: RoundContext) -> Reconstruction:
        """At most B candidates (R, *input_shape), those in the value range first.

        Raises:
            ValueError: if the model has no imprint block, or all its bins are empty.
        """
        seen = intercept(self.name, update, ctx, self.mode)
        name = self._units(seen)
        weight, bias = seen.of(name)
        floor = _SIGMAS * 2**0.5 * rounding(update, ctx, f"{name}.bias")
        flat, bins = recover_imprinted(weight, bias, floor)
        if not len(flat):
            raise ValueError(
                "no bin of the imprint stands above rounding: the client's gradient is too small"
            )
        order = outside(flat, ctx.value_range).argsort(stable=True)[: seen.examples]
        slopes, objective = explain(weight, bias, flat[order])
        x = flat[order].reshape(len(order), *seen.seen.x.shape[1:])
        y = labels_by_slopes(seen, name, x, slopes * seen.examples)
        steps = ctx.steps(update) or 1
        conditions: dict[str, float | int | str | bool] = {
            "active": True,
            "labels": "estimated",
            "batch-size": seen.examples,
            "local-steps": steps,
            "batchnorm-mode": self.mode,
            "bins": len(bias),
            "bins-hit": len(bins),
            "expected-recoveries": expected_recoveries(len(bias), seen.examples),
            "relative-objective": gradient_residual(seen, x, y),
        }
        if steps > 1:
            conditions["warning"] = "the units moved apart between local steps: not expected to work"
        return Reconstruction(x.cpu().to(torch.float32), y.cpu(), objective, 0, conditions)
