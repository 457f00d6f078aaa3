"""Gram matrices from a training step's own passes, against those of separate passes over the examples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedaudit.measures import in_run
from fedaudit.measures.ghost_kernels import example_gradients, example_gram
from fedaudit.measures.in_run import InRunGram
from fedaudit.models.build import build_model

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # attention in vmap


def cross_entropy(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="sum")


def squares(outputs, labels):
    return ((outputs.flatten(1).tanh() - labels[:, None]) ** 2).sum()


class TokensFirst(nn.Module):
    """Tokens before examples, then both joined in one dimension: the batch is never dimension 0 alone."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, x):  # (B, T, 4)
        tokens = self.norm(self.first(x.transpose(0, 1).tanh()))
        joined = self.second(tokens.flatten(0, 1).tanh())
        return joined.reshape(x.shape[1], x.shape[0], 2).sum(0)


class Frames(nn.Module):
    """Examples and frames joined in dimension 0, an example's frames together."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.GroupNorm(2, 4)

    def forward(self, x):  # (B, 3, 2, 7, 7)
        return self.norm(self.convolution(x.flatten(0, 1))).tanh().reshape(len(x), -1)


class Text(nn.Module):
    """An embedding with padding, and a linear layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 6)

    def forward(self, tokens):
        return self.layer(self.layer(self.embedding(tokens)).tanh()).sum(1)


def norms():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding="same"),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.GroupNorm(4, 20),
        nn.Linear(20, 3),
    )


MODELS = {
    "mlp": (lambda: build_model("mlp(hidden=20-12)", (1, 6, 6), 4, 0), (1, 6, 6)),
    "cnn-with-group-norm": (lambda: build_model("cnn(width=4)", (1, 8, 8), 4, 0), (1, 8, 8)),
    "lenet": (lambda: build_model("lenet", (3, 12, 12), 4, 0), (3, 12, 12)),
    "tokens-first": (TokensFirst, (3, 4)),
    "frames": (Frames, (3, 2, 7, 7)),
    "text": (Text, None),
    "norms": (norms, (2, 5)),
    "in-place-after-a-view": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(3, 4, 3),
            nn.InstanceNorm2d(4, affine=True),
            nn.ReLU(inplace=True),
        ),
        (2, 6, 6),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2, padding_mode="circular", padding=1)), (2, 3, 4, 3)),
}


def build(name, B=5, dtype=torch.float64):
    torch.manual_seed(2)
    factory, shape = MODELS[name]
    x = torch.randint(9, (B, 4)) if shape is None else torch.randn(B, *shape, dtype=dtype)
    return factory().to(dtype), x, torch.randint(2, (B,))


def loss_of(name):
    return cross_entropy if name in ("mlp", "cnn-with-group-norm", "lenet") else squares


def relative_error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("B", [1, 2, 5])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_gives_the_gram_of_separate_passes(name, B):
    model, x, y = build(name, B)
    loss = loss_of(name)
    expected = example_gram(model, loss, x, y)
    run = InRunGram(model)
    for _ in range(2):  # the second step needs no probe
        with run:
            loss(model(x), y).backward()
        assert relative_error(run.gram(), expected) < 1e-9


def test_single_precision_is_accurate():
    model, x, y = build("cnn-with-group-norm", 6, torch.float32)
    G = example_gradients(model, cross_entropy, x, y).double()
    with InRunGram(model) as run:
        cross_entropy(model(x), y).backward()
    assert run.gram().dtype == torch.float64
    assert relative_error(run.gram(), G @ G.T) < 1e-4


def test_a_mean_reduced_loss_is_rescaled_to_the_sum():
    model, x, y = build("mlp")
    with InRunGram(model, reduction="mean") as run:
        F.cross_entropy(model(x), y).backward()
    assert relative_error(run.gram(), example_gram(model, cross_entropy, x, y)) < 1e-9
    with pytest.raises(ValueError, match="reduction is 'sum' or 'mean', got 'none'"):
        InRunGram(model, reduction="none")


@pytest.mark.parametrize("name", MODELS)
def test_the_optimizer_sees_the_same_bits_with_and_without(name):
    gradients, states = [], []
    for watched in (False, True):
        model, x, y = build(name, dtype=torch.float32)
        model.train()
        torch.manual_seed(5)
        value_of = loss_of(name)
        if watched:
            with InRunGram(model):
                value_of(model(x), y).backward()
        else:
            value_of(model(x), y).backward()
        gradients.append([p.grad for p in model.parameters()])
        states.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_dropout_masks_are_those_of_the_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    kept = {}
    model[1].register_forward_hook(lambda module, inputs, output: kept.update(mask=output != 0))
    run = InRunGram(model)
    with run:
        model(x).sum().backward()
    hidden, mask = model[0](x), kept["mask"].double() * 2
    rows = []
    for i in range(4):
        value = model[2]((hidden[i] * mask[i])[None]).sum()
        gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    G = torch.stack(rows)
    assert relative_error(run.gram(), G @ G.T) < 1e-9


