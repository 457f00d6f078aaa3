import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn

from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.defenses.none import NoDefense
from fedaudit.training.local import (
    TrainSettings,
    client_seed,
    evaluate,
    plan_batches,
    steps_per_round,
    train_locally,
)
from fedaudit.types import ClientUpdate, RoundContext, StepRelease


def data(n=12, seed=0):
    generator = Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "n, settings, steps",
    [
        (100, TrainSettings(batch_size=16), 7),
        (96, TrainSettings(batch_size=16, local_epochs=3), 18),
        (5, TrainSettings(batch_size=16, local_epochs=2), 2),
        (5, TrainSettings(batch_size=2, local_epochs=2, local_steps=4), 4),
    ],
)
@pytest.mark.parametrize("poisson", [False, True])
def test_a_plan_has_the_agreed_number_of_steps(n, settings, steps, poisson):
    assert steps_per_round(n, settings) == steps
    assert len(plan_batches(n, settings, poisson=poisson, seed=1)) == steps
    context = RoundContext(
        round=1,
        local_steps=settings.local_steps,
        local_epochs=settings.local_epochs,
        batch_size=settings.batch_size,
    )
    assert context.steps(ClientUpdate(0, 1, {}, {}, n)) == steps


def test_an_epoch_uses_every_example_once_in_a_new_order():
    batches = plan_batches(10, TrainSettings(batch_size=4, local_epochs=2), poisson=False, seed=3)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = torch.cat(batches[:3]), torch.cat(batches[3:])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert first.tolist() != second.tolist()


def test_local_steps_go_on_to_the_next_epoch_and_stop_there():
    batches = plan_batches(10, TrainSettings(batch_size=4, local_steps=5), poisson=False, seed=3)
    epochs = plan_batches(10, TrainSettings(batch_size=4, local_epochs=2), poisson=False, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(batches, epochs[:5], strict=True))
    assert len(batches) == 5


def test_poisson_batches_include_every_example_independently_at_the_stated_rate():
    n, steps, q = 50, 2000, 0.1
    plan = plan_batches(n, TrainSettings(batch_size=5, local_steps=steps), poisson=True, seed=5)
    included = torch.zeros(steps, n, dtype=torch.float64)
    for step, batch in enumerate(plan):
        assert batch.dtype == torch.int64
        included[step, batch] = 1
    counts = included.sum(0)
    deviation = math.sqrt(steps * q * (1 - q))
    assert float((counts - steps * q).abs().max()) < 4.5 * deviation  # 50 examples, p < 1e-3
    sizes = included.sum(1)
    variance = n * q * (1 - q)
    assert float(sizes.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / steps))
    assert float(sizes.mean()) == pytest.approx(n * q, abs=4 * math.sqrt(variance / steps))


def test_poisson_batches_of_a_small_client_hold_all_examples():
    plan = plan_batches(4, TrainSettings(batch_size=8, local_steps=3), poisson=True, seed=0)
    assert [batch.tolist() for batch in plan] == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("poisson", [False, True])
def test_a_plan_can_be_derived_again_from_its_seed_alone(poisson):
    settings = TrainSettings(batch_size=4, local_epochs=2)
    torch.rand(7)  # the global generator plays no part
    first, again, other = (plan_batches(20, settings, poisson=poisson, seed=s) for s in (8, 8, 9))
    assert [b.tolist() for b in first] == [b.tolist() for b in again]
    assert [b.tolist() for b in first] != [b.tolist() for b in other]


def test_noise_from_a_generator_with_the_plans_seed_is_another_stream():
    n, seed = 64, 11
    plan = plan_batches(n, TrainSettings(batch_size=32, local_steps=1), poisson=True, seed=seed)
    same_stream = (torch.rand(n, generator=Generator().manual_seed(seed)) < 0.5).nonzero().flatten()
    assert plan[0].tolist() != same_stream.tolist()


