"""Standardising by group: what a clip is fed, what may not matter, and new clips under such models."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fusion_data import LABELS, make_inputs, raw_features, recipe, rounds, tiled, write_params, write_run
from sklearn.metrics import f1_score

from stages import train_fusion
from stages.engine.errors import PipelineError
from stages.engine.files import file_digest
from stages.engine.store import Row
from stages.fusion.ensemble import load_ensemble
from stages.fusion.features import (
    GROUP_MINIMUM,
    Inputs,
    Standardised,
    fold_statistics,
    group_statistics,
    load_inputs,
    number_groups,
)
from stages.fusion.training import train
from stages.inference.predictor import Encoded, fuse
from stages.inference.texts import Texts

pytestmark = pytest.mark.usefixtures("one_thread")
GROUPS = 6


def group_names(count: int) -> list[str]:
    """g0 to g5 in turn, all classes in each; every ninth clip is of none, and there are two of a small group."""
    names = [f"g{i // 4 % GROUPS}" for i in range(count)]
    return ["" if i % 9 == 0 else "small" if i in (1, 2) else name for i, name in enumerate(names)]


def grouped_inputs(shift: float = 3.0, **sizes: int) -> tuple[Inputs, np.ndarray]:
    """make_inputs, with a shift and a size of every group's own in `sound` and `prompt`, and digests."""
    inputs, truth = make_inputs(**sizes)
    numbers = number_groups(group_names(len(truth)))
    generator = torch.Generator().manual_seed(0)
    for modality in (inputs.modalities[0], inputs.modalities[2]):
        for number in range(GROUPS):
            rows = torch.from_numpy(np.flatnonzero(numbers == number))
            move = shift * torch.randn(len(modality.matrix), 1, modality.dimension, generator=generator)
            modality.matrix[:, rows] = (modality.matrix[:, rows] * (1 + number) + move) * modality.present[rows, None]
    return dataclasses.replace(inputs, groups=numbers, digests=[f"{i:064x}" for i in range(len(truth))]), truth


def fed(inputs, p, fold):
    rows = torch.arange(len(inputs.clip_ids))
    feed = Standardised(inputs, fold_statistics(inputs, p), fold, group_statistics(inputs, p.by_group))
    return [x.numpy() for x in feed(rows)[0]]


def test_groups_are_numbered_by_name_and_small_ones_are_none():
    names = ["b"] * GROUP_MINIMUM + ["few"] * (GROUP_MINIMUM - 1) + ["a"] * GROUP_MINIMUM + [""] * 50
    assert number_groups(names).tolist() == [1] * GROUP_MINIMUM + [-1] * (GROUP_MINIMUM - 1) + [0] * GROUP_MINIMUM + (
        [-1] * 50)
    assert number_groups([]).tolist() == [] and number_groups(["", ""]).tolist() == [-1, -1]


@pytest.mark.parametrize("standardize", ["group", {"sound": "group", "prompt": "none"}])
def test_every_clip_is_standardised_by_its_group_or_the_fold(standardize):
    inputs, _ = grouped_inputs()
    p = recipe(standardize=standardize)
    names = np.array(group_names(len(inputs.clip_ids)))
    for fold in range(3):
        for i, x in enumerate(fed(inputs, p, fold)):
            modality = inputs.modalities[i]
            raw, present = raw_features(modality, fold), modality.present.numpy()
            mode = p.standardized_by(modality.name)
            train_rows = (inputs.folds >= 0) & (inputs.folds != fold) & present
            expected = (raw - raw[train_rows].mean(axis=0)) / raw[train_rows].std(axis=0) if mode != "none" else raw
            own = 0
            for name in set(names) - {"", "small"} if mode == "group" else ():
                rows = (names == name) & present  # of every split
                if rows.sum() >= GROUP_MINIMUM:
                    expected[rows] = (raw[rows] - raw[rows].mean(axis=0)) / raw[rows].std(axis=0)
                    own += 1
            assert (own >= GROUPS - 1) == (mode == "group")
            np.testing.assert_allclose(x, expected * present[:, None], atol=2e-4)


