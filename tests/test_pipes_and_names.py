"""Predict and the program `mer` with names of any bytes, terminals of any encoding and readers that go away."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from clip_files import write_clip
from predict_runs import error_of, run_predict

from stages.commands import predict

ROOT = Path(__file__).parent.parent
PREDICT = [sys.executable, "-m", "stages.commands.main", "predict"]
NAMES = {
    "GBK, as unzip leaves it": b"\xc4\xe3\xba\xc3.mp4",
    "Latin-1": b"caf\xe9.mp4",
    "a lone continuation byte": b"a\x80.mp4",
    "a cut-off sequence": b"\xe4\xbd.mp4",
    "a newline": b"a\nb.mp4",
    "an escape sequence": b"\x1b[31mred.mp4",
    "Chinese": "你好.mp4".encode(),
}


def run(folder: Path, *arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PREDICT, *arguments], cwd=folder, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


@pytest.fixture(scope="module")
def named(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with trained models, and a sound of every name."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("named") / "repository"))
    write_clip(folder / "one.mp4", 0.5, picture=False)
    (folder / "named").mkdir()
    for name in NAMES.values():
        shutil.copyfile(folder / "one.mp4", os.fsdecode(os.fsencode(folder / "named") + b"/" + name))
    return folder


def test_every_name_has_its_row_in_the_file_and_on_the_standard_output(named: Path) -> None:
    done = run(named, "named", "--out", "o.csv", "--html", "o.html")
    assert done.returncode == 0, done.stderr
    with open(named / "o.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    names = {row["clip"] for row in found}
    assert len(names) == len(NAMES) and all(row["prediction"] for row in found)
    assert {"named/\\xc4\\xe3\\xba\\xc3.mp4", "named/a\\nb.mp4", "named/你好.mp4"} <= names
    assert "named/caf\\xe9.mp4" in (named / "o.html").read_text(encoding="utf-8")
    printed = run(named, "named")
    assert printed.returncode == 0 and printed.stdout == (named / "o.csv").read_bytes()


TERMINALS = {
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "gbk": {"PYTHONIOENCODING": "gbk"},
    "ascii, strict": {"PYTHONIOENCODING": "ascii:strict"},
    "LANG=C": {"LANG": "C", "LC_ALL": "C"},
    "LANG=C without Python's help": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.mark.parametrize("terminal", TERMINALS)
def test_terminals_of_other_encodings(named: Path, terminal: str) -> None:
    """Names, words and the standard error's warning all hold what most of these can't show."""
    (named / "空.mp4").touch()
    (named / "words.csv").write_text("name,transcript\none,我今天很高兴\n", encoding="utf-8")
    done = run(named, "one.mp4", os.fsencode("空.mp4"), "--transcripts", "words.csv", **TERMINALS[terminal])
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3 and b"Traceback" not in done.stderr
    assert b"warning: " in done.stderr
    asked = [*PREDICT, "one.mp4", "nowhere-你.mp4", "--transcript", "我"]
    done = subprocess.run(asked, cwd=named, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT),
                                                                      **TERMINALS[terminal]})
    assert done.returncode == 1 and done.stderr.startswith(b"error: nowhere-") and done.stderr.count(b"\n") == 1


def test_words_in_a_terminal_without_utf8() -> None:
    assert [predict.words(text) for text in ("我", "é", "我".encode().decode("ascii", "surrogateescape"))] == [
        "我", "é", "我"]


@pytest.mark.parametrize(("arguments", "expected"), [
    ([b"\xff\xfe.mp4"], "\\xff\\xfe.mp4: no such file or folder"),
    (["one.mp4", "--transcript", b"\xc4\xe3"], "--transcript: found bytes that are no UTF-8"),
    (["one.mp4", "--transcripts", b"\xc4.csv"], "can't be read as a CSV of transcripts"),
    (["one.mp4", "--bundle", b"\xc4"], "no release bundle"),
    (["one.mp4", "--out", b"one.mp4/\xc4"], "is a file that can't be reached"),
    *[(["one.mp4", option, out], f"{out}") for option in ("--out", "--html")
      for out in ("/dev/stdout", "/dev/full", "/dev/fd/1", "named", "one.mp4/x.csv", "/proc/x/y.csv", "fifo")],
])
def test_arguments_are_refused_before_the_work_and_never_with_a_traceback(
    named: Path, arguments: list[str | bytes], expected: str, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(named)
    if not Path("fifo").exists():
        os.mkfifo("fifo")
    run_predict(*map(os.fsdecode, arguments), expect=1)
    assert expected in error_of(capfd)


@pytest.mark.parametrize(("arguments", "code"), [
    (["one.mp4", "clips"], 141),  # 128 + SIGPIPE
    (["--help"], 0),  # argparse passes over it
])
@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_a_reader_that_goes_away_ends_it_like_other_programs(
    named: Path, arguments: list[str], code: int, both: bool
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*PREDICT, *arguments], cwd=named, stdout=writer,
                          stderr=writer if both else subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    os.close(writer)
    assert done.returncode == code
    assert both or b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_head_gets_its_lines(named: Path) -> None:
    command = f"set -o pipefail; {' '.join(PREDICT)} named | head -2; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=named, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[0].startswith(b"clip,") and lines[2] in (b"0", b"141")  # 0: it was faster
    assert b"Traceback" not in done.stderr and b"Broken" not in done.stderr


def test_a_full_disk_behind_the_standard_output_is_one_line(named: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*PREDICT, "one.mp4"], cwd=named, stdout=full, stderr=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(b"error: No space left on device; make room")
