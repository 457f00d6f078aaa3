"""What every registered measure promises, whatever it measures, for every observer it names."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedaudit.needs import Needs, missing
from fedaudit.registry import MEASURES
from fedaudit.spec import parse_spec
from fedaudit.types import (
    ClientUpdate,
    Estimate,
    Guarantee,
    LocalEvidence,
    Measure,
    PerExample,
    RoundContext,
    Skip,
    StepRelease,
)

SHAPE, CLASSES, CLIENTS, EXAMPLES, BATCH, LR = (1, 6, 6), 3, 3, 48, 4, 0.1
OBSERVED = [(name, observer) for name in MEASURES for observer in MEASURES.build(parse_spec(name)).observers]


def build_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, CLASSES)
        )


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum")


def examples(key: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(key)
    y = torch.arange(EXAMPLES) % CLASSES
    return torch.rand(EXAMPLES, *SHAPE, generator=generator) * (1 + y[:, None, None, None]) / 3, y


def updates() -> list[ClientUpdate]:
    """One plain step of every client from the same weights."""
    model = build_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = []
    for client in range(CLIENTS):
        x, y = (part[:BATCH] for part in examples(client))
        gradients = torch.autograd.grad(loss(model(x), y) / BATCH, list(model.parameters()))
        delta = {name: -LR * g for (name, _), g in zip(model.named_parameters(), gradients, strict=True)}
        found.append(ClientUpdate(client, 1, before, delta, EXAMPLES))
    return found


def context(observer: str, guarantee: Guarantee | None = None) -> RoundContext:
    private = observer in ("client", "oracle")
    release = StepRelease(1.0, 0.3, BATCH / EXAMPLES)
    return RoundContext(
        round=1,
        build_model=build_model,
        loss=loss,
        lr=LR,
        local_steps=1,
        local_epochs=1,
        batch_size=BATCH,
        input_shape=SHAPE,
        num_classes=CLASSES,
        reference=None if observer == "client" else examples(99),
        release=lambda _update: release,
        evidence=(lambda update: LocalEvidence(*examples(update.client_id), release)) if private else None,
        guarantee=lambda _update: guarantee,
        observer=observer,  # type: ignore[arg-type]
        num_updates=1 if observer == "client" else CLIENTS,
    )


def measured(name: str, observer: str) -> list[Estimate | Skip]:
    mine = updates()[:1] if observer == "client" else updates()
    return list(MEASURES.build(parse_spec(name))(mine, context(observer)))


@pytest.mark.parametrize("name", list(MEASURES))
def test_a_measure_is_built_by_its_name_and_says_what_it_is(name: str) -> None:
    measure = MEASURES.build(parse_spec(name))
    assert isinstance(measure, Measure)
    assert measure.name == name
    assert measure.scope in ("client", "round")
    assert measure.observers and set(measure.observers) <= {"server", "client", "oracle"}
    text = type(measure).__doc__ or ""
    assert re.search(r"\bnot?\b", text), "the docstring says what the number is not"
    assert "Attributes:" in text or len(vars(measure)) <= 4, "the docstring explains the options"


@pytest.mark.parametrize(("name", "observer"), OBSERVED)
def test_a_server_never_needs_evidence_and_others_never_need_reference(name: str, observer: str) -> None:
    needs = MEASURES.build(parse_spec(name)).needs(observer)
    assert (Needs.EVIDENCE if observer == "server" else Needs.REFERENCE) not in needs
    if observer == "client":  # a client sees its own update only
        assert Needs.COHORT not in needs
    assert not missing(needs, context(observer).known)


@pytest.mark.parametrize(("name", "observer"), OBSERVED)
def test_a_measure_gives_finite_numbers_with_unit_and_kind(name: str, observer: str) -> None:
    measure = MEASURES.build(parse_spec(name))
    found = measured(name, observer)
    expected = 1 if measure.scope == "round" or observer == "client" else CLIENTS
    assert len(found) == expected
    for estimate in found:
        assert isinstance(estimate, Estimate), estimate
        assert estimate.unit == measure.unit and estimate.kind in ("exact", "estimate", "lower", "upper")
        assert math.isfinite(estimate.value)
        assert all(math.isfinite(value) for value in estimate.layers.values())
        assert set(estimate.layers) <= {"0", "3", "5"}, "layers are named as the model's modules"
        if estimate.low is not None and estimate.high is not None:
            assert estimate.low <= estimate.high
        json.dumps(dict(estimate.extra))
        assert not any(isinstance(value, Tensor) for value in estimate.extra.values())


@pytest.mark.parametrize(("name", "observer"), OBSERVED)
def test_the_same_seed_gives_the_same_numbers(name: str, observer: str) -> None:
    torch.manual_seed(1)
    first = measured(name, observer)
    torch.manual_seed(2)  # the numbers hang on the context's seed, not on the process's generator
    torch.rand(3)
    assert measured(name, observer) == first


@pytest.mark.parametrize(("name", "observer"), OBSERVED)
def test_updates_and_the_process_are_left_as_they_were(name: str, observer: str) -> None:
    mine = updates()[:1] if observer == "client" else updates()
    kept = [[{key: t.clone() for key, t in part.items()} for part in (u.before, u.delta)] for u in mine]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    MEASURES.build(parse_spec(name))(mine, context(observer))
    assert torch.equal(torch.get_rng_state(), before), "global random state was used"
    for update, copies in zip(mine, kept, strict=True):
        for part, copy in zip((update.before, update.delta), copies, strict=True):
            assert all(torch.equal(tensor, copy[key]) for key, tensor in part.items())
    assert all(not tensor.requires_grad for tensor in mine[0].before.values())


@pytest.mark.parametrize(
    "name", [n for n in MEASURES if isinstance(MEASURES.build(parse_spec(n)), PerExample)]
)
def test_numbers_of_single_examples_follow_their_example(name: str) -> None:
    """One number per example, and an example keeps its number when others change places."""
    measure, update = MEASURES.build(parse_spec(name)), updates()[0]
    ctx = context("oracle")
    x, y = examples(0)
    order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(0))
    release = StepRelease(None, 0.0, 1.0)
    plain = replace(ctx, evidence=lambda _: LocalEvidence(x, y, release))
    moved = replace(ctx, evidence=lambda _: LocalEvidence(x[order], y[order], release))
    first, second = measure.per_example(update, plain), measure.per_example(update, moved)
    assert first.shape == (EXAMPLES,) and first.std() > 0
    spread = float(torch.corrcoef(torch.stack([first[order], second]).double())[0, 1])
    # probes differ with the place, and so do the numbers of a noisy estimate; without a relation the
    # correlation of 48 pairs has a standard deviation of 0.15
    assert spread > 0.5
