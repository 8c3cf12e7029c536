"""The attention fusion of the MER2024 baseline (utterance mode), M models of one architecture at once.

Per modality an encoder: dropout on the input, then three Linear + ReLU (ReLU also after the third). The
concatenated encodings go through one more such encoder and a Linear to one raw score per modality (no softmax);
the encodings weighted by these scores are summed and a Linear makes the logits. With one modality it is a
unimodal classifier [paper table 1].

Folds and seeds are M models that differ only in their numbers, so every parameter carries a leading dimension M
and every layer is one batched matrix product. The parameters of one model lie one after another in one flat
vector: an optimiser, a snapshot or a file handles a row of `flat` (M, P) and needs no names. Linear weights are
(out, in) as torch.nn.Linear keeps them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Parameters = dict[str, Tensor]  # name -> (M, ...)


@dataclass(frozen=True)
class Architecture:
    """What fixes the shapes: modalities with their input dimensions, the hidden width, the number of labels."""

    modalities: tuple[str, ...]
    dimensions: tuple[int, ...]
    hidden: int
    labels: int

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """name -> (out, in) of every Linear, in the order of the flat vector."""
        encoders = {f"encoders.{name}": size for name, size in zip(self.modalities, self.dimensions, strict=True)}
        encoders["attention"] = len(self.modalities) * self.hidden
        layers = {}
        for name, size in encoders.items():
            layers[f"{name}.linear_1"] = (self.hidden, size)
            layers[f"{name}.linear_2"] = (self.hidden, self.hidden)
            layers[f"{name}.linear_3"] = (self.hidden, self.hidden)
        layers["scores"] = (len(self.modalities), self.hidden)
        layers["classifier"] = (self.labels, self.hidden)
        return layers

    @property
    def size(self) -> int:
        """P, the number of parameters of one model."""
        return sum(out * (inputs + 1) for out, inputs in self.layers.values())

    def views(self, flat: Tensor) -> Parameters:
        """The parameters by name, as views of flat (..., P): (..., out, in) weights and (..., out) biases."""
        views, start = {}, 0
        for name, (out, inputs) in self.layers.items():
            views[f"{name}.weight"] = flat[..., start : start + out * inputs].unflatten(-1, (out, inputs))
            start += out * inputs
            views[f"{name}.bias"] = flat[..., start : start + out]
            start += out
        return views


def initial_parameters(architecture: Architecture, seeds: Sequence[int]) -> Tensor:
    """Fresh models, one per seed: (len(seeds), P) float32 on the CPU.

    torch.nn.Linear's own initialisation, U(-1/sqrt(in), 1/sqrt(in)) for weight and bias, drawn layer by layer
    from a generator of the model's own: a model starts the same alone and among others.
    """
    flat = torch.empty(len(seeds), architecture.size)
    for row, seed in zip(flat, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        views = architecture.views(row)
        for name, (_, inputs) in architecture.layers.items():
            bound = 1 / math.sqrt(inputs)
            for kind in ("weight", "bias"):
                views[f"{name}.{kind}"].uniform_(-bound, bound, generator=generator)
    return flat


def linear(parameters: Parameters, name: str, inputs: Tensor) -> Tensor:
    """M Linear layers at once: (M, B, in) -> (M, B, out)."""
    return torch.baddbmm(parameters[f"{name}.bias"][:, None], inputs, parameters[f"{name}.weight"].mT)


def first_layer(parameters: Parameters, modality: str, inputs: Tensor) -> Tensor:
    """The widest layer, before its ReLU: (M, B, dimension) -> (M, B, hidden).

    Apart from the rest because it holds nearly all the parameters: training writes its weight gradient in place,
    and prediction folds the standardisation into it.
    """
    return linear(parameters, f"encoders.{modality}.linear_1", inputs)


def logits(
    parameters: Parameters, modalities: Sequence[str], first: Sequence[Tensor], dropout: Tensor | None = None
) -> Tensor:
    """The model from the first layers' outputs on: one (M, B, hidden) per modality -> (M, B, labels).

    dropout: None in evaluation; in training (M, B, modalities * hidden), 0 or 1 / (1 - p), the dropout on the
    attention encoder's input.
    """
    return logits_and_attention(parameters, modalities, first, dropout)[0]


def logits_and_attention(
    parameters: Parameters, modalities: Sequence[str], first: Sequence[Tensor], dropout: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What logits gives, and the raw attention scores that weigh the encodings, (M, B, modalities)."""
    encodings = [_encode(parameters, f"encoders.{name}", x) for name, x in zip(modalities, first, strict=True)]
    joined = torch.cat(encodings, dim=-1)
    if dropout is not None:
        joined = joined * dropout
    attention = _encode(parameters, "attention", linear(parameters, "attention.linear_1", joined))
    scores = linear(parameters, "scores", attention)
    fused = torch.stack([scores[..., i : i + 1] * encoding for i, encoding in enumerate(encodings)]).sum(dim=0)
    return linear(parameters, "classifier", fused), scores


def _encode(parameters: Parameters, name: str, first: Tensor) -> Tensor:
    hidden = linear(parameters, f"{name}.linear_2", first.relu()).relu()
    return linear(parameters, f"{name}.linear_3", hidden).relu()
