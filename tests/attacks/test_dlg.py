import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedaudit.attacks import dlg
from fedaudit.attacks.dlg import DLG, Match, match_gradient, match_gradients
from fedaudit.attacks.scores import score
from fedaudit.data.embedded import patches
from fedaudit.models.build import build_model
from fedaudit.registry import ATTACKS
from fedaudit.spec import parse_spec
from fedaudit.types import Attack, ClientUpdate, LocalEvidence, Loss, RoundContext

LR = 0.1
Build = Callable[[], nn.Module]


def sum_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def small_net(*extra: nn.Module, bias: bool = True) -> nn.Module:
    """4x4 grey images, 4 classes, weights large enough that the activation bends."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), *extra, nn.Tanh(), nn.Linear(24, 4, bias=bias))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.4, generator=g)
    return model


def planted(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 1, 4, 4, generator=g), torch.randint(0, 4, (batch,), generator=g)


def one_step(build: Build, x: Tensor, y: Tensor, noise: float = 0.0, lr: float = LR) -> ClientUpdate:
    """What a client sends after one step of SGD in training mode, with noise on each gradient entry."""
    model = build()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    g = torch.Generator().manual_seed(9)
    delta = {
        name: -lr * (slope + noise * torch.randn(slope.shape, generator=g))
        for (name, _), slope in zip(model.named_parameters(), gradient, strict=True)
    }
    return ClientUpdate(0, 1, before, delta, len(x))


def context(build: Build, x: Tensor, **changes: object) -> RoundContext:
    known = RoundContext(
        round=1,
        build_model=build,
        loss=sum_loss,
        lr=LR,
        local_steps=1,
        batch_size=len(x),
        input_shape=tuple(x.shape[1:]),
        num_classes=4,
        seed=1,
    )
    return replace(known, **changes)  # type: ignore[arg-type]


def test_the_registered_attack_is_an_attack_with_the_options_users_write() -> None:
    attack = ATTACKS.build(parse_spec("dlg(restarts=3, labels=idlg, seconds=2)"))
    assert isinstance(attack, Attack)
    assert attack == DLG(restarts=3, labels="idlg", seconds=2)


@pytest.mark.parametrize("labels", ["joint", "idlg"])
@pytest.mark.parametrize("batch", [1, 3])
def test_planted_examples_are_recovered_from_a_single_step(batch: int, labels: str) -> None:
    x, y = planted(batch)
    found = DLG(iterations=500, labels="idlg" if labels == "idlg" else "joint").reconstruct(
        one_step(small_net, x, y), context(small_net, x)
    )
    result = score(found.x, found.y, x, y)
    assert result["psnr"] > 30
    assert result["label_pair_accuracy"] == 1.0


def test_recovery_fails_under_strong_noise_on_the_same_data() -> None:
    x, y = planted(1)
    found = DLG(iterations=500).reconstruct(one_step(small_net, x, y, noise=0.5), context(small_net, x))
    assert score(found.x, found.y, x, y)["psnr"] < 15
    assert not found.conditions["converged"]


def test_the_same_seed_gives_the_same_reconstruction_and_another_seed_another_path() -> None:
    x, y = planted(2)
    update, ctx = one_step(small_net, x, y), context(small_net, x)
    attack = DLG(iterations=20, restarts=1)
    first = attack.reconstruct(update, ctx)
    torch.rand(3)  # global draws must not matter
    assert torch.equal(first.x, attack.reconstruct(update, ctx).x)
    assert not torch.equal(first.x, attack.reconstruct(update, replace(ctx, seed=2)).x)


def test_global_random_state_and_the_update_are_left_alone() -> None:
    x, y = planted(1)
    update = one_step(small_net, x, y)
    kept = {name: value.clone() for name, value in (update.before | update.delta).items()}  # type: ignore[operator]
    model = small_net()
    state = torch.get_rng_state()
    DLG(iterations=20, labels="idlg").reconstruct(update, context(lambda: model, x))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, kept[name]) for name, value in (update.before | update.delta).items())  # type: ignore[operator]


def test_restarts_are_selected_by_the_objective_without_access_to_the_truth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = planted(1)

    def forbidden(update: ClientUpdate) -> LocalEvidence:
        raise AssertionError("the attack looked at the client's data")

    # The middle start has the lowest objective but the truth is in the first: it must lose.
    objectives = iter([0.5, 0.2, math.inf])
    inputs = iter([x, torch.zeros_like(x), x])

    def ends(*args: object, **options: object) -> Match:
        objective = next(objectives)
        return Match(next(inputs), y, objective, objective, 7, False)

    monkeypatch.setattr(dlg, "match_gradients", ends)
    found = DLG(restarts=3).reconstruct(one_step(small_net, x, y), context(small_net, x, evidence=forbidden))
    assert found.objective == 0.2
    assert torch.equal(found.x, torch.zeros_like(x))
    assert (found.steps, found.conditions["restarts"]) == (21, 3)


def test_starts_side_by_side_end_where_each_ends_alone() -> None:
    x, y = planted(2)
    gradient = one_step(small_net, x, y).gradient(context(small_net, x))
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 + 0.3 * torch.randn(3, *x.shape, generator=generator, dtype=torch.float64)
    y0 = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    alone = [match_gradient(small_net(), sum_loss, gradient, x0[k], y0[k], iterations=25) for k in range(3)]
    best = match_gradients(small_net(), sum_loss, gradient, x0, y0, iterations=25)
    lowest = min(alone, key=lambda match: match.objective)
    assert len({match.objective for match in alone}) == 3
    assert best.objective == pytest.approx(lowest.objective, rel=1e-4)
    torch.testing.assert_close(best.x, lowest.x, rtol=1e-3, atol=1e-4)
    assert best.steps == sum(match.steps for match in alone)


def test_starts_at_once_recover_planted_examples_and_count_as_restarts() -> None:
    x, y = planted(3)
    found = DLG(restarts=4, at_once=4, iterations=400).reconstruct(
        one_step(small_net, x, y), context(small_net, x)
    )
    assert score(found.x, found.y, x, y)["psnr"] > 30
    assert found.conditions["restarts"] == 4


def test_label_counts_use_the_observers_reference_data_where_idlg_uses_noise() -> None:
    def build() -> nn.Module:
        model = small_net()
        with torch.no_grad():
            model[3].weight.mul_(8)  # confident: the mean softmax of noise is not that of the client's
        return model

    x, y = planted(8)
    update, ctx = one_step(build, x, y), replace(context(build, x), reference=(x, y))
    counted = DLG(labels="counts", iterations=1, restarts=1).reconstruct(update, ctx)
    guessed = DLG(labels="idlg", iterations=1, restarts=1).reconstruct(update, ctx)
    assert torch.equal(counted.y, y.sort().values)
    assert not torch.equal(guessed.y, y.sort().values)


def test_no_further_start_is_made_after_an_accepted_one() -> None:
    x, y = planted(1)
    found = DLG(restarts=50, iterations=500).reconstruct(one_step(small_net, x, y), context(small_net, x))
    assert found.conditions["restarts"] == 1


def test_a_start_without_progress_is_abandoned_early() -> None:
    x, y = planted(1)
    found = DLG(restarts=1, iterations=100_000).reconstruct(
        one_step(small_net, x, y, noise=0.5), context(small_net, x)
    )
    assert found.steps < 5000


def test_the_time_budget_ends_the_attack_with_its_best_effort() -> None:
    x, y = planted(4)
    begin = time.monotonic()
    found = DLG(restarts=10**6, iterations=10**6, tolerance=0, accept=0, seconds=0.3).reconstruct(
        one_step(small_net, x, y), context(small_net, x)
    )
    assert time.monotonic() - begin < 5
    assert bool(torch.isfinite(found.x).all())


class Exploding(nn.Module):
    """Not finite away from the middle of the value range: every long step of the optimiser diverges."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().amax() < self.limit)


