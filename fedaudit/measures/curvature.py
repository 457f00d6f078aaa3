"""Input-loss curvature: the second derivative of an example's loss by the example itself.

H_i = d^2 l(f(x_i), y_i) / dx_i^2 (D x D), never formed. Three summaries of it go by the name of curvature
and are different quantities; here each has its own name:

    trace          tr H           sum of eigenvalues; may be negative
    trace squared  tr H^2         sum of squared eigenvalues
    norm           h E|H v|       about h sqrt(tr H^2), v random signs

Ravikumar, Soufleri, Hashemi, Roy 2024, "Unveiling Privacy, Memorization, and Input Curvature Links" (arXiv
2402.18726) defines the trace (eq. 7); its estimator |grad L(x + h v) - grad L(x)|^2 (eq. 14) is h^2 tr H^2
in expectation, and its reference code averages the unsquared length, the norm. Differs from [2402.18726]:
exact Hessian-vector products instead of differences of nearly equal gradients in single precision, and a
sum-reduced loss. The reference code differentiates a MEAN over a batch of B, so all its numbers carry a
factor 1/B (1/B^2 for squares) and can be compared at equal B only; divide by that to meet them.
"""

from dataclasses import dataclass
from math import expm1

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedaudit.measures.piecewise_linear import curved_module
from fedaudit.measures.probes import (
    ProbeMean,
    check_differentiable_again,
    check_examples,
    probe_mean,
    random_signs,
    twice_differentiable,
)
from fedaudit.measures.watched_calls import spans
from fedaudit.types import Loss

STEP = 1e-3  # h of the reference code
_NUMBERS = 2**22  # numbers in one block of logit gradients: 32 MB in float64


@dataclass(frozen=True, eq=False)
class HessianProbes:
    """What products H_i v with `probes` random sign vectors v say of B Hessians.

    Attributes:
        quadratic: v^T H_i v (probes, B), float64.
        squares: |H_i v|^2 (probes, B), float64.
    """

    quadratic: Tensor
    squares: Tensor

    def trace(self) -> ProbeMean:
        """tr H_i (B,): mean of v^T H v; its variance is 2 |H without diagonal|_F^2 / probes."""
        return probe_mean(self.quadratic)

    def trace_squared(self) -> ProbeMean:
        """tr H_i^2 (B,): mean of |H v|^2."""
        return probe_mean(self.squares)

    def norm(self, step: float = STEP) -> ProbeMean:
        """h E|H_i v| (B,): at most h sqrt(tr H^2), and close to it where many eigenvalues contribute."""
        return probe_mean(step * self.squares.sqrt())


def hessian_probes(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    probes: int,
    generator: torch.Generator,
    *,
    chunk: int | None = None,
) -> HessianProbes:
    """Exact products of every example's Hessian with random signs; one pass per probe serves all examples.

    Losses of different examples do not depend on each other, so a Hessian-vector product of their sum is that
    of each. Where the second derivative does not exist (the kinks of ReLU) it is taken as on one side.

    Args:
        model: any module that treats examples by themselves, in its present mode.
        loss: SUM-reduced loss (outputs, labels) -> scalar; a mean divides every number by the chunk's size.
        x: inputs (B, ...), floating point.
        y: labels (B, ...).
        probes: number of random vectors, at least 2.
        generator: source of the signs, example by example.
        chunk: examples per pass; None is all. It changes memory, not the numbers.

    Returns:
        Quadratic forms and squared lengths (probes, B).

    Raises:
        ValueError: if inputs are not continuous, x and y differ in length, there are fewer than two probes,
            or the model couples examples or draws at random.

    >>> bowl = lambda outputs, labels: outputs.square().sum()
    >>> found = hessian_probes(nn.Identity(), bowl, torch.ones(1, 3), torch.zeros(1), 2, torch.Generator())
    >>> found.trace().mean, found.trace_squared().mean
    (tensor([6.], dtype=torch.float64), tensor([12.], dtype=torch.float64))
    """
    check_examples(model, x, y, probes)
    fixed = {name: value.detach() for name, value in model.named_parameters()}
    quadratic, squares = [], []
    with twice_differentiable(model):
        for start, stop in spans(len(x), chunk):
            part = x[start:stop].detach().requires_grad_()
            value = loss(functional_call(model, fixed, (part,)), y[start:stop])
            signs = random_signs(part, probes, generator)
            rows = _products(value, part, signs)
            flat = signs.transpose(0, 1).flatten(2).double()
            quadratic.append((flat * rows).sum(2))
            squares.append(rows.square().sum(2))
    return HessianProbes(torch.cat(quadratic, 1), torch.cat(squares, 1))


