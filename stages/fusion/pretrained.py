"""Weights that the fusion's encoders start from: what pretrain_fusion leaves in models/pretraining."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.engine.errors import PipelineError, one_line
from stages.engine.files import write_tensors

FOLDER = Path("models/pretraining")
WEIGHTS = "encoders.safetensors"
REMEDY = "run dvc repro pretrain_fusion"


@dataclass(frozen=True)
class Pretrained:
    """The encoders of every modality of S x F models."""

    seeds: tuple[int, ...]
    weights: dict[str, Tensor]  # <modality>.<name in its encoder>: (S, F, ...) float32

    def start(self, model: nn.Module, modalities: Sequence[str], seed: int, fold: int) -> None:
        """Let the encoders of a model with these modalities start from those of this seed and fold.

        Raises PipelineError where they are not of the model's shape, or for another seed or fold.
        """
        try:
            for name, encoder in zip(modalities, encoders_of(model), strict=True):
                found = {key.removeprefix(f"{name}."): values[self.seeds.index(seed), fold]
                         for key, values in self.weights.items() if key.startswith(f"{name}.")}
                encoder.load_state_dict(found)
        except (RuntimeError, ValueError, IndexError) as error:
            raise PipelineError(f"{FOLDER / WEIGHTS}: encoders of another fusion, seed or fold ({one_line(error)}); "
                                f"{REMEDY}") from None

    def save(self, folder: Path) -> None:
        write_tensors(folder / WEIGHTS, {**self.weights, "seeds": torch.tensor(self.seeds)})


def encoders_of(model: nn.Module) -> nn.ModuleList:
    """The model's encoders, one per modality. PipelineError where its architecture has none."""
    found = getattr(model, "encoders", None)
    if not isinstance(found, nn.ModuleList):
        name = type(model).__module__.rpartition(".")[2]
        raise PipelineError(f"params.yaml: pretraining.method: expected off, since fusion.architecture {name} has no "
                            f"encoder of its own for each modality")
    return found


def load_pretrained(method: str) -> Pretrained | None:
    """What pretrain_fusion wrote in the current folder; None where pretraining.method is off.

    Raises PipelineError for a missing or damaged file.
    """
    if method == "off":
        return None
    try:
        weights = load_file(FOLDER / WEIGHTS)
        seeds = tuple(weights.pop("seeds").tolist())
    except (OSError, KeyError, SafetensorError) as error:
        raise PipelineError(f"{FOLDER / WEIGHTS}: can't be read ({one_line(error)}); {REMEDY}") from None
    return Pretrained(seeds, weights)
