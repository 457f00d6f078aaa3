"""Tensors to Flower arrays and back, with the bytes Flower writes and a fraction of its time.

Flower keeps an array as an ``.npy`` file in memory and runs ``numpy.load`` at every ``Array.numpy()``, which
parses the file's header as Python source each time; ``numpy.save`` formats that header anew. For the small
tensors of a client's model the headers cost far more than the numbers. Here headers are remembered (they
repeat for every client and round); the payload is copied once. What is written is equal byte for byte, and
whatever is not the plain case (other serialisations, structured or object dtypes, empty or damaged data) is
left to Flower, with Flower's errors.
"""

import io
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import flwr.app
import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedaudit.simulation.flower_internals import replace_values

_MAGIC = b"\x93NUMPY\x01\x00"
_PREFIX = len(_MAGIC) + 2  # magic, version, two bytes of header length
_LONGEST_HEADER = 10_000  # numpy.load refuses longer ones
_NPY = "numpy.ndarray"
_SAME = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64}


class Array(flwr.app.Array):
    """A Flower array whose `numpy` is fast.

    It keeps the name ``Array`` because Flower writes an object's class name into the messages it serialises:
    what goes over the wire cannot be told from Flower's own.

    >>> import numpy as np
    >>> plain = flwr.app.Array(np.arange(3.0))
    >>> Array.view(plain) == plain, Array.view(plain).numpy()
    (True, array([0., 1., 2.]))
    """

    @classmethod
    def view(cls, array: flwr.app.Array) -> "Array":
        """An array of its own that shares `array`'s immutable payload."""
        new = cls.__new__(cls)
        new.__dict__.update(array.__dict__)
        return new

    def numpy(self) -> NDArray[Any]:
        """The values as a writable array of their own, exactly what Flower's `numpy` returns."""
        values = self._plain()
        return super().numpy() if values is None else values.copy("F" if values.flags.fnc else "C")

    def read(self) -> NDArray[Any]:
        """The values without a copy, read-only where that is possible; for use while the array is kept."""
        values = self._plain()
        return super().numpy() if values is None else values

    def _plain(self) -> NDArray[Any] | None:
        """The payload's values in place; None where only Flower can tell."""
        data = self.data
        if self.stype == _NPY and data[: len(_MAGIC)] == _MAGIC:
            start = _PREFIX + int.from_bytes(data[len(_MAGIC) : _PREFIX], "little")
            layout = _read_header(data[:start]) if start <= _LONGEST_HEADER else None
            if layout is not None:
                dtype, shape, order, size = layout
                if len(data) - start >= size:
                    return np.ndarray(shape, dtype, data, start, order=order)
        return None

    def __eq__(self, other: object) -> bool:
        """Whether dtype, shape, serialisation and bytes are equal; Flower's own class would compare types."""
        if not isinstance(other, flwr.app.Array):
            return NotImplemented
        mine = (self.dtype, self.shape, self.stype, self.data)
        return mine == (other.dtype, other.shape, other.stype, other.data)

    __hash__ = None  # type: ignore[assignment]  # as for every mutable dataclass


def encode(values: NDArray[Any]) -> Array:
    """`values` as an array, the bytes being those of ``flwr.app.Array(values)``.

    >>> import numpy as np
    >>> encode(np.eye(2)) == flwr.app.Array(np.eye(2))
    True

    Raises:
        TypeError: if `values` is no ``numpy.ndarray``.
        ValueError: if its dtype holds Python objects.
    """
    if type(values) is not np.ndarray or not values.flags.c_contiguous or values.dtype.kind not in "biufc":
        return Array.view(flwr.app.Array(values))
    name, header = _write_header(values.dtype, values.shape)
    data = b"".join((header, values.data)) if values.size else header
    new = Array.__new__(Array)
    new.__dict__.update(dtype=name, shape=values.shape, stype=_NPY, data=data)
    return new


