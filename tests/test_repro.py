"""`mer repro`: DVC itself runs small stages, two at a time where they may, to what a plain `dvc repro` gives."""

import importlib
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from test_pipeline import Repository

from stages.commands.repro import CORES, GPU, NEITHER, USES, plan, run_all, uses
from stages.engine.errors import PipelineError
from stages.engine.params import load

ROOT = Path(__file__).parent.parent
WAIT = "for _ in range(600):\n    if pathlib.Path('{0}').exists(): break\n    time.sleep(0.1)\n" \
       "else: sys.exit('error: {0} never came')\n"  # a minute: for a test that fails
HERE = "pathlib.Path(own + '.pid').write_text(str(os.getpid()))\npathlib.Path(own + '.here').touch()\n"
AS_A_COMMAND = """
import sys
sys.path.insert(0, sys.argv.pop())
from stages.commands import repro
from stages.engine.errors import run_stage
repro.uses = lambda stage, p, gpu: stage  # as if each had a device of its own
run_stage(repro.main, [])
"""
TOGETHER = {"crop_faces": GPU, "extract_audio": CORES}  # of one, the other waits for a sign of life


def stage(code: str, out: str, *deps: str) -> dict:
    return {"cmd": f"{sys.executable} {out}.py", "deps": [f"{out}.py", *deps], "outs": [out], "code": code}


def project(folder: Path, **codes: str) -> Repository:
    """A DVC repository: corpus, then extract_audio beside crop_faces (which run `codes`), then gather_features."""
    repository = Repository(folder)
    stages = {
        "corpus": stage("", "manifest"),
        "extract_audio": stage(codes.get("extract_audio", ""), "audio", "manifest"),
        "crop_faces": stage(codes.get("crop_faces", ""), "faces", "manifest"),
        "gather_features": stage("", "gathered", "audio", "faces"),
    }
    for name, entry in stages.items():
        out = entry["outs"][0]
        code = f"import os, pathlib, sys, time\nown = '{out}'\n{entry.pop('code')}\n"
        code += f"pathlib.Path(own).write_text('{name}')\n"
        (folder / f"{out}.py").write_text(code)
    YAML().dump({"stages": stages}, folder / "dvc.yaml")
    repository.run("dvc", "init", "-q", "--no-scm")
    return repository


def meeting(own: str, other: str) -> str:
    return f"pathlib.Path('{own}').touch()\n" + WAIT.format(other)


def use(name: str) -> str:
    return TOGETHER.get(name, NEITHER)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"  # ended, but nobody has asked


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    importlib.import_module("dvc")  # its handlers write to what was stderr then: capsys' of a test that has ended
    monkeypatch.setattr(logging.getLogger("dvc"), "handlers", [])
    return tmp_path


