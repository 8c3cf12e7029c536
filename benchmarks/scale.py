"""What everything but the encoders costs as a corpus grows to the size of MER2024: time and peak memory.

    python -m benchmarks.scale                        # 1,000, 10,000 and 120,625 clips; needs 30 GB of disk
    python -m benchmarks.scale 1000 10000 --rounds 2  # these sizes; rounds of self-training; --epochs of the fusion
    python -m benchmarks.scale --before 91ec036       # reading, fusion and evaluation by that commit's code too

Each size is a repository of its own in a temporary folder (--folder), with the committed code and dvc.yaml: a corpus of
files without video, media stores with next to nothing per clip, and random features at the published dimensions, in
shards of at most 64. Every step is a process of its own; its peak memory is that of the largest process in it. "x" is
how many times as long as at the size before; "(!)" marks what grew faster than n log n.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from ruamel.yaml import YAML

from stages.corpora.duplicates import COLUMNS as DUPLICATES
from stages.engine.extraction import write_store
from stages.engine.files import write_rows
from stages.engine.fingerprint import PARTS
from stages.engine.manifest import Clip, read_manifest, write_manifest
from stages.engine.params import load
from stages.engine.plan import write_plan
from stages.engine.store import Row, write_index, write_shard
from stages.engine.work import Input, Shard, Target
from stages.planning.needs import left_out
from stages.planning.requirements import row_left_out

ROOT = Path(__file__).parent.parent
TRACKED = ("stages", "data", "features", "models", "reports", ".dvc/config", ".dvc/.gitignore", ".dvcignore",
           ".gitignore", "dvc.yaml", "params.yaml")
SHARD, FOLDS = 64, 5
SPLITS = {"labelled": 5030 / 120625, "test": 20000 / 120625}  # of MER2024; the others are unlabelled
DIMENSIONS = {"hubert": 1024, "clip": 768, "baichuan": 5120, "emovclip": 768}
ALPHABET = [chr(code) for code in range(0x4E00, 0x4E00 + 2000)]
PLANNED = "baichuan"  # the features that planning and resuming are measured with: the largest
SLACK, NOISE_SECONDS = 1.15, 1.0  # a growth is marked beyond n log n times the one and by more than the other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=[1000, 10000, 120625])
    parser.add_argument("--epochs", type=int, default=2, help="of the fusion; the paper's are 30")
    parser.add_argument("--rounds", type=int, default=1, help="of self-training; the paper's are 10")
    parser.add_argument("--folder", type=Path, help="where the repositories are made; default: a temporary folder")
    parser.add_argument("--before", metavar="REV", help="a commit whose code runs first, on the same corpus")
    parser.add_argument("--step", choices=sorted(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(STEPS[options.step]()))
        return
    found: dict[int, dict[str, tuple[float, float]]] = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found[size] = measure(Path(folder), size, options.epochs, options.rounds, options.before)
    print(table(found))


# ---------------------------------------------------------------- measuring


def measure(
    folder: Path, size: int, epochs: int, rounds: int, before: str | None
) -> dict[str, tuple[float, float]]:
    """(seconds, peak GB) of every step, by name, in order."""
    repository = folder / "repository"
    make_repository(repository, size, epochs, rounds)
    found: dict[str, tuple[float, float]] = {}

    def step(name: str, *command: str) -> str:
        found[name], output = timed(repository, *command)
        print(f"{size}: {name}: {found[name][0]:.1f} s, {found[name][1]:.2f} GB", file=sys.stderr, flush=True)
        return output

    def inner(name: str, label: str = "") -> None:
        """A step of this module: its own seconds, without the interpreter's start."""
        label = name + label
        seconds = json.loads(step(label, "python", "-m", "benchmarks.scale", "--step", name).splitlines()[-1])
        found[label] = seconds, found[label][1]

    def fuse(label: str) -> None:
        inner("stores: read", label)
        for stage in ("pretrain_fusion", "train_fusion", "nested_cv", "baselines", "self_train", "evaluate"):
            if (repository / f"stages/{stage}.py").exists():  # an earlier commit has fewer
                step(stage + label, "python", "-m", f"stages.{stage}")

    inner("manifest: write")
    inner("manifest: read")
    step("split_folds", "python", "-m", "stages.split_folds")
    make_stores(repository)
    inner("plan: 99 % done")
    inner("plan: all done")
    if before:
        with code_of(before, repository, epochs, rounds):
            timed(repository, "python", "-m", "stages.gather_features")
            fuse(f", {before}")
    step("gather_features", "python", "-m", "stages.gather_features")
    fuse("")
    inner("report page")
    page = (repository / "reports/report.html").stat().st_size
    print(f"{size}: report.html: {page / 1e6:.2f} MB", file=sys.stderr)
    step("dvc commit (all new)", "dvc", "commit", "-q", "-f")
    step("dvc status", "dvc", "status")
    ran = step("dvc repro, nothing to do", "dvc", "repro")
    if "Running stage" in ran:
        raise SystemExit(f"dvc repro ran something:\n{ran}")
    step("dvc push", "dvc", "push", "-q")
    step("dvc push, nothing new", "dvc", "push", "-q")
    return found


