"""Sound and video files in a folder, and what else lies there: nothing left out without a word or opened blindly."""

import errno
import os
import stat
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Those whose usual containers stages/media/clip.py opens
VIDEO = {".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob",
         ".webm", ".wmv", ".3g2", ".3gp"}
SOUND = {".wav", ".flac", ".mp3", ".m4a", ".ogg", ".oga", ".opus", ".aac", ".wma", ".mka", ".weba"}
MEDIA = VIDEO | SOUND
EXPECTED = f"{', '.join(sorted(VIDEO - {'.3g2', '.3gp'}))}, .3g2, .3gp, or sound: {', '.join(sorted(SOUND))}"
SHOWN = 3
NOTHING = "name of no file"
HIDDEN, OTHER = "file with a hidden name", "file of another kind"


@dataclass(frozen=True)
class Found:
    """What a folder holds. left_out: kind -> names below the folder, for what is no clip."""

    clips: list[Path]  # sorted
    left_out: Mapping[str, list[str]]


def what_is(path: Path) -> str:
    """"" for a file, else what lies there or why that can't be said; links are followed, nothing is opened."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "link to nothing" if path.is_symlink() else NOTHING
    except OSError as error:  # a link to itself, a folder that may not be entered
        return NOTHING if error.errno == errno.ENAMETOOLONG else f"file that can't be reached ({error.strerror})"
    kinds = {stat.S_IFREG: "", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def scan(folder: Path, deep: bool) -> Found:
    """The sound and video files in a folder and, where `deep`, below it; links to folders are not followed.

    A sound file beside a video of its name is that clip's sound, extracted, and no clip.
    """
    clips: dict[tuple[str, str], Path] = {}  # by folder and name without the extension, or with it where that is taken
    left_out: dict[str, list[str]] = defaultdict(list)
    for path in sorted(_entries(folder, deep, left_out), key=lambda path: path.suffix.lower() in SOUND):
        kind = HIDDEN if path.name.startswith(".") else what_is(path)
        if kind == "folder" and path.is_symlink():
            kind = "link to a folder"
        kind = kind or (OTHER if path.suffix.lower() not in MEDIA else "")
        if not kind and path.suffix.lower() in SOUND:
            beside = clips.get((str(path.parent), path.stem))
            kind = "sound beside a video of its name" if beside and beside.suffix.lower() in VIDEO else ""
        if kind:
            left_out[kind].append(str(path.relative_to(folder)))
        else:
            taken = (str(path.parent), path.stem) in clips
            clips[str(path.parent), path.name if taken else path.stem] = path
    return Found(sorted(clips.values()), {kind: sorted(names) for kind, names in left_out.items()})


def _entries(folder: Path, deep: bool, left_out: dict[str, list[str]]) -> Iterator[Path]:
    """Everything in the folder that is not walked into."""
    def unreadable(error: OSError) -> None:
        left_out["folder that can't be read"].append(os.path.relpath(error.filename, folder))

    for root, folders, names in os.walk(folder, onerror=unreadable):
        inside = [Path(root, name) for name in folders]
        yield from (Path(root, name) for name in names)
        yield from (path for path in inside if not deep or path.is_symlink() or path.suffix.lower() in MEDIA)
        if not deep:
            return


def say_left_out(folder: Path, clips: int, left_out: Mapping[str, list[str]]) -> None:
    """One line on stderr, where anything is left out; none without clips, which is an error of its own."""
    kinds = []
    for kind, names in sorted(left_out.items()):
        noun, *rest = kind.split(" ")
        shown = ", ".join(map(escaped, sorted(names)[:SHOWN])) + (" ..." if len(names) > SHOWN else "")
        kinds.append(f"{len(names)} {' '.join([noun + 's' * (len(names) > 1), *rest])} ({shown})")
    if kinds and clips:
        print(f"{escaped(folder)}: {clips} clip{'s' * (clips > 1)}; left out: {', '.join(kinds)}", file=sys.stderr)


def escaped(name: str | Path) -> str:
    """The name as a line of any UTF-8 file can hold it: bytes that are not UTF-8, and control characters, escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) == "Cc" else c for c in text)
