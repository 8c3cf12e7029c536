"""Long recordings: where they are cut, and predict's rows and page for their segments."""

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soxr
from clip_files import write_clip
from predict_runs import change, error_of, numbers, run_predict
from test_transcribe import make_ctc, make_whisper, speech

from stages.corpora.demo.speech import RATE, speak
from stages.encoders.asr_times import PAD_SECONDS, Config, TimedRecognizer
from stages.engine.errors import PipelineError, Skip
from stages.engine.files import write_rows
from stages.engine.manifest import Clip, Segment, write_manifest
from stages.engine.params import load
from stages.inference.clips import digest_of, name_of
from stages.inference.predictor import Prediction
from stages.inference.recordings import even, voices
from stages.inference.timeline import clock, recordings, render_timeline
from stages.rank_emotions import read_work
from stages.rankings.clips import load as load_clip
from stages.rankings.clips import wav

SENTENCES = ["我今天很高兴，因为你来了。", "你为什么不告诉我？"]
HISS = (np.arange(40_000) % 2).astype(np.int16)  # as good as silent, but not the zeros of digital silence
QUIET = 2.0  # seconds before, between and after the sentences


def write_recording(path: Path) -> list[tuple[float, float]]:
    """Both sentences, spoken; returns when (seconds)."""
    rng = np.random.default_rng(0)
    parts, spoken, at = [np.zeros(round(16_000 * QUIET), np.float32)], [], QUIET
    for text in SENTENCES:
        voice = soxr.resample(speak(text, "neutral", rng), RATE, 16_000)
        parts += [voice, parts[0]]
        spoken.append((at, at + len(voice) / 16_000))
        at = spoken[-1][1] + QUIET
    path.write_bytes(wav((np.concatenate(parts) * 32767).astype(np.int16)))
    return spoken


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- where recordings are cut


def test_voices_are_found_where_somebody_speaks(tmp_path: Path) -> None:
    spoken = write_recording(tmp_path / "a.wav")
    found = voices(str(tmp_path / "a.wav")).values
    assert len(found) == 2
    for (start, end, words), (begun, ended) in zip(found, spoken, strict=True):
        assert begun - 0.3 < start < begun + 0.5 and ended - 0.8 < end < ended + 0.3 and words == ""


def test_nobody_speaks_in_silence(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(HISS[:40_000]))
    with pytest.raises(Skip, match=r"nobody speaks in its 2\.5 s"):
        voices(str(tmp_path / "a.wav"))


@pytest.mark.parametrize(("length", "seconds", "bounds"), [
    (10, 4, [0, 4, 10]), (10, 2.5, [0, 2.5, 5, 7.5, 10]), (3, 10, [0, 3]), (11, 4, [0, 4, 8, 11]), (0.4, 1, [0, 0.4]),
])
def test_even_segments_cover_the_recording(
    tmp_path: Path, length: float, seconds: float, bounds: list[float]
) -> None:
    (tmp_path / "a.wav").write_bytes(wav(np.ones(round(16_000 * length), np.int16)))
    found = even(str(tmp_path / "a.wav"), seconds).values
    assert found == [(start, end, "") for start, end in zip(bounds, bounds[1:], strict=False)]


