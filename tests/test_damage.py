"""A damaged store is found on read and named, and the command in the message rebuilds it, in DVC's cache too."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from media_files import write_small_clip
from ruamel.yaml import YAML

from stages.commands import repair
from stages.encoders.pooling import pooled_row
from stages.engine.errors import PipelineError
from stages.engine.store import INDEX, Row, Store, check_shard, write_index, write_shard

ROOT = Path(__file__).parent.parent
SHARD = "shard-00000.h5"
COMMAND = re.compile(r"rebuild it with: (mer repair \S+ && dvc repro)$")
FLIPS, CUTS = 80, 20


def rows(kind: str) -> list[Row]:
    rng = np.random.default_rng(0)
    if kind == "audio":
        return [Row(f"c{i}", values=rng.integers(-9999, 9999, 3000 * i).astype(np.int16)) for i in range(4)]
    if kind == "images":
        return [Row(f"c{i}", values=[rng.bytes(900) for _ in range(i)], items={"frame": range(i)}) for i in range(4)]
    if kind == "text":
        return [Row("a", values="今天下午三点开会"), Row("b", reason="no audio stream"), Row("c", values="")]
    return [pooled_row(f"c{i}", rng.standard_normal((9 + i, 40)).astype(np.float32), True, True) for i in range(4)]


def everything(folder: Path) -> list[object]:
    """All that a stage can read from a store."""
    store = Store(folder)
    found: list[object] = [store.clip_ids, store.present.tolist(), store.reasons, store.digests, store.attrs]
    found += [np.asarray(store.read(clip_id)).tolist() for clip_id in store.clip_ids]
    if store.kind == "features":
        found += [store.mean.tolist(), store.var.tolist()]
    if store.kind == "images":
        found += [store.read_items(clip_id, "frame").tolist() for clip_id in store.clip_ids]
    return found


@pytest.mark.parametrize("kind", ["audio", "images", "text", "features"])
def test_no_flipped_byte_and_no_truncation_gets_through(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / kind
    write_shard(folder / SHARD, kind, rows(kind), {"fingerprint": "f", "dimension": 40, "variance": True})
    write_index(folder, [SHARD])
    whole, good = everything(folder), (folder / SHARD).read_bytes()
    rng = np.random.default_rng(1)
    damaged = [good[:size] for size in rng.integers(0, len(good), CUTS)]
    for offset in rng.integers(0, len(good), FLIPS):
        flipped = bytearray(good)
        flipped[offset] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    found = 0
    for content in damaged:
        (folder / SHARD).write_bytes(content)
        try:
            assert everything(folder) == whole  # a byte that nothing reads
        except PipelineError as error:
            found += 1
            assert str(error).startswith(str(folder / SHARD)) and COMMAND.search(str(error)), error
            assert "\n" not in str(error)
            with pytest.raises(PipelineError):
                check_shard(folder / SHARD, "f")
    assert found > CUTS


@pytest.mark.parametrize("content", [None, "", "[1]", '"shard"', "{}", '{"shard-00000.h5": 3}', "\x00\xff"])
def test_a_damaged_index_is_named(tmp_path: Path, content: str | None) -> None:
    write_shard(tmp_path / SHARD, "text", rows("text"), {"fingerprint": "f"})
    write_index(tmp_path, [SHARD])
    (tmp_path / INDEX).unlink()
    if content is not None:
        (tmp_path / INDEX).write_bytes(content.encode("latin-1"))
    with pytest.raises(PipelineError) as caught:
        Store(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and COMMAND.search(str(caught.value))


# ---------------------------------------------------------------- under real DVC


ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}


def run(command: str, folder: Path) -> str:
    done = subprocess.run(command, shell=True, cwd=folder, env=ENVIRONMENT, text=True, capture_output=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the real dvc.yaml and code, in which DVC has run extract_audio on nine clips, three a shard."""
    folder = tmp_path_factory.mktemp("damage")
    shutil.copytree(ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
    values = YAML().load(ROOT / "params.yaml")
    values["corpus"] |= {"adapter": "csv", "path": "clips", "truth": None, "shard_size": 3}
    values["fusion"]["modalities"] = ["acoustic"]  # the one that needs no checkpoint
    YAML().dump(values, folder / "params.yaml")
    (folder / "clips").mkdir()
    for i in range(9):
        write_small_clip(folder / f"clips/c{i}.mp4", 0.2 + 0.1 * i)
    table = ["path,split,label", *(f"c{i}.mp4,labelled,neutral" for i in range(9))]
    (folder / "clips/clips.csv").write_text("\n".join(table) + "\n")
    for name in ("data/truth", "models"):
        (folder / name).mkdir(parents=True)
    run("git init -q && dvc init -q", folder)
    shutil.copyfile(ROOT / ".dvc/config", folder / ".dvc/config")
    run("dvc repro -q extract_audio", folder)
    return folder


def flip(path: Path) -> None:
    """In the middle of the file, as a failing disk or a stray program does: not through a new file."""
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x20]))
    os.chmod(path, 0o444)  # as DVC leaves it; a read-only file is not checked again


