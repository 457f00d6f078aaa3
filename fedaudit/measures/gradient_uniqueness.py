"""Gradient uniqueness (GNQ): how far one gradient stands out of the others, and what that bounds.

With gradients g_i as rows, K their Gram matrix and S_-i = sum_{k != i} g_k g_k^T (uncentred, leave-one-out),

    GNQ_i = g_i^T (S_-i + ridge I)^-1 g_i = 1 / (ridge A_ii) - 1,    A = (K + ridge I)^-1

so B x B algebra replaces P x P algebra exactly. Abdelghafar, Aliakbarpour, Jermaine 2025-2026, arXiv
2510.10902 (dual form: v2). Differs from [2510.10902v1]: a ridge replaces the pseudo-inverse. With P > B the
pseudo-inverse ignores the part of g_i outside the span of the others, which is the part that makes it unique,
and may rank duplicates above unique examples. Differs from the authors' code: the form above loses no digits
where the leverage is close to 1 and needs no clamp.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fedaudit.measures.cohort import BLOCK, shared_gram
from fedaudit.measures.ghost_kernels import clip_gram, example_gram
from fedaudit.measures.layer_coordinates import clipped_tensor_grams
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Estimate, LocalEvidence, Observer, RoundContext, StepRelease


def gradient_uniqueness(gram: Tensor, ridge: float) -> Tensor:
    """Uniqueness of every gradient among B: GNQ_i = g_i^T (S_-i + ridge I)^-1 g_i, without unit.

    0 for a zero gradient, about 1 for one of two equal ones (ridge -> 0), |g_perp|^2 / ridge for the part
    g_perp that no other gradient spans (ridge -> 0), |g|^2 / ridge for a large ridge. It depends on the
    ridge: numbers with different ridges (relative to the gradients' scale) cannot be compared. It is a
    statistic of these B gradients and no guarantee.

    Args:
        gram: inner products (B, B) of gradients of a sum-reduced loss.
        ridge: regulariser > 0, in the unit of gram (see `relative_ridge`), or the variance of added noise.

    Returns:
        GNQ (B,), float64.

    Raises:
        ValueError: if ridge is not positive and finite, or gram is not square, symmetric, finite and positive
            semi-definite.

    >>> gradient_uniqueness(torch.eye(2), ridge=0.5)
    tensor([2.0000, 2.0000], dtype=torch.float64)
    """
    if not (ridge > 0 and math.isfinite(ridge)):
        raise ValueError(
            f"a ridge is positive and finite, got {ridge}: use relative_ridge or the noise variance"
        )
    K = gram.detach().double()
    if K.ndim != 2 or K.shape[0] != K.shape[1]:
        raise ValueError(f"a Gram matrix has shape (B, B), got {tuple(gram.shape)}: pass G @ G.T")
    if not bool(K.isfinite().all()):
        raise ValueError("a Gram matrix is finite, got NaN or infinity: check the gradients for overflow")
    if not torch.allclose(K, K.T, rtol=1e-5, atol=1e-6 * float(K.abs().max()) if K.numel() else 0.0):
        raise ValueError("a Gram matrix is symmetric, got one that is not: pass G @ G.T")
    identity = torch.eye(len(K), dtype=K.dtype, device=K.device)
    factor, failed = torch.linalg.cholesky_ex((K + K.T) / 2 + ridge * identity)
    if bool(failed):
        raise ValueError(
            f"gram + ridge I must be positive definite, got ridge={ridge:.3g} at mean diagonal "
            f"{float(K.diagonal().mean()):.3g}: raise the ridge, or pass a Gram matrix of higher precision"
        )
    return 1 / (ridge * torch.cholesky_inverse(factor).diagonal()) - 1


def diagonal_gradient_uniqueness(gradients: Tensor, eps: float) -> Tensor:
    """Uniqueness with the second moment's diagonal alone: D_i = sum_p g_ip^2 / (sum_{k != i} g_kp^2 + eps).

    Without unit. The first version's practical variant: P divisions instead of an inverse, but blind to how
    coordinates go together, so gradients that are combinations of others may look unique, and a rotation of
    the parameters changes the number. For comparison with `gradient_uniqueness`, which needs inner products
    alone; no bound follows from it. Abdelghafar et al. 2025, arXiv 2510.10902v1.

    Args:
        gradients: per-example gradients (B, P) of a sum-reduced loss.
        eps: added to every coordinate's second moment, > 0, in the unit of a squared gradient.

    Returns:
        D (B,), float64.

    Raises:
        ValueError: if eps is not positive and finite, or gradients is not a matrix.

    >>> diagonal_gradient_uniqueness(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), eps=1.0)
    tensor([0.5000, 4.5000], dtype=torch.float64)
    """
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps is positive and finite, got {eps}: give e.g. 0.01")
    if gradients.ndim != 2:
        raise ValueError(f"gradients have shape (B, P), got {tuple(gradients.shape)}: flatten each example's")
    found = torch.zeros(len(gradients), dtype=torch.float64, device=gradients.device)
    width = max(1, BLOCK // max(1, len(gradients)))
    for start in range(0, gradients.shape[1], width):
        squares = gradients[:, start : start + width].detach().double().square()
        others = _sums_of_others(squares)
        found += (squares / (others + eps)).sum(1)
    return found


def _sums_of_others(values: Tensor) -> Tensor:
    """For each row the sum of the other rows, without subtracting: a difference would lose small sums."""
    before = values.cumsum(0).roll(1, 0)
    after = values.flip(0).cumsum(0).flip(0).roll(-1, 0)
    before[0], after[-1] = 0, 0
    return before + after


def self_influence(gram: Tensor) -> Tensor:
    """TraceIn-self: the squared norms |g_i|^2 (B,) of per-example gradients, in the unit of gram.

    What an example's own step does to its own loss, to first order and per unit of learning rate; the limit
    of ridge * GNQ for a large ridge. It does not see whether other examples have the same gradient. One
    checkpoint's term of TracIn, Pruthi et al. 2020, arXiv 2002.08484.

    Raises:
        ValueError: if gram is not square.

    >>> self_influence(torch.tensor([[4.0, 1.0], [1.0, 9.0]]))
    tensor([4., 9.], dtype=torch.float64)
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"a Gram matrix has shape (B, B), got {tuple(gram.shape)}: pass G @ G.T")
    return gram.detach().diagonal().double().clone()


