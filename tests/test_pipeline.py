"""The whole pipeline under DVC, as a user runs it, on the smallest demo corpus. One repository, tests in order."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from yaml_values import set_value

ROOT = Path(__file__).parent.parent
TRACKED = ("stages", "benchmarks", "data", "features", "models", "reports", "presets", ".dvc/config",
           ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml")
EVALUATION = ["pretrain_fusion", "train_fusion", "nested_cv", "self_train", "evaluate"]  # two are off: a second each
FEATURES = ["extract", "gather_features", "split_folds", "corpus"]  # stages: what training reads


class Repository:
    """A git and DVC repository with the pipeline; every command in an environment of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        identity = {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        self.env = os.environ | identity | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "1",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str, expect: int | None = 0) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.env, text=True, capture_output=True)
        output = done.stdout + done.stderr
        assert expect is None or done.returncode == expect, f"{command} exited {done.returncode}:\n{output[-4000:]}"
        return output

    def stages_run(self, output: str) -> list[str]:
        return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]

    def set(self, key: str, value: object, file: str = "params.yaml") -> None:
        set_value(self.folder / file, key, value)

    def metrics(self) -> dict:
        return json.loads((self.folder / "reports/metrics.json").read_text())

    def rows(self, path: str) -> list[dict[str, str]]:
        with open(self.folder / path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def contents(self, folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((self.folder / folder).iterdir())}


def new_repository(folder: Path) -> Repository:
    """What `git clone` would bring, with the demo at its smallest, committed."""
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "--", *TRACKED], cwd=ROOT, text=True,
                             capture_output=True, check=True).stdout.split()
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    repository = Repository(folder)
    for key, value in {"labelled": 60, "unlabelled": 30, "test": 30}.items():
        repository.set(f"demo.{key}", value)
    repository.set("corpus.shard_size", 32)
    repository.set("fusion.seeds", [0])
    repository.set("self_training.rounds", 2)
    repository.set("emovclip.epochs", 2)
    repository.set("corpus.max_bad_fraction", 0.2)  # five broken clips are a large part of a corpus this small
    repository.run("git", "init", "-q")
    repository.run("git", "add", "-A")
    repository.run("git", "commit", "-qm", "test")
    return repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    repository = new_repository(tmp_path_factory.mktemp("pipeline"))
    output = repository.run("dvc", "repro")
    listed = {line.split()[0] for line in repository.run("dvc", "stage", "list").splitlines()}
    assert set(repository.stages_run(output)) == listed
    repository.run("git", "add", "-A")
    repository.run("git", "commit", "-qm", "first run")
    yield repository


def test_the_dag_is_one_connected_graph_of_every_stage(repository: Repository) -> None:
    dot = repository.run("dvc", "dag", "--dot")
    edges = [tuple(part.strip(' ";') for part in line.split("->")) for line in dot.splitlines() if "->" in line]
    listed = {line.split()[0] for line in repository.run("dvc", "stage", "list").splitlines()}
    designed = {"corpus", "split_folds", "extract_audio", "transcribe", "slice_frames", "crop_faces", "rank_emotions",
                "extract@hubert", "extract@clip", "plan", "extract@baichuan", "train_emovclip", "extract@emovclip",
                "pretrain_fusion", "train_fusion", "self_train", "evaluate"}
    assert designed <= listed
    reached = {"plan"}
    for _ in listed:
        reached |= {node for edge in edges if reached & set(edge) for node in edge}
    assert reached == listed


def test_a_second_repro_runs_nothing(repository: Repository) -> None:
    assert repository.stages_run(repository.run("dvc", "repro")) == []


def test_the_results_are_complete(repository: Repository) -> None:
    metrics = repository.metrics()
    assert 0 < metrics["test"] <= 100 and 0 < metrics["best"] <= 100
    manifest = repository.rows("data/manifest.csv")
    predictions = {row["clip_id"]: row for row in repository.rows("reports/predictions.csv")}
    assert set(predictions) == {row["clip_id"] for row in manifest}
    labels = {"neutral", "anger", "happiness", "sadness", "worry", "surprise"}
    assert {row["prediction"] for row in predictions.values()} <= labels
    assert all(row["label"] == "" for row in manifest if row["split"] != "labelled")
    submission = repository.rows("reports/submission.csv")
    assert [row["name"] for row in submission] == [r["clip_id"] for r in manifest if r["split"] == "test"]
    assert "<html" in (repository.folder / "reports/report.html").read_text()


