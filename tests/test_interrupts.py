"""Ctrl-C, as a real signal: one line, exit code 130, nobody left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from clip_files import write_clip
from predict_runs import change
from test_commands import opened_by_reader

from stages.engine.files import file_digest
from stages.engine.manifest import Clip, write_manifest

ROOT = Path(__file__).parent.parent
PATIENCE = 60  # seconds; far more than anything here takes


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    """A program in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def wait_until(true: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def interrupt(process: subprocess.Popen[str], group: bool) -> None:
    """The signal, and what is expected of every program."""
    began = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE)
    lines = [line for line in re.split(r"[\r\n]+", error) if line and not re.match(r"\w+: +\d+%\|", line)]
    assert (process.returncode, lines) == (130, ["interrupted"])
    _, alive = psutil.wait_procs(began, timeout=PATIENCE)
    assert not alive


@pytest.fixture
def corpus(trained_copy: Path) -> Path:
    """Three clips and their manifest; faces by an OpenFace that never ends and says in `begun` that it has begun."""
    write_clip(Path("clips/a.mp4"), 1.0)
    write_manifest([Clip(name, "a.mp4", "labelled", "anger", "", "", 1.0, 1, file_digest("clips/a.mp4"))
                    for name in ("a", "b", "c")])
    Path("openface").write_text("#!/bin/sh\ntouch begun\nsleep 600 &\nwait\n")
    Path("openface").chmod(0o755)
    faces = {"faces.detector": "openface", "faces.openface_binary": "./openface"}
    for key, value in {"corpus.path": "clips", **faces}.items():
        change(key, value)
    for name in ("dvc.yaml", "stages"):
        Path(name).symlink_to(ROOT / name)
    return trained_copy


@pytest.mark.parametrize("group", [False, True], ids=["the program", "its group, as a terminal and dvc do"])
def test_a_stage_ends_with_its_workers_and_what_they_run(corpus: Path, group: bool) -> None:
    process = start(corpus, sys.executable, "-m", "stages.crop_faces")
    wait_until(Path("begun").exists, process)
    assert len(psutil.Process(process.pid).children(recursive=True)) > 3
    interrupt(process, group)


def test_workers_that_are_just_starting_say_nothing(corpus: Path) -> None:
    process = start(corpus, sys.executable, "-m", "stages.crop_faces")
    wait_until(lambda: len(psutil.Process(process.pid).children()) > 1, process)
    interrupt(process, group=True)


@pytest.mark.parametrize("arguments", [["-m", "stages.crop_faces"], ["-m", "stages.commands.main", "repair", "x"],
                                       [str(Path(sys.executable).with_name("mer")), "repair", "x"]])
def test_a_program_that_is_still_importing(arguments: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "h5py.py").write_text("open('fifo').read()\n")  # found first: the import waits for a writer
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with subprocess.Popen([sys.executable, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                          env=environment) as process:
        writer = opened_by_reader(tmp_path / "fifo", process)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=PATIENCE)
        os.close(writer)
    assert (process.returncode, error) == (130, "interrupted\n")


PROGRAMS = {
    "a thread that computes on": """
def main():
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(time.sleep, 600)
        begun.touch()
        future.result()
""",
    "an import in C that makes an error of its own of it": """
def main():
    begun.touch()
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        raise ImportError("initialisation failed")
""",
    "one that swallows it": """
def main():
    begun.touch()
    for _ in range(2):
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            pass
""",
    "a process for each device": """
class Slow:
    attributes = {}
    def open(self, device, workers=None):
        begun.touch()
    def close(self):
        pass
    def shards(self, shards):
        time.sleep(600)
        yield from ()

def main():
    params = load(ROOT / "params.yaml")
    params = params.model_copy(update={"corpus": params.corpus.model_copy(update={"shard_size": 1})})
    inputs = [Input(name, name, b"") for name in "abc"]
    write_store(Target("slow", Path("out"), "text", {}, "fingerprint"), inputs, Slow(), params, ["cpu", "cpu"])
""",
}
HEAD = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stages.engine.errors import run_stage
from stages.engine.extraction import write_store
from stages.engine.params import load
from stages.engine.work import Input, Target
ROOT, begun = Path({root!r}), Path("begun")
"""


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("program", PROGRAMS)
def test_whatever_the_program_does(program: str, group: bool, tmp_path: Path) -> None:
    code = HEAD.format(root=str(ROOT)) + PROGRAMS[program] + "\nif __name__ == '__main__':\n    run_stage(main)\n"
    (tmp_path / "program.py").write_text(code)
    process = start(tmp_path, sys.executable, "program.py")
    wait_until((tmp_path / "begun").exists, process)
    interrupt(process, group)


def test_where_it_is_ignored_it_stays_so(tmp_path: Path) -> None:
    code = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + HEAD.format(root=str(ROOT)) + """
def main():
    begun.touch()
    sys.stdin.read()
run_stage(main)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        wait_until((tmp_path / "begun").exists, process)
        process.send_signal(signal.SIGINT)
        assert process.communicate("", timeout=PATIENCE)[1] == "" and process.returncode == 0
