"""Does a client hold many examples with a latent attribute? A probe trained on the observer's shadow updates.

The observer draws batches from its own data, some with the attribute frequent and some with it rare, trains
on each as a client would, and fits a probe to the updates. With it the clients' updates are read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from fedaudit.attacks.roc import auc
from fedaudit.maths.linear_probes import fit_logistic

Update = Mapping[str, Tensor]
Shadows = tuple[Sequence[Update], Tensor]

MINIMUM_TRAINING = 5  # shadows of each kind
MINIMUM_VALIDATION = 3
BLOCK = 2**21  # numbers in one block of updates: 16 MB in float64
_NEGLIGIBLE = 1e-10  # a layer's squared length is 1: a component of less variance is noise of rounding


@dataclass(frozen=True, eq=False)
class AttributeInference:
    """What a probe says about each update.

    Attributes:
        log_odds: that the attribute is frequent (T,); above 0 for yes.
        shadow_auc: how well the probe orders the validation shadows, which its penalty was chosen on. They
            share examples: with few of them it can lie far from 0.5 by chance, and it has no interval.
        dims: components the probe sees.
        penalty: its L2 penalty.
    """

    log_odds: Tensor
    shadow_auc: float
    dims: int
    penalty: float


def prevalence_batches(
    attribute: Tensor,
    count: int,
    size: int,
    *,
    low: float = 0.25,
    high: float = 0.75,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Rows of `count` batches of `size` examples, every second one with the attribute frequent.

    A batch has round(share * size) examples with the attribute, without repetition; batches share examples.

    Args:
        attribute: which of the observer's own examples have it, booleans (n,).
        count: batches.
        size: examples in each.
        low: share with the attribute where it is rare.
        high: share where it is frequent.
        generator: source of the draws.

    Returns:
        Positions (count, size) in random order, and whether the attribute is frequent (count,).

    Raises:
        ValueError: if shares make no difference, or there are too few examples of a kind.

    >>> rows, frequent = prevalence_batches(
    ...     torch.arange(8) < 4, 2, 4, generator=torch.Generator().manual_seed(0)
    ... )
    >>> (rows < 4).sum(1).tolist(), frequent.tolist()
    ([1, 3], [False, True])
    """
    kinds = [torch.nonzero(attribute == has).flatten() for has in (True, False)]
    with_it = [round(share * size) for share in (low, high)]
    if not 0 <= low < high <= 1 or with_it[0] == with_it[1]:
        raise ValueError(
            f"the attribute must be rarer in one kind of batch, got {low} and {high} of {size}: use e.g. "
            "0.25 and 0.75 of 8 examples or more"
        )
    if len(kinds[0]) < with_it[1] or len(kinds[1]) < size - with_it[0]:
        raise ValueError(
            f"batches of {size} need {with_it[1]} examples with the attribute and {size - with_it[0]} "
            f"without, got {len(kinds[0])} and {len(kinds[1])}: use smaller batches or more examples"
        )
    frequent = torch.arange(count) % 2 == 1
    batches = []
    for kind in frequent.tolist():
        counts = (with_it[int(kind)], size - with_it[int(kind)])
        parts = [
            own[torch.randperm(len(own), generator=generator)[:taken]]
            for own, taken in zip(kinds, counts, strict=True)
        ]
        batches.append(torch.cat(parts)[torch.randperm(size, generator=generator)])
    return torch.stack(batches) if batches else torch.empty(0, size, dtype=torch.int64), frequent


