"""Writing a file whole or not at all, and never through a link."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


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


def empty_folder(path: Path) -> None:
    """Make `path` an empty folder, whatever it was. Raises OSError (read-only) that names `path`."""
    try:
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
    except OSError as error:
        error.filename = str(path)  # rmtree names the file inside
        raise