def test_client_seeds_differ_in_half_of_their_bits_for_any_change():
    grid = [(s, c, r) for s in range(4) for c in (0, 1, 2, 2**40, 2**63 - 1) for r in range(8)]
    seeds = [client_seed(*key) for key in grid]
    assert len(set(seeds)) == len(grid)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert client_seed(1, 2, 3) != client_seed(3, 2, 1) != client_seed(2, 1, 3)
    flips = [bin(a ^ b).count("1") for a, b in pairwise(seeds)]
    deviation = math.sqrt(63 / 4 / len(flips))
    assert sum(flips) / len(flips) == pytest.approx(31.5, abs=4 * deviation)
    assert client_seed(7, 8, 9) == client_seed(7, 8, 9)


@pytest.mark.parametrize("momentum, decay, mu", [(0, 0, 0), (0.9, 0.01, 0), (0, 0, 0.5), (0.5, 0.1, 2.0)])
def test_plain_training_equals_a_loop_written_from_the_formulas(momentum, decay, mu):
    x, y = data()
    settings = TrainSettings(
        lr=0.2, momentum=momentum, weight_decay=decay, batch_size=5, local_epochs=3, proximal_mu=mu
    )
    batches = plan_batches(len(x), settings, poisson=False, seed=1)
    model, naive = network(), network()

    parameters = list(naive.parameters())
    start = [p.detach().clone() for p in parameters]
    velocity = [torch.zeros_like(p) for p in parameters]
    losses = []
    for batch in batches:
        batch_loss = F.cross_entropy(naive(x[batch]), y[batch])
        losses.append(batch_loss.item() * len(batch))
        proximal = sum((p - p0).square().sum() for p, p0 in zip(parameters, start, strict=True)) * mu / 2
        gradients = torch.autograd.grad(batch_loss + proximal, parameters)
        with torch.no_grad():
            for p, g, v in zip(parameters, gradients, velocity, strict=True):
                v.mul_(momentum).add_(g + decay * p)
                p.sub_(0.2 * v)

    result = train_locally(model, x, y, batches, settings)
    torch.testing.assert_close(weights(model), weights(naive), rtol=1e-5, atol=1e-6)
    assert (result.steps, result.examples_seen) == (9, 36)
    assert result.loss == pytest.approx(sum(losses) / 36, rel=1e-5)


def test_adam_equals_torchs_own():
    x, y = data()
    settings = TrainSettings(optimizer="adam", lr=0.01, weight_decay=0.1, batch_size=4, local_epochs=2)
    batches = plan_batches(len(x), settings, poisson=False, seed=1)
    model, reference = network(), network()
    optimizer = torch.optim.Adam(reference.parameters(), lr=0.01, weight_decay=0.1, foreach=False)
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(reference(x[batch]), y[batch]).backward()
        optimizer.step()
    train_locally(model, x, y, batches, settings)
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-5, atol=1e-6)


def test_no_defense_is_the_same_as_none_given():
    x, y = data()
    settings = TrainSettings(batch_size=4)
    batches = plan_batches(len(x), settings, poisson=False, seed=1)
    model, other = network(), network()
    train_locally(model, x, y, batches, settings)
    train_locally(other, x, y, batches, settings, defense=NoDefense(), release=StepRelease(None, 0.0, 1 / 3))
    assert torch.equal(weights(model), weights(other))


@pytest.mark.parametrize("settings", [
    TrainSettings(batch_size=12, local_epochs=5, lr=0.3, momentum=0.9, weight_decay=0.01, proximal_mu=0.7),
    TrainSettings(optimizer="adam", batch_size=12, local_epochs=5, lr=0.01),
], ids=["sgd", "adam"])  # fmt: skip
def test_private_training_without_noise_on_full_batches_is_plain_training(settings):
    x, y = data()
    batches = plan_batches(len(x), settings, poisson=True, seed=1)
    private, plain = network(), network()
    release = StepRelease(clip_norm=1e4, noise_std=0.0, sample_rate=1.0)
    result = train_locally(private, x, y, batches, settings, defense=DPSGD(), release=release)
    reference = train_locally(plain, x, y, batches, settings)
    torch.testing.assert_close(weights(private), weights(plain), rtol=1e-4, atol=1e-5)
    assert result.loss == pytest.approx(reference.loss, rel=1e-4)


