"""Input-loss curvature against explicit Hessians, finite differences and quadratics whose answer is known."""

import math

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, vmap
from torch.nn.functional import cross_entropy, mse_loss

from fedaudit.measures.curvature import (
    closed_form_traces,
    curvature_norm,
    hessian_probes,
    memorisation_ceiling,
    trace_hessian,
    trace_hessian_closed_form,
    trace_hessian_squared,
)
from fedaudit.measures.piecewise_linear import curved_module
from fedaudit.measures.probes import random_signs

C, D = 4, 12


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def loss(outputs, labels):
    return cross_entropy(outputs, labels, reduction="sum")


def filled(model, seed=0):
    generator = seeded(seed)
    for p in model.parameters():
        p.data = 0.6 * torch.randn(p.shape, generator=generator)
    return model.double().eval()


def relu_mlp():
    return filled(
        nn.Sequential(
            nn.Flatten(), nn.Linear(D, 9), nn.ReLU(), nn.Linear(9, 7), nn.LeakyReLU(), nn.Linear(7, C)
        )
    )


def tanh_mlp():
    return filled(nn.Sequential(nn.Flatten(), nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, C)))


def max_pool_cnn():
    return filled(
        nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d((1, 2)),
            nn.Flatten(),
            nn.Linear(6, C),
        )
    )


def group_norm_cnn():
    return filled(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * D, C)
        )
    )


NETS = {"relu": relu_mlp, "tanh": tanh_mlp, "max-pool": max_pool_cnn, "group-norm": group_norm_cnn}
each_net = pytest.mark.parametrize("build", NETS.values(), ids=NETS.keys())
piecewise_linear = pytest.mark.parametrize("build", [relu_mlp, max_pool_cnn], ids=["relu", "max-pool"])


