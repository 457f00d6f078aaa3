"""The presets end to end on planted data: recovery, failure under noise, local steps, honesty."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedaudit.attacks import inversion
from fedaudit.attacks.epoch_copies import averaged
from fedaudit.attacks.inversion import MULTI_STEP, Inversion
from fedaudit.attacks.inverting_gradients import InvertingGradients
from fedaudit.attacks.local_steps import LocalSteps
from fedaudit.attacks.scores import score
from fedaudit.attacks.see_through_gradients import SeeThroughGradients
from fedaudit.registry import ATTACKS
from fedaudit.spec import parse_spec
from fedaudit.types import Attack, ClientUpdate, LocalEvidence, RoundContext

LR = 0.2
Build = Callable[[], nn.Module]


def sum_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def small_net(*extra: nn.Module) -> nn.Module:
    """8x8 grey images, 4 classes, smooth, with weights large enough that the activation bends."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        *extra,
        nn.Tanh(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(192, 4),
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3, generator=generator)
    return model


def dense_net() -> nn.Module:
    """The same images through one hidden layer: fast enough to unroll steps in a test."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3, generator=generator)
    return model


def planted(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth images (count, 1, 8, 8) and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = F.interpolate(
        torch.rand(count, 1, 3, 3, generator=generator), size=8, mode="bilinear", align_corners=True
    )
    return x, torch.randint(0, 4, (count,), generator=generator)


def sent(
    x: Tensor,
    y: Tensor,
    batches: Sequence[Sequence[int]] | None = None,
    *,
    build: Build = small_net,
    noise: float = 0.0,
) -> ClientUpdate:
    """What a client sends after plain SGD on these batches, with noise on every entry of the gradient."""
    model = build()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for batch in batches or [range(len(x))]:
        optimizer.zero_grad()
        F.cross_entropy(model(x[list(batch)]), y[list(batch)]).backward()
        optimizer.step()
    generator = torch.Generator().manual_seed(9)
    delta = {
        name: p.detach() - before[name] - LR * noise * torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
    }
    return ClientUpdate(0, 1, before, delta, len(x))


def context(x: Tensor, *, batch: int = 0, steps: int = 1, build: Build = small_net) -> RoundContext:
    return RoundContext(
        round=1,
        build_model=build,
        loss=sum_loss,
        lr=LR,
        local_steps=steps,
        batch_size=batch or len(x),
        input_shape=tuple(x.shape[1:]),
        num_classes=4,
        seed=1,
    )


def stated(y: Tensor) -> str:
    return "-".join(map(str, y.tolist()))


def psnr_of(attack: Attack, update: ClientUpdate, ctx: RoundContext, x: Tensor, y: Tensor) -> float:
    found = attack.reconstruct(update, ctx)
    return score(found.x, found.y, x, y)["psnr"]


def test_the_presets_are_registered_attacks_with_the_options_users_write() -> None:
    built = ATTACKS.build(parse_spec("inverting-gradients(iterations=24000, tv=0.1, labels=idlg)"))
    assert isinstance(built, Attack)
    assert built == InvertingGradients(iterations=24000, tv=0.1, labels="idlg")
    assert ATTACKS.build(parse_spec("see-through-gradients")) == SeeThroughGradients()
    assert ATTACKS.build(parse_spec("local-steps(epoch-features=conv)")) == LocalSteps(epoch_features="conv")


def test_a_planted_image_is_recovered_twenty_decibels_above_guessing() -> None:
    x, y = planted(1)
    attack = InvertingGradients(restarts=3, iterations=120, tv=1e-4)
    found = attack.reconstruct(sent(x, y), context(x))
    guess = torch.rand(x.shape, generator=torch.Generator().manual_seed(5))
    assert score(found.x, found.y, x, y)["psnr"] > score(guess, y, x, y)["psnr"] + 20
    assert torch.equal(found.y, y)
    assert found.objective < 1e-3


def test_recovery_fails_under_strong_noise_where_a_grey_image_is_as_good() -> None:
    x, y = planted(1)
    attack = InvertingGradients(restarts=3, iterations=120, tv=1e-2)
    found = psnr_of(attack, sent(x, y, noise=5.0), context(x), x, y)
    grey = score(torch.full_like(x, 0.5), y, x, y)["psnr"]
    assert found < grey + 3


def test_labels_optimised_jointly_are_found_with_the_image() -> None:
    x, y = planted(1)
    found = InvertingGradients(restarts=3, iterations=150, tv=1e-3, labels="joint").reconstruct(
        sent(x, y), context(x)
    )
    assert torch.equal(found.y, y)
    assert score(found.x, found.y, x, y)["psnr"] > 15


def test_see_through_gradients_recovers_through_batch_norm_in_evaluation_mode() -> None:
    def build() -> nn.Module:
        model = small_net(nn.BatchNorm2d(8))
        with torch.no_grad():
            model[1].weight.fill_(1.0)
            model[1].running_mean.fill_(0.1)
            model[1].running_var.fill_(0.5)
        return model.eval()

    x, y = planted(1)
    update = sent(x, y, build=build)
    attack = SeeThroughGradients(restarts=2, iterations=120, bn=1e-4, mode="eval", warmup=10)
    found = attack.reconstruct(update, context(x, build=build))
    assert found.conditions["bn-layers"] == 1
    assert found.conditions["restarts-together"] is True
    assert score(found.x, found.y, x, y)["psnr"] > 25


def test_batch_norm_in_training_mode_is_vectorised_without_running_statistics() -> None:
    def build() -> nn.Module:
        return small_net(nn.BatchNorm2d(8))

    x, y = planted(2)
    update = sent(x, y, build=build)
    attack = SeeThroughGradients(restarts=2, iterations=5)
    found = attack.reconstruct(update, context(x, build=build))
    assert found.conditions["restarts-together"] is True
    assert "not-vectorised" not in found.conditions


@pytest.mark.parametrize(
    ("count", "batches"),
    [(4, [[0, 1], [2, 3]]), (3, [[0], [1], [2]]), (4, [[0, 1], [2, 3], [0, 1], [2, 3]])],
    ids=["2 steps of 2", "3 steps of 1", "2 epochs of 2 steps"],
)
def test_local_steps_recovers_what_a_single_gradient_attack_cannot(
    count: int, batches: list[list[int]]
) -> None:
    x, y = planted(count)
    update = sent(x, y, batches, build=dense_net)
    ctx = context(x, batch=len(batches[0]), steps=len(batches), build=dense_net)
    unrolled = LocalSteps(restarts=2, iterations=150, tv=1e-4, labels="known", classes=stated(y))
    single = InvertingGradients(restarts=2, iterations=150, tv=1e-4).reconstruct(update, ctx)
    recovered = psnr_of(unrolled, update, ctx, x, y)
    assert recovered > 17
    assert recovered > score(single.x, single.y, x, y)["psnr"] + 4
    assert single.conditions["warning"] == MULTI_STEP


def test_epochs_of_one_batch_share_their_images_and_are_matched_exactly() -> None:
    x, y = planted(1)
    update = sent(x, y, [[0], [0], [0]], build=dense_net)
    ctx = context(x, steps=3, build=dense_net)
    found = LocalSteps(restarts=2, iterations=150, tv=1e-4).reconstruct(update, ctx)
    assert found.x.shape == x.shape
    assert found.conditions["local-epochs"] == 3
    assert score(found.x, found.y, x, y)["psnr"] > 25


def test_several_epochs_in_unknown_order_give_each_example_once() -> None:
    x, y = planted(4, seed=4)
    update = sent(x, y, [[0, 1], [2, 3], [3, 0], [1, 2]], build=dense_net)
    attack = LocalSteps(restarts=2, iterations=20, labels="counts", epoch_features="conv")
    found = attack.reconstruct(update, context(x, batch=2, steps=4, build=dense_net))
    assert found.x.shape == x.shape
    assert len(found.y) == 4
    assert (found.conditions["local-epochs"], found.conditions["unrolled-steps"]) == (2, 4)


def test_lbfgs_recovers_every_image_of_epochs_whose_order_is_known() -> None:
    x, y = planted(4)
    update = sent(x, y, [[0, 1], [2, 3]] * 2, build=dense_net)
    ctx = context(x, batch=2, steps=4, build=dense_net)
    smooth = LocalSteps(
        restarts=2,
        iterations=120,
        optimizer="lbfgs",
        objective="euclidean",
        precision="double",
        tv=1e-4,
        anneal=1,
        epoch_order="fixed",
        labels="known",
        classes=stated(y),
    )
    found = smooth.reconstruct(update, ctx)
    assert score(found.x, found.y, x, y)["psnr"] > 25
    assert (found.conditions["optimizer"], found.conditions["epoch-order"]) == ("lbfgs", "fixed")
    signed = replace(smooth, optimizer="signed-adam", anneal=0)
    assert psnr_of(signed, update, ctx, x, y) < score(found.x, found.y, x, y)["psnr"] - 3


def test_lbfgs_fails_under_strong_noise_too() -> None:
    x, y = planted(1)
    attack = InvertingGradients(restarts=2, iterations=60, optimizer="lbfgs", precision="double", tv=1e-2)
    grey = score(torch.full_like(x, 0.5), y, x, y)["psnr"]
    assert psnr_of(attack, sent(x, y, noise=5.0), context(x), x, y) < grey + 3


def test_with_a_fixed_epoch_order_the_truth_is_the_minimum_of_two_epochs() -> None:
    x, y = planted(4)
    update = sent(x, y, [[0, 1], [2, 3]] * 2)
    ctx = context(x, batch=2, steps=4)
    attack = LocalSteps(tv=0.0, labels="known", classes=stated(y), precision="double", epoch_order="fixed")
    problem = inversion._Problem.of(attack, update, ctx)
    assert problem.batches() == [slice(0, 2), slice(2, 4)] * 2
    z = ((x - 0.5) / inversion.UNIT).double()
    assert problem.objective(vectorisable=False)(z, y).item() < 1e-10
    assert problem.objective(vectorisable=False)(z[[2, 3, 0, 1]], y[[2, 3, 0, 1]]).item() > 1e-6


def test_annealing_divides_total_variation_by_ten_in_every_stage() -> None:
    x, y = planted(1)
    update, ctx = sent(x, y, build=dense_net), context(x, build=dense_net)
    attack = InvertingGradients(tv=0.5, anneal=2, iterations=9, restarts=1, labels="known", classes=stated(y))
    problem = inversion._Problem.of(attack, update, ctx)
    z = ((x - 0.3) / inversion.UNIT).float()
    values = [problem.objective(vectorisable=False, stage=stage)(z, y).item() for stage in range(3)]
    assert values[0] - values[1] == pytest.approx(10 * (values[1] - values[2]), rel=1e-3)
    assert attack.reconstruct(update, ctx).steps == 9


def test_copies_of_an_epoch_are_paired_before_they_areaveraged() -> None:
    x = planted(3)[0]
    shift = 0.01 * torch.ones_like(x)
    torch.testing.assert_close(averaged([x, (x + shift)[[2, 0, 1]], x[:2]])[2], x[2] + shift[2] / 2)


def test_the_objective_at_the_planted_truth_is_zero_up_to_rounding() -> None:
    x, y = planted(4)
    update, ctx = sent(x, y, [[0, 1], [2, 3]]), context(x, batch=2, steps=2)
    attack = LocalSteps(tv=0.0, labels="known", classes=stated(y), precision="double")
    problem = inversion._Problem.of(attack, update, ctx)
    z = ((x - 0.5) / inversion.UNIT).double()
    for vectorisable in (True, False):
        at_truth = problem.objective(vectorisable=vectorisable)(z, y).item()
        assert at_truth < 1e-10  # the update itself was rounded to single precision
        assert problem.objective(vectorisable=vectorisable)(z.flip(0), y).item() > 1e-3


def test_the_same_seed_gives_the_same_image_and_nothing_outside_is_touched() -> None:
    x, y = planted(2)
    model = dense_net()
    update, ctx = sent(x, y, build=dense_net), context(x, build=lambda: model)
    kept = {name: value.clone() for name, value in update.delta.items()}
    state = torch.get_rng_state()
    attack = InvertingGradients(restarts=2, iterations=6)
    first = attack.reconstruct(update, ctx)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(2)
    assert torch.equal(first.x, attack.reconstruct(update, ctx).x)
    assert not torch.equal(first.x, attack.reconstruct(update, replace(ctx, seed=2)).x)
    assert all(torch.equal(value, kept[name]) for name, value in update.delta.items())


def test_nothing_is_chosen_by_the_truth() -> None:
    def forbidden(update: ClientUpdate) -> LocalEvidence:
        raise AssertionError("the attack looked at the client's data")

    x, y = planted(1)
    update = sent(x, y, build=dense_net)
    ctx = replace(context(x, build=dense_net), evidence=forbidden)
    objectives = [
        InvertingGradients(restarts=r, iterations=12, halve=False, precision="double")
        .reconstruct(update, ctx)
        .objective
        for r in range(1, 6)
    ]
    assert len({round(value, 9) for value in objectives}) > 1  # some later start was better
    for fewer, more in pairwise(objectives):
        assert more <= fewer + 1e-9  # one more start never makes the best one worse


class Refusing(nn.Module):
    """Reads a value of its input, which cannot be done under vmap."""

    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.detach().isfinite().all()) else x * 0


def test_a_module_that_cannot_be_vectorised_is_attacked_in_turn_with_the_same_result() -> None:
    def build() -> nn.Module:
        return nn.Sequential(Refusing(), *small_net())

    x, y = planted(1)
    named = sent(x, y, build=build)
    attack = InvertingGradients(restarts=3, iterations=15, precision="double")
    found = attack.reconstruct(named, context(x, build=build))
    plain = attack.reconstruct(sent(x, y), context(x))
    assert found.conditions["restarts-together"] is False
    assert "RuntimeError" in str(found.conditions["not-vectorised"])
    torch.testing.assert_close(found.x, plain.x)


def test_withheld_layers_are_not_matched_but_still_train() -> None:
    x, y = planted(1)
    update = sent(x, y, [[0], [0]], build=dense_net)
    ctx = context(x, steps=2, build=dense_net)
    shared = {name: value for name, value in update.delta.items() if name != "1.bias"}
    attack = LocalSteps(restarts=2, iterations=150, tv=1e-4)
    assert psnr_of(attack, replace(update, delta=shared), ctx, x, y) > 20


def test_the_time_budget_of_an_update_is_respected() -> None:
    x, y = planted(2)
    begin = time.monotonic()
    found = InvertingGradients(iterations=10**6, seconds=0.3).reconstruct(sent(x, y), context(x))
    assert time.monotonic() - begin < 10
    assert found.steps < 10**5
    assert bool(found.x.isfinite().all())


def test_double_precision_and_derived_counts_go_together() -> None:
    x, y = planted(3)
    update, ctx = sent(x, y, build=dense_net), replace(context(x, build=dense_net), reference=(x, y))
    found = InvertingGradients(restarts=1, iterations=1, precision="double").reconstruct(update, ctx)
    assert torch.equal(found.y, y.sort().values)
    assert found.x.dtype == torch.float32


def test_what_was_assumed_is_stated() -> None:
    x, y = planted(2)
    found = InvertingGradients(restarts=4, iterations=8, labels="known", classes=stated(y)).reconstruct(
        sent(x, y), context(x)
    )
    assert found.conditions["labels"] == "known"
    assert found.conditions["survivors"] == "4, 2@2, 1@4"
    assert found.steps == 4 * 2 + 2 * 2 + 4
    assert (found.conditions["batch-size"], found.conditions["local-steps"]) == (2, 1)


def test_attack_errors_say_what_to_do() -> None:
    x, y = planted(1)
    update, ctx = sent(x, y), context(x)
    attack = InvertingGradients(iterations=2, restarts=1)
    zero = {name: torch.zeros_like(value) for name, value in update.delta.items()}
    with pytest.raises(ValueError, match="finite and not zero, got norm 0"):
        attack.reconstruct(replace(update, delta=zero), replace(ctx))
    with pytest.raises(ValueError, match="state them"):
        attack.reconstruct(update, replace(ctx, loss=None))
    with pytest.raises(ValueError, match="positive batch size, got None"):
        attack.reconstruct(update, replace(ctx, batch_size=None))
    with pytest.raises(ValueError, match="restarts must be positive, got 0"):
        InvertingGradients(restarts=0)
    with pytest.raises(ValueError, match="tv must not be negative"):
        InvertingGradients(tv=-1.0)
    with pytest.raises(ValueError, match="anneal must be from 0 to iterations - 1, got 5 with 3"):
        Inversion(iterations=3, anneal=5)
    with pytest.raises(ValueError, match="spread must be positive, got 0"):
        Inversion(spread=0)
    with pytest.raises(ValueError, match="iterations and history must be positive"):
        Inversion(history=0)
    with pytest.raises(ValueError, match="classes belongs to labels=known"):
        Inversion(classes="1")
