"""The networks of the privacy-token critic: two gradient feature extractors and the score T(x, g).

Sizes follow appendix A of Meng et al., "Real-Time Privacy Risk Measurement with Privacy Tokens for Gradient
Leakage". Not stated there, and chosen here: the width of the autoencoder's hidden layer (256) and of its
latent (128), of the hidden layer of each embedding (256) and of the head (128), and the activations between
them (LeakyReLU). Initial weights are those of `torch.nn`'s layers, but drawn from an explicit generator.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, mse_loss

Extractor = Literal["autoencoder", "transformer"]

MODEL_WIDTH, HEADS, FEEDFORWARD, DROPOUT = 512, 8, 2048, 0.1
EMBEDDING = 128
HIDDEN, LATENT = 256, 128
COPIES = 5  # weights, gradients, Adam's two moments, and the best weights so far


class GradientAutoencoder(nn.Module):
    """The token is the latent of the flattened gradient.

    Encoder P -> hidden -> latent, LeakyReLU after each; decoder latent -> hidden -> P with a last ReLU as in
    the paper, so a negative entry is never reconstructed: half of a centred gradient cannot be.

    Args:
        widths: gradient entries per layer; P is their sum.
        hidden: width of the hidden layers.
        latent: width of the token.
    """

    def __init__(self, widths: Sequence[int], hidden: int = HIDDEN, latent: int = LATENT) -> None:
        super().__init__()
        P = sum(widths)
        self.encoder = nn.Sequential(
            nn.Linear(P, hidden), nn.LeakyReLU(), nn.Linear(hidden, latent), nn.LeakyReLU()
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.LeakyReLU(), nn.Linear(hidden, P), nn.ReLU()
        )
        self.width = latent

    def forward(self, gradients: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens (K, latent) of gradients (K, P)."""
        tokens: Tensor = self.encoder(gradients)
        return tokens

    def loss(self, gradients: Tensor, tokens: Tensor) -> Tensor:
        """Mean squared error of the decoder's output, averaged over entries."""
        return mse_loss(self.decoder(tokens), gradients)


class GradientTransformer(nn.Module):
    """The token is the concatenated output of a Transformer encoder over one vector per layer.

    One linear map P_l -> 512 per layer ("single-layer MLP"; an activation is not stated, none is used), then
    one encoder layer of 8 heads, feed-forward width 2048 and dropout 0.1, post-norm and ReLU as `torch.nn`
    has them by default. No position is added: the maps tell the layers apart.

    Args:
        widths: gradient entries per layer.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.maps = nn.ModuleList(nn.Linear(width, MODEL_WIDTH) for width in widths)
        self.encoder = nn.TransformerEncoderLayer(
            MODEL_WIDTH, HEADS, dim_feedforward=FEEDFORWARD, dropout=DROPOUT, batch_first=True
        )
        self.width = MODEL_WIDTH * len(self.widths)

    def forward(self, gradients: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens (K, 512 layers) of gradients (K, P); in training mode dropout draws from `generator`."""
        pieces = torch.split(gradients, list(self.widths), dim=-1)
        tokens = torch.stack([m(piece) for m, piece in zip(self.maps, pieces, strict=True)], dim=1)
        encoded: Tensor = self._train(tokens, generator) if self.training else self.encoder(tokens)
        return encoded.flatten(1)

    def loss(self, gradients: Tensor, tokens: Tensor) -> Tensor:
        """Nothing is reconstructed: zero."""
        return tokens.new_zeros(())

    def _train(self, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
        """The encoder layer in training mode; its own dropout would draw from the global generator."""

        def drop(values: Tensor) -> Tensor:
            kept = torch.rand(values.shape, generator=generator).to(values) >= DROPOUT
            return values * kept / (1 - DROPOUT)

        layer, attention = self.encoder, self.encoder.self_attn
        joined = linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
        shape = (*joined.shape[:2], 3, HEADS, MODEL_WIDTH // HEADS)
        q, k, v = joined.reshape(shape).permute(2, 0, 3, 1, 4)  # each (K, heads, layers, 64)
        weights = drop((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1))
        attended = attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        tokens = layer.norm1(tokens + drop(attended))
        normed: Tensor = layer.norm2(tokens + drop(layer.linear2(drop(layer.linear1(tokens).relu()))))
        return normed


class TokenNetwork(nn.Module):
    """T(x_i, g): does example i belong to the batch that this gradient comes from?

    Both sides are embedded to 128 by two fully connected layers, concatenated, and mapped to a scalar by two
    more. Every example of a batch gets a score of its own, as in the paper's Algorithm 1.

    Args:
        features: D, features per example.
        widths: gradient entries per layer.
        extractor: "autoencoder" or "transformer".
        hidden: width of the autoencoder's hidden layers.
        latent: width of the autoencoder's token.
    """

    def __init__(
        self,
        features: int,
        widths: Sequence[int],
        extractor: Extractor,
        hidden: int = HIDDEN,
        latent: int = LATENT,
    ) -> None:
        super().__init__()
        self.extractor: GradientAutoencoder | GradientTransformer = (
            GradientAutoencoder(widths, hidden, latent)
            if extractor == "autoencoder"
            else GradientTransformer(widths)
        )
        self.of_data = _two_layers(features, 2 * EMBEDDING, EMBEDDING)
        self.of_gradient = _two_layers(self.extractor.width, 2 * EMBEDDING, EMBEDDING)
        self.head = _two_layers(2 * EMBEDDING, EMBEDDING, 1)

    def forward(self, data: Tensor, gradient: Tensor) -> Tensor:
        """Scores (K, B) of examples (K, B, 128), or (B, 128) for all alike, and K tokens, all embedded."""
        beside = gradient.unsqueeze(1).expand(-1, data.shape[-2], -1)
        scores: Tensor = self.head(torch.cat([data.expand_as(beside), beside], dim=-1))
        return scores.squeeze(-1)


def build_network(
    features: int,
    widths: Sequence[int],
    extractor: Extractor,
    generator: torch.Generator,
    *,
    hidden: int = HIDDEN,
    latent: int = LATENT,
) -> TokenNetwork:
    """A network whose initial weights depend on the generator alone; torch's global one is not used.

    >>> network = build_network(8, [20, 30], "autoencoder", torch.Generator().manual_seed(0))
    >>> network.extractor(torch.zeros(4, 50)).shape
    torch.Size([4, 128])
    """
    with torch.device("meta"):  # draws nothing
        network = TokenNetwork(features, widths, extractor, hidden, latent)
    network.to_empty(device="cpu")
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            nn.init.xavier_uniform_(module.in_proj_weight, generator=generator)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            for parameter in (module.weight, module.bias):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
            if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
                nn.init.zeros_(module.bias)  # the attention's output map
    return network


def training_bytes(
    features: int, widths: Sequence[int], extractor: Extractor, hidden: int = HIDDEN, latent: int = LATENT
) -> int:
    """Bytes of a network in training: weights, gradients, Adam's moments and the best weights so far.

    >>> training_bytes(768, [912, 3612, 3612], "autoencoder") // 2**20
    87
    """
    with torch.device("meta"):
        network = TokenNetwork(features, widths, extractor, hidden, latent)
    return COPIES * 4 * sum(parameter.numel() for parameter in network.parameters())


def _two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LeakyReLU(), nn.Linear(hidden, outputs))