def relative_ridge(gram: Tensor, share: float = 0.01) -> float:
    """A ridge that scales with the gradients: share * trace(K) / B, in the unit of gram.

    With it GNQ does not change when all gradients are multiplied by one number.

    Raises:
        ValueError: if share is not positive.

    >>> relative_ridge(torch.eye(4), share=0.5)
    0.5
    """
    if not share > 0:
        raise ValueError(f"a ridge share is positive, got {share}: give e.g. 0.01")
    return share * float(gram.diagonal().double().mean())


def membership_bound(gnq: Tensor, sample_rate: float) -> Tensor:
    """Upper bound on the nats a released sum gives on membership of example i: min(H(p), 1/2 ln(1 + GNQ)).

    The sum is Y = sum_k b_k g_k + noise with b_k ~ Bernoulli(p) independent; I(b_i; Y) is bounded for an
    observer who knows all g_k but not who else is in, with the others' sum taken as Gaussian of covariance p
    (1 - p) S_-i plus noise. Noise of standard deviation s on the sum enters as ridge = s^2 / (p (1 - p)). Not
    a bound against an observer who knows all other b_k (the adversary of differential privacy), nor about
    anything but membership. Over several steps the bounds add up.

    Args:
        gnq: uniqueness (B,).
        sample_rate: probability p that an example takes part.

    Returns:
        nats (B,), float64.

    Raises:
        ValueError: if sample_rate is not in [0, 1].

    >>> membership_bound(torch.tensor([1.0, 100.0]), 0.5)
    tensor([0.3466, 0.6931], dtype=torch.float64)
    """
    if not 0 <= sample_rate <= 1:
        raise ValueError(f"a sample rate is a probability, got {sample_rate}: give a number in [0, 1]")
    entropy = -sum(q * math.log(q) for q in (sample_rate, 1 - sample_rate) if q > 0)
    return (gnq.double().log1p() / 2).clamp(max=entropy)


