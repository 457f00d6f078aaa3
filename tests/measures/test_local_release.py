"""A pair's gradient is what the federation's own local training would send."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.measures.local_release import LocalTraining, mean_gradient
from fedaudit.training.local import TrainSettings, train_locally
from fedaudit.types import StepRelease

PLAIN = StepRelease(None, 0.0, 1.0)
LR = 0.3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum")


def build() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


X, Y = torch.randn(8, 5, generator=seeded(1)), torch.arange(8) % 3


def mean(training: LocalTraining, seed: int = 0) -> dict[str, Tensor]:
    model = build().eval()
    return mean_gradient(model, model.state_dict(), loss, X, Y, training, seeded(seed))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_it_is_what_local_training_sends(steps: int, clip_norm: float | None) -> None:
    release = StepRelease(clip_norm, 0.0, 1.0)
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_locally(
        model,
        X,
        Y,
        [torch.arange(8)] * steps,  # whole epochs in one batch: their order does not matter
        TrainSettings(lr=LR, batch_size=8),
        defense=DPSGD(noise_multiplier=1.0) if clip_norm else None,
        release=release,
        generator=seeded(2),
    )
    found = mean(LocalTraining(steps, 8, LR, release))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], (before[name] - value) / (LR * steps), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [3, 4, 6])
def test_steps_go_through_shuffled_epochs_with_a_smaller_last_batch(steps: int) -> None:
    line = nn.Linear(5, 1, bias=False)
    seen = []

    def spying(outputs: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels.clone())
        return outputs.sum()

    training = LocalTraining(steps, 3, LR, PLAIN)
    mean_gradient(line, line.state_dict(), spying, X, torch.arange(8), training, seeded(4))
    assert [len(labels) for labels in seen] == ([3, 3, 2] * 2)[:steps]
    for epoch in (seen[:3], seen[3:6]):
        drawn = torch.cat(epoch).tolist() if epoch else []
        assert len(set(drawn)) == len(drawn)
    if steps == 6:
        assert not torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))


def test_noise_is_added_to_every_coordinate_of_the_sum_and_divided() -> None:
    release = StepRelease(0.5, 2.0, 1.0)
    quiet = mean(LocalTraining(1, 8, LR, StepRelease(0.5, 0.0, 1.0)))
    noises = []
    for seed in range(60):
        noisy = mean(LocalTraining(1, 8, LR, release), seed)
        noises.append(torch.cat([(noisy[name] - quiet[name]).flatten() for name in quiet]))
    z = torch.stack(noises) / (2.0 / 8)
    assert float(z.std()) == pytest.approx(1.0, abs=4 / (2 * z.numel()) ** 0.5)
    assert float(z.mean()) == pytest.approx(0.0, abs=4 / z.numel() ** 0.5)


def test_every_example_is_clipped_over_all_parameters_before_the_sum() -> None:
    found = mean(LocalTraining(1, 8, LR, StepRelease(1e-3, 0.0, 1.0)))
    singles = []
    for i in range(8):
        model = build()
        torch.autograd.backward(loss(model(X[i : i + 1]), Y[i : i + 1]))
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert float(flat.norm()) > 1e-3
        singles.append(flat * 1e-3 / flat.norm())
    flat = torch.cat([value.flatten() for value in found.values()])
    torch.testing.assert_close(flat, torch.stack(singles).sum(0) / 8, rtol=1e-4, atol=1e-8)
