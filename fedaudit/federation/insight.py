"""What an oracle adds to a run: the clients' batches, and updates of one step without noise."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedaudit.federation.setup import Setup, setup, summed_cross_entropy
from fedaudit.measures.ghost_kernels import example_gradients
from fedaudit.training.local import steps_per_round
from fedaudit.types import ClientUpdate, StepRelease
from fedaudit.verification.configured import ConfiguredClaims, Insight


def insight(claims: ConfiguredClaims) -> Insight:
    """Rebuild the federation of a run from its configuration; simulation only.

    Raises:
        DataError: if the data is not there any more.
    """
    made = setup(claims.config.flat())

    def noise_free(update: ClientUpdate, release: StepRelease) -> Mapping[str, Tensor] | None:
        settings = claims.settings(update.round)
        linear = settings.optimizer == "sgd" and not settings.weight_decay
        if not release.clip_norm or not linear or steps_per_round(update.num_examples, settings) != 1:
            return None  # after one noised step the gradients depend on the noise
        unit = settings.lr / min(settings.batch_size, update.num_examples)
        return _clipped_step(made, update, release, unit)

    return Insight(noise_free, lambda update: made.batches(update.client_id, update.round))


def _clipped_step(made: Setup, update: ClientUpdate, release: StepRelease, unit: float) -> dict[str, Tensor]:
    """-unit times the sum of the batch's clipped gradients at the broadcast weights, by parameter."""
    model = made.build_model()
    model.load_state_dict(dict(update.before))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    (rows,) = made.batches(update.client_id, update.round)
    total = torch.zeros(sum(p.numel() for p in parameters.values()))
    if len(rows):
        x, y = made.training_data(update.client_id, update.before)
        gradients = example_gradients(
            model,
            summed_cross_entropy,
            x[rows],
            y[rows],
            clip_norm=release.clip_norm,
            per_layer=release.per_layer,
        )
        total = gradients.sum(0)
    pieces = torch.split(-unit * total, [p.numel() for p in parameters.values()])
    return {name: piece.reshape(p.shape) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}
