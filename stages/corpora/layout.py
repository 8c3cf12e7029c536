"""What the adapters share: finding media files, reading label files, and the errors that participants meet."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.engine.errors import PipelineError
from stages.engine.manifest import Split

MEDIA = {".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".wmv"}
SPELLINGS = {"angry": "anger", "happy": "happiness", "sad": "sadness", "worried": "worry"}  # as MER's files have them
SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """One clip as its corpus describes it. `label` is known to the corpus, whatever the split."""

    clip_id: str
    path: str  # relative to the corpus folder
    split: Split
    label: str = ""
    transcript: str = ""
    group: str = ""


def media_files(root: Path, folder: str) -> dict[str, str]:
    """clip name -> path relative to root, sorted by name. Raises PipelineError for a missing or empty folder, or a
    name that occurs twice (a.mp4 and a.avi)."""
    if not (root / folder).is_dir():
        raise PipelineError(f"{root / folder}: no such folder; expected the corpus's video files there")
    found: dict[str, str] = {}
    for path in sorted((root / folder).iterdir()):
        if path.suffix.lower() not in MEDIA or path.name.startswith("."):
            continue
        if path.stem in found:
            raise PipelineError(f"{root / folder}: clip name {path.stem!r} occurs twice ({found[path.stem]} and "
                                f"{folder}/{path.name}); expected one file a clip")
        found[path.stem] = f"{folder}/{path.name}"
    if not found:
        raise PipelineError(f"{root / folder}: no video files; expected some of {', '.join(sorted(MEDIA))}")
    return found


def read_table(path: Path, columns: Sequence[str], key: str = "name") -> dict[str, dict[str, str]]:
    """Rows of a CSV by clip name. Raises PipelineError for a missing file or column, or a name that occurs twice."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            missing = [column for column in columns if column not in header]
            if missing:
                raise PipelineError(f"{path}: found columns {list(header)}, expected {list(columns)}")
            rows: dict[str, dict[str, str]] = {}
            for row in reader:
                name = (row[key] or "").strip()
                if not name:
                    raise PipelineError(f"{path}: line {reader.line_num}: no {key}; expected one in every row")
                if name in rows:
                    raise PipelineError(f"{path}: line {reader.line_num}: {key} {name!r} occurs twice; "
                                        f"expected one row a clip")
                rows[name] = {column: (value or "").strip() for column, value in row.items() if column}
            return rows
    except FileNotFoundError:
        raise PipelineError(f"{path}: not found; expected a CSV with the columns {list(columns)}") from None
    except UnicodeDecodeError:
        raise PipelineError(f"{path}: not UTF-8; expected a CSV saved as UTF-8") from None
    except csv.Error as error:
        raise PipelineError(f"{path}: after line {reader.line_num}: {error}; expected a CSV") from None


def known_label(label: str, labels: Sequence[str], where: str) -> str:
    """The label in the spelling of corpus.labels, whatever its case. Raises PipelineError for one not among them."""
    if label in labels:
        return label
    by_name = {known.lower(): known for known in labels}
    spelled = label.lower()
    for name in (SPELLINGS.get(spelled, spelled), spelled):
        if name in by_name:
            return by_name[name]
    raise PipelineError(f"{where}: found label {label!r}, expected one of corpus.labels {list(labels)}")


def label_column(path: Path, labels: Sequence[str]) -> dict[str, str]:
    """name -> label from a MER label file (name, discrete, ...)."""
    table = read_table(path, ("name", "discrete"))
    return {name: known_label(row["discrete"], labels, f"{path}: {name}") for name, row in table.items()}


def transcript_column(path: Path) -> dict[str, str]:
    """name -> Chinese transcript (name, chinese, english); nothing where there is no such file."""
    if not path.exists():
        return {}
    return {name: row["chinese"] for name, row in read_table(path, ("name", "chinese")).items()}


def require_same(names: Iterable[str], clips: Iterable[str], csv_path: Path, folder: Path, both: bool) -> None:
    """Raises PipelineError for names of the CSV without a clip and, with `both`, clips that the CSV lacks."""
    without_clip = sorted(set(names) - set(clips))
    if without_clip:
        raise PipelineError(f"{csv_path}: {len(without_clip)} names without a clip in {folder}: {shown(without_clip)}")
    without_row = sorted(set(clips) - set(names)) if both else []
    if without_row:
        raise PipelineError(f"{folder}: {len(without_row)} clips without a row in {csv_path}: {shown(without_row)}")


def shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (" ..." if len(names) > SHOWN else "")
