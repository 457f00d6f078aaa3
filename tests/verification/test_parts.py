"""The single tests against closed forms and simulation, and claims against what they derive from."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, ncx2

from fedaudit.claims import (
    HOLDS,
    UNCHECKED,
    VIOLATED,
    ClipNorm,
    EpsilonClaim,
    GaussianNoise,
    NothingBeside,
    PoissonSampling,
    QuantizationLevels,
    Sparsity,
    Weights,
)
from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.training.local import TrainSettings, plan_batches, train_locally
from fedaudit.types import ClientUpdate, StepRelease
from fedaudit.verification import verify_round
from fedaudit.verification.derive import step_claims, step_weights
from fedaudit.verification.epsilon import epsilon_of, gaussian_epsilon
from fedaudit.verification.noise import (
    correlation_interval,
    crowding_p_value,
    exceeding,
    scale_interval,
    shape_p_value,
)
from fedaudit.verification.sampling import sampling_p_values

from . import federation as f

REPEATS, LEVEL = 400, 0.05
MOST = int(binom.isf(1e-4, REPEATS, LEVEL))  # more misses than this have probability 1e-4


@pytest.mark.parametrize("signal", [0.0, 5.0, 40.0])
def test_the_interval_of_the_noise_misses_no_more_often_than_its_level(signal):
    source = np.random.default_rng(0)
    misses = 0
    for _ in range(REPEATS):
        direction = source.normal(size=300)
        z = signal * direction / np.linalg.norm(direction) + source.normal(size=300)
        low, high = scale_interval(float(np.linalg.norm(z)), 300, LEVEL, signal=signal)
        misses += not low <= 1 <= high
    assert misses <= MOST


def test_the_limit_from_above_is_the_noncentral_chi_square():
    for size, signal in ((10, 2.0), (1000, 30.0), (100_000, 100.0)):
        norm = math.sqrt(size + signal**2 + 3 * math.sqrt(2 * (size + 2 * signal**2)))
        assert exceeding(norm, size, signal) == pytest.approx(ncx2.sf(norm**2, size, signal**2), rel=1e-6)


def test_a_signal_that_may_be_everything_leaves_no_lower_end():
    assert scale_interval(10.0, 100, LEVEL, signal=20.0)[0] == 0
    assert scale_interval(10.0, 100, LEVEL, signal=math.inf)[0] == 0


def test_noised_coordinates_crowd_no_more_often_than_the_level_whatever_the_signal():
    source = np.random.default_rng(1)
    signals = (0.0, np.round(source.normal(size=500)), source.normal(size=500) * 50)
    p_values = [crowding_p_value(s + source.normal(size=500)) for s in signals for _ in range(REPEATS // 4)]
    assert sum(p <= LEVEL for p in p_values) <= MOST


def test_the_shape_test_is_that_of_kolmogorov_and_smirnov():
    from scipy.stats import kstest

    z = np.random.default_rng(2).normal(size=700)
    assert shape_p_value(z) == pytest.approx(kstest(z, "norm").pvalue, rel=1e-9)
    assert shape_p_value(math.sqrt(12) * (np.random.default_rng(3).random(5000) - 0.5)) < 1e-6


def test_the_interval_of_a_correlation_covers_it_for_any_signals():
    source, size = np.random.default_rng(4), 400
    for correlation in (0.0, 0.4, -0.7):
        misses = 0
        for _ in range(REPEATS):
            shared, own = source.normal(size=size), source.normal(size=size)
            x = shared
            y = correlation * shared + math.sqrt(1 - correlation**2) * own
            x, y = x + np.linspace(-1, 1, size), y + np.linspace(0, 1, size)
            low, high = correlation_interval(x @ x, y @ y, x @ y, size, LEVEL)
            misses += not low <= correlation <= high
        assert misses <= MOST


def test_poisson_batches_pass_and_shuffled_ones_do_not():
    settings, n = TrainSettings(batch_size=10, local_epochs=3), 100
    alarms = 0
    for seed in range(REPEATS // 4):
        sampled = plan_batches(n, settings, poisson=True, seed=seed)
        alarms += min(sampling_p_values(sampled, n, 0.1).values()) <= LEVEL / 3
        if seed < 20:
            shuffled = plan_batches(n, settings, poisson=False, seed=seed)
            assert min(sampling_p_values(shuffled, n, 0.1).values()) < 1e-9
    assert alarms <= MOST


def test_the_exact_epsilon_of_gaussian_releases_inverts_their_delta():
    from scipy.stats import norm

    for sigma, steps, delta in ((0.3, 1, 1e-5), (1.0, 1, 1e-5), (5.0, 100, 1e-6)):
        eps, mu = gaussian_epsilon(sigma, delta, steps), math.sqrt(steps) / sigma
        assert norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) == pytest.approx(
            delta, rel=1e-4
        )
    claim = EpsilonClaim(5.0, 1e-5, "example", "rdp", 1.0)
    assert epsilon_of(claim) == pytest.approx(4.729, rel=1e-2)  # the reference value for rdp
    assert epsilon_of(claim, 1e-9) == math.inf


def test_weights_of_steps_are_those_of_torch_sgd():
    weight = torch.zeros(1, requires_grad=True)
    for position in range(4):
        weight.data.zero_()
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.7)
        for step in range(4):
            weight.grad = torch.tensor([float(step == position)]) + 0.3 * weight.detach()  # a proximal pull
            optimizer.step()
        assert -weight.item() / 0.1 == pytest.approx(step_weights(4, 0.7, pull=0.1 * 0.3)[position], rel=1e-5)


def released(number, *, momentum=0.0, multiplier=1.0, applied=1.0, steps=4):
    """An update of real DP-SGD with `applied` times the noise that is claimed."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3))
    x = torch.randn(60, 40, generator=f.generator("x"))
    y = torch.randint(3, (60,), generator=f.generator("y"))
    settings = TrainSettings(lr=0.2, momentum=momentum, batch_size=6, local_steps=steps)
    defense = DPSGD(noise_multiplier=multiplier, epsilon=0.0)
    release = defense.release(60, 6, steps)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_locally(
        model,
        x,
        y,
        plan_batches(60, settings, poisson=True, seed=number),
        settings,
        defense=defense,
        release=StepRelease(release.clip_norm, release.noise_std * applied, release.sample_rate),
        generator=torch.Generator().manual_seed(number),
    )
    delta = {name: tensor - before[name] for name, tensor in model.state_dict().items()}
    claims, unstated = step_claims(release, settings, 60, steps)
    assert not unstated
    return claims, ClientUpdate(number, 1, before, delta, 60)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_real_dp_sgd_has_the_noise_that_its_claims_derive(momentum):
    claims, update = released(3, momentum=momentum)
    findings = verify_round(claims, [update])
    (noise,) = [x for x in findings if isinstance(x.claim, GaussianNoise)]
    (clip,) = [x for x in findings if isinstance(x.claim, ClipNorm)]
    assert noise.verdict != VIOLATED and noise.low <= noise.claim.std <= noise.high
    assert noise.measured == pytest.approx(noise.claim.std, rel=0.15)  # 1323 entries: 2 % and some signal
    assert clip.verdict == UNCHECKED and "a client or an oracle" in clip.reason


