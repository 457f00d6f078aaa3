"""The networks have the sizes the paper gives, and draw from no generator but the one they are given."""

import math

import pytest
import torch
from torch import nn

from fedaudit.measures import token_networks
from fedaudit.measures.token_networks import (
    GradientAutoencoder,
    GradientTransformer,
    TokenNetwork,
    build_network,
    training_bytes,
)

WIDTHS = [30, 12, 7]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kinds(layers: nn.Module) -> list[type]:
    return [type(layer) for layer in layers.children()]


def sizes(layers: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in layers.children() if isinstance(m, nn.Linear)]


def test_the_autoencoder_has_two_layers_each_way_and_ends_in_relu() -> None:
    network = GradientAutoencoder(WIDTHS)
    assert kinds(network.encoder) == [nn.Linear, nn.LeakyReLU, nn.Linear, nn.LeakyReLU]
    assert sizes(network.encoder) == [(49, 256), (256, 128)]
    assert kinds(network.decoder) == [nn.Linear, nn.LeakyReLU, nn.Linear, nn.ReLU]
    assert sizes(network.decoder) == [(128, 256), (256, 49)]
    gradients = torch.randn(5, 49, generator=seeded(0))
    token = network(gradients)
    assert token.shape == (5, 128)
    rebuilt = network.decoder(token)
    assert bool((rebuilt >= 0).all())
    torch.testing.assert_close(network.loss(gradients, token), (rebuilt - gradients).square().mean())


def test_the_transformer_maps_each_layer_to_512_and_joins_what_one_encoder_layer_gives() -> None:
    network = build_network(5, WIDTHS, "transformer", seeded(1)).extractor
    assert isinstance(network, GradientTransformer)
    assert sizes(network.maps) == [(30, 512), (12, 512), (7, 512)]
    encoder = network.encoder
    assert (encoder.self_attn.embed_dim, encoder.self_attn.num_heads) == (512, 8)
    assert (encoder.linear1.out_features, encoder.linear2.in_features) == (2048, 2048)
    assert encoder.dropout.p == encoder.dropout1.p == encoder.self_attn.dropout == 0.1
    gradients = torch.randn(4, 49, generator=seeded(2))
    network.eval()
    with torch.no_grad():
        pieces = [
            m(gradients[:, a:b]) for m, a, b in zip(network.maps, (0, 30, 42), (30, 42, 49), strict=True)
        ]
        expected = encoder(torch.stack(pieces, dim=1)).flatten(1)
        assert expected.shape == (4, 3 * 512)
        torch.testing.assert_close(network(gradients), expected)


@pytest.mark.parametrize(("extractor", "width"), [("autoencoder", 128), ("transformer", 1536)])
def test_each_side_is_embedded_to_128_and_256_become_a_scalar(extractor, width) -> None:
    network = TokenNetwork(20, WIDTHS, extractor)
    for side, inputs in ((network.of_data, 20), (network.of_gradient, width)):
        assert sizes(side)[0][0] == inputs and sizes(side)[-1][1] == 128
        assert len(sizes(side)) == 2
    assert len(sizes(network.head)) == 2
    assert sizes(network.head)[0][0] == 256 and sizes(network.head)[-1][1] == 1
    data, gradient = torch.randn(3, 6, 128, generator=seeded(3)), torch.randn(3, 128, generator=seeded(4))
    scores = network(data, gradient)
    assert scores.shape == (3, 6)
    one = network.head(torch.cat([data[2, 4], gradient[2]]))
    torch.testing.assert_close(scores[2, 4], one[0])
    torch.testing.assert_close(network(data[0], gradient)[1], network(data[:1], gradient[1:2])[0])


def test_training_mode_without_dropout_is_torchs_encoder_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_network(5, WIDTHS, "transformer", seeded(1)).extractor
    gradients = torch.randn(4, 49, generator=seeded(2))
    with torch.no_grad():
        expected = network.eval()(gradients)
        monkeypatch.setattr(token_networks, "DROPOUT", 0.0)
        torch.testing.assert_close(network.train()(gradients, seeded(3)), expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_torchs_in_the_mean_and_hangs_on_its_generator_alone() -> None:
    network = build_network(5, WIDTHS, "transformer", seeded(1)).extractor.train()
    gradients = torch.randn(2, 49, generator=seeded(2))
    before = torch.get_rng_state()
    with torch.no_grad():
        first, again, other = (network(gradients, seeded(seed)) for seed in (0, 0, 1))
        many, draws = gradients.repeat(400, 1), seeded(5)
        mine = network(many, draws).view(400, 2, -1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.allclose(first, other)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        tokens = torch.stack(
            [m(p) for m, p in zip(network.maps, many.split(network.widths, dim=1), strict=True)], 1
        )
        theirs = network.encoder(tokens).flatten(1).view(400, 2, -1)
    gap = (mine.mean(0) - theirs.mean(0)) / ((mine.var(0) + theirs.var(0)) / 400).sqrt()
    assert float(gap.square().mean()) < 1.2  # 1 if the means are equal; 3072 correlated values
    assert float((mine.var(0).mean() / theirs.var(0).mean()).log().abs()) < 0.05


@pytest.mark.parametrize("extractor", ["autoencoder", "transformer"])
def test_initial_weights_hang_on_their_generator_and_are_spread_as_torchs(extractor) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, same, other = (build_network(20, WIDTHS, extractor, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torchs = dict(TokenNetwork(20, WIDTHS, extractor).named_parameters())
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        flat = torch.equal(torchs[name], torchs[name].flatten()[0].expand_as(a))
        assert torch.equal(a, torchs[name]) if flat else not torch.equal(a, c)
        if a.numel() > 4000:
            torch.testing.assert_close(a.std(), torchs[name].std(), rtol=0.05, atol=0)


@pytest.mark.parametrize("extractor", ["autoencoder", "transformer"])
def test_bytes_are_counted_for_weights_gradients_moments_and_a_copy(extractor) -> None:
    network = build_network(20, WIDTHS, extractor, seeded(0), hidden=10, latent=3)
    count = sum(math.prod(p.shape) for p in network.parameters())
    assert training_bytes(20, WIDTHS, extractor, hidden=10, latent=3) == 5 * 4 * count
