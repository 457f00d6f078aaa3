"""Rounds of a tiny federation made of tensors, honest unless a test plants a defect."""

import math
import zlib

import torch

from fedaudit.types import ClientUpdate

SHAPES = {"a.weight": (24, 30), "a.bias": (24,), "b.weight": (40, 24), "b.scale": (), "b.mean": (40,)}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())
N, C, SIGMA = 5, 0.5, 1.0


def generator(*numbers):
    return torch.Generator().manual_seed(zlib.crc32(repr(numbers).encode()))


def draw(source, std=1.0, dtype=torch.float64):
    """One independent N(0, std^2) for every coordinate of the model."""
    return {name: std * torch.randn(shape, generator=source, dtype=dtype) for name, shape in SHAPES.items()}


def norm(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def scaled(tensors, factor):
    return {name: tensor * factor for name, tensor in tensors.items()}


def plus(first, second):
    return {name: first[name] + second[name] for name in first}


def clip(tensors, limit=C):
    return scaled(tensors, min(1.0, limit / norm(tensors)))


def clip_each(tensors, limit=C):
    return {name: t * min(1.0, limit / max(float(t.norm()), 1e-12)) for name, t in tensors.items()}


def weights_of(round_number):
    return draw(generator("weights", round_number), 0.3, torch.float32)


def signal(round_number, client):
    """What a client learnt: a part common to all and one of its own, norm 0.2 to 3."""
    common, own = draw(generator("common", round_number)), draw(generator("own", round_number, client))
    length = 0.2 + 2.8 * torch.rand((), generator=generator("length", round_number, client)).item()
    both = plus(common, own)
    return scaled(both, length / norm(both))


def received(round_number, client, change, before, examples=100, **reported):
    """The update as a server sees it: the difference of two rounded sets of weights."""
    after = {name: (before[name].double() + change[name]).float() for name in before}
    delta = {name: after[name] - before[name] for name in before}
    return ClientUpdate(client, round_number, before, delta, examples, {"num-examples": examples, **reported})


def mean(changes, weights):
    total = scaled(changes[0], weights[0])
    for change, weight in zip(changes[1:], weights[1:], strict=True):
        total = plus(total, scaled(change, weight))
    return total


def applied(before, change):
    return {name: (before[name].double() + change[name]).float() for name in before}
