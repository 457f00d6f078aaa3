"""Which linear maps and scales a model applies to one example, and the gradients of one example through them.

Layers are recognised by the functions they call, not by their class: every call of `linear`, a convolution,
`embedding` or a norm that uses a parameter in question is watched during a forward pass of a single example,
under `torch.func.vmap` over the examples. So neither the position of the batch dimension, nor reshaping, nor
repeated use of a layer has to be guessed, and no hook is placed in the model.

`torch.func.vmap` cannot run everything (fused recurrent layers, control flow that depends on data). Where it
raises, the same function runs example by example: exact too, B times the overhead.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

Loss = Callable[[Tensor, Tensor], Tensor]
log = logging.getLogger(__name__)

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
CONVOLUTIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}  # and their spatial dimensions
NORMS: dict[Any, tuple[str, ...]] = {
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.instance_norm: (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("use_input_stats", "momentum", "eps"),
    ),
}
SIGNATURES: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.embedding: (
        *("input", "weight", "padding_idx", "max_norm"),
        *("norm_type", "scale_grad_by_freq", "sparse"),
    ),
    **dict.fromkeys(CONVOLUTIONS, _CONVOLUTION),
    **NORMS,
}


@dataclass(frozen=True)
class Call:
    """One watched call in the forward pass of one example.

    Attributes:
        function: one of SIGNATURES.
        weight: name of the parameter used as weight, if watched calls are all that uses it.
        bias: likewise for the bias.
        options: the arguments that are not tensors.
        kernel: shape of the weight.
        shape: shape of the output for one example.
        dtype: dtype of the output.
    """

    function: Any
    weight: str | None
    bias: str | None
    options: Mapping[str, Any]
    kernel: torch.Size
    shape: torch.Size
    dtype: torch.dtype

    @property
    def names(self) -> list[str]:
        """The parameters it uses."""
        return [name for name in (self.weight, self.bias) if name is not None]


@dataclass(frozen=True)
class Gradients:
    """Per-example results of one backward pass.

    Attributes:
        inputs: by number of the call, its inputs (B, ...); of a norm, the normalised inputs.
        signals: by number of the call, the gradients of its output (B, ...).
        direct: by name, the gradients of the parameters differentiated directly (B, *shape).
    """

    inputs: dict[int, Tensor]
    signals: dict[int, Tensor]
    direct: dict[str, Tensor]

    @property
    def numbers(self) -> int:
        """How many numbers are held."""
        return sum(t.numel() for part in (self.inputs, self.signals, self.direct) for t in part.values())

    @staticmethod
    def joined(pieces: Sequence["Gradients"]) -> "Gradients":
        """Those of several chunks of examples, one after the other."""
        if len(pieces) == 1:
            return pieces[0]
        first = pieces[0]
        return Gradients(
            {i: torch.cat([piece.inputs[i] for piece in pieces]) for i in first.inputs},
            {i: torch.cat([piece.signals[i] for piece in pieces]) for i in first.signals},
            {name: torch.cat([piece.direct[name] for piece in pieces]) for name in first.direct},
        )


class _Watch(TorchFunctionMode):
    """Notes every call whose weight or bias is one of `names` (by identity); adds `taps` to the outputs."""

    def __init__(self, names: Mapping[int, str], taps: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.names = names
        self.taps = taps
        self.calls: list[Call] = []
        self.inputs: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in SIGNATURES:
            return func(*args, **kwargs)
        options = arguments(func, args, kwargs)
        weight, bias = (self.names.get(id(options.get(role))) for role in ("weight", "bias"))
        if (weight is None and bias is None) or not torch.is_grad_enabled():
            return func(**options)
        index = len(self.calls)
        if index not in self.taps:
            output = func(**options)
        elif func in NORMS:  # scale and shift apart, so that the scale's input is at hand
            inputs = normalised(func, options)
            scale, shift = (over_channels(func, options.get(role), inputs) for role in ("weight", "bias"))
            tap = self.taps[index] if shift is None else self.taps[index] + shift
            output = inputs + tap if scale is None else torch.addcmul(tap, inputs, scale)
        else:
            inputs, output = options["input"], func(**options) + self.taps[index]
        if index in self.taps:
            self.inputs[index] = inputs
        self.calls.append(call_of(func, options, weight, bias, output))
        return output


def arguments(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a watched call by name, in a form that couples no examples.

    Raises:
        ValueError: if an embedding scales gradients by frequency or renormalises its weight.
    """
    options = dict(zip(SIGNATURES[function], args, strict=False)) | dict(kwargs)
    _refuse_undefined(options)
    if function is F.instance_norm and options.get("use_input_stats", True):
        options |= {"running_mean": None, "running_var": None}  # kept up to date, not used
    return options


def call_of(
    function: Any, options: Mapping[str, Any], weight: str | None, bias: str | None, output: Tensor
) -> Call:
    """What is remembered of a call."""
    plain = {key: value for key, value in options.items() if not isinstance(value, Tensor)}
    used = options.get("weight")
    kernel = options["bias"].shape if used is None else used.shape
    return Call(function, weight, bias, plain, kernel, output.shape, output.dtype)


def normalised(function: Any, options: Mapping[str, Any]) -> Tensor:
    """What a norm scales and shifts, by way of `layer_norm`, whose backward pass stays fused under vmap."""
    x: Tensor = options["input"]
    eps: float = options.get("eps", 1e-5)
    if function is F.instance_norm and not options.get("use_input_stats", True):
        statistics = options["running_mean"], options["running_var"]
        standard: Tensor = F.instance_norm(x, *statistics, use_input_stats=False, eps=eps)
        return standard
    if function is F.layer_norm:
        rows, shape = x, list(options["normalized_shape"])
    else:
        rows = x.reshape(x.shape[0], options["num_groups"] if function is F.group_norm else x.shape[1], -1)
        shape = [rows.shape[2]]
    standard = F.layer_norm(rows, shape, None, None, eps)
    return standard.reshape(x.shape)