@dataclass
class CohortGradientUniqueness:
    """How far a client's update stands out of the round's cohort: GNQ of the updates (server; exact).

    value is GNQ with ridge = ridge_share * trace(K) / N. extra has the ridge and "bound-nats", 1/2 ln(1 +
    GNQ): what the SUM of the round's updates can say about one client's participation to an observer who has
    residual uncertainty of variance ridge, with the others' sum taken as Gaussian. A server that sees single
    updates is no such observer, and nothing here bounds what an update says about its client's data.

    Noise makes an update MORE unique: independent noise is spanned by nobody else's. So a high value is no
    sign that a client lacks protection, a low one is no guarantee, and the number cannot by itself compare
    federations with and without noise. It compares the clients of one cohort.

    Attributes:
        ridge_share: ridge as a share of the mean squared norm of the updates.
    """

    ridge_share: float = 0.01
    name: str = field(default="cohort-gradient-uniqueness", init=False, repr=False)
    unit: str = field(default="1", init=False, repr=False)
    scope: Literal["client", "round"] = field(default="client", init=False, repr=False)
    observers: tuple[Observer, ...] = field(default=("server",), init=False, repr=False)

    def __post_init__(self) -> None:
        _check_share(self.ridge_share)

    def needs(self, observer: Observer) -> Needs:
        """At least two updates of the round."""
        return Needs.COHORT

    def __call__(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Estimate]:
        """One uniqueness per update, in order; 0 for all if all updates are zero."""
        if not updates:
            return []
        gram = shared_gram(updates, ctx)
        ridge = relative_ridge(gram, self.ridge_share)
        gnq = _uniqueness_or_zero(gram, ridge)
        rule = f"{self.ridge_share:g} * trace / N"
        settings: dict[str, float | int | str | bool] = {"ridge": ridge, "ridge-rule": rule}
        return [
            Estimate(value, self.unit, "exact", extra={**settings, "bound-nats": math.log1p(value) / 2})
            for value in gnq.tolist()
        ]


