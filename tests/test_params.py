"""params.yaml and the preset: valid, alike where they must be, and every slip reported in one line."""

import copy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.engine.errors import PipelineError
from stages.engine.params import load
from stages.engine.yaml_file import read_yaml

ROOT = Path(__file__).parent.parent


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for name, sub in tree.items() for k, v in flatten(sub, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}


def faulty(tmp_path: Path, key: str, value: Any) -> Path:
    values = copy.deepcopy(read_yaml(ROOT / "params.yaml"))
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section[last] = value
    path = tmp_path / "params.yaml"
    YAML().dump(values, path)
    return path


def test_shipped_files_are_valid() -> None:
    assert load(ROOT / "params.yaml").corpus.adapter == "demo"
    assert load(ROOT / "presets/mer2024.yaml").corpus.adapter == "mer2024"


def test_preset_differs_only_where_the_design_allows_it() -> None:
    shipped, preset = (flatten(read_yaml(ROOT / name)) for name in ("params.yaml", "presets/mer2024.yaml"))
    assert shipped.keys() == preset.keys()
    differing = {key for key in shipped if shipped[key] != preset[key]}
    corpus = {"corpus.adapter", "corpus.path", "corpus.truth"}
    sampling = {"frames.per_clip", "faces.stride", "emovclip.frames"}
    ranking = {key for key in shipped if key.startswith("rankings.")}
    checkpoints = {key for key in shipped if key.endswith((".checkpoint", ".revision", ".dtype"))}
    pool = {"self_training.include_test"}  # auto, which is the same for mer2024
    selected = {"fusion.epoch", "fusion.learning_rate"}  # the preset keeps the paper's
    assert differing <= corpus | sampling | ranking | checkpoints | pool | selected
    assert {"corpus.path", "extractors.hubert.checkpoint", "rankings.provider", "frames.per_clip"} <= differing


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("fusion.modality_dropuot", 0.1, ["fusion.modality_dropuot", "unknown parameter"]),
        ("fusion.modality_dropout", "a lot", ["fusion.modality_dropout", "'a lot'", "number"]),
        ("fusion.modality_dropout", 1.5, ["fusion.modality_dropout", "1.5", "less than 1"]),
        ("fusion.epochs", 0, ["fusion.epochs", "found 0", "greater than or equal to 1"]),
        ("fusion.epochs", True, ["fusion.epochs", "True", "integer"]),
        ("fusion.modalities", ["hubert", "smell"], ["fusion.modalities", "'smell'", "'emovclip'"]),
        ("fusion.modalities", [], ["fusion.modalities", "at least 1"]),
        ("fusion.standardize", True, ["fusion.standardize: found True, expected 'none', 'fold' or 'group'"]),
        ("fusion.standardize", {"hubert": "all"}, ["fusion.standardize.hubert: found 'all', expected 'none', 'fold'"]),
        ("fusion.standardize", {"smell": "fold"}, ["fusion.standardize: found 'smell', expected some of ['acoustic'"]),
        ("fusion.epoch", "first", ["fusion.epoch: found 'first', expected 'best', 'common' or 'last'"]),
        ("corpus.adapter", "mer2042", ["corpus.adapter", "'mer2042'", "'mer2024'"]),
        ("corpus.labels", ["a", "a"], ["corpus.labels", "distinct"]),
        ("runtime.device", "gpu", ["runtime.device", "'gpu'"]),
        ("runtime.workers", 0, ["runtime.workers", "found 0"]),
        ("extractors.emovclip", {"encoder": "clip", "input": "faces", "keep_frames": False}, ["extractors.emovclip"]),
        ("extractors.hubert.input", "smells", ["extractors.hubert.input", "'smells'", "'audio'"]),
        ("colour", "red", ["colour", "unknown parameter"]),
        ("emovclip.template", "no place for it", ["emovclip.template"]),
    ],
)
def test_faults_are_named_in_one_line(tmp_path: Path, key: str, value: Any, expected: list[str]) -> None:
    with pytest.raises(PipelineError) as caught:
        load(faulty(tmp_path, key, value))
    message = str(caught.value)
    assert "\n" not in message
    for part in ["params.yaml", *expected]:
        assert part in message


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    values = read_yaml(ROOT / "params.yaml")
    del values["fusion"]["hidden"]
    path = tmp_path / "params.yaml"
    YAML().dump(values, path)
    with pytest.raises(PipelineError, match=r"fusion\.hidden: missing"):
        load(path)


def test_broken_yaml_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="not found"):
        load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [1, 2\nb: }")
    with pytest.raises(PipelineError, match="not valid YAML") as caught:
        load(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)
