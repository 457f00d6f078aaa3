"""Shadow updates: what clients would have sent, had they held examples that the observer knows.

An observer who knows the agreed training settings and the defense trains on its own reference data as a
client would, noise included.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedaudit.attacks.attribute import AttributeInference, attribute_inference, prevalence_batches
from fedaudit.defenses.base import Defense
from fedaudit.measures.cohort import same_weights
from fedaudit.measures.draws import generator_for
from fedaudit.measures.round_examples import broadcast_model
from fedaudit.training.local import TrainSettings, client_seed, plan_batches, train_locally
from fedaudit.types import ClientUpdate, RoundContext, StepRelease

_VALIDATION = 1 / 3  # of the shadows, and of the examples they are made of


def shadow_updates(
    like: ClientUpdate,
    ctx: RoundContext,
    settings: TrainSettings,
    rows: Sequence[Tensor],
    *,
    defense: Defense | None = None,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """One update per set of reference examples, by name, as if a client held exactly these.

    Args:
        like: a client's update: its starting weights and parameter names are used.
        ctx: with the model, the loss, reference examples and, under a defense, the release.
        settings: the agreed local training.
        rows: positions in the reference of each shadow's examples.
        defense: the defense in force; None is plain training.
        seed: each shadow's order of examples and noise depend on it and on the shadow's number.

    Raises:
        ValueError: if the context lacks something.
    """
    if ctx.reference is None or ctx.loss is None:
        raise ValueError("a shadow needs reference examples and the loss, got a context without: give both")
    if defense is not None and ctx.release is None:
        raise ValueError(f"a shadow under {defense.name!r} needs the release, got None: give ctx.release")
    release = ctx.release(like) if defense is not None and ctx.release is not None else None
    summed = ctx.loss
    model, _ = broadcast_model(ctx, like.before)
    found = []
    for number, own in enumerate(rows):
        x, y = (part[own.to(part.device)] for part in ctx.reference)
        mixed = client_seed(seed, number, ctx.round)
        noise = torch.Generator(device=ctx.device).manual_seed(mixed)
        batches = plan_batches(len(y), settings, poisson=bool(defense and defense.poisson), seed=mixed)
        model.load_state_dict(dict(like.before))
        train_locally(
            model,
            x,
            y,
            batches,
            settings,
            loss=lambda outputs, labels: summed(outputs, labels) / len(labels),
            defense=defense,
            release=_release_for(release, settings, len(y)),
            generator=noise,
            device=ctx.device,
        )
        after = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        found.append({name: after[name] - like.before[name].cpu() for name in like.delta})
    return found


def infer_attribute(
    updates: Sequence[ClientUpdate],
    ctx: RoundContext,
    attribute: Tensor,
    settings: TrainSettings,
    *,
    defense: Defense | None = None,
    shadows: int = 90,
    low: float = 0.25,
    high: float = 0.75,
    dims: int = 32,
) -> AttributeInference:
    """Which clients hold many examples with the attribute, as a server tells from its own reference data.

    A third of the shadows, and of the reference examples, validate the probe: the two sets of shadows share
    no example. A shadow holds as many examples as the median client states, or fewer where the reference has
    too few. See `attribute_inference` for what is found and what is not. An oracle scores it: the area under
    the ROC curve of the log odds over clients whose prevalence it knows.

    Args:
        updates: clients' updates that started from the same weights.
        ctx: with the model, the loss, reference examples and, under a defense, the release.
        attribute: which of the reference examples have it, booleans (n,).
        settings: the agreed local training.
        defense: the defense in force; None is plain training.
        shadows: how many updates to train.
        low: share of examples with the attribute in half of the shadows.
        high: share in the others.
        dims: most principal components of the shadows that the probe sees.

    Raises:
        ValueError: if updates started from different weights, the context lacks something, or there are too
            few shadows, or too few reference examples with or without the attribute.
    """
    groups = len(same_weights(updates))
    if groups != 1:
        raise ValueError(
            f"one probe reads updates that started from the same weights, got {groups} among {len(updates)} "
            "updates: group them first"
        )
    pools = _pools(attribute, generator_for(ctx, "attribute", "pools"))
    size = sorted(update.num_examples for update in updates)[len(updates) // 2]
    for pool in pools:
        having = int(attribute[pool].sum())
        size = min(size, int(having / high), int((len(pool) - having) / (1 - low)))
    counts = shadows - round(_VALIDATION * shadows), round(_VALIDATION * shadows)
    sides: list[tuple[list[dict[str, Tensor]], Tensor]] = []
    for number, (pool, count) in enumerate(zip(pools, counts, strict=True)):
        generator = generator_for(ctx, "attribute", "batches", number)
        rows, frequent = prevalence_batches(
            attribute[pool], count, size, low=low, high=high, generator=generator
        )
        seed = client_seed(ctx.seed, number, ctx.round)
        trained = shadow_updates(updates[0], ctx, settings, list(pool[rows]), defense=defense, seed=seed)
        sides.append((trained, frequent))
    return attribute_inference(sides[0], sides[1], [update.delta for update in updates], dims=dims)


def _pools(attribute: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of the examples for training and for validation, alike in the attribute."""
    parts: list[list[Tensor]] = [[], []]
    for kind in (False, True):
        own = torch.nonzero(attribute == kind).flatten()
        own = own[torch.randperm(len(own), generator=generator)]
        cut = len(own) - round(_VALIDATION * len(own))
        parts[0].append(own[:cut])
        parts[1].append(own[cut:])
    return torch.cat(parts[0]), torch.cat(parts[1])


def _release_for(release: StepRelease | None, settings: TrainSettings, size: int) -> StepRelease | None:
    """The clients' release at a shadow's sampling rate."""
    if release is None:
        return None
    return replace(release, sample_rate=min(1.0, settings.batch_size / size))