def from_state_dict(state_dict: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """The record Flower makes of `state_dict`, several times faster.

    Args:
        state_dict: tensors of any shape, buffers and 0-d counters included; moved to the CPU, not changed.

    Returns:
        A record with the same keys in the same order, equal to ``ArrayRecord(state_dict)``.

    Raises:
        TypeError: if numpy has no such dtype (bfloat16), as in Flower.

    >>> from_state_dict({"steps": torch.tensor(3)}) == ArrayRecord({"steps": torch.tensor(3)})
    True
    """
    record = ArrayRecord()
    replace_values(record, {key: encode(tensor.detach().cpu().numpy()) for key, tensor in state_dict.items()})
    return record


def to_state_dict(record: ArrayRecord) -> "OrderedDict[str, torch.Tensor]":
    """The tensors of `record`, several times faster than Flower's ``to_torch_state_dict``.

    The tensors own their memory: writing into them changes neither the record nor another client's copy.

    Raises:
        TypeError: if an array is serialised in another way than numpy's, or torch has no such dtype.
        ValueError: if an array's bytes are damaged.

    >>> to_state_dict(from_state_dict({"w": torch.ones(2)}))["w"]
    tensor([1., 1.])
    """
    state_dict: OrderedDict[str, torch.Tensor] = OrderedDict()
    for key, array in record.items():
        state_dict[key] = torch.from_numpy(_fast(array).numpy())
    return state_dict


def numpy_arrays(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """The values of `record` as numpy arrays of their own.

    >>> numpy_arrays(from_state_dict({"w": torch.ones(2)}))["w"]
    array([1., 1.], dtype=float32)
    """
    return {key: _fast(array).numpy() for key, array in record.items()}


def copy_into(state_dict: Mapping[str, torch.Tensor], record: ArrayRecord) -> None:
    """Copy `record` into tensors: ``model.load_state_dict`` for ``model.state_dict()``, several times faster.

    Args:
        state_dict: tensors that are overwritten.
        record: arrays of the same names and shapes.

    Raises:
        ValueError: if a name or a shape differs; earlier tensors have been overwritten then.

    >>> weights = {"w": torch.zeros(2)}
    >>> copy_into(weights, from_state_dict({"w": torch.ones(2)}))
    >>> weights["w"]
    tensor([1., 1.])
    """
    if state_dict.keys() != record.keys():
        raise ValueError(
            f"arrays are named as in the model, got {sorted(record)} for {sorted(state_dict)}: "
            "send the weights of this model"
        )
    for key, tensor in state_dict.items():
        values = _fast(record[key]).read()
        if values.shape != tensor.shape:
            raise ValueError(
                f"arrays have the model's shapes, got {values.shape} for {tuple(tensor.shape)} of {key!r}: "
                "send the weights of this model"
            )
        target = tensor.detach()
        if target.device.type == "cpu" and target.dtype in _SAME and _SAME[target.dtype] == values.dtype:
            np.copyto(target.numpy(), values)  # torch would first copy what it may not write to
        else:
            target.copy_(torch.from_numpy(values.copy()))


def _fast(array: flwr.app.Array) -> Array:
    return array if isinstance(array, Array) else Array.view(array)


@lru_cache(maxsize=4096)
def _read_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], Any, int] | None:
    """Dtype, shape, order ("C" or "F") and size in bytes of an ``.npy`` file; None if not the plain case."""
    stream = io.BytesIO(header[len(_MAGIC) :])
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, TypeError):
        return None
    if min(shape, default=0) < 0 or dtype.kind not in "biufc":
        return None
    size = dtype.itemsize
    for side in shape:  # not numpy.prod: a forged shape must not overflow
        size *= side
    if size == 0:
        return None
    return dtype, shape, "F" if fortran else "C", size


@lru_cache(maxsize=4096)
def _write_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[str, bytes]:
    """Name of `dtype` and the ``.npy`` header of a C-contiguous array, as numpy writes it."""
    stream = io.BytesIO()
    contents = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, contents)
    return str(dtype), stream.getvalue()
