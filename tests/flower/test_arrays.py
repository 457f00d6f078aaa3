import io

import flwr.app
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from fedaudit.flower.arrays import Array, copy_into, encode, from_state_dict, to_state_dict


def state_dict():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 2), torch.nn.BatchNorm2d(3), torch.nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        k: torch.randn(v.shape, generator=generator).to(v.dtype) for k, v in model.state_dict().items()
    }
    return tensors | {
        "counter": torch.tensor(7),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
        "half": torch.tensor([0.5], dtype=torch.float16),
        "bytes": torch.arange(4, dtype=torch.uint8),
        "complex": torch.tensor([1 + 2j]),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "strided": torch.arange(12.0).reshape(3, 4)[:, ::2],
        "trained": torch.nn.Parameter(torch.ones(2)),
    }


NUMPY_CASES = {
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.arange(3, dtype=">f4"),
    "text": np.array(["a", "bc"]),
    "structured": np.zeros(2, dtype=[("a", "f4"), ("b", "i8")]),
    "date": np.array(["2020-01-01"], dtype="datetime64[D]"),
    "zero-d": np.array(3.0),
    "many dimensions": np.arange(16.0).reshape(2, 2, 2, 1, 2),
    "subclass": np.arange(3.0).view(np.matrix),
}


def test_the_record_of_a_state_dict_has_the_bytes_flower_writes():
    ours, flowers = from_state_dict(state_dict()), ArrayRecord(state_dict())
    assert list(ours) == list(flowers)
    for key, array in flowers.items():
        assert (ours[key].dtype, ours[key].shape, ours[key].stype) == (array.dtype, array.shape, array.stype)
        assert ours[key].data == array.data, key
        assert type(ours[key].data) is bytes and type(ours[key].shape) is tuple


def test_the_serialised_record_cannot_be_told_from_flowers():
    ours, flowers = from_state_dict(state_dict()), ArrayRecord(state_dict())
    assert ours.deflate() == flowers.deflate()
    assert ours["scalar"].deflate() == flowers["scalar"].deflate()
    assert ours.object_id == flowers.object_id
    assert flwr.app.Array.inflate(ours["scalar"].deflate(), ours["scalar"].children) == flowers["scalar"]


@pytest.mark.parametrize("write", [from_state_dict, ArrayRecord], ids=["our record", "flower's record"])
def test_a_state_dict_comes_back_as_flower_gives_it_back(write):
    ours, flowers = to_state_dict(write(state_dict())), ArrayRecord(state_dict()).to_torch_state_dict()
    assert list(ours) == list(flowers)
    for key, tensor in flowers.items():
        assert ours[key].dtype == tensor.dtype and ours[key].shape == tensor.shape, key
        assert ours[key].stride() == tensor.stride(), key
        assert torch.equal(ours[key], tensor), key


