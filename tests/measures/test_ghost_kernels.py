"""Gram matrices of per-example gradients against a loop over the examples."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedaudit.measures import ghost_kernels, gram_shares
from fedaudit.measures.ghost_kernels import clip_gram, example_gradients, example_gram
from fedaudit.models.build import build_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # attention under vmap
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def squares(outputs: Tensor, labels: Tensor) -> Tensor:
    return ((outputs.flatten(1).tanh() - labels[:, None]) ** 2).sum()


def loop_gradients(model, loss, x, y):
    """Per-example gradients by B ordinary backward passes."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        value = loss(model(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.to_dense().reshape(-1) for g in gradients]))
    return torch.stack(rows).detach()


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


class Scaled(nn.Module):
    """A bare parameter, used twice, beside a linear layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5))
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        return self.linear(x * self.scale) + self.scale[:3]


class Tied(nn.Module):
    """One embedding that is also the output layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.output = nn.Linear(5, 7, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):
        return self.output(self.embedding(tokens).tanh()).sum(1)


class NegativePadding(nn.Module):
    """A functional embedding whose padding row is counted from the end."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 5))

    def forward(self, tokens):
        return F.embedding(tokens, self.weight, padding_idx=-2)


class Repeated(nn.Module):
    """One layer applied three times, to different numbers of tokens."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.convolution = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):  # (b, 3, 4)
        x = self.layer(self.layer(x).tanh())
        image = x.sum(1).reshape(-1, 1, 2, 2).expand(-1, 2, 2, 2)
        image = self.convolution(self.convolution(image).tanh())
        return self.layer(x[:, :2]).sum(1) + image.flatten(1)[:, :4]


class BatchInside(nn.Module):
    """Puts tokens before examples: dimension 0 of the layer's input is not the batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x.transpose(0, 1).tanh()).transpose(0, 1).sum(1)


class Frames(nn.Module):
    """A convolution over several frames of every example."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 3, stride=2, groups=2)

    def forward(self, x):  # (b, frames, 2, 7, 7)
        frames = self.convolution(x.flatten(0, 1)).tanh()
        return frames.reshape(len(x), -1)


class Attention(nn.Module):
    """Attention of the tokens to each other, or of learned queries to the tokens."""

    def __init__(self, batch_first=True, queries=0):
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.queries = nn.Parameter(torch.randn(1, queries, 4)) if queries else None

    def forward(self, x):  # (b, T, 4)
        queries = x if self.queries is None else self.queries.expand(len(x), -1, -1)
        if self.batch_first:
            return self.attention(queries, x, x)[0]
        queries, x = queries.transpose(0, 1), x.transpose(0, 1)
        return self.attention(queries, x, x, need_weights=False)[0].transpose(0, 1)


class Recurrent(nn.Module):
    """The last output of a recurrent layer, linearly read."""

    def __init__(self, kind, batch_first=True, **options):
        super().__init__()
        self.layer = kind(4, 3, batch_first=batch_first, **options)
        self.batch_first = batch_first
        self.read = nn.Linear(3 * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x):  # (b, T, 4)
        outputs, _ = self.layer(x if self.batch_first else x.transpose(0, 1))
        return self.read(outputs[:, -1] if self.batch_first else outputs[-1])


class Cell(nn.Module):
    """A recurrent cell, called once for every token."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(4, 3)

    def forward(self, x):
        state = None
        for token in x.unbind(1):
            state = self.cell(token, state)
        return state[0]


class Classifier(nn.Module):
    """Two layers of a Transformer's encoder on tokens."""

    def __init__(self, dropout=0.0):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.embedding, self.places = nn.Embedding(7, 8), nn.Embedding(4, 8)
        self.encoder, self.read = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.places(torch.arange(4))
        return self.read(self.encoder(x).mean(1))


class HiddenUse(nn.Module):
    """Uses a weight in a linear layer and once more where no function mode can see it."""

    class Product(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, weight):
            return x @ weight.T

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensors
            return gradient @ weight, gradient.T @ x

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(x) + self.Product.apply(x.tanh(), self.layer.weight)


