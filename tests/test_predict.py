"""Predicting new clips and the release bundle, without DVC. tests/test_pipeline.py compares both with the pipeline."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusion_data import make_inputs
from ruamel.yaml import YAML
from test_transcribe import make_ctc
from trained_run import SENTENCES, make_ensemble, make_trained

from stages import predict, release
from stages.errors import PipelineError, run_stage
from stages.fusion.ensemble import Ensemble
from stages.fusion.features import fold_statistics
from stages.fusion.model import Architecture, initial_parameters
from stages.inference.bundle import INDEX, SCHEMA, open_bundle
from stages.inference.clips import find_clips, transcript_of
from stages.inference.decoding import CHUNK, chunks
from stages.inference.trained import check_params

Rows = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained") / "repository"
    make_trained(root)
    return root


@pytest.fixture(scope="module")
def released(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        release.main()
    return Path(shutil.move(made / "models/release", tmp_path_factory.mktemp("elsewhere") / "bundle"))


@pytest.fixture
def repository(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one's own, which is the working directory."""
    folder = Path(shutil.copytree(made, tmp_path / "repository"))
    monkeypatch.chdir(folder)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object, expect: int = 0) -> None:
    """The command, with the exit code that it is expected to have."""
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    try:
        run_stage(predict.main)
    except SystemExit as ended:
        assert ended.code == expect
    else:
        assert expect == 0


def rows(path: Path) -> Rows:
    with open(path, encoding="utf-8", newline="") as file:
        return {row["clip"]: row for row in csv.DictReader(file)}


def numbers(row: dict[str, str]) -> np.ndarray:
    return np.array([float(v) for name, v in row.items() if name.startswith(("prob_", "attention_"))])


