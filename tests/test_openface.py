"""OpenFace's FeatureExtraction, played by a stand-in executable: it exits 0 on many failures, crashes and hangs."""

import os
import stat
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from engine import small_shards, target

from stages.engine.errors import Died, PipelineError, Skip
from stages.engine.extraction import write_store
from stages.engine.params import Params
from stages.engine.per_clip import PerClip
from stages.engine.store import Store
from stages.engine.work import Input
from stages.media.face_crops import OPENFACE_SHARE, faces_decoder
from stages.media.openface import crop_clip, find_binary

# The clip's name says how it behaves. Like the real one it cuts the output's name at a dot, and writes ", " in its CSV.
STAND_IN = """#!{python} -SE
import os, sys, time, subprocess
from pathlib import Path
arguments = dict(zip(sys.argv[1:-1], sys.argv[2:]))
clip, out, name = Path(arguments["-f"]), Path(arguments["-out_dir"]), arguments["-of"].split(".")[0]
assert clip.is_file() and arguments["-simsize"] == "64" and arguments["-format_aligned"] == "png"
assert {{"-simalign", "-nomask"}} <= set(sys.argv)
assert os.environ["OPENBLAS_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"] == "1"
kind = clip.name.split("-")[0]
if kind == "nothing":
    sys.exit(0)
if kind == "fails":
    sys.exit(3)
if kind == "crashes":
    os.kill(os.getpid(), 11)
if kind == "hangs":
    child = subprocess.Popen(["sleep", "60"])
    Path(str(clip) + ".pids").write_text(f"{{os.getpid()}} {{child.pid}}")
    time.sleep(60)
rows = eval((clip.parent / (kind + ".rows")).read_text())  # (frame, face_id, confidence, success, side)
header = "frame, face_id, timestamp, confidence, success" + "".join(f", x_{{i}}" for i in range(68))
header += "".join(f", y_{{i}}" for i in range(68))
lines = [header if kind != "columns" else "frame, timestamp"]
(out / (name + "_aligned")).mkdir(parents=True)
for frame, face, confidence, success, side in rows:
    points = [side * i / 67 for i in range(68)]
    lines.append(", ".join(map(str, [frame, face, frame / 25, confidence, success, *points, *points])))
    image = clip.parent / f"{{min(face, 1)}}.png"
    if success and not (kind == "lost" and frame > 2):
        (out / (name + "_aligned") / f"frame_det_{{face:02d}}_{{frame:06d}}.png").write_bytes(image.read_bytes())
if kind == "damaged":
    lines[-1] = lines[-1][:9]
(out / (name + ".csv")).write_text("\\n".join(lines) + "\\n")
"""

