import pytest
import torch
import torch.nn.functional as F
from opacus.accountants import RDPAccountant
from scipy.stats import chi2
from torch import Generator, nn

from fedaudit.accounting import Ledger, epsilon, noise_multiplier_for
from fedaudit.defenses.base import Defense
from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.errors import BudgetExhaustedError, ConfigError
from fedaudit.registry import DEFENSES
from fedaudit.spec import parse_spec
from fedaudit.types import Guarantee, StepRelease


class Residual(nn.Module):
    """Writes into activations in both ways that residual networks do, and uses a layer twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        identity = self.first(x)
        out = self.second(self.relu(self.norm(identity)))
        out = self.norm(self.second(out))
        out += identity
        return self.head(self.relu(out).flatten(1))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(seed=0, size=6):
    generator = Generator().manual_seed(seed)
    return (
        torch.randn(size, 1, 4, 4, generator=generator),
        torch.randint(0, 3, (size,), generator=generator),
    )


def build(factory, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory()


def clipped_sum(model, x, y, clip_norm):
    """Sum of the examples' clipped gradients, one backward pass for each; and the norms."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    norms = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        norms.append(float(norm))
        for t, g in zip(total, gradients, strict=True):
            t += g * min(1.0, clip_norm / float(norm))
    return total, norms