class ForeignUse(nn.Module):
    """A layer's weight is regularised in the forward pass and used without gradient elsewhere."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        with torch.no_grad():
            gate = self.layer(x).sigmoid()
        return self.layer(x) * gate + self.layer.weight.sum() * x[:, :3]


class ParameterInput(nn.Module):
    """A linear layer whose input is a parameter."""

    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(2, 5))
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(self.prompt).sum(0) * x[:, :3] + self.layer(x)


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def convolution(**options) -> nn.Module:
    return nn.Conv2d(options.pop("inside", 4), options.pop("out", 6), options.pop("size", 3), **options)


VECTOR, SEQUENCE, IMAGE = (5,), (4, 5), (4, 6, 7)
CASES = {
    "linear": (lambda: nn.Linear(5, 3), VECTOR),
    "linear-without-bias": (lambda: nn.Linear(5, 3, bias=False), VECTOR),
    "linear-over-sequence": (lambda: nn.Linear(5, 3), SEQUENCE),
    "linear-over-two-dimensions": (lambda: nn.Linear(5, 3), (2, 3, 5)),
    "linear-long-sequence": (lambda: nn.Linear(3, 2), (40, 3)),
    "conv": (convolution, IMAGE),
    "conv-stride": (lambda: convolution(stride=(2, 1)), IMAGE),
    "conv-padding": (lambda: convolution(padding=(2, 1), bias=False), IMAGE),
    "conv-padding-same": (lambda: convolution(size=(2, 4), padding="same"), IMAGE),
    "conv-padding-same-dilated": (lambda: convolution(size=(2, 3), padding="same", dilation=(3, 2)), IMAGE),
    "conv-padding-valid": (lambda: convolution(padding="valid"), IMAGE),
    "conv-padding-circular": (lambda: convolution(padding=1, padding_mode="circular"), IMAGE),
    "conv-dilation": (lambda: convolution(dilation=2), IMAGE),
    "conv-groups": (lambda: convolution(groups=2), IMAGE),
    "conv-depthwise": (lambda: convolution(groups=4, out=8, stride=2, padding=1), IMAGE),
    "conv-one-place": (lambda: convolution(size=(6, 7), out=30, inside=4, groups=2), IMAGE),
    "conv-frames": (Frames, (3, 2, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 2, 3), SEQUENCE),
    "conv1d-reflected": (lambda: nn.Conv1d(4, 6, 3, 2, 1, groups=2, padding_mode="reflect"), SEQUENCE),
    "conv3d": (lambda: nn.Conv3d(4, 6, (2, 1, 3), (1, 2, 1), (1, 0, 2), groups=2), (4, 3, 4, 3)),
    "conv3d-same": (lambda: nn.Conv3d(2, 3, 2, padding="same", dilation=(1, 2, 1)), (2, 3, 4, 3)),
    "conv3d-replicated": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), (2, 3, 2, 3)),
    "conv-transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2), IMAGE),
    "conv1d-transposed": (lambda: nn.ConvTranspose1d(4, 3, 2), SEQUENCE),
    "group-norm": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(168, 2)), IMAGE),
    "layer-norm": (lambda: nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3)), SEQUENCE),
    "layer-norm-over-two": (lambda: nn.Sequential(nn.LayerNorm((4, 5)), nn.Linear(5, 3)), (3, 4, 5)),
    "layer-norm-without-shift": (lambda: nn.Sequential(nn.LayerNorm(5, bias=False), nn.Tanh()), SEQUENCE),
    "group-norm-of-vectors": (lambda: nn.Sequential(nn.GroupNorm(2, 6), nn.Linear(6, 3)), (6,)),
    "instance-norm": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    "instance-norm-1d": (lambda: nn.InstanceNorm1d(4, affine=True), SEQUENCE),
    "instance-norm-3d": (lambda: nn.InstanceNorm3d(2, affine=True, eps=0.1), (2, 2, 3, 2)),
    "instance-norm-that-tracks": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), IMAGE),
    "instance-norm-of-running-statistics": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(),
        IMAGE,
    ),
    "self-attention": (Attention, (3, 4)),
    "self-attention-tokens-first": (lambda: Attention(batch_first=False), (3, 4)),
    "cross-attention": (lambda: Attention(queries=2), (3, 4)),
    "cross-attention-tokens-first": (lambda: Attention(batch_first=False, queries=2), (3, 4)),
    "rnn": (lambda: Recurrent(nn.RNN), (3, 4)),
    "lstm": (lambda: Recurrent(nn.LSTM), (3, 4)),
    "lstm-tokens-first": (lambda: Recurrent(nn.LSTM, batch_first=False), (3, 4)),
    "gru-two-layers-both-ways": (lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True), (3, 4)),
    "lstm-cell": (Cell, (3, 4)),
    "bare-parameter": (Scaled, VECTOR),
    "repeated": (Repeated, (3, 4)),
    "batch-inside": (BatchInside, (6, 4)),
    "hidden-use": (HiddenUse, VECTOR),
    "foreign-use": (ForeignUse, VECTOR),
    "parameter-input": (ParameterInput, VECTOR),
    "attention": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), (3, 6)),
    "cnn": (small_cnn, (3, 8, 8)),
}
TOKENS = {
    "embedding": lambda: nn.Embedding(7, 5),
    "embedding-padding": lambda: nn.Embedding(7, 5, padding_idx=2),
    "embedding-negative-padding": NegativePadding,
    "embedding-sparse": lambda: nn.Embedding(7, 5, sparse=True),
    "embedding-then-linear": lambda: nn.Sequential(nn.Embedding(7, 5), nn.Tanh(), nn.Linear(5, 3)),
    "tied": Tied,
    "embedding-bag": lambda: nn.EmbeddingBag(7, 5),
    "transformer": Classifier,
    "transformer-in-eval": lambda: Classifier().eval(),
    "transformer-with-dropout-in-eval": lambda: Classifier(dropout=0.3).eval(),
}


def build(name: str, dtype=torch.float64, B: int = 6):
    torch.manual_seed(1)
    if name in TOKENS:
        model, x = TOKENS[name]().to(dtype), torch.randint(7, (B, 4))
    else:
        factory, shape = CASES[name]
        model, x = factory().to(dtype), torch.randn(B, *shape, dtype=dtype)
    return model, x, torch.randint(3, (B,))


@pytest.mark.parametrize("name", [*CASES, *TOKENS])
def test_gram_equals_a_loop_over_the_examples(name):
    model, x, y = build(name)
    G = loop_gradients(model, squares, x, y)
    assert relative_error(example_gram(model, squares, x, y), G @ G.T) < 1e-9


@pytest.mark.parametrize("name", [*CASES, *TOKENS])
def test_gram_of_single_precision_models_is_accurate(name):
    model, x, y = build(name, torch.float32)
    G = loop_gradients(model, squares, x, y).double()
    gram = example_gram(model, squares, x, y)
    assert gram.dtype == torch.float64
    assert relative_error(gram, G @ G.T) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gram_of_a_resnet_equals_a_loop_over_the_examples(dtype):
    model = build_model("resnet18", (3, 8, 8), 4, seed=0).to(dtype)
    torch.manual_seed(1)
    x, y = torch.randn(3, 3, 8, 8, dtype=dtype), torch.tensor([0, 1, 3])
    G = loop_gradients(model, cross_entropy, x, y).double()
    gram = example_gram(model, cross_entropy, x, y)
    assert relative_error(gram, G @ G.T) < (1e-9 if dtype == torch.float64 else 1e-4)


def test_examples_run_one_by_one_only_where_vmap_cannot(caplog):
    with caplog.at_level("INFO", logger="fedaudit"):
        for name in ("cnn", "transformer", "instance-norm-that-tracks", "self-attention"):
            model, x, y = build(name)
            example_gram(model, squares, x, y)
        assert not caplog.records
        model, x, y = build("lstm")
        example_gram(model, squares, x, y)
    assert ["runs example by example" in record.message for record in caplog.records] == [True]


def test_what_is_wrong_with_a_model_is_raised_and_not_tried_around():
    class Broken(nn.Linear):
        def forward(self, x):
            return super().forward(x).reshape(-1, 7)

    model, x, y = Broken(5, 3), torch.randn(3, 5), torch.zeros(3)
    with pytest.raises(RuntimeError, match="invalid for input of size 3"):
        example_gram(model, squares, x, y)


@pytest.mark.parametrize("form", ["_add_ghost", "_add_materialised"])
@pytest.mark.parametrize(
    "name", ["linear", "linear-over-sequence", "conv-depthwise", "conv-stride", "conv3d", "repeated"]
)
@pytest.mark.parametrize("block", [1, 50, 2**20])
def test_both_forms_agree_at_every_block_size(monkeypatch, form, name, block):
    model, x, y = build(name)
    G = loop_gradients(model, squares, x, y)

    def forced(gram, maps, chunk):
        places = sum(m.places for m in maps)
        if form == "_add_ghost":
            gram_shares._add_ghost(gram, maps, places, chunk)
        else:
            gram_shares._add_materialised(gram, maps, places)

    monkeypatch.setattr(gram_shares, "BLOCK", block)
    monkeypatch.setattr(gram_shares, "SMALL", block)
    monkeypatch.setattr(gram_shares, "_add_weight", forced)
    assert relative_error(example_gram(model, squares, x, y), G @ G.T) < 1e-9


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("linear-wide", "_add_ghost"),
        ("linear-long-sequence", "_add_materialised"),
        ("conv-one-place", "_add_ghost"),
        ("conv-depthwise", "_add_materialised"),
    ],
)
def test_the_cheaper_form_is_chosen_from_shapes(monkeypatch, name, form):
    monkeypatch.setitem(CASES, "linear-wide", (lambda: nn.Linear(50, 40), (2, 50)))
    model, x, y = build(name)
    taken = []
    for candidate in ("_add_ghost", "_add_materialised"):
        original = getattr(gram_shares, candidate)

        def noted(*args, _name=candidate, _original=original):
            taken.append(_name)
            _original(*args)

        monkeypatch.setattr(gram_shares, candidate, noted)
    example_gram(model, squares, x, y)
    assert taken == [form]


@pytest.mark.parametrize(
    "name",
    [
        *("linear", "conv", "conv1d", "conv3d", "embedding", "repeated", "batch-inside", "attention", "cnn"),
        *("group-norm", "layer-norm", "layer-norm-over-two", "instance-norm", "instance-norm-that-tracks"),
    ],
)
def test_watched_weights_take_no_direct_path(monkeypatch, name):
    model, x, y = build(name)
    direct = []
    original = ghost_kernels.per_example

    def noted(*args):
        direct.extend(args[6])
        return original(*args)

    monkeypatch.setattr(ghost_kernels, "per_example", noted)
    example_gram(model, squares, x, y)
    assert [n for n in direct if "in_proj" not in n and "out_proj" not in n] == []


@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
@pytest.mark.parametrize("name", ["cnn", "embedding-padding", "linear-over-sequence"])
def test_chunks_do_not_change_the_gram(name, chunk):
    model, x, y = build(name)
    whole = example_gram(model, squares, x, y)
    torch.testing.assert_close(example_gram(model, squares, x, y, chunk=chunk), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        example_gradients(model, squares, x, y, chunk=chunk), loop_gradients(model, squares, x, y)
    )


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("name", ["cnn", "tied", "bare-parameter", "lstm"])
def test_examples_that_are_too_many_to_hold_are_never_held(monkeypatch, name, chunk):
    model, x, y = build(name)
    whole = example_gram(model, squares, x, y)
    held = []
    for part in ("add_share", "add_outer"):
        original = getattr(ghost_kernels, part)

        def noted(gram, *args, _original=original):
            held.append(len(gram))
            _original(gram, *args)

        monkeypatch.setattr(ghost_kernels, part, noted)
    monkeypatch.setattr(ghost_kernels, "KEPT", 0)
    torch.testing.assert_close(example_gram(model, squares, x, y, chunk=chunk), whole, rtol=1e-10, atol=1e-12)
    assert max(held) == 2 * chunk


def test_chunks_that_run_again_keep_their_dropout_masks(monkeypatch):
    """Else a gradient would differ from pair to pair, and the matrix would be none of inner products."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1, bias=False)).double()
    x = torch.ones(12, 3, dtype=torch.float64)
    monkeypatch.setattr(ghost_kernels, "KEPT", 0)
    gram = example_gram(model, lambda outputs, labels: outputs.sum(), x, torch.zeros(12), chunk=2)
    values = torch.linalg.eigvalsh(gram)
    assert float(values[0]) > -1e-9 and float(values[8]) < 1e-9  # gradients of three entries: rank three
    assert float(gram.diagonal().max()) > float(gram.diagonal().min())