def test_dp_sgd_with_half_the_claimed_noise_is_found_by_the_server():
    claims, update = released(3, applied=0.5, multiplier=2.0)
    (noise,) = [x for x in verify_round(claims, [update]) if isinstance(x.claim, GaussianNoise)]
    assert noise.verdict == VIOLATED and noise.high < noise.claim.std


def test_a_signal_larger_than_the_noise_leaves_the_server_without_a_verdict():
    claims, update = released(3, multiplier=0.05)
    (noise,) = [x for x in verify_round(claims, [update]) if isinstance(x.claim, GaussianNoise)]
    assert noise.verdict == UNCHECKED and "an oracle that can compute the noise-free update" in noise.reason


@pytest.mark.parametrize(
    ("optimizer", "why"), [({"optimizer": "adam"}, "Adam"), ({"weight_decay": 0.1}, "decay")]
)
def test_an_update_that_is_no_sum_of_gradients_states_no_noise(optimizer, why):
    claims, unstated = step_claims(StepRelease(1.0, 1.0, 0.1), TrainSettings(**optimizer), 100, 5)
    assert not any(isinstance(claim, GaussianNoise) for claim in claims)
    assert why in unstated[0].reason


def one(claim, change, before=None, **options):
    before = f.weights_of(1) if before is None else before
    update = f.received(1, 0, change, before)
    (finding,) = verify_round([claim], [update], **options)
    return finding


def sparse(kept):
    source = f.generator("sparse")
    chosen = {}
    for name, tensor in f.signal(1, 0).items():
        order = torch.randperm(tensor.numel(), generator=source)
        mask = torch.zeros(tensor.numel(), dtype=torch.bool)
        mask[order[: math.ceil(kept * tensor.numel())]] = True
        chosen[name] = tensor * mask.reshape(tensor.shape)
    return chosen


def test_sparsity_is_counted():
    assert one(Sparsity(0.1), sparse(0.1)).verdict == HOLDS
    dense = one(Sparsity(0.1), sparse(0.15))
    assert dense.verdict == VIOLATED and dense.measured == pytest.approx(0.15, abs=0.01)


def rounded(levels, span=1.0):
    """Entries of about N(0, 1), clamped and rounded to evenly spaced levels in [0, span]."""
    loud = f.scaled(f.signal(1, 0), 20.0)
    return {
        n: span * ((t.clamp(-1, 1) + 1) / 2 * (levels - 1)).round() / (levels - 1) for n, t in loud.items()
    }