def test_a_length_that_no_header_gives_is_measured(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.ts", 2.0)
    whole = (tmp_path / "a.ts").read_bytes()
    write_clip(tmp_path / "b.aac", 2.0, picture=False)
    for path in (tmp_path / "a.ts", tmp_path / "b.aac"):
        assert even(str(path), 1.0).values[-1][1] == pytest.approx(2, abs=0.3), path
    (tmp_path / "c.ts").write_bytes(whole[:200])
    with pytest.raises(Skip):
        even(str(tmp_path / "c.ts"), 1.0)


def test_ctc_models_say_when_their_characters_are_heard(tmp_path: Path) -> None:
    recogniser = TimedRecognizer(Config(str(make_ctc(tmp_path / "ctc", "layer")), None, None, "float32"), "cpu")
    known = recogniser._tokenizer.get_vocab()
    blank, bar = known["<pad>"], known["|"]
    heard = [known[c] for c in "我你"]
    ids = [blank] * 10 + heard + [blank] * 20 + [known["他"]] + [bar] + [blank] * 40 + [known["好"]] * 2 + [blank] * 10
    found = recogniser._spans(ids, 0.02)  # a pause of 0.4 s, and one of 0.8 s
    assert [text for _, _, text in found] == ["我你他", "好"]
    assert [moment for span in found for moment in span[:2]] == pytest.approx(
        [0.2 - PAD_SECONDS, 0.66 + PAD_SECONDS, 1.48 - PAD_SECONDS, 1.52 + PAD_SECONDS])
    assert recogniser._spans([blank, bar, blank], 0.02) == []
    said = recogniser.encode([recogniser.prepare((speech(65, seed=2, rate=16_000), 16_000))])[0]  # three windows
    assert said and said[-1].end > 60 and all(0 <= part.start < part.end <= 65 and part.text for part in said)
    assert [part.start for part in said] == sorted(part.start for part in said)


def test_whisper_marks_its_sentences(tmp_path: Path) -> None:
    folder = make_whisper(tmp_path / "whisper", timestamps=101)
    recogniser = TimedRecognizer(Config(str(folder), None, "zh", "float32"), "cpu")
    waveform = recogniser.prepare((speech(5.0, rate=16_000), 16_000))
    (said,) = recogniser.encode([waveform])
    assert said and all(0 <= part.start < part.end <= 5.0 for part in said)
    assert max(part.end for part in said) > 2.1  # beyond the first of the windows of 2 s
    assert all(re.fullmatch(r"[a-z ]+", part.text) for part in said)


def test_a_checkpoint_without_times_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"its words come without times .* or use --segment vad"):
        TimedRecognizer(Config(str(make_whisper(tmp_path / "whisper")), None, "zh", "float32"), "cpu")


def test_segments_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"x")
    path = str(tmp_path / "a.wav")
    pieces = [Segment(path, 0, 1.5), Segment(path, 1.5, 3), Segment(path, 3, None), tmp_path / "a.wav"]
    assert len({name_of(piece) for piece in pieces}) == len({digest_of(piece) for piece in pieces}) == 4
    assert name_of(pieces[0]) == f"{path} 0.000-1.500 s"


def test_a_ranking_voice_that_hears_clips_gets_the_segment_not_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = load()
    p = p.model_copy(update={"rankings": p.rankings.model_copy(update={"input": "clip"}),
                             "corpus": p.corpus.model_copy(update={"path": str(tmp_path)})})
    monkeypatch.chdir(tmp_path)
    Path("a.wav").write_bytes(wav(speech(4.0, rate=16_000)))
    write_manifest([Clip("a", "a.wav", "test", "", "我", "", 1.5, 1, "00", 1.0, 2.5)])
    write_rows("data/transcripts.csv", ["clip_id", "transcript"], [("a", "我")])
    (row,) = read_work([p])
    assert row.path == Segment(f"{tmp_path}/a.wav", 1.0, 2.5)
    _, sound = load_clip(row.path, 2, 64)
    assert sound is not None and len(sound) == 24_000


# ---------------------------------------------------------------- the command


