"""What verification sees of Flower's own privacy code, defect by defect."""

import numpy as np
import pytest
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import strategy as flower

from fedaudit.claims import (
    HOLDS,
    UNCHECKED,
    VIOLATED,
    AdaptiveClipping,
    ClipNorm,
    EpsilonClaim,
    GaussianNoise,
    IndependentNoise,
    NothingBeside,
    Weights,
)
from fedaudit.verification import NoiseMemory, verify_round
from fedaudit.verification.derive import adaptive_claims, central_claims, local_dp_claims, strategy_claims

from . import flower_rounds as f


def broken(findings):
    return {type(x.claim) for x in findings if x.verdict == VIOLATED}


def of(findings, kind, verdict=VIOLATED):
    return [x for x in findings if isinstance(x.claim, kind) and x.verdict == verdict]


def verify_rounds(claims, seen, weights, **options):
    memory = NoiseMemory()
    return [
        x
        for number, updates in seen.items()
        for x in verify_round(claims, updates, weights[number], memory=memory, **options)
    ]


@pytest.mark.parametrize("side", ["Server", "Client"])
def test_fixed_clipping_passes_where_none_of_its_defects_bites(side):
    app = f.client_app([fixedclipping_mod] if side == "Client" else [], scale=0.0)
    seen, weights = f.run(f.fixed(0.05, 0.5, side), app)
    findings = verify_rounds(central_claims(0.5, 0.05, f.N, by_server=side == "Server"), seen, weights)
    assert not broken(findings), [str(x) for x in findings if x.verdict == VIOLATED]
    for kind in (ClipNorm, GaussianNoise, Weights):
        assert of(findings, kind, HOLDS), kind


def test_the_claims_of_a_wrapper_follow_from_its_name_in_a_configuration():
    name = "DifferentialPrivacyServerSideFixedClipping(noise-multiplier=0.05, clipping-norm=0.5)"
    assert strategy_claims(name, clients=f.N, fraction_train=1.0) == central_claims(0.5, 0.05, f.N)
    name = "DifferentialPrivacyClientSideAdaptiveClipping(noise-multiplier=1, clipped-count-stddev=4)"
    built = strategy_claims(name, clients=f.N, fraction_train=1.0)
    assert built == adaptive_claims(0.1, 1.0, f.N, count_std=4.0, by_server=False)
    (noise,) = [claim for claim in built if isinstance(claim, GaussianNoise)]
    assert noise.std == pytest.approx(f.adaptive(1.0, 0.1).noise_multiplier * 0.1 / f.N)


@pytest.mark.parametrize("length", [0.3, 3.0], ids=["all within", "all clipped"])
def test_adaptive_clipping_moves_the_wrong_way(length):
    """Defect 1: the share of clipped updates stands where the share of unclipped ones belongs."""
    strategy = f.adaptive(0.05, 1.0, count_std=0.1)
    norms = [strategy.clipping_norm]
    seen, weights = f.run(
        strategy, f.client_app(length=length), before_round=lambda _: norms.append(strategy.clipping_norm)
    )
    claims = [AdaptiveClipping(0.5, 0.2, 0.1)]
    (finding,) = verify_round(claims, seen[1], weights[1], clip_norms=(norms[1], norms[2]))
    assert finding.verdict == VIOLATED and "the norm moves the wrong way" in finding.reason
    assert (norms[2] > norms[1]) == (length < 1)  # up when nothing is clipped, down when everything is


def test_an_adaptive_norm_that_moves_as_published_is_accepted():
    seen, weights = f.run(f.fixed(0.05, 1.0), f.client_app(length=3.0), rounds=1)
    following = 1.0 * np.exp(-0.2 * (0.0 - 0.5))
    (finding,) = verify_round(
        [AdaptiveClipping(0.5, 0.2, 0.1)], seen[1], weights[1], clip_norms=(1.0, following)
    )
    assert finding.verdict == HOLDS
    (unknown,) = verify_round([AdaptiveClipping()], seen[1], weights[1])
    assert unknown.verdict == UNCHECKED


@pytest.mark.parametrize("side", ["Server", "Client"])
def test_a_scalar_is_never_clipped(side):
    """Defect 2: the scalar moves by 1000 under a clip norm of 1."""
    app = f.client_app([fixedclipping_mod] if side == "Client" else [], scale=1000.0)
    seen, weights = f.run(f.fixed(0.05, 1.0, side), app, rounds=1)
    findings = verify_rounds(central_claims(1.0, 0.05, f.N, by_server=side == "Server"), seen, weights)
    clip = of(findings, ClipNorm)
    assert clip and all("'scale'" in x.reason for x in clip)
    assert max(x.measured for x in clip) == pytest.approx(1000, rel=0.01)


