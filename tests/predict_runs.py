"""The command predict in a repository with trained models, what it answers, and changes there that it must notice."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from yaml_values import set_value

from stages.commands import predict
from stages.engine.errors import run_stage

Rows = dict[str, dict[str, str]]


def run_predict(*arguments: object, expect: int = 0) -> None:
    """The command, with the exit code that it is expected to have."""
    try:
        run_stage(predict.main, list(map(str, arguments)))
    except SystemExit as ended:
        assert ended.code == expect
    else:
        assert expect == 0


def rows(path: Path) -> Rows:
    """The predictions by clip."""
    with open(path, encoding="utf-8", newline="") as file:
        return {row["clip"]: row for row in csv.DictReader(file)}


def numbers(row: dict[str, str]) -> np.ndarray:
    """The probabilities and attentions of a row."""
    return np.array([float(v) for name, v in row.items() if name.startswith(("prob_", "attention_"))])


def error_of(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def word_table(transcripts: dict[str, str]) -> Path:
    """A table of them in the working directory."""
    with open("words.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("name", "chinese"), *transcripts.items()])
    return Path("words.csv")


def change(key: str, value: object) -> None:
    """A value of params.yaml."""
    set_value(Path("params.yaml"), key, value)


def remove(*paths: str) -> Callable[[], None]:
    """Removes these files and folders when called."""

    def act() -> None:
        for path in map(Path, paths):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act
