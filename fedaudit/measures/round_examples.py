"""The examples a round-wise measure looks at: an observer's own, at the weights of one round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedaudit.measures.cohort import same_weights
from fedaudit.measures.draws import generator_for
from fedaudit.types import ClientUpdate, Loss, RoundContext, StepRelease


@dataclass(frozen=True, eq=False)
class RoundExamples:
    """Examples, and the step that would release them.

    Attributes:
        x: examples (n, *input_shape) on the observer's device.
        y: labels (n,).
        weights: what was broadcast, by name.
        release: the least protected release among the clients.
        releases: how many different ones there are.
        clients: how many clients' examples they are; 0 for reference examples.
        key: the client's id where a client measures itself, else -1: part of the key of random draws.
    """

    x: Tensor
    y: Tensor
    weights: Mapping[str, Tensor]
    release: StepRelease
    releases: int
    clients: int
    key: int

    @property
    def described(self) -> dict[str, float | int | str | bool]:
        """What a reader needs to know about where the examples come from."""
        clip_norm = self.release.clip_norm
        return {
            "examples": len(self.x),
            "examples-of": "clients" if self.clients else "reference",
            "clients": self.clients,
            "clip-norm": "none" if clip_norm is None else clip_norm,
            "noise-std": self.release.noise_std,
            "releases": self.releases,
        }


def round_examples(updates: Sequence[ClientUpdate], ctx: RoundContext, most: int, name: str) -> RoundExamples:
    """At most `most` examples: a server's reference, or the clients' own, drawn evenly from all clients.

    Evenly means in turns: every client gives one more random example until `most` is reached or it has no
    more. What one client gives depends on its own examples and on the number of others, not on theirs. Where
    the updates started from different weights, the weights shared by most updates count, and only their
    clients. Where clients release differently, the release with the least noise (of those, the one that
    clips least) counts for all, so that nobody's protection is credited to another.

    Args:
        updates: the round's updates, at least one.
        ctx: with `reference` and `release` for the observer "server", else with `evidence`.
        most: largest number of examples.
        name: the measure's name, for its random draws.

    Raises:
        ValueError: if the context lacks what the observer needs.
    """
    group = [updates[i] for i in max(same_weights(updates), key=len)]
    pools: list[tuple[Tensor, Tensor]] = []
    releases: list[StepRelease] = []
    keys: list[int] = []
    if ctx.observer == "server" and ctx.reference is not None and ctx.release is not None:
        pools, keys = [ctx.reference], [-1]
        releases = [ctx.release(update) for update in group]
    elif ctx.observer != "server" and ctx.evidence is not None:
        for update in group:
            evidence = ctx.evidence(update)
            pools.append((evidence.x, evidence.y))
            releases.append(evidence.release)
            keys.append(update.client_id)
    else:
        raise ValueError(f"{name} lacks what observer {ctx.observer!r} needs: see needs()")
    orders = [
        torch.randperm(len(y), generator=generator_for(ctx, name, "examples", key))[:most]
        for (_, y), key in zip(pools, keys, strict=True)
    ]
    turns = sorted((turn, owner) for owner, order in enumerate(orders) for turn in range(len(order)))[:most]
    taken = [sum(1 for _, who in turns if who == owner) for owner in range(len(pools))]
    chosen = [order[:count] for order, count in zip(orders, taken, strict=True)]
    return RoundExamples(
        torch.cat([x[rows.to(x.device)].to(ctx.device) for (x, _), rows in zip(pools, chosen, strict=True)]),
        torch.cat([y[rows.to(y.device)].to(ctx.device) for (_, y), rows in zip(pools, chosen, strict=True)]),
        group[0].before,
        min(releases, key=_protection),
        len({(release.clip_norm, release.noise_std) for release in releases}),
        0 if ctx.observer == "server" else sum(count > 0 for count in taken),
        updates[0].client_id if ctx.observer == "client" else -1,
    )


def broadcast_model(ctx: RoundContext, weights: Mapping[str, Tensor]) -> tuple[nn.Module, Loss]:
    """The model at the broadcast weights, in evaluation mode, and the loss.

    Raises:
        ValueError: if the context has no model or no loss.
    """
    if ctx.build_model is None or ctx.loss is None:
        raise ValueError("gradients need the model and the loss, got a context without: give both")
    with torch.random.fork_rng(devices=[]):  # initial weights are not used: leave no trace of them
        model = ctx.build_model().to(ctx.device).eval()
    model.load_state_dict(dict(weights))
    return model, ctx.loss


def _protection(release: StepRelease) -> tuple[float, float]:
    """Sort key: little noise first, then a large clipping norm."""
    return release.noise_std, -release.clip_norm if release.clip_norm is not None else -float("inf")
