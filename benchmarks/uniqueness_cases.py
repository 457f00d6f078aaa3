"""Cases of the gradient uniqueness benchmark: models, ways to the uniqueness of a batch, times, memory."""

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.measurement import peak_memory, spread
from fedaudit.measures.ghost_kernels import example_gram
from fedaudit.measures.gradient_uniqueness import gradient_uniqueness, relative_ridge
from fedaudit.measures.in_run import InRunGram
from fedaudit.models.build import build_model
from fedaudit.opacus_parts import GradSampleModule

MODELS = {
    "mlp": ("mlp(hidden=1024-1024)", (1, 28, 28)),
    "cnn": ("cnn", (1, 28, 28)),
    "lenet": ("lenet", (3, 32, 32)),
    "resnet18": ("resnet18", (3, 32, 32)),
}
WAYS = ("plain", "example-gram", "in-run", "vmap", "opacus")
FEWEST, MOST = 2, 15  # rounds
Way = Callable[[], Tensor | None]


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Summed over the batch."""
    return F.cross_entropy(outputs, labels, reduction="sum")


def uniqueness(gram: Tensor) -> Tensor:
    """GNQ (B,) with a relative ridge."""
    return gradient_uniqueness(gram, relative_ridge(gram))


def ways(model: nn.Module, same: nn.Module, x: Tensor, y: Tensor) -> dict[str, Way]:
    """What is compared, `same` being the model again: each returns the Gram matrix it used, a step none."""
    run = InRunGram(model)
    sampled: list[GradSampleModule] = []  # made when it is needed: its gradients count as its memory

    def plain() -> None:
        model.zero_grad()
        cross_entropy(model(x), y).backward()

    def separate() -> Tensor:
        return finished(example_gram(model, cross_entropy, x, y))

    def in_run() -> Tensor:
        model.zero_grad()
        with run:
            cross_entropy(model(x), y).backward()
        return finished(run.gram())

    def by_vmap() -> Tensor:
        fixed = {name: p.detach() for name, p in model.named_parameters()}

        def value(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

        rows = vmap(grad(value), in_dims=(None, 0, 0))(fixed, x, y)
        return finished(sum(products(row) for row in rows.values()))

    def by_opacus() -> Tensor:
        if not sampled:
            sampled.append(GradSampleModule(same, loss_reduction="sum"))
        wrapped = sampled[0]
        wrapped.zero_grad()
        cross_entropy(wrapped(x), y).backward()
        return finished(sum(products(p.grad_sample) for p in wrapped.parameters()))

    return dict(zip(WAYS, (plain, separate, in_run, by_vmap, by_opacus), strict=True))


def products(rows: Tensor) -> Tensor:
    """Inner products of the rows (B, ...)."""
    flat = rows.flatten(1)
    return flat @ flat.T


def finished(gram: Tensor) -> Tensor:
    """The Gram matrix, once the uniqueness was computed from it."""
    uniqueness(gram)
    return gram


def case(name: str, batch: int, threads: int, device: str) -> dict[str, Way]:
    """Model and batch of a case, and the ways to be compared."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # Opacus, at a model's first layer
    spec, shape = MODELS[name]
    model, same = (build_model(spec, shape, num_classes=10, seed=0).to(device) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(batch, *shape, generator=generator), torch.randint(10, (batch,), generator=generator)
    return ways(model, same, x.to(device), y.to(device))


def times(name: str, batch: int, threads: int, device: str, seconds: float) -> dict[str, Any]:
    """Milliseconds of every way, and ratios of their medians."""
    compared = case(name, batch, threads, device)
    started = time.perf_counter()
    grams = {way: work() for way, work in compared.items()}  # also the first, slower time
    fewest = FEWEST if time.perf_counter() - started < seconds else 1
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    started = time.perf_counter()
    while len(found["plain"]) < fewest or (
        len(found["plain"]) < MOST and time.perf_counter() - started < seconds
    ):
        for way, work in compared.items():
            before = time.perf_counter()
            work()
            if device != "cpu":
                torch.cuda.synchronize()
            found[way].append(1000 * (time.perf_counter() - before))
    median = {way: statistics.median(values) for way, values in found.items()}
    share = median["in-run"] - median["plain"]
    mine = {"example-gram": median["example-gram"], "in-run": median["in-run"]}
    if share > 0:  # else lost in the noise
        mine["in-run-share"] = share
    reference = grams["example-gram"]
    assert reference is not None
    return {
        "rounds": len(found["plain"]),
        "ms": {way: spread(values) for way, values in found.items()},
        "over-plain": {way: _rounded(median[way] / median["plain"]) for way in WAYS[1:]},
        "in-run-share-over-plain": _rounded(share / median["plain"]),
        "faster-than-vmap": {
            way: _rounded(median["vmap"] / median[way]) for way in ("example-gram", "in-run")
        }
        | {"in-run-share": _rounded(median["vmap"] / share) if share > 0 else None},
        "faster-than-opacus": {
            way: _rounded(median["opacus"] / median[way]) for way in ("example-gram", "in-run")
        },
        "relative-difference-of-the-gram": {
            way: _rounded(float((gram.double() - reference).norm() / reference.norm()))
            for way, gram in grams.items()
            if gram is not None and way != "example-gram"
        },
    }


def memory(name: str, batch: int, way: str, device: str) -> float:
    """Peak MiB of a call above what the process held before."""
    work = case(name, batch, 1, device)[way]
    if device == "cpu":
        before = peak_memory()
        work()
        return round(peak_memory() - before, 1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
