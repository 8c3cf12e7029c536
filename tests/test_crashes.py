"""Killed at random moments, on a full disk, in a read-only folder: the next run completes, to the same bytes.

The fast part kills two stages a few times; the soak (pytest -m slow tests/test_crashes.py -s) kills every long one
20 times and prints its figures.
"""

import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_runner import ROOT, Project, Stage, kill_repeatedly
from media_files import write_small_clip
from ruamel.yaml import YAML
from test_transcribe import make_ctc

from stages.corpora.demo.checkpoints import make_hubert
from stages.engine.yaml_file import read_yaml

FAST = ("corpus", "extract_audio", "extract@hubert")  # on small clips, without the demo
KILLED_FAST = ("extract_audio", "extract@hubert")
ALL = ("demo", "corpus", "split_folds", "extract_audio", "transcribe", "slice_frames", "crop_faces", "rank_emotions",
       "extract@hubert", "extract@clip", "extract@baichuan", "train_emovclip", "extract@emovclip", "gather_features",
       "pretrain_fusion", "train_fusion", "baselines", "nested_cv", "self_train", "evaluate")
SHORT = ("corpus", "split_folds", "gather_features")  # a second's work; the demo's making is not resumed by design
SOAK_KILLS, SOAK_SERIES = 20, 5
BAR = re.compile(r"\d+/\d+ \[")  # as of tqdm


def stages_of(names: tuple[str, ...]) -> list[Stage]:
    entries = read_yaml(ROOT / "dvc.yaml")["stages"]
    found = []
    for name in names:
        base, _, key = name.partition("@")
        entry = entries[base].get("do", entries[base])
        declared = [*entry.get("outs", []), *entry.get("metrics", []), *entry.get("plots", [])]
        paths = [next(iter(out)) if isinstance(out, dict) else out for out in declared]
        found.append(Stage(name, [path.replace("${key}", key) for path in paths]))
    return found