def timed(folder: Path, *command: str) -> tuple[tuple[float, float], str]:
    """((seconds, GB of the largest of the command's processes), its stdout). Stops the benchmark where it fails."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1",
                                "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed in {folder}")
        output.seek(0)
        print(f"{' '.join(command)}: processor {usage.ru_utime + usage.ru_stime:.1f} s", file=sys.stderr)
        return (seconds, usage.ru_maxrss / 1e6), output.read()


@contextmanager
def code_of(revision: str, repository: Path, epochs: int, rounds: int) -> Iterator[None]:
    """The repository with the stages, dvc.yaml and params of another commit."""
    names, aside = ("stages", "dvc.yaml", "params.yaml"), repository.parent / "aside"
    aside.mkdir()
    for name in names:
        (repository / name).rename(aside / name)
    archive = subprocess.run(["git", "archive", revision, *names], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(repository)], input=archive.stdout, check=True)
    set_params(repository, epochs, rounds)
    try:
        yield
    finally:
        shutil.rmtree(repository / "stages")
        for name in names:
            (aside / name).rename(repository / name)
        aside.rmdir()


def table(found: dict[int, dict[str, tuple[float, float]]]) -> str:
    sizes = list(found)
    lines = ["| step | " + " | ".join(f"{size:,} clips, s" for size in sizes) + " | peak GB |",
             "|---|" + "---|" * (len(sizes) + 1)]
    for name in found[sizes[0]]:
        cells = []
        for before, size in zip([None, *sizes], sizes, strict=False):
            seconds = found[size][name][0]
            cells.append(f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}")
            if before:
                growth = seconds / found[before][name][0]
                allowed = SLACK * size * math.log(size) / (before * math.log(before))
                late = seconds - allowed * found[before][name][0]
                cells[-1] += f" (x {growth:.1f}){' (!)' if late > NOISE_SECONDS else ''}"
        peak = max(found[size][name][1] for size in sizes)
        lines.append(f"| {name} | {' | '.join(cells)} | {peak:.1f} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- steps of this module


def write_manifest_again() -> float:
    clips = read_manifest()
    start = time.perf_counter()
    write_manifest(clips)
    return time.perf_counter() - start


def read_manifest_once() -> float:
    start = time.perf_counter()
    read_manifest()
    return time.perf_counter() - start


class NoWork:
    """Random features: what resuming costs without the encoder."""

    attributes: Mapping[str, Any] = {}

    def open(self, device: str, workers: int | None = None) -> None: ...

    def close(self) -> None: ...

    def shards(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, list[Row]]]:
        for shard in shards:
            yield shard, [feature(np.random.default_rng([*clip.digest]), PLANNED, clip.clip_id) for clip in shard.clips]


def resume() -> float:
    """Plan over finished parts, compute what is missing, link all into the out folder."""
    params = load()
    inputs = [Input(clip.clip_id, clip.clip_id, bytes.fromhex(clip.digest)) for clip in read_manifest()]
    start = time.perf_counter()
    write_store(planned(), inputs, NoWork(), params, ["cpu"])
    return time.perf_counter() - start


def resume_one_percent() -> float:
    parts = sorted((PARTS / planned().stage).rglob("*.h5"))
    for part in parts[:: 100]:
        part.unlink()
    return resume()


def planned() -> Target:
    return Target(f"extract@{PLANNED}", Path("features") / PLANNED, "features", attributes(PLANNED), "benchmark")


def read_stores() -> float:
    """Every modality's features into the matrices that the fusion takes."""
    from stages.fusion.features import load_inputs

    params = load()
    start = time.perf_counter()
    load_inputs(params.fusion.modalities, params.corpus.labels)
    return time.perf_counter() - start


def render_page() -> float:
    """The report as evaluate makes it, from the predictions on: tables, charts and the page."""
    from stages.evaluation import figures
    from stages.evaluation.artefacts import read_run
    from stages.evaluation.report import render_report

    params = load()
    start = time.perf_counter()
    run = read_run(params.corpus.labels)
    details = figures.details(run, params)
    predictions = figures.prediction_table(run, details["calibration"]["temperature"])
    render_report(run, params, details, predictions, None)
    return time.perf_counter() - start


STEPS: dict[str, Callable[[], float]] = {
    "manifest: write": write_manifest_again,
    "manifest: read": read_manifest_once,
    "plan: 99 % done": resume_one_percent,
    "plan: all done": resume,
    "stores: read": read_stores,
    "report page": render_page,
}


# ---------------------------------------------------------------- the synthetic corpus