def test_a_row_for_every_segment_and_a_page(trained_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoken = write_recording(Path("talk.wav"))
    Path("silence.wav").write_bytes(wav(HISS[:32_000]))
    run_predict("silence.wav", "talk.wav", "--segment", "vad", "--out", "p.csv", "--html", "pages/p.html")
    found = table(Path("p.csv"))
    assert [row["clip"] for row in found] == ["silence.wav", "talk.wav", "talk.wav"]
    assert found[0]["prediction"] == found[0]["start"] == "" and "nobody speaks" in found[0]["reason"]
    assert "warning: silence.wav: nobody speaks in its 2.0 s" in capfd.readouterr().err
    for row, (start, end) in zip(found[1:], spoken, strict=True):
        assert row["prediction"] and row["present_hubert"] == "true" and row["present_clip"] == "false"
        assert abs(float(row["start"]) - start) < 0.5 and abs(float(row["end"]) - end) < 0.8
    page = Path("pages/p.html").read_text(encoding="utf-8")
    assert page.count("<rect") >= 4 and page.count('<svg class="timeline"') == 1
    assert all(row["prediction"] in page for row in found[1:]) and "nobody speaks in its 2.0 s" in page


def test_a_segment_is_predicted_as_the_same_sound_in_a_file_of_its_own(trained_copy: Path) -> None:
    sound = speech(4.0, rate=16_000)
    Path("long.wav").write_bytes(wav(sound))
    Path("part.wav").write_bytes(wav(sound[32_000:]))
    run_predict("long.wav", "--segment", "2", "--out", "p.csv")
    run_predict("part.wav", "--out", "q.csv")
    (first, second), (alone,) = table(Path("p.csv")), table(Path("q.csv"))
    assert [(row["start"], row["end"]) for row in (first, second)] == [("0.0", "2.0"), ("2.0", "4.0")]
    assert numbers(second) == pytest.approx(numbers(alone), abs=5e-4)  # resampling begins at another moment
    assert not np.allclose(numbers(first), numbers(alone), atol=2e-3)


def test_sentences_of_the_recogniser_come_with_their_words(trained_copy: Path) -> None:
    make_ctc(Path("models/ctc"), "layer")
    change("transcribe.checkpoint", "models/ctc")
    Path("long.wav").write_bytes(wav(speech(35.0, rate=16_000)))
    run_predict("long.wav", "clips/a.mp4", "--segment", "asr", "--out", "p.csv")
    found = [row for row in table(Path("p.csv")) if row["clip"] == "long.wav"]
    assert found and all(row["transcript"] and row["ranking"] and row["present_baichuan"] == "true" for row in found)
    assert all(float(row["start"]) < float(row["end"]) <= 35 for row in found)


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--segment", "words"], "--segment: found 'words', expected vad, asr or a number of seconds from 0.5 on"),
    (["--segment", "0.1"], "--segment: found '0.1'"),
    (["--segment", "nan"], "--segment: found 'nan'"),
    (["--segment", "inf"], "--segment: found 'inf'"),
    (["--segment", "-3"], "--segment: found '-3'"),
    (["--segment", "asr"], "--segment asr: params.yaml: transcribe.checkpoint is null"),
    (["--segment", "vad", "--transcript", "我"], "--segment: can't tell which words of --transcript"),
    (["--segment", "vad", "--html", "clips"], "--html: clips is a folder, expected the name of a file to write"),
    (["--html", "params.yaml/p.html"], "--html: params.yaml/p.html is a file that can't be reached (Not a directory)"),
])
def test_bad_arguments_are_one_line_before_any_work(
    trained_copy: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    run_predict("clips/a.mp4", *arguments, expect=1)
    assert expected in error_of(capfd)


# ---------------------------------------------------------------- the page


class Tags(HTMLParser):
    """What elements and attributes a page has."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def prediction(clip: Segment | Path, probabilities: list[float] | None, transcript: str = "") -> Prediction:
    values = None if probabilities is None else np.array(probabilities, np.float32)
    return Prediction(clip, values, 1, np.zeros(1), (True,), transcript, None, "")


def test_the_page_shows_whatever_the_words_and_names_are_and_loads_nothing() -> None:
    evil = "<script>alert(1)</script><img src=http://x onerror=alert(2)>"
    name = f"{evil}.wav"
    found = [prediction(Segment(name, 0, 2), [0.9, 0.1], evil), prediction(Segment(name, 4, 6.5), [0.2, 0.8]),
             prediction(Segment(name, 7, 8), None), prediction(Path("b.mp4"), [0.4, 0.6])]
    page = render_timeline(found, [evil, "b"])
    seen = Tags(page)
    assert not seen.tags & {"script", "img", "link", "iframe"} and not seen.attributes & {"onerror", "src", "href"}
    assert "default-src 'none'" in page and "script-src" not in page and "&lt;script&gt;alert(1)" in page
    first, second = recordings(found, ["a", "b"])
    assert first.seconds == 8 and first.shares() == [("b", 2.5 / 4.5), ("a", 2 / 4.5)]
    assert second.seconds == 0 and page.count("<svg") == 1


def test_moments_read_as_a_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 83.2, 3725)] == ["0:00", "1:00", "1:23", "1:02:05"]
    assert [clock(s, 1) for s in (3.25, 83.27)] == ["0:03.2", "1:23.3"]