def attribute_inference(
    training: Shadows, validation: Shadows, targets: Sequence[Update], *, dims: int = 32
) -> AttributeInference:
    """Log odds that the attribute is frequent in what each target update was trained on.

    Features: every layer's part of an update, scaled to length 1 so that no layer drowns the others and the
    learning rate does not matter, projected on the principal components of the training shadows. Probe:
    logistic regression with an L2 penalty. It never sees whose attribute is frequent among the targets.

    Validation shadows must come from OTHER examples than the training shadows: a probe that recognises the
    examples themselves tells the shadows apart perfectly and knows nothing of the targets.

    It tells two kinds of clients apart as the shadows were made, and nothing in between. Where the attribute
    goes along with something else in the reference data (a class, say), the probe may read that instead.
    Failure is no proof: another probe, or more shadows, may find more.

    Sources: property inference from shadow models, Ateniese et al. 2013, arXiv 1306.4447; of federated
    updates, Melis et al. 2018, arXiv 1805.04049.

    Args:
        training: updates of the observer's own, by parameter name, from the weights the targets started at,
            and whether the attribute was frequent in each (booleans).
        validation: the same from other examples; they choose the penalty.
        targets: T updates of clients.
        dims: most principal components.

    Raises:
        ValueError: if there are too few shadows of a kind, updates do not match, or one is not finite.
    """
    _check(training, validation, targets, dims)
    count = len(validation[0])
    inner, outer = _coordinates(training[0], [*validation[0], *targets], dims)
    held, mine = outer[:count], outer[count:]
    probe = fit_logistic((inner, training[1]), (held, validation[1]))
    known = auc(probe(held), validation[1]).value
    return AttributeInference(probe(mine), known, inner.shape[1], probe.penalty)


def _check(training: Shadows, validation: Shadows, targets: Sequence[Update], dims: int) -> None:
    for (shadows, frequent), least in ((training, MINIMUM_TRAINING), (validation, MINIMUM_VALIDATION)):
        kinds = int(frequent.sum()), int((~frequent).sum())
        if sum(kinds) != len(shadows) or min(kinds) < least:
            raise ValueError(
                f"a probe needs at least {least} shadows of each kind, got {len(shadows)} shadows of which "
                f"{kinds[0]} are with and {kinds[1]} without the attribute frequent: train more"
            )
    if dims < 1:
        raise ValueError(f"a probe needs dims >= 1, got {dims}: use e.g. 32")
    updates = [*training[0], *validation[0], *targets]
    shapes = [{name: tensor.shape for name, tensor in update.items()} for update in updates]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("shadows and targets must hold the same parameters, got others: use one model")
    if not all(bool(tensor.isfinite().all()) for update in updates for tensor in update.values()):
        raise ValueError("updates must be finite, got NaN or infinity: leave these out")


def _coordinates(fitted: Sequence[Update], others: Sequence[Update], dims: int) -> tuple[Tensor, Tensor]:
    """Principal coordinates (S, d) of the updates they are fitted to, and of others (T, d)."""
    S = len(fitted)
    gram = torch.zeros(S + len(others), S, dtype=torch.float64)
    for block in _scaled_blocks([*fitted, *others]):
        centred = block - block[:S].mean(0)
        gram += centred @ centred[:S].T
    values, vectors = torch.linalg.eigh(gram[:S])
    kept = torch.nonzero(values > _NEGLIGIBLE * S).flatten().flip(0)[:dims]
    if not len(kept):
        raise ValueError("a probe needs shadows that differ, got equal ones: train them on different batches")
    coordinates = gram @ (vectors[:, kept] / values[kept].sqrt())
    return coordinates[:S], coordinates[S:]


def _scaled_blocks(updates: Sequence[Update]) -> Iterator[Tensor]:
    """A few columns at a time of all updates (N, c), every layer of each scaled to length 1; float64."""
    width = max(1, BLOCK // len(updates))
    for _, group in groupby(updates[0], key=lambda name: name.rpartition(".")[0]):
        names = list(group)
        squared = [sum(float(u[name].double().square().sum()) for name in names) for u in updates]
        lengths = torch.tensor(squared, dtype=torch.float64).sqrt()
        scale = torch.where(lengths > 0, 1 / lengths, 0.0)[:, None]
        for name in names:
            flat = [update[name].detach().reshape(-1) for update in updates]
            for start in range(0, len(flat[0]), width):
                rows = torch.stack([row[start : start + width] for row in flat])
                yield rows.to("cpu", torch.float64) * scale
