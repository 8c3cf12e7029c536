"""What evaluate reads: the predictions of round 0 and of the final models, the truth, and what the report shows.

All of it is brought into one order here: labelled clips in manifest order, then the others in manifest order, as
models/*/clips.csv has them. A file that does not agree is a PipelineError naming it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open

from stages.engine.errors import PipelineError, one_line

UNKNOWN = -1  # the class index of a clip whose truth is not known
BASELINES = ("majority", "logistic_regression")  # what the stage baselines predicts, simplest first


@dataclass(frozen=True)
class Predictions:
    """Softmax outputs of one ensemble of S seeds x F folds, whose models stand at the epoch of fusion.epoch."""

    labelled: list[str]      # clip ids of the rows of best, last and own
    others: list[str]        # clip ids, unlabelled and test, of the rows of votes
    best: np.ndarray         # (S, labelled, L) by the clip's own fold's model at that fold's best epoch
    last: np.ndarray         # (S, labelled, L) the same at the last epoch
    own: np.ndarray          # (S, labelled, L) the same at the ensemble's epoch
    votes: np.ndarray        # (S, F, others, L) every fold's model at the ensemble's epoch
    epoch: str               # fusion.epoch: best, common or last

    @property
    def out_of_fold(self) -> np.ndarray:
        """(S, labelled, L) what is scored out of fold: at the ensemble's epoch, or at the last one where each fold's
        model stands at the epoch that is best on the very clips that would be scored."""
        return self.last if self.epoch == "best" else self.own

    @property
    def by_seed(self) -> np.ndarray:
        """(S, others, L): the equal-weight mean of the folds' softmaxes [choice]."""
        return self.votes.mean(axis=1)

    @property
    def ensemble(self) -> np.ndarray:
        """(others, L): the equal-weight mean over seeds of by_seed; what submission.csv says."""
        return self.by_seed.mean(axis=0)


@dataclass(frozen=True)
class Baseline:
    """Probabilities of one of BASELINES, rows as those of Predictions."""

    out_of_fold: np.ndarray  # (S, labelled, L) by the clip's own fold's model
    by_seed: np.ndarray      # (S, others, L) the equal-weight mean over the folds' models


@dataclass(frozen=True)
class Run:
    """One finished run of the pipeline, in one order of clips. Class indices follow `labels`."""

    labels: list[str]
    manifest: pd.DataFrame             # index clip_id; split, label, transcript, ... as strings
    folds: np.ndarray                  # (labelled,) fold of each labelled clip
    actual: np.ndarray                 # (labelled,) class of each labelled clip
    truth: np.ndarray                  # (others,) class where known, else UNKNOWN
    final: Predictions                 # models/self_training: the models that predict
    round0: Predictions                # models/fusion: before self-training
    baselines: dict[str, Baseline]     # by name, of BASELINES
    rounds: pd.DataFrame               # reports/rounds.csv
    round_probabilities: np.ndarray    # (R + 1, S, test, L) ensemble of each round
    pseudo_labels: pd.DataFrame        # reports/pseudo_labels.csv
    curves: pd.DataFrame               # models/fusion/curves.csv
    skipped: pd.DataFrame              # reports/skipped.csv
    duplicates: pd.DataFrame           # data/duplicates.csv
    modalities: list[str]
    by_group: list[str]                # those of them that are standardised by group
    leaky: bool                        # some encoder has learned from every fold's labels

    @property
    def self_trained(self) -> bool:
        """Whether the final models are others than round 0's."""
        return not np.array_equal(self.final.votes, self.round0.votes)

    def groups(self, clips: list[str]) -> np.ndarray:
        """The group of each clip, "" where it has none."""
        return self.manifest.loc[clips, "group"].to_numpy(dtype=str)

    def split(self, name: str) -> np.ndarray:
        """Positions among `others` of the clips of the split `unlabelled` or `test`."""
        return np.flatnonzero((self.manifest.loc[self.final.others, "split"] == name).to_numpy())

    def known(self, name: str) -> np.ndarray:
        """The same, of those whose truth is known."""
        positions = self.split(name)
        return positions[self.truth[positions] != UNKNOWN]


def read_run(labels: list[str]) -> Run:
    """Read the run in the current folder. Raises PipelineError naming a file that is missing, damaged or foreign."""
    manifest = read_csv(Path("data/manifest.csv"), text=True).set_index("clip_id")
    final = read_predictions(Path("models/self_training"), manifest, len(labels))
    round0 = read_predictions(Path("models/fusion"), manifest, len(labels))
    index = {label: position for position, label in enumerate(labels)}
    folds = read_csv(Path("data/folds.csv"), text=True).set_index("clip_id")["fold"]
    if missing := sorted(set(final.labelled) - set(folds.index)):
        raise PipelineError(f"data/folds.csv: no fold for labelled clip {missing[0]}")
    truth_path = Path("data/truth.csv")
    known = read_csv(truth_path, text=True)
    truth = dict(zip(known["clip_id"], known["label"], strict=True))
    rounds_path = Path("models/self_training/rounds.safetensors")
    test = int((manifest["split"] == "test").sum())
    probabilities = _tensor(rounds_path, "test_probabilities", (None, len(final.best), test, len(labels)))
    ensemble = json.loads(read_text(Path("models/self_training/ensemble.json")))
    names = [modality["name"] for modality in ensemble["modalities"]]
    sources = json.loads(read_text(Path("data/modalities.json")))["modalities"]
    return Run(
        labels=labels,
        manifest=manifest,
        folds=folds[final.labelled].astype(int).to_numpy(),
        actual=_classes(Path("data/manifest.csv"), manifest.loc[final.labelled, "label"], index),
        truth=_classes(truth_path, [truth.get(clip, "") for clip in final.others], index),
        final=final,
        round0=round0,
        baselines=read_baselines(Path("models/baselines"), round0),
        rounds=read_csv(Path("reports/rounds.csv")),
        round_probabilities=probabilities,
        pseudo_labels=read_csv(Path("reports/pseudo_labels.csv"), text=True).astype(
            {"round": int, "seed": int, "confidence": float}),
        curves=read_csv(Path("models/fusion/curves.csv")),
        skipped=read_csv(Path("reports/skipped.csv"), text=True),
        duplicates=read_duplicates(),
        modalities=names,
        by_group=ensemble["by_group"]["modalities"],
        leaky=any(m["leaky"] for m in sources if m["name"] in names),
    )


