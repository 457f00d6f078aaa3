"""What measures of derivatives with respect to the input share: random probes, and which models allow them.

For a matrix M and a random v with E[v v^T] = I, E[v^T M v] = tr M and E|M v|^2 = |M|_F^2, so products with
random signs measure Hessians and Jacobians that are far too large to form. M. F. Hutchinson 1990, "A
stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines".
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

MINIMUM_PROBES = 2  # one number has no standard error
_UNCERTAINTY = 1.96  # standard errors on either side of a 95 % interval


class ProbeMean(NamedTuple):
    """A mean over random probes and its standard error, both of one shape, float64.

    The standard error is that of the probes alone, for the given examples; it is itself an estimate, and a
    rough one for few probes.
    """

    mean: Tensor
    standard_error: Tensor


def probe_mean(samples: Tensor) -> ProbeMean:
    """Mean over the first dimension of (probes, ...) with the standard error of that mean.

    >>> probe_mean(torch.tensor([1.0, 3.0]))
    ProbeMean(mean=tensor(2., dtype=torch.float64), standard_error=tensor(1., dtype=torch.float64))
    """
    samples = samples.double()
    return ProbeMean(samples.mean(0), samples.std(0) / len(samples) ** 0.5)


def mean_over_examples(values: ProbeMean) -> tuple[float, float]:
    """Mean over the last dimension's B examples and its standard error: examples have probes of their own."""
    B = values.mean.shape[-1]
    return float(values.mean.mean()), float(values.standard_error.square().sum().sqrt()) / B


def interval(value: float, standard_error: float) -> tuple[float, float]:
    """The normal 95 % interval around a mean over probes."""
    return value - _UNCERTAINTY * standard_error, value + _UNCERTAINTY * standard_error


def random_signs(x: Tensor, probes: int, generator: torch.Generator) -> Tensor:
    """Independent signs +1 and -1 with equal chance: (B, probes, ...) for x (B, ...), in its dtype and place.

    They are drawn example by example, so that splitting x into chunks does not change them.
    """
    bits = torch.randint(
        2,
        (len(x), probes, *x.shape[1:]),
        generator=generator,
        dtype=torch.int32,
        device=generator.device,
    )
    return (2 * bits - 1).to(x.device, x.dtype)


def random_subset(total: int, size: int, generator: torch.Generator) -> Tensor:
    """At most `size` of `total` positions, ascending.

    >>> random_subset(3, 8, torch.Generator())
    tensor([0, 1, 2])
    """
    if total <= size:
        return torch.arange(total)
    return torch.randperm(total, generator=generator)[:size].sort().values


def check_examples(model: nn.Module, x: Tensor, y: Tensor, probes: int | None = None) -> None:
    """Raise a ValueError unless derivatives of each example's own loss by its input are defined.

    That asks for continuous inputs, as many labels as inputs, a model that treats every example by itself
    and draws nothing at random, and, if given, enough probes for a standard error.
    """
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(
            f"x and y hold the same examples, at least one, got {len(x)} and {len(y)}: match them"
        )
    if not x.is_floating_point():
        raise ValueError(
            f"a derivative by the input needs continuous inputs, got {x.dtype}: pass floating-point inputs "
            "(for tokens, their embeddings and the model that takes them)"
        )
    if probes is not None and probes < MINIMUM_PROBES:
        raise ValueError(f"probes must be at least {MINIMUM_PROBES}, got {probes}: one has no standard error")
    for name, module in model.named_modules():
        kind = f"layer {name!r} ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise ValueError(
                "an example's own derivatives are undefined where batch statistics couple the examples, got "
                f"{kind}: use GroupNorm, or eval() with running statistics"
            )
        if module.training and _draws(module):
            raise ValueError(
                f"a derivative needs a model that draws nothing at random, got {kind}: eval() it"
            )


def _draws(module: nn.Module) -> bool:
    share = getattr(module, "dropout", 0.0)  # of attention and recurrent layers
    random_layer = isinstance(module, nn.modules.dropout._DropoutNd | nn.RReLU)
    return random_layer or (isinstance(share, int | float) and share > 0)


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Inside, attention and recurrent layers use forms that can be differentiated twice, not fused kernels.

    Raises:
        ValueError: if an operation inside cannot be differentiated as asked, in place of torch's
            RuntimeError.
    """
    with ExitStack() as settings:
        settings.enter_context(sdpa_kernel(SDPBackend.MATH))
        settings.enter_context(torch.enable_grad())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            settings.enter_context(torch.backends.cudnn.flags(enabled=False))
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"the loss must be differentiable twice, also by the input, got from torch: {error}: replace "
                "the operation it names, or leave this measure out"
            ) from error


def check_differentiable_again(gradient: Tensor) -> None:
    """Raise a RuntimeError where the graph of a gradient holds an operation that is differentiable once only.

    torch itself raises only if it walks through that operation, which it skips when asked for the derivative
    by given tensors: it would return a wrong number.
    """
    waiting: list[Any] = [gradient.grad_fn]
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError(
                "an operation of the model is marked as differentiable once (once_differentiable)"
            )
        waiting += [child for child, _ in node.next_functions]