def test_stages_of_different_uses_run_at_once_to_what_dvc_repro_gives(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = project(folder, extract_audio=meeting("a", "b"), crop_faces=meeting("b", "a"))
    needs = plan([])
    assert needs == {"corpus": set(), "extract_audio": {"corpus"}, "crop_faces": {"corpus"},
                     "gather_features": {"corpus", "extract_audio", "crop_faces"}}
    run_all(needs, use)
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("gather_features: done in ")
    assert plan([]) == {}
    lock = (folder / "dvc.lock").read_bytes()
    assert repository.stages_run(repository.run("dvc", "repro")) == []
    shutil.rmtree(folder / ".dvc/cache")  # with the run cache, or nothing would run
    for name in ("dvc.lock", "manifest", "audio", "faces", "gathered"):
        (folder / name).unlink()
    assert len(repository.stages_run(repository.run("dvc", "repro"))) == 4
    yaml = YAML(typ="safe")
    assert yaml.load(lock) == yaml.load((folder / "dvc.lock").read_bytes())


def test_stages_of_one_use_run_one_after_another(folder: Path) -> None:
    alone = "os.mkdir('lock'); time.sleep(0.5); os.rmdir('lock')"  # mkdir fails where the folder is there
    project(folder, extract_audio=alone, crop_faces=alone)
    run_all(plan([]), lambda name: CORES)
    assert plan([]) == {}


def test_only_what_a_target_needs_is_planned_and_only_what_changed(folder: Path) -> None:
    project(folder)
    assert set(plan(["extract_audio"])) == {"corpus", "extract_audio"}
    run_all(plan([]), use)
    (folder / "faces.py").write_text("open('faces', 'w')")
    assert set(plan([])) == {"crop_faces", "gather_features"}
    assert plan(["extract_audio"]) == {}
    with pytest.raises(PipelineError, match="dvc: .*transcribe"):
        plan(["transcribe"])


def test_a_failing_stage_stops_the_others_with_its_own_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project(folder, extract_audio="pathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)",
            crop_faces=WAIT.format("pid") + "time.sleep(0.5); print('half of it'); sys.exit('error: no room')")
    with pytest.raises(PipelineError, match="^crop_faces: no room$"):
        run_all(plan([]), use)
    assert gone(int((folder / "pid").read_text()))
    assert capsys.readouterr().err.splitlines()[-1] == "crop_faces: half of it"
    assert set(plan([])) == {"extract_audio", "crop_faces", "gather_features"}  # and no lock is left


def interrupted(folder: Path, code: str, numbers: list[int]) -> tuple[int, str]:
    """Exit code and last line of `mer repro` with two stages of this code, sent each signal once both say "here"."""
    project(folder, extract_audio=code, crop_faces=code)
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    command = [sys.executable, "-c", AS_A_COMMAND, str(ROOT)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for number in numbers:
            for out in ("audio", "faces"):
                exec(WAIT.format(f"{out}.here"), {"pathlib": pathlib, "sys": sys, "time": time})
            for path in folder.glob("*.here"):
                path.unlink()
            process.send_signal(number)
        _, error = process.communicate()
    assert all(gone(int((folder / f"{out}.pid").read_text())) for out in ("audio", "faces"))
    assert set(plan([])) == {"extract_audio", "crop_faces", "gather_features"}  # and no lock is left
    return process.returncode, error.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_stage(folder: Path, number: int) -> None:
    assert interrupted(folder, HERE + "time.sleep(600)", [number]) == (130, "interrupted")


def test_a_second_interrupt_kills_what_goes_on(folder: Path) -> None:
    stubborn = "import signal\nsignal.signal(signal.SIGINT, lambda *_: pathlib.Path(own + '.here').touch())\n" + HERE
    code = stubborn + "while True: time.sleep(600)"
    assert interrupted(folder, code, [signal.SIGINT, signal.SIGINT]) == (130, "interrupted")


def test_progress_bars_are_told_now_and_then_where_there_is_no_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = r"[print(f'\rcrop_faces: {i}%', end='', flush=True) for i in range(100)]; print('\rcrop_faces: 100%')"
    project(folder, crop_faces=bar)
    run_all(plan(["crop_faces"]), use)
    told = [line for line in capsys.readouterr().err.splitlines() if "%" in line]
    assert told == ["crop_faces: 0%", "crop_faces: 100%"]


def test_what_a_stage_uses() -> None:
    p = load(ROOT / "params.yaml")
    names = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    assert set(USES) == set(names)
    assert uses("extract@hubert", p, gpu=True) == GPU and uses("extract@hubert", p, gpu=False) == CORES
    assert uses("crop_faces", p, gpu=True) == CORES
    assert uses("rank_emotions", p, gpu=True) == uses("split_folds", p, gpu=False) == NEITHER
    local = p.rankings.model_copy(update={"providers": {"local": {"provider": "transformers"}}})
    assert uses("rank_emotions", p.model_copy(update={"rankings": local}), gpu=True) == GPU
    acoustic = p.extractors["hubert"].model_copy(update={"encoder": "acoustic"})
    assert uses("extract@a", p.model_copy(update={"extractors": {"a": acoustic}}), gpu=True) == CORES
