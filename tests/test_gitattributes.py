"""A clone has the bytes that DVC hashed, whatever git is told about line ends."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def git(*arguments: str, folder: Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("setting", ["core.autocrlf=true", "core.autocrlf=input", "core.eol=crlf"])
def test_a_clone_with_other_line_ends_has_the_same_bytes(tmp_path: Path, setting: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    names = ["stages/a.py", "params.yaml", "dvc.yaml", "dvc.lock", "stages/report.html.j2", "data.csv", "a.json",
             "notes.md", "a.toml", "a.txt", "Makefile", ".ci/run"]
    origin = tmp_path / "origin"
    git("init", "-q", str(origin))
    content = dict.fromkeys(names, b"one\ntwo\n")
    content |= {"a.safetensors": b"text\r\nall the same\n", "a.npz": b"P\0\r\n\n"}
    for name, value in content.items():
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        (origin / name).write_bytes(value)
    (origin / ".gitattributes").write_bytes((ROOT / ".gitattributes").read_bytes())
    git("add", "-A", folder=origin)
    git("-c", "user.name=n", "-c", "user.email=n@localhost", "commit", "-qm", "All", folder=origin)
    git("-c", setting, "clone", "-q", str(origin), str(tmp_path / "clone"))
    assert {name: (tmp_path / "clone" / name).read_bytes() for name in content} == content


def test_no_committed_text_has_other_line_ends() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    odd = [line for line in git("ls-files", "--eol").splitlines() if line.startswith(("i/crlf", "i/mixed"))]
    assert not odd
