"""The release bundle, without DVC. tests/test_pipeline.py compares its predictions with the pipeline's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from predict_runs import change, error_of, numbers, remove, rows, run_predict, word_table
from ruamel.yaml import YAML
from trained_run import SENTENCES, save_ensemble

from stages.commands import release
from stages.engine.errors import PipelineError
from stages.engine.files import write_json
from stages.inference.bundle import INDEX, SCHEMA, open_bundle


@pytest.fixture(scope="module")
def released(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        release.main([])
    return Path(shutil.move(trained / "models/release", tmp_path_factory.mktemp("elsewhere") / "bundle"))


def test_a_bundle_gives_the_same_elsewhere(
    trained_copy: Path, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_predict("clips", "--transcripts", word_table({"a": SENTENCES[0]}), "--out", "p.csv")
    here = rows(Path("p.csv"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_predict(trained_copy / "clips", "--transcripts", trained_copy / "words.csv", "--bundle", released,
                "--device", "cpu", "--out", "p.csv")
    there = {str(Path(clip).relative_to(trained_copy)): row for clip, row in rows(Path("p.csv")).items()}
    assert there.keys() == here.keys()
    for clip, row in here.items():
        assert numbers(there[clip]) == pytest.approx(numbers(row), abs=1e-6)
        assert {**there[clip], "clip": ""} == {**row, "clip": ""}


def test_what_a_bundle_holds(released: Path, trained_copy: Path) -> None:
    files = {path.relative_to(released).as_posix() for path in released.rglob("*") if path.is_file()}
    index = json.loads((released / INDEX).read_text())
    assert index["schema"] == SCHEMA and set(index["files"]) == files - {INDEX}
    assert {"README.md", "calibration.json", "details.json", "metrics.json", "params.yaml",
            "ensemble/ensemble.safetensors", "checkpoints/emovclip/fold-2.safetensors",
            "checkpoints/hubert/model.safetensors", "checkpoints/baichuan/tokenizer.model"} <= files
    assert not any(name.endswith((".py", ".mp4", ".csv")) for name in files)
    params = (released / "params.yaml").read_text()
    assert "somebody" not in params and "models/demo" not in params
    card = (released / "README.md").read_text()
    details = json.loads((trained_copy / "reports/details.json").read_text())
    test = details["final"]["test"]
    front = YAML(typ="safe").load(card.split("---")[1])
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == round(test["waf"], 2)
    assert f"{test['interval'][0]:.2f} to {test['interval'][1]:.2f}" in card
    assert "30 test (transductive) |" in card and "60 labelled, out of fold (void) |" in card
    assert all(warning in card for warning in details["warnings"]) and "logistic regression | 30 test |" in card
    for words in ("neutral, anger, happiness", "out of fold", "## Limits", "generated demo corpus", "--bundle",
                  "one temperature"):
        assert words in card


def test_published_checkpoints_go_by_name(trained_copy: Path) -> None:
    change("extractors.hubert.checkpoint", "TencentGameMate/chinese-hubert-large")
    change("extractors.hubert.revision", "90cb6604")
    change("extractors.emovclip.checkpoint", "ViT-L-14-quickgelu / openai")
    description = Path("models/emovclip/trained.json")  # as if the prompts had been trained for it
    trained = json.loads(description.read_text())
    write_json(description, trained | {"checkpoint": "ViT-L-14-quickgelu / openai", "digest": ""})
    save_ensemble()
    release.main([])
    row = open_bundle(Path("models/release")).params
    assert row.extractors["hubert"].options["checkpoint"] == "TencentGameMate/chinese-hubert-large"
    assert row.extractors["emovclip"].options["checkpoint"] == "ViT-L-14-quickgelu / openai"
    assert row.extractors["clip"].options["checkpoint"] == "models/release/checkpoints/clip"
    card = Path("models/release/README.md").read_text()
    assert "- TencentGameMate/chinese-hubert-large\n" in card and "| 90cb6604 |" in card
    release.main([])  # in place of the earlier one


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda: change("extractors.hubert.checkpoint", str(Path("models/demo/hubert").rename("../hubert"))),
         "extractors.hubert.checkpoint: .* lies outside the repository"),
        (lambda: change("transcribe.checkpoint", "models/demo/nowhere"), "models/demo/nowhere: no such folder"),
        (remove("reports/details.json"), "reports/details.json: not found; .* dvc repro"),
        (remove("models/self_training"), "no trained models; make them with: dvc repro"),
        (lambda: Path("models/emovclip/trained.json").write_text("{}"), "modality emovclip: what its encoder loads "
         r"\(models/demo/clip, models/emovclip\) is gone or changed since the models .* were trained; run dvc repro"),
        (lambda: Path("reports/details.json").write_text('{"seeds": 9, "folds": 3}'), "of 3 folds x 9 seeds, but"),
    ],
)
def test_what_can_not_be_released_is_one_line(trained_copy: Path, damage: Callable[[], None], expected: str) -> None:
    damage()
    with pytest.raises(PipelineError, match=expected) as caught:
        release.main([])
    assert "\n" not in str(caught.value) and not Path("models/release").exists()


@pytest.fixture
def bundle(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one's own in the working directory."""
    shutil.copytree(released, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    return Path("bundle")


def reindex(bundle: Path, **changes: object) -> None:
    """Make the index fit the files as they are now, as an attacker would."""
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
    "name", ["params.yaml", "ensemble/ensemble.safetensors", "checkpoints/emovclip/fold-0.safetensors", "details.json",
             "calibration.json", "metrics.json", "checkpoints/clip/open_clip_model.safetensors",
             "checkpoints/hubert/preprocessor_config.json"],
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
    """What would run something, or send the environment's secrets somewhere, is set on the machine alone."""
    edit(bundle, "rankings.base_url", "http://evil.example/v1")
    edit(bundle, "rankings.api_key_env", "AWS_SECRET_ACCESS_KEY")
    edit(bundle, "faces.detector", "openface")
    edit(bundle, "faces.openface_binary", "./evil.sh")
    edit(bundle, "runtime.workers", 100000)
    p = open_bundle(bundle).params
    assert (p.rankings.base_url, p.rankings.api_key_env) == (None, "OPENAI_API_KEY")
    assert p.faces.openface_binary == "FeatureExtraction" and p.runtime.workers == "auto"


def test_opening_a_bundle_executes_nothing_of_it(
    bundle: Path, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            import os

            return os.mkdir, ("marker",)

    evil = pickle.dumps(Evil())
    sound = {name: (bundle / name).read_bytes() for name in
             ("params.yaml", "checkpoints/emovclip/fold-0.safetensors", "ensemble/ensemble.safetensors")}
    for name in ("sitecustomize.py", "conftest.py", "stages.py", "checkpoints/__init__.py"):
        if not name.startswith("checkpoints"):  # there it would be refused, as unlisted
            (bundle / name).write_text("import os\nos.mkdir('marker')\n")
    for name, content in sound.items():
        harm = b"x: !!python/object/apply:os.mkdir [marker]\n" + content if name.endswith("yaml") else evil
        (bundle / name).write_bytes(harm)
        reindex(bundle)
        run_predict(trained / "clips/a.mp4", "--bundle", bundle, "--device", "cpu", expect=1)
        error_of(capfd)
        (bundle / name).write_bytes(content)
    assert not Path("marker").exists()
    reindex(bundle)
    run_predict(trained / "clips/a.mp4", "--bundle", bundle, "--device", "cpu", "--out", "p.csv")
    assert rows(Path("p.csv")) and not Path("marker").exists()
