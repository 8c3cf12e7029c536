"""Low-rank multimodal fusion: logits from products of all modalities, without the tensor that would hold them all.

Sources: Liu et al., Efficient low-rank multimodal fusion with modality-specific factors, ACL 2018, section 3.2; the
form of the sum over ranks (weights, and a bias, instead of a plain sum) is that of model.py of
github.com/Justin1904/Low-rank-Multimodal-Fusion. Per modality m the encoding z_m with a 1 appended meets `RANK`
matrices: logits = sum over r of w_r * product over m of (W_m,r [z_m; 1]), plus a bias. The appended 1 keeps products of
fewer modalities.

Ours [choice]: an absent modality's encoding is zeros, so that only its 1 is left; and the row of W for that 1 begins
at 1, all else small: a product of small numbers would begin at nothing, where no gradient passes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.fusion.architectures import Architecture, ModalityDropout, encoders

RANK = 4  # the official code searches 1 to 16


class Model(nn.Module):
    """Products of linear maps of all encodings, summed over ranks."""

    def __init__(self, architecture: Architecture, generator: torch.Generator | None = None):
        super().__init__()
        count, hidden, labels = len(architecture.modalities), architecture.hidden, architecture.labels
        self.modality_dropout = ModalityDropout(architecture, generator)
        self.encoders = encoders(architecture, generator)
        self.factors = nn.Parameter(torch.randn(count, RANK, hidden, labels) / hidden**0.5)
        self.ones = nn.Parameter(torch.ones(count, RANK, labels))  # the rows of the factors that meet the appended 1
        self.weights = nn.Parameter(torch.randn(RANK) / RANK**0.5)
        self.bias = nn.Parameter(torch.zeros(labels))

    def forward(self, features: Sequence[Tensor], present: Tensor) -> tuple[Tensor, Tensor | None]:
        """As attention.py's, without scores."""
        features, present = self.modality_dropout(features, present)
        encodings = [encoder(x) for encoder, x in zip(self.encoders, features, strict=True)]
        stacked = torch.stack(encodings, dim=1) * present[:, :, None]  # (B, modalities, hidden)
        mapped = torch.einsum("bmh,mrhl->bmrl", stacked, self.factors) + self.ones
        return torch.einsum("brl,r->bl", mapped.prod(dim=1), self.weights) + self.bias, None
