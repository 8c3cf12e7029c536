"""A trained ensemble, seeds x folds models: prediction, and the files of models/fusion and models/self_training."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.engine.devices import cores, lanes
from stages.engine.errors import PipelineError, one_line
from stages.engine.files import empty_folder, replacing, write_json, write_tensors
from stages.evaluation import metrics
from stages.fusion.architectures import Architecture
from stages.fusion.features import Inputs, Standardised, Statistics, write_clips

PREDICT_ROWS = 1024  # clips per chunk: bounds the memory of a prediction, whatever the number of clips


def lane_count(device: torch.device, tasks: int) -> int:
    """How many models or chunks are computed side by side: on a CPU one per core; on a GPU one."""
    return max(1, min(cores(), tasks)) if device.type == "cpu" else 1


@dataclass(frozen=True)
class Ensemble:
    """S x F models of one architecture, each at the epoch that fusion.epoch chose, with its fold's standardisation."""

    architecture: Architecture
    label_names: tuple[str, ...]
    seeds: tuple[int, ...]
    weights: dict[str, Tensor]  # the models' state dicts, stacked: (S, F, ...) float32
    statistics: Statistics  # per modality mean and scale (F, D), as fold_statistics gives them
    learned_from: dict[str, Any] = field(default_factory=dict)  # per modality its entry in data/modalities.json then
    chosen: str = "best"  # fusion.epoch: how each model's epoch was chosen
    epochs: list[list[int]] = field(default_factory=list)  # (S, F) those epochs, from 1
    groups: Statistics = field(default_factory=dict)  # as group_statistics gives them, where fusion.standardize says so
    members: dict[str, int] = field(default_factory=dict)  # digest of a clip's content -> its group there, or -1

    @property
    def folds(self) -> int:
        return next(iter(self.weights.values())).shape[1]

    @property
    def group_count(self) -> int:
        return next((mean.shape[1] for mean, _ in self.groups.values()), 0)

    @property
    def parameters_per_model(self) -> int:
        return sum(values[0, 0].numel() for values in self.weights.values())

    def model(self, seed: int, fold: int, device: torch.device) -> nn.Module:
        """The model of the seed at this position and this fold, in evaluation mode."""
        with torch.device("meta"):
            model = self.architecture.build()
        state = {name: values[seed, fold].to(device) for name, values in self.weights.items()}
        model.load_state_dict(state, assign=True)
        return model.eval()

    def predict(self, inputs: Inputs, rows: np.ndarray, removed: frozenset[str] = frozenset()) -> Tensor:
        """Softmax of every model for the clips `rows` (row numbers of inputs): (S, F, len(rows), L) float32, CPU."""
        return self.predict_with_attention(inputs, rows, removed)[0]

    def predict_with_attention(
        self, inputs: Inputs, rows: np.ndarray, removed: frozenset[str] = frozenset()
    ) -> tuple[Tensor, Tensor]:
        """What predict gives, and every model's attention scores: (S, F, len(rows), modalities) float32, CPU, NaN
        where the architecture has none.

        A modality in `removed` counts as absent from every clip: its input is zeros after standardisation, as for
        a clip that lacks it and as modality dropout makes it. Streams over the clips in chunks, on a CPU side by side.
        """
        modalities, device = self.architecture.modalities, inputs.device
        models = [[self.model(s, fold, device) for s in range(len(self.seeds))] for fold in range(self.folds)]
        chosen = inputs.select(modalities)
        feeds = [Standardised(chosen, self.statistics, fold, self.groups) for fold in range(self.folds)]
        output = torch.empty(len(self.seeds), self.folds, len(rows), self.architecture.labels)
        attention = torch.full((*output.shape[:3], len(modalities)), torch.nan)

        @torch.inference_mode()
        def chunk(start: int) -> None:
            part = slice(start, start + PREDICT_ROWS)
            numbers = torch.from_numpy(rows[part]).to(device)
            for fold, feed in enumerate(feeds):
                clips = feed(numbers, removed)
                for s, model in enumerate(models[fold]):
                    logits, scores = model(*clips)
                    output[s, fold, part] = logits.softmax(dim=-1).cpu()
                    if scores is not None:
                        attention[s, fold, part] = scores.cpu()

        starts = range(0, len(rows), PREDICT_ROWS)
        with lanes(lane_count(device, len(starts))) as pool:
            list(pool.map(chunk, starts))
        return output, attention

    def save(self, folder: Path) -> None:
        """Write ensemble.safetensors and ensemble.json.

        Tensors: every weight of the architecture's module (S, F, ...), encoders by the modality's position;
        standardize.<modality>.mean and .scale (F, D); standardize.<modality>.group_mean and .group_scale (G, groups, D)
        of the modalities that are standardised by group.
        """
        tensors = dict(self.weights)
        for name, (mean, scale) in self.statistics.items():
            tensors |= {f"standardize.{name}.mean": mean, f"standardize.{name}.scale": scale}
        for name, (mean, scale) in self.groups.items():
            tensors |= {f"standardize.{name}.group_mean": mean, f"standardize.{name}.group_scale": scale}
        write_tensors(folder / "ensemble.safetensors", tensors)
        shape = asdict(self.architecture)
        modalities = zip(shape.pop("modalities"), shape.pop("dimensions"), strict=True)
        description = {
            "architecture": shape.pop("name"),
            "modalities": [{"name": name, "dimension": dimension} for name, dimension in modalities],
            **shape,
            "labels": list(self.label_names),
            "folds": self.folds,
            "seeds": list(self.seeds),
            "epoch": {"chosen": self.chosen, "of_seed_and_fold": self.epochs},
            "by_group": {"modalities": list(self.groups), "groups": self.group_count, "group_of_digest": self.members},
            "learned_from": self.learned_from,
        }
        write_json(folder / "ensemble.json", description)


