"""Runs stages in a project folder, kills them, and compares what they leave; see test_crashes.py.

As a program it is a server: it imports the heavy libraries once and forks a process group for each line of its
input, `stages.<module> <arguments>`, so that a kill at a random moment hits the stage's work and not its imports.
"""

import contextlib
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HEAVY = ("pandas", "sklearn.model_selection", "safetensors.torch", "stages.encoders.hubert", "stages.encoders.baichuan",
         "stages.encoders.emovclip_training", "stages.encoders.asr", "stages.fusion.self_training", "open_clip",
         "transformers.models.hubert.modeling_hubert", "transformers.models.wav2vec2.modeling_wav2vec2", "transformers")


def serve() -> None:
    import importlib

    sys.path.insert(0, str(ROOT))
    for name in HEAVY:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        module, *arguments = line.split()
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            log = os.open(".cache/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            null = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((null, 0), (log, 1), (log, 2)):
                os.dup2(source, target)
            sys.argv = [module, *arguments]
            code = 1
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            finally:
                sys.stdout.flush()
                os._exit(code)
        with contextlib.suppress(OSError):
            os.setpgid(child, child)  # whichever of the two comes first
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


@dataclass
class Stage:
    """A stage of the pipeline as dvc.yaml has it, and its outs."""

    name: str
    outs: list[str]
    duration: float = float("inf")  # seconds

    @property
    def command(self) -> str:
        name, _, key = self.name.partition("@")
        return f"stages.{name} {key}"


class Project:
    """A project folder in which stages run one at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
        (folder / ".cache").mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._server = subprocess.Popen([sys.executable, __file__], cwd=folder, env=environment, text=True, bufsize=1,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._server.stdout
        return self._server.stdout.readline().strip()

    def run(self, stage: Stage, kill_after: float | None = None, from_nothing: bool = False) -> bool:
        """Run the stage; with kill_after, kill its process group after so many seconds. Whether it was too late.

        The stage's duration is that of its fastest run from nothing: the machine's load varies.
        """
        assert self._server.stdin
        self._server.stdin.write(stage.command + "\n")
        group = int(self._read())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            return int(self._read()) == 0
        start = time.monotonic()
        status = int(self._read())
        stage.duration = min(stage.duration, time.monotonic() - start) if from_nothing else stage.duration
        assert status == 0, f"{stage.name}: status {status}\n" + (self.folder / ".cache/log").read_text()[-3000:]
        return True

    def files(self, names: list[str]) -> dict[str, Path]:
        """Every file of the outs, temporary ones left out, by its name relative to the project."""
        found = {}
        for name in names:
            path = self.folder / name
            for file in [path] if path.is_file() else path.rglob("*"):
                if file.is_file() and not (file.name.startswith(".") and file.name.endswith(".tmp")):
                    found[str(file.relative_to(self.folder))] = file
        return found

    def contents(self, names: list[str]) -> dict[str, bytes]:
        return {name: path.read_bytes() for name, path in self.files(names).items()}

    def remove(self, stage: Stage) -> None:
        """As DVC does before it runs a stage."""
        for name in stage.outs:
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)

    def forget_parts(self, stage: Stage) -> None:
        shutil.rmtree(self.folder / ".cache/parts" / stage.name, ignore_errors=True)

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait()


def check_nothing_looks_done_and_is_not(project: Project, stage: Stage, whole: dict[str, bytes]) -> None:
    """After a kill: each file of the outs is as in a whole run, and each finished part can be read."""
    from safetensors import safe_open

    from stages.engine.store import check_shard

    for name, content in project.contents(stage.outs).items():
        assert whole.get(name) == content, f"{stage.name}: {name} looks done and is not"
    parts = project.folder / ".cache/parts" / stage.name
    for path in [p for p in parts.rglob("*") if p.is_file() and not p.name.startswith(".")]:
        if path.suffix == ".h5":
            check_shard(path, f"{path.parent.name}-{path.stem}")
        else:
            with safe_open(path, framework="np") as file:
                assert list(file.keys())


def kill_repeatedly(project: Project, stage: Stage, kills: int, series: int, seed: int) -> dict[str, Any]:
    """Kill the stage `kills` times at random moments; after every `series` of them it is let end, and starts anew.

    Half of the runs find the outs of an earlier one, hard-linked as from DVC's cache: those must never change. A kill
    that comes when the stage has ended does not count.
    """
    rng = random.Random(f"{seed} {stage.name}")
    whole = project.contents(stage.outs)
    kept = project.folder / ".cache/kept"
    done = completed = late = 0
    project.forget_parts(stage)
    project.remove(stage)
    project.run(stage, from_nothing=True)
    assert project.contents(stage.outs) == whole, f"{stage.name}: two uninterrupted runs differ"
    while done < kills:
        project.forget_parts(stage)
        for i in range(min(series, kills - done)):
            if i % 2 == 0:
                project.remove(stage)
            else:
                link(project, whole, kept)
            ended = project.run(stage, rng.uniform(0, stage.duration))
            late += ended
            done += not ended
            check_nothing_looks_done_and_is_not(project, stage, whole)
            if ended:
                break
        project.remove(stage)
        project.run(stage)
        completed += 1
        assert project.contents(stage.outs) == whole, f"{stage.name}: differs from the uninterrupted run"
        for name, content in whole.items():
            linked = kept / name
            assert not linked.exists() or linked.read_bytes() == content, f"{stage.name}: wrote into the link {name}"
    shutil.rmtree(kept, ignore_errors=True)
    return {"stage": stage.name, "seconds": round(stage.duration, 1), "kills": done, "too late": late,
            "completed": completed, "lost": 0}


def link(project: Project, whole: dict[str, bytes], kept: Path) -> None:
    """Outs of an earlier run with other content, each a hard link of a file in `kept`."""
    for name, content in whole.items():
        source, target = kept / name, project.folder / name
        source.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not source.exists():
            source.write_bytes(content)
        target.unlink(missing_ok=True)
        os.link(source, target)


if __name__ == "__main__":
    serve()
