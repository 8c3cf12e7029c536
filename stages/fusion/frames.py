"""Attention over time within each modality, then over the modalities as in attention.py.

Instead of its mean and variance over time a modality's features are the means of `fusion.segments` equal parts of the
clip's time, side by side, (N, segments * C): stages/fusion/segments.py. It needs extractors with keep_frames: true. One
without a variance over time (EmoVCLIP, files of one vector a clip) takes part with its mean too, as one segment.

Attention over time: a score per segment, from what two layers make of it, a softmax over the segments, the weighted sum
(Yang et al. 2016, without their hidden layer). A bias per segment tells when it is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.fusion.architectures import Architecture, Dropout, Encoder, ModalityDropout


class Model(nn.Module):
    """Per modality an encoding that attends over time; raw attention scores from all of them; their sum, classified."""

    reads_frames = True

    def __init__(self, architecture: Architecture, generator: torch.Generator | None = None):
        super().__init__()
        count, hidden, dropout = len(architecture.modalities), architecture.hidden, architecture.dropout
        self.modality_dropout = ModalityDropout(architecture, generator)
        self.encoders = nn.ModuleList(
            TimeEncoder(width, segments, hidden, dropout, generator) if segments > 1
            else Encoder(width, hidden, dropout, generator)
            for width, segments in zip(architecture.dimensions, architecture.segments, strict=True)
        )
        self.attention = Encoder(count * hidden, hidden, dropout, generator)
        self.scores = nn.Linear(hidden, count)
        self.classifier = nn.Linear(hidden, architecture.labels)

    def forward(self, features: Sequence[Tensor], present: Tensor) -> tuple[Tensor, Tensor | None]:
        """As attention.py's; the scores are those of the modalities."""
        features, _ = self.modality_dropout(features, present)
        encodings = [encoder(x) for encoder, x in zip(self.encoders, features, strict=True)]
        scores = self.scores(self.attention(torch.cat(encodings, dim=1)))
        fused = (scores[:, :, None] * torch.stack(encodings, dim=1)).sum(dim=1)
        return self.classifier(fused), scores


class TimeEncoder(nn.Module):
    """(B, width) -> (B, hidden): dropout on the input; two Linear + ReLU on each of its segments; the sum of them
    weighted by attention; Linear + ReLU."""

    def __init__(self, width: int, segments: int, hidden: int, dropout: float, generator: torch.Generator | None):
        super().__init__()
        self.segments = segments
        self.dropout = Dropout(dropout, generator)
        self.linear_1 = nn.Linear(width // segments, hidden, bias=False)
        self.positions = nn.Parameter(0.02 * torch.randn(segments, hidden))
        self.linear_2 = nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, 1)
        self.linear_3 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.dropout(x).unflatten(1, (self.segments, -1))
        parts = self.linear_2((self.linear_1(parts) + self.positions).relu()).relu()  # (B, segments, hidden)
        weights = self.score(parts).softmax(dim=1)
        return self.linear_3((weights * parts).sum(dim=1)).relu()
