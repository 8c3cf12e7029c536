"""Forget a damaged store wherever it is kept, so that `dvc repro` makes it anew.

    mer repair features/hubert && dvc repro

A shard may lie in three places, as one file linked or as copies: the out folder, .cache/parts and DVC's cache. DVC
trusts its cache unseen: when only the out folder is removed, it brings the damaged file back, and even `dvc repro -f`
leaves it in the cache. So every cached file of the folder is compared with its checksum, and every finished part of
its stage is read; what is damaged is removed, and so is the folder. DVC then restores it from a sound cache or runs the
stage, which makes the missing parts.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.engine.dvc_cache import cache_folder, cached
from stages.engine.errors import PipelineError, run_stage
from stages.engine.extraction import part_fingerprint
from stages.engine.fingerprint import PARTS
from stages.engine.params import read_yaml
from stages.engine.store import INDEX, check_shard


def outs_around(folder: Path) -> list[tuple[str, str, str]]:
    """(stage, path, md5) of the directory outs in dvc.lock that are the folder or hold it."""
    stages = read_yaml("dvc.lock")["stages"] if Path("dvc.lock").exists() else {}
    outs = [(name, out["path"], out["md5"]) for name, stage in stages.items() for out in stage.get("outs", [])]
    return [out for out in outs if folder.is_relative_to(out[1]) and ".dir" in out[2]]


def cached_files(folder: Path, cache: Path) -> Iterator[Path]:
    """Where DVC's cache keeps the files of the folder, and the listing that names them."""
    for _, path, md5 in outs_around(folder):
        listing = cached(cache, md5)
        yield listing
        if not listing.exists() or is_damaged(listing):
            continue
        for entry in json.loads(listing.read_text()):
            if Path(path, entry["relpath"]).is_relative_to(folder):
                yield cached(cache, entry["md5"])


def damaged_parts(folder: Path) -> Iterator[Path]:
    """Finished parts of the folder's stage that can't be read; of every stage where dvc.lock does not know it."""
    for name in [name for name, _, _ in outs_around(folder)] or ["*"]:
        for part in sorted(PARTS.glob(f"{name}/*/*.h5")):
            try:
                check_shard(part, part_fingerprint(part.parent.name, part))
            except PipelineError:
                yield part


def is_damaged(path: Path) -> bool:
    """Whether a file of DVC's cache differs from the checksum that is its name; a missing one does not."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest() != path.parent.name + path.stem


def forget(folder: Path, cache: Path) -> list[Path]:
    """Remove the folder, and the damaged files that DVC's cache and .cache/parts hold for it; returns the latter."""
    damaged = [path for path in cached_files(folder, cache) if is_damaged(path)] + [*damaged_parts(folder)]
    for path in damaged:
        path.unlink()
    if folder.exists():
        shutil.rmtree(folder)
    return damaged


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("mer repair", description="Remove a damaged store, so that dvc repro makes it "
                                     "anew", allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the store, such as data/audio or features/hubert")
    folder = Path(os.path.relpath(parser.parse_args(arguments).folder))  # as dvc.lock names it
    if not outs_around(folder) and not (folder / INDEX).exists():
        raise PipelineError(f"{folder}: expected a store's folder as params and messages name it, such as data/audio")
    damaged = forget(folder, cache_folder())
    print(f"repair: removed {folder} and {len(damaged)} damaged files of DVC's cache and .cache/parts; "
          f"now run dvc repro")


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
