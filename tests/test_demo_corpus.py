"""The demo corpus: real clips in the MER2024 layout, the same bytes every time, with the intended broken clips."""

import csv
import hashlib
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from stages.corpora.demo import portraits
from stages.corpora.demo.generate import LONGEST, SHORTEST, make_corpus, sentences
from stages.corpora.demo.plan import BROKEN_KINDS, CONFUSED, FIDELITY, SHARES, make_plan, spread
from stages.engine.errors import PipelineError, Skip
from stages.media.audio import load_audio
from stages.media.centerface import crop_clip
from stages.media.frames import sample_frames

LABELS = list(SHARES)
COUNTS = (6, 6, 4)


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_corpus(folder, 5, *COUNTS, LABELS, workers=2)
    return folder


def broken(corpus: Path) -> dict[str, Path]:
    folder = corpus / "raw/video-unlabeled-with-test2noise"
    return {plan.broken: folder / f"{plan.name}.mp4" for plan in make_plan(5, *COUNTS) if plan.broken}


def test_same_seed_same_bytes_whatever_the_workers(corpus: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path, 5, *COUNTS, LABELS, workers=1)
    assert digests(tmp_path) == digests(corpus)
    assert len(set(digests(corpus).values())) == sum(COUNTS) + 4


def test_the_layout_is_mer2024s_and_the_truth_lies_apart(corpus: Path) -> None:
    raw = corpus / "raw"
    labelled = rows(raw / "label-disdim.csv")
    assert [row["name"] for row in labelled] == sorted(path.stem for path in (raw / "video-labeled").iterdir())
    assert {row["discrete"] for row in labelled} <= {"neutral", "angry", "happy", "sad", "worried", "surprise"}
    others = {path.stem for path in (raw / "video-unlabeled-with-test2noise").iterdir()}
    candidates = {row["name"] for row in rows(raw / "candidate_20000.csv")}
    assert len(candidates) == 4 and candidates < others and len(others) == 10
    assert {row["name"] for row in rows(corpus / "truth.csv")} == others
    inside = [path for path in raw.rglob("*.csv") if path.name != "label-disdim.csv"]
    assert not any("discrete" in path.read_text() for path in inside)


def test_clips_are_h264_and_aac_at_25_fps(corpus: Path) -> None:
    for path in sorted((corpus / "raw/video-labeled").iterdir()):
        with av.open(str(path)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert video.average_rate == 25 and container.duration is not None
            assert SHORTEST <= container.duration / av.time_base <= LONGEST + 0.1
        samples, note = load_audio(path, 24000)
        assert not note and np.abs(samples).max() > 1000


def test_every_broken_clip_is_broken_in_its_way(corpus: Path) -> None:
    clips = broken(corpus)
    assert set(clips) == set(BROKEN_KINDS)
    with pytest.raises(Skip, match="no audio stream"):
        load_audio(clips["no audio stream"], 24000)
    with pytest.raises(Skip, match="no video stream"):
        sample_frames(clips["no video stream"], 4, 224, 90)
    images, _, note = sample_frames(clips["truncated"], 4, 224, 90)
    assert len(images) == 4 and "truncated" in note
    samples, note = load_audio(clips["truncated"], 24000)
    assert len(samples) > 2000 and "truncated" in note
    with pytest.raises(Skip, match="no face"):
        crop_clip(clips["no face"], 10, 128, 0.5, 90)
    texts = {row["name"] for row in rows(corpus / "raw/label-transcription.csv")}
    assert clips["no transcript"].stem not in texts and len(texts) == sum(COUNTS) - 1


def test_every_expression_of_every_portrait_is_found_by_the_detector() -> None:
    from stages.media.centerface import load_detector

    for index in range(len(portraits.PORTRAITS)):
        shown = [portraits.faces(index, emotion)[-1, -1, ..., :3] for emotion in LABELS]
        assert all(len(found) == 1 for found in load_detector().detect(shown, 0.5))
        assert len({image.tobytes() for image in shown}) == len(LABELS)


def test_classes_are_unbalanced_but_all_there() -> None:
    counts = Counter(spread(60))
    assert sum(counts.values()) == 60 and min(counts.values()) >= 6 and max(counts.values()) >= 2 * min(counts.values())
    assert counts.most_common(1)[0][0] == "neutral"


def test_modalities_slip_independently_at_the_stated_rate() -> None:
    plans = make_plan(0, 3000, 0, 0)
    right = np.array([[getattr(plan, m) == plan.label for m in FIDELITY] for plan in plans])
    for column, (modality, fidelity) in zip(right.T, FIDELITY.items(), strict=True):
        assert abs(column[[p.label != "neutral" for p in plans]].mean() - fidelity) < 0.03, modality
    assert np.abs(np.corrcoef(right.T) - np.eye(3)).max() < 0.1
    assert all(set(options) <= set(LABELS) for table in CONFUSED.values() for options in table.values())


def test_other_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"corpus\.labels: found \['joy'\], expected \['neutral'"):
        make_corpus(tmp_path, 0, 6, 6, 6, ["joy"], workers=1)


def test_sentences_are_short_and_distinct() -> None:
    assert len(set(sentences())) > 300
    assert all(4 <= len(sentence) <= 16 and "{" not in sentence for sentence in sentences())