def load_ensemble(folder: str | Path) -> Ensemble:
    """Read what Ensemble.save wrote. Raises PipelineError naming the file and tensor that does not fit."""
    path = Path(folder) / "ensemble.safetensors"
    try:
        description = json.loads((Path(folder) / "ensemble.json").read_text(encoding="utf-8"))
        tensors = load_file(path)
        architecture = Architecture(
            description["architecture"],
            tuple(modality["name"] for modality in description["modalities"]),
            tuple(modality["dimension"] for modality in description["modalities"]),
            len(description["labels"]),
            *(description[name] for name in ("hidden", "dropout", "modality_dropout", "keep_one")),
        )
        labels, seeds = tuple(description["labels"]), tuple(description["seeds"])
        folds, learned_from, epoch = description["folds"], description["learned_from"], description["epoch"]
        chosen, epochs = epoch["chosen"], epoch["of_seed_and_fold"]
        dimensions = dict(zip(architecture.modalities, architecture.dimensions, strict=True))
        by_group = {name: dimensions[name] for name in description["by_group"]["modalities"]}
        count, members = description["by_group"]["groups"], dict(description["by_group"]["group_of_digest"])
        if not all(number in range(-1, count) for number in members.values()):
            raise ValueError(f"by_group: expected numbers of {count} groups")
        with torch.device("meta"):
            shapes = {name: tuple(values.shape) for name, values in architecture.build().state_dict().items()}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise PipelineError(f"{folder}: can't read the ensemble ({one_line(error)}); make it anew with: dvc repro"
                            ) from None
    weights = {name: _tensor(path, tensors, name, (len(seeds), folds, *shape)) for name, shape in shapes.items()}
    statistics = {}
    for name, dimension in zip(architecture.modalities, architecture.dimensions, strict=True):
        mean, scale = (_tensor(path, tensors, f"standardize.{name}.{p}", (folds, dimension)) for p in ("mean", "scale"))
        statistics[name] = (mean, scale)
    groups = {}
    for name, dimension in by_group.items():
        sets = folds if len(tensors.get(f"standardize.{name}.group_mean", ())) == folds else 1
        mean, scale = (_tensor(path, tensors, f"standardize.{name}.{p}", (sets, count, dimension))
                       for p in ("group_mean", "group_scale"))
        groups[name] = (mean, scale)
    return Ensemble(architecture, labels, seeds, weights, statistics, learned_from, chosen, epochs, groups, members)


