"""Scores of candidates against updates, against naive loops over one candidate and one update at a time."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedaudit.attacks.membership import against_others
from fedaudit.inference import candidate_scores as module
from fedaudit.inference.candidate_scores import SCORES, Score, align, candidate_scores, scores_over_rounds
from fedaudit.types import ClientUpdate, RoundContext, StepRelease

LR, STEPS, EXAMPLES, CLIENTS, CANDIDATES = 0.2, 3, 6, 4, 9


def build_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)  # a frozen parameter and buffers are no part of a gradient
    return model


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum")


def candidates(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(CANDIDATES, 5, generator=generator), torch.arange(CANDIDATES) % 3


def updates(round_number: int = 1) -> list[ClientUpdate]:
    generator = torch.Generator().manual_seed(round_number)
    before = {name: t.clone() for name, t in build_model().state_dict().items()}
    floating = [name for name, tensor in before.items() if tensor.is_floating_point()]
    return [
        ClientUpdate(
            client,
            round_number,
            before,
            {name: 0.1 * torch.randn(before[name].shape, generator=generator).abs() for name in floating},
            EXAMPLES,
        )
        for client in range(CLIENTS)
    ]


CONTEXT = RoundContext(1, build_model, loss, lr=LR, local_steps=STEPS, batch_size=2)


def gradient(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], float]:
    """Gradient by name and loss of one example, in evaluation mode."""
    model = build_model().eval()
    model.load_state_dict(weights)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    value = loss(model(x[None]), y[None])
    gradients = torch.autograd.grad(value, list(trainable.values()))
    return dict(zip(trainable, gradients, strict=True)), float(value.detach())


def naive(score: str, update: ClientUpdate, x: Tensor, y: Tensor, clip_norm: float | None) -> float:
    returned = {name: value + update.delta.get(name, 0) for name, value in update.before.items()}
    late, value = gradient(returned, x, y)
    if score == "loss":
        return -value
    if score == "gradient-norm":
        return -float(torch.cat([g.flatten() for g in late.values()]).norm())
    early, _ = gradient(dict(update.before), x, y)
    g = torch.cat([part.flatten() for part in early.values()])
    observed = -torch.cat([update.delta[name].flatten() for name in early])
    if score == "cosine":
        return float(torch.nn.functional.cosine_similarity(g, observed, dim=0))
    if score == "matched-filter":
        return float(g @ observed / g.norm())
    observed = observed * EXAMPLES / (LR * STEPS)
    if clip_norm is not None:
        g = g * min(1.0, clip_norm / float(g.norm()))
    return float(observed.square().sum() - (observed - g).square().sum())


@pytest.mark.parametrize("score", [score for score in SCORES if not score.startswith("fedmia-")])
@pytest.mark.parametrize("clip_norm", [None, 0.5], ids=["plain", "clipped"])
@pytest.mark.parametrize("block", [1, 2**22], ids=["one by one", "together"])
def test_a_score_is_that_of_one_candidate_and_one_update(
    score: Score, clip_norm: float | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    ctx = replace(CONTEXT, release=lambda _: StepRelease(clip_norm, 0.0, 1.0))
    x, y = candidates()
    found = candidate_scores(score, updates(), ctx, x, y)
    assert found.shape == (CLIENTS, CANDIDATES) and found.dtype == torch.float64
    for row, update in zip(found.tolist(), updates(), strict=True):
        expected = [naive(score, update, x[i], y[i], clip_norm) for i in range(CANDIDATES)]
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("score", "base"), [("fedmia-loss", "loss"), ("fedmia-cosine", "cosine")])
def test_fedmia_compares_a_base_score_with_the_other_updates(score: Score, base: Score) -> None:
    x, y = candidates()
    expected = against_others(candidate_scores(base, updates(), CONTEXT, x, y))
    assert torch.allclose(candidate_scores(score, updates(), CONTEXT, x, y), expected)


def test_the_alignment_holds_norms_of_gradients_and_updates() -> None:
    x, y = candidates()
    found = align(updates(), CONTEXT, x, y)
    names = [name for name, p in build_model().named_parameters() if p.requires_grad]
    lengths = [float(torch.cat([u.delta[name].flatten() for name in names]).norm()) for u in updates()]
    assert found.update_norms.tolist() == pytest.approx(lengths)
    early = [gradient(dict(updates()[0].before), x[i], y[i])[0] for i in range(CANDIDATES)]
    norms = [float(torch.cat([part.flatten() for part in g.values()]).norm()) for g in early]
    assert found.norms.tolist() == pytest.approx(norms, rel=1e-5)


def test_scores_over_rounds_are_the_mean_of_each_rounds_scores() -> None:
    x, y = candidates()
    rounds = [(updates(number), replace(CONTEXT, round=number)) for number in (1, 2, 3)]
    single = [candidate_scores("fedmia-cosine", *each, x, y) for each in rounds]
    expected = (single[0] + single[1] + single[2]) / 3
    assert torch.allclose(scores_over_rounds("fedmia-cosine", rounds, x, y), expected)
    with pytest.raises(ValueError, match="the same clients, got 2 different groups in 3 rounds"):
        scores_over_rounds("loss", [*rounds[:2], (updates(3)[1:], CONTEXT)], x, y)


@pytest.mark.parametrize("score", ["loss", "cosine"])
def test_updates_from_different_weights_are_not_compared(score: Score) -> None:
    first, *rest = updates()
    moved = replace(first, before={name: tensor + 1 for name, tensor in first.before.items()})
    with pytest.raises(ValueError, match="one set of weights, got 2 among 4 updates"):
        candidate_scores(score, [moved, *rest], CONTEXT, *candidates())


def test_a_gradient_difference_needs_the_learning_rate() -> None:
    with pytest.raises(ValueError, match="needs lr > 0 and steps > 0 of plain SGD, got lr=None, steps=3"):
        candidate_scores("gradient-difference", updates(), replace(CONTEXT, lr=None), *candidates())
