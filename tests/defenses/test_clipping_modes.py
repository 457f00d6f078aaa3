"""Flat and per-layer clipping, by hooks and by ghost norms, against a loop over examples; secure noise."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPLSTM
from scipy.stats import chi2, kstest
from torch import Generator, nn

from fedaudit.accounting import Ledger
from fedaudit.defenses import ghost_clipping
from fedaudit.defenses.clipped_steps import clip_factors
from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.defenses.ghost_clipping import Products
from fedaudit.defenses.secure_noise import secure_gaussian
from fedaudit.errors import ConfigError
from fedaudit.registry import DEFENSES, is_repeatable
from fedaudit.spec import parse_spec
from fedaudit.training.local import TrainSettings, plan_batches, settings_in_round, train_locally
from fedaudit.types import StepRelease

SIZE = 5


class Scaled(nn.Module):
    """A parameter without dimensions, and one whose layer Opacus has no rule for."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return x * self.scale


class Tower(nn.Module):
    """Ghost norms and held gradients, a layer used twice, writes into activations, a frozen bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.GroupNorm(1, 3)
        self.second = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.wide = nn.Conv2d(3, 24, 3, stride=3)  # few places, many weights: ghost norms
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(24, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        start = self.relu(self.first(x))
        out = self.second(self.relu(self.second(self.norm(start))))
        out += start
        return self.head(self.wide(out).mean((2, 3)))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding="same"),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, dilation=1),
        nn.Flatten(2),
        nn.Conv1d(4, 2, 4, stride=2),
        nn.Flatten(),
        nn.LayerNorm(34),
        Scaled(),
        nn.Linear(34, 3),
    )


def tokens():
    """Linear layers over places: the first with few of them, the second with many for its size."""
    return nn.Sequential(
        nn.Unflatten(3, (2, 3)),
        nn.Flatten(1, 3),
        nn.Linear(3, 40),
        nn.Tanh(),
        nn.Linear(40, 2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.Tanh(), nn.Linear(6, 3))


MODELS = {"mlp": mlp, "tower": Tower, "convolutions": convolutions, "tokens": tokens}


def build(factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return factory()


def batch(size=SIZE):
    generator = Generator().manual_seed(3)
    return torch.randn(size, 1, 6, 6, generator=generator), torch.arange(size) % 3


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def one_by_one(model, x, y):
    """Gradients of each example, from a backward pass of its own."""
    return [
        torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), trainable(model))
        for i in range(len(x))
    ]


def naive_sum(gradients, clip_norm, clipping):
    total = [torch.zeros_like(g, dtype=torch.float64) for g in gradients[0]]
    for each in gradients:
        whole = math.sqrt(sum(float(g.double().square().sum()) for g in each))
        for i, g in enumerate(each):
            norm, largest = whole, clip_norm
            if clipping == "per-layer":
                norm, largest = float(g.double().norm()), clip_norm / math.sqrt(len(each))
            total[i] += g.double() * min(1.0, largest / norm)
    return total


def step(model, x, y, defense, *, noise=0.0, clip_norm=1.0, seed=0, expected=4):
    """What the optimizer is handed, times what the sum was divided by."""
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    release = StepRelease(clip_norm, noise, 0.5, per_layer=defense.clipping == "per-layer")
    private, stepper = defense.prepare(model, optimizer, release, expected, Generator().manual_seed(seed))
    try:
        stepper.zero_grad(set_to_none=True)
        if len(x):
            F.cross_entropy(private(x), y).backward()
        else:
            defense.empty_step(model)
        stepper.step()
        return [p.grad.clone() * expected for p in trainable(model)]
    finally:
        defense.restore(private)


@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
@pytest.mark.parametrize("grad_sample", ["hooks", "ghost", "auto", "ghost, nothing held"])
@pytest.mark.parametrize("name", MODELS)
def test_the_clipped_sum_equals_a_loop_over_examples(name, grad_sample, clipping, monkeypatch):
    if grad_sample.endswith("held"):  # norms of small layers are then computed as those of large ones
        monkeypatch.setattr(ghost_clipping, "HELD", 0)
        monkeypatch.setattr(ghost_clipping, "SMALL", 0)
        grad_sample = "ghost"
    model = build(MODELS[name])
    x, y = batch()
    gradients = one_by_one(model, x, y)
    norms = [math.sqrt(sum(float(g.square().sum()) for g in each)) for each in gradients]
    clip_norm = sorted(norms)[SIZE // 2]  # flat clipping shortens half of the examples
    defense = DPSGD(noise_multiplier=1.0, clipping=clipping, grad_sample=grad_sample)
    found = step(model, x, y, defense, clip_norm=clip_norm)
    for one, reference in zip(found, naive_sum(gradients, clip_norm, clipping), strict=True):
        torch.testing.assert_close(one.double(), reference, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
@pytest.mark.parametrize("name", MODELS)
def test_ghost_and_hooks_draw_the_same_noise_and_differ_by_rounding(name, clipping):
    x, y = batch()
    hooks, ghost = (
        step(build(MODELS[name]), x, y, DPSGD(clipping=clipping, grad_sample=kind), noise=1.0)
        for kind in ("hooks", "ghost")
    )
    for a, b in zip(hooks, ghost, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_per_layer_clipping_is_opacus_own_where_that_works():
    from opacus.optimizers import DPPerLayerOptimizer

    from fedaudit.defenses.per_example import PerExampleModule

    model, (x, y) = build(mlp), batch()
    mine = step(model, x, y, DPSGD(clipping="per-layer"), clip_norm=0.3, noise=0.7, expected=1)
    private = PerExampleModule(model)
    parameters = list(model.parameters())
    theirs = DPPerLayerOptimizer(
        torch.optim.SGD(parameters, lr=0.0),
        noise_multiplier=0.7 / 0.3,
        max_grad_norm=[0.3 / math.sqrt(len(parameters))] * len(parameters),
        expected_batch_size=1,
        generator=Generator().manual_seed(0),
    )
    F.cross_entropy(private(x), y).backward()
    theirs.step()
    for a, p in zip(mine, parameters, strict=True):
        torch.testing.assert_close(a, p.grad)


@pytest.mark.parametrize("grad_sample", ["hooks", "ghost"])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_under_per_layer_clipping_no_example_moves_the_sum_by_more_than_the_clip_norm(scale, grad_sample):
    model, (x, y) = build(mlp), batch()
    defense = DPSGD(clipping="per-layer", grad_sample=grad_sample)
    sums = [step(model, x[i:] * scale, y[i:], defense, clip_norm=0.1) for i in (0, 1)]
    change = [a - b for a, b in zip(*sums, strict=True)]
    assert 0.05 < float(torch.cat([c.flatten() for c in change]).norm()) <= 0.1 * (1 + 1e-5)
    assert max(float(c.norm()) for c in change) <= 0.1 / math.sqrt(4) * (1 + 1e-5)


def test_per_layer_clipping_has_the_same_release_and_guarantee_as_flat():
    flat, layers = DPSGD(epsilon=3.0), DPSGD(epsilon=3.0, clipping="per-layer")
    a, b = (d.release(100, 10, 50) for d in (flat, layers))
    assert (a.clip_norm, a.noise_std, a.sample_rate) == (b.clip_norm, b.noise_std, b.sample_rate)
    assert (a.per_layer, b.per_layer) == (False, True)
    assert str(b).endswith("per_layer=True)") and "per_layer" not in str(a)
    spent = [d.guarantee(d.charge(Ledger(), r, 50, 100), 100) for d, r in ((flat, a), (layers, b))]
    assert spent[0] == spent[1]


@pytest.mark.parametrize(
    "options", [{"clipping": "per-layer"}, {"grad_sample": "ghost"}, {"secure_rng": True}]
)
def test_noise_has_the_stated_deviation_in_every_mode_and_on_empty_batches(options):
    model = build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 60)))
    x, y = batch(0)
    noise = torch.cat([g.flatten() for g in step(model, x, y, DPSGD(**options), noise=2.0)]).double() / 2
    low, high = chi2.ppf([1e-4, 1 - 1e-4], noise.numel())
    assert low < float(noise.square().sum()) < high


@pytest.mark.parametrize("grad_sample", ["hooks", "ghost"])
def test_training_in_every_mode_leaves_no_trace_on_the_model(grad_sample):
    model, (x, y) = build(Tower), batch(12)
    before = {id(part): set(part.__dict__) for part in [*model.parameters(), *model.modules()]}
    defense = DPSGD(noise_multiplier=1.0, clipping="per-layer", grad_sample=grad_sample)
    settings = TrainSettings(lr=0.1, batch_size=1, local_steps=8)  # empty batches occur
    batches = plan_batches(12, settings, poisson=True, seed=1)
    assert not all(map(len, batches))
    release = defense.release(12, 1, 8)
    train_locally(
        model, x, y, batches, settings, defense=defense, release=release, generator=Generator().manual_seed(0)
    )
    assert {id(part): set(part.__dict__) for part in [*model.parameters(), *model.modules()]} == before
    assert all(not m._forward_hooks for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in build(Tower).parameters()
    ]


def test_ghost_norms_and_sums_are_those_of_the_gradients_themselves():
    generator = Generator().manual_seed(0)
    a, s = torch.randn(3, 7, 4, generator=generator), torch.randn(3, 7, 5, generator=generator)
    share = Products(a, s, torch.Size([5, 4]))
    rows = torch.stack([sum(torch.outer(s[b, t], a[b, t]) for t in range(7)) for b in range(3)])
    torch.testing.assert_close(share.norms(), rows.flatten(1).norm(dim=1))
    torch.testing.assert_close(share.rows(), rows)
    c = torch.tensor([0.5, 0.0, 2.0])
    torch.testing.assert_close(share.weighted(c), (c[:, None, None] * rows).sum(0))


def test_ghost_norms_are_not_understated_where_places_cancel():
    """Signals that cancel almost: in float32 the products would lose the norm altogether."""
    a = torch.ones(1, 2, 3)
    s = torch.tensor([[[1000.0], [-1000.0 + 2**-10]]])
    norm = Products(a, s, torch.Size([1, 3])).norms()
    assert float(norm) == pytest.approx(2**-10 * math.sqrt(3), rel=1e-4)


def test_clip_factors_are_at_most_one_and_per_layer_ones_ignore_other_layers():
    norms = torch.tensor([[0.1, 30.0], [0.0, 0.0]])
    assert clip_factors(norms, 1.0, per_layer=True)[0, 0] == 1.0
    assert clip_factors(norms, 1.0, per_layer=False)[0, 0] == pytest.approx(1 / 30, rel=1e-4)
    assert (clip_factors(norms, 1.0, per_layer=True)[1] == 1.0).all()


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.Linear(6, 6), nn.Linear(36, 3)

    def forward(self, x):
        return self.head(self.rows(x.flatten(0, 2)).reshape(len(x), -1))


def test_a_layer_that_sees_another_batch_is_refused():
    x, y = batch()
    with pytest.raises(ValueError, match=r"every layer's input is the batch, got sizes \[5, 30\]"):
        step(build(Mixed), x, y, DPSGD(grad_sample="ghost"))


class Overwrites(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, x):
        x = x.flatten(1) * 1.0
        out = self.linear(x)
        x.mul_(2.0)
        return out


def test_a_layer_whose_input_was_overwritten_is_refused_not_miscounted():
    x, y = batch()
    with pytest.raises(ValueError, match="in-place operation overwrote the input of a Linear"):
        step(build(Overwrites), x, y, DPSGD(grad_sample="ghost"))


@pytest.mark.parametrize(
    "options", [{"clipping": "per-layer"}, {"grad_sample": "ghost"}], ids=["hooks", "ghost"]
)
def test_gradients_are_used_once(options):
    model, (x, y) = build(mlp), batch()
    defense = DPSGD(**options)
    release = defense.release(10, 5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private, stepper = defense.prepare(model, optimizer, release, 5, Generator())
    F.cross_entropy(private(x), y).backward()
    stepper.step()
    with pytest.raises(ValueError, match="backward pass"):
        stepper.step()
    with pytest.raises(ValueError, match="one backward pass"):
        for _ in range(2):
            F.cross_entropy(private(x), y).backward()
        stepper.step()
    stepper.zero_grad(set_to_none=True)
    F.cross_entropy(private(x), y).backward()
    stepper.step()
    defense.restore(private)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = DPLSTM(6, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(x.squeeze(1))[0][:, -1])


def test_opacus_own_recurrent_layers_take_hooks_under_auto_and_are_refused_by_ghost():
    x, y = batch()
    with pytest.raises(ValueError, match=r"got one of opacus.layers: use grad-sample=hooks or auto"):
        step(build(Recurrent), x, y, DPSGD(grad_sample="ghost"))
    hooks, auto = (
        step(build(Recurrent), x, y, DPSGD(clipping="per-layer", grad_sample=kind))
        for kind in ("hooks", "auto")
    )
    assert all(torch.equal(a, b) for a, b in zip(hooks, auto, strict=True))


def test_an_unused_parameter_is_refused_by_ghosts():
    model = build(mlp)
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: nn.Sequential(*list(model)[:4])(x)
    x, y = batch()
    with pytest.raises(ValueError, match="every trainable parameter's gradient, got none for some"):
        step(model, x, y, DPSGD(grad_sample="ghost"))


def test_secure_noise_is_gaussian_and_needs_no_seed():
    noise = secure_gaussian((40, 500), 3.0)
    assert noise.dtype == torch.float64 and noise.shape == (40, 500)
    assert kstest(noise.flatten().numpy() / 3.0, "norm").pvalue > 1e-5
    assert not torch.equal(noise, secure_gaussian((40, 500), 3.0))
    assert secure_gaussian((), 1.0).shape == () and not secure_gaussian((3,), 0.0).any()


def test_secure_noise_is_half_the_sum_of_four_gaussians_of_the_given_bytes():
    raw = Generator().manual_seed(0)
    data = bytes(torch.randint(0, 256, (8 * 4 * 3,), generator=raw).tolist())
    noise = secure_gaussian((3,), 2.0, entropy=lambda size: data[:size])
    u = [(int.from_bytes(data[8 * i : 8 * i + 8], "little") >> 11) / 2**53 for i in range(12)]
    for i in range(3):
        pairs = ((u[i], u[6 + i]), (u[3 + i], u[9 + i]))
        four = [
            math.sqrt(-2 * math.log(1 - a)) * f(2 * math.pi * b)
            for a, b in pairs
            for f in (math.cos, math.sin)
        ]
        assert float(noise[i]) == pytest.approx(2.0 * sum(four) / 2, rel=1e-12)


def test_bytes_at_their_limits_give_finite_noise():
    assert secure_gaussian((5,), 1.0, entropy=lambda size: b"\xff" * size).isfinite().all()
    assert secure_gaussian((5,), 1.0, entropy=lambda size: b"\0" * size).isfinite().all()
    with pytest.raises(ValueError, match="a standard deviation is a number >= 0, got -1"):
        secure_gaussian((5,), -1.0)


def test_a_secure_run_cannot_be_repeated_and_needs_no_generator():
    model, (x, y) = build(mlp), batch()
    defense = DPSGD(secure_rng=True)
    assert not is_repeatable("dp-sgd(secure-rng=true)") and is_repeatable("dp-sgd(secure-rng=false)")
    first, again = (step(model, x, y, defense, noise=1.0, seed=1) for _ in range(2))
    assert not any(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private, _ = defense.prepare(model, optimizer, StepRelease(1.0, 1.0, 1.0), 4, None)
    defense.restore(private)


def test_secure_noise_is_drawn_from_the_operating_system(monkeypatch):
    from fedaudit.defenses import secure_noise

    asked = []
    monkeypatch.setattr(secure_noise.secure_gaussian, "__kwdefaults__", {
        "entropy": lambda size: asked.append(size) or os.urandom(size)
    })  # fmt: skip
    model, (x, y) = build(mlp), batch()
    step(model, x, y, DPSGD(secure_rng=True), noise=1.0)
    assert sum(asked) == 8 * 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "spec, message",
    [
        ("dp-sgd(clipping=global)", "'flat' or 'per-layer'"),
        ("dp-sgd(grad-sample=fast)", "'hooks', 'ghost' or 'auto'"),
        ("dp-sgd(secure-rng=maybe)", "valid boolean"),
        ("dp-sgd(lr=-1)", "lr must be a number >= 0, got -1"),
        ("dp-sgd(batch-size=-2)", "batch-size must be a number >= 0, got -2"),
    ],
)
def test_impossible_options_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        DEFENSES.build(parse_spec(spec))


def test_unknown_modes_are_refused_without_the_spec_grammar_too():
    with pytest.raises(ValueError, match="clipping must be flat or per-layer, got 'x'"):
        DPSGD(clipping="x")
    with pytest.raises(ValueError, match="grad-sample must be hooks, ghost or auto, got 'x'"):
        DPSGD(grad_sample="x")


def test_a_defense_has_clients_train_with_its_own_rate_and_batches_and_the_runs_decay():
    from fedaudit.config.sections import TrainConfig

    agreed = TrainConfig(lr=0.1, lr_decay=0.5, batch_size=16)
    own = DEFENSES.build(parse_spec("dp-sgd(lr=0.8, batch-size=4) then top-k(fraction=0.5)"))
    assert settings_in_round(agreed, own, 3) == TrainSettings(lr=0.2, batch_size=4)
    assert settings_in_round(agreed, DPSGD(lr=0.8), 1) == TrainSettings(lr=0.8, batch_size=16)
    assert settings_in_round(agreed, DPSGD(), 2) == TrainSettings(lr=0.05, batch_size=16)
