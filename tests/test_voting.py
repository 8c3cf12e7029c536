"""What a pseudo-label needs beside being among the surest: a threshold, voices of the rankings; and which clips may."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fusion_data import LABELS, ROOT, make_inputs, recipe, rounds, write_params, write_run
from ruamel.yaml import YAML
from yaml_values import set_value

from stages import gather_features, self_train, train_fusion
from stages.commands.import_features import make_params
from stages.engine.errors import PipelineError
from stages.engine.params import load, load_fusion
from stages.engine.yaml_file import read_yaml
from stages.fusion.features import Inputs
from stages.fusion.self_training import choose, no_pseudo_labels, pool_rows, voice_opinions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    inputs, _ = make_inputs()
    write_run(tmp_path, inputs)
    monkeypatch.chdir(tmp_path)
    for name in ("dvc.yaml", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)
    return inputs


def write_rankings(inputs: Inputs, labels: dict[str, np.ndarray]) -> None:
    """data/rankings.jsonl: a row per clip; labels: voice -> (N,) class that it ranks first, -1 without a ranking."""
    def cell(voice: str, row: int) -> dict[str, Any]:
        k = labels[voice][row]
        return {"ranking": None if k < 0 else [LABELS[k], *(name for name in LABELS if name != LABELS[k])]}

    rows = [{"clip_ids": [clip], **cell("ranking", i), "voices": {v: cell(v, i) for v in labels if v != "ranking"}}
            for i, clip in enumerate(inputs.clip_ids)]
    Path("data/rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(voices: list[str], **changes: Any) -> None:
    write_params(recipe(epochs=8, learning_rate=0.01, seeds=[0]), rounds(voices=voices, **changes))
    set_value(Path("params.yaml"), "rankings.providers", {"words": {"model": "DUTIR"}})


@pytest.mark.parametrize("threshold", [0.6, {"anger": 0.9, "sadness": 0.5}])
def test_below_the_threshold_nothing_is_chosen(threshold: float | dict[str, float]) -> None:
    inputs, _ = make_inputs()
    votes = (2 * torch.randn(1, 3, len(inputs.others), 4, generator=torch.Generator().manual_seed(0))).softmax(dim=-1)
    p, candidates = rounds(k=1000, voters="fold", threshold=threshold), pool_rows(inputs, True)
    chosen = choose(inputs, candidates, votes, None, no_pseudo_labels(), 1, p)
    every = choose(inputs, candidates, votes, None, no_pseudo_labels(), 1, rounds(k=1000, voters="fold"))
    needed = every["label"].map(lambda k: threshold.get(LABELS[k], 0) if isinstance(threshold, dict) else threshold)
    expected = every[every["confidence"] >= needed]
    assert 0 < len(expected) < len(every) and set(expected["label"]) == {0, 1, 2, 3}
    pd.testing.assert_frame_equal(chosen, expected.reset_index(drop=True))


def test_voices_count_beside_the_unimodal_classifiers(run: Inputs) -> None:
    generator = np.random.default_rng(0)
    labels = {voice: generator.integers(-1, 4, len(run.clip_ids)) for voice in ("ranking", "words")}
    write_rankings(run, labels)
    settings(["words", "ranking"], agreement=3, rounds=1, k=1000)
    for stage in (gather_features, train_fusion, self_train):
        stage.main()
    found = voice_opinions(run, ["words", "ranking"])
    assert (found == np.stack([labels["words"], labels["ranking"]])[:, run.others]).all() and (found == -1).any()
    with_voices = pd.read_csv("reports/pseudo_labels.csv")
    settings([], agreement=1, rounds=1, k=1000)  # the same classifiers alone: of three votes two may be the voices'
    gather_features.main()
    self_train.main()
    alone = pd.read_csv("reports/pseudo_labels.csv").set_index("clip_id")
    row = {clip: i for i, clip in enumerate(run.clip_ids)}
    counted = {clip: alone["agreement"][clip] + sum(LABELS[values[row[clip]]] == alone["label"][clip]
                                                    for values in labels.values() if values[row[clip]] >= 0)
               for clip in alone.index}
    assert 0 < len(with_voices) < len(alone)
    assert dict(zip(with_voices["clip_id"], with_voices["agreement"], strict=True)) == {
        clip: n for clip, n in counted.items() if n >= 3}


def test_rankings_that_nobody_counts_change_nothing_that_self_training_reads(run: Inputs) -> None:
    def gathered(first: int, further: int, voices: list[str]) -> bytes:
        write_rankings(run, {"ranking": np.full(104, first), "words": np.full(104, further)})
        settings(voices)
        gather_features.main()
        return Path("data/voices.csv").read_bytes()

    assert gathered(0, 0, []) == gathered(1, 2, []) == b"clip_id,voice,label\n"
    assert gathered(0, 0, ["words"]) == gathered(1, 0, ["words"]) != gathered(0, 1, ["words"])
    Path("data/rankings.jsonl").unlink()  # as in a folder of imported features
    settings([])
    gather_features.main()
    settings(["words"])
    with pytest.raises(PipelineError, match=r"data/rankings.jsonl: found no clip that 'words' ranked"):
        gather_features.main()


def test_only_gathered_voices_tie_self_training_to_the_rankings() -> None:
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    assert "data/rankings.jsonl" in stages["gather_features"]["deps"]
    read = stages["self_train"]["deps"]
    assert "data/rankings.jsonl" not in read and "data/voices.csv" in read


def test_a_foreign_label_of_a_voice_is_named(run: Inputs) -> None:
    Path("data/voices.csv").write_text(f"clip_id,voice,label\n{run.clip_ids[0]},words,joy\n")
    with pytest.raises(PipelineError, match=f"data/voices.csv: clip {run.clip_ids[0]}: label 'joy', expected one of"):
        voice_opinions(run, ["words"])


# ---------------------------------------------------------------- params


@pytest.mark.parametrize(("changes", "expected"), [
    ({"threshold": 1.5}, "self_training.threshold: found 1.5, expected less than or equal to 1"),
    ({"threshold": {"anger": "x"}}, "self_training.threshold.anger: found 'x', expected number"),
    ({"threshold": {"joy": 0.5}}, "self_training.threshold: found 'joy', expected some of corpus.labels ['neutral', "),
    ({"agreement": 5}, "self_training.agreement: found 5, expected at most the number of fusion.modalities (4) and"),
    ({"agreement": 6, "voices": ["ranking"]}, "(4) and self_training.voices (1) together"),
    ({"voices": ["words"]}, "self_training.voices: found 'words', expected some of ['ranking']"),
    ({"voices": ["ranking", "ranking"]}, "self_training.voices: found ['ranking', 'ranking'], expected each name once"),
    ({"select": "best_cv"}, "self_training.select: found 'best_cv', expected 'last' with self_training.voters: ens"),
    ({"voters": "folds"}, "self_training.voters: found 'folds', expected 'ensemble' or 'fold'"),
    ({"include_test": "maybe"}, "self_training.include_test: found 'maybe', expected 'auto'"),
])
def test_faults_are_named_in_one_line(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    for key, value in changes.items():
        set_value(path, f"self_training.{key}", value)
    with pytest.raises(PipelineError) as caught:
        load(path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_valid_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    for key, value in {"agreement": 5, "voices": ["ranking"], "voters": "fold", "select": "best_cv",
                       "threshold": {"anger": 1}}.items():
        set_value(path, f"self_training.{key}", value)
    p = load(path).self_training
    assert (p.threshold_of("anger"), p.threshold_of("worry")) == (1, 0)


@pytest.mark.parametrize(("adapter", "include", "rounds_", "expected"), [
    ("mer2024", "auto", 10, True), ("mer2026", "auto", 10, True), ("mer2024", False, 10, False),
    ("demo", "auto", 10, False), ("demo", True, 10, True), ("meld", "auto", 10, False), ("mer2023", "auto", 0, False),
])
def test_test_clips_get_pseudo_labels_by_themselves_in_the_challenges_alone(
    tmp_path: Path, adapter: str, include: str | bool, rounds_: int, expected: bool
) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    for key, value in {"corpus.adapter": adapter, "self_training.include_test": include,
                       "self_training.rounds": rounds_}.items():
        set_value(path, key, value)
    assert load(path).transductive is expected


def test_an_imported_folder_has_no_voices_and_keeps_its_test_clips_out(tmp_path: Path) -> None:
    values, path = YAML().load(ROOT / "params.yaml"), tmp_path / "params.yaml"
    values["self_training"] |= {"voices": ["ranking"], "threshold": {"anger": 0.5}}  # of the repository's own corpus
    YAML().dump(make_params(values, ["a", "b"], ["sound"], unlabelled=True), path)
    p = load_fusion(path)
    assert not p.transductive and p.self_training.voices == [] and p.self_training.threshold == 0
    set_value(path, "self_training.voices", ["ranking"])
    with pytest.raises(PipelineError, match=r"self_training.voices: found \['ranking'\], expected \[\]: a folder"):
        load_fusion(path)
