"""The attention fusion of the MER2024 baseline (utterance mode), with the paper's modality dropout.

Sources: MERBench/toolkit/models/attention.py of github.com/zeroQiaoba/MERTools for the layers (tests/test_golden.py
compares the outputs), the paper's equation 2 for modality dropout. With one modality it is a unimodal classifier
[paper table 1].
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.fusion.architectures import Architecture, Dropout, keep_modalities


class Model(nn.Module):
    """Per modality an encoding; raw attention scores (no softmax) from all of them; their weighted sum, classified."""

    def __init__(self, architecture: Architecture, generator: torch.Generator | None = None):
        super().__init__()
        self.architecture, self.generator = architecture, generator
        count, hidden = len(architecture.modalities), architecture.hidden
        widths = architecture.dimensions
        self.encoders = nn.ModuleList(Encoder(width, hidden, architecture.dropout, generator) for width in widths)
        self.attention = Encoder(count * hidden, hidden, architecture.dropout, generator)
        self.scores = nn.Linear(hidden, count)
        self.classifier = nn.Linear(hidden, architecture.labels)

    def forward(self, features: Sequence[Tensor], present: Tensor) -> tuple[Tensor, Tensor | None]:
        """features: per modality (B, D) float32, standardised, zeros where absent; present: (B, modalities) bool.

        Returns logits (B, labels) and attention scores (B, modalities). In training, whole modalities are zeroed
        first [paper eq. 2], then single numbers (dropout); what is left of a clip is not scaled up for the former.
        """
        if self.training and self.architecture.modality_dropout > 0:
            keep = keep_modalities(present, self.architecture, self.generator)
            features = [x * keep[:, i, None] for i, x in enumerate(features)]
        return self.fuse([encoder(x) for encoder, x in zip(self.encoders, features, strict=True)], present)

    def fuse(self, encodings: list[Tensor], present: Tensor) -> tuple[Tensor, Tensor | None]:
        """What forward gives, from every modality's encoding (B, hidden)."""
        scores = self.scores(self.attention(torch.cat(encodings, dim=1)))
        fused = (scores[:, :, None] * torch.stack(encodings, dim=1)).sum(dim=1)
        return self.classifier(fused), scores


class Encoder(nn.Module):
    """(B, width) -> (B, hidden): dropout on the input, then three Linear + ReLU (ReLU also after the third)."""

    def __init__(self, width: int, hidden: int, dropout: float, generator: torch.Generator | None):
        super().__init__()
        self.dropout = Dropout(dropout, generator)
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)
        self.linear_3 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_1(self.dropout(x)).relu()
        return self.linear_3(self.linear_2(x).relu()).relu()
