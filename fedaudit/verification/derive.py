"""Claims that follow from a configuration: DP-SGD in the client, and Flower's privacy wrappers by name."""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from fedaudit.claims import (
    AdaptiveClipping,
    Claim,
    ClipNorm,
    EpsilonClaim,
    GaussianNoise,
    IndependentNoise,
    NothingBeside,
    PoissonSampling,
    Weights,
)
from fedaudit.errors import ConfigError
from fedaudit.spec import Spec, parse_spec
from fedaudit.training.local import TrainSettings
from fedaudit.types import ClientUpdate, StepRelease
from fedaudit.verification.live import Unstated

BATCH_TAIL = 1e-6
"""Probability that a round uses more examples than the bound on the signal counts."""
_FRESH: tuple[Claim, ...] = (
    IndependentNoise("clients"),
    IndependentNoise("rounds"),
    IndependentNoise("tensors"),
)
_FRESH_AGGREGATE: tuple[Claim, ...] = (
    IndependentNoise("rounds", on="aggregate"),
    IndependentNoise("tensors", on="aggregate"),
)
PREFIX = "DifferentialPrivacy"
AVERAGES = ("FedAvg", "FedProx")


@runtime_checkable
class Claiming(Protocol):
    """A defense that states itself what its updates keep; `recorded.verify_run` asks it for every update."""

    def claims(self, update: ClientUpdate, settings: TrainSettings) -> Sequence[Claim]:
        """The claims about this update."""
        ...


def step_weights(steps: int, momentum: float = 0.0, pull: float = 0.0) -> list[float]:
    """How much each of T steps' gradients counts in the update, in units of the learning rate.

    With momentum m and a pull of strength p = lr mu back to the start (a proximal term), the update is
    -lr sum_s a_s g_s: one unit of gradient at step s enters the buffer, stays there with factor m per step,
    and what it moved shrinks by p.

    >>> step_weights(3), step_weights(3, momentum=0.5)
    ([1.0, 1.0, 1.0], [1.75, 1.5, 1.0])
    """
    moved, buffer, responses = 0.0, 1.0, []
    for _ in range(steps):
        moved += buffer
        responses.append(moved)
        buffer = momentum * buffer - pull * moved
    return responses[::-1]


def step_claims(
    release: StepRelease, settings: TrainSettings, num_examples: int, steps: int
) -> tuple[list[Claim], list[Unstated]]:
    """What DP-SGD claims of the update that `steps` of its steps make.

    The update is -lr / B sum_s a_s (clipped sum_s + N(0, noise_std^2 I)), so every coordinate has noise of
    std lr noise_std sqrt(sum_s a_s^2) / B, B the expected batch size, and the signal is no longer than
    lr C max(a) K / B with K examples used in all: under Poisson sampling at most the quantile that
    Binomial(n T, q) exceeds with probability 10^-6.

    Weight decay and Adam make the update depend on the noise in another way; their noise is left unstated.
    """
    if release.clip_norm is None or not release.noise_std:
        return [], []
    from scipy.stats import binom

    claims: list[Claim] = []
    unstated: list[Unstated] = []
    expected = min(settings.batch_size, num_examples)
    if settings.optimizer == "adam" or settings.weight_decay:
        why = "Adam" if settings.optimizer == "adam" else "weight decay"
        unstated.append(
            Unstated(
                GaussianNoise(release.noise_std * settings.lr / expected),
                f"with {why} an update is no sum of noised gradients; a client sees the gradients themselves",
            )
        )
    else:
        counts = step_weights(steps, settings.momentum, settings.lr * settings.proximal_mu)
        unit = settings.lr / expected
        used = float(binom.isf(BATCH_TAIL, num_examples * steps, release.sample_rate))
        std = unit * release.noise_std * math.hypot(*counts)
        claims.append(GaussianNoise(std, signal=unit * release.clip_norm * max(map(abs, counts)) * used))
        claims += _FRESH
    claims.append(ClipNorm(release.clip_norm, of="example"))
    claims.append(PoissonSampling(release.sample_rate))
    claims.append(NothingBeside())
    return claims, unstated


