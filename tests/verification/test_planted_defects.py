"""Every planted defect is found, and honest rounds raise an alarm in at most one of a hundred."""

import re

import pytest
import torch
from scipy.stats import binom

from fedaudit.claims import (
    HOLDS,
    UNCHECKED,
    VIOLATED,
    ClipNorm,
    EpsilonClaim,
    GaussianNoise,
    IndependentNoise,
    Weights,
)
from fedaudit.verification import NoiseMemory, verify_round
from fedaudit.verification.epsilon import gaussian_epsilon
from fedaudit.verification.round import ALPHA

from . import federation as f

ROUNDS = 200
LIMIT = ROUNDS // 100
LOCAL_STD = 0.2
STEP_STD, STEP_SIGNAL = 0.05, 0.8
CENTRAL_STD = f.SIGMA * f.C / f.N
FRESH = [IndependentNoise(between) for between in ("clients", "rounds", "tensors")]
LOCAL = [
    ClipNorm(f.C),
    GaussianNoise(LOCAL_STD),
    *FRESH,
    EpsilonClaim(gaussian_epsilon(0.4, 1e-5), 1e-5, "client", "analytic", 0.4),
]
STEPS = [ClipNorm(1.0, of="example"), GaussianNoise(STEP_STD, signal=STEP_SIGNAL), *FRESH]
CENTRAL = [
    ClipNorm(f.C, by="server"),
    Weights("uniform"),
    GaussianNoise(CENTRAL_STD, on="aggregate"),
    IndependentNoise("rounds", on="aggregate"),
    IndependentNoise("tensors", on="aggregate"),
    EpsilonClaim(4.3773, 1e-5, "client", "analytic", f.SIGMA, on="aggregate"),
]


def violated(findings, kind):
    return [x for x in findings if x.verdict == VIOLATED and isinstance(x.claim, kind)]


def broken(findings):
    return {type(x.claim).__name__ for x in findings if x.verdict == VIOLATED}


def local_round(number, defect=""):
    """Clients clip their update and add noise, then send it."""
    before, updates = f.weights_of(number), []
    for client in range(f.N):
        signal = f.signal(number, client)
        clipped = f.clip_each(signal) if defect == "clip per layer" else f.clip(signal)
        if defect == "scalar not clipped":
            clipped["b.scale"] = torch.tensor(40.0, dtype=torch.float64)
        seeds = {
            "repeated between rounds": ("noise", client),
            "repeated between clients": ("noise", number),
            "seed is client + round": ("noise", client + number),
        }.get(defect, ("noise", number, client))
        noise = f.draw(f.generator(*seeds), LOCAL_STD)
        if defect == "no noise":
            noise = f.scaled(noise, 0.0)
        if defect == "half the noise":
            noise = f.scaled(noise, 0.5)
        if defect == "noise on all but one tensor":
            noise["b.mean"] = torch.zeros(40, dtype=torch.float64)
        if defect == "noise on all but a scalar":
            noise["b.scale"], clipped["b.scale"] = torch.zeros(()).double(), torch.tensor(1e-3).double()
        if defect == "seed anew for each tensor":
            noise = {
                name: LOCAL_STD * torch.randn(shape, generator=f.generator("noise", number, client)).double()
                for name, shape in f.SHAPES.items()
            }
        if defect == "uniform noise":
            noise = {
                name: LOCAL_STD
                * 12**0.5
                * (torch.rand(shape, generator=f.generator(name, number, client)).double() - 0.5)
                for name, shape in f.SHAPES.items()
            }
        change = f.plus(clipped, noise)
        if defect == "percentile filter":  # keep the largest tenth, clamped: no noise at all
            flat = torch.cat([t.reshape(-1) for t in signal.values()]).abs()
            cut, top = flat.quantile(0.9), flat.quantile(0.97)
            change = {n: torch.where(t.abs() >= cut, t.clamp(-top, top), 0.0) for n, t in signal.items()}
        updates.append(f.received(number, client, change, before))
    return updates


def central_round(number, defect=""):
    """The server clips, averages and adds noise."""
    before = f.weights_of(number)
    signals = [f.signal(number, client) for client in range(f.N)]
    examples = [900, 40, 30, 20, 10] if "num-examples" in defect else [100] * f.N
    if defect == "scalar not clipped":
        signals[0]["b.scale"] = torch.tensor(30.0, dtype=torch.float64)
    clip = {"clip per layer": f.clip_each, "no clipping": dict}.get(defect, f.clip)
    clipped = [clip(signal) for signal in signals]
    if defect == "scalar not clipped":
        for change, signal in zip(clipped, signals, strict=True):
            change["b.scale"] = signal["b.scale"]
    weights = [1 / f.N] * f.N
    if "num-examples" in defect:
        weights = [count / sum(examples) for count in examples]
    std = {
        "no noise": 0.0,
        "half the noise": CENTRAL_STD / 2,
        "divisor n^2": CENTRAL_STD / f.N,
        "no divisor": CENTRAL_STD * f.N,
        "next clip norm": CENTRAL_STD * 0.889,
    }.get(defect, CENTRAL_STD)
    seeds = ("server",) if defect == "repeated between rounds" else ("server", number)
    noise = f.draw(f.generator(*seeds), std)
    if defect == "noise on all but one tensor":
        noise["a.bias"] = torch.zeros(24, dtype=torch.float64)
    after = f.applied(before, f.plus(f.mean(clipped, weights), noise))
    updates = [
        f.received(number, i, signal, before, count)
        for i, (signal, count) in enumerate(zip(signals, examples, strict=True))
    ]
    return updates, after