def examples(B=5, seed=1):
    generator = seeded(seed)
    x = torch.randn(B, 1, 3, D // 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(C, (B,), generator=generator)


def explicit_hessians(model, x, y):
    """(B, D, D), one torch.func.hessian per example."""

    def value(row, label):
        return loss(model(row.reshape(1, *x.shape[1:])), label[None])

    return torch.stack(
        [hessian(value)(row.flatten(), label) for row, label in zip(x, y, strict=True)]
    ).detach()


def trace(H):
    return H.diagonal(dim1=-2, dim2=-1).sum(-1)


def off_diagonal_squared(H):
    return H.square().sum((-2, -1)) - H.diagonal(dim1=-2, dim2=-1).square().sum(-1)


@each_net
def test_products_are_those_of_the_explicit_hessian(build):
    model, (x, y) = build(), examples()
    H = explicit_hessians(model, x, y)
    v = random_signs(x, 6, seeded(7)).flatten(2)
    found = hessian_probes(model, loss, x, y, 6, seeded(7))
    Hv = torch.einsum("bij,bkj->kbi", H, v)
    torch.testing.assert_close(found.quadratic, torch.einsum("kbi,bki->kb", Hv, v), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found.squares, Hv.square().sum(2), rtol=1e-10, atol=1e-11)


@piecewise_linear
def test_the_closed_form_is_the_explicit_trace(build):
    model, (x, y) = build(), examples(6)
    H = explicit_hessians(model, x, y)
    torch.testing.assert_close(trace_hessian_closed_form(model, x), trace(H), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(closed_form_traces(model, x)[1], trace(H @ H), rtol=1e-9, atol=1e-12)
    assert float(trace(H).min()) > 1e-6


@piecewise_linear
def test_the_trace_of_a_piecewise_linear_net_is_the_sum_of_absolute_eigenvalues(build):
    model, (x, y) = build(), examples()
    absolute = torch.linalg.eigvalsh(explicit_hessians(model, x, y)).abs().sum(1)
    torch.testing.assert_close(trace_hessian_closed_form(model, x), absolute, rtol=1e-9, atol=1e-12)


def test_the_label_does_not_change_the_curvature_of_a_piecewise_linear_net_and_does_of_another():
    x, y = examples()
    same, other = (
        [hessian_probes(model, loss, x, labels, 2, seeded()).quadratic for labels in (y, (y + 1) % C)]
        for model in (relu_mlp(), tanh_mlp())
    )
    torch.testing.assert_close(same[0], same[1], rtol=1e-9, atol=1e-11)
    assert float((other[0] - other[1]).abs().min()) > 1e-4


@each_net
def test_the_mean_over_probes_is_the_trace_within_its_variance(build):
    model, (x, y) = build(), examples()
    H = explicit_hessians(model, x, y)
    n = 300
    found = trace_hessian(model, loss, x, y, n, seeded(3))
    deviation = (2 * off_diagonal_squared(H) / n).sqrt()
    assert float(((found.mean - trace(H)) / deviation).abs().max()) < 4
    # a sample standard deviation is within a few times sqrt((kurtosis - 1) / (4 n)) < 0.2 of the true one
    assert float((found.standard_error / deviation - 1).abs().max()) < 0.4
    squared = trace_hessian_squared(model, loss, x, y, n, seeded(4))
    deviation = (2 * off_diagonal_squared(H @ H) / n).sqrt()
    assert float(((squared.mean - trace(H @ H)) / deviation).abs().max()) < 4


def test_a_quadratic_has_its_known_trace_and_squared_trace():
    """Indefinite on purpose: the trace keeps its sign and the squared trace has none."""
    generator = seeded(5)
    M = torch.randn(50, 50, generator=generator, dtype=torch.float64)
    M = (M + M.T) / 2
    M -= torch.eye(50) * (trace(M) + 5.14) / 50
    B, n = 40, 50
    x = torch.randn(B, 50, generator=generator, dtype=torch.float64)
    found = hessian_probes(nn.Identity(), lambda o, y: (o @ M * o).sum() / 2, x, torch.zeros(B), n, generator)
    variance = 2 * float(off_diagonal_squared(M))
    assert float(found.quadratic.mean()) == pytest.approx(-5.14, abs=4 * math.sqrt(variance / (B * n)))
    # the variance of B n samples has relative deviation sqrt((kurtosis - 1) / (B n)), about 0.04
    assert float(found.quadratic.var()) == pytest.approx(variance, rel=0.16)
    truth = float(trace(M @ M))
    deviation = math.sqrt(2 * float(off_diagonal_squared(M @ M)) / (B * n))
    assert float(found.squares.mean()) == pytest.approx(truth, abs=4 * deviation)
    norm = float(found.norm(1.0).mean.mean())
    assert 0.98 * math.sqrt(truth) < norm < math.sqrt(truth)


@pytest.mark.parametrize("build", [tanh_mlp, relu_mlp], ids=["tanh", "relu"])
def test_finite_differences_of_the_gradient_give_the_same_trace(build):
    model, (x, y) = build(), examples(3)
    gradient = vmap(grad(lambda row, label: loss(model(row[None]), label[None])))
    h, total = 1e-5, torch.zeros(3, dtype=torch.float64)
    for d in range(D):
        step = torch.zeros(D, dtype=torch.float64)
        step[d] = h
        step = step.reshape(x.shape[1:])
        difference = gradient(x + step, y) - gradient(x - step, y)
        total += difference.flatten(1)[:, d] / (2 * h)
    torch.testing.assert_close(trace(explicit_hessians(model, x, y)), total, rtol=1e-6, atol=1e-8)
    if build is relu_mlp:
        torch.testing.assert_close(trace_hessian_closed_form(model, x), total, rtol=1e-6, atol=1e-8)


def test_the_published_score_is_ours_divided_by_its_batch_size():
    """|grad L(x + h v) - grad L(x)| of a MEAN over the batch, in double precision; its error is O(h)."""
    model, (x, y) = tanh_mlp(), examples(8)
    v = random_signs(x, 5, seeded(2))

    def gradient(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(cross_entropy(model(at), y), at)[0]

    h = 1e-4
    published = sum((gradient(x + h * v[:, k]) - gradient(x)).flatten(1).norm(dim=1) for k in range(5)) / 5
    ours = curvature_norm(model, loss, x, y, 5, seeded(2), step=h)
    torch.testing.assert_close(published * len(x), ours.mean, rtol=1e-2, atol=0.0)


def test_a_mean_loss_divides_the_score_and_a_step_multiplies_it():
    model, (x, y) = tanh_mlp(), examples(4)
    summed = curvature_norm(model, loss, x, y, 3, seeded())
    averaged = curvature_norm(model, cross_entropy, x, y, 3, seeded(), step=2e-3)
    torch.testing.assert_close(averaged.mean, summed.mean * 2 / 4)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_do_not_change_the_numbers(chunk):
    model, (x, y) = group_norm_cnn(), examples(7)
    whole = hessian_probes(model, loss, x, y, 4, seeded())
    parts = hessian_probes(model, loss, x, y, 4, seeded(), chunk=chunk)
    torch.testing.assert_close(parts.quadratic, whole.quadratic, rtol=1e-10, atol=1e-12)
    model = relu_mlp()
    torch.testing.assert_close(
        trace_hessian_closed_form(model, x, chunk=chunk),
        trace_hessian_closed_form(model, x),
        rtol=1e-12,
        atol=0.0,
    )


def test_a_confident_example_keeps_its_digits_in_single_precision():
    """p is 1 to seven digits: a difference of two sums in that precision would have none left."""
    model = relu_mlp()
    x = 30 * examples(6)[0]
    exact = trace_hessian_closed_form(model, x)
    assert float(model(x).detach().softmax(1).max()) > 1 - 1e-7
    # a logit of size 100 has an error of 1e-5 in single precision, and so has the ratio of probabilities
    torch.testing.assert_close(
        trace_hessian_closed_form(model.float(), x.float()), exact, rtol=1e-3, atol=1e-30
    )


@pytest.mark.parametrize(
    "quiet",
    [lambda o, y: o.sum(), lambda o, y: (0 * o).sum(), lambda o, y: torch.tensor(1.0)],
    ids=["linear", "zero", "constant"],
)
def test_a_loss_without_curvature_has_none(quiet):
    x, y = examples(3)
    found = hessian_probes(nn.Identity(), quiet, x, y, 2, seeded())
    assert found.quadratic.shape == (2, 3)
    assert not found.squares.any()


def test_measuring_changes_neither_model_nor_inputs_nor_global_random_state():
    model, (x, y) = max_pool_cnn(), examples()
    before = [t.clone() for t in (x, *model.state_dict().values())]
    state = torch.get_rng_state()
    trace_hessian(model, loss, x, y, 2, seeded())
    trace_hessian_closed_form(model, x)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *model.state_dict().values()), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert not x.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Own(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), r"'1' \(Sigmoid\)"),
        (nn.Sequential(nn.GroupNorm(1, 2)), r"'0' \(GroupNorm\)"),
        (nn.Sequential(nn.LayerNorm(2)), r"'0' \(LayerNorm\)"),
        (nn.Sequential(nn.BatchNorm1d(2)).train(), r"'0' \(BatchNorm1d in training mode\)"),
        (
            nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)).eval(),
            r"'0' \(BatchNorm1d without running",
        ),
        (nn.Sequential(nn.Dropout()).train(), r"'0' \(Dropout in training mode\)"),
        (Own(), r"the model itself \(Own\)"),
    ],
    ids=["sigmoid", "group-norm", "layer-norm", "batch-norm", "no-statistics", "dropout", "own"],
)
def test_a_model_that_may_bend_is_refused_by_the_name_of_its_module(model, named):
    with pytest.raises(ValueError, match=f"piecewise linear in the input, got {named}.*use trace_hessian"):
        trace_hessian_closed_form(model, torch.ones(3, 2))


