"""Fingerprints: a hash of what dvc.yaml declares as changing a stage's result, and of nothing else.

So whatever makes DVC rerun a stage changes its fingerprint too, and no stale part is ever reused.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.engine import version
from stages.engine.errors import PipelineError
from stages.engine.files import file_digest
from stages.engine.yaml_file import read_yaml

READ = {".safetensors", ".bin", ".json", ".txt", ".model", ".vocab", ".jinja"}
PARTS = Path(".cache/parts")  # work in progress, of every stage in <stage>/<fingerprint>/: outside DVC's outs


def stage_fingerprint(stage: str, extra: bytes = b"") -> str:
    """Hash of what dvc.yaml declares for the stage: its tracked params, the bytes of its .py deps, and the constants of
    engine/version.py that it names; and `extra`.

    `stage` is the name `dvc stage list` shows, e.g. `extract@hubert`. Raises PipelineError for an unknown stage.
    """
    values = read_yaml("params.yaml")
    name, _, key = stage.partition("@")
    entry = read_yaml("dvc.yaml")["stages"].get(name)
    if entry is None:
        raise PipelineError(f"dvc.yaml: found no stage {name!r}")
    scope = dict(values)
    if key:  # a foreach over a section of params.yaml: `foreach: ${extractors}`
        section = _lookup(values, entry["foreach"].strip("${} "))
        scope |= {"key": key, "item": section[key]}
        entry = entry["do"]
    content = hashlib.blake2b(extra, digest_size=16)
    for declared in entry.get("params", []):
        if isinstance(declared, dict):  # {file: names}
            ((_, names),) = declared.items()
            content.update(json.dumps([[name, getattr(version, name)] for name in names]).encode())
            continue
        path = _resolve(declared, scope)
        content.update(json.dumps([path, _lookup(values, path)], sort_keys=True).encode())
    for declared in entry.get("deps", []):
        path = _resolve(declared, scope)
        if path.endswith(".py"):
            content.update(path.encode() + b"\0" + Path(path).read_bytes())
    return content.hexdigest()


def _resolve(text: str, scope: Mapping[str, Any]) -> str:
    return re.sub(r"\$\{([^}]+)\}", lambda match: str(_lookup(scope, match.group(1).strip())), text)


def _lookup(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values[part]
    return values


def checkpoint_files(folder: Path) -> list[Path]:
    """What loading reads of a checkpoint folder: weights and descriptions, never Python."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix in READ and path.is_file()]


def checkpoint_digest(checkpoint: str) -> bytes:
    """Digest of a checkpoint folder's files; empty for a published name, which its pinned revision identifies."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return b""
    content = hashlib.blake2b(digest_size=16)
    for path in checkpoint_files(folder):
        content.update(str(path.relative_to(folder)).encode() + bytes.fromhex(file_digest(path)))
    return content.digest()
