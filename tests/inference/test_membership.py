"""The measure of membership inference on rounds whose members are known."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedaudit.attacks.roc import auc
from fedaudit.inference.candidate_scores import SCORES, candidate_scores
from fedaudit.inference.membership import MembershipInference, matched_by_label
from fedaudit.needs import Needs
from fedaudit.registry import MEASURES
from fedaudit.spec import parse_spec
from fedaudit.training.local import TrainSettings, plan_batches, train_locally
from fedaudit.types import ClientUpdate, Estimate, LocalEvidence, RoundContext, Skip, StepRelease

FEATURES, CLASSES, CLIENTS, HELD, REFERENCES = 20, 4, 6, 24, 150


def build_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(FEATURES, 48), nn.ReLU(), nn.Linear(48, CLASSES))


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum")


def examples(key: int, count: int = HELD) -> tuple[Tensor, Tensor]:
    """Labels are random: whatever a model learns of them, it learns by heart."""
    generator = torch.Generator().manual_seed(key)
    return torch.randn(count, FEATURES, generator=generator), torch.randint(
        CLASSES, (count,), generator=generator
    )


def trained(epochs: int, noise: float = 0.0, lr: float = 0.2) -> list[ClientUpdate]:
    """Updates of clients that trained on all they hold, plus noise on the sum of gradients."""
    settings = TrainSettings(lr=lr, batch_size=HELD, local_epochs=epochs)
    before = {name: tensor.clone() for name, tensor in build_model().state_dict().items()}
    found = []
    for client in range(CLIENTS):
        model, (x, y) = build_model(), examples(client)
        train_locally(model, x, y, plan_batches(len(y), settings, poisson=False, seed=client), settings)
        generator = torch.Generator().manual_seed(1000 + client)
        scale = noise * lr / HELD * math.sqrt(epochs)
        delta = {
            name: tensor.detach() - before[name] + scale * torch.randn(tensor.shape, generator=generator)
            for name, tensor in model.state_dict().items()
        }
        found.append(ClientUpdate(client, 1, before, delta, HELD))
    return found


def context(release: StepRelease | None = None, epochs: int = 1, **changes: object) -> RoundContext:
    release = release or StepRelease(None, 0.0, 1.0)
    ctx = RoundContext(
        round=1,
        build_model=build_model,
        loss=loss,
        lr=0.2,
        local_epochs=epochs,
        batch_size=HELD,
        num_classes=CLASSES,
        reference=examples(99, REFERENCES),
        release=lambda _: release,
        evidence=lambda update: LocalEvidence(*examples(update.client_id), release),
        observer="oracle",
        num_updates=CLIENTS,
    )
    return replace(ctx, **changes)  # type: ignore[arg-type]


def estimates(measure: MembershipInference, updates: list[ClientUpdate], ctx: RoundContext) -> list[Estimate]:
    found = measure(updates, ctx)
    assert all(isinstance(each, Estimate) for each in found), found
    return [each for each in found if isinstance(each, Estimate)]


@pytest.mark.parametrize("score", SCORES)
def test_examples_learnt_by_heart_are_found(score: str) -> None:
    measure = MEASURES.build(parse_spec(f"membership-inference(score={score})"))
    found = estimates(measure, trained(epochs=40), context(epochs=40))
    mean = sum(each.value for each in found) / CLIENTS
    # gradients at the broadcast weights are used once each: the plainest scores see them less
    assert mean > (0.6 if score == "gradient-difference" else 0.75), mean
    for each in found:
        assert each.low is not None and each.high is not None and each.low <= each.value <= each.high
        half = int(each.extra["non-members"]) // 2  # two halves: variance (2 half + 1) / (12 half^2)
        tolerance = 4 * math.sqrt((2 * half + 1) / (12 * half**2))
        assert each.extra["control-auc"] == pytest.approx(0.5, abs=tolerance)


@pytest.mark.parametrize("score", SCORES)
def test_examples_that_were_not_used_are_not_found(score: str) -> None:
    """Clients that trained on other examples than those they are said to hold."""
    measure = MembershipInference(score=score)  # type: ignore[arg-type]
    release = StepRelease(None, 0.0, 1.0)
    ctx = context(
        epochs=40, evidence=lambda update: LocalEvidence(*examples(500 + update.client_id), release)
    )
    found = estimates(measure, trained(epochs=40), ctx)
    mean = sum(each.value for each in found) / CLIENTS
    # non-members are the same 150 in all clients; members are 144 different ones
    assert mean == pytest.approx(0.5, abs=4 * math.sqrt((1 / 144 + 1 / 150) / 12))


def one_sided(key: int, count: int, share: float) -> tuple[Tensor, Tensor]:
    """Examples of which a share has label 0 and the rest label 1; inputs differ by class."""
    generator = torch.Generator().manual_seed(key)
    y = (torch.rand(count, generator=generator) > share).long()
    return torch.randn(count, FEATURES, generator=generator) + 2 * y[:, None], y


@pytest.mark.parametrize("matched", [True, False])
def test_clients_of_few_classes_are_not_taken_for_members(matched: bool) -> None:
    """Updates of other examples of the same skewed classes: nobody is a member, only the classes are."""
    release = StepRelease(None, 0.0, 1.0)
    settings = TrainSettings(lr=0.2, batch_size=HELD, local_epochs=1)
    before = {name: tensor.clone() for name, tensor in build_model().state_dict().items()}
    updates = []
    for client in range(CLIENTS):
        model = build_model()
        train_locally(model, *one_sided(700 + client, HELD, 0.9), [torch.arange(HELD)], settings)
        delta = {name: tensor.detach() - before[name] for name, tensor in model.state_dict().items()}
        updates.append(ClientUpdate(client, 1, before, delta, HELD))
    ctx = context(
        reference=one_sided(99, REFERENCES, 0.5),
        evidence=lambda update: LocalEvidence(*one_sided(update.client_id, 80, 0.9), release),
    )
    found = estimates(MembershipInference(score="cosine", match_labels=matched), updates, ctx)
    mean = sum(each.value for each in found) / CLIENTS
    if matched:  # the reference has about 75 of label 0, so about 83 non-members
        assert min(int(each.extra["non-members"]) for each in found) > 60
        assert mean == pytest.approx(0.5, abs=4 * math.sqrt((1 / 60 + 1 / (80 * CLIENTS)) / 12))
    else:
        assert mean > 0.65


def test_non_members_have_the_members_shares_of_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    members = torch.tensor([0] * 30 + [1] * 10 + [2] * 5 + [9] * 3)
    others = torch.arange(200) % 5  # forty of each label
    kept, drawn = matched_by_label(members, others, 500, generator)
    assert kept.tolist() == [True] * 45 + [False] * 3
    counts = torch.bincount(others[drawn], minlength=5).tolist()
    assert counts == [40, 13, 7, 0, 0]  # 60 = 40 / (30 / 45), in the shares 2/3, 2/9 and 1/9
    assert len(set(drawn.tolist())) == 60
    few = matched_by_label(members, others, 9, generator)[1]
    assert torch.bincount(others[few], minlength=5).tolist() == [6, 2, 1, 0, 0]
    none = matched_by_label(torch.tensor([7, 8]), others, 9, generator)
    assert not none[0].any() and len(none[1]) == 0


@pytest.mark.parametrize("score", ["loss", "cosine"])
def test_clients_whose_classes_the_reference_lacks_are_skipped(score: str) -> None:
    release = StepRelease(None, 0.0, 1.0)
    x, y = examples(1)
    ctx = context(evidence=lambda _: LocalEvidence(x, y, release), reference=(x, torch.full_like(y, 77)))
    found = MembershipInference(score=score)(trained(1)[:1], ctx)  # type: ignore[arg-type]
    assert found == [Skip("membership inference needs at least 5 members and non-members, got 0 and 0")]


def test_the_value_is_the_area_of_the_servers_scores() -> None:
    updates, ctx = trained(epochs=5), context()
    assert ctx.reference is not None
    found = estimates(MembershipInference(score="cosine", match_labels=False), updates, ctx)
    for update, each in zip(updates, found, strict=True):
        x, y = examples(update.client_id)
        both = torch.cat([x, ctx.reference[0]]), torch.cat([y, ctx.reference[1]])
        scores = candidate_scores("cosine", [update], ctx, *both)[0]
        expected = auc(scores, torch.arange(len(scores)) < HELD)
        assert (each.value, each.low, each.high) == pytest.approx(
            (expected.value, expected.low, expected.high)
        )
        assert each.extra["members"] == HELD and each.extra["non-members"] == REFERENCES
        assert each.extra["members-are"] == "held by the client"
        assert each.extra["non-members-are"] == "reference"


def test_a_rate_that_too_few_non_members_resolve_is_a_reason() -> None:
    (found, *_) = estimates(MembershipInference(match_labels=False), trained(1), context())
    assert 0 <= found.extra["tpr-at-fpr-0.01-low"] <= found.extra["tpr-at-fpr-0.01"]
    assert "tpr-at-fpr-0.001" not in found.extra
    assert found.extra["tpr-at-fpr-0.001-reason"] == (
        "a false-positive rate of 0.001 needs at least 1000 non-members, got 150"
    )
    (few, *_) = estimates(MembershipInference(candidates=20, match_labels=False), trained(1), context())
    assert (few.extra["members"], few.extra["non-members"]) == (20, 20)
    assert "needs at least 100 non-members, got 20" in str(few.extra["tpr-at-fpr-0.01-reason"])


def test_noise_lowers_the_area_and_the_envelope_lies_above_it() -> None:
    areas = []
    for noise in (0.05, 0.5, 5.0):
        ctx = context(StepRelease(None, noise, 1.0))
        found = estimates(MembershipInference(score="matched-filter"), trained(1, noise), ctx)
        mean = sum(each.value for each in found) / CLIENTS
        bound = sum(float(each.extra["envelope-auc"]) for each in found) / CLIENTS
        assert mean < bound + 4 * math.sqrt((1 / 144 + 1 / 150) / 12)
        areas.append((mean, bound))
    assert areas[0][0] > areas[2][0] + 0.1
    assert [bound for _, bound in areas] == sorted((bound for _, bound in areas), reverse=True)
    assert areas[2][1] < 0.75


def test_the_envelope_is_the_closed_form_of_the_clipped_gradients() -> None:
    """Gradients here are all longer than 0.1: mu = 0.1 / 0.2 for every member."""
    ctx = context(StepRelease(0.1, 0.2, 1.0))
    (found, *_) = estimates(MembershipInference(), trained(1), ctx)
    assert found.extra["envelope-auc"] == pytest.approx(norm.cdf(0.5 / math.sqrt(2)))
    assert found.extra["envelope-tpr-at-fpr-0.01"] == pytest.approx(norm.sf(norm.isf(0.01) - 0.5))
    (plain, *_) = estimates(MembershipInference(), trained(1), context())
    assert not any(key.startswith("envelope") for key in plain.extra)
    (unknown, *_) = estimates(MembershipInference(), trained(1), replace(ctx, local_epochs=None))
    assert unknown.extra["envelope-reason"] == "the number of local steps is unknown"


def test_without_reference_examples_every_update_is_skipped_with_the_reason() -> None:
    found = MembershipInference()(trained(1), context(reference=None))
    assert found == [Skip("membership-inference needs reference examples as non-members")] * CLIENTS


def test_two_clients_have_no_others_to_be_compared_with() -> None:
    found = MembershipInference(score="fedmia-cosine")(trained(1)[:2], context(num_updates=2))
    assert found == [Skip("fedmia-cosine needs three updates from the same weights, got 2")] * 2
    alone = MembershipInference(score="loss")(trained(1)[:1], context(num_updates=1))
    assert isinstance(alone[0], Estimate)


def test_a_client_that_cannot_be_measured_does_not_take_the_others_with_it() -> None:
    updates = trained(1)
    broken = {name: torch.full_like(tensor, math.nan) for name, tensor in updates[2].delta.items()}
    updates[2] = replace(updates[2], delta=broken)
    release = StepRelease(None, 0.0, 1.0)

    def evidence(update: ClientUpdate) -> LocalEvidence:
        return LocalEvidence(*examples(update.client_id, 4 if update.client_id == 1 else HELD), release)

    found = MembershipInference(score="loss", match_labels=False)(updates, context(evidence=evidence))
    assert [type(each) for each in found] == [Estimate, Skip, Skip, Estimate, Estimate, Estimate]
    rule = "membership inference needs at least 5 members and non-members, got 4 and 150"
    assert found[1] == Skip(rule)
    assert found[2] == Skip("loss of this client's candidates is not finite")


def test_what_a_score_needs_is_stated() -> None:
    plain = Needs.EVIDENCE | Needs.MODEL
    assert MembershipInference(score="loss").needs("oracle") == plain
    assert MembershipInference(score="gradient-difference").needs("oracle") == plain | Needs.TRAINING
    assert MembershipInference(score="fedmia-loss").needs("oracle") == plain | Needs.COHORT


def test_options_that_do_not_exist_are_answered_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"score is one of loss, gradient-norm, .*, got 'luck'"):
        MembershipInference(score="luck")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="candidates must be at least 5, got 4"):
        MembershipInference(candidates=4)
