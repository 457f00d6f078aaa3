"""Per-example gradients by Opacus' hooks, for models that write into activations too."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from fedaudit.opacus_parts import GradSampleModule, prepare_layer


class PerExampleModule(GradSampleModule):  # type: ignore[misc, unused-ignore]
    """Opacus' `GradSampleModule` with hooks on the layers' outputs instead of on the layers.

    After `loss.backward()` every trainable parameter p holds `p.grad_sample` (B, *p.shape), the
    gradients of the B examples' own losses, given a mean-reduced loss.

    A full backward hook makes a layer's output a view that may not be written into, so that
    `nn.ReLU(inplace=True)` and `out += identity` of a residual block fail. A hook on the output tensor
    has no such limit, sees the same gradient, and costs less per step.
    """

    def add_hooks(
        self, *, loss_reduction: str = "mean", batch_first: bool = True, force_functorch: bool = False
    ) -> None:
        """Record every trainable layer's inputs, and use them when its output's gradient is known."""
        handles: list[Any] = []
        for owner in (self, self._module):  # where Opacus looks for hooks to remove
            owner.__dict__["autograd_grad_sample_hooks"] = handles
        backprop: Any = partial(
            self.capture_backprops_hook, loss_reduction=loss_reduction, batch_first=batch_first
        )

        def capture(layer: nn.Module, inputs: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):  # a DPLSTM and its like: the linear layers inside are hooked
                return None
            return self.watch(layer, inputs, output, backprop)

        for layer in self.iterate_submodules(self._module):
            if force_functorch or type(layer) not in self.GRAD_SAMPLERS:
                prepare_layer(layer, batch_first=batch_first)  # type: ignore[no-untyped-call]
            handles.append(layer.register_forward_hook(capture))
        self.enable_hooks()

    def watch(self, layer: nn.Module, inputs: Any, output: Tensor, backprop: Any) -> Tensor | None:
        """See one use of a layer, and return what stands in its output's place, if anything does."""
        self.capture_activations_hook(layer, inputs, output)
        if layer.training and output.requires_grad and self.hooks_enabled:
            hook: Any = output.register_hook
            hook(lambda gradient: backprop(layer, None, (gradient,)))
        return None

    def remove_hooks(self) -> None:
        """Leave the wrapped module without a trace, also after a step that was cut short."""
        super().remove_hooks()
        for layer in self._module.modules():
            for name in ("activations", "max_batch_len"):
                layer.__dict__.pop(name, None)
