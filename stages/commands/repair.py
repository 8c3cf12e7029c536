"""Remove what is damaged of a store, wherever it is kept, so that `dvc repro` makes it anew.

    mer repair features/hubert && dvc repro
    mer repair --retry data/audio && dvc repro     # another try for clips whose decoder died or took too long

A shard may lie in three places, as one file linked or as copies: the out folder, .cache/parts and DVC's cache. DVC
does not check its cache: when only the out folder is removed, it restores the damaged file, and even `dvc repro -f`
leaves it in the cache. So every shard of the folder and every finished part of its stage is read whole, and every
cached file of the folder is compared with its checksum. What was read and found wrong is removed, and nothing else;
what can't be read just now stops the repair. DVC then restores the rest from a sound cache or runs the stage, which
makes the missing parts.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.engine.dvc_cache import cache_folder, cached
from stages.engine.errors import PipelineError, run_stage
from stages.engine.files import file_digest
from stages.engine.fingerprint import PARTS
from stages.engine.store import INDEX, check_shard, read_head, read_index
from stages.engine.work import part_fingerprint
from stages.engine.yaml_file import read_yaml


def outs_around(folder: Path) -> list[tuple[str, str, str]]:
    """(stage, path, md5) of the directory outs in dvc.lock that are the folder or hold it."""
    stages = read_yaml("dvc.lock")["stages"] if Path("dvc.lock").exists() else {}
    outs = [(name, out["path"], out["md5"]) for name, stage in stages.items() for out in stage.get("outs", [])]
    return [out for out in outs if folder.is_relative_to(out[1]) and ".dir" in out[2]]


def cached_files(folder: Path, cache: Path) -> Iterator[tuple[str, Path]]:
    """(name in the folder, place in DVC's cache) of the folder's files, and of the listing that names them ("")."""
    for _, path, md5 in outs_around(folder):
        listing = cached(cache, md5)
        yield "", listing
        if not listing.exists() or is_damaged(listing):
            continue
        for entry in json.loads(listing.read_text()):
            if Path(path, entry["relpath"]).is_relative_to(folder):
                yield Path(entry["relpath"]).name, cached(cache, entry["md5"])


def stages_of(folder: Path) -> list[str]:
    """The stages of dvc.yaml that write the folder, as `dvc stage list` names them; none for what is no store's."""
    found = []
    for name, entry in read_yaml("dvc.yaml")["stages"].items():
        for out in (entry.get("do") or entry).get("outs", []):
            if out == str(folder):
                found.append(name)
            elif str(out).endswith("/${key}") and folder.parent == Path(out).parent:
                found.append(f"{name}@{folder.name}")
    return found


def parts(folder: Path) -> list[Path]:
    """Finished parts of the folder's stage."""
    names = stages_of(folder)
    return sorted(part for name in names for part in PARTS.glob(f"{name}/*/*.h5"))


def is_damaged(path: Path) -> bool:
    """Whether a file of DVC's cache differs from the checksum that is its name; a missing one does not."""
    return path.exists() and file_digest(path, "md5") != path.parent.name + path.stem


def damaged(folder: Path, cache: Path) -> list[Path]:
    """What is there of the store and is not as it was written. Raises OSError for what can't be read just now."""
    found = [path for _, path in cached_files(folder, cache) if is_damaged(path)]
    found += [part for part in parts(folder) if not _is_whole(part, part_fingerprint(part.parent.name, part))]
    try:
        shards = read_index(folder)["shards"] if folder.exists() else {}
    except PipelineError:
        return [*found, *(path for path in (folder / INDEX,) if path.exists())]
    inside = sorted(folder.glob("shard-*.h5"))
    return found + [path for path in inside if not _is_whole(path, shards.get(path.name, "of no shard of the store"))]


def _is_whole(path: Path, fingerprint: str) -> bool:
    try:
        check_shard(path, fingerprint)
    except PipelineError:
        return False
    return True


def to_retry(folder: Path, cache: Path) -> list[Path]:
    """The shards with clips that are absent since their decoder died, in all three places.

    Raises PipelineError for a shard that is damaged.
    """
    shards = read_index(folder)["shards"] if folder.exists() else {}
    names = {name for name in shards if _has_died(folder / name, shards[name])}
    old = [part for part in parts(folder) if _has_died(part, part_fingerprint(part.parent.name, part))]
    return [*(folder / name for name in names), *old, *(path for name, path in cached_files(folder, cache)
                                                        if name in names and path.exists())]


def _has_died(path: Path, fingerprint: str) -> bool:
    return any(row.died for row in read_head(path, fingerprint).rows)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("mer repair", description="Remove what is damaged of a store, so that dvc repro "
                                     "makes it anew", allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the store, such as data/audio or features/hubert")
    parser.add_argument("--retry", action="store_true", help="remove the shards with clips whose decoder died or took "
                        "too long, so that they are tried again (after raising runtime.clip_timeout_seconds, say)")
    asked = parser.parse_args(arguments)
    folder = Path(os.path.relpath(asked.folder))  # as dvc.lock names it
    if not stages_of(folder) and not (folder / INDEX).exists():
        raise PipelineError(f"{folder}: expected a store's folder as params and messages name it, such as data/audio")
    cache = cache_folder()
    found = (to_retry if asked.retry else damaged)(folder, cache)
    for path in found:
        path.unlink(missing_ok=True)
    what = "with clips whose decoder died" if asked.retry else "damaged"
    if found:
        print(f"repair: removed {len(found)} files {what} of {folder}, DVC's cache and .cache/parts; now run dvc repro")
    else:
        print(f"repair: found nothing {what} in {folder}, DVC's cache or .cache/parts; nothing was removed")


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