def test_flowers_own_conversions_accept_our_record():
    ours, flowers = from_state_dict(state_dict()), ArrayRecord(state_dict())
    for mine, theirs in zip(ours.to_numpy_ndarrays(), flowers.to_numpy_ndarrays(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert torch.equal(ours.to_torch_state_dict()["strided"], state_dict()["strided"])
    assert ours.count_bytes() == flowers.count_bytes()


@pytest.mark.parametrize("values", NUMPY_CASES.values(), ids=NUMPY_CASES)
def test_every_numpy_array_is_written_and_read_as_flower_does(values):
    flowers = flwr.app.Array(values)
    ours = encode(values)
    assert ours == flowers and ours.data == flowers.data
    read, reference = ours.numpy(), flowers.numpy()
    np.testing.assert_array_equal(read, reference)
    assert read.dtype == reference.dtype
    for flag in ("C_CONTIGUOUS", "F_CONTIGUOUS", "WRITEABLE", "ALIGNED"):
        assert read.flags[flag] == reference.flags[flag], flag


def test_writing_into_a_tensor_changes_neither_the_record_nor_another_copy():
    record = from_state_dict({"w": torch.ones(3)})
    first, second = to_state_dict(record), to_state_dict(record)
    first["w"].fill_(5.0)
    assert torch.equal(second["w"], torch.ones(3))
    assert torch.equal(to_state_dict(record)["w"], torch.ones(3))


def test_the_record_keeps_its_values_when_the_model_trains_on():
    weights = torch.ones(3)
    record = from_state_dict({"w": weights})
    weights.zero_()
    assert torch.equal(to_state_dict(record)["w"], torch.ones(3))


def header_of(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def npy(values):
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


DAMAGED = {
    "truncated": npy(np.ones(9))[:-1],
    "no header": b"",
    "other magic": b"NOT AN ARRAY" * 20,
    "pickle": header_of(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n") + b"x" * 8,
    "negative shape": header_of(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n"),
    "shape that overflows": header_of(
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904, 4), }\n"
    ),
    "unreadable header": header_of(b"{'descr': import os\n"),
    "header of mixed keys": header_of(b"{'descr': 1, 2: 3}\n"),
    "long header": header_of(
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }".ljust(20000) + b"\n"
    ),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_bytes_raise_what_flower_raises(data):
    plain = flwr.app.Array("float32", (1,), "numpy.ndarray", data)
    with pytest.raises(Exception) as flowers:
        plain.numpy()
    with pytest.raises(type(flowers.value)) as ours:
        Array.view(plain).numpy()
    assert str(ours.value) == str(flowers.value)


def test_bytes_behind_the_array_are_ignored_as_numpy_does():
    plain = flwr.app.Array("float64", (2,), "numpy.ndarray", npy(np.ones(2)) + b"tail")
    np.testing.assert_array_equal(Array.view(plain).numpy(), plain.numpy())


def test_the_header_and_not_the_arrays_own_fields_decides_what_is_read():
    lying = flwr.app.Array("float32", (99,), "numpy.ndarray", npy(np.arange(3)))
    np.testing.assert_array_equal(Array.view(lying).numpy(), np.arange(3))


def test_another_serialisation_is_refused_with_flowers_message():
    plain = flwr.app.Array("float32", (1,), "other", b"1234")
    with pytest.raises(TypeError, match="Unsupported serialization type"):
        to_state_dict(ArrayRecord({"w": plain}))


def test_a_dtype_numpy_does_not_know_is_refused_as_in_flower():
    with pytest.raises(TypeError, match="BFloat16"):
        from_state_dict({"w": torch.ones(1, dtype=torch.bfloat16)})


def test_a_view_shares_the_payload_but_not_its_replacement():
    plain = flwr.app.Array(np.ones(2))
    view = Array.view(plain)
    assert view.data is plain.data
    view.data = npy(np.zeros(2))
    np.testing.assert_array_equal(plain.numpy(), np.ones(2))
    assert view != plain and plain != view


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64], ids=str)
def test_copying_into_a_model_is_loading_its_state_dict(dtype):
    model, expected = (
        torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.BatchNorm2d(3)) for _ in range(2)
    )
    sent = {
        name: torch.arange(t.numel()).reshape(t.shape).to(dtype) for name, t in model.state_dict().items()
    }
    copy_into(model.state_dict(), from_state_dict(sent))
    expected.load_state_dict(sent)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=0)


def test_copying_reads_column_major_arrays_in_their_order():
    weights = {"w": torch.zeros(2, 3)}
    values = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    copy_into(weights, ArrayRecord({"w": flwr.app.Array(values)}))
    assert weights["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_training_after_copying_leaves_the_record_as_it_was():
    weights = {"w": torch.zeros(2)}
    record = from_state_dict({"w": torch.ones(2)})
    copy_into(weights, record)
    weights["w"].add_(5)
    assert record["w"].numpy().tolist() == [1, 1]


def test_copying_other_names_or_shapes_is_refused():
    record = from_state_dict({"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"named as in the model, got \['w'\] for \['v'\]"):
        copy_into({"v": torch.zeros(2)}, record)
    with pytest.raises(ValueError, match=r"the model.s shapes, got \(2,\) for \(1,\) of 'w'"):
        copy_into({"w": torch.zeros(1)}, record)
