"""L-BFGS on several problems: the textbook's steps, torch's minima, and problems that do not meet."""

import itertools
import math
import time

import pytest
import torch
from torch import Tensor

from fedaudit.attacks.lbfgs import Quasi, _Memory, minimise


def valley(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Rosenbrock's function of each row: a long curved valley with its end at 1."""
    x = x.detach().requires_grad_()
    values = (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(dim=1)
    return values.detach(), torch.autograd.grad(values.sum(), x)[0]


def starts(count: int, size: int) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def two_loops(pairs: list[tuple[Tensor, Tensor]], slope: Tensor) -> Tensor:
    """Algorithm 7.4 of Nocedal and Wright."""
    q, factors = slope.clone(), []
    for s, y in reversed(pairs):
        factors.append(float(s @ q) / float(s @ y))
        q = q - factors[-1] * y
    s, y = pairs[-1]
    r = float(s @ y) / float(y @ y) * q
    for (s, y), factor in zip(pairs, reversed(factors), strict=True):
        r = r + s * (factor - float(y @ r) / float(s @ y))
    return r


@pytest.mark.parametrize("most", [3, 20])
def test_the_product_with_the_inverse_hessian_is_that_of_the_two_loops(most: int) -> None:
    root = starts(6, 6)
    hessian = root @ root.T + torch.eye(6, dtype=torch.float64)
    memory, pairs = _Memory(most), []
    for step in torch.randn(11, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
        pairs.append((step, hessian @ step))
        memory.add(*pairs[-1])  # with most=3 the rows move to the front twice
        slope = step.flip(0)
        torch.testing.assert_close(memory.times(slope), two_loops(pairs[-most:], slope))


def test_it_reaches_the_minima_of_torch_in_about_as_many_steps() -> None:
    first = starts(3, 12)
    found = minimise(valley, first, Quasi(1000, tolerance=1e-10))
    for row, start in enumerate(first):
        x = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [x],
            max_iter=1000,
            max_eval=3000,
            history_size=100,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-6,
        )

        def closure(x: Tensor = x) -> Tensor:
            values, slopes = valley(x.detach()[None], torch.tensor([0]))
            x.grad = slopes[0]
            return values[0]

        optimizer.step(closure)
        steps = optimizer.state[x]["n_iter"]
        assert float(found.values[row]) == pytest.approx(float(closure()), abs=1e-8)
        assert int(found.iterations[row]) < 1.2 * steps


def test_a_problem_takes_the_same_path_alone_and_among_others() -> None:
    first = starts(5, 10)
    together = minimise(valley, first, Quasi(60))
    for row in range(5):
        alone = minimise(valley, first[row : row + 1], Quasi(60))
        torch.testing.assert_close(together.points[row], alone.points[0], rtol=1e-9, atol=1e-9)
        assert together.iterations[row] == alone.iterations[0]
    assert len(set(together.values.tolist())) == 5


def test_every_iteration_lowers_the_value() -> None:
    ends = [float(minimise(valley, starts(1, 10), Quasi(n)).values) for n in range(1, 20)]
    assert all(later < earlier for earlier, later in itertools.pairwise(ends))


def test_the_worse_half_is_dropped_at_the_evaluation_that_was_asked_for() -> None:
    asked: list[list[int]] = []

    def watched(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(rows.tolist())
        return valley(x, rows)

    first = torch.stack([torch.full((6,), value, dtype=torch.float64) for value in (9.0, 1.1, -7.0, 0.9)])
    found = minimise(watched, first, Quasi(100), rungs={5: 2, 9: 1})
    assert asked[4] == [0, 1, 2, 3] and asked[5] == asked[8] == [1, 3]
    assert len(asked[9]) == 1
    assert found.survivors == "4, 2@5, 1@9"
    assert bool(found.values.isfinite().all())  # also of the dropped


def test_all_end_once_one_is_accepted() -> None:
    bowl_first = torch.tensor([[1.0], [50.0]], dtype=torch.float64)

    def quartic(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        return ((x - 1) ** 4).sum(dim=1), 4 * (x - 1) ** 3

    settings = Quasi(500, tolerance=1e-12)
    accepted = minimise(quartic, bowl_first, settings, accept=1e-9)
    assert accepted.values[0] == 0 and accepted.values[1] > 1
    assert bool((minimise(quartic, bowl_first, settings).values <= 1e-12).all())


def test_values_that_are_not_finite_shorten_the_step_and_lose_as_a_start() -> None:
    def barrier(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        return (x - x.log()).sum(dim=1), 1 - 1 / x  # minimum at 1, NaN below 0

    found = minimise(barrier, torch.tensor([[30.0], [-1.0], [1e-3]], dtype=torch.float64), Quasi(60))
    torch.testing.assert_close(found.points[[0, 2], 0], torch.ones(2, dtype=torch.float64))
    assert math.isinf(float(found.values[1]))


def test_the_deadline_ends_the_search_after_the_starts_were_evaluated() -> None:
    found = minimise(valley, starts(2, 5), Quasi(10**6), deadline=time.monotonic() - 1)
    assert found.iterations.tolist() == [0, 0]
    assert bool(found.values.isfinite().all())


def test_a_search_without_progress_ends() -> None:
    def floor(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        return 1 + 1e-6 * (x**4).sum(dim=1), 4e-6 * x**3

    assert int(minimise(floor, starts(1, 40), Quasi(10**5)).iterations) <= 150


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="iterations and history must be positive, got 0 and 100"):
        Quasi(0)
