"""What privacy tokens find where the answer is known, for each observer, and in a real federation."""

import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedaudit.measures.privacy_tokens as module
from fedaudit.config import RunConfig
from fedaudit.errors import ConfigError
from fedaudit.federation.execution import execute
from fedaudit.measures.batch_pools import split_examples
from fedaudit.measures.draws import generator_for
from fedaudit.measures.privacy_tokens import MINIMUM_EXAMPLES, PrivacyTokens
from fedaudit.records import load_run
from fedaudit.registry import MEASURES
from fedaudit.spec import parse_spec
from fedaudit.types import ClientUpdate, Estimate, LocalEvidence, RoundContext, Skip, StepRelease

QUICK = {
    "steps": 60,
    "batches": 32,
    "candidates": 16,
    "share": 0.3,
    "lr": 3e-3,
    "extractor_lr": 3e-4,
    "permutations": 199,
}


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum")


def sum_of_outputs(outputs: Tensor, labels: Tensor) -> Tensor:
    """Its gradient for a weight row is the input itself: a linear map of the batch's mean features."""
    return outputs.sum()


def examples(key: int, n: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + key)
    return torch.randn(n, 12, generator=generator), torch.randint(3, (n,), generator=generator)


WEIGHTS = {"weight": torch.zeros(3, 12), "bias": torch.zeros(3)}


def update(client: int, examples: int = 60) -> ClientUpdate:
    return ClientUpdate(client, 1, WEIGHTS, {}, examples)


def context(observer: str, noise: float = 0.0, **changes) -> RoundContext:
    sizes = changes.pop("sizes", {})
    clip_norm = changes.pop("clip_norm", None)
    stds = changes.pop("stds", {})

    def release(u: ClientUpdate) -> StepRelease:
        return StepRelease(clip_norm, stds.get(u.client_id, noise), 3 / 60)

    def evidence(u: ClientUpdate) -> LocalEvidence:
        if observer == "server":
            raise AssertionError("a server has no client's examples")
        return LocalEvidence(*examples(u.client_id, sizes.get(u.client_id, 60)), release(u))

    values = {
        "build_model": lambda: nn.Linear(12, 3),
        "loss": sum_of_outputs,
        "lr": 0.1,
        "local_steps": 1,
        "batch_size": 3,
        "num_classes": 3,
        "evidence": evidence,
        "release": release,
        "reference": examples(50, 90) if observer == "server" else None,
        "observer": observer,
    }
    return RoundContext(round=1, **{**values, **changes})


def measured(ctx: RoundContext, clients: int = 3, **options) -> list[Estimate]:
    results = PrivacyTokens(**{**QUICK, **options})([update(i) for i in range(clients)], ctx)
    assert all(isinstance(result, Estimate) for result in results)
    return [result for result in results if isinstance(result, Estimate)]


@pytest.mark.parametrize("extractor", ["autoencoder", "transformer"])
def test_a_gradient_that_is_a_linear_map_of_the_features_is_traced_to_its_batch(extractor: str) -> None:
    steps = 60 if extractor == "autoencoder" else 40
    for estimate in measured(context("oracle"), extractor=extractor, steps=steps):
        assert estimate.value > 0.1 and estimate.extra["p-value"] <= 0.05
        assert estimate.low is not None and estimate.low > 0
        assert float(estimate.extra["paper-difference"]) > 0
        assert estimate.extra["ceiling"] == pytest.approx(math.log(16)) and estimate.value < math.log(16)
        assert (estimate.unit, estimate.kind) == ("nats", "estimate")
        assert estimate.extra["extractor"] == extractor


def test_noise_that_drowns_the_gradient_leaves_nothing_to_find() -> None:
    estimates = measured(context("oracle", noise=1e4), clients=10)
    p = [float(e.extra["p-value"]) for e in estimates]
    assert sum(value <= 0.05 for value in p) <= 3  # P[Bin(10, 0.05) > 3] = 0.001
    assert abs(sum(e.value for e in estimates) / 10) < 0.1


def test_a_client_with_noise_scores_lower_than_one_without_under_one_critic() -> None:
    *bare, noisy = measured(context("oracle", stds={3: 100.0}, clip_norm=10.0), clients=4, steps=100)
    assert min(estimate.value for estimate in bare) > noisy.value + 0.15
    assert float(noisy.extra["p-value"]) > 0.05
    assert all(estimate.extra["parties-in-training"] == 4 for estimate in bare)


def test_the_critic_its_choice_and_its_units_do_not_see_held_out_examples(monkeypatch) -> None:
    seen: list[Tensor] = []
    original = module.train_and_validate

    def spying(critic, train, validation, *rest):
        seen.extend(torch.cat([p.features, p.gradients[:, :12]]) for p in (*train, *validation))
        return original(critic, train, validation, *rest)

    monkeypatch.setattr(module, "train_and_validate", spying)
    ctx = context("oracle")
    parts = split_examples(60, 256, generator_for(ctx, "privacy-tokens", "split", 0))
    assert len(torch.cat(parts).unique()) == 60

    def changed(u: ClientUpdate) -> LocalEvidence:
        x, y = examples(u.client_id)
        x = x.clone()
        x[parts[2]] = 9.0
        return LocalEvidence(x, y, StepRelease(None, 0.0, 0.05))

    measured(ctx, clients=1)
    measured(context("oracle", evidence=changed), clients=1)
    assert len(seen) == 4 and all(torch.equal(a, b) for a, b in zip(seen[:2], seen[2:], strict=True))


