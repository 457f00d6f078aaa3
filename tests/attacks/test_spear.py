import math
import time

import pytest
import torch
from torch import Tensor, nn

from fedaudit.attacks.separation import numerical_rank, separate
from fedaudit.attacks.spear import Spear
from fedaudit.data.embedded import digits, patches
from fedaudit.models.build import build_model
from tests.attacks.planted import context, examples, largest_error, planted, seeded, trained


def layer(batch: int, seed: int, classes: int = 0, M: int = 200, N: int = 64) -> tuple[Tensor, ...]:
    """W, c, x and the slopes D of a ReLU layer; upstream in general position, or of a rank `classes` - 1."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(M, N, generator=g, dtype=torch.float64) / N**0.5
    bias = 0.1 * torch.randn(M, generator=g, dtype=torch.float64)
    x = torch.randn(batch, N, generator=g, dtype=torch.float64)
    if classes:
        upstream = torch.randn(batch, classes - 1, generator=g, dtype=torch.float64)
        upstream = upstream @ torch.randn(classes - 1, M, generator=g, dtype=torch.float64)
    else:
        upstream = torch.randn(batch, M, generator=g, dtype=torch.float64)
    return weight, bias, x, upstream * (x @ weight.T + bias > 0)


@pytest.mark.parametrize("tau", [0.1, 0.38])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6, 8])
def test_a_planted_batch_of_up_to_eight_is_exact_in_a_second(batch: int, tau: float) -> None:
    weight, bias, x, d = layer(batch, seed=batch)
    started = time.perf_counter()
    rank, _ = numerical_rank(d.T @ x, 0.0)
    found = separate(d.T @ x, d.sum(0), weight, bias, rank, torch.Generator().manual_seed(0), tau=tau)
    assert time.perf_counter() - started < 5
    assert rank == batch
    order = torch.cdist(x, found.x).argmin(dim=1)
    assert float((found.x[order] - x).abs().max()) < 1e-10
    assert float((found.slopes[order] - d).abs().max()) < 1e-10
    assert torch.equal(found.slopes[order] == 0, d == 0)
    assert torch.allclose(found.zeros[order], (d == 0).double().mean(dim=1))


@pytest.mark.parametrize("classes", [2, 3])
def test_parallel_output_gradients_do_not_mislead_the_search(classes: int) -> None:
    """With two classes combinations of examples have MORE zeros than the examples."""
    weight, bias, x, d = layer(4, seed=5, classes=classes)
    if classes == 2:
        scaled = d / d.abs().amax(dim=0).clamp_min(1e-9)
        assert int((d != 0).all(dim=0).sum()) > 5
        both = (d[0] != 0) & (d[1] != 0)
        ratio = d[0][both] / d[1][both]
        assert float(ratio.std()) < 1e-12
        assert scaled.isfinite().all()
    found = separate(d.T @ x, d.sum(0), weight, bias, 4, torch.Generator().manual_seed(0))
    assert largest_error(found.x, x) < 1e-9


def test_sixteen_examples_are_within_the_default_budget() -> None:
    weight, bias, x, d = layer(16, seed=1, M=300)
    found = separate(d.T @ x, d.sum(0), weight, bias, 16, torch.Generator().manual_seed(0))
    assert largest_error(found.x, x) < 1e-10
    assert found.submatrices < 2**15  # what uniform draws would need for a single example


def test_the_search_is_the_same_for_the_same_seed() -> None:
    weight, bias, x, d = layer(4, seed=0)
    runs = [separate(d.T @ x, d.sum(0), weight, bias, 4, torch.Generator().manual_seed(s)).x for s in (3, 3)]
    assert torch.allclose(*runs, rtol=0, atol=1e-12)  # LAPACK's last bits depend on where arrays lie


def test_the_rank_counts_what_stands_above_noise() -> None:
    g = torch.Generator().manual_seed(0)
    low = torch.randn(60, 3, generator=g).double() @ torch.randn(3, 40, generator=g).double()
    noise = 1e-3 * torch.randn(60, 40, generator=g).double()
    assert numerical_rank(low, 0.0)[0] == 3
    assert numerical_rank(low + noise, 1e-3)[0] == 3
    assert numerical_rank(noise, 1e-3)[0] == 0
    assert numerical_rank(low + noise, 1e-3)[1] == pytest.approx(2e-3 * (math.sqrt(60) + math.sqrt(40)))


@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("source", ["digits", "patches"])
def test_a_client_that_trains_in_float32_is_read_to_a_millionth(source: str, batch: int) -> None:
    data = digits() if source == "digits" else patches()
    chosen = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(1))[:batch]
    x, y = data.x[chosen], data.y[chosen]

    def build() -> nn.Module:
        return build_model("mlp(hidden=256)", tuple(x.shape[1:]), data.num_classes, seed=1)

    found = Spear().reconstruct(trained(build, x, y), context(build, x, data.num_classes))
    assert largest_error(found.x, x) < 1e-5
    assert found.objective < 1e-9
    assert sorted(found.y.tolist()) == sorted(y.tolist())
    assert found.conditions["numerical-rank"] == batch
    assert found.conditions["relu-agreement"] == 1.0
    assert 0.3 < float(found.conditions["sparsity"]) < 0.7


def relu_net() -> nn.Module:
    return seeded(nn.Sequential(nn.Flatten(), nn.Linear(25, 128), nn.ReLU(), nn.Linear(128, 4)))


def test_examples_in_several_local_steps_are_still_separated() -> None:
    x, y = examples(4, (1, 5, 5), 4)

    def build() -> nn.Module:
        return relu_net().float()

    update = trained(build, x, y, steps=2)
    found = Spear().reconstruct(update, context(build, x, 4, local_steps=2, batch_size=2))
    assert largest_error(found.x, x) < 1e-3
    assert "approximate" in str(found.conditions["warning"])


def test_an_example_that_came_twice_counts_once() -> None:
    x, y = examples(3, (1, 5, 5), 4)
    x, y = torch.cat([x, x[:1]]), torch.cat([y, y[:1]])
    found = Spear().reconstruct(planted(relu_net, x, y), context(relu_net, x, 4))
    assert found.conditions["numerical-rank"] == 3
    assert largest_error(found.x, x) < 1e-6


def test_weak_noise_of_unknown_size_is_tolerated() -> None:
    x, y = examples(2, (1, 5, 5), 4)
    found = Spear().reconstruct(planted(relu_net, x, y, noise=1e-4), context(relu_net, x, 4))
    assert largest_error(found.x, x) < 0.02
    assert float(found.conditions["noise-std"]) > 0


def test_strong_noise_ends_the_search_without_a_reconstruction() -> None:
    x, y = examples(4, (1, 5, 5), 4)
    update = planted(relu_net, x, y, noise=1.0)
    with pytest.raises(ValueError, match=r"found \d of \d directions, and no set that fits|above its noise"):
        Spear(submatrices=4000).reconstruct(update, context(relu_net, x, 4))


def test_the_budget_ends_the_search() -> None:
    weight, bias, x, d = layer(12, seed=0)
    g = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="of 12 directions, and no set that fits the ReLUs, within 20 subm"):
        separate(d.T @ x, d.sum(0), weight, bias, 12, g, submatrices=20)
    with pytest.raises(ValueError, match="within 0 submatrices"):
        separate(d.T @ x, d.sum(0), weight, bias, 12, g, deadline=0.0)


def test_what_spear_does_not_apply_to_is_answered_in_a_sentence() -> None:
    x, y = examples(2, (1, 5, 5), 4)

    def smooth() -> nn.Module:
        return seeded(nn.Sequential(nn.Flatten(), nn.Linear(25, 16), nn.Tanh(), nn.Linear(16, 4)))

    with pytest.raises(ValueError, match=r"needs ReLU, and nothing else, behind '1' \(Linear\)"):
        Spear().reconstruct(planted(smooth, x, y), context(smooth, x, 4))
    many, labels = examples(30, (1, 5, 5), 4)
    with pytest.raises(
        ValueError, match=r"at most min\(units, inputs\) = 25 examples of '1' \(Linear\), got 30"
    ):
        Spear().reconstruct(planted(relu_net, many, labels), context(relu_net, many, 4))
    weight, bias, x, d = layer(2, seed=0)
    with pytest.raises(ValueError, match="1 <= b <= min"):
        separate(d.T @ x, d.sum(0), weight, bias, 65, torch.Generator())
    with pytest.raises(ValueError, match="tau is a share"):
        Spear(tau=1.0)
    with pytest.raises(ValueError, match="submatrices must be positive"):
        Spear(submatrices=0)
    with pytest.raises(ValueError, match="seconds must not be negative"):
        Spear(seconds=-1.0)
