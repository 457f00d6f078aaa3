"""Sensitivity of gradients to inputs against explicit Jacobians, finite differences and the 1/B law."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss

import fedaudit.measures.sensitivity as module
from fedaudit.measures.probes import random_signs
from fedaudit.measures.sensitivity import FORWARD, REVERSE, batch_sensitivity, gradient_sensitivity
from fedaudit.models.build import build_model

C = 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def loss(outputs, labels):
    return cross_entropy(outputs, labels, reduction="sum")


def filled(model, seed=0):
    generator = seeded(seed)
    for p in model.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator)
    return model.double().eval()


class Reader(nn.Module):
    """A sequence (T, 4) through attention or a recurrent layer to logits."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.head = nn.Linear(4, C)

    def forward(self, x):
        features = self.body(x)
        return self.head((features[0] if isinstance(features, tuple) else features).mean(1))


NETS = {
    "relu": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, C)),
    "tanh": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, C)
    ),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.MaxPool2d((1, 2)),
        nn.Flatten(),
        nn.Linear(24, C),
    ),
    "attention": lambda: Reader(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)),
    "lstm": lambda: Reader(nn.LSTM(4, 4, batch_first=True)),
}
each_net = pytest.mark.parametrize("name", NETS)


def examples(B=4, seed=1):
    generator = seeded(seed)
    x = torch.randn(B, 3, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(C, (B,), generator=generator)


def own(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def layer_of(name):
    return name.rpartition(".")[0]


def by_layer(parts, layers):
    """Squared norms (..., L) of per-parameter pieces {name: (...)}."""
    return torch.stack([sum(v for n, v in parts.items() if layer_of(n) == layer) for layer in layers], -1)


def explicit_jacobians(model, x, y, function=loss):
    """Per parameter (B, P, D): torch.func.jacrev of the gradient of each example."""

    def gradient(row, label):
        def value(p):
            return function(functional_call(model, p, (row.reshape(1, *x.shape[1:]),)), label[None])

        return grad(value)(own(model))

    with sdpa_kernel(SDPBackend.MATH):
        rows = [jacrev(gradient)(a.flatten(), b) for a, b in zip(x, y, strict=True)]
    return {n: torch.stack([r[n].reshape(-1, x[0].numel()) for r in rows]) for n in own(model)}


@pytest.mark.parametrize("name", [name for name in NETS if name != "lstm"])
def test_products_are_those_of_the_explicit_jacobian_layer_by_layer(name):
    model, (x, y) = filled(NETS[name]()), examples()
    J = explicit_jacobians(model, x, y)
    v = random_signs(x, 5, seeded(7)).flatten(2)
    found = gradient_sensitivity(model, loss, x, y, 5, seeded(7))
    expected = {n: torch.einsum("bpd,bkd->kbp", j, v).square().sum(2) for n, j in J.items()}
    torch.testing.assert_close(found.squares, by_layer(expected, found.layers).mT, rtol=1e-9, atol=1e-13)
    assert found.method == FORWARD
    assert set(found.layers) == {layer_of(n) for n, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["relu", "tanh", "cnn"])
def test_the_mean_over_probes_is_the_frobenius_norm_within_its_variance(name):
    model, (x, y) = filled(NETS[name]()), examples(3)
    J = explicit_jacobians(model, x, y)
    n = 400
    found = gradient_sensitivity(model, loss, x, y, n, seeded(3))
    for place, layer in enumerate(found.layers):
        joined = torch.cat([j for name, j in J.items() if layer_of(name) == layer], 1)
        M = joined.mT @ joined
        truth = M.diagonal(dim1=1, dim2=2).sum(1)
        variance = 2 * (M.square().sum((1, 2)) - M.diagonal(dim1=1, dim2=2).square().sum(1)) / n
        deviations = (found.squares[:, place].mean(0) - truth) / variance.sqrt()
        assert float(deviations.abs().max()) < 4
        # the root's standard error follows from the square's: sd(s^2) / (2 s)
        expected = variance.sqrt() / (2 * truth.sqrt())
        assert float((found.absolute().standard_error[place] / expected - 1).abs().max()) < 0.4


@each_net
def test_finite_differences_of_the_gradient_give_the_same_products(name):
    model, (x, y) = filled(NETS[name]()), examples(2)
    v, h = random_signs(x, 2, seeded(4)), 1e-5

    def gradient(row, label):
        value = loss(model(row[None]), label[None])
        return dict(zip(own(model), torch.autograd.grad(value, list(model.parameters())), strict=True))

    found = gradient_sensitivity(model, loss, x, y, 2, seeded(4))
    for b in range(2):
        for k in range(2):
            up, down = (gradient(x[b] + sign * h * v[b, k], y[b]) for sign in (1, -1))
            parts = {n: ((up[n] - down[n]) / (2 * h)).square().sum() for n in up}
            expected = by_layer(parts, found.layers)
            torch.testing.assert_close(found.squares[k, :, b], expected, rtol=1e-5, atol=1e-9)


def test_a_recurrent_net_takes_turns_and_says_so():
    model, (x, y) = filled(NETS["lstm"]()), examples(2)
    found = gradient_sensitivity(model, loss, x, y, 2, seeded())
    assert found.method == REVERSE
    assert bool((found.squares > 0).all())


def refuse_forward_mode(*arguments):
    raise RuntimeError("no forward mode here")


@pytest.mark.parametrize("name", ["relu", "cnn", "attention"])
def test_both_ways_give_the_same_numbers(name, monkeypatch):
    model, (x, y) = filled(NETS[name]()), examples()
    forward = gradient_sensitivity(model, loss, x, y, 3, seeded())
    monkeypatch.setattr(module, "_forward_over_reverse", refuse_forward_mode)
    reverse = gradient_sensitivity(model, loss, x, y, 3, seeded())
    assert (forward.method, reverse.method) == (FORWARD, REVERSE)
    torch.testing.assert_close(reverse.squares, forward.squares, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(reverse.gradient_squares, forward.gradient_squares, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_do_not_change_the_numbers(chunk):
    model, (x, y) = filled(NETS["cnn"]()), examples(5)
    whole = gradient_sensitivity(model, loss, x, y, 3, seeded())
    parts = gradient_sensitivity(model, loss, x, y, 3, seeded(), chunk=chunk)
    torch.testing.assert_close(parts.squares, whole.squares, rtol=1e-10, atol=1e-13)


def test_a_model_too_large_for_one_pass_takes_turns_with_the_same_numbers(monkeypatch):
    model, (x, y) = filled(NETS["tanh"]()), examples()
    whole = gradient_sensitivity(model, loss, x, y, 3, seeded())
    monkeypatch.setattr(module, "_NUMBERS", 100)
    parts = gradient_sensitivity(model, loss, x, y, 3, seeded())
    assert parts.method == REVERSE
    torch.testing.assert_close(parts.squares, whole.squares, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [("cnn(width=4)", (1, 8, 8)), ("lenet", (3, 8, 8)), ("alexnet(hidden=8)", (3, 16, 16))],
    ids=["cnn", "lenet", "alexnet"],
)
def test_the_reference_models_are_measured_as_finite_differences_say(spec, shape):
    model = build_model(spec, shape, C, seed=0).double().eval()
    generator = seeded(2)
    x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    y = torch.tensor([1])
    found = gradient_sensitivity(model, loss, x, y, 2, seeded(4))
    v, h = random_signs(x, 2, seeded(4))[:, 1], 1e-6
    up, down = (
        torch.autograd.grad(loss(model(x + sign * h * v), y), list(model.parameters())) for sign in (1, -1)
    )
    parts = {n: ((a - b) / (2 * h)).square().sum() for n, a, b in zip(own(model), up, down, strict=True)}
    torch.testing.assert_close(found.squares[1, :, 0], by_layer(parts, found.layers), rtol=1e-4, atol=1e-12)


def mean_gradient_jacobian(model, x, y):
    """d gbar / dX (P, B, D) by jacrev of the mean loss's gradient."""

    def gradient(flat):
        def value(p):
            return cross_entropy(functional_call(model, p, (flat.reshape(x.shape),)), y)

        return grad(value)(own(model))

    J = jacrev(gradient)(x.flatten(1))
    return torch.cat([j.reshape(-1, len(x), x[0].numel()) for j in J.values()])


@pytest.mark.parametrize("name", ["tanh", "cnn"])
def test_a_mean_gradients_response_to_one_example_falls_as_one_over_the_batch_size(name):
    model, (x, y) = filled(NETS[name]()), examples(8)
    alone = torch.cat(list(explicit_jacobians(model, x, y).values()), 1).square().sum((1, 2)).sqrt()
    for B in (2, 4, 8):
        in_batch = mean_gradient_jacobian(model, x[:B], y[:B]).square().sum((0, 2)).sqrt()
        torch.testing.assert_close(in_batch, alone[:B] / B, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("name", ["tanh", "cnn"])
def test_batch_products_are_those_of_the_mean_gradients_explicit_jacobian(name):
    model, (x, y) = filled(NETS[name]()), examples(6)
    J = mean_gradient_jacobian(model, x, y)
    v = random_signs(x, 4, seeded(5)).flatten(2)
    found = batch_sensitivity(model, loss, x, y, 4, seeded(5)).whole()
    expected = torch.einsum("pbd,bkd->kp", J, v).square().sum(1)
    torch.testing.assert_close(found.squares.flatten(), expected, rtol=1e-9, atol=0.0)
    assert float(found.input_norms) == pytest.approx(float(x.norm()))


def test_a_batchs_response_is_the_root_of_its_examples_squares_over_the_batch_size():
    model, (x, y) = filled(NETS["tanh"]()), examples(16)
    n = 300
    alone = torch.cat(list(explicit_jacobians(model, x, y).values()), 1).square().sum((1, 2))
    for B in (1, 4, 16):
        J = mean_gradient_jacobian(model, x[:B], y[:B]).flatten(1)
        M = J.T @ J
        variance = 2 * float(M.square().sum() - M.diagonal().square().sum()) / n
        found = batch_sensitivity(model, loss, x[:B], y[:B], n, seeded(B)).whole().squares.mean()
        assert float(found) == pytest.approx(float(alone[:B].sum()) / B**2, abs=4 * math.sqrt(variance))


def test_relative_sensitivity_is_that_of_the_explicit_parts_and_ignores_the_losss_scale():
    model, (x, y) = filled(NETS["relu"]()), examples()
    found = gradient_sensitivity(model, loss, x, y, 4, seeded())
    scaled = gradient_sensitivity(model, lambda o, t: 1e-3 * loss(o, t), x, y, 4, seeded())
    torch.testing.assert_close(scaled.relative().mean, found.relative().mean, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(scaled.absolute().mean, 1e-3 * found.absolute().mean, rtol=1e-10, atol=0.0)
    gradients = torch.autograd.grad(loss(model(x[:1]), y[:1]), list(model.parameters()))
    length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    whole = found.whole()
    expected = float(whole.absolute().mean[0, 0]) * float(x[0].norm()) / length
    assert float(whole.relative().mean[0, 0]) == pytest.approx(expected, rel=1e-12)
    share = whole.absolute().standard_error / whole.absolute().mean
    torch.testing.assert_close(whole.relative().standard_error / whole.relative().mean, share)


def test_a_linear_model_with_squared_loss_has_its_known_sensitivity():
    """g = (w x - t) x: J = (w x - t) I + x w^T, of squared norm D r^2 + 2 r (w x) + |x|^2 |w|^2."""
    model = filled(nn.Sequential(nn.Flatten(), nn.Linear(12, 1, bias=False)))
    x, _ = examples(3)
    t = torch.tensor([[0.3], [-1.0], [2.0]], dtype=torch.float64)
    n = 2000
    found = gradient_sensitivity(model, lambda o, y: (o - y).square().sum() / 2, x, t, n, seeded())
    w, out = model[1].weight.detach()[0], model(x).detach()
    r = (out - t)[:, 0]
    truth = 12 * r**2 + 2 * r * out[:, 0] + x.flatten(1).square().sum(1) * w.square().sum()
    assert float(((found.squares[:, 0].mean(0) - truth) / (2 * truth**2 / n).sqrt()).abs().max()) < 4


def test_a_zero_gradient_that_moves_is_infinitely_sensitive_and_one_that_does_not_is_not_at_all():
    model = filled(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
    model[0].bias.data.fill_(-100.0)  # all units are off: only the last bias has a gradient
    x = torch.ones(1, 2, dtype=torch.float64)
    found = gradient_sensitivity(model, lambda o, y: o.exp().sum(), x, torch.ones(1), 2, seeded())
    assert found.relative().mean.tolist() == [[0.0], [0.0]]
    line = filled(nn.Linear(2, 1, bias=False))
    target = line(x).detach()
    found = gradient_sensitivity(line, lambda o, y: (o - y).square().sum(), x, target, 2, seeded())
    assert found.relative().mean.tolist() == [[math.inf]]
    assert float(found.absolute().mean) > 0


def test_frozen_layers_are_left_out():
    model, (x, y) = filled(NETS["relu"]()), examples()
    everything = gradient_sensitivity(model, loss, x, y, 2, seeded())
    model[1].requires_grad_(False)
    found = gradient_sensitivity(model, loss, x, y, 2, seeded())
    assert found.layers == ("3",)
    torch.testing.assert_close(found.squares[:, 0], everything.squares[:, 1])


def test_the_two_uses_of_a_shared_weight_count_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(12, 12, bias=False)
            self.b = nn.Linear(12, 12, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x.flatten(1))))

    model, (x, y) = filled(Tied()), examples(2)
    J = explicit_jacobians(model, x, y)["a.weight"]
    v = random_signs(x, 2, seeded()).flatten(2)
    found = gradient_sensitivity(model, loss, x, y, 2, seeded())
    assert found.layers == ("a",)
    expected = torch.einsum("bpd,bkd->kbp", J, v).square().sum(2)
    torch.testing.assert_close(found.squares[:, 0], expected, rtol=1e-9, atol=0.0)


def test_measuring_changes_neither_model_nor_inputs_nor_global_random_state():
    model, (x, y) = filled(NETS["cnn"]()), examples()
    before = [t.clone() for t in (x, *model.state_dict().values())]
    state = torch.get_rng_state()
    gradient_sensitivity(model, loss, x, y, 2, seeded())
    batch_sensitivity(model, loss, x, y, 2, seeded())
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *model.state_dict().values()), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class OnceOnly(torch.autograd.Function):
    """An operation whose gradient cannot be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, signal):
        return 2 * signal


class Once(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 1)

    def forward(self, x):
        return OnceOnly.apply(self.line(x).tanh())


@pytest.mark.parametrize("measured", [gradient_sensitivity, batch_sensitivity])
@pytest.mark.parametrize(
    ("model", "x", "probes", "message"),
    [
        (nn.Linear(2, 1), torch.ones(2, 2), 2, "at least one, got 2 and 3"),
        (nn.Linear(2, 1), torch.ones(3, 2, dtype=torch.int64), 2, "continuous inputs, got torch.int64"),
        (nn.Linear(2, 1), torch.ones(3, 2), 1, "probes must be at least 2, got 1"),
        (nn.Linear(2, 1).requires_grad_(False), torch.ones(3, 2), 2, "needs a trainable parameter, got none"),
        (nn.BatchNorm1d(2).train(), torch.ones(3, 2), 2, "batch statistics couple the examples"),
        (nn.LSTM(2, 1, 2, dropout=0.5), torch.ones(3, 2), 2, r"nothing at random, got layer '' \(LSTM\)"),
        (Once(), torch.ones(3, 2), 2, "differentiable twice, also by the input, got from torch"),
    ],
    ids=["lengths", "tokens", "probes", "frozen", "batch-norm", "dropout", "once"],
)
def test_what_has_no_sensitivity_is_refused(measured, model, x, probes, message):
    with pytest.raises(ValueError, match=message):
        measured(
            model, lambda o, y: mse_loss(o[:, 0], y, reduction="sum"), x, torch.ones(3), probes, seeded()
        )