def _tensor(path: Path, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    found = tuple(tensors[name].shape) if name in tensors else "nothing"
    if found != shape:
        raise PipelineError(f"{path}: {name}: found {found}, expected {shape}; make it anew with: dvc repro")
    return tensors[name]


# ---------------------------------------------------------------- what a round leaves


@dataclass(frozen=True)
class Outputs:
    """An ensemble with what it predicts, on the CPU. Rows follow Inputs.labelled and Inputs.others."""

    ensemble: Ensemble
    out_of_fold_best: Tensor  # (S, labelled, L) softmax by the clip's own fold's model at its best epoch
    out_of_fold_last: Tensor  # (S, labelled, L) the same at the last epoch
    out_of_fold: Tensor  # (S, labelled, L) the same at the ensemble's epoch
    votes: Tensor  # (S, F, others, L) softmax of every fold's model at the ensemble's epoch
    curves: Tensor  # (S, F, epochs, 3): train_loss, valid_loss, valid_waf in percent


PREDICTIONS = ("out_of_fold_best", "out_of_fold_last", "out_of_fold", "votes", "curves")


def curve_table(number: int, outputs: Outputs) -> pd.DataFrame:
    """The curves of round `number` as rows: round, seed, fold, epoch (from 1), train_loss, valid_loss, valid_waf."""
    seeds, folds, epochs, _ = outputs.curves.shape
    grid = np.meshgrid(outputs.ensemble.seeds, np.arange(folds), np.arange(1, epochs + 1), indexing="ij")
    values = outputs.curves.flatten(0, 2).double().numpy().round(6)
    columns = dict(zip(("seed", "fold", "epoch"), (axis.ravel() for axis in grid), strict=True))
    columns |= dict(zip(("train_loss", "valid_loss", "valid_waf"), values.T, strict=True))
    return pd.DataFrame({"round": number, **columns})


def cross_validation(inputs: Inputs, outputs: Outputs) -> dict[str, float]:
    """WAF in percent, as details.json has it: means and sample deviations over seeds."""
    actual, folds = inputs.labels[inputs.labelled], inputs.folds[inputs.labelled]
    figures: dict[str, float] = {}
    for name, probabilities in (("best", outputs.out_of_fold_best), ("last", outputs.out_of_fold_last)):
        called = probabilities.argmax(dim=-1).numpy()
        by_seed = metrics.waf_by_fold(actual, called, folds, len(inputs.label_names))
        mean, deviation = metrics.mean_and_deviation(by_seed)
        figures |= {f"waf_{name}_epoch": mean, f"waf_{name}_epoch_std": deviation}
    return figures


def save_outputs(folder: Path, inputs: Inputs, outputs: Outputs, curves: pd.DataFrame) -> None:
    """Write the ensemble, predictions.safetensors (PREDICTIONS), clips.csv (their rows) and curves.csv.

    The folder is made anew: its old files may be links into DVC's cache, which must not be written to.
    """
    empty_folder(folder)
    outputs.ensemble.save(folder)
    write_tensors(folder / "predictions.safetensors", {name: getattr(outputs, name) for name in PREDICTIONS})
    write_clips(folder, inputs)
    with replacing(folder / "curves.csv") as file:
        curves.to_csv(file, index=False, lineterminator="\n")


def load_outputs(folder: Path) -> Outputs:
    """Read back what save_outputs wrote. Raises PipelineError naming what is missing or damaged."""
    ensemble = load_ensemble(folder)
    path = folder / "predictions.safetensors"
    try:
        tensors = load_file(path)
        return Outputs(ensemble, *(tensors[name] for name in PREDICTIONS))
    except (OSError, KeyError, SafetensorError) as error:
        raise PipelineError(f"{path}: can't be read ({one_line(error)}); run dvc repro") from None
