"""YAML files as DVC reads them, and in one line what is wrong with what they hold."""

import re
from itertools import takewhile
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.engine.errors import PipelineError, one_line

# In a fault's place: which kind of value it would have been
KIND = re.compile(r"int$|literal\[|dict\[|\[(key|number|by label)\]$")


def read_yaml(path: str | Path) -> Any:
    """Parse a YAML 1.2 file. Raises PipelineError where it is missing or is no YAML."""
    try:
        return YAML(typ="safe", pure=True).load(Path(path))
    except FileNotFoundError:
        raise PipelineError(f"{path}: not found; run from the repository root") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path}: not valid YAML: {one_line(error)}") from None


def describe(error: ValidationError) -> str:
    """The first fault as `key: found VALUE, expected ...`, and how many more there are."""
    faults: dict[tuple[Any, ...], list[Any]] = {}  # a value that fits none of several kinds has a fault of each
    for fault in error.errors():
        faults.setdefault(tuple(takewhile(lambda part: not KIND.match(str(part)), fault["loc"])), []).append(fault)
    first = max(next(iter(faults.values())), key=lambda fault: len(fault["loc"]))
    key = ".".join(str(part) for part in first["loc"] if not KIND.match(str(part)))
    found = first["input"]
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        text = f"{key}: unknown parameter (found {_short(found)}); remove it or correct its name"
    elif first["type"] in ("missing", "missing_argument"):
        text = f"{key}: missing; every parameter must be given (params.yaml in git shows them all)"
    elif first["type"] == "value_error":
        text = str(first["ctx"]["error"])
    else:
        expected = first["msg"].removeprefix("Input should be ").removeprefix("a valid ")
        text = f"{key}: found {_short(found)}, expected {expected}"
    return text + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