def read_predictions(folder: Path, manifest: pd.DataFrame, classes: int) -> Predictions:
    """Read predictions.safetensors and clips.csv of one ensemble and check them against the manifest."""
    is_labelled = manifest["split"] == "labelled"
    labelled, others = manifest.index[is_labelled].tolist(), manifest.index[~is_labelled].tolist()
    check_clips(folder / "clips.csv", labelled + others)
    path = folder / "predictions.safetensors"
    best = _tensor(path, "out_of_fold_best", (None, len(labelled), classes))
    last = _tensor(path, "out_of_fold_last", (len(best), len(labelled), classes))
    own = _tensor(path, "out_of_fold", (len(best), len(labelled), classes))
    votes = _tensor(path, "votes", (len(best), None, len(others), classes))
    epoch = json.loads(read_text(folder / "ensemble.json"))["epoch"]["chosen"]
    return Predictions(labelled, others, best, last, own, votes, epoch)


def check_clips(path: Path, expected: list[str]) -> None:
    """Raises PipelineError where the rows of predictions are not the clips of the manifest."""
    clips = read_csv(path, text=True)["clip_id"].tolist()
    if clips != expected:
        raise PipelineError(f"{path}: found {len(clips)} clips that are not those of data/manifest.csv "
                            f"({len(expected)}) in its order; run dvc repro")


def read_baselines(folder: Path, like: Predictions) -> dict[str, Baseline]:
    """What the stage baselines predicts for the same clips and with as many classes as the ensembles."""
    check_clips(folder / "clips.csv", like.labelled + like.others)
    path, classes = folder / "predictions.safetensors", like.best.shape[-1]
    return {name: Baseline(_tensor(path, f"{name}.out_of_fold", (None, len(like.labelled), classes)),
                           _tensor(path, f"{name}.others", (None, len(like.others), classes)))
            for name in BASELINES}


def read_transcripts(run: Run) -> dict[str, str]:
    """Clip id to transcript: the corpus's own, or what the stage transcribe recognised."""
    transcripts = {str(clip_id): str(text) for clip_id, text in run.manifest["transcript"].items()}
    path = Path("data/transcripts.csv")
    if path.exists():
        heard = read_csv(path, text=True)
        transcripts.update(zip(heard["clip_id"], heard["transcript"], strict=True))
    return transcripts


def read_duplicates() -> pd.DataFrame:
    """digest, clip_id, split, problem of clips with the same content; empty where no stage compared them."""
    path = Path("data/duplicates.csv")
    if not path.exists():
        return pd.DataFrame(columns=["digest", "clip_id", "split", "problem"], dtype=str)
    return read_csv(path, text=True)


def read_rankings() -> dict[str, list[str]]:
    """Clip id to its labels, most likely first; empty where the run has no rankings."""
    path = Path("data/rankings.jsonl")
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in read_text(path).splitlines()]
    return {clip: row["ranking"] for row in rows for clip in row["clip_ids"]}


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PipelineError(f"{path}: not found; run dvc repro") from None


def read_csv(path: Path, text: bool = False) -> pd.DataFrame:
    """A CSV file; text keeps every cell a string, so that a clip called 007 or NA keeps its name."""
    try:
        return pd.read_csv(path, dtype=str if text else None, keep_default_na=not text)
    except FileNotFoundError:
        raise PipelineError(f"{path}: not found; run dvc repro") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise PipelineError(f"{path}: not a CSV table: {one_line(error)}") from None


def _tensor(path: Path, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """One tensor of a safetensors file as float32; None in shape stands for any size."""
    try:
        with safe_open(path, framework="numpy") as file:
            tensor = file.get_tensor(name).astype(np.float32)
    except FileNotFoundError:
        raise PipelineError(f"{path}: not found; run dvc repro") from None
    except SafetensorError as error:
        raise PipelineError(f"{path}: can't read {name}: {one_line(error)}") from None
    if len(tensor.shape) != len(shape) or any(s not in (None, t) for s, t in zip(shape, tensor.shape, strict=True)):
        expected = tuple("any" if size is None else size for size in shape)
        raise PipelineError(f"{path}: {name} has shape {tensor.shape}, expected {expected}")
    if not np.isfinite(tensor).all():
        raise PipelineError(f"{path}: {name} holds NaN or infinite values, expected probabilities")
    return tensor


def _classes(path: Path, names: "pd.Series | list[str]", index: dict[str, int]) -> np.ndarray:
    """Class indices of label names; an empty name is UNKNOWN."""
    for name in names:
        if name and name not in index:
            raise PipelineError(f"{path}: label {name!r}, expected one of {sorted(index)}")
    return np.array([index[name] if name else UNKNOWN for name in names], dtype=np.int64)