def test_private_steps_divide_by_the_expected_batch_size_not_the_actual_one():
    x, y = data(8)
    settings = TrainSettings(lr=1.0, batch_size=4, local_steps=1)
    model, naive = network(), network()
    train_locally(
        model, x, y, [torch.tensor([0])], settings, defense=DPSGD(), release=StepRelease(1e4, 0.0, 0.5)
    )
    F.cross_entropy(naive(x[:1]), y[:1]).backward()
    expected = torch.cat([(p - p.grad / 4).detach().flatten() for p in naive.parameters()])
    torch.testing.assert_close(weights(model), expected, rtol=1e-5, atol=1e-6)


def test_a_private_run_moves_the_weights_by_no_more_than_clipping_allows():
    x, y = data(20)
    settings = TrainSettings(lr=0.5, batch_size=5, local_steps=6)
    batches = plan_batches(20, settings, poisson=True, seed=2)
    model, start = network(), weights(network())
    train_locally(model, x, y, batches, settings, defense=DPSGD(), release=StepRelease(0.01, 0.0, 0.25))
    moved = float((weights(model) - start).norm())
    assert 0 < moved <= 0.5 * 0.01 * sum(len(b) for b in batches) / 5 * (1 + 1e-5)


def test_private_training_is_repeatable_and_its_noise_seeded():
    x, y = data(20)
    settings = TrainSettings(lr=0.5, batch_size=5, local_epochs=2)
    defense = DPSGD(epsilon=5.0)
    release = defense.release(20, 5, 8)
    batches = plan_batches(20, settings, poisson=True, seed=2)
    trained = []
    for seed in (1, 1, 2):
        model = network()
        generator = Generator().manual_seed(seed)
        train_locally(model, x, y, batches, settings, defense=defense, release=release, generator=generator)
        trained.append(weights(model))
    assert torch.equal(trained[0], trained[1])
    assert not torch.allclose(trained[0], trained[2])


def test_an_empty_batch_is_a_private_step_with_noise_and_without_nan():
    x, y = data(10)
    settings = TrainSettings(lr=1.0, batch_size=2, local_steps=3)
    empty = torch.empty(0, dtype=torch.int64)
    model, start = network(), weights(network())
    result = train_locally(
        model, x, y, [empty, torch.tensor([3]), empty], settings,
        defense=DPSGD(), release=StepRelease(1.0, 1.0, 0.2), generator=Generator().manual_seed(0),
    )  # fmt: skip
    assert (result.steps, result.examples_seen) == (3, 1)
    assert math.isfinite(result.loss)
    moved = weights(model) - start
    assert torch.isfinite(moved).all()
    # three noises of deviation 1 on the sum, divided by 2: variance 3/4; clipping adds at most 1/2
    assert float(moved.norm()) == pytest.approx(math.sqrt(0.75 * moved.numel()), rel=0.3)


def test_only_empty_batches_leave_plain_weights_alone_and_have_no_loss():
    x, y = data(10)
    model, start = network(), weights(network())
    empty = torch.empty(0, dtype=torch.int64)
    result = train_locally(model, x, y, [empty, empty], TrainSettings(batch_size=2))
    assert (result.steps, result.examples_seen) == (2, 0)
    assert math.isnan(result.loss)
    assert torch.equal(weights(model), start)


def test_an_error_in_a_step_leaves_no_hooks_behind():
    x, y = data(10)
    model = network()

    def fails(outputs, labels):
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        train_locally(
            model, x, y, [torch.arange(5)], TrainSettings(), loss=fails,
            defense=DPSGD(), release=StepRelease(1.0, 0.0, 0.5),
        )  # fmt: skip
    assert not any(m._forward_hooks or hasattr(m, "activations") for m in model.modules())
    train_locally(model, x, y, [torch.arange(5)], TrainSettings())


