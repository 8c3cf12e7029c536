"""What every fusion architecture shares: how it is found by its name, its dropout, and a modality's encoder.

An architecture is one module of this folder, which `fusion.architecture` in params.yaml names, with a class

    Model(architecture: Architecture, generator: torch.Generator | None), a torch.nn.Module;
    forward(features, present) -> (logits, scores): see attention.py; scores is None where it has no attention;
    reads_frames = True where it takes features over time instead of pooled ones: see frames.py;
    encoders, an nn.ModuleList with one module per modality, (B, D) -> (B, hidden), where it has such: what
    pretrain_fusion can train; and, where modalities meet only as these encodings, optionally fuse(encodings, present)
    -> the same as forward: what takes modalities away then computes each encoding only once.

Any modality may be absent from a clip, all of them too: the logits must be numbers, and the same as if modality dropout
had dropped what is absent.

The class draws all its randomness in training from `generator`, with Dropout and ModalityDropout below instead of
torch.nn.Dropout (nor torch's own attention modules, which hold one): models are trained side by side in threads, among
which torch's one global generator would be shared out by chance. Layers are made as usual: the weights' first values
are drawn from torch's global generator before the threads begin.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor, nn

from stages.engine.errors import PipelineError
from stages.engine.params import Fusion


@dataclass(frozen=True)
class Architecture:
    """All that a model is built from but its weights."""

    name: str  # the module in stages/fusion
    modalities: tuple[str, ...]
    dimensions: tuple[int, ...]  # features per modality
    labels: int
    hidden: int
    dropout: float
    modality_dropout: float
    keep_one: bool
    segments: tuple[int, ...] = ()  # parts of time per modality, 1 where pooled; none given: all are

    def __post_init__(self) -> None:
        if not self.segments:
            object.__setattr__(self, "segments", (1,) * len(self.modalities))

    def build(self, generator: torch.Generator | None = None) -> nn.Module:
        """A model with fresh weights on the current default device. PipelineError for a name that is no fusion's."""
        return model_class(self.name)(self, generator)


def model_class(name: str) -> Callable[[Architecture, torch.Generator | None], nn.Module]:
    """The class Model of the fusion of that name. PipelineError for a name that is no fusion's."""
    module = f"stages.fusion.{name}"
    known = str(name).isidentifier() and find_spec(module)  # a bundle's name may be anything
    model = getattr(importlib.import_module(module), "Model", None) if known else None
    if model is None:
        raise PipelineError(f"params.yaml: fusion.architecture: found {name!r}, expected a module of "
                            f"stages/fusion with a class Model")
    return cast(Callable[[Architecture, torch.Generator | None], nn.Module], model)


def segments_read(p: Fusion) -> int | None:
    """Into how many parts of time load_inputs is to cut a clip's features; None for a fusion of pooled ones."""
    return p.segments if getattr(model_class(p.architecture), "reads_frames", False) else None


class Dropout(nn.Module):
    """torch.nn.Dropout with a generator of its own: a number is zeroed with probability p, else divided by 1 - p.

    p is rounded to 1 / 65536: four int16 of each int64 that is drawn cost a seventh of what bernoulli_ does on a CPU,
    where that alone is a third of an epoch.
    """

    def __init__(self, p: float, generator: torch.Generator | None):
        super().__init__()
        self.p, self.generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        bits = words.random_(-(2**63), None, generator=self.generator).view(torch.int16)[: x.numel()].view(x.shape)
        kept = bits.lt_(min(round((1 - self.p) * 2**16), 2**16 - 1) - 2**15)  # uniform over [-2^15, 2^15)
        return x * (kept * (1 / (1 - self.p)))


def keep_modalities(present: Tensor, architecture: Architecture, generator: torch.Generator | None) -> Tensor:
    """Modality dropout [paper eq. 2]: which modalities of which clips stay; (B, modalities) bool, as `present` is.

    Each modality goes with probability p, independently. keep_one [choice]: a clip that lost every modality it has is
    drawn again until it keeps one. That is the distribution conditional on keeping at least one, which is drawn here
    directly, modality by modality: as long as nothing is kept and r present ones are left, the next stays with
    probability (1 - p) / (1 - p^r), else with 1 - p.
    """
    p = architecture.modality_dropout
    uniform = torch.rand(present.shape, device=present.device, generator=generator)
    if not architecture.keep_one:
        return uniform < 1 - p
    left = present.flip(-1).cumsum(-1).flip(-1)  # present modalities from this one on
    conditional = (1 - p) / (1 - p ** left.clamp(min=1).float())
    kept, any_kept = torch.zeros_like(present), torch.zeros_like(present[:, 0])
    for i in range(present.shape[1]):
        kept[:, i] = uniform[:, i] < torch.where(any_kept, 1 - p, conditional[:, i])
        any_kept |= kept[:, i] & present[:, i]
    return kept


class ModalityDropout(nn.Module):
    """Modality dropout [paper eq. 2] of a model in training: whole modalities become absent, and zeros, at random.

    What is left of a clip is not scaled up.
    """

    def __init__(self, architecture: Architecture, generator: torch.Generator | None):
        super().__init__()
        self.architecture, self.generator = architecture, generator

    def forward(self, features: Sequence[Tensor], present: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        if not self.training or self.architecture.modality_dropout == 0:
            return features, present
        keep = keep_modalities(present, self.architecture, self.generator)
        return [x * keep[:, i, None] for i, x in enumerate(features)], present & keep


class Encoder(nn.Module):
    """(B, width) -> (B, hidden): dropout on the input, then three Linear + ReLU (ReLU also after the third).
    """

    def __init__(self, width: int, hidden: int, dropout: float, generator: torch.Generator | None):
        super().__init__()
        self.dropout = Dropout(dropout, generator)
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)
        self.linear_3 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_1(self.dropout(x)).relu()
        return self.linear_3(self.linear_2(x).relu()).relu()


def encoders(architecture: Architecture, generator: torch.Generator | None) -> nn.ModuleList:
    """An Encoder for each modality."""
    return nn.ModuleList(Encoder(width, architecture.hidden, architecture.dropout, generator)
                         for width in architecture.dimensions)
