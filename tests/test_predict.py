"""Predicting new clips, without DVC. tests/test_pipeline.py compares it with the pipeline."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusion_data import make_inputs, recipe
from predict_runs import change, error_of, numbers, remove, rows, run_predict, word_table
from test_transcribe import make_ctc
from trained_run import SENTENCES, TEMPERATURE, make_ensemble, save_ensemble

from stages.commands import predict
from stages.engine.errors import PipelineError
from stages.engine.files import write_json
from stages.fusion.architectures import Architecture
from stages.fusion.ensemble import Ensemble
from stages.fusion.features import fold_statistics
from stages.inference.clips import find_clips, transcript_of
from stages.inference.media import CHUNK, chunks
from stages.inference.trained import check_params

# ---------------------------------------------------------------- predicting


def test_good_and_broken_clips(
    trained_copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (trained_copy / "clips/text.mp4").write_text("no clip at all\n")
    (trained_copy / "clips/notes.txt").write_text("not looked at\n")
    table = [("name", "transcript"), ("a", SENTENCES[0]), ("b.mkv", SENTENCES[1])]
    with open("transcripts.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
    run_predict("clips", "--transcripts", "transcripts.csv", "--out", "out/predictions.csv")
    found = rows(Path("out/predictions.csv"))
    assert list(found) == ["clips/a.mp4", "clips/b.mkv", "clips/c.mp4", "clips/text.mp4"]
    labels = ["neutral", "anger", "happiness", "sadness", "worry", "surprise"]
    for clip in ("clips/a.mp4", "clips/b.mkv", "clips/c.mp4"):
        row = found[clip]
        probabilities = [float(row[f"prob_{label}"]) for label in labels]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == labels[int(np.argmax(probabilities))]
        assert float(row["confidence"]) == max(probabilities) and 1 <= int(row["votes"]) <= 6
        assert {row[f"present_{name}"] for name in ("hubert", "clip", "emovclip")} == {"true"}
        assert np.isfinite(numbers(row)).all()
    spoken, silent = found["clips/a.mp4"], found["clips/c.mp4"]  # the same clip but for the words
    assert spoken["transcript"] == SENTENCES[0] and spoken["ranking"].split()[0] == "happiness"
    assert (spoken["present_baichuan"], silent["present_baichuan"]) == ("true", "false")
    assert silent["reason"] == "baichuan: no transcript" and spoken["reason"] == ""
    assert not np.allclose(numbers(spoken), numbers(silent), atol=1e-4)
    broken = found["clips/text.mp4"]
    assert broken["prediction"] == broken["prob_anger"] == broken["confidence"] == broken["attention_clip"] == ""
    assert "audio, frames, faces: file can't be opened" in broken["reason"] or "can't be opened" in broken["reason"]
    err = capfd.readouterr().err
    assert "warning: clips/text.mp4: " in err and "predict: 1 of 4 clips could not be read" in err

    run_predict("clips/a.mp4", "--transcript", SENTENCES[0])  # alone, to stdout: the same
    alone = list(csv.DictReader(capfd.readouterr().out.splitlines()))
    assert len(alone) == 1 and numbers(alone[0]) == pytest.approx(numbers(spoken), abs=1e-5)


def test_probabilities_are_under_the_temperature_that_evaluate_fitted(trained_copy: Path) -> None:
    found = []
    for temperature in (1.0, TEMPERATURE):
        calibration = json.loads(Path("models/calibration.json").read_text()) | {"temperature": temperature}
        write_json("models/calibration.json", calibration)
        run_predict("clips/a.mp4", "--out", "p.csv")
        found.append(rows(Path("p.csv"))["clips/a.mp4"])
    raw, shown = (np.array([float(value) for name, value in row.items() if name.startswith("prob_")]) for row in found)
    assert shown == pytest.approx(raw ** (1 / TEMPERATURE) / (raw ** (1 / TEMPERATURE)).sum(), abs=1e-5)
    assert shown.max() < raw.max() - 1e-3 and found[0]["prediction"] == found[1]["prediction"]


def test_no_readable_clip_is_exit_code_1(
    trained_copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.mp4", "y.mp4"):
        (trained_copy / name).write_bytes(b"")
    run_predict("x.mp4", "y.mp4", "--out", "p.csv", expect=1)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("warning", "error"))]
    assert len(lines) == 3 and lines[-1] == "error: predict: none of the 2 clips could be read"
    assert all("can't be opened" in row["reason"] and not row["prediction"] for row in rows(Path("p.csv")).values())


def test_words_are_recognised_where_none_are_given(trained_copy: Path) -> None:
    torch.manual_seed(0)  # some random networks recognise no text
    make_ctc(trained_copy / "models/ctc", "layer")
    change("transcribe.checkpoint", "models/ctc")
    run_predict("clips", "--transcripts", word_table({"a": SENTENCES[0]}), "--out", "p.csv")
    found = rows(Path("p.csv"))
    assert found["clips/a.mp4"]["transcript"] == SENTENCES[0]
    assert found["clips/b.mkv"]["transcript"] and found["clips/b.mkv"]["ranking"]
    assert found["clips/b.mkv"]["present_baichuan"] == "true"


def test_a_table_for_other_clips_is_pointed_out(
    trained_copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert predict.given_transcripts([Path("clips/a.mp4")], None, word_table({"x": "好"})) == {Path("clips/a.mp4"): ""}
    assert "warning: words.csv: none of its 1 names is a clip's" in capfd.readouterr().err


def test_clips_are_found_once_in_order_and_below_folders(tmp_path: Path) -> None:
    for name in ("b.MP4", "a.avi", "below/c.webm", ".hidden.mp4", "d.txt", "below/e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_clips([str(tmp_path / "below/e"), str(tmp_path), str(tmp_path / "a.avi")])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["below/e", "a.avi", "b.MP4", "below/c.webm"]


def test_transcripts_go_by_path_name_or_stem() -> None:
    known = {"x/a.mp4": " path ", "a.mp4": "name", "b": "stem"}
    assert [transcript_of(Path(p), known) for p in ("x/a.mp4", "y/a.mp4", "b.avi", "c")] == ["path", "name", "stem", ""]


def test_the_first_clip_is_not_kept_waiting() -> None:
    sizes = [len(chunk) for chunk in chunks([Path(str(i)) for i in range(100)])]
    assert sizes[:4] == [1, 2, 4, 8] and max(sizes) == CHUNK and sum(sizes) == 100


def test_attention_is_what_weighs_the_encodings() -> None:
    inputs, _ = make_inputs()
    architecture = Architecture("attention", ("sound", "face", "prompt"), (10, 7, 5), 4, 16, 0.3, 0.3, True)
    models = [architecture.build().state_dict() for _ in range(6)]
    weights = {name: torch.stack([model[name] for model in models]).unflatten(0, (2, 3)) for name in models[0]}
    weights["scores.weight"].zero_()
    weights["scores.bias"].copy_(torch.tensor([0.0, 2.0, -1.0]))
    ensemble = Ensemble(architecture, inputs.label_names, (0, 7), weights, fold_statistics(inputs, recipe()))
    rows = np.arange(9)
    softmax, attention = ensemble.predict_with_attention(inputs, rows)
    assert attention.shape == (2, 3, 9, 3) and (attention == torch.tensor([0.0, 2.0, -1.0])).all()
    assert torch.equal(softmax, ensemble.predict(inputs, rows))
    weights["encoders.0.linear_3.weight"].uniform_(-1, 1)  # a modality of weight 0 has no influence
    assert torch.equal(softmax, ensemble.predict(inputs, rows))


# ---------------------------------------------------------------- bad input of predict


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere.mp4"], "nowhere.mp4: no such file or folder"),
        (["clips/a.mp4", "texts"], "texts: a folder without video files; expected .avi"),
        (["clips", "--transcript", "我"], "--transcript: found 3 clips, expected one; for several give --transcripts"),
        (["clips", "--transcripts", "nowhere.csv"], "nowhere.csv: can't be read as a CSV of transcripts"),
        (["clips", "--transcripts", "texts/a.txt"], "texts/a.txt: found columns ['words'], expected name,transcript"),
        (["clips", "--device", "gpu"], "--device: found 'gpu', expected auto, cpu, cuda or cuda:N"),
        (["clips", "--out", "clips"], "--out: clips is a folder"),
        (["clips", "--bundle", "clips"], "clips: no release bundle: found no release.json"),
        (["clips", "--bundle", "nowhere"], "nowhere: no release bundle"),
    ],
)
def test_bad_arguments_are_one_line(
    trained_copy: Path, capfd: pytest.CaptureFixture[str], arguments: list[str],
    expected: str,
) -> None:
    (trained_copy / "texts").mkdir()
    (trained_copy / "texts/a.txt").write_text("words\n")
    run_predict(*arguments, expect=1)
    assert expected in error_of(capfd)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove("models/self_training"), "models/self_training: no trained models; make them with: dvc repro"),
        (remove("models/emovclip/fold-1.safetensors"), "modality emovclip: what its encoder loads (models/demo/clip, "
         "models/emovclip) is gone or changed since the models in models/self_training were trained; run dvc repro"),
        (remove("models/demo/hubert"), "modality hubert: what its encoder loads (models/demo/hubert) is gone or "),
        (remove("models/demo/clip"), "modality clip: what its encoder loads (models/demo/clip) is gone or "),
        (lambda: without_weights("hubert"), "modality hubert: checkpoint models/demo/hubert: "),
        (lambda: change("extractors.hubert.layers", [-9]), "modality hubert: checkpoint models/demo/hubert: layers"),
        (lambda: change("corpus.labels", ["happy", "sad"]), "params.yaml: corpus.labels: found ['happy', 'sad'], but"),
        (lambda: Path("models/self_training/ensemble.safetensors").write_bytes(b"{}"), "can't read the ensemble"),
        (remove("models/calibration.json"), "models/calibration.json: not found; the probabilities' temperature is "
         "made by: dvc repro evaluate"),
        (lambda: make_ensemble(hubert=256).save(Path("models/self_training")), "models/calibration.json: made for "
         "other models than those that are there now; run dvc repro evaluate"),
        (lambda: models_of(hubert=256), "modality hubert: the encoder gives 128 features, but the models were "),
    ],
)
def test_what_the_models_lack_is_one_line(
    trained_copy: Path, capfd: pytest.CaptureFixture[str],
    damage: Callable[[], None], expected: str,
) -> None:
    damage()
    run_predict("clips/a.mp4", expect=1)
    assert expected in error_of(capfd)


def without_weights(name: str) -> None:
    """As if the models had been trained with a checkpoint that lacks them."""
    Path("models/demo", name, "model.safetensors").unlink()
    models_of()


def models_of(**changes: int) -> None:
    shutil.rmtree("models/self_training")
    save_ensemble(**changes)


def test_params_that_are_not_those_of_the_models_are_found() -> None:
    values: dict[str, Any] = {
        "audio": {"sample_rate": 24000}, "corpus": {"labels": ["a", "b"], "max_bad_fraction": 0.1},
        "rankings": {"provider": "lexicon", "max_cost_usd": 5}, "extractors": {"hubert": {"layers": [-1]}},
        "fusion": {"hidden": 64},
    }

    def lock(**stages: dict[str, Any]) -> dict[str, Any]:
        return {"stages": {name.replace("__", "@"): {"params": {"params.yaml": p}} for name, p in stages.items()}}

    same = lock(extract_audio={"audio": {"sample_rate": 24000}, "corpus.max_bad_fraction": 0.9},
                rank_emotions={"rankings": {"provider": "lexicon", "max_cost_usd": 0}},
                train_fusion={"fusion": {"hidden": 128}}, extract__gone={"extractors.gone": {"layers": [1]}},
                extract__hubert={"extractors.hubert": {"layers": [-1]}})
    same["stages"]["extract_hubert"] = {"params": {"params.yaml": {"extractors.hubert": {"layers": [-9]}}}}  # of old
    same["stages"]["plan"] = {"params": {"params.yaml": {"extractors": {"hubert": {"layers": [-9]}}}}}
    pipeline = {"stages": dict.fromkeys(("plan", "extract_audio", "rank_emotions", "train_fusion", "extract"))}
    check_params(values, same, ("hubert",), pipeline)
    for key, changed in {
        "audio.sample_rate": lock(extract_audio={"audio": {"sample_rate": 16000}}),
        "rankings.provider": lock(rank_emotions={"rankings": {"provider": "openai"}}),
        "extractors.hubert.layers": lock(extract__hubert={"extractors.hubert": {"layers": [-2, -1]}}),
    }.items():
        with pytest.raises(PipelineError, match=rf"params.yaml: {key}: found .* run dvc repro"):
            check_params(values, changed, ("hubert",), pipeline)