def test_levels_are_counted_beyond_rounding():
    assert one(QuantizationLevels(4), rounded(4)).verdict == HOLDS
    more = one(QuantizationLevels(4), rounded(16))
    assert more.verdict == VIOLATED and more.measured == 16
    lost = one(QuantizationLevels(256), rounded(256, span=1e-6), f.scaled(f.weights_of(1), 30.0))
    assert lost.verdict == UNCHECKED and "as coarse as the levels" in lost.reason


def test_the_server_cannot_see_sampling_and_the_oracle_can():
    settings = TrainSettings(batch_size=10, local_epochs=3)
    change, claim = f.signal(1, 0), PoissonSampling(0.1)
    assert one(claim, change).verdict == UNCHECKED
    for poisson, verdict in ((True, HOLDS), (False, VIOLATED)):
        batches = plan_batches(100, settings, poisson=poisson, seed=5)
        found = one(claim, change, batches={0: batches}, observer="oracle")
        assert found.verdict == verdict and found.observer == "oracle"


def test_reports_that_are_not_public_are_named():
    before = f.weights_of(1)
    loud = f.received(1, 0, f.signal(1, 0), before, **{"train-loss": 0.3})
    (finding,) = verify_round([NothingBeside()], [loud])
    assert finding.verdict == VIOLATED and "train-loss" in finding.reason


def test_an_observer_of_global_weights_alone_can_refute_noise_and_affirm_it():
    before = f.weights_of(1)
    mean = f.clip(f.signal(1, 0))
    claims = [ClipNorm(f.C), Weights(), GaussianNoise(0.1, on="aggregate")]
    for std, verdict in ((0.1, HOLDS), (0.04, VIOLATED)):
        after = f.applied(before, f.plus(mean, f.draw(f.generator("a"), std)))
        weights, noise = verify_round(claims, [], after, before)
        assert noise.verdict == verdict and weights.verdict == UNCHECKED
        assert "the server, which receives them" in weights.reason


def test_plain_averages_are_told_apart_exactly():
    before = f.weights_of(1)
    signals, examples = [f.signal(1, i) for i in range(f.N)], [50, 40, 30, 20, 10]
    updates = [f.received(1, i, s, before, n) for i, (s, n) in enumerate(zip(signals, examples, strict=True))]
    after = f.applied(before, f.mean(signals, [n / 150 for n in examples]))
    for rule, verdict in (("num-examples", HOLDS), ("uniform", VIOLATED)):
        (finding,) = verify_round([Weights(rule)], updates, after)
        assert finding.verdict == verdict and finding.measured == pytest.approx(1 / 3, abs=1e-3)
    (capped,) = verify_round([Weights("num-examples", cap=0.25)], updates, after)
    assert capped.verdict == VIOLATED and "one client weighs 0.3333" in capped.reason


def test_a_weight_that_fits_no_rule_is_found():
    before = f.weights_of(1)
    signals = [f.signal(1, i) for i in range(f.N)]
    updates = [f.received(1, i, s, before) for i, s in enumerate(signals)]
    after = f.applied(before, f.mean(signals, [0.6, 0.1, 0.1, 0.1, 0.1]))
    (finding,) = verify_round([Weights("uniform")], updates, after)
    assert finding.verdict == VIOLATED and finding.measured == pytest.approx(0.6, abs=1e-3)


def test_a_stated_epsilon_below_its_own_mechanism_is_found():
    claim = EpsilonClaim(1.0, 1e-5, "client", "analytic", 1.0)
    assert (
        one(claim, f.signal(1, 0)).reason
        == "the mechanism as described has epsilon 4.377, more than is stated"
    )
    unmeasured = one(EpsilonClaim(4.4, 1e-5, "client", "analytic", 1.0), f.signal(1, 0))
    assert unmeasured.verdict == UNCHECKED


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ClipNorm(0.0), "norm must be a number > 0, got 0.0"),
        (lambda: GaussianNoise(-1.0), "std must be a number > 0"),
        (lambda: GaussianNoise(1.0, signal=-1.0), "signal must be >= 0 or None"),
        (lambda: Sparsity(1.5), r"kept must lie in \(0, 1\]"),
        (lambda: QuantizationLevels(1), "levels must be >= 2"),
        (lambda: EpsilonClaim(1.0, 1.0, "client", "rdp", 1.0), r"delta must lie in \(0, 1\)"),
        (lambda: EpsilonClaim(1.0, 1e-5, "client", "analytic", 1.0, 0.1), "knows no sampling"),
        (lambda: verify_round([], []), "a round is judged by updates or by a broadcast"),
        (lambda: verify_round([], [], broadcast={}, alpha=0.0), r"alpha must lie in \(0, 1\)"),
        (lambda: gaussian_epsilon(0.0, 1e-5), "no noise, no epsilon"),
        (lambda: sampling_p_values([], 5, 0.1), "judged by at least one batch"),
    ],
)
def test_impossible_claims_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