@pytest.mark.parametrize("side", ["Server", "Client"])
def test_adaptive_clipping_adds_the_noise_of_another_clip_norm(side):
    """Defect 3: the norm is moved before the noise is scaled with it."""
    strategy = f.adaptive(1.0, 0.1, side, count_std=0.6, lr=0.5)
    app = f.client_app([adaptiveclipping_mod] if side == "Client" else [], length=3.0, scale=0.0)
    seen, weights = f.run(strategy, app, rounds=1)
    claims = adaptive_claims(0.1, 1.0, f.N, count_std=0.6, lr=0.5, by_server=side == "Server")
    findings = verify_rounds(claims, seen, weights)
    (noise,) = of(findings, GaussianNoise)
    assert noise.measured / noise.claim.std == pytest.approx(strategy.clipping_norm / 0.1, rel=0.1)
    assert noise.high < noise.claim.std
    other = strategy.noise_multiplier * strategy.clipping_norm / f.N  # what was really added
    assert of(
        verify_rounds([*claims[:2], GaussianNoise(other, on="aggregate")], seen, weights),
        GaussianNoise,
        HOLDS,
    )


def test_arrays_are_paired_by_position_instead_of_by_name():
    """Defect 4: a reply with its keys reversed is clipped against the wrong arrays."""
    arrays = f.ArrayRecord(
        {name: f.Array(np.full(200, value, np.float32)) for name, value in (("a", 10), ("z", -10))}
    )
    app = f.client_app(length=0.05, order=True)
    seen, weights = f.run(f.fixed(0.05, 0.5), app, rounds=1, arrays=arrays)
    findings = verify_rounds(central_claims(0.5, 0.05, f.N), seen, weights)
    assert max(float(np.linalg.norm(u.flat)) for u in seen[1]) < 0.5  # nothing was there to be clipped
    (noise,) = of(findings, GaussianNoise)
    assert noise.low > 500 * noise.claim.std  # 20 / 8 on every entry, where the noise has std 0.003
    assert all("more than a mixture" in x.reason for x in of(findings, ClipNorm, UNCHECKED))
    assert not of(findings, ClipNorm, HOLDS) and not of(findings, Weights, HOLDS)


def test_weights_by_num_examples_exceed_the_assumed_sensitivity():
    """Defect 5: one client of 993 examples moves the model by almost all of its update."""
    app = f.client_app(scale=0.0, examples=lambda partition: 993 if partition == 0 else 1)
    seen, weights = f.run(f.fixed(1.0, 0.5), app, rounds=4)
    claims = [
        *central_claims(0.5, 1.0, f.N),
        EpsilonClaim(4.3773, 1e-5, "client", "analytic", 1.0, on="aggregate"),
    ]
    findings = verify_rounds(claims, seen, weights)
    (first, *_) = of(findings, Weights)
    assert "by num-examples, up to 0.993 for one client instead of 0.125" in first.reason
    assert min(x.measured for x in of(findings, EpsilonClaim)) > 50  # sensitivity 8 times the assumed


def test_an_integer_counter_is_released_without_noise():
    """Defect 6: a 0-d integer passes the clipping and takes no noise."""
    seen, weights = f.run(
        f.fixed(0.05, 0.5), f.client_app(scale=0.0), rounds=1, arrays=f.initial(counter=True)
    )
    findings = verify_rounds(central_claims(0.5, 0.05, f.N), seen, weights)
    (noise,) = of(findings, GaussianNoise)
    assert "integer entry 'steps' was released" in noise.reason


def test_a_crash_on_a_zero_update_is_no_release_and_no_verdict():
    """Defect 7 stops the server; what was released before it is judged as ever."""
    with pytest.raises(ZeroDivisionError):
        f.run(f.fixed(0.05, 0.5), f.client_app(length=0.0, scale=0.0), rounds=1)


def test_a_failed_client_cancels_the_round_and_nothing_is_judged():
    """Defect 8: the wrapper gives up the round, so its claims cannot be checked."""
    app = f.client_app(scale=0.0, examples=lambda partition: 10 if partition else 0)  # rejected: no examples
    seen, weights = f.run(f.fixed(0.05, 0.5), app, rounds=1)
    assert len(seen[1]) == f.N - 1
    findings = verify_round(central_claims(0.5, 0.05, f.N), seen[1], weights[0])
    about_release = [x for x in findings if isinstance(x.claim, (GaussianNoise, Weights, ClipNorm))]
    assert {x.verdict for x in about_release} == {UNCHECKED}
    assert all("nothing was released" in x.reason for x in about_release)


