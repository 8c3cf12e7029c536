"""Late fusion: a classifier of its own for each modality; the mean of the present ones' logits.

Averaging logits averages log-probabilities: a classifier that is sure counts for more than one that is not [choice].
The classifiers share no weight but are trained by the loss of their mean; modality dropout makes each answer alone
at times. A clip without any modality gets logits of zeros: every label is as likely.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.fusion.architectures import Architecture, ModalityDropout, encoders


class Model(nn.Module):
    """A unimodal classifier per modality; the mean of the present ones' logits."""

    def __init__(self, architecture: Architecture, generator: torch.Generator | None = None):
        super().__init__()
        self.modality_dropout = ModalityDropout(architecture, generator)
        self.encoders = encoders(architecture, generator)
        self.classifiers = nn.ModuleList(nn.Linear(architecture.hidden, architecture.labels)
                                         for _ in architecture.modalities)

    def forward(self, features: Sequence[Tensor], present: Tensor) -> tuple[Tensor, Tensor | None]:
        """As attention.py's, without scores."""
        features, present = self.modality_dropout(features, present)
        parts = zip(self.classifiers, self.encoders, features, strict=True)
        logits = torch.stack([classifier(encoder(x)) for classifier, encoder, x in parts], dim=1)
        count = present.sum(dim=1, keepdim=True).clamp(min=1)
        return (logits * present[:, :, None]).sum(dim=1) / count, None
