"""What reads a release follows per-layer clipping: against gradients clipped tensor by tensor in a loop."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.federation.insight import insight
from fedaudit.inference.candidate_scores import align, candidate_scores
from fedaudit.inference.membership import MembershipInference
from fedaudit.inference.shadow_updates import _release_for
from fedaudit.maths.example_clipping import clip_by_tensor, tensor_clip_norm
from fedaudit.measures.ghost_kernels import example_gradients
from fedaudit.measures.gradient_coordinates import clipped_gradients
from fedaudit.measures.gradient_uniqueness import ExampleGradientUniqueness, gradient_uniqueness
from fedaudit.measures.layer_coordinates import clipped_tensor_grams, layer_coordinates
from fedaudit.measures.local_release import LocalTraining, mean_gradient
from fedaudit.training.local import TrainSettings, train_locally
from fedaudit.types import ClientUpdate, LocalEvidence, RoundContext, StepRelease
from fedaudit.verification.derive import step_claims

EXAMPLES, CLIP = 8, 0.5
RELEASE = StepRelease(CLIP, 0.25, 1.0, per_layer=True)


def build_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def loss(outputs, labels):
    return cross_entropy(outputs, labels, reduction="sum")


def examples():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(EXAMPLES, 5, generator=generator) * 2, torch.arange(EXAMPLES) % 3


def naive():
    """Clipped gradients (n, P), one backward pass and one tensor at a time, in float64."""
    model, (x, y) = build_model(), examples()
    rows = []
    for i in range(EXAMPLES):
        gradients = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        largest = CLIP / math.sqrt(len(gradients))
        parts = [g.double().flatten() * min(1.0, largest / float(g.norm())) for g in gradients]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def weights():
    return {name: tensor.clone() for name, tensor in build_model().state_dict().items()}


def update():
    generator = torch.Generator().manual_seed(2)
    delta = {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in weights().items()}
    return ClientUpdate(0, 1, weights(), delta, EXAMPLES)


def context(**known):
    return RoundContext(
        1, build_model, loss, lr=0.2, local_steps=2, batch_size=4, release=lambda _: RELEASE, **known
    )


def test_clipping_by_tensor_keeps_the_whole_under_the_norm_and_short_tensors_as_they_are():
    rows = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.1, 0.0, 0.0, 90.0], [0.0, 0.0, 0.0, 0.0]])
    clipped = clip_by_tensor(rows, [2, 2], 2.0)
    expected = torch.tensor([[0.6, 0.8, 0, 0], [0.1 / math.sqrt(2), 0, 0, 1], [0, 0, 0, 0]]) * math.sqrt(2)
    torch.testing.assert_close(clipped, expected)
    assert tensor_clip_norm(2.0, 2) == pytest.approx(math.sqrt(2))
    for norm, sizes in ((0.0, [4]), (1.0, [])):
        with pytest.raises(ValueError, match="a norm > 0 and at least one tensor"):
            clip_by_tensor(rows, sizes, norm)


def test_both_ways_to_form_gradients_clip_by_tensor():
    model, (x, y) = build_model(), examples()
    for rows in (
        example_gradients(model, loss, x, y, clip_norm=CLIP, per_layer=True),
        clipped_gradients(model, weights(), loss, x, y, CLIP, per_layer=True),
    ):
        torch.testing.assert_close(rows.double(), naive(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budget", [2**25, 1], ids=["held", "by ghost kernels"])
def test_gram_matrices_of_clipped_tensors_add_up_to_that_of_clipped_gradients(budget):
    parts = clipped_tensor_grams(build_model(), loss, *examples(), CLIP, budget=budget)
    assert list(parts) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    expected = naive() @ naive().T
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(0), expected, rtol=1e-5, atol=1e-7)


def test_layer_coordinates_are_those_of_clipped_gradients():
    found = layer_coordinates(build_model(), loss, *examples(), clip_norm=CLIP, per_layer=True)
    rows = naive()
    for coordinates, part in (
        (found.whole, rows),
        (found.layers["0"], rows[:, :36]),
        (found.layers["2"], rows[:, 36:]),
    ):
        torch.testing.assert_close(coordinates @ coordinates.T, part @ part.T, rtol=1e-5, atol=1e-7)


def test_gradient_uniqueness_is_that_of_clipped_gradients():
    x, y = examples()
    release = replace(RELEASE, sample_rate=0.5)
    ctx = context(observer="oracle", evidence=lambda _: LocalEvidence(x, y, release))
    found = ExampleGradientUniqueness().per_example(update(), ctx)
    expected = gradient_uniqueness(naive() @ naive().T, release.noise_std**2 / 0.25)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_step_of_local_training_is_the_mean_of_clipped_gradients():
    model, (x, y) = build_model().eval(), examples()
    training = LocalTraining(1, EXAMPLES, 1.0, replace(RELEASE, noise_std=0.0))
    found = mean_gradient(model, weights(), loss, x, y, training, torch.Generator())
    flat = torch.cat([g.flatten() for g in found.values()]).double()
    torch.testing.assert_close(flat, naive().mean(0), rtol=1e-5, atol=1e-6)


def test_the_gradient_difference_takes_clipped_gradients():
    (found,) = candidate_scores("gradient-difference", [update()], context(), *examples())
    observed = -update().flat.double() * EXAMPLES / (0.2 * 2)
    rows = naive()
    expected = observed.square().sum() - (observed - rows).square().sum(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_envelope_of_membership_takes_norms_of_clipped_gradients():
    norms = align([update()], context(), *examples(), clipped=RELEASE).norms
    torch.testing.assert_close(norms, naive().norm(dim=1), rtol=1e-5, atol=1e-7)
    assert (
        float(norms.max()) <= CLIP * (1 + 1e-6) and float(norms.min()) < 0.99 * CLIP
    )  # flat clipping would say C
    found = MembershipInference()._envelope(update(), RELEASE, examples(), context())
    flat = MembershipInference()._envelope(update(), replace(RELEASE, per_layer=False), examples(), context())
    assert 0.5 < float(found["envelope-auc"]) < float(flat["envelope-auc"])


def test_a_shadows_release_clips_as_the_clients_does():
    found = _release_for(replace(RELEASE, sample_rate=0.1), TrainSettings(batch_size=2), 8)
    assert found == replace(RELEASE, sample_rate=0.25)


def test_an_oracle_rebuilds_the_noise_free_step_of_a_per_layer_run():
    from fedaudit.config import RunConfig
    from fedaudit.federation.setup import setup

    config = RunConfig.from_flat(
        {
            "data.max-examples": 200,
            "federation.clients": 2,
            "train.local-steps": 1,
            "model.name": "mlp(hidden=8)",
            "defense.name": "dp-sgd(noise-multiplier=1, epsilon=0, clipping=per-layer, lr=0.3, batch-size=8)",
        }
    )
    made = setup(config.flat())
    model, (x, y) = made.build_model(), made.client_data(0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    release = replace(made.release(len(y)), noise_std=0.0)
    assert release.per_layer and release.sample_rate == 8 / len(y)
    train_locally(
        model, x, y, made.batches(0, 1), made.settings(1), defense=DPSGD(), release=release,
    )  # fmt: skip
    delta = {name: t - before[name] for name, t in model.state_dict().items()}
    sent = ClientUpdate(0, 1, before, delta, len(y))

    class Recorded:
        def __init__(self):
            self.config = config

        def settings(self, round_number):
            return made.settings(round_number)

    rebuilt = insight(Recorded()).noise_free(sent, release)
    for name, change in delta.items():
        torch.testing.assert_close(rebuilt[name], change, rtol=1e-4, atol=1e-6)


def test_claims_bound_the_whole_gradient_of_an_example_under_per_layer_clipping_too():
    layers, flat = (
        step_claims(replace(RELEASE, per_layer=kind), TrainSettings(batch_size=4), EXAMPLES, 2)
        for kind in (True, False)
    )
    assert layers == flat
