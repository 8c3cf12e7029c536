"""What the adapters share: finding media files, reading label files, and the errors in participants' corpora."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.corpora.folders import EXPECTED, say_left_out, scan
from stages.corpora.labels import read_labels
from stages.corpora.tables import read_table
from stages.engine.errors import PipelineError
from stages.engine.manifest import Split

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
    start: float | None = None  # seconds; of a clip that is a segment of its file
    end: float | None = None


def media_files(root: Path, folder: str) -> dict[str, str]:
    """clip name -> path relative to root, sorted by name. Raises PipelineError for a missing or empty folder, or a
    name that occurs twice (a.mp4 and a.avi). What else lies there is said."""
    if not (root / folder).is_dir():
        raise PipelineError(f"{root / folder}: no such folder; expected the corpus's clips there")
    content = scan(root / folder, deep=False)
    found: dict[str, str] = {}
    for path in content.clips:
        if path.stem in found:
            raise PipelineError(f"{root / folder}: clip name {path.stem!r} occurs twice ({found[path.stem]} and "
                                f"{folder}/{path.name}); expected one file a clip")
        found[path.stem] = f"{folder}/{path.name}"
    say_left_out(root / folder, len(found), content.left_out)
    if not found:
        raise PipelineError(f"{root / folder}: no video files; expected some of {EXPECTED}")
    return found


def label_column(path: Path, labels: Sequence[str]) -> dict[str, str]:
    """name -> label from a MER label file (name, discrete, ...). Raises PipelineError for a name without one."""
    table = read_table(path, ("name", "discrete"))
    found = read_labels(path, {f"{path}: {name}": row["discrete"] for name, row in table.items()}, labels)
    if without := [where for where, label in found.items() if not label]:
        raise PipelineError(f"{without[0]}: no label; expected one of corpus.labels {list(labels)}")
    return dict(zip(table, found.values(), strict=True))


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
