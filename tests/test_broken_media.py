"""The media stages on a corpus of broken clips: no crash, no hang, little memory, and every loss is recorded."""

import csv
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from broken_media import make_broken
from ruamel.yaml import YAML

from stages.engine.params import load
from stages.engine.store import Store
from stages.gather_features import MEDIA, skipped

ROOT = Path(__file__).parent.parent
CLIP_SECONDS = 30  # what a clip may take; the whole corpus takes about a minute
WORKER_BYTES = 700 << 20  # a 4K clip's frames, and the libraries
# RUSAGE_CHILDREN: the largest of the stage's workers
RUN = ("import importlib, resource; from stages.engine.errors import run_stage\n"
       "if __name__ == '__main__':\n"
       "    run_stage(importlib.import_module('stages.{}').main)\n"
       "    print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)\n")
# of each of five containers
FAST = {"flips": 40, "cuts": 4}
LONG = {"flips": 400, "cuts": 40}


def run_media_stages(folder: Path, flips: int, cuts: int) -> dict[str, Path]:
    """Lay out a corpus of broken clips in `folder` and run corpus and the media stages on it; the clips by name."""
    (folder / "stages").symlink_to(ROOT / "stages")
    shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
    values = YAML().load(ROOT / "params.yaml")
    values["corpus"] |= {"adapter": "csv", "path": "clips", "truth": None, "max_bad_fraction": 1.0}
    values["faces"]["stride"] = 5  # three frames of most clips
    values["runtime"] |= {"workers": 2, "clip_timeout_seconds": CLIP_SECONDS}
    YAML().dump(values, folder / "params.yaml")
    clips = make_broken(folder / "clips", flips, cuts, seed=0)
    table = [("path", "split", "label", "name"), *((path.name, "labelled", "anger", path.name) for path in clips)]
    with open(folder / "clips/clips.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)
    for stage in ("corpus", *MEDIA):
        start = time.monotonic()
        (folder / "run.py").write_text(RUN.format(stage))
        done = subprocess.run([sys.executable, "run.py"], cwd=folder, text=True, capture_output=True)
        assert done.returncode == 0, f"{stage}:\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr
        peak = int(re.findall(r"peak (\d+)", done.stdout)[-1])
        print(f"{stage}: {len(clips)} clips, {time.monotonic() - start:.1f} s, worker peak {peak >> 20} MiB")
        assert peak < WORKER_BYTES
    return {path.name: path for path in clips}


@pytest.mark.parametrize("size", [FAST, pytest.param(LONG, marks=pytest.mark.slow)], ids=["fast", "long"])
def test_every_broken_clip_gives_features_or_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: dict[str, int]
) -> None:
    clips = run_media_stages(tmp_path, **size)
    monkeypatch.chdir(tmp_path)
    stores = {stage: Store(folder) for stage, folder in MEDIA.items()}
    recorded = {(clip, stage): reason for clip, stage, _, reason in skipped({})}
    lost = []
    for stage, store in stores.items():
        assert set(store.clip_ids) == set(clips)
        for clip, present in zip(store.clip_ids, store.present, strict=True):
            if present:
                assert len(store.read(clip)) > 0, (clip, stage)
            else:
                assert recorded.get((clip, stage)), (clip, stage)
        lost.append(int((~store.present).sum()))
    crashed = {key: reason for key, reason in recorded.items() if "crashed" in reason or "stopped after" in reason}
    print(f"{len(clips)} clips; absent {dict(zip(MEDIA, lost, strict=True))}; {len(crashed)} killed their worker")
    assert not any("stopped after" in reason for reason in crashed.values()), crashed
    assert len(crashed) < len(clips) / 20, crashed

    whole = ["wrong extension.mp4", "audio longer.mp4", "1 fps.mp4", "120 fps.mp4", "ntsc.mp4", "4k.mp4", "100x100.mp4",
             *(f"good{suffix}" for suffix in (".mp4", ".mkv", ".webm", ".avi", ".mov"))]
    for clip in whole:
        assert not {stage for stage in MEDIA if (clip, stage) in recorded}, clip
    assert len(stores["extract_audio"].read("ten minutes.mkv")) == 600 * 24000
    assert len(stores["slice_frames"].read("ten minutes.mkv")) == load().frames.per_clip
    assert len(stores["slice_frames"].read("one frame.mp4")) == 1
    assert recorded["no audio.mp4", "extract_audio"] == "no audio stream"
    assert recorded["no video.mp4", "slice_frames"] == recorded["no video.mp4", "crop_faces"] == "no video stream"
    for clip in ("empty.mp4", "text.mp4", "zeros.mp4", "noise.mp4", "playlist.mp4", "concat.mp4"):
        assert all("can't be opened" in recorded[clip, stage] or "no " in recorded[clip, stage] for stage in MEDIA)