def steps_round(number):
    """DP-SGD seen from outside: a signal of bounded norm and noise."""
    before = f.weights_of(number)
    return [
        f.received(
            number,
            client,
            f.plus(
                f.scaled(f.clip(f.signal(number, client), 1.0), STEP_SIGNAL),
                f.draw(f.generator("step", number, client), STEP_STD),
            ),
            before,
        )
        for client in range(f.N)
    ]


def verify(kind, number, memory, defect=""):
    if kind == "local":
        return verify_round(LOCAL, local_round(number, defect), memory=memory)
    if kind == "steps":
        return verify_round(STEPS, steps_round(number), memory=memory)
    updates, after = central_round(number, defect)
    return verify_round(CENTRAL, updates, after, memory=memory)


@pytest.mark.parametrize("kind", ["local", "steps", "central"])
def test_honest_rounds_raise_an_alarm_in_at_most_one_of_a_hundred(kind):
    memory = NoiseMemory(window=20)
    alarms = [number for number in range(ROUNDS) if broken(verify(kind, number, memory))]
    assert len(alarms) <= LIMIT, alarms


def test_the_level_leaves_room_for_chance_under_one_alarm_in_a_hundred_rounds():
    assert binom.sf(LIMIT, ROUNDS, ALPHA) < 0.0012


@pytest.mark.parametrize("kind", ["local", "steps", "central"])
def test_every_claim_about_noise_is_affirmed_in_an_honest_round(kind):
    memory = NoiseMemory()
    verify(kind, 1, memory)
    findings = verify(kind, 2, memory)
    about_noise = [x for x in findings if isinstance(x.claim, (GaussianNoise, IndependentNoise))]
    assert about_noise and {x.verdict for x in about_noise} == {HOLDS}, [str(x) for x in about_noise]


LOCAL_DEFECTS = {
    "no noise": (GaussianNoise, "no noise to speak of|at most"),
    "half the noise": (GaussianNoise, r"at most 0\.5\d* of the claimed std|at most 0\.\d+ of"),
    "noise on all but one tensor": (GaussianNoise, "'b.mean'"),
    "noise on all but a scalar": (GaussianNoise, "'b.scale' of all 5 clients together"),
    "repeated between rounds": (IndependentNoise, r"client (\d) in round 2 and client \1 in round 1"),
    "repeated between clients": (IndependentNoise, r"client \d in round 2 and client \d in round 2"),
    "seed is client + round": (IndependentNoise, "share noise"),
    "seed anew for each tensor": (IndependentNoise, "'a.weight' and '.*' share noise"),
    "scalar not clipped": (ClipNorm, "tensor 'b.scale' is longer than the clip norm"),
    "percentile filter": (GaussianNoise, "of the claimed|share values"),
}  # fmt: skip


@pytest.mark.parametrize("defect", LOCAL_DEFECTS)
def test_a_defect_of_local_noise_is_found(defect):
    kind, evidence = LOCAL_DEFECTS[defect]
    memory = NoiseMemory()
    verify("local", 1, memory, defect)
    findings = violated(verify("local", 2, memory, defect), kind)
    assert any(re.search(evidence, x.reason) for x in findings), [x.reason for x in findings]
    assert all(x.observer == "server" for x in findings)


def test_repeated_noise_breaks_no_other_claim():
    memory = NoiseMemory()
    verify("local", 1, memory, "repeated between rounds")
    assert broken(verify("local", 2, memory, "repeated between rounds")) == {"IndependentNoise"}


CENTRAL_DEFECTS = {
    "no noise": ({"GaussianNoise", "EpsilonClaim"}, "no noise to speak of"),
    "half the noise": ({"GaussianNoise", "EpsilonClaim"}, r"at most 0\.5"),
    "divisor n^2": ({"GaussianNoise", "EpsilonClaim"}, r"at most 0\.2"),
    "no divisor": ({"GaussianNoise"}, r"at least 4\.\d+ times the claimed std"),
    "next clip norm": ({"GaussianNoise", "EpsilonClaim"}, r"at most 0\.9"),
    "noise on all but one tensor": ({"GaussianNoise", "EpsilonClaim"}, "'a.bias'"),
    "weights by num-examples": ({"Weights", "EpsilonClaim"}, r"by num-examples, up to 0\.9 for one client"),
    "scalar not clipped": ({"ClipNorm", "EpsilonClaim"}, "tensor 'b.scale' enters the aggregate unclipped"),
    "no clipping": ({"ClipNorm", "EpsilonClaim"}, "clipped not at all"),
    "repeated between rounds": ({"IndependentNoise"}, "share noise"),
}  # fmt: skip