ONE_FACE = [(frame, 0, 0.9, 1, 80) for frame in range(1, 7)]
KINDS = {
    "good": ONE_FACE,
    "unsure": [(1, 0, 0.98, 1, 80), (2, 0, 0.2, 1, 80), (3, 0, 0.0, 0, 80)],
    # a bystander is detected first, with more confidence; the speaker is larger and in more frames
    "several": [(1, 0, 0.99, 1, 30), (2, 0, 0.99, 1, 30), (2, 1, 0.9, 1, 90), (3, 1, 0.9, 1, 90), (4, 1, 0.9, 1, 90)],
    "faceless": [(frame, 0, 0.0, 0, 80) for frame in range(1, 7)],
    "empty": [],
    "lost": ONE_FACE,
    "columns": ONE_FACE,
    "damaged": ONE_FACE,
}
STOPPED = "OpenFace was stopped after {} s (runtime.clip_timeout_seconds) without a result"
COLOURS = ((0, 0, 200), (0, 200, 0))  # BGR: face 0 is red, face 1 green


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder with the stand-in and a clip of each kind."""
    for kind in [*KINDS, "nothing", "fails", "crashes", "hangs"]:
        (tmp_path / f"{kind}-1.2 你.mp4").write_bytes(b"video")
        (tmp_path / f"{kind}.rows").write_text(repr(KINDS.get(kind)))
    for i, colour in enumerate(COLOURS):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((64, 64, 3), colour, np.uint8))
    binary = tmp_path / "FeatureExtraction"
    binary.write_text(STAND_IN.format(python=sys.executable))
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def crops(
    clips: Path, kind: str, stride: int = 1, limit: float = 30
) -> tuple[list[bytes], list[int], list[float], str]:
    binary = str(clips / "FeatureExtraction")
    return crop_clip(clips / f"{kind}-1.2 你.mp4", stride, 64, 0.5, 95, binary, limit)


def colour(jpeg: bytes) -> tuple[int, ...]:
    return tuple(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[32, 32] // 100)


def test_success(clips: Path) -> None:
    images, indices, confidences, note = crops(clips, "good")
    assert indices == [0, 1, 2, 3, 4, 5] and confidences == [0.9] * 6 and note == ""
    assert {colour(image) for image in images} == {(0, 0, 2)}
    assert crops(clips, "good", stride=3)[1] == [0, 3]


def test_frames_without_a_sure_face_are_left_out(clips: Path) -> None:
    assert crops(clips, "unsure")[1:] == ([0], [0.98], "")


def test_the_main_face_is_the_largest_over_the_clip_and_not_the_first(clips: Path) -> None:
    images, indices, _, _ = crops(clips, "several")
    assert indices == [1, 2, 3] and {colour(image) for image in images} == {(0, 2, 0)}


def test_aligned_images_that_are_missing_are_recorded(clips: Path) -> None:
    _, indices, _, note = crops(clips, "lost")
    assert indices == [0, 1] and note == "damaged: 4 aligned images are missing"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nothing", "OpenFace wrote no result"),  # exit code 0
        ("fails", "OpenFace failed with exit code 3"),
        ("crashes", "OpenFace crashed (SIGSEGV)"),
        ("faceless", "no face found in 6 frames"),
        ("empty", "OpenFace wrote an empty CSV"),
        ("columns", "OpenFace wrote a CSV without face_id, confidence, success"),
        ("damaged", "OpenFace wrote a damaged CSV: line 7"),
    ],
)
def test_a_failure_is_a_skip_that_says_why(clips: Path, kind: str, reason: str) -> None:
    with pytest.raises(Skip) as skip:
        crops(clips, kind)
    assert str(skip.value) == reason
    assert isinstance(skip.value, Died) == (kind == "crashes")  # then it is tried again


def test_a_hang_is_ended_with_its_children(clips: Path) -> None:
    with pytest.raises(Died) as died:
        crops(clips, "hangs", limit=1)
    assert str(died.value) == STOPPED.format(1)
    pids = next(clips.glob("hangs*.pids")).read_text().split()
    deadline = time.monotonic() + 60
    while any(runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_one_clips_failure_does_not_stop_the_rest(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clips)
    p: Params = small_shards(clips)
    limit = 3 / OPENFACE_SHARE
    p = p.model_copy(update={"corpus": p.corpus.model_copy(update={"max_bad_fraction": 0.9}),
                             "runtime": p.runtime.model_copy(update={"clip_timeout_seconds": limit})})
    faces = p.faces.model_copy(update={"detector": "openface", "size": 64, "stride": 1,
                                       "openface_binary": str(clips / "FeatureExtraction")})
    kinds = ["good", "nothing", "crashes", "several", "hangs", "lost"]
    inputs = [Input(kind, str(clips / f"{kind}-1.2 你.mp4"), kind.encode()) for kind in kinds]
    function = faces_decoder(p.model_copy(update={"faces": faces}))
    write_store(target(kind="images"), inputs, PerClip(function, workers=2, timeout=30), p, ["cpu"])
    store = Store("out/some_stage")
    assert dict(zip(kinds, store.present.tolist(), strict=True)) == {
        "good": True, "nothing": False, "crashes": False, "several": True, "hangs": False, "lost": True}
    assert store.reasons == ["", "OpenFace wrote no result", "OpenFace crashed (SIGSEGV)", "",
                             STOPPED.format(3), "damaged: 4 aligned images are missing"]
    assert store.read_items("several", "frame").tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("binary", "words"),
    [(None, "found null"), ("missing", "does not exist"), ("0.png", "is not executable")],
)
def test_a_wrong_binary_is_not_the_clips_fault(clips: Path, binary: str | None, words: str) -> None:
    with pytest.raises(PipelineError, match=f"^faces.openface_binary: .*{words}, expected the path of OpenFace"):
        find_binary(binary and str(clips / binary))


def test_a_file_that_cannot_be_executed(clips: Path) -> None:
    (clips / "FeatureExtraction").write_bytes(os.urandom(100))
    with pytest.raises(PipelineError, match="FeatureExtraction can't be run"):
        crops(clips, "good")