def _products(value: Tensor, x: Tensor, signs: Tensor) -> Tensor:
    """H v for every probe and example (probes, b, D), float64."""
    if not value.requires_grad:  # a loss that does not depend on the input
        return torch.zeros_like(signs, dtype=torch.float64).transpose(0, 1).flatten(2)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    (gradient,) = torch.autograd.grad(value, x, create_graph=True, allow_unused=True, materialize_grads=True)
    check_differentiable_again(gradient)
    rows = []
    for v in signs.unbind(1):
        if gradient.requires_grad:
            (product,) = torch.autograd.grad(gradient, x, v, **options)
        else:  # the loss is linear in the input
            product = torch.zeros_like(x)
        rows.append(product.detach().flatten(1).double())
    return torch.stack(rows)


def trace_hessian(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, probes: int, generator: torch.Generator
) -> ProbeMean:
    """Sum of the eigenvalues of every example's input Hessian, tr H (B,), by random probes.

    Unbiased, with variance 2 |H without diagonal|_F^2 / probes: for a dense H far from zero trace it is
    noisy, and it may have either sign. Unit: that of the loss per squared unit of the input, so it depends
    on how inputs are scaled. It ranks examples; it is no probability, and no bound on what leaks.

    Args, raises: as `hessian_probes`. Source: eq. 7 and 13 of arXiv 2402.18726.

    Returns:
        Mean (B,) and standard error (B,).

    >>> cube = lambda outputs, labels: outputs.pow(3).sum()
    >>> x = torch.tensor([[1.0], [-2.0]])
    >>> trace_hessian(nn.Identity(), cube, x, torch.zeros(2), 2, torch.Generator()).mean
    tensor([  6., -12.], dtype=torch.float64)
    """
    return hessian_probes(model, loss, x, y, probes, generator).trace()


def trace_hessian_squared(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, probes: int, generator: torch.Generator
) -> ProbeMean:
    """Sum of the squared eigenvalues of every example's input Hessian, tr H^2 = E|H v|^2 (B,).

    Unbiased and never negative; not the trace, and not sensitive to the sign of curvature. Eq. 14 of arXiv
    2402.18726 is h^2 times it as h goes to 0, for a sum-reduced loss.

    Args, raises: as `hessian_probes`.

    Returns:
        Mean (B,) and standard error (B,), in the squared unit of the trace.
    """
    return hessian_probes(model, loss, x, y, probes, generator).trace_squared()


def curvature_norm(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    probes: int,
    generator: torch.Generator,
    step: float = STEP,
) -> ProbeMean:
    """The reference code's score as its step goes to 0, h E|H v| (B,), for a SUM-reduced loss.

    The least noisy of the three, and the one the published code ranks by. That code differentiates the mean
    over a batch of B examples: its score is this one divided by B.

    Args, raises: as `hessian_probes`.
        step: the factor h.

    Returns:
        Mean (B,) and standard error (B,).
    """
    return hessian_probes(model, loss, x, y, probes, generator).norm(step)