def test_the_five_broken_clips_are_recorded_and_still_predicted(repository: Repository) -> None:
    from stages.corpora.demo.plan import make_plan

    broken = {plan.name: plan.broken for plan in make_plan(2024, 60, 30, 30) if plan.broken}
    skipped = repository.rows("reports/skipped.csv")
    predictions = {row["clip_id"]: row for row in repository.rows("reports/predictions.csv")}
    expected = {
        "no audio stream": ("extract_audio", "no audio"),
        "no video stream": ("slice_frames", "no video"),
        "truncated": ("slice_frames", "truncated"),
        "no face": ("crop_faces", "no face"),
        "no transcript": ("extract@baichuan", "no transcript"),
    }
    assert sorted(broken.values()) == sorted(expected)
    for clip_id, kind in broken.items():
        stage, reason = expected[kind]
        rows = [row for row in skipped if row["clip_id"] == clip_id]
        assert any(row["stage"] == stage and reason in row["reason"] and row["reason"] for row in rows), (kind, rows)
        assert predictions[clip_id]["prediction"]
    assert {row["clip_id"] for row in skipped} == set(broken)


@pytest.fixture(scope="module")
def pushed(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The repository, everything of it pushed to a folder as its DVC remote."""
    repository.run("dvc", "remote", "add", "-q", "-d", "store", str(tmp_path_factory.mktemp("remote")))
    repository.run("git", "commit", "-qam", "remote")
    repository.run("dvc", "push", "-q")
    return repository


def clone(repository: Repository, folder: Path) -> Repository:
    repository.run("git", "clone", "-q", str(repository.folder), str(folder))
    return Repository(folder)


def test_pulled_elsewhere_nothing_runs(pushed: Repository, tmp_path: Path) -> None:
    elsewhere = clone(pushed, tmp_path / "clone")
    elsewhere.run("dvc", "pull", "-q")
    assert elsewhere.stages_run(elsewhere.run("dvc", "repro")) == []
    assert elsewhere.contents("features/hubert") == pushed.contents("features/hubert")


def test_the_features_alone_are_enough_to_train(pushed: Repository, tmp_path: Path) -> None:
    elsewhere = clone(pushed, tmp_path / "clone")
    elsewhere.run("dvc", "pull", "-q", *FEATURES)
    elsewhere.set("fusion.hidden", 64)
    output = elsewhere.run("dvc", "repro", "--allow-missing", "train_fusion", "self_train")
    assert elsewhere.stages_run(output) == ["pretrain_fusion", "train_fusion", "self_train"]
    assert not (elsewhere.folder / "data/audio").exists()


def test_dvc_shows_metrics_and_plots(repository: Repository) -> None:
    lines = repository.run("dvc", "metrics", "show").splitlines()
    assert lines[0].split() == ["Path", *sorted(repository.metrics())] and lines[1].startswith("reports/metrics.json ")
    assert len(lines) == 2 and max(map(len, lines)) <= 100
    repository.run("dvc", "plots", "show", "-o", "plots")
    page = (repository.folder / "plots/index.html").read_text()
    for plot in ("confusion", "rounds", "curves"):
        assert plot in page
    shutil.rmtree(repository.folder / "plots")


def test_modality_dropout_reruns_the_fusion_alone_and_changes_the_waf(repository: Repository) -> None:
    before = repository.metrics()
    output = repository.run("dvc", "exp", "run", "-S", "fusion.modality_dropout=0.15")
    assert sorted(repository.stages_run(output)) == sorted(EVALUATION)
    assert repository.metrics()["best"] != before["best"]
    assert " best " in repository.run("dvc", "metrics", "diff")
    readme = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("dvc exp show"))
    table = repository.run("bash", "-c", readme).splitlines()
    assert {"test", "fusion.modality_dropout"} <= set(table[0].split()) and max(map(len, table)) <= 100
    assert len(table[0].split()) <= 10 and any(" 0.15" in line for line in table)
    output = repository.run("dvc", "exp", "run", "-S", "fusion.modality_dropout=0.3")
    assert repository.stages_run(output) == []  # back from the run cache
    assert repository.metrics() == before


def test_a_row_of_the_tables_is_run_once_and_leaves_the_workspace_alone(repository: Repository) -> None:
    before = repository.metrics(), (repository.folder / "params.yaml").read_bytes()
    output = repository.run("python", "-m", "stages.commands.tables", "hubert", "p30")
    # p = 0.3 is there
    assert set(repository.stages_run(output)) == {"plan", "gather_features", "baselines", *EVALUATION}
    assert "tables-hubert-" in repository.run("dvc", "exp", "list")
    rows = {line.split(" | ")[0]: line for line in (repository.folder / "reports/tables.md").read_text().splitlines()}
    assert rows["| HuBERT"].count(" ± ") == 3 and rows["| p = 0.3"].count(" ± ") == 3 and "not run" in rows["| CLIP"]
    assert f"{before[0]['test']:.2f}" in rows["| p = 0.3"]
    assert (repository.metrics(), (repository.folder / "params.yaml").read_bytes()) == before
    output = repository.run("python", "-m", "stages.commands.tables", "hubert", "p30")
    assert "Running stage" not in output and "exp run" not in output
    assert repository.stages_run(repository.run("dvc", "repro")) == []


def test_a_killed_row_does_not_cost_the_users_params(repository: Repository) -> None:
    aside = repository.folder / ".cache/experiments/params.yaml"
    aside.write_text("a: 1\n")
    output = repository.run("python", "-m", "stages.commands.tables", "hubert", expect=1)
    assert output.count("\n") == 1 and "error: params.yaml: may be an experiment's" in output
    aside.unlink()


def test_layers_rerun_hubert_and_what_follows_and_going_back_is_free(repository: Repository) -> None:
    before = repository.contents("features/hubert")
    output = repository.run("dvc", "exp", "run", "-S", "extractors.hubert.layers=[-1]")
    assert set(repository.stages_run(output)) == {"plan", "extract@hubert", "gather_features", "baselines", *EVALUATION}
    assert repository.contents("features/hubert") != before
    output = repository.run("dvc", "exp", "run", "-S", "extractors.hubert.layers=[-4,-3,-2,-1]")
    assert repository.stages_run(output) == []
    assert repository.contents("features/hubert") == before


def test_runtime_reruns_nothing(repository: Repository) -> None:
    repository.set("runtime.workers", 1)
    repository.set("runtime.batch_memory_mb", 64)
    assert repository.stages_run(repository.run("dvc", "repro")) == []
    repository.set("runtime.workers", "auto")
    repository.set("runtime.batch_memory_mb", "auto")


def test_neither_limits_nor_the_plumbing_rerun_anything(repository: Repository) -> None:
    repository.set("corpus.max_bad_fraction", 0.5)
    repository.set("corpus.shard_size", 16)
    for module in (repository.folder / "stages/engine").glob("*.py"):
        module.write_text(module.read_text() + "# a comment\n")
    assert repository.stages_run(repository.run("dvc", "repro")) == []
    repository.run("git", "checkout", "params.yaml", "stages")


def test_a_truth_that_changes_is_read_again(repository: Repository) -> None:
    kept = repository.folder / "data/truth/truth.csv"
    shutil.copyfile(repository.folder / "data/demo/truth.csv", kept)
    repository.set("corpus.truth", "data/truth/truth.csv")
    assert repository.stages_run(repository.run("dvc", "repro")) == ["plan", "corpus"]
    before = repository.metrics()
    swapped = {"angry": "happy", "happy": "angry"}
    rows = [line.split(",") for line in kept.read_text().splitlines()]
    kept.write_text("".join(f"{name},{swapped.get(label, label)}\n" for name, label in rows))
    assert repository.stages_run(repository.run("dvc", "repro")) == ["corpus", "evaluate"]
    assert repository.metrics()["test"] != before["test"]
    kept.unlink()
    repository.run("git", "checkout", "params.yaml", "dvc.lock", "reports")
    repository.run("dvc", "checkout", "-q")


def test_predict_and_release_refuse_half_a_repro(repository: Repository) -> None:
    clip = next((repository.folder / "data/demo/raw/video-labeled").iterdir())
    for key, value, stage, what in (
        ("extractors.hubert.layers", [-1], "extract@hubert", "modality hubert: features/hubert changed"),
        ("audio.sample_rate", 16000, "extract_audio", "modality hubert: data/audio changed"),
        ("emovclip.seed", 7, "train_emovclip", "modality emovclip: what its encoder loads"),
    ):
        repository.set(key, value)
        for command in (["stages.commands.predict", str(clip)], ["stages.commands.release"]):
            assert f"params.yaml: {key}: found" in repository.run("python", "-m", *command, expect=1)
        repository.run("dvc", "repro", stage)
        for command in (["stages.commands.predict", str(clip)], ["stages.commands.release"]):
            output = repository.run("python", "-m", *command, expect=1)
            assert f"error: {what}" in output and "run dvc repro" in output and output.count("\n") == 1, output
        repository.run("git", "checkout", "params.yaml", "dvc.lock")
        repository.run("dvc", "checkout", "-q")
    repository.run("python", "-m", "stages.commands.predict", str(clip))


def test_a_new_row_adds_one_extractor_and_leaves_the_fusion_alone(repository: Repository) -> None:
    row = YAML().load(repository.folder / "params.yaml")["extractors"]["hubert"]
    repository.set("extractors.hubert_base", {**row, "checkpoint": "models/demo/hubert_base"})
    output = repository.run("dvc", "repro")
    # gather_features looks again at features/ and finds what it uses unchanged
    assert repository.stages_run(output) == ["plan", "extract@hubert_base", "gather_features"]
    assert (repository.folder / "features/hubert_base/shard-00000.h5").exists()
    repository.run("git", "checkout", "params.yaml", "dvc.lock")
    shutil.rmtree(repository.folder / "features/hubert_base")


@pytest.mark.parametrize("stage", ["extract_audio", "extract@hubert"])
def test_killed_in_the_middle_it_continues_to_the_same_bytes(repository: Repository, stage: str) -> None:
    out = {"extract_audio": "data/audio", "extract@hubert": "features/hubert"}[stage]
    whole = repository.contents(out)
    parts = repository.folder / ".cache/parts" / stage
    shutil.rmtree(parts)
    process = subprocess.Popen(["dvc", "repro", "-f", "-s", stage], cwd=repository.folder, env=repository.env,
                               start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(parts.rglob("[!.]*.h5")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in parts.rglob("[!.]*.h5")}
    assert 0 < len(finished) < len(whole) - 1, "killed too late or too early to show anything"
    repository.run("dvc", "repro", "-f", "-s", stage)
    assert repository.contents(out) == whole
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # kept, not made again
    assert repository.stages_run(repository.run("dvc", "repro")) == []


def test_new_clips_get_what_the_pipeline_gave_them_here_and_from_a_bundle(
    repository: Repository, tmp_path: Path
) -> None:
    clips = "data/demo/raw/video-unlabeled-with-test2noise"
    repository.run("python", "-m", "stages.commands.predict", clips, "--transcripts", "data/transcripts.csv", "--out",
                   "predicted.csv")
    found = {Path(row["clip"]).stem: row for row in repository.rows("predicted.csv")}
    known = {row["clip_id"]: row for row in repository.rows("reports/predictions.csv") if row["split"] != "labelled"}
    assert found.keys() == known.keys() and len(found) == 60  # the five broken ones too
    for clip_id, row in known.items():
        assert found[clip_id]["prediction"] == row["prediction"]
        for name in [name for name in row if name.startswith(("prob_", "confidence"))]:
            assert abs(float(found[clip_id][name]) - float(row[name])) <= 1e-5, (clip_id, name)
    text = {row["clip_id"]: row["transcript"] for row in repository.rows("data/transcripts.csv")}
    assert all(row["transcript"] == text[clip_id] for clip_id, row in found.items())
    ranked = [row for row in found.values() if row["ranking"]]
    assert len(ranked) == 59 and {row["present_hubert"] for row in ranked} == {"true", "false"}

    assert "models/release" in repository.run("python", "-m", "stages.commands.release")
    assert repository.stages_run(repository.run("dvc", "repro")) == []
    shutil.move(repository.folder / "models/release", tmp_path / "bundle")
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(repository.folder / "data/transcripts.csv", tmp_path / "words.csv")
    (tmp_path / "dvc.py").write_text("raise ImportError('there is no DVC here')\n")
    (tmp_path / "clips").mkdir()
    some = sorted(known)[:8]
    for clip_id in some:
        shutil.copyfile(repository.folder / clips / f"{clip_id}.mp4", tmp_path / "clips" / f"{clip_id}.mp4")
    command = [sys.executable, "-m", "stages.commands.predict", "clips", "--transcripts", "words.csv", "--bundle",
               "bundle", "--out", "predicted.csv"]
    bare = {"PATH": "/nowhere", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=bare, check=True, timeout=120)
    with open(tmp_path / "predicted.csv", encoding="utf-8", newline="") as file:
        there = {Path(row["clip"]).stem: row for row in csv.DictReader(file)}
    assert sorted(there) == some
    for clip_id in some:
        for name in [name for name in there[clip_id] if name.startswith(("prob_", "attention_"))]:
            assert float(there[clip_id][name]) == pytest.approx(float(found[clip_id][name]), rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("fusion.dropuot", 0.1, "fusion.dropuot: unknown parameter"),
        ("fusion.dropout", "much", "fusion.dropout: found 'much', expected"),
        ("extractors.hubert.layres", [1], "extractors.hubert.layres: unknown parameter"),
        ("extractors.hubert.checkpoint", "models/nowhere", "models/nowhere"),
        ("runtime.device", "cuda:9", "runtime.device: found cuda:9"),
    ],
)
def test_bad_params_are_one_line(repository: Repository, key: str, value: object, expected: str) -> None:
    repository.set(key, value)
    output = repository.run("python", "-m", "stages.extract", "hubert", expect=1)
    repository.run("git", "checkout", "params.yaml")
    lines = [line for line in output.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0]


def test_the_preset_without_its_corpus_says_where_it_must_lie(tmp_path: Path) -> None:
    repository = new_repository(tmp_path)
    shutil.copyfile(tmp_path / "presets/mer2024.yaml", tmp_path / "params.yaml")
    output = repository.run("dvc", "repro", expect=None)
    assert "things that this run needs are missing: corpus.path: found no folder data/mer2024" in output
    assert "video-labeled/" in output and "Traceback" not in output
    assert repository.stages_run(output) == ["plan"]
