"""Restarts in one loop: the same numbers as one at a time, halving, budget, determinism."""

import math
import time

import pytest
import torch
from torch import Tensor

from fedaudit.attacks.lbfgs import Quasi
from fedaudit.attacks.restarts import descend, descend_quasi_newton, halvings, start_generator
from fedaudit.attacks.signed_adam import Descent, SignedAdam, step_size

BOX = [(-2.0, 2.0)]


def many_wells(x: Tensor) -> Tensor:
    """A tilted egg box: one well per period, each with another depth, the deepest at 0."""
    return (x.square() / 4 + 1 - (2 * torch.pi * x).cos()).sum()


def starts(count: int, size: int = 3) -> Tensor:
    return torch.stack(
        [
            torch.randn(size, generator=start_generator("test", 0, r), dtype=torch.float64)
            for r in range(count)
        ]
    )


@pytest.mark.parametrize("signed", ["hard", "soft", "none"])
def test_restarts_at_once_take_the_same_path_as_one_at_a_time(signed: str) -> None:
    descent = Descent(40, signed=signed)  # type: ignore[arg-type]
    together = descend(many_wells, [starts(5)], descent, boxes=BOX, halve=False)
    in_turn = descend(many_wells, [starts(5)], descent, boxes=BOX, halve=False, together=False)
    alone = [descend(many_wells, [starts(5)[r : r + 1]], descent, boxes=BOX).objective for r in range(5)]
    assert together.together and not in_turn.together
    torch.testing.assert_close(together.objectives, in_turn.objectives)
    torch.testing.assert_close(together.objectives, torch.tensor(alone, dtype=torch.float64))
    assert len(set(alone)) == 5  # they end in different wells, so the comparison can fail
    torch.testing.assert_close(together.variables[0], in_turn.variables[0])


def test_lbfgs_restarts_at_once_take_the_same_path_as_one_at_a_time() -> None:
    settings = Quasi(30)
    together = descend_quasi_newton(many_wells, [starts(5)], settings, halve=False)
    in_turn = descend_quasi_newton(many_wells, [starts(5)], settings, halve=False, together=False)
    alone = [descend_quasi_newton(many_wells, [starts(5)[r : r + 1]], settings).objective for r in range(5)]
    assert together.together and not in_turn.together
    torch.testing.assert_close(together.objectives, in_turn.objectives)
    torch.testing.assert_close(together.objectives, torch.tensor(alone, dtype=torch.float64))
    assert len({round(value, 6) for value in alone}) > 2  # several wells, so the comparison can fail
    assert together.objective == min(together.objectives.tolist())


def test_lbfgs_optimises_all_variables_of_a_restart_and_keeps_what_it_was_given() -> None:
    def apart(x: Tensor, y: Tensor, centre: Tensor) -> Tensor:
        return (x - centre).square().sum() + (y - x.sum()).square().sum() + centre.abs()

    given = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    first = [torch.zeros(4, 2, 2, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)]
    found = descend_quasi_newton(apart, first, Quasi(50), given=[given])
    assert float(found.given[0]) == 0.5
    torch.testing.assert_close(found.variables[0], torch.full((2, 2), 0.5, dtype=torch.float64))
    torch.testing.assert_close(found.variables[1], torch.full((3,), 2.0, dtype=torch.float64))


def test_signed_adam_repeats_adam_of_torch_on_the_same_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    ours, theirs = x.clone(), x.clone().requires_grad_()
    descent = Descent(30, lr=0.05, signed="hard", schedule="step")
    adam, reference = SignedAdam([ours]), torch.optim.Adam([theirs], lr=0.05)
    for i in range(30):
        slope = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        ours = ours + adam.step([slope], descent)[0]
        theirs.grad = slope.sign()
        reference.param_groups[0]["lr"] = step_size(descent, i)
        reference.step()
    torch.testing.assert_close(ours, theirs.detach())


def test_the_cosine_schedule_warms_up_and_ends_near_zero() -> None:
    descent = Descent(100, lr=1.0, schedule="cosine", warmup=10)
    sizes = [step_size(descent, i) for i in range(100)]
    assert sizes[0] < 0.11
    assert max(sizes) == max(sizes[8:11])
    assert sizes[99] < 0.001


