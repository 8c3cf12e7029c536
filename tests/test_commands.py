"""The program `mer`, and how commands and stages end."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.commands.main import COMMANDS, dispatch
from stages.engine.errors import PipelineError, run_stage

MER = Path(sys.executable).with_name("mer")
HEAVY = {"torch", "numpy", "pandas", "transformers", "h5py", "cv2", "dvc"}
IMPORTED = """
import sys
from stages.commands.main import main
sys.argv = ["mer", "--help"]
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def mer(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed program, called in this folder."""
    return subprocess.run([MER, *arguments], cwd=folder, capture_output=True, text=True)


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True)
    assert done.returncode == 0
    for name, (_, summary) in COMMANDS.items():
        assert [line.split(maxsplit=1) for line in done.stdout.splitlines()].count([name, summary]) == 1
    imported = {name.partition(".")[0] for name in done.stderr.split()}
    assert "argparse" in imported and not imported & HEAVY


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_its_own_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        dispatch([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mer {name} [-h]")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_ends_a_command_before_it_does_anything(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        dispatch([name, "--nonsense"])
    assert ended.value.code == 2
    assert f"mer {name}: error: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        dispatch([])
    assert ended.value.code == 0
    assert "import-features" in capsys.readouterr().out


def test_an_unknown_command_is_one_line_with_the_known_ones(tmp_path: Path) -> None:
    done = mer(tmp_path, "predcit", "--help")
    assert done.returncode == 1
    assert done.stderr == f"error: mer: found the command predcit, expected one of {', '.join(COMMANDS)}\n"


def test_mer_acts_on_the_folder_that_it_is_called_in(tmp_path: Path) -> None:
    done = mer(tmp_path, "tables", "hubert")
    assert (done.returncode, done.stderr) == (1, "error: params.yaml: not found; run from the repository root\n")


def test_a_copy_of_the_repository_runs_its_own_code_and_never_the_installed(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/__init__.py").touch()
    (tmp_path / "stages/corpus.py").write_text("print('the copy')\n")
    done = subprocess.run([sys.executable, "-m", "stages.corpus"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "the copy\n")
    done = subprocess.run([sys.executable, "-m", "stages.evaluate"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "No module named stages.evaluate" in done.stderr


def opened_by_reader(fifo: Path, process: subprocess.Popen[str]) -> int:
    """The fifo's writing end, once the process has opened the other."""
    while process.poll() is None:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            time.sleep(0.01)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("command", [[MER, "tables"], [sys.executable, "-m", "stages.commands.tables"],
                                     [sys.executable, "-m", "stages.split_folds"]])
def test_an_interrupt_is_one_line_and_exit_code_130(command: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "params.yaml")  # whoever reads it waits for a writer, so the interrupt comes within main
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        writer = opened_by_reader(tmp_path / "params.yaml", process)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
        os.close(writer)
    assert (process.returncode, error) == (130, "interrupted\n")


def test_errors_for_the_user_are_one_line_and_others_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        raise error

    for error, expected in ((PipelineError("a.csv: no rows"), "error: a.csv: no rows\n"),
                            (OSError(errno.ENOSPC, "No space left on device", "a.csv"),
                             "error: a.csv: No space left on device; make room, ")):
        with pytest.raises(SystemExit) as ended:
            run_stage(fail, error)
        assert ended.value.code == 1
        line = capsys.readouterr().err
        assert line.startswith(expected) and line.count("\n") == 1
    with pytest.raises(ValueError, match="unforeseen"):
        run_stage(fail, ValueError("unforeseen"))