def test_training_changes_only_the_model_and_leaves_it_without_gradients():
    x, y = data()
    before = x.clone(), y.clone()
    model = network()
    release = StepRelease(1.0, 1.0, 0.5)
    generator = Generator().manual_seed(0)
    train_locally(
        model, x, y, [torch.arange(6)], TrainSettings(), defense=DPSGD(), release=release, generator=generator
    )
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert all(p.grad is None for p in model.parameters())
    copy.deepcopy(model)  # Opacus' attributes on parameters would break this


def test_a_frozen_layer_stays_as_it_is_with_and_without_a_defense():
    x, y = data()
    for defense, release in ((None, None), (DPSGD(), StepRelease(1.0, 0.0, 0.5))):
        model = network()
        model[0].requires_grad_(False)
        start = [p.detach().clone() for p in model.parameters()]
        train_locally(model, x, y, [torch.arange(6)], TrainSettings(), defense=defense, release=release)
        changed = [not torch.equal(p, p0) for p, p0 in zip(model.parameters(), start, strict=True)]
        assert changed == [False, False, True, True]


def test_a_defense_without_its_release_is_refused():
    x, y = data()
    with pytest.raises(ValueError, match="defense 'dp-sgd' needs a release, got None"):
        train_locally(network(), x, y, [], TrainSettings(), defense=DPSGD())


def test_evaluation_does_not_depend_on_its_batches_nor_change_the_mode():
    x, y = data(11)
    model = nn.Sequential(nn.Dropout(0.5), network())
    model.train()
    loss, accuracy = evaluate(model, x, y, batch_size=4)
    assert model.training
    model.eval()
    outputs = model(x)
    assert loss == pytest.approx(F.cross_entropy(outputs, y).item(), rel=1e-6)
    assert accuracy == float((outputs.argmax(1) == y).double().mean())
    assert evaluate(model, x, y) == pytest.approx((loss, accuracy))
    assert not model.training


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: TrainSettings(lr=0), "lr must be > 0, got 0"),
        (lambda: TrainSettings(optimizer="lbfgs"), "optimizer must be sgd or adam, got 'lbfgs'"),
        (lambda: TrainSettings(optimizer="adam", momentum=0.9), "momentum belongs to sgd, got 0.9 with adam"),
        (lambda: TrainSettings(batch_size=0), "batch_size must be >= 1, got 0"),
        (lambda: TrainSettings(local_epochs=0), "local_epochs must be >= 1, got 0"),
        (lambda: TrainSettings(proximal_mu=-1), "proximal_mu must be >= 0, got -1"),
        (
            lambda: plan_batches(0, TrainSettings(), poisson=False, seed=0),
            "at least one example to train, got 0",
        ),
        (lambda: evaluate(network(), torch.empty(0, 6), torch.empty(0)), "at least one example, got 0"),
    ],
)
def test_impossible_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("private", [False, True])
def test_training_on_a_gpu_agrees_with_the_cpu(private):
    x, y = data()
    settings = TrainSettings(batch_size=4, local_epochs=2, momentum=0.9, proximal_mu=0.1)
    batches = plan_batches(len(x), settings, poisson=private, seed=1)
    defense, release = (DPSGD(), StepRelease(0.5, 0.0, 1 / 3)) if private else (None, None)
    models = []
    for device in ("cpu", "cuda"):
        model = network()
        train_locally(model, x, y, batches, settings, defense=defense, release=release, device=device)
        assert next(model.parameters()).device.type == device
        models.append(weights(model).cpu())
        assert evaluate(model, x, y)[0] > 0
    torch.testing.assert_close(models[0], models[1], rtol=1e-4, atol=1e-5)