def test_a_group_with_few_clips_that_have_a_modality_is_standardised_by_the_fold_there():
    inputs, _ = grouped_inputs()
    sound = inputs.modalities[0]
    rows = np.flatnonzero((inputs.groups == 2) & sound.present.numpy())[GROUP_MINIMUM - 1 :]
    sound.present[rows] = False
    sound.matrix[:, rows] = 0
    by_group, by_fold = (fed(inputs, recipe(standardize=mode), 0) for mode in ("group", "fold"))
    for i, equal in ((0, True), (1, False)):
        assert np.array_equal(by_group[i][inputs.groups == 2], by_fold[i][inputs.groups == 2]) == equal
        assert not np.allclose(by_group[i][inputs.groups == 1], by_fold[i][inputs.groups == 1])


def test_a_dimension_that_is_constant_in_a_group_is_not_standardised_up():
    inputs, _ = grouped_inputs()
    sound = inputs.modalities[0]
    rows = np.flatnonzero((inputs.groups == 0) & sound.present.numpy())
    rounding = torch.linspace(-1, 1, len(rows)) * 1e-6
    sound.matrix[0, rows, 4] = 0.5 + rounding
    features = fed(inputs, recipe(standardize="group"), 0)[0]
    assert np.abs(features[rows, 4]).max() < 1e-4 and np.abs(features[rows, 3]).max() > 1


def test_labels_and_folds_do_not_matter_to_it():
    inputs, _ = grouped_inputs()
    other = dataclasses.replace(inputs, labels=np.roll(inputs.labels, 1), folds=np.roll(inputs.folds, 1))
    before, after = (group_statistics(i, ["sound"])["sound"] for i in (inputs, other))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert group_statistics(inputs, []) == {} == group_statistics(dataclasses.replace(inputs, groups=None), ["sound"])


def test_it_helps_where_groups_are_shifted():
    inputs, truth = grouped_inputs(shift=8.0, labelled=120, unlabelled=60)
    scores = {}
    for mode in ("fold", "group"):
        p = recipe(modalities=["sound"], standardize=mode, epochs=25, dropout=0.1, modality_dropout=0.0)
        called = train(inputs.select(["sound"]), p, tiled(inputs, p), "test").votes.mean(dim=(0, 1)).argmax(dim=1)
        scores[mode] = 100 * f1_score(truth[inputs.others], called, average="weighted")
    assert scores["group"] > scores["fold"] + 10


def test_the_ensemble_predicts_the_same_from_its_files(tmp_path):
    inputs, _ = grouped_inputs()
    p = recipe(standardize={"sound": "group", "prompt": "group"})
    outputs = train(inputs, p, tiled(inputs, p), "test")
    shapes = {name: tuple(mean.shape) for name, (mean, _) in outputs.ensemble.groups.items()}
    assert shapes == {"sound": (1, 6, 10), "prompt": (3, 6, 5)}
    outputs.ensemble.save(tmp_path)
    ensemble = load_ensemble(tmp_path)
    assert torch.equal(ensemble.predict(inputs, inputs.others), outputs.votes)
    said = json.loads((tmp_path / "ensemble.json").read_text())["by_group"]
    assert said["modalities"] == ["sound", "prompt"] and said["groups"] == GROUPS
    assert list(said["group_of_digest"].values()) == inputs.groups.tolist()
    for change in ({"groups": 5}, {"modalities": ["nothing"]}, {"group_of_digest": {"0": 6}}, {"groups": "many"}):
        path = tmp_path / "ensemble.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"by_group": said | change}))
        with pytest.raises(PipelineError, match=r"can't read the ensemble|group_mean: found \(1, 6, 10\), expected"):
            load_ensemble(tmp_path)


# ---------------------------------------------------------------- the corpus's manifest


def test_groups_come_from_the_manifest_and_the_stage_says_where_there_are_none(tmp_path, monkeypatch, capsys):
    inputs, _ = make_inputs()
    write_run(tmp_path, inputs)
    monkeypatch.chdir(tmp_path)
    write_params(recipe(epochs=1, standardize={"face": "group"}), rounds())
    train_fusion.main()
    assert "fusion.standardize: no group of data/manifest.csv has 10 clips with face: it is" in capsys.readouterr().err
    plain = load_ensemble("models/fusion")
    table = pd.read_csv("data/manifest.csv", dtype=str, keep_default_na=False)
    table["group"] = group_names(len(table))
    table.to_csv("data/manifest.csv", index=False)
    train_fusion.main()
    assert "warning" not in capsys.readouterr().err
    ensemble, loaded = load_ensemble("models/fusion"), load_inputs(recipe().modalities, LABELS)
    assert loaded.groups.tolist() == number_groups(group_names(len(table))).tolist()
    assert list(ensemble.groups) == ["face"] and ensemble.groups["face"][0].shape == (1, GROUPS, 14)
    assert not plain.groups