def test_halving_keeps_the_restart_that_would_have_ended_lowest() -> None:
    for seed in range(8):
        first = torch.stack(
            [
                torch.randn(2, generator=start_generator("wells", seed, r), dtype=torch.float64)
                for r in range(8)
            ]
        )
        first[seed] = torch.tensor([0.1, -0.1])  # the only one in the deepest well
        descent = Descent(120, lr=0.02)
        everyone = descend(many_wells, [first], descent, boxes=BOX, halve=False)
        halved = descend(many_wells, [first], descent, boxes=BOX)
        assert halved.restart == everyone.restart == seed
        assert halved.objective == pytest.approx(everyone.objective, abs=1e-9)
        assert halved.steps < everyone.steps / 2
        assert halved.survivors == "8, 4@20, 2@40, 1@60"


def test_halvings_end_with_one_restart_before_the_second_half() -> None:
    for restarts in range(1, 20):
        rungs = halvings(restarts, 100)
        assert list(rungs.values())[-1:] == ([1] if restarts > 1 else [])
        assert max(rungs, default=0) <= 50


def test_a_start_does_not_depend_on_how_many_others_there_are() -> None:
    assert torch.equal(starts(3), starts(7)[:3])
    assert not torch.equal(starts(2)[0], starts(2)[1])


def test_the_lowest_point_of_a_path_is_kept_not_its_last() -> None:
    found = descend(many_wells, [torch.zeros(1, 2)], Descent(3, lr=0.3, schedule="constant"), boxes=BOX)
    assert found.objective == 0.0
    assert torch.equal(found.variables[0], torch.zeros(2))


def test_every_point_lies_in_the_box() -> None:
    def away(x: Tensor) -> Tensor:
        return -x.sum()

    found = descend(away, [torch.zeros(2, 3)], Descent(50, lr=0.5, schedule="constant"), boxes=[(-1.0, 1.0)])
    assert torch.equal(found.variables[0], torch.ones(3))
    far = descend(away, [torch.full((1, 3), 9.0)], Descent(1), boxes=[(-1.0, 1.0)])
    assert far.objective == -3.0


def test_a_restart_that_is_not_finite_loses_to_any_that_is() -> None:
    def logarithm(x: Tensor) -> Tensor:
        return x.log().sum()

    first = torch.tensor([[-1.0], [0.5], [-2.0]])
    found = descend(logarithm, [first], Descent(5, lr=0.01), boxes=[None])
    assert found.restart == 1
    assert found.objectives.isinf().tolist() == [True, False, True]


def test_what_cannot_be_vectorised_runs_in_turn_with_the_same_numbers_and_says_so() -> None:
    def branching(x: Tensor) -> Tensor:
        return many_wells(x) if float(x.detach().sum()) > -100 else x.sum()  # .item() has no batching rule

    plain = descend(many_wells, [starts(4)], Descent(30), boxes=BOX)
    found = descend(branching, [starts(4)], Descent(30), boxes=BOX)
    assert not found.together
    assert "RuntimeError" in found.hindrance
    assert found.objective == pytest.approx(plain.objective)
    assert (found.restart, found.steps) == (plain.restart, plain.steps)


def test_an_error_of_the_objective_itself_is_raised_not_hidden() -> None:
    def broken(x: Tensor) -> Tensor:
        raise ValueError("labels do not fit")

    with pytest.raises(ValueError, match="labels do not fit"):
        descend(broken, [starts(2)], Descent(3), boxes=BOX)


def test_what_a_restart_is_given_stays_with_it_through_halving() -> None:
    def to(x: Tensor, centre: Tensor) -> Tensor:
        return (x - centre).square().sum() + centre.abs()

    given = torch.tensor([3.0, -1.0, 0.5, 2.0])
    found = descend(to, [torch.zeros(4, 1)], Descent(80), boxes=[None], given=[given])
    assert float(found.given[0]) == 0.5
    assert float(found.variables[0]) == pytest.approx(0.5, abs=0.01)


def test_the_deadline_stops_the_loop_with_the_best_so_far() -> None:
    begin = time.monotonic()
    found = descend(many_wells, [starts(3)], Descent(10**7), boxes=BOX, deadline=begin + 0.2)
    assert time.monotonic() - begin < 5
    assert 0 < found.steps < 10**6
    assert math.isfinite(found.objective)


def test_optimiser_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="iterations and lr must be positive"):
        Descent(0)
    with pytest.raises(ValueError, match="iterations and lr must be positive"):
        Descent(5, lr=0.0)
