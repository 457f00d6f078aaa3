"""Inverting Gradients: cosine distance and total variation, by Adam on signs."""

from dataclasses import dataclass
from typing import ClassVar

from fedaudit.attacks.inversion import Inversion


@dataclass(frozen=True)
class InvertingGradients(Inversion):
    """Gradient inversion by direction: cosine distance, total variation, signed Adam in a box.

    Published settings: step size 0.1 divided by ten at 3/8, 5/8 and 7/8, 24 000 iterations, 4 to 8 restarts
    (4800 iterations, unsigned, in the released default), total variation 0.1 for trained ResNets and 1e-6
    for untrained small networks, labels known. Written ``inverting-gradients(iterations=24000, tv=0.1)``.

    Source: Geiping, Bauermeister, Droege, Moeller 2020, arXiv 2003.14053.
    Differs from Geiping et al.: fewer iterations by default; restarts run at once and the worse half is
    dropped three times in the first half; labels from the head's gradient; units as said in `Inversion`.
    """

    tv: float = 1e-2

    name: ClassVar[str] = "inverting-gradients"
