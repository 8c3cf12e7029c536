"""DVC's cache: where it lies, and the name under which it keeps a file."""

import subprocess
import sys
from pathlib import Path

from stages.engine.errors import PipelineError


def cache_folder() -> Path:
    """The cache of the repository in the current folder. Raises PipelineError where there is none."""
    done = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], text=True, capture_output=True)
    if done.returncode:
        raise PipelineError(f"dvc cache dir: failed in {Path.cwd()}: {' '.join(done.stderr.split())}")
    return Path(done.stdout.strip())


def cached(cache: Path, md5: str) -> Path:
    """Where the cache keeps the file, or (md5 with .dir) the folder's listing, of this checksum."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]