def damaged_objects(folder: Path) -> list[Path]:
    objects = [path for path in (folder / ".dvc/cache/files/md5").rglob("*") if path.is_file()]
    assert objects
    return [o for o in objects if hashlib.md5(o.read_bytes()).hexdigest() != o.parent.name + o.stem]


def audio(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "data/audio").iterdir())}


CASES = [("hardlink", "flip"), ("hardlink", "foreign"), ("hardlink", "flip everywhere"), ("copy", "flip everywhere")]
OTHERS = [(links, damage) for links in ("hardlink", "copy") for damage in ("truncate", "missing", "index")]


@pytest.mark.parametrize(("links", "damage"), [*CASES, *(pytest.param(*o, marks=pytest.mark.slow) for o in OTHERS)])
def test_the_named_command_rebuilds(extracted: Path, tmp_path: Path, links: str, damage: str) -> None:
    """The out is one file with DVC's cache, or all are copies; what is damaged is damaged in place."""
    folder = tmp_path / "copy"
    run(f"cp -a {extracted} {folder}", tmp_path)
    run(f"dvc config cache.type {links} && dvc checkout -q --relink data/audio", folder)
    whole = audio(folder)
    shard, other = folder / "data/audio/shard-00001.h5", folder / "data/audio/shard-00002.h5"
    assert (shard.stat().st_nlink > 1) == (links == "hardlink")
    if damage == "flip":
        flip(shard)
    elif damage == "flip everywhere":
        inodes = set()
        for path in [shard, *folder.glob(".cache/parts/extract_audio/*/*"), *folder.glob(".dvc/cache/files/md5/*/*")]:
            if path.read_bytes() == whole[shard.name] and path.stat().st_ino not in inodes:
                inodes.add(path.stat().st_ino)
                flip(path)
    elif damage == "truncate":
        os.truncate(shard, 1000)
    elif damage == "foreign":
        shard.write_bytes(other.read_bytes())
    elif damage == "missing":
        shard.unlink()
    else:
        os.truncate(folder / "data/audio" / INDEX, 10)
    with pytest.raises(PipelineError) as caught:
        store = Store(folder / "data/audio")
        for clip_id in store.clip_ids:
            store.read(clip_id)
    command = COMMAND.search(str(caught.value))
    assert command, caught.value
    run(command.group(1).replace(str(folder) + "/", "").replace("dvc repro", "dvc repro -q extract_audio"), folder)
    assert audio(folder) == whole
    assert damaged_objects(folder) == []
    assert json.loads(run("dvc status --json extract_audio", folder)) == {}
    run("rm -r data/audio && dvc checkout -q data/audio", folder)
    assert audio(folder) == whole


def test_repair_removes_nothing_but_stores(extracted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(extracted)
    for name in ("", ".", "..", "stages", "data", "nowhere", str(extracted / "data/audio/..")):
        with pytest.raises(PipelineError, match="expected a store's folder"):
            repair.main([name])
    assert Path("stages/engine/store.py").exists() and Path("data/audio", SHARD).exists()


def test_an_absolute_path_is_the_folder_that_dvc_knows(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nothing in DVC's cache would be looked at, and the damaged file come back."""
    folder = tmp_path / "copy"
    run(f"cp -a {extracted} {folder}", tmp_path)
    monkeypatch.chdir(folder)
    cached = next(path for path in Path(".dvc/cache/files/md5").rglob("*") if path.is_file()
                  and path.read_bytes() == Path("data/audio", SHARD).read_bytes())
    flip(cached)
    repair.main([str(folder / "data/audio")])
    assert not cached.exists()
