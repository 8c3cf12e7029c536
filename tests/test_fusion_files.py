"""The fusion's files: what it loads, in half precision too, bad input, what the stage writes, damaged ensembles."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fusion_data import LABELS, make_inputs, raw_features, recipe, rounds, tiled, write_params, write_run
from safetensors.torch import load_file

from stages import train_fusion
from stages.engine.errors import PipelineError
from stages.engine.store import Store
from stages.fusion import ensemble as ensemble_module
from stages.fusion import features
from stages.fusion.ensemble import load_ensemble, load_outputs
from stages.fusion.features import load_inputs
from stages.fusion.training import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tmp_path, monkeypatch):
    inputs, _ = make_inputs()
    write_run(tmp_path, inputs)
    monkeypatch.chdir(tmp_path)
    return inputs


def load_run(**changes):
    return load_inputs(recipe(**changes).modalities, LABELS)


def test_loads_what_the_stores_hold(run):
    loaded = load_run()
    assert [m.dimension for m in loaded.modalities] == [10, 14, 5]  # face: mean and var
    assert [len(m.matrix) for m in loaded.modalities] == [1, 1, 3]  # prompt: per fold
    assert loaded.labels.tolist() == run.labels.tolist() and loaded.folds.tolist() == run.folds.tolist()
    for modality in loaded.modalities:
        for group in range(len(modality.matrix)):
            store = Store(f"features/{modality.name}")
            mean = np.split(store.mean, len(modality.matrix), axis=1)[group]  # fold after fold
            expected = mean if store.var is None else np.concatenate([mean, store.var], axis=1)
            np.testing.assert_allclose(
                raw_features(modality, group)[store.present], expected[store.present], rtol=1e-5, atol=1e-5
            )
            assert not modality.matrix[group, ~store.present].any()
            assert modality.present.tolist() == store.present.tolist()


def test_half_precision_predicts_the_same(run, monkeypatch):
    p = recipe()
    full = load_run()
    ensemble = train(full, p, tiled(full, p), "test").ensemble
    monkeypatch.setattr(features, "HALF_ABOVE", 0)
    half = load_run()
    assert {m.matrix.dtype for m in half.modalities} == {torch.float16}
    difference = ensemble.predict(half, half.others) - ensemble.predict(full, full.others)
    assert difference.abs().max() < 2e-3
    outputs = train(half, p, tiled(half, p), "test")
    assert (outputs.out_of_fold_last - train(full, p, tiled(full, p), "test").out_of_fold_last).abs().max() < 2e-2


def test_half_precision_survives_large_offsets_and_outliers(tmp_path, monkeypatch):
    inputs, _ = make_inputs()
    huge = dataclasses.replace(inputs.modalities[0], centre=inputs.modalities[0].centre + 1000)
    write_run(tmp_path, dataclasses.replace(inputs, modalities=(huge, *inputs.modalities[1:])))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "HALF_ABOVE", 0)
    loaded = load_run().modalities[0]
    error = (loaded.matrix.float() - huge.matrix * (huge.spread / loaded.spread)).std(dim=1)
    assert (error - error.mean()).abs().max() < 0.1  # the offset of a thousand deviations is not seen in the digits
    assert np.abs(raw_features(loaded, 0) - raw_features(huge, 0))[loaded.present].max() < 5e-3


def test_rounding_of_a_nearly_constant_dimension_is_not_standardised_up(tmp_path, monkeypatch):
    """Features move by 5e-7 of their size with the batch they are computed in: that must not become an input."""
    generator, found = np.random.default_rng(0), []
    inputs, _ = make_inputs()
    sound = inputs.modalities[0]
    spread = sound.spread.clone()
    spread[:, :4] = 3e-6 * sound.centre[:, :4].abs()  # varies by a few times its rounding
    for noise in (0.0, 5e-7):
        rounding = noise * torch.from_numpy(generator.normal(size=sound.matrix.shape))
        moved = (sound.matrix + sound.centre / spread * rounding).float() * sound.present[:, None]
        changed = dataclasses.replace(sound, matrix=moved, spread=spread)
        folder = tmp_path / str(noise)
        write_run(folder, dataclasses.replace(inputs, modalities=(changed, *inputs.modalities[1:])))
        monkeypatch.chdir(folder)
        loaded = load_run()
        for fold in range(3):
            feed = features.Standardised(loaded, features.fold_statistics(loaded, recipe()), fold)
            found.append(feed(torch.arange(len(loaded.clip_ids)))[0][0])
    for before, after in zip(found[:3], found[3:], strict=True):
        assert before[:, 4:].std() > 0.5  # the others still tell clips apart
        assert (before - after).abs().max() < 1e-4


def rewrite_manifest(column, change):
    table = pd.read_csv("data/manifest.csv", dtype=str, keep_default_na=False)
    table[column] = [change(row) for _, row in table.iterrows()]
    table.to_csv("data/manifest.csv", index=False)


def rewrite_modalities(**changes):
    path = Path("data/modalities.json")
    content = json.loads(path.read_text())
    content["modalities"][0].update(changes)
    path.write_text(json.dumps(content))


def rewrite_store(inputs, values=None, names=None):
    """Write features/sound again with other values or clip names."""
    modality = inputs.modalities[0]
    changed = dataclasses.replace(inputs, modalities=(modality,), clip_ids=names or inputs.clip_ids)
    shutil.rmtree("features/sound")
    kept = {path: path.read_bytes() for path in Path("data").iterdir()}
    if values is not None:
        modality.matrix[0, int(inputs.labelled[3]), 2] = values
    write_run(Path("."), changed)
    for path, content in kept.items():
        path.write_bytes(content)


BROKEN = {
    "unknown modality": (lambda _: rewrite_modalities(name="noise"), r"found no modality 'sound'.*'noise'"),
    "wrong dimension": (lambda _: rewrite_modalities(dimension=12), r"features/sound: .*dimension 10, expected 12"),
    "not a number": (lambda i: rewrite_store(i, values=torch.nan), r"features/sound: clip clip_\d+ holds NaN"),
    "infinite": (lambda i: rewrite_store(i, values=torch.inf), r"features/sound: clip clip_\d+ holds NaN or inf"),
    "other folds": (lambda _: rewrite_modalities(per_fold=True), r"features/sound: features of 1 folds, expected 3"),
    "other clips": (lambda i: rewrite_store(i, names=["x", *i.clip_ids[1:]]), r"features/sound: lacks clip_000"),
    "no labelled clips": (
        lambda _: rewrite_manifest("split", lambda row: row["split"].replace("labelled", "test").replace("un", "")),
        r"found no labelled clips",
    ),
    "unknown label": (
        lambda _: rewrite_manifest("label", lambda row: row["label"].replace("anger", "rage")),
        r"manifest.csv: clip clip_\d+: label 'rage', expected one of \['neutral'",
    ),
    "few clips of a class": (
        lambda i: rewrite_manifest("label", lambda row: row["label"].replace("anger", "neutral")),
        r"found no labelled clip of class 'anger', expected some",
    ),
    "clip without fold": (
        lambda _: Path("data/folds.csv").write_text("clip_id,fold\nclip_xyz,0\n"),
        r"folds.csv: found no fold for the labelled clip",
    ),
    "empty fold": (
        lambda i: Path("data/folds.csv").write_text("clip_id,fold\n" + "".join(f"{c},3\n" for c in i.clip_ids)),
        r"folds.csv: found \[0, 0, 0, 60\] clips per fold",
    ),
    "no modalities.json": (lambda _: Path("data/modalities.json").unlink(), r"modalities.json: can't be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_one_line(run, name):
    breakage, message = BROKEN[name]
    breakage(run)
    with pytest.raises(PipelineError, match=message) as error:
        load_run()
    assert "\n" not in str(error.value)


def test_modality_without_any_labelled_clip(tmp_path, monkeypatch):
    inputs, _ = make_inputs()
    silent = dataclasses.replace(inputs.modalities[0], present=torch.from_numpy(inputs.splits == "test"))
    write_run(tmp_path, dataclasses.replace(inputs, modalities=(silent, *inputs.modalities[1:])))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match="features/sound: found no labelled clip with features"):
        load_run()


def test_stage_writes_the_same_bytes_twice(run, capsys):
    inputs = run
    write_params(recipe(), rounds())
    contents = []
    for _ in range(2):
        train_fusion.main()
        contents.append({str(path): path.read_bytes() for path in sorted(Path("models/fusion").iterdir())})
    assert contents[0] == contents[1]
    assert {Path(path).name for path in contents[0]} == {
        "clips.csv", "curves.csv", "ensemble.json", "ensemble.safetensors", "predictions.safetensors",
    }

    predictions = load_file("models/fusion/predictions.safetensors")
    assert predictions["out_of_fold_best"].shape == (2, 60, 4) and predictions["votes"].shape == (2, 3, 44, 4)
    for name in ("out_of_fold_best", "out_of_fold_last", "votes"):
        torch.testing.assert_close(predictions[name].sum(dim=-1), torch.ones(predictions[name].shape[:-1]))
    clips = pd.read_csv("models/fusion/clips.csv")
    order = [*inputs.labelled, *inputs.others]
    assert clips["clip_id"].tolist() == [inputs.clip_ids[row] for row in order]
    curves = pd.read_csv("models/fusion/curves.csv")
    assert len(curves) == 2 * 3 * 3 and curves["epoch"].max() == 3 and set(curves["seed"]) == {0, 7}
    by_model = curves.groupby(["seed", "fold"])["valid_waf"]
    said = capsys.readouterr().out.splitlines()[-1]
    assert f"WAF {by_model.last().mean():.2f} at the last epoch, {by_model.max().mean():.2f} at each" in said

    loaded, ensemble = load_run(), load_ensemble("models/fusion")
    assert torch.equal(ensemble.predict(loaded, loaded.others), predictions["votes"])
    entries = json.loads(Path("data/modalities.json").read_text())["modalities"]
    assert list(ensemble.learned_from.values()) == entries == [m.source for m in loaded.modalities]


def test_an_unknown_architecture_is_one_line(run):
    for name in ("transformer", "training"):  # no module; a module that is no architecture
        write_params(recipe(architecture=name), rounds())
        with pytest.raises(PipelineError, match=f"params.yaml: fusion.architecture: found '{name}', expected a module"):
            train_fusion.main()


def test_damaged_ensemble_is_one_line(tmp_path):
    p = recipe(epochs=1)
    inputs, _ = make_inputs()
    outputs = train(inputs, p, tiled(inputs, p), "test")
    ensemble_module.save_outputs(tmp_path / "m", inputs, outputs, ensemble_module.curve_table(0, outputs))
    assert torch.equal(load_outputs(tmp_path / "m").votes, outputs.votes)
    description = tmp_path / "m/ensemble.json"
    text = description.read_text()
    description.write_text(text.replace('"dimension": 10', '"dimension": 9'))
    with pytest.raises(PipelineError, match=r"encoders.0.linear_1.weight: found \(2, 3, 16, 10\), expected"):
        load_ensemble(tmp_path / "m")
    for architecture in ("training.train", "../../attention", "nothing"):
        description.write_text(text.replace('"attention"', f'"{architecture}"'))
        with pytest.raises(PipelineError, match=f"fusion.architecture: found '{architecture}'"):
            load_ensemble(tmp_path / "m")
    description.write_text(text.replace('"hidden": 16', '"hidden": -1'))
    with pytest.raises(PipelineError, match="can't read the ensemble"):
        load_ensemble(tmp_path / "m")
    description.write_text(text)
    path = tmp_path / "m/ensemble.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PipelineError, match="can't read the ensemble"):
        load_ensemble(tmp_path / "m")
    (tmp_path / "m/predictions.safetensors").unlink()
    description.unlink()
    with pytest.raises(PipelineError, match="can't read the ensemble"):
        load_outputs(tmp_path / "m")