def test_a_run_that_diverges_keeps_finite_values() -> None:
    x, y = planted(2)

    def build() -> nn.Module:
        return nn.Sequential(Exploding(0.7), small_net())

    truth = 0.4 + 0.2 * x
    found = DLG(iterations=200).reconstruct(one_step(build, truth, y), context(build, x))
    assert bool(torch.isfinite(found.x).all())
    assert math.isfinite(found.objective)


def test_an_attack_whose_every_start_diverges_says_so() -> None:
    x, y = planted(1)
    update = one_step(small_net, x, y)
    bad = replace(update, before={f"1.{name}": value for name, value in update.before.items()})
    named = replace(bad, delta={f"1.{name}": value for name, value in update.delta.items()})

    def build() -> nn.Module:
        return nn.Sequential(Exploding(0.0), small_net())

    with pytest.raises(ValueError, match="no start of dlg had a finite objective in 2 restarts"):
        DLG().reconstruct(named, context(build, x))


def test_the_objective_is_the_squared_distance_of_the_gradients() -> None:
    x, _ = planted(2)
    model = small_net().double()
    logits = torch.zeros(2, 4, dtype=torch.float64)
    sought = {name: torch.full_like(p, 0.1) for name, p in model.named_parameters()}
    found = match_gradient(model, sum_loss, sought, x, logits, iterations=1, deadline=0.0)
    loss = -(torch.full((2, 4), 0.25) * model(x.double()).log_softmax(-1)).sum(-1).mean()
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    assert found.objective == pytest.approx(sum(float(((s - 0.1) ** 2).sum()) for s in slopes))
    assert torch.equal(found.x, x.double())
    assert found.steps == 0


