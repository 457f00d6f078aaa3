"""Inversion of FedAvg updates: the client's local steps are unrolled and differentiated through."""

from dataclasses import dataclass
from typing import ClassVar

from fedaudit.attacks.inversion import Inversion


@dataclass(frozen=True)
class LocalSteps(Inversion):
    """Inputs whose simulated local training ends where the client's did.

    Matches theta_0 - theta_T of plain SGD, with the number of steps, the batch size and the learning rate
    the server knows. Every step has images of its own. With several local epochs every epoch has its own
    copies, tied by a prior that does not depend on their order; at the end the copies are paired and
    averaged. Epochs of one batch share their images instead, which is exact.

    Which batch a derived label was in is unknown: one restart deals them to the batches of an epoch in turn,
    the others at random, and the lowest objective decides. Where the order is known to be the same
    in all epochs, ``epoch-order=fixed`` shares the images instead.

    On smooth models L-BFGS with total variation gets much further than signs with the same terms in about
    the same time, and than L-BFGS without; on a sigmoid LeNet neither the precision nor the distance
    mattered: ``local-steps(optimizer=lbfgs, precision=double, objective=euclidean, restarts=1, spread=0.05,
    tv=0.03, anneal=3, epoch-prior=1, iterations=1200)``. Total variation decides what the update leaves
    open, so that textured images come out worse than smooth ones.

    Momentum, Adam, weight decay and Poisson batches are NOT modelled. Time and memory grow with the
    number of steps.

    Published settings: Dimitrov et al. take squared distances, Adam with step size 0.1 to 0.4, 200
    iterations, total variation 2e-4 to 1e-3, a clip penalty of 2 to 10 and known counts; Geiping et al. the
    settings of Inverting Gradients.

    Source: Geiping et al. 2020, arXiv 2003.14053, section 6; Dimitrov, Balunovic, Konstantinov, Vechev
    2022, arXiv 2206.12395.
    Differs from Dimitrov et al.: cosine distance, signs and a box by default, as in Inverting Gradients.
    """

    tv: float = 1e-2
    epoch_prior: float = 1e-2

    name: ClassVar[str] = "local-steps"
    unrolls: ClassVar[bool] = True
