"""See through Gradients: layer-wise distances with a batch-normalisation prior."""

from dataclasses import dataclass
from typing import ClassVar

from fedaudit.attacks.inversion import Inversion
from fedaudit.attacks.objectives import Objective
from fedaudit.attacks.signed_adam import Schedule, Signed


@dataclass(frozen=True)
class SeeThroughGradients(Inversion):
    """Gradient inversion with image priors: total variation, l2 and batch-normalisation statistics.

    Published settings: Adam with step size 0.1 falling as a cosine after 50 iterations of warm-up, 20 000
    iterations, total variation 1e-4, l2 1e-6, batch-normalisation prior 0.1, ImageNet batches of 8 to 48 on
    ResNet-50. A model without running statistics has no such prior; `conditions` counts its layers.

    Source: Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov 2021, arXiv 2104.07586.
    Differs from Yin et al.: the group-consistency term, which registers several seeds on their mean, is
    left out; distances are relative to the gradient sought; no Langevin noise; labels by counts instead of
    their rule, which needs distinct labels; fewer iterations by default.
    """

    objective: Objective = "layer-norms"
    tv: float = 1e-4
    l2: float = 1e-6
    bn: float = 0.1
    signed: Signed = "none"
    schedule: Schedule = "cosine"
    warmup: int = 50

    name: ClassVar[str] = "see-through-gradients"
