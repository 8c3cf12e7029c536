"""A release bundle: one folder with all that predict needs, for a machine without DVC, data or git.

    release.json       schema version, labels, modalities, and the SHA-256 of every other file
    params.yaml        resolved params; checkpoints are published names, or checkpoints/<name>
    ensemble/          ensemble.json and ensemble.safetensors: every fold's and seed's model
    checkpoints/       encoders (and EmoVCLIP's prompts) that were folders of the repository: weights and descriptions
    calibration.json   the temperature of the probabilities
    details.json, metrics.json, README.md

Opening one executes nothing of it: JSON, YAML's safe subset, safetensors, and .bin weights through weights_only. No
path in it can lead out of it, and it can't name a program to run, a server to ask or a variable that holds a key:
those are set on the machine. The digests detect damage; they are not a signature.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML

from stages.engine.errors import PipelineError
from stages.engine.files import empty_folder, file_digest, replacing, write_json
from stages.engine.fingerprint import checkpoint_files
from stages.engine.params import Params, load
from stages.inference.trained import Trained, assemble

SCHEMA = 2
INDEX = "release.json"
PARAMS = "params.yaml"
ENSEMBLE = ("ensemble.json", "ensemble.safetensors")
CALIBRATION = "calibration.json"
CHECKPOINTS = "checkpoints"
PUBLISHED = re.compile(r"(hf-hub:)?(?!\.)[\w.-]+/(?!\.)[\w.-]+|(?!\.)[\w.-]+ / (?!\.)[\w.-]+")
REMEDY = "fetch it again, or make it anew with: mer release"
# What belongs to a machine, not to a model
RUNTIME = {"device": "auto", "workers": "auto", "executor": "local", "ray_address": "auto", "batch_memory_mb": "auto"}
ASKING = {"base_url": None, "api_key_env": "OPENAI_API_KEY", "batch": False}
LEFT_OUT = "not part of a release"
OPENFACE = "FeatureExtraction"  # looked for in PATH
SERVER = "OPENAI_BASE_URL"  # as OpenAI's own client knows it


def portable(p: Params) -> Params:
    """The params without what belongs to one machine. A bundle's are made so when written, and again when opened."""
    binary = OPENFACE if p.faces.detector == "openface" else None
    return p.model_copy(update={
        "corpus": p.corpus.model_copy(update={"path": LEFT_OUT, "truth": None}),
        "emovclip": p.emovclip.model_copy(update={"checkpoint": LEFT_OUT}),  # only training reads it
        "extractors": {name: row.model_copy(update={"depends_on": LEFT_OUT}) for name, row in p.extractors.items()},
        "faces": p.faces.model_copy(update={"openface_binary": binary}),
        "rankings": p.rankings.model_copy(update=ASKING),
        "runtime": p.runtime.model_copy(update=RUNTIME),
    })


def checkpoint_keys(trained: Trained) -> list[str]:
    """Where params name the checkpoints that a prediction loads."""
    p = trained.params
    keys = [f"extractors.{name}.{key}" for name in trained.modalities for key in p.extractors[name].loads]
    if trained.reads_text and p.transcribe.checkpoint:
        keys.append("transcribe.checkpoint")
    if "rankings.jsonl" in trained.media and p.rankings.provider == "transformers":
        keys.append("rankings.model")
    return keys


# ---------------------------------------------------------------- writing


def write_bundle(out: Path, trained: Trained, figures: Sequence[Path], card: str) -> int:
    """Write the bundle, in place of an earlier one once it is whole; the bytes that it takes.
    Raises PipelineError for a checkpoint that is a folder outside the repository, or none, nor a published name.
    """
    folder = out.with_name(f".{out.name}.tmp")
    empty_folder(folder)
    try:
        _fill(folder, trained, figures, card)
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _fill(folder: Path, trained: Trained, figures: Sequence[Path], card: str) -> None:
    values = portable(trained.params).model_dump(mode="json")
    _take_checkpoints(folder, values, checkpoint_keys(trained))
    sources = {f"ensemble/{name}": trained.ensemble / name for name in ENSEMBLE}
    trained.temperature()  # refuses one of other models
    sources |= {CALIBRATION: trained.calibration, **{path.name: path for path in figures}}
    for name, source in sources.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, folder / name)
    with replacing(folder / PARAMS) as file:
        YAML(typ="safe", pure=True).dump(values, file)
    with replacing(folder / "README.md") as file:
        file.write(card)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    index = {
        "schema": SCHEMA,
        "labels": trained.params.corpus.labels,
        "modalities": list(trained.modalities),
        "files": {path.relative_to(folder).as_posix(): file_digest(path) for path in files},
    }
    write_json(folder / INDEX, index)