def error_of(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---------------------------------------------------------------- predicting


def test_good_and_broken_clips(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (repository / "clips/text.mp4").write_text("no clip at all\n")
    (repository / "clips/notes.txt").write_text("not looked at\n")
    table = [("name", "transcript"), ("a", SENTENCES[0]), ("b.mkv", SENTENCES[1])]
    with open("transcripts.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
    run(monkeypatch, "clips", "--transcripts", "transcripts.csv", "--out", "out/predictions.csv")
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

    run(monkeypatch, "clips/a.mp4", "--transcript", SENTENCES[0])  # alone, to stdout: the same
    alone = list(csv.DictReader(capfd.readouterr().out.splitlines()))
    assert len(alone) == 1 and numbers(alone[0]) == pytest.approx(numbers(spoken), abs=1e-5)


def test_no_readable_clip_is_exit_code_1(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.mp4", "y.mp4"):
        (repository / name).write_bytes(b"")
    run(monkeypatch, "x.mp4", "y.mp4", "--out", "p.csv", expect=1)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("warning", "error"))]
    assert len(lines) == 3 and lines[-1] == "error: predict: none of the 2 clips could be read"
    assert all("can't be opened" in row["reason"] and not row["prediction"] for row in rows(Path("p.csv")).values())


def test_words_are_recognised_where_none_are_given(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)  # some random networks hear nothing at all
    make_ctc(repository / "models/ctc", "layer")
    change("transcribe.checkpoint", "models/ctc")
    run(monkeypatch, "clips", "--transcripts", words({"a": SENTENCES[0]}), "--out", "p.csv")
    found = rows(Path("p.csv"))
    assert found["clips/a.mp4"]["transcript"] == SENTENCES[0]
    assert found["clips/b.mkv"]["transcript"] and found["clips/b.mkv"]["ranking"]
    assert found["clips/b.mkv"]["present_baichuan"] == "true"


def test_a_table_for_other_clips_is_pointed_out(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert predict.given_transcripts([Path("clips/a.mp4")], None, words({"x": "好"})) == {Path("clips/a.mp4"): ""}
    assert "warning: words.csv: none of its 1 names is a clip's" in capfd.readouterr().err


def words(transcripts: dict[str, str]) -> Path:
    with open("words.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("name", "chinese"), *transcripts.items()])
    return Path("words.csv")


def change(key: str, value: object) -> None:
    yaml = YAML()
    values = yaml.load(Path("params.yaml"))
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section[last] = value
    yaml.dump(values, Path("params.yaml"))


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
    architecture = Architecture(("sound", "face", "prompt"), (10, 7, 5), 16, 4)
    parameters = initial_parameters(architecture, range(6))
    by_name = architecture.views(parameters)
    by_name["scores.weight"].zero_()
    by_name["scores.bias"].copy_(torch.tensor([0.0, 2.0, -1.0]))
    statistics = fold_statistics(inputs, True)
    ensemble = Ensemble(architecture, inputs.label_names, (0, 7), parameters.unflatten(0, (2, 3)), statistics, 0.3)
    rows = np.arange(9)
    softmax, attention = ensemble.predict_with_attention(inputs, rows)
    assert attention.shape == (2, 3, 9, 3) and (attention == torch.tensor([0.0, 2.0, -1.0])).all()
    assert torch.equal(softmax, ensemble.predict(inputs, rows))
    encoder = by_name["encoders.sound.linear_3.weight"]  # a modality that weighs nothing has no say
    encoder.uniform_(-1, 1)
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
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: list[str],
    expected: str,
) -> None:
    (repository / "texts").mkdir()
    (repository / "texts/a.txt").write_text("words\n")
    run(monkeypatch, *arguments, expect=1)
    assert expected in error_of(capfd)


def remove(*paths: str) -> Callable[[], None]:
    def act() -> None:
        for path in map(Path, paths):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove("models/self_training"), "models/self_training: no trained models; make them with: dvc repro"),
        (remove("models/emovclip/fold-1.safetensors"), "models/emovclip/fold-1.safetensors: no trained models; make"),
        (remove("models/demo/hubert"), "modality hubert: checkpoint models/demo/hubert: no such folder"),
        (remove("models/demo/clip"), "modality clip: checkpoint models/demo/clip: no such folder"),
        (lambda: change("extractors.hubert.layers", [-9]), "modality hubert: checkpoint models/demo/hubert: layers"),
        (lambda: change("corpus.labels", ["happy", "sad"]), "params.yaml: corpus.labels: found ['happy', 'sad'], but"),
        (lambda: Path("models/self_training/ensemble.safetensors").write_bytes(b"{}"), "can't read the ensemble"),
        (lambda: models_of_a_wider_hubert(), "modality hubert: the encoder gives 128 features, but the models were "),
    ],
)
def test_what_the_models_lack_is_one_line(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    damage: Callable[[], None], expected: str,
) -> None:
    damage()
    run(monkeypatch, "clips/a.mp4", expect=1)
    assert expected in error_of(capfd)


def models_of_a_wider_hubert() -> None:
    ensemble = Path("models/self_training/ensemble.json")
    description = json.loads(ensemble.read_text())
    shutil.rmtree("models/self_training")
    labels = tuple(description["labels"])
    make_ensemble(labels, hubert=256).save(Path("models/self_training"))


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
    check_params(values, same, ("hubert",))
    for key, changed in {
        "audio.sample_rate": lock(extract_audio={"audio": {"sample_rate": 16000}}),
        "corpus.labels": lock(train_fusion={"corpus.labels": ["b", "a"]}),
        "rankings.provider": lock(rank_emotions={"rankings": {"provider": "openai"}}),
        "extractors.hubert.layers": lock(extract__hubert={"extractors.hubert": {"layers": [-2, -1]}}),
    }.items():
        with pytest.raises(PipelineError, match=rf"params.yaml: {key}: found .* run dvc repro"):
            check_params(values, changed, ("hubert",))


# ---------------------------------------------------------------- the bundle


