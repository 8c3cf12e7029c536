"""A trained ensemble, seeds x folds models: prediction, and the files of models/fusion and models/self_training."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from stages.engine.errors import PipelineError, one_line
from stages.engine.files import empty_folder, replacing, write_json
from stages.evaluation import metrics
from stages.fusion.features import Inputs, Modality, Statistics, affine
from stages.fusion.model import Architecture, Parameters, logits_and_attention

PREDICT_ROWS = 1024  # clips per chunk: bounds the memory of a prediction, whatever the number of clips


@dataclass(frozen=True)
class Ensemble:
    """S x F models of one architecture, each at its best epoch, with its fold's standardisation."""

    architecture: Architecture
    label_names: tuple[str, ...]
    seeds: tuple[int, ...]
    parameters: Tensor  # (S, F, P) float32
    statistics: Statistics  # per modality mean and scale (F, D)
    dropout: float  # it was trained with; prediction never drops

    def predict(self, inputs: Inputs, rows: np.ndarray, removed: frozenset[str] = frozenset()) -> Tensor:
        """Softmax of every model for the clips `rows` (row numbers of inputs): (S, F, len(rows), L) float32, CPU."""
        return self.predict_with_attention(inputs, rows, removed)[0]

    @torch.inference_mode()
    def predict_with_attention(
        self, inputs: Inputs, rows: np.ndarray, removed: frozenset[str] = frozenset()
    ) -> tuple[Tensor, Tensor]:
        """What predict gives, and every model's raw attention scores: (S, F, len(rows), modalities) float32, CPU.

        A modality in `removed` counts as absent for every clip: its input is zeros after standardisation, as for
        a clip that lacks it and as modality dropout makes it. Streams over the clips in chunks; the fold's
        standardisation is folded into the first layer, so a chunk is converted once, not once per fold.
        """
        seeds, folds, _ = self.parameters.shape
        modalities = self.architecture.modalities
        parameters = self.architecture.views(self.parameters.to(inputs.device))  # (S, F, ...)
        flat = {name: values.flatten(0, 1) for name, values in parameters.items()}  # (M, ...)
        by_name = {modality.name: modality for modality in inputs.modalities}
        used = [by_name[name] for name in modalities if name not in removed]
        folded = {modality.name: self._fold_standardisation(modality, parameters) for modality in used}
        output = torch.empty(seeds, folds, len(rows), self.architecture.labels)
        attention = torch.empty(seeds, folds, len(rows), len(modalities))
        for start in range(0, len(rows), PREDICT_ROWS):
            chunk = torch.from_numpy(rows[start : start + PREDICT_ROWS]).to(inputs.device)
            first = []
            for name in modalities:
                bias = flat[f"encoders.{name}.linear_1.bias"][:, None]
                if name in removed:
                    first.append(bias.expand(-1, len(chunk), -1))
                    continue
                weight, shift = folded[name]
                values = by_name[name].matrix[:, chunk].float()
                # (G, n, D) x (S, F, h, D): one product for all models where the folds share the features
                equation = "nd,sfhd->sfnh" if len(values) == 1 else "fnd,sfhd->sfnh"
                product = torch.einsum(equation, values[0] if len(values) == 1 else values, weight).flatten(0, 1)
                product += shift.flatten(0, 1)[:, None] * by_name[name].present[chunk][:, None]
                first.append(product + bias)
            found, scores = logits_and_attention(flat, modalities, first)
            part = slice(start, start + len(chunk))
            output[:, :, part] = found.softmax(dim=-1).unflatten(0, (seeds, folds)).cpu()
            attention[:, :, part] = scores.unflatten(0, (seeds, folds)).cpu()
        return output, attention

    def _fold_standardisation(self, modality: Modality, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """(weight (S, F, h, D), shift (S, F, h)) with weight . matrix row + shift = the layer's weight . input."""
        factor, offset = affine(modality, *(t.to(modality.matrix.device) for t in self.statistics[modality.name]))
        weight = parameters[f"encoders.{modality.name}.linear_1.weight"]
        return weight * factor[None, :, None], torch.einsum("sfhd,fd->sfh", weight, offset)

    def save(self, folder: Path) -> None:
        """Write ensemble.safetensors and ensemble.json.

        Tensors: every parameter (S, F, ...), weights (out, in); standardize.<modality>.mean and .scale (F, D).
        """
        tensors = dict(self.architecture.views(self.parameters))
        for name, (mean, scale) in self.statistics.items():
            tensors |= {f"standardize.{name}.mean": mean, f"standardize.{name}.scale": scale}
        content = save({name: t.cpu().contiguous() for name, t in tensors.items()})
        with replacing(folder / "ensemble.safetensors", "wb") as file:
            file.write(content)
        shapes = zip(self.architecture.modalities, self.architecture.dimensions, strict=True)
        description = {
            "modalities": [{"name": name, "dimension": dimension} for name, dimension in shapes],
            "hidden": self.architecture.hidden,
            "dropout": self.dropout,
            "labels": list(self.label_names),
            "folds": self.parameters.shape[1],
            "seeds": list(self.seeds),
            "learned_from": {
                entry["name"]: entry for entry in json.loads(Path("data/modalities.json").read_text())["modalities"]
            },
        }
        write_json(folder / "ensemble.json", description)


def load_ensemble(folder: str | Path) -> Ensemble:
    """Read what Ensemble.save wrote. Raises PipelineError naming the file and tensor that does not fit."""
    path = Path(folder) / "ensemble.safetensors"
    try:
        description = json.loads((Path(folder) / "ensemble.json").read_text(encoding="utf-8"))
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise PipelineError(f"{folder}: can't read the ensemble ({one_line(error)})") from None
    architecture = Architecture(
        tuple(modality["name"] for modality in description["modalities"]),
        tuple(modality["dimension"] for modality in description["modalities"]),
        description["hidden"],
        len(description["labels"]),
    )
    leading = (len(description["seeds"]), description["folds"])
    parameters = torch.empty(*leading, architecture.size)
    statistics = {}
    for name, view in architecture.views(parameters).items():
        view.copy_(_tensor(path, tensors, name, tuple(view.shape)))
    for name, dimension in zip(architecture.modalities, architecture.dimensions, strict=True):
        shape = (leading[1], dimension)
        mean, scale = (_tensor(path, tensors, f"standardize.{name}.{part}", shape) for part in ("mean", "scale"))
        statistics[name] = (mean, scale)
    labels, seeds = tuple(description["labels"]), tuple(description["seeds"])
    return Ensemble(architecture, labels, seeds, parameters, statistics, description["dropout"])


def _tensor(path: Path, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    found = tuple(tensors[name].shape) if name in tensors else "nothing"
    if found != shape:
        raise PipelineError(f"{path}: {name}: found {found}, expected {shape}")
    return tensors[name]


# ---------------------------------------------------------------- what a round leaves


@dataclass(frozen=True)
class Outputs:
    """An ensemble with what it predicts, on the CPU. Rows follow Inputs.labelled and Inputs.others."""

    ensemble: Ensemble
    out_of_fold_best: Tensor  # (S, labelled, L) softmax by the clip's own fold's model at its best epoch
    out_of_fold_last: Tensor  # (S, labelled, L) the same at the last epoch
    votes: Tensor  # (S, F, others, L) softmax of every fold's model at its best epoch
    curves: Tensor  # (S, F, epochs, 3): train_loss, valid_loss, valid_waf in percent


PREDICTIONS = ("out_of_fold_best", "out_of_fold_last", "votes", "curves")


def curve_table(number: int, outputs: Outputs) -> pd.DataFrame:
    """The curves of round `number` as rows: round, seed, fold, epoch (from 1), train_loss, valid_loss, valid_waf."""
    seeds, folds, epochs, _ = outputs.curves.shape
    grid = np.meshgrid(outputs.ensemble.seeds, np.arange(folds), np.arange(1, epochs + 1), indexing="ij")
    values = outputs.curves.flatten(0, 2).double().numpy().round(6)
    columns = dict(zip(("seed", "fold", "epoch"), (axis.ravel() for axis in grid), strict=True))
    columns |= dict(zip(("train_loss", "valid_loss", "valid_waf"), values.T, strict=True))
    return pd.DataFrame({"round": number, **columns})


def cross_validation(inputs: Inputs, outputs: Outputs) -> dict[str, float]:
    """WAF in percent, as metrics.json has it: means and sample deviations over seeds."""
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
    tensors = {name: getattr(outputs, name).contiguous() for name in PREDICTIONS}
    with replacing(folder / "predictions.safetensors", "wb") as file:
        file.write(save(tensors))
    rows = np.concatenate([inputs.labelled, inputs.others])
    clips = pd.DataFrame({"clip_id": np.array(inputs.clip_ids, dtype=object)[rows], "split": inputs.splits[rows]})
    for name, table in (("clips.csv", clips), ("curves.csv", curves)):
        with replacing(folder / name) as file:
            table.to_csv(file, index=False, lineterminator="\n")


def load_outputs(folder: Path) -> Outputs:
    """Read back what save_outputs wrote. Raises PipelineError naming what is missing or damaged."""
    ensemble = load_ensemble(folder)
    path = folder / "predictions.safetensors"
    try:
        tensors = load_file(path)
        return Outputs(ensemble, *(tensors[name] for name in PREDICTIONS))
    except (OSError, KeyError, SafetensorError) as error:
        raise PipelineError(f"{path}: can't be read ({one_line(error)}); run dvc repro") from None