def _take_checkpoints(folder: Path, values: dict[str, Any], keys: Sequence[str]) -> None:
    """Copy the checkpoints that are folders of the repository, each once, and let `values` name the copies."""
    copied: dict[Path, str] = {}
    for key in keys:
        checkpoint = Path(_get(values, key))
        if checkpoint.is_dir():
            if not Path(os.path.abspath(checkpoint)).is_relative_to(Path.cwd()):
                raise PipelineError(f"params.yaml: {key}: {checkpoint} lies outside the repository; a release can "
                                    f"only hold what lies inside; link it below models/, or give its published name")
            if checkpoint not in copied:
                copied[checkpoint] = _copy_checkpoint(checkpoint, folder, set(copied.values()))
            _set(values, key, copied[checkpoint])
        elif not PUBLISHED.fullmatch(str(checkpoint)):
            raise PipelineError(f"params.yaml: {key}: {checkpoint}: no such folder; expected one, or the name of a "
                                f"published checkpoint")


def _copy_checkpoint(checkpoint: Path, folder: Path, taken: set[str]) -> str:
    """Copy what loading needs of a checkpoint; its place in the bundle."""
    name = f"{CHECKPOINTS}/{checkpoint.name}"
    while name in taken:
        name += "_"
    for path in checkpoint_files(checkpoint):
        copy = folder / name / path.relative_to(checkpoint)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return name


def _get(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _set(values: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        values = values[part]
    values[last] = value


# ---------------------------------------------------------------- opening


def open_bundle(bundle: Path) -> Trained:
    """The models and params of a bundle, with every file compared with its digest.

    Raises PipelineError for what is no bundle, another schema, a file that is missing, altered or superfluous, and for
    a path that leads out of the bundle.
    """
    index = _read_index(bundle)
    _check_files(bundle, index["files"])
    p = portable(load(bundle / PARAMS))
    p = p.model_copy(update={"rankings": p.rankings.model_copy(update={"base_url": os.environ.get(SERVER)})})
    trained = assemble(p, bundle / "ensemble", bundle / CALIBRATION, REMEDY)
    values = trained.params.model_dump()
    for key in checkpoint_keys(trained):
        checkpoint = _get(values, key)
        if any(name.rpartition("/")[0] == checkpoint for name in index["files"]):
            _set(values, key, str(bundle / checkpoint))
        elif not PUBLISHED.fullmatch(checkpoint) or Path(checkpoint).exists():
            raise PipelineError(f"{bundle / PARAMS}: {key}: found {checkpoint!r}, expected a folder of the "
                                f"bundle or the name of a published checkpoint; {REMEDY}")
    return replace(trained, params=Params.model_validate(values))


def _read_index(bundle: Path) -> dict[str, Any]:
    path = bundle / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise PipelineError(f"{bundle}: no release bundle: found no {INDEX}; expected what `mer release` writes"
                            ) from None
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path}: can't be read ({error}); {REMEDY}") from None
    found = index.get("schema") if isinstance(index, dict) else None
    if found != SCHEMA:
        raise PipelineError(f"{path}: schema {found}, expected {SCHEMA}; use the version of this program that wrote "
                            f"it, or make it anew with: mer release")
    files = index.get("files")
    needed = {PARAMS, CALIBRATION, *(f"ensemble/{name}" for name in ENSEMBLE)}
    if not isinstance(files, dict) or not needed <= files.keys():
        raise PipelineError(f"{path}: does not list {PARAMS}, {CALIBRATION}, {' and '.join(ENSEMBLE)}; {REMEDY}")
    return index


def _check_files(bundle: Path, files: Mapping[str, str]) -> None:
    """Raises PipelineError for a file that leads out, is missing, altered, or lies unlisted in a checkpoint."""
    inside = bundle.resolve()
    for name, digest in files.items():
        path = bundle / name
        parts = PurePosixPath(name)
        outside = parts.is_absolute() or ".." in parts.parts or not name.isprintable()
        if outside or not path.resolve().is_relative_to(inside):
            raise PipelineError(f"{bundle / INDEX}: {name} leads out of the bundle; {REMEDY}")
        if not path.is_file():
            raise PipelineError(f"{path}: missing; {REMEDY}")
        if file_digest(path) != digest:
            raise PipelineError(f"{path}: altered or damaged: not the file that {INDEX} lists; {REMEDY}")
    for path in sorted((bundle / CHECKPOINTS).rglob("*")):
        if path.is_file() and path.relative_to(bundle).as_posix() not in files:
            raise PipelineError(f"{path}: {INDEX} does not list it; remove it, or {REMEDY}")