def test_frozen_parameters_are_left_out():
    model, x, y = build("cnn")
    for parameter in (model[0].weight, model[4].weight, model[7].bias):
        parameter.requires_grad_(False)
    G = loop_gradients(model, squares, x, y)
    assert relative_error(example_gram(model, squares, x, y), G @ G.T) < 1e-9
    assert example_gradients(model, squares, x, y).shape == G.shape
    assert not model[0].weight.requires_grad


def test_grams_of_disjoint_parameters_add_up():
    model, x, y = build("cnn")
    names = [name for name, _ in model.named_parameters()]
    parts = [example_gram(model, squares, x, y, parameters=part) for part in (names[:3], names[3:])]
    torch.testing.assert_close(sum(parts), example_gram(model, squares, x, y), rtol=1e-10, atol=1e-12)


def test_gram_adds_over_places_before_it_multiplies():
    """Products of flattened Gram matrices are another number for sequences."""
    model, x, y = build("linear-over-sequence")
    model.bias.requires_grad_(False)
    gram = example_gram(model, squares, x, y)
    outputs = model(x)
    (d,) = torch.autograd.grad(squares(outputs, y), outputs)
    flattened = (x.flatten(1) @ x.flatten(1).T) * (d.flatten(1) @ d.flatten(1).T)
    assert relative_error(flattened, gram) > 0.1


