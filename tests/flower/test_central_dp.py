"""CentralDP in a federation: what Flower's wrappers get wrong, and what it hands to the strategy inside."""

import math
import random

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower
from scipy.stats import binom

from fedaudit.audit.auditor import Auditor
from fedaudit.errors import ConfigError, RecordError
from fedaudit.flower import AuditStrategy, CentralDP
from fedaudit.flower.arrays import to_state_dict
from fedaudit.simulation.in_process import InProcessGrid
from tests.verification import flower_rounds as f

N = f.N
SILENT = 1e-9


def wrap(z=SILENT, clip=1.0, inner=None, seed=0, **options):
    return CentralDP(inner or flower.FedAvg(**f.COMMON), z, clip, N, seed=seed, **options)


def run(strategy, app=None, **options):
    return f.run(strategy, app or f.client_app(), **options)


def change(weights, number=0):
    before, after = weights[number], weights[number + 1]
    return {name: after[name].double() - before[name].double() for name in before}


def length(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def clipped_mean(updates, clip, divisor=N):
    total = {}
    for update in updates:
        whole = length(update.delta)
        for name, delta in update.delta.items():
            scaled = delta.double() * min(1.0, clip / whole) if whole else delta.double()
            total[name] = total.get(name, 0) + scaled / divisor
    return total


def close(first, second, tolerance=2e-6):
    return all(torch.allclose(first[n], second[n], atol=tolerance, rtol=0) for n in second)


@pytest.mark.parametrize("length_", [0.3, 3.0], ids=["short", "long"])
def test_the_weights_move_by_the_mean_of_clipped_updates(length_):
    seen, weights = run(wrap(clip=0.8), f.client_app(length=length_))
    for number in (1, 2):
        assert close(change(weights, number - 1), clipped_mean(seen[number], 0.8))


def test_a_scalar_is_clipped_with_the_rest():
    """Flower's defect 2: the scalar moves by 1000."""
    _, weights = run(wrap(clip=1.0), f.client_app(scale=1000.0), rounds=1)
    assert length(change(weights)) <= 1.0 * (1 + 1e-5)
    assert float(change(weights)["scale"]) == pytest.approx(1.0, rel=1e-3)


def test_replies_are_paired_by_name():
    """Flower's defect 4: one client's keys come in another order."""
    straight, mixed = (run(wrap(clip=0.8), f.client_app(order=order), rounds=1)[1] for order in (False, True))
    assert f.same(straight[1], mixed[1])


@pytest.mark.parametrize(("options", "weight"), [({}, 1), ({"weights": "capped", "cap": 20}, 20)])
def test_a_client_of_many_examples_does_not_exceed_the_assumed_sensitivity(options, weight):
    """Flower's defect 5: one client holds 993 of 1000 examples."""
    counts = {}

    def examples(partition):
        return counts.setdefault(partition, 993 if partition == 0 else 1)

    strategy = wrap(clip=0.5, **options)
    seen, weights = run(strategy, f.client_app(examples=examples), rounds=1)
    divisor = strategy.plan.mechanism.divisor
    large = next(u for u in seen[1] if u.num_examples == 993)
    others = [u for u in seen[1] if u is not large]
    alone = clipped_mean([large], 0.5, divisor / weight)
    rest = clipped_mean(others, 0.5, divisor)
    assert close(change(weights), {name: alone[name] + rest[name] for name in alone})
    assert length(alone) == pytest.approx(strategy.plan.mechanism.sensitivity(0.5), rel=1e-6)


def test_integer_entries_keep_their_broadcast_value_and_type():
    """Flower's defect 6: a counter is released exactly, and an average makes it a float."""
    _, weights = run(wrap(), arrays=f.initial(counter=True))
    assert [int(state["steps"]) for state in weights] == [3, 3, 3]
    assert weights[-1]["steps"].dtype == torch.int64 and list(weights[-1]) == list(weights[0])


def test_a_zero_update_is_averaged_like_any_other():
    """Flower's defect 7: the server divides by its norm."""
    seen, weights = run(wrap(), f.client_app(length=0.0, scale=0.0), rounds=1)
    assert len(seen[1]) == N and length(change(weights)) < 1e-6


def test_a_failed_client_leaves_the_round_and_its_divisor():
    """Flower's defect 8: one failure cancels the round."""
    app = f.client_app(examples=lambda partition: 10 if partition else 0)  # no examples: rejected
    seen, weights = run(wrap(clip=0.5), app, rounds=1)
    assert len(seen[1]) == N - 1
    assert close(change(weights), clipped_mean(seen[1], 0.5, divisor=N))


def test_a_client_whose_metrics_differ_decides_about_nobody_else():
    """A vote on what clients report would let one client remove the others from the sum."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        metrics = {"num-examples": 10} | ({"own": 1.0} if partition < N // 2 + 1 else {})
        arrays = message.content["arrays"]
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)

    seen, _ = run(wrap(), app, rounds=1)
    assert len(seen[1]) == N
    plain, _ = run(flower.FedAvg(**f.COMMON), app, rounds=1)
    assert len(plain[1]) < N


def test_clients_metrics_are_not_released():
    """Flower's defect 9: losses leave as they are."""
    app = f.client_app(metrics={"train-loss": 0.25})

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        content = RecordDict({"metrics": MetricRecord({"num-examples": 3, "loss": 1.0})})
        return Message(content, reply_to=message)

    inner = {**f.COMMON, "fraction_evaluate": 1.0, "min_evaluate_nodes": N}
    for shown in (False, True):
        with InProcessGrid(app, N, seed=1) as grid:
            strategy = wrap(inner=flower.FedAvg(**inner), evaluate_on_clients=shown)
            result = strategy.start(grid, f.initial(), num_rounds=1)
        assert not result.train_metrics_clientapp
        assert bool(result.evaluate_metrics_clientapp) == shown


def test_noise_does_not_come_from_the_global_generators():
    """Flower's defect 10: whoever seeds numpy fixes the noise."""
    seeding = {"before_round": lambda _: (np.random.seed(7), random.seed(7), torch.manual_seed(7))}
    app = f.client_app(length=0.0, scale=0.0)
    _, weights = run(wrap(1.0), app, **seeding)
    assert not close(change(weights, 0), change(weights, 1), tolerance=1e-3)
    _, again = run(wrap(1.0), app)
    _, other = run(wrap(1.0, seed=1), app)
    unseeded = [run(wrap(1.0, seed=None), app, rounds=1)[1][1] for _ in range(2)]
    assert all(f.same(a, b) for a, b in zip(weights, again, strict=True))
    assert not f.same(weights[1], other[1]) and not f.same(*unseeded)


def test_a_second_start_of_one_wrapper_draws_new_noise_and_goes_on_spending():
    app, strategy = f.client_app(length=0.0, scale=0.0), wrap(1.0)
    first, second = (run(strategy, app, rounds=1)[1] for _ in range(2))
    assert not close(change(first), change(second), tolerance=1e-3)
    assert strategy.ledger.rounds == 2


def test_released_noise_has_the_standard_deviation_of_theory():
    """1230 coordinates of two tensors: a chi-square interval at 1e-6 is 10 % to either side."""
    released = []
    strategy = wrap(2.0, 0.4, on_release=released.append)
    seen, weights = run(strategy, rounds=3)
    for number, done in enumerate(released, 1):
        mean, moved = clipped_mean(seen[number], 0.4), change(weights, number - 1)
        noise = torch.cat([(moved[n] - mean[n]).reshape(-1) for n in mean])
        assert done.release.noise_std == pytest.approx(2.0 * 0.4 / N)
        assert float(noise.std()) == pytest.approx(2.0 * 0.4 / N, rel=0.1)
        assert (done.round, done.replies, done.releases) == (number, N, number)
    assert [d.guarantee.epsilon for d in released] == sorted(d.guarantee.epsilon for d in released)
    assert released[-1].guarantee == strategy.guarantee and strategy.guarantee.unit == "client"


def test_an_adaptive_norm_shrinks_over_short_updates_and_grows_over_long_ones():
    """Flower's defects 1 and 3."""
    for long in (0.2, 5.0):
        released = []
        strategy = wrap(0.5, 1.0, adaptive=True, count_noise=0.5, clip_lr=0.5, on_release=released.append)
        run(strategy, f.client_app(length=long), rounds=4)
        norms = [done.release.clip_norm for done in released] + [strategy.clip_norm]
        assert norms[0] == 1.0 and (norms[-1] < 0.75 if long < 1 else norms[-1] > 1.33)
        split = (0.5**-2 - 1.0**-2) ** -0.5
        assert [d.release.noise_std for d in released] == pytest.approx([split * n / N for n in norms[:-1]])
        assert [d.release.next_clip_norm for d in released] == norms[1:]


# --- the strategy inside ------------------------------------------------------------------------------


def test_fedavg_returns_the_noised_mean_to_the_last_bit():
    released = []
    _, weights = run(wrap(1.0, on_release=released.append), rounds=1)
    for name, sent in weights[0].items():
        expected = (sent.double() + released[0].release.change[name]).to(sent.dtype)
        assert torch.equal(weights[1][name], expected)


def test_a_server_step_is_taken_with_the_noised_mean():
    released = []
    inner = flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.9, **f.COMMON)
    _, weights = run(wrap(1.0, inner=inner, on_release=released.append), rounds=3)
    buffer = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in weights[0].items()}
    for number, done in enumerate(released):
        for name in buffer:
            buffer[name] = 0.9 * buffer[name] + done.release.change[name]
        assert close(change(weights, number), {n: 0.5 * b for n, b in buffer.items()})


