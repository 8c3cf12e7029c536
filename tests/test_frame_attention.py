"""Features over time for the fusion `frames`: how they are cut, loaded, and made of new clips."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fusion_data import LABELS, ROOT, make_inputs, recipe, rounds, tiled, write_params, write_run

from stages import gather_features, self_train, train_fusion
from stages.encoders.pooling import pooled_row
from stages.engine.errors import PipelineError
from stages.engine.store import Row, Store, write_index, write_shard
from stages.fusion import features
from stages.fusion.architectures import segments_read
from stages.fusion.ensemble import load_ensemble, load_outputs
from stages.fusion.features import Inputs, Standardised, fold_statistics, load_inputs
from stages.fusion.segments import segment_means
from stages.fusion.training import train
from stages.inference.predictor import fusion_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

SEGMENTS = 4
FRAMES = {"sound": 10, "face": 6}  # modalities whose frames are kept, and their dimensions


def test_parts_of_time_are_equal_and_of_few_frames_some_stand_for_several() -> None:
    frames = np.arange(20, dtype=np.float32).reshape(10, 2)
    found = segment_means(frames, 4).reshape(4, 2)
    for i, (start, end) in enumerate([(0, 2), (2, 5), (5, 7), (7, 10)]):
        np.testing.assert_array_equal(found[i], frames[start:end].mean(axis=0))
    np.testing.assert_array_equal(segment_means(frames[:3], 4).reshape(4, 2), frames[[0, 0, 1, 2]])
    np.testing.assert_array_equal(segment_means(frames[:1].astype(np.float16), 2), [0, 1, 0, 1])


def test_groups_stand_one_after_another() -> None:
    frames = np.random.default_rng(0).normal(size=(9, 6))
    expected = [segment_means(frames[:, group * 2 : group * 2 + 2], 3) for group in range(3)]
    np.testing.assert_array_equal(segment_means(frames, 3, groups=3), np.concatenate(expected))


def clip_frames(inputs: Inputs, name: str, truth: np.ndarray) -> list[np.ndarray | None]:
    """Of every clip frames whose order in time, and nothing else, tells the classes apart; 1 to 12 of them."""
    generator = np.random.default_rng(len(name))
    dimension, (modality,) = FRAMES[name], inputs.select([name]).modalities
    found: list[np.ndarray | None] = []
    for present, label in zip(modality.present.tolist(), truth, strict=True):
        frames = 0.3 * generator.normal(size=(int(generator.integers(4, 13)), dimension))
        part = label * len(frames) // len(LABELS)
        frames[part : part + max(1, len(frames) // len(LABELS)), 0] += 4
        found.append(frames.astype(np.float16) if present else None)
    return found


def write_frames(inputs: Inputs, truth: np.ndarray) -> dict[str, list[Row]]:
    """Stores that keep frames in place of the run's own, in shards, and data/modalities.json."""
    entries, rows = [], {}
    for modality in inputs.modalities:
        folder = Path("features") / modality.name
        if modality.name in FRAMES:
            rows[modality.name] = [
                Row(name, reason="none") if frames is None else pooled_row(name, frames, True, True)
                for name, frames in zip(inputs.clip_ids, clip_frames(inputs, modality.name, truth), strict=True)
            ]
            attributes = {"dimension": FRAMES[modality.name], "variance": True, "fingerprint": "test"}
            chunks = np.array_split(np.arange(len(inputs.clip_ids)), 3)
            for i, chunk in enumerate(chunks):
                shard = [rows[modality.name][row] for row in chunk]
                write_shard(folder / f"shard-0000{i}.h5", "features", shard, attributes)
            write_index(folder, [f"shard-0000{i}.h5" for i in range(3)])
        entries.append(gather_features.describe_modality(modality.name, Store(folder)))
    Path("data/modalities.json").write_text(json.dumps({"modalities": entries}))
    return rows


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Inputs, np.ndarray, dict[str, list[Row]]]:
    """A run in the working directory: frames of two modalities, one vector per fold of the third."""
    inputs, truth = make_inputs(labelled=90)
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, inputs)
    return inputs, truth, write_frames(inputs, truth)


def load(segments: int | None) -> Inputs:
    return load_inputs(["sound", "face", "prompt"], LABELS, segments=segments)


def test_only_a_fusion_that_reads_frames_gets_them() -> None:
    assert segments_read(recipe(architecture="frames", segments=5)) == 5
    assert segments_read(recipe(architecture="attention")) is None