def test_loss_of_class_scores_works_with_index_labels():
    model, x, y = build("cnn")
    G = loop_gradients(model, cross_entropy, x, y)
    assert relative_error(example_gram(model, cross_entropy, x, y), G @ G.T) < 1e-9


def test_gram_follows_the_order_of_the_examples():
    model, x, y = build("cnn")
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    gram = example_gram(model, squares, x, y)
    permuted = example_gram(model, squares, x[order], y[order])
    torch.testing.assert_close(permuted, gram[order][:, order], rtol=1e-10, atol=1e-12)


def test_measuring_leaves_model_inputs_and_generators_as_they_were():
    model, x, y = build("cnn")
    model.insert(3, nn.Dropout(0.5))
    model.register_buffer("counter", torch.zeros(1))
    model.register_forward_pre_hook(lambda module, _: module.counter.add_(1) and None)
    model[0].weight.requires_grad_(False)
    model.train()
    model[7].eval()
    model[8].weight.grad = torch.ones_like(model[8].weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    ]
    modes = [m.training for m in model.modules()]
    x_before, y_before, random_state = x.clone(), y.clone(), torch.get_rng_state()
    with torch.no_grad():
        example_gram(model, squares, x, y)
    example_gradients(model, squares, x, y)
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.equal(x, x_before) and torch.equal(y, y_before)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert hooks == [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    ]
    assert modes == [m.training for m in model.modules()]
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 6
    assert torch.equal(model[8].weight.grad, torch.ones_like(model[8].weight)) and model[8].bias.grad is None