def test_only_some_parties_train_the_critic_where_there_are_many(monkeypatch) -> None:
    monkeypatch.setattr(module, "_GROUP", 2)
    estimates = measured(context("oracle"), clients=3)
    assert sum("paper-difference" in e.extra for e in estimates) == 2
    assert all("paper-difference-held-out" in e.extra and e.extra["p-value"] <= 0.05 for e in estimates)


def test_a_server_pushes_reference_data_through_the_agreed_steps_once_per_release() -> None:
    ctx = context("server", local_steps=4, clip_norm=10.0, stds={1: 40.0})
    first, second, third = measured(ctx)
    assert first == third and first.value > second.value
    assert first.extra["examples-of"] == "reference"
    assert first.extra["local-steps"] == 4 and first.extra["batch"] == 12  # 4 steps of 3 examples
    assert first.extra["p-value"] <= 0.05
    (capped,) = measured(ctx, clients=1, local_steps=2)
    assert capped.extra["local-steps"] == 2 and capped.extra["batch"] == 6
    by_epochs = context("server", local_steps=0, local_epochs=2)
    small = PrivacyTokens(**QUICK)([update(0, examples=5)], by_epochs)[0]
    assert isinstance(small, Estimate)
    assert small.extra["local-steps"] == 4 and small.extra["batch"] == 5  # no more than the client has


def test_later_steps_of_the_server_start_where_the_first_ended() -> None:
    """Where the gradient depends on the weights, two steps depend on the learning rate and one does not."""
    values = {}
    for steps in (1, 2):
        for lr in (0.1, 5.0):
            ctx = context("server", local_steps=steps, lr=lr, loss=loss)
            values[steps, lr] = measured(ctx, clients=1, steps=20)[0].value
    assert values[1, 0.1] == values[1, 5.0] and values[2, 0.1] != values[2, 5.0]


def test_a_client_with_too_few_examples_is_skipped_and_the_others_are_measured() -> None:
    measure, ctx = (
        PrivacyTokens(**{**QUICK, "steps": 20}),
        context("oracle", sizes={1: 10, 2: MINIMUM_EXAMPLES}),
    )
    enough, few, just = measure([update(0), update(1), update(2)], ctx)
    assert isinstance(enough, Estimate) and isinstance(just, Estimate) and isinstance(few, Skip)
    assert "at least 24 examples to split, got 10" in few.reason
    with pytest.raises(ValueError, match="at least 24 examples to split, got 10"):
        measure([update(1)], ctx)


def test_a_critic_that_does_not_fit_is_refused_before_anything_is_computed() -> None:
    from fedaudit.models.build import build_model

    model = build_model("alexnet", (3, 32, 32), 2, 0)
    wide = ClientUpdate(0, 1, model.state_dict(), {}, 60)
    x, y = torch.rand(60, 3, 32, 32), torch.zeros(60, dtype=torch.int64)

    def evidence(_update: ClientUpdate) -> LocalEvidence:
        return LocalEvidence(x, y, StepRelease(None, 0.0, 0.1))

    def no_loss(_outputs: Tensor, _labels: Tensor) -> Tensor:
        raise AssertionError("nothing is computed")

    ctx = context("oracle", build_model=lambda: model, evidence=evidence, loss=no_loss)
    for extractor in (
        "autoencoder",
        "transformer",
    ):  # 2.1 million entries times 512, 20 bytes each
        rule = rf"must fit in 500 MB, got 2\d{{4}} MB for the {extractor} .* lower coordinates"
        with pytest.raises(ValueError, match=rule):
            PrivacyTokens(extractor=extractor, coordinates=0)([wide], ctx)  # type: ignore[arg-type]


def test_options_are_written_in_the_spec_and_checked() -> None:
    built = MEASURES.build(parse_spec("privacy-tokens(extractor=transformer, layers=0+2, extractor-lr=1e-4)"))
    assert built == PrivacyTokens(extractor="transformer", layers="0+2", extractor_lr=1e-4)
    with pytest.raises(ConfigError, match="extractor=mlp"):
        MEASURES.build(parse_spec("privacy-tokens(extractor=mlp)"))
    with pytest.raises(ValueError, match="candidates must be at least 4, got 3"):
        PrivacyTokens(candidates=3)
    with pytest.raises(ValueError, match=r"share inside \(0, 1\], got .* 0.0"):
        PrivacyTokens(share=0.0)


def test_a_federation_records_tokens_of_every_client_for_oracle_and_server(tmp_path) -> None:
    spec = "privacy-tokens(steps=20, batches=8, candidates=8, permutations=99, layers=conv1+conv2)"
    config = RunConfig.from_flat(
        {
            "data.max-examples": 400,
            "model.name": "lenet",
            "federation.clients": 2,
            "federation.rounds": 1,
            "train.batch-size": 8,
            "train.local-steps": 2,
            "audit.measures": spec,
            "audit.observers": "client, oracle, server",
            "output.directory": str(tmp_path),
        }
    )
    rows = execute(config).records.query("quantity == 'privacy-tokens'")
    assert sorted(zip(rows["observer"], rows["client_id"], strict=True)) == [
        (observer, client) for observer in ("client", "oracle", "server") for client in (0, 1)
    ]
    assert (
        set(rows["status"]) == {"ok"} and set(rows["unit"]) == {"nats"} and set(rows["kind"]) == {"estimate"}
    )
    extra = [json.loads(text) for text in rows["extra"]]
    assert {e["layers"] for e in extra} == {"conv1+conv2"}
    assert {e["local-steps"] for e, o in zip(extra, rows["observer"], strict=True) if o == "server"} == {2}
    assert len(load_run(next(tmp_path.iterdir())).records) > 6
