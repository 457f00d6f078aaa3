"""Which layers and features are watched, as the paper chooses them, and what a hashed layer keeps."""

import pytest
import torch
from torch import nn

from fedaudit.measures.watched_gradients import (
    LayerVectors,
    example_features,
    feature_module,
    watched_layers,
)
from fedaudit.models.build import build_model

RGB = (3, 32, 32)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("lenet", ["conv1", "conv2", "conv3"]),  # its three convolutions
        ("alexnet(hidden=8)", ["conv3", "conv4", "conv5"]),  # the last three of five
        ("mlp(hidden=8-8-8)", ["fc1", "fc2", "fc3", "fc4"]),  # all of them
    ],
)
def test_the_papers_layers_are_watched_by_default(model: str, layers: list[str]) -> None:
    built = build_model(model, RGB, 10, 0)
    found = watched_layers(built)
    assert list(found) == layers
    assert [name for names in found.values() for name in names] == [
        f"{layer}.{part}" for layer in layers for part in ("weight", "bias")
    ]


def test_layers_are_chosen_by_kind_or_name_and_frozen_ones_never() -> None:
    model = build_model("alexnet(hidden=8)", RGB, 10, 0)
    assert list(watched_layers(model, "conv")) == ["conv1", "conv2", "conv3", "conv4", "conv5"]
    assert list(watched_layers(model, "fc1+conv1")) == ["fc1", "conv1"]
    assert len(watched_layers(model, "all")) == 7
    model.conv5.requires_grad_(False)
    assert list(watched_layers(model)) == ["conv2", "conv3", "conv4"]
    with pytest.raises(
        ValueError, match=r"layers must be auto, conv, all .* got 'conv5': choose from conv1, conv2"
    ):
        watched_layers(model, "conv5")


@pytest.mark.parametrize(
    ("model", "module", "width"),
    [
        ("lenet", "fc1", 768),  # the flattened output of the convolutions
        ("alexnet(hidden=8)", "fc1", 1024),  # the pooled output of the convolutions
        ("mlp(hidden=9-8-7)", "fc3", 8),  # the activated output of the second of four layers
        ("mlp(hidden=9)", "fc2", 9),
        ("logistic", "fc1", 3072),
    ],
)
def test_features_are_the_papers_activations(model: str, module: str, width: int) -> None:
    built = build_model(model, RGB, 10, 0).eval()
    assert feature_module(built) == (module, True)
    x = torch.rand(5, *RGB, generator=seeded(0))
    weights = {name: value + 0.01 for name, value in built.state_dict().items()}
    found = example_features(built, weights, x, module, True)
    assert found.shape == (5, width)
    built.load_state_dict(weights)
    place = [name for name, _ in built.named_children()].index(module)
    with torch.no_grad():
        torch.testing.assert_close(found, built[:place](x))
        named = example_features(built, weights, x, *feature_module(built, module))
        torch.testing.assert_close(named, built[place](built[:place](x)))


def test_features_that_cannot_be_had_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())
    with pytest.raises(ValueError, match="needs a linear layer after the convolutions"):
        feature_module(model)
    with pytest.raises(ValueError, match="got 'head': choose from 0, 1"):
        feature_module(model, "head")
    unused = nn.Sequential(nn.Linear(4, 2))
    unused.add_module("spare", nn.Identity())
    unused.forward = unused[0].forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="'spare' gives no row per example"):
        example_features(unused, unused.state_dict(), torch.zeros(2, 4), "spare", False)


LAYERS = {"a": ["a.weight", "a.bias"], "b": ["b.weight"]}


def gradient(seed: int) -> dict[str, torch.Tensor]:
    draws = seeded(seed)
    shapes = {"b.weight": (40, 50), "a.bias": (3,), "a.weight": (3, 4)}
    return {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}


def test_small_layers_are_kept_entry_by_entry() -> None:
    vectors = LayerVectors(LAYERS, gradient(0), 0, seeded(1))
    g = gradient(0)
    assert vectors.widths == [15, 2000] and vectors.entries == 2015
    torch.testing.assert_close(
        vectors(g), torch.cat([g["a.weight"].flatten(), g["a.bias"], g["b.weight"].flatten()])
    )


def test_a_hashed_layer_keeps_inner_products_in_the_mean() -> None:
    exact = LayerVectors(LAYERS, gradient(0), 0, seeded(1))
    g, h = gradient(0), {name: value + 0.5 * gradient(1)[name] for name, value in gradient(0).items()}
    true = float(exact(g)[15:] @ exact(h)[15:])
    found = []
    for seed in range(200):
        vectors = LayerVectors(LAYERS, g, 64, seeded(seed))
        assert vectors.widths == [15, 64]
        torch.testing.assert_close(vectors(g)[:15], exact(g)[:15])
        found.append(float(vectors(g)[15:] @ vectors(h)[15:]))
    spread = (2 / 64) ** 0.5 * float(exact(g)[15:].norm() * exact(h)[15:].norm())  # at most, per hash
    assert sum(found) / 200 == pytest.approx(true, abs=4 * spread / 200**0.5)
    joined = vectors({name: g[name] + h[name] for name in g})
    torch.testing.assert_close(joined, vectors(g) + vectors(h), rtol=1e-4, atol=1e-4)
