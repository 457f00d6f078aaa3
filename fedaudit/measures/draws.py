"""Where a measure's random numbers come from: a generator of its own for every purpose."""

import hashlib

import torch

from fedaudit.types import RoundContext


def generator_for(ctx: RoundContext, *purpose: str | int) -> torch.Generator:
    """A CPU generator that depends on the observer's seed, the round and the purpose alone.

    With one per measure, step and client, no client and no added draw shifts the numbers of another.

    Args:
        ctx: its seed and round are used.
        *purpose: the measure's name first, then whatever tells two uses apart.

    >>> ctx = RoundContext(round=1)
    >>> a, b = generator_for(ctx, "probe", 1), generator_for(ctx, "probe", 2)
    >>> bool(torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b)))
    False
    """
    text = "/".join(map(str, (*purpose[:1], ctx.seed, ctx.round, *purpose[1:])))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