def prepare(folder: Path, names: tuple[str, ...]) -> tuple[Project, dict[str, Stage]]:
    """A project with every stage run once, uninterrupted and timed. Half of the demo's clips need recognising."""
    project = Project(folder)
    values = YAML().load(ROOT / "params.yaml")
    values["demo"] |= {"labelled": 60, "unlabelled": 30, "test": 30}
    values["corpus"] |= {"shard_size": 8, "max_bad_fraction": 0.5}
    values["fusion"] |= {"seeds": [0], "epochs": 10}
    values["self_training"]["rounds"] = 4
    values["emovclip"]["epochs"] = 3
    values["faces"]["stride"] = 1  # below faces.detect_every: faces are followed
    if "transcribe" in names:
        make_ctc(folder / "ctc", "layer")
        values["transcribe"]["checkpoint"] = "ctc"
    if "demo" not in names:
        values["corpus"] |= {"adapter": "csv", "path": "clips", "truth": None}
        (folder / "clips").mkdir()
        for i in range(60):
            write_small_clip(folder / f"clips/c{i:02d}.mp4", 0.4 + 0.02 * i)
        table = ["path,split,label", *(f"c{i:02d}.mp4,labelled,neutral" for i in range(60))]
        (folder / "clips/clips.csv").write_text("\n".join(table) + "\n")
        make_hubert(folder / "models/demo/hubert", 0)
    YAML().dump(values, folder / "params.yaml")
    stages = {stage.name: stage for stage in stages_of(names)}
    for stage in stages.values():
        project.run(stage, from_nothing=True)
        if stage.name == "demo":
            path = folder / "data/demo/raw/label-transcription.csv"
            rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
            path.write_text("\n".join(",".join(row) for row in rows[: len(rows) // 2]) + "\n", encoding="utf-8")
    return project, stages


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, dict[str, Stage]]]:
    project, stages = prepare(tmp_path_factory.mktemp("crashes"), FAST)
    yield project, stages
    project.close()


@pytest.mark.parametrize("name", KILLED_FAST)
def test_killed_at_random_moments_nothing_is_lost(small: tuple[Project, dict[str, Stage]], name: str) -> None:
    project, stages = small
    print(kill_repeatedly(project, stages[name], kills=3, series=3, seed=0))


@pytest.mark.slow
def test_soak_every_long_stage(tmp_path: Path) -> None:
    project, stages = prepare(tmp_path, ALL)
    kills = 0
    for name, stage in stages.items():
        if name not in (*SHORT, "demo"):
            figures = kill_repeatedly(project, stage, SOAK_KILLS, SOAK_SERIES, seed=0)
            kills += figures["kills"]
            print(figures, flush=True)
    print(f"{kills} kills, lost: 0", flush=True)
    project.close()


# ---------------------------------------------------------------- a disk that takes no more


def run(project: Project, stage: Stage, limit: int | None = None) -> tuple[int, str]:
    """The stage's exit code and stderr; `limit` bytes is the largest file that it may write."""
    command = [sys.executable, "-m", *stage.command.split()]
    if limit is not None:
        command = ["prlimit", f"--fsize={limit}", *command]
    done = subprocess.run(command, cwd=project.folder, text=True, capture_output=True)
    return done.returncode, done.stderr


def one_line(stderr: str) -> str:
    """The error, without the progress bar's lines."""
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip() and not BAR.search(line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr[-2000:]
    return lines[0]


def test_a_file_limit_is_one_line_and_the_next_run_completes(small: tuple[Project, dict[str, Stage]]) -> None:
    project, stages = small
    stage = stages["extract_audio"]
    whole = project.contents(stage.outs)
    project.forget_parts(stage)
    project.remove(stage)
    largest = max(len(content) for content in whole.values())
    code, stderr = run(project, stage, limit=largest - 1000)
    error = one_line(stderr)
    assert code == 1 and ".cache/parts/extract_audio/" in error and "File too large; make room" in error
    assert not list((project.folder / ".cache/parts/extract_audio").rglob("*.tmp"))
    code, stderr = run(project, stage)
    assert code == 0, stderr
    assert project.contents(stage.outs) == whole


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A function that mounts a tmpfs or bind on a folder, unmounted at the end."""
    mounted = tmp_path / "probe"
    mounted.mkdir()
    probe = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(mounted)], capture_output=True)
    if probe.returncode:
        pytest.skip("no right to mount a file system here")
    subprocess.run(["umount", str(mounted)], check=True)
    yield tmp_path


def test_a_full_disk_is_one_line_and_the_next_run_completes(
    small: tuple[Project, dict[str, Stage]], mount: Path
) -> None:
    project, stages = small
    stage = stages["extract_audio"]
    whole = project.contents(stage.outs)
    project.forget_parts(stage)
    project.remove(stage)
    disk = project.folder / ".cache/parts"
    size = sum(map(len, whole.values())) // 2
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
    try:
        code, stderr = run(project, stage)
        error = one_line(stderr)
        assert code == 1 and ".cache/parts/extract_audio/" in error and "No space left on device; make room" in error
        kept = {path.name: path.stat().st_mtime_ns for path in disk.rglob("*.h5")}
        assert kept and not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        code, stderr = run(project, stage)
        assert code == 0, stderr
        assert project.contents(stage.outs) == whole  # copied: the parts are on another file system
        assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in disk.rglob("*.h5")}.items()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("place", ["data", ".cache"])
def test_a_read_only_folder_is_one_line_and_the_next_run_completes(
    small: tuple[Project, dict[str, Stage]], mount: Path, place: str
) -> None:
    """By a read-only mount: root writes whatever the permissions say."""
    project, stages = small
    stage = stages["extract_audio"]
    whole = project.contents(stage.outs)
    project.forget_parts(stage)
    folder = project.folder / place
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        code, stderr = run(project, stage)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    error = one_line(stderr)
    assert code == 1 and f" {place}/" in error and "Read-only file system; make it writable" in error
    code, stderr = run(project, stage)
    assert code == 0, stderr
    assert project.contents(stage.outs) == whole


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes whatever the permissions say")
def test_without_permission_it_is_one_line(small: tuple[Project, dict[str, Stage]]) -> None:
    project, stages = small
    (project.folder / "data").chmod(0o555)
    code, stderr = run(project, stages["extract_audio"])
    (project.folder / "data").chmod(0o755)
    assert code == 1 and "Permission denied; check its permissions" in one_line(stderr)