def over_channels(function: Any, parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A norm's parameter in a shape that multiplies its input: channels are dimension 1 or the last ones."""
    if parameter is None or function is F.layer_norm:
        return parameter
    return parameter.reshape(-1, *[1] * (x.ndim - 2))


def find_calls(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, trainable: Mapping[str, Tensor]
) -> list[Call]:
    """The watched calls for the first example, in order.

    A parameter that is also used in any other way (as the autograd graph shows) stays unnamed in its calls.

    Raises:
        ValueError: if an embedding scales gradients by frequency or renormalises its weight.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in trainable.items()}
    watch = _Watch({id(leaf): name for name, leaf in leaves.items()}, {})
    with torch.enable_grad(), watch:
        value = loss(functional_call(model, {**leaves, **buffer_copies(model)}, (x[:1],)), y[:1])
    edges = uses_in_graph([value])
    seen = Counter(name for call in watch.calls for name in call.names)
    explained = {name for name, leaf in leaves.items() if seen[name] and seen[name] == edges[id(leaf)]}
    return [
        replace(
            call,
            weight=call.weight if call.weight in explained else None,
            bias=call.bias if call.bias in explained else None,
        )
        for call in watch.calls
    ]


def per_example(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    trainable: Sequence[str],
    taps: Mapping[int, Call],
    direct: Sequence[str],
) -> Gradients:
    """Per example: inputs and output gradients of the tapped calls, gradients of the parameters in `direct`.

    Raises:
        ValueError: if an embedding scales gradients by frequency or renormalises its weight.
    """
    zeros = {i: torch.zeros(call.shape, dtype=call.dtype, device=x.device) for i, call in taps.items()}
    fixed = {name: p.detach() for name, p in model.named_parameters()}
    moving = {name: fixed.pop(name) for name in direct}

    def value(
        taps: dict[int, Tensor], moving: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[Tensor, dict[int, Tensor]]:
        state = {**fixed, **moving, **buffer_copies(model)}
        watch = _Watch({id(state[name]): name for name in trainable}, taps)
        with watch:
            scalar = loss(functional_call(model, state, (x[None],)), y[None])
        return scalar, watch.inputs

    differentiate = grad(value, argnums=(0, 1), has_aux=True)
    together = vmap(differentiate, in_dims=(None, None, 0, 0), randomness="different")
    try:
        (signals, gradients), inputs = together(zeros, moving, x, y)
    except RuntimeError as error:  # no batching rule; what is wrong with the model itself is raised once more
        log.info("torch.func.vmap cannot run the model, it runs example by example: %s", error)
        singles = [differentiate(zeros, moving, x[i], y[i]) for i in range(len(x))]
        (signals, gradients), inputs = tree_map(lambda *values: torch.stack(values), *singles)
    return Gradients({i: t.detach() for i, t in inputs.items()}, signals, gradients)


def joined(pieces: list[Tensor], dim: int = 0) -> Tensor:
    """Pieces one after the other; a single one is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def spans(total: int, size: int | None) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of at most `size` that cover range(total).

    >>> list(spans(5, 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    step = total if size is None else size
    return ((start, min(start + step, total)) for start in range(0, total, step))


@contextmanager
def random_state_kept(x: Tensor) -> Iterator[None]:
    """Leave the global generators as they were: measuring must not change how training goes on."""
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        yield


class Replay:
    """Runs chunks of examples, each time with the random numbers of the chunk's first time."""

    def __init__(self, run: Callable[[int, int], Gradients], device: torch.device) -> None:
        self.run, self.device = run, device
        self.states: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, start: int, stop: int) -> Gradients:
        """Results for the examples in a range; a range is known by its start."""
        cuda = self.device.type == "cuda"
        if start not in self.states:
            self.states[start] = (
                torch.get_rng_state(),
                torch.cuda.get_rng_state(self.device) if cuda else None,
            )
            return self.run(start, stop)
        here, there = self.states[start]
        torch.set_rng_state(here)
        if there is not None:
            torch.cuda.set_rng_state(there, self.device)
        return self.run(start, stop)


def _refuse_undefined(options: Mapping[str, Any]) -> None:
    if options.get("scale_grad_by_freq"):
        raise ValueError(
            "per-example gradients are undefined for an embedding with scale_grad_by_freq=True, which scales "
            "by counts over the whole batch: set it to False"
        )
    if options.get("max_norm") is not None:
        raise ValueError(
            "a measured model must not change its weights, got an embedding that rewrites them as it runs, "
            f"max_norm={options['max_norm']}: set max_norm to None"
        )


def buffer_copies(model: nn.Module) -> dict[str, Tensor]:
    """Buffers a forward pass may change: made inside it, as functional transforms ask."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def uses_in_graph(values: Sequence[Tensor]) -> Counter[int]:
    """How often the graph of `values` uses each leaf, by id; sees also what no function mode can see."""
    edges: Counter[int] = Counter()
    visited: set[Any] = {value.grad_fn for value in values}
    waiting: list[Any] = list(visited)
    while waiting:
        for child, _ in getattr(waiting.pop(), "next_functions", ()):
            if hasattr(child, "variable"):
                edges[id(child.variable)] += 1
            elif child is not None and child not in visited:
                visited.add(child)
                waiting.append(child)
    return edges
