"""Writing a file whole or not at all, and never through a link; CSV tables, JSON, safetensors and digests of files."""

import csv
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from stages.engine.errors import PipelineError, one_line

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a new file that takes the place of `path` once the block ends well; text is UTF-8 with plain newlines.

    What `path` was before may be a hard link into DVC's cache: it is left as it is, not written into. Raises OSError
    (disk full, read-only) that names `path`, with nothing left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # other machines may write to the folder too
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # write() and close() do not say which file they mean
            error.filename, error.filename2 = str(path), None
        raise


def require_writable(path: str | Path) -> None:
    """Raises OSError as `replacing` does where it could not begin, before the work whose result it is to take."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch(exist_ok=False)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        error.filename = str(path)
        raise


def empty_folder(path: Path) -> None:
    """Make `path` an empty folder, whatever it was. Raises OSError (read-only) that names `path`."""
    try:
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
    except OSError as error:
        error.filename = str(path)  # rmtree names the file inside
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Indented JSON with a newline at its end."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, "Tensor"], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, from whichever device the tensors are on."""
    from safetensors.torch import save

    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    with replacing(path, "wb") as file:
        file.write(content)


def read_rows(path: str | Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV of ours with at least these columns. Raises PipelineError naming the file and what is missing."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or [])]
            if missing:
                raise PipelineError(f"{path}: found columns {reader.fieldnames}, expected {missing} too")
            return list(reader)
    except FileNotFoundError:
        raise PipelineError(f"{path}: not found; make it with: dvc repro") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise PipelineError(f"{path}: can't be read ({one_line(error)}); make it anew with: dvc repro") from None


def write_rows(path: str | Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV: UTF-8, a header, newlines the same on every platform."""
    with replacing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