def test_a_bundle_gives_the_same_elsewhere(
    repository: Path, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "clips", "--transcripts", words({"a": SENTENCES[0]}), "--out", "p.csv")
    here = rows(Path("p.csv"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run(monkeypatch, repository / "clips", "--transcripts", repository / "words.csv", "--bundle", released,
        "--device", "cpu", "--out", "p.csv")
    there = {str(Path(clip).relative_to(repository)): row for clip, row in rows(Path("p.csv")).items()}
    assert there.keys() == here.keys()
    for clip, row in here.items():
        assert numbers(there[clip]) == pytest.approx(numbers(row), abs=1e-6)
        assert {**there[clip], "clip": ""} == {**row, "clip": ""}


def test_what_a_bundle_holds(released: Path, repository: Path) -> None:
    files = {path.relative_to(released).as_posix() for path in released.rglob("*") if path.is_file()}
    index = json.loads((released / INDEX).read_text())
    assert index["schema"] == SCHEMA and set(index["files"]) == files - {INDEX}
    assert {"README.md", "metrics.json", "params.yaml", "ensemble/ensemble.safetensors", "emovclip/fold-2.safetensors",
            "checkpoints/hubert/model.safetensors", "checkpoints/baichuan/tokenizer.model"} <= files
    assert not any(name.endswith((".py", ".mp4", ".csv")) for name in files)
    params = (released / "params.yaml").read_text()
    assert "somebody" not in params and "models/demo" not in params
    card = (released / "README.md").read_text()
    metrics = json.loads((repository / "reports/metrics.json").read_text())
    front = YAML(typ="safe").load(card.split("---")[1])
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == round(metrics["test"]["waf"], 2)
    assert f"{metrics['test']['interval'][0]:.2f} to {metrics['test']['interval'][1]:.2f}" in card
    for words in ("neutral, anger, happiness", "out of fold", "## Limits", "generated demo corpus", "--bundle"):
        assert words in card


def test_published_checkpoints_go_by_name(repository: Path) -> None:
    change("extractors.hubert.checkpoint", "TencentGameMate/chinese-hubert-large")
    change("extractors.hubert.revision", "90cb6604")
    change("emovclip.checkpoint", "ViT-L-14-quickgelu / openai")
    release.main()
    row = open_bundle(Path("models/release")).params
    assert row.extractors["hubert"].options["checkpoint"] == "TencentGameMate/chinese-hubert-large"
    assert row.emovclip.checkpoint == "ViT-L-14-quickgelu / openai"
    assert row.extractors["clip"].options["checkpoint"] == "models/release/checkpoints/clip"
    card = Path("models/release/README.md").read_text()
    assert "- TencentGameMate/chinese-hubert-large\n" in card and "| 90cb6604 |" in card
    release.main()  # in place of the earlier one


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda: change("extractors.hubert.checkpoint", str(Path("models/demo/hubert").rename("../hubert"))),
         "extractors.hubert.checkpoint: .* lies outside the repository"),
        (lambda: change("extractors.hubert.checkpoint", "models/demo/nowhere"), "models/demo/nowhere: no such folder"),
        (remove("reports/metrics.json"), "reports/metrics.json: not found; .* dvc repro"),
        (remove("models/self_training"), "no trained models; make them with: dvc repro self_train"),
        (lambda: Path("reports/metrics.json").write_text('{"seeds": 9, "folds": 3}'), "of 3 folds x 9 seeds, but"),
    ],
)
def test_what_can_not_be_released_is_one_line(repository: Path, damage: Callable[[], None], expected: str) -> None:
    damage()
    with pytest.raises(PipelineError, match=expected) as caught:
        release.main()
    assert "\n" not in str(caught.value) and not Path("models/release").exists()