def test_dropout_draws_another_mask_for_every_example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(40, 1)).double()
    x, y = torch.ones(2, 40, dtype=torch.float64), torch.zeros(2)
    gram = example_gram(model, lambda outputs, labels: outputs.sum(), x, y)
    # weight gradients are masks times 2, bias gradients 1: equal masks would make all entries equal
    assert float(gram[0, 1]) < float(gram.diagonal().min())


def test_clipped_gram_is_the_gram_of_clipped_gradients():
    model, x, y = build("cnn")
    norms = example_gradients(model, squares, x, y).norm(dim=1)
    limit = float(norms.median())
    clipped = example_gradients(model, squares, x, y, clip_norm=limit)
    assert 0 < int((clipped.norm(dim=1) < limit * (1 - 1e-9)).sum()) < len(x)
    assert float(clipped.norm(dim=1).max()) <= limit * (1 + 1e-12)
    gram = clip_gram(example_gram(model, squares, x, y), limit)
    assert relative_error(gram, clipped @ clipped.T) < 1e-9


def test_a_zero_gradient_stays_zero_under_clipping():
    assert torch.equal(
        clip_gram(torch.diag(torch.tensor([0.0, 4.0])), 1.0), torch.diag(torch.tensor([0.0, 1.0]))
    )


def test_clipping_to_nothing_is_refused():
    with pytest.raises(ValueError, match="clipping norm is positive, got 0"):
        clip_gram(torch.eye(2), 0.0)


@pytest.mark.parametrize("measure", [example_gram, example_gradients])
def test_batch_statistics_are_refused(measure):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten())
    x, y = torch.randn(3, 1, 2, 2), torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"undefined where batch statistics couple .* layer '1' \(BatchNorm2d\)"
    ):
        measure(model, squares, x, y)


def test_batch_norm_with_running_statistics_is_measured():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten()).double().eval()
    x, y = torch.randn(3, 1, 2, 2, dtype=torch.float64), torch.zeros(3)
    G = loop_gradients(model, squares, x, y)
    assert relative_error(example_gram(model, squares, x, y), G @ G.T) < 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scale_grad_by_freq": True}, "scale_grad_by_freq"), ({"max_norm": 0.1}, "max_norm=0.1")],
)
def test_embeddings_that_depend_on_the_batch_are_refused(options, message):
    model = nn.Embedding(7, 5, **options)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        example_gram(model, squares, torch.randint(7, (3, 4)), torch.zeros(3))
    assert torch.equal(model.weight, before)


def test_bad_requests_are_refused():
    model, x, y = build("linear")
    with pytest.raises(ValueError, match="got 6 and 5"):
        example_gram(model, squares, x, y[:5])
    with pytest.raises(ValueError, match="got chunk=0"):
        example_gram(model, squares, x, y, chunk=0)
    with pytest.raises(ValueError, match="got wieght: choose from weight, bias"):
        example_gram(model, squares, x, y, parameters=["wieght"])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="needs a trainable parameter"):
        example_gradients(model, squares, x, y)