def trace_hessian_closed_form(model: nn.Module, x: Tensor, *, chunk: int | None = None) -> Tensor:
    """tr H (B,) of the cross-entropy of piecewise-linear logits z, exactly and without probes.

    tr H = sum_c p_c |dz_c/dx|^2 - |sum_c p_c dz_c/dx|^2 with p = softmax(z), summed here as the variance it
    is, so that nothing cancels where one p_c is close to 1. H is then positive semi-definite, its trace is
    also the sum of absolute eigenvalues, and no label enters: a wrong label shows only through p.

    Args:
        model: logits (B, C), known to be piecewise linear in x (see `piecewise_linear`).
        x: inputs (B, ...), floating point.
        chunk: examples per C backward passes; None lets C gradients take at most 32 MB.

    Returns:
        (B,), float64, in nats per squared unit of the input, never negative.

    Raises:
        ValueError: if a module is not known to be piecewise linear, or the outputs are not (B, C).

    >>> line = nn.Linear(1, 2, bias=False)
    >>> _ = line.weight.data.copy_(torch.tensor([[2.0], [0.0]]))
    >>> trace_hessian_closed_form(line, torch.zeros(1, 1))
    tensor([1.], dtype=torch.float64)
    """
    return closed_form_traces(model, x, chunk=chunk)[0]


def closed_form_traces(model: nn.Module, x: Tensor, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """tr H and tr H^2, each (B,), of the cross-entropy of piecewise-linear logits.

    With rows w_c = sqrt(p_c) (dz_c/dx - sum_k p_k dz_k/dx), H = W^T W, so tr H = |W|_F^2, tr H^2 =
    |W W^T|_F^2.

    Args and raises: as `trace_hessian_closed_form`.
    """
    curved = curved_module(model)
    if curved is not None:
        raise ValueError(
            f"the closed form needs logits that are piecewise linear in the input, got {curved}, which is "
            "not known to be: use trace_hessian"
        )
    check_examples(model, x, x)
    fixed = {name: value.detach() for name, value in model.named_parameters()}
    with torch.no_grad():
        shape = functional_call(model, fixed, (x[:1],)).shape
    if len(shape) != 2:
        raise ValueError(
            f"the closed form needs logits (B, C), got outputs {tuple(shape)}: use trace_hessian"
        )
    fits = max(1, _NUMBERS // (shape[1] * max(1, x[0].numel())))
    traces, squared = [], []
    with torch.enable_grad():
        for start, stop in spans(len(x), chunk or min(fits, len(x))):
            part = x[start:stop].detach().requires_grad_()
            logits = functional_call(model, fixed, (part,))
            rows = [
                torch.autograd.grad(column.sum(), part, retain_graph=True)[0].flatten(1).double()
                for column in logits.unbind(1)
            ]
            p = logits.detach().double().softmax(1)[:, :, None]
            gradients = torch.stack(rows, 1)  # (b, C, D)
            W = p.sqrt() * (gradients - (p * gradients).sum(1, keepdim=True))
            traces.append(W.square().sum((1, 2)))
            squared.append((W @ W.mT).square().sum((1, 2)))
    return torch.cat(traces), torch.cat(squared)


def memorisation_ceiling(epsilon: float) -> float:
    """Largest memorisation that example-level (epsilon, 0) differential privacy allows: 1 - exp(-epsilon).

    Memorisation of example i is Pr[h_S(x_i) = y_i] - Pr[h_without_i(x_i) = y_i] over the randomness of
    training (Feldman 2020, arXiv 1906.05271): what having trained on i adds to the chance of classifying i
    rightly. Theorem 5.4 of arXiv 2402.18726. At delta > 0 the theorem holds with probability 1 - delta; a
    ceiling that always holds is larger by delta exp(-epsilon).

    It says nothing of other meanings of memorising: extraction of training text, membership inference,
    reconstruction, or attributes. It is a limit by the guarantee, not a measurement, and close to 1, hence
    empty, from epsilon of about 5.

    Raises:
        ValueError: if epsilon is negative or not a number.

    >>> memorisation_ceiling(0.0), round(memorisation_ceiling(1.0), 4)
    (0.0, 0.6321)
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon is at least 0, got {epsilon}: pass the guarantee's epsilon")
    return -expm1(-epsilon)