def test_segments_are_loaded_beside_vectors(run: tuple[Inputs, np.ndarray, dict[str, list[Row]]]) -> None:
    inputs, _, rows = run
    loaded = load(SEGMENTS)
    assert [m.segments for m in loaded.modalities] == [4, 4, 1]
    assert [m.dimension for m in loaded.modalities] == [40, 24, 5]
    for modality in loaded.modalities[:2]:
        raw = modality.matrix[0] * modality.spread[0] + modality.centre[0]
        for i, row in enumerate(rows[modality.name]):
            assert bool(modality.present[i]) == row.present
            if row.present:
                np.testing.assert_allclose(raw[i], segment_means(row.values, SEGMENTS), rtol=1e-4, atol=1e-5)
            else:
                assert not modality.matrix[0, i].any()
    feed = Standardised(loaded, fold_statistics(loaded, recipe()), 0)
    seen = feed(torch.from_numpy(np.flatnonzero(loaded.folds > 0)))[0][0]
    assert seen.mean(dim=0).abs().max() < 1e-5
    pooled = load(None)
    assert [m.dimension for m in pooled.modalities] == [20, 12, 5] and {m.segments for m in pooled.modalities} == {1}


def test_features_per_fold_over_time(run: tuple[Inputs, np.ndarray, dict[str, list[Row]]]) -> None:
    inputs, _, _ = run
    frames = np.random.default_rng(1).normal(size=(len(inputs.clip_ids), 6, 3 * 5)).astype(np.float32)
    rows = [pooled_row(name, values, True, False) for name, values in zip(inputs.clip_ids, frames, strict=True)]
    attributes = {"dimension": 5, "variance": False, "folds": 3, "fingerprint": "test"}
    write_shard(Path("features/prompt/shard-00000.h5"), "features", rows, attributes)
    write_index(Path("features/prompt"), ["shard-00000.h5"])
    content = json.loads(Path("data/modalities.json").read_text())
    content["modalities"][2] = gather_features.describe_modality("prompt", Store("features/prompt"))
    Path("data/modalities.json").write_text(json.dumps(content))
    prompt = load(SEGMENTS).modalities[2]
    assert prompt.matrix.shape == (3, len(rows), 20)
    for fold in range(3):
        raw = prompt.matrix[fold] * prompt.spread[fold] + prompt.centre[fold]
        expected = [segment_means(values[:, 5 * fold : 5 * fold + 5], SEGMENTS) for values in frames]
        np.testing.assert_allclose(raw, np.stack(expected), rtol=1e-4, atol=1e-5)


def test_half_precision_counts_the_segments(
    run: tuple[Inputs, np.ndarray, dict[str, list[Row]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = len(run[0].clip_ids)
    monkeypatch.setattr(features, "HALF_ABOVE", 4 * clips * (20 + 12 + 15))  # pooled features just fit
    assert {m.matrix.dtype for m in load(None).modalities} == {torch.float32}
    assert {m.matrix.dtype for m in load(SEGMENTS).modalities} == {torch.float16}


def test_frames_that_were_not_kept_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, make_inputs()[0])
    load(None)
    with pytest.raises(PipelineError, match="features/face: .*; set extractors.face.keep_frames: true and run dvc"):
        load(SEGMENTS)


def test_it_tells_apart_what_only_time_does_and_new_clips_are_as_in_the_pipeline(
    run: tuple[Inputs, np.ndarray, dict[str, list[Row]]]
) -> None:
    _, truth, rows = run
    accuracy, found = {}, {}
    for architecture in ("frames", "attention"):
        p = recipe(architecture=architecture, modalities=["sound", "face"], epochs=60, dropout=0.1, seeds=[0],
                   segments=SEGMENTS, hidden=32, learning_rate=0.01, modality_dropout=0.0)
        inputs = load_inputs(p.modalities, LABELS, segments=segments_read(p))
        outputs = train(inputs, p, tiled(inputs, p), "test")
        called = outputs.votes.mean(dim=(0, 1)).argmax(dim=1).numpy()
        seen = inputs.present[inputs.others].any(dim=1).numpy()
        accuracy[architecture] = (called == truth[inputs.others])[seen].mean()
        chosen = inputs.others[:20]
        new = {name: [rows[name][row] for row in chosen] for name in p.modalities}
        clips = fusion_inputs(outputs.ensemble, [inputs.clip_ids[row] for row in chosen], new, "cpu")
        found[architecture] = outputs.ensemble.predict(clips, np.arange(20))
        torch.testing.assert_close(found[architecture], outputs.votes[:, :, :20], rtol=1e-3, atol=1e-4)
    assert accuracy["frames"] > 0.75 and accuracy["attention"] < 0.5, accuracy  # guessing: 0.25


def test_the_stages_run_with_it(run: tuple[Inputs, np.ndarray, dict[str, list[Row]]]) -> None:
    p = recipe(architecture="frames", segments=SEGMENTS)
    write_params(p, rounds(rounds=1))
    Path("dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    Path("stages").symlink_to(ROOT / "stages")
    train_fusion.main()
    self_train.main()
    described = json.loads(Path("models/self_training/ensemble.json").read_text())
    assert [modality["segments"] for modality in described["modalities"]] == [4, 4, 1]
    predictions, ensemble = load_outputs(Path("models/self_training")), load_ensemble("models/self_training")
    inputs = load(segments_read(p))
    assert torch.equal(ensemble.predict(inputs, inputs.others), predictions.votes)
