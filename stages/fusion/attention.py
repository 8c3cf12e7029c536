"""The attention fusion of the MER2024 baseline (utterance mode), with the paper's modality dropout.

Sources: MERBench/toolkit/models/attention.py of github.com/zeroQiaoba/MERTools for the layers (tests/test_golden.py
compares the outputs), the paper's equation 2 for modality dropout. With one modality it is a unimodal classifier
[paper table 1].
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.fusion.architectures import Architecture, Encoder, ModalityDropout, encoders


class Model(nn.Module):
    """Per modality an encoding; raw attention scores (no softmax) from all of them; their weighted sum, classified."""

    def __init__(self, architecture: Architecture, generator: torch.Generator | None = None):
        super().__init__()
        count, hidden = len(architecture.modalities), architecture.hidden
        self.modality_dropout = ModalityDropout(architecture, generator)
        self.encoders = encoders(architecture, generator)
        self.attention = Encoder(count * hidden, hidden, architecture.dropout, generator)
        self.scores = nn.Linear(hidden, count)
        self.classifier = nn.Linear(hidden, architecture.labels)

    def forward(self, features: Sequence[Tensor], present: Tensor) -> tuple[Tensor, Tensor | None]:
        """features: per modality (B, D) float32, standardised, zeros where absent; present: (B, modalities) bool.

        Returns logits (B, labels) and attention scores (B, modalities). In training, whole modalities are zeroed
        first [paper eq. 2], then single numbers (dropout).
        """
        features, _ = self.modality_dropout(features, present)
        return self.fuse([encoder(x) for encoder, x in zip(self.encoders, features, strict=True)], present)

    def fuse(self, encodings: list[Tensor], present: Tensor) -> tuple[Tensor, Tensor | None]:
        """What forward gives, from every modality's encoding (B, hidden)."""
        scores = self.scores(self.attention(torch.cat(encodings, dim=1)))
        fused = (scores[:, :, None] * torch.stack(encodings, dim=1)).sum(dim=1)
        return self.classifier(fused), scores
