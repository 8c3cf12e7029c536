"""What was trained, and the params that it was trained with: the repository's own, or (bundle.py) a release's."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.encoders.assembly import loaded_digest
from stages.engine.errors import PipelineError
from stages.engine.files import file_digest
from stages.engine.inputs import DATA, TEXTS, medium_digest
from stages.engine.params import Extractor, Params, Runtime, load
from stages.engine.store import read_index
from stages.engine.yaml_file import read_yaml
from stages.evaluation.calibration import read_temperature

ENSEMBLE = Path("models/self_training")
CALIBRATION = Path("models/calibration.json")
# Sections of params.yaml on which a clip's features depend, and the keys in them that only say how they are had
FEATURES = ("audio", "transcribe", "frames", "faces", "rankings", "extractors", "emovclip")
OPERATION = {"base_url", "api_key_env", "batch", "max_cost_usd", "price_per_million", "openface_binary"}


@dataclass(frozen=True)
class Trained:
    """All that a prediction needs. Nothing is loaded yet: so that decoding can start before torch is imported."""

    params: Params
    ensemble: Path  # folder of ensemble.json and ensemble.safetensors
    calibration: Path  # the file with the temperature of this ensemble's probabilities
    modalities: tuple[str, ...]  # in the ensemble's order
    learned_from: Mapping[str, Mapping[str, Any]]  # modality -> its entry in data/modalities.json when it was trained

    @property
    def media(self) -> set[str]:
        """What the modalities' encoders take: audio, frames, faces, transcripts.csv, rankings.jsonl."""
        return {self.params.extractors[modality].input for modality in self.modalities}

    @property
    def reads_text(self) -> bool:
        return any(medium in TEXTS for medium in self.media)

    def temperature(self) -> float:
        """Raises PipelineError where none was fitted yet, or it was for other models."""
        return read_temperature(self.calibration, file_digest(self.ensemble / "ensemble.safetensors"))

    def on(self, device: str) -> "Trained":
        """The same to run on another device than params say. Raises PipelineError for what is no device's name."""
        runtime = self.params.runtime.model_dump() | {"device": device}
        try:
            update = {"runtime": Runtime.model_validate(runtime)}
        except ValidationError:
            raise PipelineError(f"--device: found {device!r}, expected auto, cpu, cuda or cuda:N") from None
        return replace(self, params=self.params.model_copy(update=update))


def trained_here() -> Trained:
    """The models of the pipeline in the current folder.

    Raises PipelineError where there are none yet, or where params.yaml, features, their inputs, checkpoints or prompts
    are no longer those that the models learned from.
    """
    trained = assemble(load(), ENSEMBLE, CALIBRATION, "dvc repro")
    if Path("dvc.lock").exists():
        check_params(read_yaml("params.yaml"), read_yaml("dvc.lock"), trained.modalities, read_yaml("dvc.yaml"))
    for name in trained.modalities:
        check_learned(name, trained.params.extractors[name], trained.learned_from[name])
    return trained


def check_learned(name: str, row: Extractor, learned: Mapping[str, Any]) -> None:
    """Compare what the models learned from with what is there: half of a `dvc repro` may have run since.

    Features and their inputs that are not on this machine are not compared. Raises PipelineError.
    """
    def check(what: str, key: str, found: str) -> None:
        if found != learned[key]:
            raise PipelineError(f"modality {name}: {what} changed since the models in {ENSEMBLE} were trained; run dvc "
                                f"repro (which sees that a checkpoint changes where depends_on names its folder)")

    check(f"what its encoder loads ({', '.join(row.loads.values())}) is gone or", "loaded", loaded_digest(row).hex())
    features, source = Path("features") / name, DATA / row.input
    if features.exists():
        check(str(features), "digest", read_index(features)["digest"])
    if source.exists():
        check(str(source), "source", medium_digest(row.input))


def assemble(p: Params, ensemble: Path, calibration: Path, remedy: str) -> Trained:
    """Trained, its files found. PipelineError with the remedy where one is missing, or p lacks a modality's row."""
    path = ensemble / "ensemble.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        modalities = tuple(modality["name"] for modality in description["modalities"])
        labels = description["labels"]
        learned_from = {name: description["learned_from"][name] for name in modalities}
    except FileNotFoundError:
        raise PipelineError(f"{ensemble}: no trained models; make them with: {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{path}: can't be read ({error}); make it anew with: {remedy}") from None
    if not (ensemble / "ensemble.safetensors").is_file():
        raise PipelineError(f"{ensemble / 'ensemble.safetensors'}: no trained models; make them with: {remedy}")
    if labels != p.corpus.labels:
        raise PipelineError(f"params.yaml: corpus.labels: found {p.corpus.labels}, but the models were trained with "
                            f"{labels}; set it back, or run dvc repro")
    for name in modalities:
        if name not in p.extractors:
            raise PipelineError(f"params.yaml: extractors: found no row {name!r}, which the models were trained with; "
                                f"run dvc repro")
    return Trained(p, ensemble, calibration, modalities, learned_from)


def check_params(values: Mapping[str, Any], lock: Mapping[str, Any], modalities: tuple[str, ...],
                 pipeline: Mapping[str, Any]) -> None:
    """Compare params.yaml with dvc.lock, which has what every stage ran with, wherever both have a key. Only the stages
    of `pipeline` (dvc.yaml) count, as DVC keeps entries of others, and of those not plan, which makes no features.

    Raises PipelineError naming the first param that now makes other features than the models were trained on.
    """
    for stage, entry in lock.get("stages", {}).items():
        name, _, row = stage.partition("@")
        if name not in pipeline["stages"] or name == "plan" or (row and row not in modalities):
            continue
        for key, trained in entry.get("params", {}).get("params.yaml", {}).items():
            if not key.startswith(FEATURES):
                continue
            found = _leaves(key, _lookup(values, key))
            for leaf, expected in _leaves(key, trained).items():
                if not set(leaf.split(".")) & OPERATION and found.get(leaf, expected) != expected:
                    raise PipelineError(f"params.yaml: {leaf}: found {found[leaf]!r}, but the models were trained with "
                                        f"{expected!r}; set it back, or run dvc repro")


def _lookup(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _leaves(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {leaf: v for name, inside in value.items() for leaf, v in _leaves(f"{path}.{name}", inside).items()}