@pytest.mark.parametrize("defect", CENTRAL_DEFECTS)
def test_a_defect_of_the_aggregate_is_found_and_no_other_claim_is_blamed(defect):
    kinds, evidence = CENTRAL_DEFECTS[defect]
    memory = NoiseMemory()
    for number in range(
        1, 8 if defect in ("weights by num-examples", "no clipping") else 2
    ):  # noise hides weights in single rounds
        verify("central", number, memory, defect)
    findings = verify("central", 9, memory, defect)
    assert broken(findings) == kinds, [str(x) for x in findings]
    bad = [x.reason for x in findings if x.verdict == VIOLATED]
    assert any(re.search(evidence, reason) for reason in bad), bad


def test_clipping_by_the_client_per_layer_instead_of_over_all_is_found():
    before = f.weights_of(1)
    updates = [f.received(1, i, f.clip_each(f.signal(1, i)), before) for i in range(f.N)]
    findings = violated(verify_round([ClipNorm(f.C)], updates), ClipNorm)
    assert findings and all(x.measured > f.C for x in findings)
    assert any("clipped per tensor" in x.reason for x in findings)
    kept = verify_round([ClipNorm(f.C, over="layer")], updates)
    assert {x.verdict for x in kept} == {HOLDS}


def test_a_scalar_left_out_of_the_clients_clipping_is_found_and_named():
    before, change = f.weights_of(1), f.clip(f.signal(1, 0))
    change["b.scale"] = torch.tensor(40.0, dtype=torch.float64)
    (finding,) = verify_round([ClipNorm(f.C)], [f.received(1, 0, change, before)])
    assert finding.verdict == VIOLATED and "'b.scale' alone has norm 40" in finding.reason
    assert "left out of the clipping" in finding.reason


def test_a_norm_at_the_limit_is_within_it_whatever_rounding_adds():
    for number in range(50):
        before = f.scaled(f.weights_of(number), 30.0)  # coarse spacing of floating-point numbers
        change = f.scaled(f.signal(number, 0), 1.0)
        exactly = f.scaled(change, f.C / f.norm(change))
        (finding,) = verify_round([ClipNorm(f.C)], [f.received(number, 0, exactly, before)])
        assert finding.verdict == HOLDS, finding.reason


def test_the_server_clipping_per_layer_is_found():
    memory = NoiseMemory()
    loud = [ClipNorm(f.C, by="server"), Weights("uniform"), GaussianNoise(CENTRAL_STD / 20, on="aggregate")]
    before = f.weights_of(3)
    signals = [f.scaled(f.signal(3, i), 3.0) for i in range(f.N)]
    change = f.mean([f.clip_each(s) for s in signals], [1 / f.N] * f.N)
    after = f.applied(before, f.plus(change, f.draw(f.generator("x"), CENTRAL_STD / 20)))
    updates = [f.received(3, i, s, before) for i, s in enumerate(signals)]
    findings = verify_round(loud, updates, after, memory=memory)
    assert broken(findings) == {"ClipNorm"}
    assert "clipped in each tensor" in violated(findings, ClipNorm)[0].reason


def test_half_the_epsilon_for_a_percentile_filter_is_not_believed():
    findings = verify("local", 1, NoiseMemory(), "percentile filter")
    assert len(violated(findings, GaussianNoise)) >= f.N
    assert len(violated(findings, EpsilonClaim)) == f.N


def test_uniform_noise_of_the_right_variance_is_not_gaussian():
    updates = local_round(1, "uniform noise")
    free = {u.client_id: f.clip(f.signal(1, u.client_id)) for u in updates}
    findings = verify_round([GaussianNoise(LOCAL_STD)], updates, noise_free=free, observer="oracle")
    bad = violated(findings, GaussianNoise)
    assert len(bad) >= f.N - 1 and all("not Gaussian" in x.reason for x in bad)


def test_noise_that_hides_the_clipping_is_not_called_clipping():
    before = f.weights_of(1)
    noisy = f.plus(f.clip(f.signal(1, 0)), f.draw(f.generator("n"), 10.0))
    clip, noise = verify_round([ClipNorm(f.C), GaussianNoise(10.0)], [f.received(1, 0, noisy, before)])[:2]
    assert clip.verdict == UNCHECKED and "before it adds the noise" in clip.reason
    assert noise.verdict == HOLDS
