"""A small transformer encoder whose tokens are the modalities, read out at a token of its own.

The layers are those of Vaswani et al. 2017 with the normalisation before each part (Xiong et al. 2020, which trains
without warm-up). A modality's token is its encoding plus a learned embedding; tokens of absent modalities are masked,
and the read-out token, which is always there, answers for a clip without any.

Written out instead of torch.nn.TransformerEncoder, whose dropout draws from torch's global generator.
"""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor, nn

from stages.fusion.architectures import Architecture, Dropout, ModalityDropout, encoders

LAYERS = 2  # [choice], as the width of the inner layer, twice the hidden one
HEADS = 4  # or fewer, where hidden is no multiple of it


class Model(nn.Module):
    """Modalities and a read-out token attend to one another; the read-out token is classified."""

    def __init__(self, architecture: Architecture, generator: torch.Generator | None = None):
        super().__init__()
        hidden = architecture.hidden
        self.modality_dropout = ModalityDropout(architecture, generator)
        self.encoders = encoders(architecture, generator)
        self.embeddings = nn.Parameter(0.02 * torch.randn(1 + len(architecture.modalities), hidden))
        self.layers = nn.ModuleList(Layer(hidden, architecture.dropout, generator) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, architecture.labels)

    def forward(self, features: Sequence[Tensor], present: Tensor) -> tuple[Tensor, Tensor | None]:
        """As attention.py's; scores are the weights of the modalities for the read-out token in the last layer, mean
        over heads: at most 1 in sum, the rest is its own."""
        features, present = self.modality_dropout(features, present)
        encodings = [encoder(x) for encoder, x in zip(self.encoders, features, strict=True)]
        read_out = torch.zeros_like(encodings[0])
        tokens = torch.stack([read_out, *encodings], dim=1) + self.embeddings
        visible = torch.cat([torch.ones_like(present[:, :1]), present], dim=1)
        for layer in self.layers:
            tokens, weights = layer(tokens, visible)
        return self.classifier(self.norm(tokens[:, 0])), weights[:, :, 0, 1:].mean(dim=1)


class Layer(nn.Module):
    """(B, T, hidden) -> the same, and the weights (B, heads, T, T). visible: (B, T) bool, what is attended."""

    def __init__(self, hidden: int, dropout: float, generator: torch.Generator | None):
        super().__init__()
        self.heads = gcd(HEADS, hidden)
        self.norm_1, self.norm_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.projections = nn.Linear(hidden, 3 * hidden)  # queries, keys, values
        self.output = nn.Linear(hidden, hidden)
        self.linear_1, self.linear_2 = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)
        self.dropout = Dropout(dropout, generator)

    def forward(self, tokens: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, hidden / heads)
            for part in self.projections(self.norm_1(tokens)).chunk(3, dim=-1)
        )
        raw = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
        weights = raw.masked_fill(~visible[:, None, None], -torch.inf).softmax(dim=-1)
        tokens = tokens + self.dropout(self.output((weights @ values).transpose(1, 2).flatten(2)))
        inner = self.linear_1(self.norm_2(tokens)).relu()
        return tokens + self.dropout(self.linear_2(inner)), weights
