"""Early fusion: one classifier on all modalities' features side by side.

The baseline that a fusion must beat. An absent modality is zeros, the average clip.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.fusion.architectures import Architecture, Encoder, ModalityDropout


class Model(nn.Module):
    """The concatenated features through one encoder, classified."""

    def __init__(self, architecture: Architecture, generator: torch.Generator | None = None):
        super().__init__()
        self.modality_dropout = ModalityDropout(architecture, generator)
        width = sum(architecture.dimensions)
        self.encoder = Encoder(width, architecture.hidden, architecture.dropout, generator)
        self.classifier = nn.Linear(architecture.hidden, architecture.labels)

    def forward(self, features: Sequence[Tensor], present: Tensor) -> tuple[Tensor, Tensor | None]:
        """As attention.py's, without scores."""
        features, _ = self.modality_dropout(features, present)
        return self.classifier(self.encoder(torch.cat(list(features), dim=1))), None