def private_gradients(model, x, y, release, expected, seed=0):
    """The gradients that the optimizer is handed after clipping, noise and division."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    defense = DPSGD(noise_multiplier=1.0)
    private, stepper = defense.prepare(model, optimizer, release, expected, Generator().manual_seed(seed))
    stepper.zero_grad(set_to_none=True)
    if len(x):
        F.cross_entropy(private(x), y).backward()
    else:
        defense.empty_step(model)
    stepper.step()
    gradients = [p.grad.clone() for p in model.parameters()]
    defense.restore(private)
    return gradients


@pytest.mark.parametrize("factory", [mlp, Residual])
def test_without_noise_a_step_is_the_sum_of_clipped_gradients(factory):
    model = build(factory)
    x, y = batch()
    _, norms = clipped_sum(model, x, y, 1.0)
    clip_norm = sorted(norms)[len(norms) // 2]  # clips half of the examples
    expected_sum, _ = clipped_sum(model, x, y, clip_norm)
    gradients = private_gradients(model, x, y, StepRelease(clip_norm, 0.0, 0.5), expected=4)
    for gradient, reference in zip(gradients, expected_sum, strict=True):
        torch.testing.assert_close(gradient, reference / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_no_example_moves_the_sum_by_more_than_the_clip_norm(scale):
    model = build(mlp)
    x, y = batch()
    release = StepRelease(0.1, 0.0, 0.5)
    with_it = private_gradients(model, x * scale, y, release, expected=1)
    without = private_gradients(model, x[1:] * scale, y[1:], release, expected=1)
    change = torch.cat([(a - b).flatten() for a, b in zip(with_it, without, strict=True)]).norm()
    assert float(change) <= 0.1 * (1 + 1e-5)
    assert float(change) > 0.05


def test_noise_on_the_sum_has_the_stated_deviation_in_every_layer():
    model = build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2000), nn.Tanh(), nn.Linear(2000, 3)))
    x, y = batch()
    release = StepRelease(clip_norm=0.5, noise_std=1.5, sample_rate=0.5)
    reference, _ = clipped_sum(model, x, y, 0.5)
    gradients = private_gradients(model, x, y, release, expected=4)
    for gradient, clean in zip(gradients, reference, strict=True):
        z = (gradient * 4 - clean).double() / 1.5
        low, high = chi2.ppf([1e-4, 1 - 1e-4], z.numel())
        assert low < float(z.square().sum()) < high
        assert abs(float(z.mean())) < 4 / z.numel() ** 0.5


def test_an_empty_batch_is_a_step_of_noise_alone():
    model = build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 500)))
    x, y = batch(size=0)
    noise = torch.cat([g.flatten() for g in private_gradients(model, x, y, StepRelease(1.0, 2.0, 0.1), 4)])
    low, high = chi2.ppf([1e-4, 1 - 1e-4], noise.numel())
    assert low < float((noise.double() * 4 / 2.0).square().sum()) < high


def test_noise_depends_on_the_generators_seed_alone():
    x, y = batch()
    release = StepRelease(1.0, 1.0, 0.5)
    first, again, other = (private_gradients(build(mlp), x, y, release, 4, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_restoring_leaves_no_trace_on_the_model():
    model = build(Residual)
    before = {id(p): set(p.__dict__) for p in model.parameters()}
    attributes = {id(m): set(m.__dict__) for m in model.modules()}
    for _ in range(2):  # the same instance serves the next client
        private_gradients(model, *batch(), StepRelease(1.0, 1.0, 0.5), 4)
    defense = DPSGD()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private, _ = defense.prepare(model, optimizer, StepRelease(1.0, 0.0, 1.0), 4, None)
    private(batch()[0])  # a step cut short after its forward pass
    defense.restore(private)
    assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())
    assert {id(p): set(p.__dict__) for p in model.parameters()} == before
    assert {id(m): set(m.__dict__) for m in model.modules()} == attributes


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False), nn.InstanceNorm2d(2, track_running_stats=True)],
    ids=["batch-norm", "batch-norm without weights", "running statistics"],
)
def test_layers_that_mix_examples_are_refused(layer):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), layer, nn.Flatten(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"but it has {type(layer).__name__}: replace the layer"):
        DPSGD().prepare(model, optimizer, StepRelease(1.0, 1.0, 1.0), 4, Generator())


def test_noise_without_a_generator_is_refused():
    model = build(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"needs a torch.Generator on cpu for its noise, got none"):
        DPSGD().prepare(model, optimizer, StepRelease(1.0, 1.0, 1.0), 4, None)
    with pytest.raises(ValueError, match="got a release without one"):
        DPSGD().prepare(model, optimizer, StepRelease(None, 0.0, 1.0), 4, Generator())


def test_the_noise_meets_the_target_after_the_planned_steps():
    defense = DPSGD(epsilon=3.0, clip_norm=2.0)
    release = defense.release(num_examples=200, batch_size=20, planned_steps=50)
    assert release.sample_rate == 0.1
    assert release.noise_std == 2.0 * noise_multiplier_for(3.0, 1e-5, 0.1, 50)
    guarantee = defense.guarantee(defense.charge(Ledger(), release, 50, 200), 200)
    assert guarantee == Guarantee(guarantee.epsilon, 1e-5, "example", "rdp")
    assert 0.99 * 3.0 < guarantee.epsilon <= 3.0


def test_a_small_client_takes_all_examples_in_every_step():
    assert DPSGD(noise_multiplier=1.0).release(5, batch_size=8, planned_steps=1).sample_rate == 1.0


@pytest.mark.parametrize("sigma, examples, batch_size, steps, rounds", [
    (1.0, 600, 32, 19, 10),
    (0.7, 100, 10, 10, 5),
    (2.0, 8, 8, 1, 40),
])  # fmt: skip
def test_a_clients_epsilon_after_its_rounds_is_opacus_for_all_its_steps(
    sigma, examples, batch_size, steps, rounds
):
    defense = DPSGD(epsilon=0.0, noise_multiplier=sigma)
    release = defense.release(examples, batch_size, steps * rounds)
    ledger, reference = Ledger(), RDPAccountant()
    for _ in range(rounds):
        # between rounds the ledger travels as plain lists
        ledger = Ledger.from_lists(defense.charge(ledger, release, steps, examples).to_lists())
        for _ in range(steps):
            reference.step(noise_multiplier=sigma, sample_rate=batch_size / examples)
    guarantee = defense.guarantee(ledger, examples)
    assert guarantee.epsilon == pytest.approx(reference.get_epsilon(guarantee.delta), rel=1e-9)


def test_a_client_stops_before_its_budget_is_exceeded():
    defense = DPSGD(epsilon=2.0)
    release = defense.release(num_examples=100, batch_size=10, planned_steps=30)
    ledger = Ledger()
    for _ in range(3):
        ledger = defense.charge(ledger, release, 10, 100)
    message = r"1 more steps would raise the client's epsilon from (1.99\d*|2) to 2\.0.*budget of 2 at delta"
    with pytest.raises(BudgetExhaustedError, match=message):
        defense.charge(ledger, release, 1, 100)
    assert ledger.steps == 30


def test_fixed_noise_with_a_target_stops_at_the_target():
    defense = DPSGD(epsilon=1.0, noise_multiplier=1.0)
    release = defense.release(num_examples=100, batch_size=10, planned_steps=1000)
    assert release.noise_std == 1.0
    with pytest.raises(BudgetExhaustedError, match="above its budget of 1 "):
        defense.charge(Ledger(), release, 1000, 100)


def test_without_a_target_a_client_may_go_on():
    defense = DPSGD(epsilon=0.0, noise_multiplier=0.5)
    release = defense.release(100, 10, 1)
    assert defense.guarantee(defense.charge(Ledger(), release, 5000, 100), 100).epsilon > 100


@pytest.mark.parametrize("examples, delta", [(10, 1e-5), (10_000, 1e-5), (50_000, 2e-6)])
def test_the_default_delta_is_shared_by_clients_up_to_ten_thousand_examples(examples, delta):
    assert DPSGD().delta_for(examples) == pytest.approx(delta)
    assert DPSGD().guarantee(Ledger(), examples) == Guarantee(
        0.0, DPSGD().delta_for(examples), "example", "rdp"
    )


def test_a_delta_that_allows_publishing_an_example_is_refused():
    assert DPSGD(delta=1e-3).delta_for(100) == 1e-3
    with pytest.raises(ValueError, match=r"under 1 / examples = 0.001, got 0.001"):
        DPSGD(delta=1e-3).release(1000, 10, 10)
    with pytest.raises(ValueError, match="at least one example, got 0"):
        DPSGD().delta_for(0)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("dp-sgd(epsilon=0)", "epsilon > 0 or noise-multiplier > 0, got 0 for both"),
        ("dp-sgd(epsilon=-1)", "epsilon must be a number >= 0, got -1.0"),
        ("dp-sgd(noise-multiplier=-1)", "noise-multiplier must be a number >= 0, got -1.0"),
        ("dp-sgd(clip-norm=0)", "clip-norm must be a number > 0, got 0.0"),
        ("dp-sgd(delta=1)", r"delta must lie in \[0, 1\), got 1.0"),
        ("dp-sgd(accountant=gdp)", "'rdp', 'prv' or 'pld'"),
    ],
)
def test_impossible_options_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        DEFENSES.build(parse_spec(spec))


def test_an_unknown_accountant_is_refused_without_the_spec_grammar_too():
    with pytest.raises(ValueError, match="accountant must be rdp, prv or pld, got 'gdp'"):
        DPSGD(accountant="gdp")


def test_the_registry_builds_it_from_its_spec():
    defense = DEFENSES.build(parse_spec("dp-sgd(epsilon=4, clip-norm=0.5, accountant=pld)"))
    assert defense == DPSGD(epsilon=4.0, clip_norm=0.5, accountant="pld")
    assert isinstance(defense, Defense)
    assert defense.poisson
    ledger = Ledger().add(1.0, 0.1, 10)
    assert defense.guarantee(ledger, 100).epsilon == epsilon(ledger, 1e-5, "pld")