class Tally(flower.FedAvg):
    """A strategy of a user's that looks at replies and leaves the mean alone."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def aggregate_train(self, server_round, replies):
        kept = list(replies)
        self.seen.append([dict(to_state_dict(m.content["arrays"])) for m in kept])
        return super().aggregate_train(server_round, kept)


def test_the_wrapped_strategy_sees_the_released_mean_and_nothing_else():
    inner = Tally(**f.COMMON)
    _, weights = run(wrap(1.0, inner=inner), rounds=2)
    assert [len(replies) for replies in inner.seen] == [1, 1]
    assert all(f.same(replies[0], after) for replies, after in zip(inner.seen, weights[1:], strict=True))


class Restless(flower.FedAvg):
    def start(self, *args, **kwargs):
        return None


@pytest.mark.parametrize("kind", ["FedAdam", "FedAdagrad", "FedYogi", "FedProx"])
def test_strategies_that_step_with_a_mean_run(kind):
    _, weights = run(wrap(0.5, inner=getattr(flower, kind)(**f.COMMON)), arrays=f.initial(counter=True))
    assert all(bool(tensor.isfinite().all()) for tensor in weights[-1].values())
    assert int(weights[-1]["steps"]) == 3 and not f.same(weights[0], weights[-1])


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (lambda: flower.FedMedian(**f.COMMON), "take a plain mean, got FedMedian: use FedAvg, FedProx"),
        (lambda: flower.FedTrimmedAvg(beta=0.2, **f.COMMON), "plain mean, got FedTrimmedAvg"),
        (lambda: flower.Krum(**f.COMMON), "plain mean, got Krum"),
        (lambda: flower.QFedAvg(0.1, **f.COMMON), "plain mean, got QFedAvg"),
        (lambda: f.fixed(1.0, 1.0), "got the wrapper DifferentialPrivacyServerSideFixedClipping"),
        (lambda: wrap(), "got the wrapper CentralDP"),
        (
            lambda: AuditStrategy(flower.FedAvg(), Auditor(None, "")),
            "the wrapper AuditStrategy: put it outside",
        ),
        (lambda: Restless(**f.COMMON), "must not override start"),
        (
            lambda: flower.FedAvg(train_metrics_aggr_fn=lambda records, key: MetricRecord()),
            "metrics are not released .* got FedAvg with train_metrics_aggr_fn: leave it out",
        ),
    ],
)
def test_a_strategy_that_does_not_fit_is_refused(inner, message):
    with pytest.raises(ConfigError, match=message):
        wrap(inner=inner())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sampled_clients": 0}, "fixed divisor of the sum of updates, got 0"),
        ({}, "needs epsilon > 0 or noise-multiplier > 0"),
        ({"epsilon": 1.0}, "divides epsilon over rounds, got none"),
        ({"noise_multiplier": 1.0, "delta": 0.5}, "under 1 / clients"),
    ],
)
def test_options_that_say_too_little_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CentralDP(flower.FedAvg(), **{"num_sampled_clients": 8, **options})


# --- replies, budget, sampling, state -----------------------------------------------------------------


def asked(strategy, grid, number=1):
    return list(strategy.configure_train(number, f.initial(), ConfigRecord(), grid))


def test_a_client_counts_once_and_only_if_it_was_asked():
    with InProcessGrid(f.client_app(), N, seed=1) as grid:
        once, twice, strange = wrap(), wrap(), wrap(inner=flower.FedAvg(**f.COMMON))
        replies = list(grid.send_and_receive(asked(once, grid)))
        expected = once.aggregate_train(1, replies)[0]
        asked(twice, grid)
        assert twice.aggregate_train(1, [*replies, *replies])[0] == expected
        asked(strange, grid)
        strange._asked = frozenset()
        nothing = to_state_dict(strange.aggregate_train(1, replies)[0])
        assert close(nothing, to_state_dict(f.initial()))


def test_a_round_without_replies_releases_noise():
    with InProcessGrid(f.client_app(), N, seed=1) as grid:
        strategy = wrap(1.0)
        asked(strategy, grid)
        made = to_state_dict(strategy.aggregate_train(1, [])[0])
    before = to_state_dict(f.initial())
    moved = torch.cat([(made[n] - before[n]).reshape(-1) for n in before])
    assert float(moved.std()) == pytest.approx(1 / N, rel=0.1) and strategy.ledger.rounds == 1


def test_the_order_of_replies_changes_nothing():
    with InProcessGrid(f.client_app(), N, seed=1) as grid:
        forward, backward = wrap(), wrap()
        replies = list(grid.send_and_receive(asked(forward, grid)))
        asked(backward, grid)
        one, other = forward.aggregate_train(1, replies)[0], backward.aggregate_train(1, replies[::-1])[0]
    assert one == other


def test_a_round_above_the_budget_asks_nobody_and_holds_the_model():
    held, released = [], []
    probe = wrap(1.0)
    two = probe.plan.guarantee(probe.plan.ledger().add(1.0, N, 2)).epsilon
    strategy = wrap(
        1.0,
        epsilon=two,
        on_release=released.append,
        on_hold=lambda number, reason: held.append((number, reason)),
    )
    seen, weights = run(strategy, rounds=4)
    assert len(released) == 2 and strategy.guarantee.epsilon <= two
    assert [len(seen[number]) for number in (1, 2, 3, 4)] == [N, N, 0, 0]
    assert not f.same(weights[1], weights[2]) and f.same(weights[2], weights[3])
    assert [number for number, _ in held] == [3, 4]
    assert "would exceed the budget of epsilon" in held[0][1] and "the model is held" in held[0][1]


def poisson(seed=0, cohort=3, **options):
    inner = flower.FedAvg(**{**f.COMMON, "min_train_nodes": 1})
    return CentralDP(inner, SILENT, 1.0, cohort, clients=N, sampling="poisson", seed=seed, **options)


def test_poisson_sampling_asks_each_client_independently():
    """Sizes and uses over 400 rounds, each within its binomial interval at 1e-6."""
    sizes, uses = [], {}
    with InProcessGrid(f.client_app(), N, seed=1) as grid:
        strategy = poisson()
        for number in range(1, 401):
            nodes = [m.metadata.dst_node_id for m in asked(strategy, grid, number)]
            sizes.append(len(nodes))
            for node in nodes:
                uses[node] = uses.get(node, 0) + 1
            strategy.ledger = strategy.plan.after(strategy.ledger)
    low, high = binom.ppf(5e-7, 400, 3 / 8), binom.isf(5e-7, 400, 3 / 8)
    assert len(uses) == N and all(low <= count <= high for count in uses.values())
    variance = np.var(sizes)  # 8 * 3/8 * 5/8 = 1.875; a shuffled or fixed cohort has less
    assert 1.3 < variance < 2.5 and min(sizes) == 0 and max(sizes) > 5


def test_the_divisor_under_poisson_sampling_is_the_expected_cohort():
    released = []
    seen, weights = run(poisson(cohort=4, on_release=released.append), rounds=5)
    assert len({done.replies for done in released}) > 1
    for number in range(1, 6):
        expected = clipped_mean(seen[number], 1.0, divisor=4) if seen[number] else {}
        assert close(change(weights, number - 1), expected)
    assert released[0].plan.sample_rate == 0.5


def test_poisson_sampling_wants_all_clients_to_be_asked():
    with pytest.raises(ConfigError, match=r"draws from all clients, got fraction_train=0\.5 in FedAvg"):
        wrap(inner=flower.FedAvg(fraction_train=0.5, fraction_evaluate=0.0), sampling="poisson")

    class Few(flower.FedAvg):
        def configure_train(self, *args):
            return list(super().configure_train(*args))[:2]

    with (
        InProcessGrid(f.client_app(), N, seed=1) as grid,
        pytest.raises(ConfigError, match="a strategy that asks 2 of 8"),
    ):
        asked(wrap(inner=Few(**f.COMMON), sampling="poisson"), grid)


def test_what_is_kept_continues_a_run_to_the_last_bit():
    options = {"adaptive": True, "count_noise": 2.0}
    _, expected = run(wrap(1.0, **options), rounds=4)
    first = wrap(1.0, **options)
    _, half = run(first, rounds=2)
    second = wrap(1.0, **options)
    second.take_state(first.state_to_keep())
    assert second.ledger == first.ledger and second.clip_norm == first.clip_norm != 1.0
    untouched = wrap(1.0, **options)
    assert untouched.clip_norm != second.clip_norm
    arrays = ArrayRecord({name: f.Array(t.numpy()) for name, t in half[-1].items()})
    with InProcessGrid(later(2), N, seed=1) as grid:
        ended = second.start(grid, arrays, num_rounds=2).arrays
    assert f.same(to_state_dict(ended), expected[-1])


def later(done):
    """The same clients, who count rounds from `done` on."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(message.content["config"]["server-round"]) + done
        partition = int(context.node_config["partition-id"])
        arrays = {
            name: f.Array(np.asarray(a.numpy() + f.learnt(partition, number, a.numpy(), 1.0)))
            for name, a in message.content["arrays"].items()
        }
        content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 10})}
        return Message(RecordDict(content), reply_to=message)

    return app


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({}, "what CentralDP kept is damaged .*: start the run anew"),
        ({"ledger": {"clients": 3}, "clip-norm": 1.0}, "is damaged"),
        (
            {"ledger": poisson().ledger.to_lists(), "clip-norm": 1.0},
            "the sampling it began with, got 8, none after 8, poisson",
        ),
    ],
)
def test_a_state_of_another_federation_is_refused(kept, message):
    with pytest.raises(RecordError, match=message):
        wrap().take_state(kept)