@dataclass
class ExampleGradientUniqueness:
    """How far each local example's gradient stands out of the client's others (client or oracle).

    GNQ of the per-example gradients of the FIRST local step, taken at the broadcast weights and clipped as
    the release is; later steps add to what is disclosed. The model is in training mode, except that dropout
    is off: the masks a client draws are not known, and the number must follow from the seed. value is the
    mean GNQ.

    With noise of standard deviation s on the step's sum the ridge is s^2 / (p (1 - p)), p the release's
    sample rate. Without noise it is ridge_share * trace(K) / B; then "bound-nats" presumes residual
    uncertainty of that size and bounds nothing if the observer has none. With p = 1 sampling leaves no
    uncertainty about who is in the step; what is left is whether an example is among the client's data at
    all, taken with the fair prior p = 1/2, the worst of all priors: the smallest ridge and the largest
    H(p). `extra["prior"]` has the p used; "trace-in-self" is the mean squared norm of the gradients, for
    comparison.

    kind is "exact" if all local examples were used. Else it is "estimate": the mean is over a random subset,
    whose examples count only each other as others. At a fixed ridge that can only raise an example's GNQ, so
    its bound stays an upper bound.

    Attributes:
        ridge_share: ridge as a share of the mean squared norm of the gradients, where there is no noise.
        examples: at most this many local examples are used.
        chunk: examples per forward and backward pass.
    """

    ridge_share: float = 0.01
    examples: int = 64
    chunk: int = 64
    name: str = field(default="example-gradient-uniqueness", init=False, repr=False)
    unit: str = field(default="1", init=False, repr=False)
    scope: Literal["client", "round"] = field(default="client", init=False, repr=False)
    observers: tuple[Observer, ...] = field(default=("client", "oracle"), init=False, repr=False)

    def __post_init__(self) -> None:
        _check_share(self.ridge_share)
        for option, count in (("examples", self.examples), ("chunk", self.chunk)):
            if count < 1:
                raise ValueError(f"{option} counts examples, got {count}: give 1 or more")

    def needs(self, observer: Observer) -> Needs:
        """The client's own examples, the model and the loss."""
        return Needs.EVIDENCE | Needs.MODEL

    def __call__(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Estimate]:
        """One mean uniqueness per update, in order."""
        model = self._model(ctx)
        estimates = []
        for update in updates:
            evidence = self._evidence(update, ctx)
            chosen = _subset(len(evidence.x), self.examples, ctx.seed, update.client_id)
            estimates.append(self._estimate(self._gram(model, update, evidence, chosen, ctx), evidence))
        return estimates

    def per_example(self, update: ClientUpdate, ctx: RoundContext) -> Tensor:
        """GNQ of each of the client's own examples (n,) among all of them."""
        evidence = self._evidence(update, ctx)
        every = torch.arange(len(evidence.x))
        gram = self._gram(self._model(ctx), update, evidence, every, ctx)
        return _uniqueness_or_zero(gram, self._ridge(gram, evidence.release)[0])

    def _model(self, ctx: RoundContext) -> nn.Module:
        if ctx.build_model is None:
            raise ValueError(f"{self.name} needs the model, got a context without: give build_model")
        model = ctx.build_model().to(ctx.device)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        return model

    def _evidence(self, update: ClientUpdate, ctx: RoundContext) -> LocalEvidence:
        if ctx.evidence is None:
            raise ValueError(
                f"{self.name} needs the client's own examples, got a context without: give evidence"
            )
        return ctx.evidence(update)

    def _gram(
        self,
        model: nn.Module,
        update: ClientUpdate,
        evidence: LocalEvidence,
        chosen: Tensor,
        ctx: RoundContext,
    ) -> Tensor:
        """Inner products of the chosen examples' gradients at the broadcast weights, clipped as released."""
        if ctx.loss is None:
            raise ValueError(f"{self.name} needs the loss, got a context without: give loss")
        model.load_state_dict(dict(update.before))
        x, y = evidence.x[chosen].to(ctx.device), evidence.y[chosen].to(ctx.device)
        clip_norm = evidence.release.clip_norm
        if clip_norm is not None and evidence.release.per_layer:
            parts = clipped_tensor_grams(model, ctx.loss, x, y, clip_norm, chunk=self.chunk)
            return torch.stack(list(parts.values())).sum(0)
        gram = example_gram(model, ctx.loss, x, y, chunk=self.chunk)
        return gram if clip_norm is None else clip_gram(gram, clip_norm)

    def _ridge(self, gram: Tensor, release: StepRelease) -> tuple[float, str]:
        """The ridge and the rule it follows."""
        prior = _prior(release)
        if release.noise_std > 0:
            return release.noise_std**2 / (prior * (1 - prior)), "noise variance / (p (1 - p))"
        return relative_ridge(gram, self.ridge_share), f"{self.ridge_share:g} * trace / B"

    def _estimate(self, gram: Tensor, evidence: LocalEvidence) -> Estimate:
        release = evidence.release
        prior = _prior(release)
        ridge, rule = self._ridge(gram, release)
        gnq = _uniqueness_or_zero(gram, ridge)
        bound = membership_bound(gnq, prior)
        return Estimate(
            float(gnq.mean()),
            self.unit,
            "exact" if len(gnq) == len(evidence.x) else "estimate",
            extra={
                "median": float(gnq.quantile(0.5)),
                "max": float(gnq.max()),
                "trace-in-self": float(self_influence(gram).mean()),
                "ridge": ridge,
                "ridge-rule": rule,
                "examples": len(gnq),
                "sample-rate": release.sample_rate,
                "prior": prior,
                "bound-nats": float(bound.mean()),
                "bound-nats-max": float(bound.max()),
                "bound-kind": "upper, for one step, others' sum taken as Gaussian",
            },
        )


def _check_share(share: float) -> None:
    if not (share > 0 and math.isfinite(share)):
        raise ValueError(f"ridge_share is positive and finite, got {share}: give e.g. 0.01")


def _uniqueness_or_zero(gram: Tensor, ridge: float) -> Tensor:
    """GNQ (B,); zero gradients are not unique, whatever ridge a relative rule would need for them."""
    if ridge == 0:
        return torch.zeros(len(gram), dtype=torch.float64)
    return gradient_uniqueness(gram, ridge)


def _prior(release: StepRelease) -> float:
    """The probability that an example is in the step's sum, as far as an observer can be unsure of it."""
    if not 0 < release.sample_rate <= 1:
        raise ValueError(f"a sample rate is in (0, 1], got {release.sample_rate}: correct the release")
    return release.sample_rate if release.sample_rate < 1 else 0.5


def _subset(total: int, size: int, seed: int, client_id: int) -> Tensor:
    """At most `size` of `total` positions, ascending, drawn for this client and seed."""
    if total <= size:
        return torch.arange(total)
    digest = hashlib.blake2b(f"{seed}/{client_id}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randperm(total, generator=generator)[:size].sort().values