@pytest.fixture
def bundle(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one's own in the working directory."""
    shutil.copytree(released, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    return Path("bundle")


def reindex(bundle: Path, **changes: object) -> None:
    """Make the index fit the files as they are now, as whoever means harm would."""
    import hashlib

    index = json.loads((bundle / INDEX).read_text())
    for name in index["files"]:
        if (bundle / name).is_file():
            index["files"][name] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    (bundle / INDEX).write_text(json.dumps(index | changes))


def refused(bundle: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        open_bundle(bundle)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_schema_is_refused(bundle: Path) -> None:
    reindex(bundle, schema=SCHEMA + 1)
    assert f"bundle/release.json: schema {SCHEMA + 1}, expected {SCHEMA}; use the version" in refused(bundle)
    (bundle / INDEX).write_text("[1]")
    assert "schema None" in refused(bundle)
    (bundle / INDEX).write_text("{")
    assert "bundle/release.json: can't be read" in refused(bundle)


@pytest.mark.parametrize(
    "name", ["params.yaml", "ensemble/ensemble.safetensors", "emovclip/fold-0.safetensors", "metrics.json",
             "checkpoints/clip/open_clip_model.safetensors", "checkpoints/hubert/preprocessor_config.json"],
)
def test_a_missing_or_altered_file_is_found(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    assert f"bundle/{name}: altered or damaged" in refused(bundle)
    (bundle / name).unlink()
    assert f"bundle/{name}: missing" in refused(bundle)


def test_no_path_leads_out_of_a_bundle(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    index = json.loads((bundle / INDEX).read_text())
    for name in ("../outside.json", str(outside), "checkpoints/../../outside.json", "a\0b"):
        reindex(bundle, files=index["files"] | {name: "0" * 64})
        assert "leads out of the bundle" in refused(bundle)
    reindex(bundle, files=index["files"])
    config = bundle / "checkpoints/hubert/config.json"
    config.unlink()
    config.symlink_to(outside)
    reindex(bundle)
    assert "checkpoints/hubert/config.json leads out of the bundle" in refused(bundle)
    config.unlink()
    shutil.copyfile(outside, config)
    (bundle / "checkpoints/hubert/more.json").write_text("{}")
    reindex(bundle)
    assert "more.json: release.json does not list it" in refused(bundle)


@pytest.mark.parametrize("checkpoint", ["../secret", "/etc", "models/demo/hubert", "~/x/y", "own/folder", "a/.."])
def test_a_bundles_checkpoint_is_its_own_or_published(bundle: Path, checkpoint: str) -> None:
    Path("own/folder").mkdir(parents=True)
    edit(bundle, "extractors.hubert.checkpoint", checkpoint)
    assert f"params.yaml: extractors.hubert.checkpoint: found {checkpoint!r}, expected" in refused(bundle)


def edit(bundle: Path, key: str, value: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(bundle)
        change(key, value)
    reindex(bundle)


def test_a_bundle_names_no_program_server_or_key(bundle: Path) -> None:
    """What would run something, or send the environment's secrets somewhere, is the machine's own affair."""
    edit(bundle, "rankings.base_url", "http://evil.example/v1")
    edit(bundle, "rankings.api_key_env", "AWS_SECRET_ACCESS_KEY")
    edit(bundle, "faces.detector", "openface")
    edit(bundle, "faces.openface_binary", "./evil.sh")
    edit(bundle, "runtime.workers", 100000)
    p = open_bundle(bundle).params
    assert (p.rankings.base_url, p.rankings.api_key_env) == (None, "OPENAI_API_KEY")
    assert p.faces.openface_binary == "FeatureExtraction" and p.runtime.workers == "auto"


def test_opening_a_bundle_executes_nothing_of_it(bundle: Path, made: Path, capfd: pytest.CaptureFixture[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            import os

            return os.mkdir, ("marker",)

    evil = pickle.dumps(Evil())
    sound = {name: (bundle / name).read_bytes() for name in
             ("params.yaml", "emovclip/fold-0.safetensors", "ensemble/ensemble.safetensors")}
    for name in ("sitecustomize.py", "conftest.py", "stages.py", "checkpoints/__init__.py"):
        if not name.startswith("checkpoints"):  # there it would be refused, as unlisted
            (bundle / name).write_text("import os\nos.mkdir('marker')\n")
    for name, content in sound.items():
        harm = b"x: !!python/object/apply:os.mkdir [marker]\n" + content if name.endswith("yaml") else evil
        (bundle / name).write_bytes(harm)
        reindex(bundle)
        run(monkeypatch, made / "clips/a.mp4", "--bundle", bundle, "--device", "cpu", expect=1)
        error_of(capfd)
        (bundle / name).write_bytes(content)
    assert not Path("marker").exists()
    reindex(bundle)
    run(monkeypatch, made / "clips/a.mp4", "--bundle", bundle, "--device", "cpu", "--out", "p.csv")
    assert rows(Path("p.csv")) and not Path("marker").exists()