def test_metrics_leave_without_noise():
    """Defect 9: losses are reported exactly."""
    app = f.client_app(scale=0.0, metrics={"train-loss": 0.25})
    seen, weights = f.run(f.fixed(0.05, 0.5), app, rounds=1)
    beside = of(verify_rounds(central_claims(0.5, 0.05, f.N), seen, weights), NothingBeside)
    assert len(beside) == f.N and all("train-loss" in x.reason for x in beside)


def test_noise_after_a_server_optimizer_does_not_have_its_sensitivity():
    """Defect 9: FedAvgM moves the weights by more than the mean, the noise is that of the mean."""
    inner = flower.FedAvgM(server_learning_rate=5.0, **f.COMMON)
    seen, weights = f.run(f.fixed(0.05, 0.5, inner=inner), f.client_app(scale=0.0), rounds=2)
    assert broken(verify_rounds(central_claims(0.5, 0.05, f.N), seen, weights)) & {
        ClipNorm,
        Weights,
        GaussianNoise,
    }


def test_noise_from_a_global_seed_repeats_between_rounds():
    """Defect 10: whoever seeds numpy in each round fixes the noise."""
    app = f.client_app(scale=0.0)
    seen, weights = f.run(f.fixed(0.05, 0.5), app, before_round=lambda _: np.random.seed(7))
    findings = verify_rounds(central_claims(0.5, 0.05, f.N), seen, weights)
    (repeated,) = of(findings, IndependentNoise)
    assert "the aggregate in round 2 and the aggregate in round 1" in repeated.reason
    assert broken(findings) == {IndependentNoise}


def local(clip_norm=1.0, sensitivity=1.0, epsilon=5.0, delta=1e-5, **client):
    seen, weights = f.run(
        flower.FedAvg(**f.COMMON),
        f.client_app([LocalDpMod(clip_norm, sensitivity, epsilon, delta)], **client),
        rounds=1,
        arrays=f.initial(counter=client.pop("counter", False)) if "counter" in client else None,
    )
    return verify_rounds(local_dp_claims(clip_norm, sensitivity, epsilon, delta), seen, weights)


def test_local_noise_holds_on_tensors_and_its_epsilon_below_the_limit_of_its_formula():
    findings = local(epsilon=5.0)
    assert len(of(findings, GaussianNoise, HOLDS)) >= f.N
    assert not of(findings, EpsilonClaim)


def test_local_noise_leaves_out_scalars():
    """Defect 2 in LocalDpMod: the scalar arrives as it was, and moves as far as it likes."""
    unchanged = of(local(scale=1e-3), GaussianNoise)
    assert any("'scale' of all 8 clients together" in x.reason for x in unchanged)
    far = of(local(scale=1000.0), ClipNorm)
    assert len(far) == f.N and all("'scale'" in x.reason for x in far)


def test_the_formula_of_local_noise_is_not_valid_for_large_epsilon():
    """Defect 10: sqrt(2 ln(1.25 / delta)) / epsilon is proved below epsilon 1 and wrong at 20."""
    stated = of(local(epsilon=20.0), EpsilonClaim)
    assert len(stated) == f.N and all(x.measured > 20.2 for x in stated)


def test_a_sensitivity_below_the_clip_norm_is_found():
    """Defect 10: sensitivity and clip norm are set apart, and nothing holds them together."""
    stated = of(local(clip_norm=2.0, sensitivity=1.0, epsilon=3.0), EpsilonClaim)
    assert len(stated) == f.N and all(x.measured > 5.6 for x in stated)


def test_integers_under_local_noise_are_sent_exactly():
    """Defect 6: the counter passes clipping and noise."""
    seen, weights = f.run(
        flower.FedAvg(**f.COMMON),
        f.client_app([LocalDpMod(1.0, 1.0, 5.0, 1e-5)], scale=0.0),
        rounds=1,
        arrays=f.initial(counter=True),
    )
    assert int(weights[1]["steps"]) - int(weights[0]["steps"]) == 10  # the mean of exact counters
    findings = verify_rounds(local_dp_claims(1.0, 1.0, 5.0, 1e-5), seen, weights)
    noise = [x for x in of(findings, GaussianNoise) if x.client_id is not None]
    assert len(noise) == f.N and all("'steps' was sent as trained" in x.reason for x in noise)
    clip = of(findings, ClipNorm)
    assert len(clip) == f.N and all("'steps' moved by 10 and was not clipped" in x.reason for x in clip)