def test_group_norm_really_bends():
    """The closed form would be wrong for it, which is why it is not on the list."""
    model, x = group_norm_cnn(), examples(2)[0]
    assert curved_module(model) == "'1' (GroupNorm)"
    z = vmap(grad(lambda row: model(row[None])[0, 0]))
    h = 1e-5
    v = random_signs(x, 1, seeded())[:, 0]
    assert float((z(x + h * v) - z(x - h * v)).detach().abs().max() / (2 * h)) > 1e-2


@pytest.mark.parametrize(
    ("model", "x", "probes", "message"),
    [
        (nn.Identity(), torch.ones(2, 2), 2, "at least one, got 2 and 3"),
        (nn.Identity(), torch.ones(3, 2, dtype=torch.int64), 2, "continuous inputs, got torch.int64"),
        (nn.Identity(), torch.ones(3, 2), 1, "probes must be at least 2, got 1"),
        (
            nn.BatchNorm1d(2).train(),
            torch.ones(3, 2),
            2,
            r"couple the examples, got layer '' \(BatchNorm1d\)",
        ),
        (
            nn.Dropout().train(),
            torch.ones(3, 2),
            2,
            r"nothing at random, got layer '' \(Dropout\): eval\(\) it",
        ),
    ],
    ids=["lengths", "tokens", "probes", "batch-norm", "dropout"],
)
def test_what_has_no_curvature_is_refused(model, x, probes, message):
    with pytest.raises(ValueError, match=message):
        trace_hessian(
            model, lambda o, y: mse_loss(o[:, 0], y, reduction="sum"), x, torch.ones(3), probes, seeded()
        )


class OnceOnly(torch.autograd.Function):
    """An operation whose gradient cannot be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, signal):
        return 2 * signal


def test_an_operation_that_is_differentiable_once_is_refused_and_not_left_out():
    x = torch.ones(2, 3)
    with pytest.raises(
        ValueError, match="differentiable twice, also by the input, got from torch: an operation"
    ):
        trace_hessian(nn.Tanh(), lambda o, y: OnceOnly.apply(o).exp().sum(), x, torch.ones(2), 2, seeded())


def test_outputs_that_are_no_logits_are_refused():
    with pytest.raises(ValueError, match=r"needs logits \(B, C\), got outputs \(1, 2, 3\)"):
        trace_hessian_closed_form(nn.Linear(2, 3), torch.ones(4, 2, 2))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 8.0])
def test_memorisation_by_randomised_response_stays_below_the_ceiling(epsilon):
    kept, flipped = (1 / (1 + math.exp(-sign * epsilon)) for sign in (1, -1))
    assert kept - flipped <= memorisation_ceiling(epsilon)


def test_no_private_pair_of_probabilities_exceeds_the_ceiling_by_more_than_the_stated_delta_term():
    epsilon, delta = 0.7, 0.05
    P, Q = torch.meshgrid(*[torch.linspace(0, 1, 2001, dtype=torch.float64)] * 2, indexing="ij")
    private = math.exp(epsilon) * Q + delta >= P
    most = float((P - Q)[private].max())
    ceiling = memorisation_ceiling(epsilon)
    assert ceiling < most <= ceiling + delta * math.exp(-epsilon)


def test_a_negative_epsilon_is_refused():
    with pytest.raises(ValueError, match="epsilon is at least 0, got -1"):
        memorisation_ceiling(-1)