def test_several_local_steps_and_the_assumptions_are_stated() -> None:
    x, y = planted(1)
    attack = DLG(iterations=5, restarts=1, mode="eval")
    one = attack.reconstruct(one_step(small_net, x, y), context(small_net, x))
    two = attack.reconstruct(one_step(small_net, x, y), context(small_net, x, local_steps=2))
    assert "warning" not in one.conditions
    assert two.conditions["warning"] == "single-gradient attack on a multi-step update: not expected to work"
    assert (one.conditions["batchnorm-mode"], one.conditions["labels"], one.conditions["batch-size"]) == (
        "eval",
        "joint",
        1,
    )


def test_a_batch_norm_gradient_fits_the_truth_only_in_the_mode_it_was_made_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build() -> nn.Module:
        return small_net(nn.BatchNorm1d(24))

    x, y = planted(3)
    update, ctx = one_step(build, x, y), context(build, x)  # one_step runs in training mode

    def at_the_truth(
        model: nn.Module, loss: Loss, gradient: Mapping[str, Tensor], *_: Tensor, **__: float
    ) -> Match:
        return match_gradients(model, loss, gradient, x[None], y[None], deadline=0.0)

    monkeypatch.setattr(dlg, "match_gradients", at_the_truth)
    assert DLG(mode="train").reconstruct(update, ctx).conditions["converged"]
    assert float(DLG(mode="eval").reconstruct(update, ctx).conditions["relative-objective"]) > 0.01


def test_dropout_is_off_so_that_the_objective_is_deterministic() -> None:
    def build() -> nn.Module:
        return small_net(nn.Dropout(0.5))

    x, y = planted(1)
    update = one_step(small_net, x, y)
    renamed = {name.replace("3.", "4."): value for name, value in update.before.items()}
    moved = {name.replace("3.", "4."): value for name, value in update.delta.items()}
    found = DLG(iterations=300).reconstruct(replace(update, before=renamed, delta=moved), context(build, x))
    assert score(found.x, found.y, x, y)["psnr"] > 30


def test_withheld_layers_are_not_matched() -> None:
    x, y = planted(1)
    update = one_step(small_net, x, y)
    shared = {name: value for name, value in update.delta.items() if not name.startswith("3.")}
    found = DLG(iterations=500).reconstruct(replace(update, delta=shared), context(small_net, x))
    assert score(found.x, found.y, x, y)["psnr"] > 30


def test_attack_errors_say_what_to_do() -> None:
    x, y = planted(2)
    update, ctx = one_step(small_net, x, y), context(small_net, x)
    zero = {name: torch.zeros_like(value) for name, value in update.delta.items()}
    with pytest.raises(ValueError, match="finite and not zero, got squared norm 0"):
        DLG().reconstruct(replace(update, delta=zero), ctx)
    with pytest.raises(ValueError, match="names no parameter of the model"):
        DLG().reconstruct(replace(update, delta={"other": torch.ones(2)}), ctx)
    with pytest.raises(ValueError, match="needs shape"):
        DLG().reconstruct(replace(update, delta={"1.bias": torch.ones(2)}), ctx)
    with pytest.raises(ValueError, match="state them"):
        DLG().reconstruct(update, replace(ctx, loss=None))
    with pytest.raises(ValueError, match="positive batch size"):
        DLG().reconstruct(update, replace(ctx, batch_size=None))
    with pytest.raises(ValueError, match="needs the head"):
        DLG(labels="idlg").reconstruct(update, replace(ctx, num_classes=5))
    with pytest.raises(ValueError, match="restarts must be positive, got 0"):
        DLG(restarts=0)
    with pytest.raises(ValueError, match="spread must be positive"):
        DLG(spread=0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        DLG(seconds=-1.0)


def test_a_batch_without_a_head_bias_needs_joint_labels() -> None:
    def build() -> nn.Module:
        return small_net(bias=False)

    x, y = planted(2)
    with pytest.raises(ValueError, match="use labels=joint"):
        DLG(labels="idlg").reconstruct(one_step(build, x, y), context(build, x))
    found = DLG(labels="idlg", iterations=300).reconstruct(
        one_step(build, x[:1], y[:1]), context(build, x[:1])
    )
    assert found.y.tolist() == y[:1].tolist()


@pytest.mark.slow
@pytest.mark.replication
def test_untrained_sigmoid_lenet_leaks_at_least_18_of_20_natural_images() -> None:
    data = patches()
    decibels = []
    for k in range(20):
        x, y = data.x[26 * k + 7][None], torch.tensor([k % 10])

        def build(seed: int = k) -> nn.Module:
            return build_model("lenet", (3, 32, 32), num_classes=10, seed=seed)

        found = DLG().reconstruct(one_step(build, x, y), context(build, x, num_classes=10, seed=k))
        decibels.append(score(found.x, found.y, x, y)["psnr"])
    assert sum(d > 30 for d in decibels) >= 18, [round(d, 1) for d in decibels]