def make_repository(folder: Path, size: int, epochs: int, rounds: int) -> None:
    """The committed code with params for a csv corpus of `size` clips; files of a few bytes stand for the clips."""
    names = subprocess.run(["git", "ls-files", "--", *TRACKED], cwd=ROOT, text=True, capture_output=True, check=True)
    for name in names.stdout.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    timed(folder, "git", "init", "-q")
    timed(folder, "dvc", "remote", "add", "-q", "-d", "store", str(folder.parent / "remote"))
    labels = set_params(folder, epochs, rounds)
    rng = np.random.default_rng(0)
    clips, truth, rankings = [], [], []
    (folder / "data/raw").mkdir()
    splits = np.where(np.arange(size) < round(SPLITS["labelled"] * size), "labelled", "unlabelled")  # as MER2024's are
    others = np.flatnonzero(splits != "labelled")
    splits[rng.permutation(others)[: round(SPLITS["test"] * size)]] = "test"
    turns = {split: itertools.cycle(labels) for split in ("labelled", "unlabelled", "test")}
    for i, split in enumerate(splits.tolist()):
        clip_id, label = f"samplenew3_{i:08d}", next(turns[split])
        text = "".join(rng.choice(ALPHABET, rng.integers(5, 40)))
        (folder / f"data/raw/{clip_id}.mp4").write_text(clip_id)
        clips.append(Clip(clip_id, f"{clip_id}.mp4", split, label if split == "labelled" else "", text, "",
                          4.5, 12, rng.bytes(32).hex()))
        if split == "test":
            truth.append((clip_id, label))
        rankings.append({"transcript": text, "ranking": labels, "clip_ids": [clip_id]})
    write_manifest(clips, folder / "data/manifest.csv")
    write_rows(folder / "data/raw/clips.csv", ["path", "split", "label"], [(c.path, c.split, c.label) for c in clips])
    write_rows(folder / "data/truth.csv", ["clip_id", "label"], truth)
    write_rows(folder / "data/duplicates.csv", DUPLICATES, [])
    write_rows(folder / "data/transcripts.csv", ["clip_id", "transcript", "source"],
               [(c.clip_id, c.transcript, "corpus") for c in clips])
    (folder / "data/rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rankings))
    with chdir(folder):  # the stage itself would miss the demo's checkpoints
        params = load()
        write_plan(left_out(params) | {f"extract/{name}": row_left_out(params, name) for name in params.extractors})
    for made in ("data/demo", "models/demo", "models/emovclip"):
        (folder / made).mkdir()
        (folder / made / "README.txt").write_text("nothing\n")
    (folder / "models/emovclip/curves.csv").write_text("fold,epoch,train_loss\n0,0,1.0\n")


def set_params(folder: Path, epochs: int, rounds: int) -> list[str]:
    """Change params.yaml to the benchmark's corpus; its labels."""
    values = YAML().load(folder / "params.yaml")
    values["corpus"] |= {"adapter": "csv", "path": "data/raw", "truth": None, "shard_size": SHARD}
    values["fusion"] |= {"epochs": epochs, "modalities": list(DIMENSIONS)}
    values["extractors"] = {name: values["extractors"][name] for name in DIMENSIONS}
    values["self_training"]["rounds"] = rounds
    values["folds"]["count"] = FOLDS
    values["runtime"]["device"] = "cpu"
    YAML().dump(values, folder / "params.yaml")
    return list(values["corpus"]["labels"])


def make_stores(folder: Path) -> None:
    """Media stores with next to nothing per clip, and features; those of PLANNED by the engine, so as parts too."""
    clip_ids = [clip.clip_id for clip in read_manifest(folder / "data/manifest.csv")]
    rng = np.random.default_rng(0)
    picture = cv2.imencode(".jpg", cv2.resize(rng.integers(0, 256, (4, 4, 3), np.uint8), (64, 64)))[1].tobytes()
    sound = np.zeros(8, np.int16)
    fill_store(folder / "data/audio", "audio", clip_ids, lambda c: Row(c, values=sound), {"sample_rate": 24000})
    for name in ("frames", "faces"):
        fill_store(folder / "data" / name, "images", clip_ids, lambda c: Row(c, values=[picture]), {})
    for name in DIMENSIONS:
        if name != PLANNED:
            row = partial(feature, rng, name)
            fill_store(folder / "features" / name, "features", clip_ids, row, attributes(name))
    timed(folder, "python", "-m", "benchmarks.scale", "--step", "plan: all done")  # the first time nothing is done


def fill_store(
    folder: Path, kind: str, clip_ids: Sequence[str], row: Callable[[str], Row], attributes: dict[str, Any]
) -> None:
    names: list[str] = []
    for start in range(0, len(clip_ids), SHARD):
        names.append(f"shard-{len(names):05d}.h5")
        rows = [row(clip_id) for clip_id in clip_ids[start : start + SHARD]]
        write_shard(folder / names[-1], kind, rows, {**attributes, "fingerprint": names[-1]})
    write_index(folder, names)


def feature(rng: np.random.Generator, name: str, clip_id: str) -> Row:
    """A clip's random pooled features."""
    what = attributes(name)
    mean = rng.standard_normal(what["folds"] * what["dimension"], np.float32)
    return Row(clip_id, mean=mean, var=mean**2 if what["variance"] else None)


def attributes(name: str) -> dict[str, Any]:
    per_fold = name == "emovclip"
    return {"extractor": name, "encoder": name, "dimension": DIMENSIONS[name], "variance": not per_fold,
            "folds": FOLDS if per_fold else 1, "leaky": False}


if __name__ == "__main__":
    main()
