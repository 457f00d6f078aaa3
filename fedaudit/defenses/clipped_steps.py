"""The private step beyond Opacus' flat one: clipped per tensor, from ghost norms, or with secure noise."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedaudit.defenses.ghost_clipping import GhostModule, Rows, Share
from fedaudit.defenses.secure_noise import secure_gaussian
from fedaudit.maths.example_clipping import tensor_clip_norm
from fedaudit.opacus_parts import DPOptimizer

_TINY = 1e-6  # as in Opacus: a clipped gradient is a hair shorter than C, and zero needs no special case


def clip_factors(norms: Tensor, clip_norm: float, *, per_layer: bool) -> Tensor:
    """What each example's part of each tensor is multiplied by: (B, L), at most 1.

    Flat: C / (norm over all tensors). Per layer: (C / sqrt(L)) / (norm of the tensor's part).

    Args:
        norms: (B, L) of B examples' parts of L tensors.
        clip_norm: C, over all tensors together.
        per_layer: whether each tensor is clipped by itself.

    >>> clip_factors(torch.tensor([[3.0, 4.0]]), 2.5, per_layer=False).round(decimals=4)
    tensor([[0.5000, 0.5000]])
    """
    if per_layer:
        return (tensor_clip_norm(clip_norm, norms.shape[1]) / (norms + _TINY)).clamp(max=1.0)
    whole: Tensor = torch.linalg.vector_norm(norms, dim=1, keepdim=True)
    return (clip_norm / (whole + _TINY)).clamp(max=1.0).expand_as(norms)


class ClippedSteps(DPOptimizer):  # type: ignore[misc, unused-ignore]
    """Opacus' optimizer with another way to clip, another source of gradients, or another noise.

    The sum of clipped gradients moves by at most C when one example comes or goes, whatever the options, and
    its noise has the standard deviation noise_multiplier C on every coordinate.

    Args:
        optimizer: takes the step.
        per_layer: clip each parameter tensor by itself.
        ghosts: the module that watches the model; None reads `grad_sample` of each parameter.
        secure: noise from the operating system instead of a generator.
        options: of `DPOptimizer`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        per_layer: bool = False,
        ghosts: GhostModule | None = None,
        secure: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(optimizer, **options)
        self.per_layer, self.ghosts, self.secure = per_layer, ghosts, secure

    def clip_and_accumulate(self) -> None:
        """Sum the clipped gradients of the batch into `summed_grad`."""
        parameters: list[nn.Parameter] = self.params
        shares, scale = self._shares(parameters)
        if self.per_layer:
            norms = torch.stack([share.norms() for share in shares], dim=1) * scale
            factors = (clip_factors(norms, self.max_grad_norm, per_layer=True) * scale).unbind(1)
            sums = [share.weighted(factor) for share, factor in zip(shares, factors, strict=True)]
        else:
            sums = self._clipped_flat(shares, scale)
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.summed_grad = total.reshape(parameter.shape)  # type: ignore[attr-defined]
            parameter.grad_sample = None  # type: ignore[attr-defined]  # no gradient is used twice
        if self.ghosts is not None:
            self.ghosts.calls.clear()

    def _clipped_flat(self, shares: list[Share], scale: int) -> list[Tensor]:
        """The sums of all shares under one factor per example; small ones are handled as one."""
        small = [share for share in shares if isinstance(share, Rows) and share.small]
        parts: list[Share] = [share for share in shares if not (isinstance(share, Rows) and share.small)]
        if small:
            parts.append(Rows(torch.cat([share.flat() for share in small], dim=1)))
        norms = torch.stack([part.norms() for part in parts], dim=1) * scale
        factor = clip_factors(norms, self.max_grad_norm, per_layer=False)[:, 0] * scale
        sums = [part.weighted(factor) for part in parts]
        pieces = iter(torch.split(sums.pop(), [s.flat().shape[1] for s in small]) if small else ())
        rest = iter(sums)
        return [next(pieces if isinstance(share, Rows) and share.small else rest) for share in shares]

    def _shares(self, parameters: list[nn.Parameter]) -> tuple[list[Share], int]:
        """What the batch contributes to each parameter, and what that has to be multiplied by."""
        held = [getattr(parameter, "grad_sample", None) for parameter in parameters]
        if self.ghosts is not None and any(gradients is None for gradients in held):
            return self.ghosts.shares(parameters)
        if any(not isinstance(gradients, Tensor) for gradients in held):
            raise ValueError(
                "a private step takes one backward pass, got none or several since the last step: "
                "call zero_grad, one backward pass, then step"
            )
        return [Rows(gradients) for gradients in held if gradients is not None], 1

    def add_noise(self) -> None:
        """Noise every sum; the secure kind is drawn on the CPU in float64."""
        std = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            total: Tensor = parameter.__dict__["summed_grad"]
            if self.secure:
                noise = secure_gaussian(total.shape, std).to(total.device)
                parameter.grad = (total.double() + noise).to(parameter.dtype)
            elif std:  # the numbers that Opacus would draw
                noise = torch.empty_like(total, memory_format=torch.contiguous_format)
                parameter.grad = noise.normal_(0, std, generator=self.generator).add_(total)
            else:
                parameter.grad = total

    def pre_step(self, closure: Any = None) -> bool:
        """Clip, sum, noise and divide."""
        self.clip_and_accumulate()
        self.add_noise()
        gradients = [parameter.grad for parameter in self.params if parameter.grad is not None]
        torch._foreach_div_(gradients, float(self.expected_batch_size or 1))
        return True

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Forget the batch."""
        super().zero_grad(set_to_none)
        if self.ghosts is not None:
            self.ghosts.calls.clear()