# ---------------------------------------------------------------- new clips


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Inputs, a file per clip whose digest they have, what training predicts, and the ensemble."""
    folder = tmp_path_factory.mktemp("clips")
    inputs, _ = grouped_inputs()
    files = [folder / name for name in inputs.clip_ids]
    for file in files:
        file.write_text(file.name)
    inputs = dataclasses.replace(inputs, digests=[file_digest(file) for file in files])
    p = recipe(standardize={"sound": "group", "prompt": "group"}, epochs=2)
    return inputs, files, train(inputs, p, tiled(inputs, p), "test"), p


def encoded(inputs: Inputs, rows: np.ndarray, files: list[Path]) -> Encoded:
    """The clips as encoders leave them."""
    features = {}
    for m in inputs.modalities:
        raw = np.concatenate([raw_features(m, fold) for fold in range(len(m.matrix))], axis=1).astype(np.float32)
        features[m.name] = [Row(str(row), mean=raw[row]) if m.present[row] else Row(str(row)) for row in rows]
    return Encoded(files, features, ["" for _ in rows])


def predicted(ensemble, parts):
    return np.stack([p.probabilities for p in fuse(ensemble, parts, Texts({}, {}), "cpu")])


def test_clips_of_the_corpus_get_what_training_predicted(trained, capsys):
    inputs, files, outputs, _ = trained
    rows = inputs.others
    parts = [encoded(inputs, part, [files[row] for row in part]) for part in (rows[:1], rows[1:5], rows[5:])]
    np.testing.assert_allclose(predicted(outputs.ensemble, parts), outputs.votes.mean(dim=(0, 1)), atol=1e-5)
    alone = predicted(outputs.ensemble, parts[:1])  # whatever else is asked for
    np.testing.assert_allclose(alone[0], outputs.votes.mean(dim=(0, 1))[0], atol=1e-5)
    assert capsys.readouterr().err == ""


def test_new_clips_are_a_group_of_their_own(trained, tmp_path, capsys):
    """Clips like group 1's, moved as a whole: what they are moved by does not matter, as their mean goes."""
    inputs, files, outputs, p = trained
    rows = np.flatnonzero((inputs.groups == 1) & inputs.present.all(dim=1).numpy())
    new = [tmp_path / str(row) for row in rows]
    for file in new:
        file.write_text(f"new {file.name}")
    found, said = [], []
    for offset in (0.0, 50.0):
        part = encoded(inputs, rows, new)
        moved = {name: [dataclasses.replace(row, mean=row.mean + offset * (name != "face")) for row in own]
                 for name, own in part.features.items()}
        corpus = encoded(inputs, inputs.others[:3], [files[row] for row in inputs.others[:3]])
        both = predicted(outputs.ensemble, [dataclasses.replace(part, features=moved), corpus])
        np.testing.assert_allclose(both[len(rows):], outputs.votes.mean(dim=(0, 1))[:3], atol=1e-5)
        found.append(both[: len(rows)])
        said.append(capsys.readouterr().err)
    np.testing.assert_allclose(*found, atol=1e-3)
    assert said[0].startswith(f"predict: {len(rows)} clips that the corpus does not have count as one group")
    assert "sound, prompt are standardised: give those of one group" in said[0] and said[0].count("\n") == 1


def test_few_new_clips_are_standardised_by_the_fold_and_warned_of(trained, tmp_path, capsys):
    inputs, _, outputs, p = trained
    rows = inputs.others[: GROUP_MINIMUM - 1]
    new = [tmp_path / str(row) for row in rows]
    for file in new:
        file.write_text(f"new {file.name}")
    by_fold = dataclasses.replace(outputs.ensemble, groups={}).predict(inputs, rows)
    found = predicted(outputs.ensemble, [encoded(inputs, rows, new)])
    np.testing.assert_allclose(found, by_fold.mean(dim=(0, 1)), atol=1e-5)
    assert "warning: predict: 9 clips that the corpus does not have are too few" in capsys.readouterr().err
