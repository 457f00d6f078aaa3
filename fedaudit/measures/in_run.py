"""The Gram matrix of per-example gradients from a training step's own forward and backward pass."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from fedaudit.measures.batch_layout import Layout, find_layouts, is_coupled, most_different
from fedaudit.measures.ghost_kernels import trainable_parameters
from fedaudit.measures.gram_shares import Use, add_share, uses_by_parameter
from fedaudit.measures.watched_calls import (
    NORMS,
    SIGNATURES,
    Call,
    arguments,
    buffer_copies,
    call_of,
    normalised,
    random_state_kept,
    uses_in_graph,
)

Hear = Callable[[Call, dict[str, Any], Tensor], None]


class _Listening(TorchFunctionMode):
    """Tells `hear` of every call that uses one of `names` (by identity), its arguments and its output."""

    def __init__(self, names: Mapping[int, str], hear: Hear) -> None:
        super().__init__()
        self.names, self.hear = names, hear

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in SIGNATURES and torch.is_grad_enabled():
            options = arguments(func, args, kwargs)
            weight, bias = (self.names.get(id(options.get(role))) for role in ("weight", "bias"))
            if weight is not None or bias is not None:
                self.hear(call_of(func, options, weight, bias, output), options, output)
        return output


@dataclass(frozen=True)
class _Expected:
    """A watched call of two examples, and where they may be in its input."""

    call: Call
    layouts: Sequence[Layout]

    def layout(self, call: Call, batch: int) -> Layout | None:
        """Where examples are in `call`, if that is this call for a whole batch and there is one answer."""
        found = []
        for layout in self.layouts:
            shape = list(self.call.shape)
            shape[layout.dim] = layout.places * batch
            if replace(self.call, shape=torch.Size(shape), options=call.options) == call:
                found.append(layout)
        return found[0] if len(found) == 1 else None


@dataclass
class _Heard:
    """A watched call of the batch: first its arguments, then its use, once counted neither."""

    call: Call
    options: dict[str, Any]
    layout: Layout | None  # None for a single example
    use: Use | None = None
    came: bool = False

    def receive(self, signal: Tensor) -> None:
        """Make inputs and signals a use, example by example."""
        inputs = self.options["input"].detach()
        if self.call.function in NORMS:
            inputs = normalised(self.call.function, self.options | {"input": inputs})
        inputs, signal = (
            t[None] if self.layout is None else self.layout.by_example(t) for t in (inputs, signal)
        )
        self.use = Use(replace(self.call, shape=signal.shape[1:]), inputs, signal)
        self.options, self.came = {}, True


class InRunGram:
    """Inner products of the per-example gradients of a training step, from the step's own passes.

    Within the context, one call of the model and one backward pass are watched: inputs and output gradients
    of its linear, convolution, embedding and norm calls. Nothing is computed twice and nothing is added to
    the step: the gradients the optimizer sees are bit for bit those without the context.

    K_ab = <g_a, g_b>, g_i the gradient of example i's share of a loss that sums (or averages) over the
    examples and depends on the parameters through the model's outputs alone. A loss that couples examples
    (contrastive ones do) has no such shares, and nothing here can see that. Differs from `example_gram`: the
    masks of dropout are those of the step, and the pass is the batch's, so the model must treat examples
    independently. That, and where in each tensor an example is, is checked with two forward passes of two
    examples, once for every shape of input: they leave buffers and generators alone but call the hooks of the
    model's modules. `gram` compares the sum of K with the squared norm of the step's gradient, which sees
    what was missed.

    In-run products of gradients: Wang, Mittal, Song, Jia 2024, arXiv 2406.11011; uniqueness from them:
    Abdelghafar et al. 2026, arXiv 2510.10902v2.

    Args:
        model: the module that is trained; called once within the context, its first tensor (B, ...).
        parameters: names of the trainable parameters to include; None is all of them.
        reduction: "sum" if the loss sums over the examples; "mean" if it averages: K is then multiplied by
            B^2, so that it is always that of the sum.
        chunk: at most that many examples in a block of the ghost kernel; None is all.

    Raises:
        ValueError: within the context, if a parameter is used by something without a ghost kernel (attention,
            recurrent layers, bare parameters: they are named), if examples depend on each other or cannot be
            told apart in a tensor, if the model normalises by batch statistics, or if it is called twice.

    >>> line = nn.Linear(1, 1, bias=False)
    >>> with InRunGram(line) as run:
    ...     line(torch.tensor([[1.0], [2.0]])).sum().backward()
    >>> run.gram().tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        parameters: Collection[str] | None = None,
        reduction: Literal["sum", "mean"] = "sum",
        chunk: int | None = None,
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"a reduction is 'sum' or 'mean', got {reduction!r}: name what the loss does")
        self.model, self.reduction, self.chunk = model, reduction, chunk
        self.parameters = None if parameters is None else tuple(parameters)
        self._layouts: dict[object, list[_Expected] | None] = {}  # by shapes of the input
        self._open: ExitStack | None = None
        self._forget()

    def _forget(self) -> None:
        """Be ready for another step."""
        self._batch = 0
        self._listening = self._probing = False
        self._expected: list[_Expected] | None = None  # None for a single example
        self._heard: list[_Heard] = []
        self._missing: dict[str, int] = {}  # calls of a parameter whose gradient has not come
        self._uses: dict[str, list[int]] = {}
        self._gram = torch.zeros(0, 0, dtype=torch.float64)
        self._squared_norm = torch.zeros((), dtype=torch.float64)
        self._precision = 0.0
        self._repeated = self._checked = False

    def __enter__(self) -> Self:
        if self._open is not None:
            raise ValueError("a run is entered once at a time, got a second entry: leave the first one")
        trainable = trainable_parameters(self.model, self.parameters)
        self._forget()
        self._names = {id(parameter): name for name, parameter in trainable.items()}
        self._open = ExitStack()
        self._open.enter_context(_Listening(self._names, self._hear))
        for handle in (
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after),
            *map(self._watch_norm, trainable.values()),
        ):
            self._open.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            self._open.close()
        self._open = None

    def gram(self) -> Tensor:
        """K (B, B), float64, symmetric, of the watched step; in the unit of `example_gram`.

        Raises:
            ValueError: if not exactly one forward and one backward pass were seen, or if the per-example
                gradients do not add up to the step's gradient.
        """
        if not any(heard.came for heard in self._heard):
            raise ValueError(
                "a Gram matrix needs a forward and a backward pass within the context, got none: call "
                "loss(model(x), y).backward() there"
            )
        if self._repeated:
            raise ValueError(
                "a Gram matrix belongs to one backward pass, got several of one forward pass: "
                "enter the context once for each"
            )
        for name in [name for name, missing in self._missing.items() if missing]:
            self._missing[name] = 0  # the loss does not depend on what is still missing
            self._add(name)
        gram = (self._gram + self._gram.T) / 2
        if not self._checked:
            _check_sum(gram, float(self._squared_norm), self._precision)
        return gram * self._batch**2 if self.reduction == "mean" else gram

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's forward pass: learn where the examples will be."""
        if self._probing:
            return
        if self._batch:
            raise ValueError("a run watches one call of the model, got a second: enter the context for each")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        if not tensors or len(tensors[0]) == 0:
            raise ValueError("a run counts the examples of the model's first tensor, got none: pass (B, ...)")
        first = tensors[0]
        self._batch = len(first)
        modes = (module.training for module in model.modules())
        shapes = ((t.shape, t.dtype) for t in tensors)
        key = (*shapes, *modes, *self._names.values())
        self._checked = key in self._layouts
        if not self._checked:
            self._probing = True
            self._layouts[key] = self._probe(args, kwargs, first) if self._batch > 1 else None
            self._probing = False
        self._expected = self._layouts[key]
        self._gram = torch.zeros(self._batch, self._batch, dtype=torch.float64, device=first.device)
        self._squared_norm = self._squared_norm.to(first.device)
        self._listening = True

    def _probe(self, args: tuple[Any, ...], kwargs: dict[str, Any], first: Tensor) -> list[_Expected]:
        """The watched calls to come and where examples are in them, from two passes of two examples."""
        named = dict(self.model.named_parameters())
        other = most_different([leaf for leaf in tree_leaves((args, kwargs)) if _is_batch(leaf, len(first))])
        pairs = ([0, other], [0, 0])

        def run(which: int) -> tuple[list[tuple[Call, Tensor]], list[Tensor]]:
            batch = tree_map(partial(_picked, batch=len(first), examples=pairs[which]), (args, kwargs))
            state = {name: p.detach().requires_grad_(p.requires_grad) for name, p in named.items()}
            found: list[tuple[Call, Tensor]] = []
            names = {id(state[name]): name for name, p in named.items() if id(p) in self._names}
            mode = _Listening(names, lambda call, options, _: found.append((call, options["input"].detach())))
            with random_state_kept(first), torch.enable_grad(), mode:
                output = functional_call(self.model, {**state, **buffer_copies(self.model)}, *batch)
            return found, [leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

        (calls, outputs), (others, changed) = run(0), run(1)
        if len(calls) != len(others) or any(map(is_coupled, outputs, changed)):
            raise ValueError(
                "examples pass through the model independently, got an output that depends on another "
                "example: per-example gradients of this pass are undefined"
            )
        return [
            _Expected(call, find_layouts(a, b, _joinable(call, a)))
            for (call, a), (_, b) in zip(calls, others, strict=True)
        ]

    def _hear(self, call: Call, options: dict[str, Any], output: Tensor) -> None:
        """A watched call of the batch."""
        if not self._listening:
            return
        index = len(self._heard)
        layout = None
        if self._expected is not None:
            if index < len(self._expected):
                layout = self._expected[index].layout(call, self._batch)
            if layout is None:
                raise ValueError(
                    "examples lie along one dimension, got none in the input of the "
                    f"{call.function.__name__} that uses {call.weight or call.bias}: "
                    "measure with example_gram"
                )
        self._heard.append(_Heard(call, options, layout))
        _unviewed(output).register_hook(partial(self._came, index))  # type: ignore[no-untyped-call]

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the model's forward pass: every use of every parameter is known."""
        if not self._listening:
            return
        self._listening = False
        edges = uses_in_graph([leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])
        self._uses = uses_by_parameter([heard.call for heard in self._heard])
        unknown = [
            name for key, name in self._names.items() if edges[key] not in (0, len(self._uses.get(name, ())))
        ]
        if unknown:
            raise ValueError(
                "a run needs a ghost kernel for every use of a parameter, got none for "
                f"{', '.join(unknown)}: measure with example_gram, or choose among the other parameters"
            )
        self._missing = {name: len(used) for name, used in self._uses.items()}

    def _came(self, index: int, signal: Tensor) -> None:
        """The gradient of a call's output, in the backward pass."""
        heard = self._heard[index]
        self._repeated |= heard.came
        if heard.came:
            return
        with torch.no_grad():
            heard.receive(signal.detach().reshape(heard.call.shape))
            for name in heard.call.names:
                self._missing[name] -= 1
                if not self._missing[name]:
                    self._add(name)

    def _add(self, name: str) -> None:
        """Add a parameter's share, and let go of what no other parameter needs."""
        found = [self._heard[index] for index in self._uses[name]]
        uses = [heard.use for heard in found if heard.use is not None]
        if uses:
            add_share(self._gram, name, uses, self.chunk)
        for heard in found:
            if not any(self._missing[other] for other in heard.call.names):
                heard.use = None

    def _watch_norm(self, parameter: nn.Parameter) -> RemovableHandle:
        handle: RemovableHandle = parameter.register_hook(self._add_norm)  # type: ignore[no-untyped-call]
        return handle

    def _add_norm(self, gradient: Tensor) -> None:
        """The gradient of a parameter in the backward pass, which is left as it is."""
        if self._checked:
            return
        self._precision = max(self._precision, torch.finfo(gradient.dtype).eps)
        values = gradient.detach().coalesce().values() if gradient.is_sparse else gradient.detach()
        self._squared_norm += torch.linalg.vector_norm(values).double().square()


def _unviewed(output: Tensor) -> Tensor:
    """The tensor a reshaped output is a view of: in-place changes of the view pass a hook on the view by."""
    base = output._base
    if base is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def _check_sum(gram: Tensor, squared_norm: float, precision: float) -> None:
    """Compare the sum of K with the squared norm of the step's gradient, far above rounding."""
    total, largest = float(gram.sum()), float(gram.diagonal().clamp(min=0).sqrt().sum()) ** 2
    if not abs(total - squared_norm) <= math.sqrt(precision) * largest:
        raise ValueError(
            f"per-example gradients add up to the step's gradient, got squared norms {total:.6g} and "
            f"{squared_norm:.6g}: the loss may use parameters through the model's output alone"
        )


def _is_batch(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch


def _picked(value: Any, batch: int, examples: list[int]) -> Any:
    """Some examples of a tensor of the batch; what is no such tensor stays."""
    return value[examples].detach() if _is_batch(value, batch) else value


def _joinable(call: Call, x: Tensor) -> int:
    """How many leading dimensions of a call's input may hold examples: not those of channels or space."""
    if call.function is F.linear:
        return x.ndim - 1
    if call.function is F.embedding:
        return x.ndim
    if call.function is F.layer_norm:
        return x.ndim - len(call.kernel)
    return 1 if call.function in NORMS or x.ndim == len(call.kernel) else 0