def strategy_claims(
    name: str, *, clients: int, fraction_train: float, clip_norm: float | None = None
) -> list[Claim]:
    """What a strategy of Flower's, by name with options, claims of each round.

    FedAvg and FedProx weight by num-examples. A privacy wrapper claims clipping over all entries, equal
    weights (its noise is calibrated to C / n), fresh noise of std z C / n, and nothing beside the updates.
    With adaptive clipping the norm differs between rounds: `clip_norm` is the one applied in the round that
    is spoken of, by default the first one's. Other strategies make no claim that is tested here.

    Raises:
        ConfigError: if the name is no spec or a wrapper lacks an option.

    >>> [str(claim) for claim in strategy_claims("FedAvg", clients=3, fraction_train=1.0)]
    ['aggregation weights: num-examples']
    """
    spec = parse_spec(name)
    if not spec.name.startswith(PREFIX):
        return [Weights("num-examples")] if spec.name in AVERAGES else []
    sampled = int(_number(spec, "num-sampled-clients", max(1, int(clients * fraction_train))))
    by_server = "ServerSide" in spec.name
    multiplier = _number(spec, "noise-multiplier")
    if "Adaptive" not in spec.name:
        return central_claims(_number(spec, "clipping-norm"), multiplier, sampled, by_server=by_server)
    count_std = _number(spec, "clipped-count-stddev", sampled / 20 if multiplier else 0.0)
    return adaptive_claims(
        clip_norm or _number(spec, "initial-clipping-norm", 0.1),
        multiplier,
        sampled,
        count_std=count_std,
        quantile=_number(spec, "target-clipped-quantile", 0.5),
        lr=_number(spec, "clip-norm-lr", 0.2),
        by_server=by_server,
    )


def central_claims(norm: float, multiplier: float, sampled: int, *, by_server: bool = True) -> list[Claim]:
    """What client-level privacy with clip norm C, noise multiplier z and n sampled clients claims."""
    claims: list[Claim] = [ClipNorm(norm, by="server" if by_server else "client"), Weights("uniform")]
    if multiplier > 0:
        claims.append(GaussianNoise(multiplier * norm / sampled, on="aggregate"))
        claims += _FRESH_AGGREGATE
    return [*claims, NothingBeside()]


def adaptive_claims(
    norm: float,
    multiplier: float,
    sampled: int,
    *,
    count_std: float,
    quantile: float = 0.5,
    lr: float = 0.2,
    by_server: bool = True,
) -> list[Claim]:
    """The same with a clip norm that follows a quantile, `norm` being the one applied in this round.

    Part of the budget goes to the noised count, so that the updates' noise has the multiplier
    (z^-2 - (2 count_std)^-2)^(-1/2) (Andrew et al. 2021, theorem 1).
    """
    if multiplier > 0 and count_std > 0:
        multiplier = (multiplier**-2 - (2 * count_std) ** -2) ** -0.5
    return [
        *central_claims(norm, multiplier, sampled, by_server=by_server),
        AdaptiveClipping(quantile, lr, count_std),
    ]


def local_dp_claims(clip_norm: float, sensitivity: float, epsilon: float, delta: float) -> list[Claim]:
    """What Flower's LocalDpMod claims: clipping, sensitivity sqrt(2 ln(1.25 / delta)) / epsilon of noise.

    Epsilon is per message and judged for presence or absence of the client's update, which moves the release
    by at most the clip norm; replacing one update by another would move it by twice that.
    """
    std = sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    return [
        ClipNorm(clip_norm),
        GaussianNoise(std, signal=clip_norm),
        *_FRESH,
        EpsilonClaim(epsilon, delta, "client", "analytic", std / clip_norm),
        NothingBeside(),
    ]


def _number(spec: Spec, option: str, default: float | None = None) -> float:
    value = spec.options.get(option, default)
    if value is None or isinstance(value, (bool, str)):
        raise ConfigError(
            f"{spec.name} states {option} as a number, got {value!r}: its claims follow from it"
        )
    return float(value)
