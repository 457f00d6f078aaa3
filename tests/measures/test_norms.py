"""Norms and cosines of updates against dense vectors."""

import math

import pytest
import torch

from fedaudit.measures.norms import UpdateCosine, UpdateNorm, update_cosines, update_norms
from fedaudit.needs import Needs
from fedaudit.registry import MEASURES
from fedaudit.spec import parse_spec
from fedaudit.types import ClientUpdate, Measure, RoundContext

CONTEXT = RoundContext(1, num_updates=2)


def deltas(N=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (5, 4), "bias": (5,), "scale": ()}
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(N)
    ]


def rows(updates):
    return torch.stack([torch.cat([t.double().reshape(-1) for t in u.values()]) for u in updates])


def updates_of(updates):
    return [ClientUpdate(i, 1, {}, delta, 10) for i, delta in enumerate(updates)]


@pytest.mark.parametrize("elements", [1, 20, 10**6])
def test_norms_and_cosines_equal_those_of_dense_vectors(monkeypatch, elements):
    monkeypatch.setattr("fedaudit.measures.cohort.parameter_blocks.__defaults__", (elements,))
    updates = deltas()
    G = rows(updates)
    mean = G.mean(0)
    torch.testing.assert_close(update_norms(updates), G.norm(dim=1), rtol=1e-12, atol=0.0)
    cosines = G @ mean / (G.norm(dim=1) * mean.norm())
    torch.testing.assert_close(update_cosines(updates), cosines, rtol=1e-12, atol=1e-14)


def test_norms_are_accumulated_in_double_precision():
    """In single precision a large entry swallows many small ones."""
    delta = {"large": torch.tensor([1e4]), "small": torch.full((10**4,), 1e-1)}
    small = float(torch.tensor(1e-1, dtype=torch.float32))
    assert float(update_norms([delta])[0]) == pytest.approx(math.sqrt(1e8 + 1e4 * small**2), rel=1e-13)


def test_equal_updates_have_cosine_one_and_opposed_ones_minus_one():
    base = deltas(1)[0]
    opposed = {name: -t for name, t in base.items()}
    assert update_cosines([base, base]).tolist() == pytest.approx([1, 1])
    assert update_cosines([base, base, opposed]).tolist() == pytest.approx([1, 1, -1])


def test_orthogonal_updates_have_cosine_one_over_root_n():
    updates = [{"w": row} for row in torch.eye(9)]
    assert update_cosines(updates).tolist() == pytest.approx([1 / 3] * 9)


def test_cosines_do_not_depend_on_scale_or_order():
    updates = deltas()
    scaled = [{name: 1e-3 * t for name, t in u.items()} for u in reversed(updates)]
    torch.testing.assert_close(update_cosines(scaled).flip(0), update_cosines(updates), rtol=1e-6, atol=1e-7)


def test_a_zero_update_has_cosine_zero_and_says_so():
    first, zero = deltas(2)
    zero = {name: torch.zeros_like(t) for name, t in zero.items()}
    estimates = UpdateCosine()(updates_of([first, zero]), CONTEXT)
    assert [e.value for e in estimates] == pytest.approx([1, 0])
    assert [dict(e.extra) for e in estimates] == [{}, {"reason": "the update is zero"}]


def test_updates_that_cancel_have_cosine_zero_and_say_so():
    first = deltas(1)[0]
    estimates = UpdateCosine()(updates_of([first, {name: -t for name, t in first.items()}]), CONTEXT)
    assert [e.value for e in estimates] == [0, 0]
    assert {e.extra["reason"] for e in estimates} == {"the mean of the cohort is zero"}


@pytest.mark.parametrize("function", [update_norms, update_cosines])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_updates_that_are_not_finite_are_refused_by_position(function, bad):
    updates = deltas(3)
    updates[1]["bias"][2] = bad
    with pytest.raises(ValueError, match=r"NaN or infinity in updates \[1\]"):
        function(updates)


@pytest.mark.parametrize("function", [update_norms, update_cosines])
def test_updates_of_different_models_are_refused(function):
    first, second = deltas(2)
    with pytest.raises(ValueError, match="got others in update 1"):
        function([first, {**second, "more": torch.ones(1)}])


@pytest.mark.parametrize(
    ("name", "needs", "function"),
    [("update-norm", Needs.NOTHING, update_norms), ("update-cosine", Needs.COHORT, update_cosines)],
)
def test_registered_measures_give_one_exact_number_per_update(name, needs, function):
    measure = MEASURES.build(parse_spec(name))
    updates = deltas()
    copies = [{key: t.clone() for key, t in u.items()} for u in updates]
    estimates = measure(updates_of(updates), CONTEXT)
    assert isinstance(measure, Measure)
    assert (measure.name, measure.needs("server"), measure.observers) == (name, needs, ("server",))
    assert [e.value for e in estimates] == function(updates).tolist()
    assert {(e.unit, e.kind) for e in estimates} == {("1", "exact")}
    assert all(torch.equal(u[key], c[key]) for u, c in zip(updates, copies, strict=True) for key in c)


def test_no_updates_give_no_numbers():
    assert UpdateNorm()([], CONTEXT) == [] and UpdateCosine()([], CONTEXT) == []