def test_no_pass_is_added_after_the_first_step():
    model, x, y = build("mlp")
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    run = InRunGram(model)
    for _ in range(3):
        with run:
            cross_entropy(model(x), y).backward()
    assert len(calls) == 3 + 2  # two of them with two examples each
    with run:
        cross_entropy(model(x[:3]), y[:3]).backward()
    assert len(calls) == 3 + 2 + 1 + 2


def test_frozen_and_unnamed_parameters_are_left_out():
    model, x, y = build("lenet")
    model.conv1.weight.requires_grad_(False)
    names = ["conv2.weight", "conv2.bias", "fc1.weight"]
    for chosen in (None, names):
        with InRunGram(model, parameters=chosen) as run:
            cross_entropy(model(x), y).backward()
        expected = example_gram(model, cross_entropy, x, y, parameters=chosen)
        assert relative_error(run.gram(), expected) < 1e-9
    with pytest.raises(ValueError, match=r"got conv1\.weight: choose from"):
        InRunGram(model, parameters=["conv1.weight"]).__enter__()


def test_a_layer_the_loss_does_not_depend_on_adds_nothing():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.never = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x), self.unused(x)

    model, x = Spare().double(), torch.randn(3, 4, dtype=torch.float64)
    with InRunGram(model) as run:
        model(x)[0].square().sum().backward()
    expected = example_gram(model, lambda outputs, _: outputs[0].square().sum(), x, x)
    assert relative_error(run.gram(), expected) < 1e-9


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), "self_attn.in_proj_weight"),
        (nn.Sequential(nn.Linear(4, 4), nn.PReLU()), "1.weight"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3).eval()), "1.weight, 1.bias"),
    ],
    ids=["attention", "bare-parameter", "batch-norm-in-eval"],
)
def test_parameters_without_a_ghost_kernel_are_named_and_refused(model, names):
    x = torch.randn(3, 3, 4)
    with pytest.raises(ValueError, match=f"none for {names}.*: measure with example_gram"), InRunGram(model):
        model(x)


def test_attention_is_measured_when_other_parameters_are_chosen():
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters() if "self_attn" not in name]
    with InRunGram(model, parameters=names) as run:
        squares(model(x), torch.zeros(3)).backward()
    expected = example_gram(model, squares, x, torch.zeros(3), parameters=names)
    assert relative_error(run.gram(), expected) < 1e-9


def test_recurrent_layers_are_refused_by_name():
    model = nn.LSTM(4, 3, batch_first=True)
    with pytest.raises(ValueError, match="none for weight_ih_l0, weight_hh_l0"), InRunGram(model):
        model(torch.randn(3, 5, 4))


def test_batch_statistics_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="batch statistics couple the examples"):
        InRunGram(model).__enter__()


def test_examples_that_depend_on_each_other_are_refused():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            hidden = self.layer(x)
            return hidden - hidden.mean(0)

    model = Centred()
    with pytest.raises(ValueError, match="an output that depends on another example"), InRunGram(model):
        model(torch.randn(3, 4))


def test_a_call_that_all_examples_share_is_refused():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.places, self.layer = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x + self.places(torch.arange(5)))

    model = Positions()
    with (
        pytest.raises(ValueError, match=r"none in the input of the embedding that uses places\.weight"),
        InRunGram(model),
    ):
        model(torch.randn(3, 5, 4))


def test_a_batch_of_equal_inputs_is_refused():
    model, x, _ = build("mlp")
    with pytest.raises(ValueError, match="got a batch of equal inputs"), InRunGram(model):
        model(torch.zeros_like(x))


def test_a_loss_that_uses_parameters_by_itself_is_noticed():
    model, x, y = build("mlp")
    with InRunGram(model) as run:
        (cross_entropy(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()
    with pytest.raises(ValueError, match="add up to the step's gradient"):
        run.gram()


def test_a_context_belongs_to_one_forward_and_one_backward_pass():
    model, x, y = build("mlp")
    run = InRunGram(model)
    with run, pytest.raises(ValueError, match="needs a forward and a backward pass within the context"):
        model(x)
        run.gram()
    with run, pytest.raises(ValueError, match="watches one call of the model, got a second"):
        model(x)
        model(x)
    with run:
        value = cross_entropy(model(x), y)
        value.backward(retain_graph=True)
        value.backward()
    with pytest.raises(ValueError, match="belongs to one backward pass"):
        run.gram()
    with run, pytest.raises(ValueError, match="entered once at a time"), run:
        pass


def test_nothing_stays_on_the_model():
    model, x, y = build("cnn-with-group-norm")
    with InRunGram(model):
        cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError), InRunGram(model):
        model(x[:, :, :2, :, None])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_layer_is_let_go_as_soon_as_it_is_counted():
    model, x, y = build("lenet")
    held = []
    original = in_run.add_share

    def noted(gram, name, uses, chunk):
        original(gram, name, uses, chunk)
        held.append(sum(heard.use is not None for heard in run._heard))

    run = InRunGram(model)
    with pytest.MonkeyPatch.context() as patch, run:
        patch.setattr(in_run, "add_share", noted)
        cross_entropy(model(x), y).backward()
    assert max(held) == 1
    assert not any(heard.use or heard.options for heard in run._heard)
