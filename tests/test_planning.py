"""What fusion.modalities needs is made and nothing else; what is missing is said at once, in one message."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from yaml_values import set_value

from stages import extract, extract_audio, gather_features, plan, rank_emotions, slice_frames, train_emovclip
from stages.engine.errors import NO_FILE, PipelineError
from stages.engine.manifest import Clip, write_manifest
from stages.engine.params import Params, load
from stages.engine.plan import PLAN
from stages.engine.store import Store, read_index
from stages.planning.needs import left_out
from stages.planning.requirements import missing, row_left_out

ROOT = Path(__file__).parent.parent
EVERYTHING = {"corpus", "audio", "frames", "faces", "transcripts.csv", "rankings.jsonl", "emovclip"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository with the shipped params, as one for a corpus of one's own."""
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    change(corpus__adapter="csv", corpus__path="corpus", corpus__truth=None)
    return tmp_path


def change(**values: Any) -> Params:
    for key, value in values.items():
        set_value(Path("params.yaml"), key.replace("__", "."), value)
    return load()


@pytest.mark.parametrize(("modalities", "rest", "made"), [
    (["acoustic"], {}, {"audio", "transcripts.csv"}),
    (["hubert", "acoustic"], {}, {"audio", "transcripts.csv"}),
    (["clip"], {}, {"faces", "transcripts.csv"}),
    (["emovclip"], {}, {"frames", "emovclip", "transcripts.csv"}),
    (["baichuan"], {}, {"transcripts.csv", "rankings.jsonl"}),
    (["acoustic"], {"self_training__voices": ["ranking"]}, {"audio", "transcripts.csv", "rankings.jsonl"}),
    (["baichuan"], {"extractors__baichuan__input": "transcripts.csv"}, {"transcripts.csv"}),
    (["baichuan"], {"transcribe__checkpoint": "openai/whisper-tiny"}, {"audio", "transcripts.csv", "rankings.jsonl"}),
    (["clip"], {"transcribe__checkpoint": "openai/whisper-tiny"}, {"faces"}),
    (["emovclip"], {"extractors__emovclip__prompts": "models/other"}, {"frames", "transcripts.csv"}),
    (["hubert", "clip", "emovclip", "baichuan"], {}, EVERYTHING - {"corpus"}),
])
def test_only_what_the_named_rows_need_is_made(folder: Path, modalities: list[str], rest: dict[str, Any],
                                               made: set[str]) -> None:
    left = left_out(change(fusion__modalities=modalities, **rest))
    assert left.keys() == EVERYTHING and {name for name, reason in left.items() if reason is None} == made | {"corpus"}


def test_a_further_modality_changes_the_files_that_it_needs_alone(folder: Path) -> None:
    before = left_out(change(fusion__modalities=["acoustic"]))
    for added, changed in {"hubert": set(), "clip": {"faces"}, "emovclip": {"frames", "emovclip"},
                           "baichuan": {"rankings.jsonl"}}.items():
        after = left_out(change(fusion__modalities=["acoustic", added]))
        assert {name for name in after if after[name] != before[name]} == changed, added


def test_what_was_made_for_this_corpus_stays_made(folder: Path) -> None:
    p = change(fusion__modalities=["acoustic"])
    outs: dict[str, dict[str, Any]] = {
        "crop_faces": {"nfiles": 3, "size": 9000}, "slice_frames": {"nfiles": 1, "size": 90},  # the latter is empty
        "train_emovclip": {"nfiles": 1, "size": 30}, "rank_emotions": {"size": 5000},
    }
    stages = {name: {"outs": [out]} for name, out in outs.items()}
    common = {"corpus", "audio", "transcripts.csv"}

    def made(adapter: str = "csv", path: str = "corpus", p: Params = p) -> set[str]:
        corpus = {"deps": [{"path": path}], "params": {"params.yaml": {"corpus.adapter": adapter}}}
        Path("dvc.lock").write_text(json.dumps({"stages": stages | {"corpus": corpus}}))
        return {name for name, reason in left_out(p).items() if reason is None}

    assert made() == common | {"faces", "rankings.jsonl"}
    assert made("demo") == made(path="elsewhere") == common
    assert made(p=change(rankings__provider="openai")) == common | {"faces"}  # nothing is paid for in vain
    outs["rank_emotions"]["size"] = 150
    assert made() == common | {"faces"}


@pytest.mark.parametrize(("row", "values", "reason"), [
    ("acoustic", {}, None),
    ("hubert", {}, "models/demo/hubert is missing: of the demo"),
    ("hubert", {"extractors__hubert__checkpoint": "here"}, None),
    ("hubert", {"extractors__hubert__checkpoint": "nowhere"}, "nowhere is missing: no such folder"),
    ("hubert", {"extractors__hubert__checkpoint": "empty"}, "empty is missing: no weights in that folder"),
    ("hubert", {"extractors__hubert__checkpoint": "owner/name"}, "the hub does not give it"),
    ("clip", {"extractors__clip__checkpoint": "here"}, "no row of fusion.modalities reads data/faces"),
    ("baichuan", {"extractors__baichuan__checkpoint": "here"}, "no row of fusion.modalities reads rankings"),
    ("baichuan", {"extractors__baichuan__checkpoint": "here", "extractors__baichuan__input": "transcripts.csv"}, None),
    ("emovclip", {"extractors__emovclip__input": "audio", "extractors__emovclip__checkpoint": "here"},
     "no row of fusion.modalities loads models/emovclip"),
])
def test_a_row_that_the_fusion_does_not_name_is_made_where_it_can_be(
    folder: Path, row: str, values: dict[str, Any], reason: str | None
) -> None:
    for name in ("here", "empty"):
        (folder / name).mkdir()
    (folder / "here/model.safetensors").touch()
    p = change(fusion__modalities=["hubert" if row == "acoustic" else "acoustic"], **values)
    found = row_left_out(p, row)
    assert (found is None) if reason is None else reason in str(found)
    assert row_left_out(change(fusion__modalities=[row]), row) is None  # what is named is made, or said to be missing


@pytest.mark.parametrize(("values", "expected"), [
    ({"fusion__modalities": ["acoustic"]}, []),
    ({"fusion__modalities": ["acoustic"], "corpus__path": "away"}, ["corpus.path: found no folder away"]),
    ({"fusion__modalities": ["acoustic"], "corpus__truth": "t.csv"}, ["corpus.truth: found no file t.csv"]),
    ({}, ["extractors.hubert.checkpoint (models/demo/hubert), extractors.clip.checkpoint (models/demo/clip)"]),
    ({"fusion__modalities": ["clip"], "faces__detector": "openface", "faces__openface_binary": "/no/such",
      "corpus__path": "away"}, ["corpus.path", "extractors.clip.checkpoint", "faces.openface_binary: /no/such"]),
    ({"fusion__modalities": ["baichuan"], "rankings__provider": "openai", "rankings__api_key_env": "NO_SUCH_KEY"},
     ["extractors.baichuan.checkpoint", "rankings.api_key_env: no key"]),
    ({"fusion__modalities": ["baichuan"], "rankings__provider": "transformers", "rankings__model": "no/model"},
     ["extractors.baichuan.checkpoint", "rankings.model (no/model): no such folder, and the hub"]),
    ({"fusion__modalities": ["hubert"], "extractors__hubert__checkpoint": "no/hubert"},
     ["extractors.hubert.checkpoint (no/hubert): no such folder, and the hub does not give it"]),
    ({"fusion__modalities": ["clip"], "extractors__clip__checkpoint": "ViT-L-14 / nobody"},
     ["extractors.clip.checkpoint (ViT-L-14 / nobody): open_clip has no such model"]),
])
def test_everything_that_is_missing_is_in_one_message(
    folder: Path, values: dict[str, Any], expected: list[str]
) -> None:
    change(**values)
    found = missing(load())
    assert len(found) == len(expected)
    for fault, part in zip(found, expected, strict=True):
        assert part in fault and "\n" not in fault
    if expected:
        with pytest.raises(PipelineError) as caught:
            plan.main()
        assert all(part in str(caught.value) for part in expected) and not PLAN.exists()


def test_stages_that_nobody_needs_leave_an_empty_output_and_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change(fusion__modalities=["acoustic"])
    plan.main()
    write_manifest([Clip("a", "a.wav", "labelled", "anger", "words", "", 1.0, 1, "00")])
    Path("data/transcripts.csv").write_text("clip_id,transcript\na,words\n")
    slice_frames.main()
    rank_emotions.main()
    train_emovclip.main()
    monkeypatch.setattr("sys.argv", ["extract", "clip"])
    extract.main()
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["slice_frames", "rank_emotions", "train_emovclip", "extract@clip"]
    assert len(Store("data/frames")) == 0 and "data/frames" in Store("data/frames").empty
    assert read_index(Path("features/clip"))["shards"] == {}
    assert json.loads(Path("data/rankings.jsonl").read_text())["clip_ids"] == []
    assert [path.name for path in Path("models/emovclip").iterdir()] == ["curves.csv"]
    change(fusion__modalities=["clip"])
    with pytest.raises(PipelineError, match=r"features/clip: empty \(no row .*dvc repro -f -s extract@clip"):
        gather_features.main()


def wav(path: Path, samples: np.ndarray) -> None:
    import wave

    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.astype("<i2").tobytes())


def test_clips_that_have_no_such_stream_are_no_bad_ones(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(fusion__modalities=["acoustic", "clip"], corpus__max_bad_fraction=0.3)
    wav(folder / "corpus/a.wav", 900 * np.sin(np.arange(8000)))
    wav(folder / "corpus/b.wav", 900 * np.cos(np.arange(8000)))
    (folder / "corpus/c.wav").write_text("no media")
    clips = [Clip(name, f"{name}.wav", "labelled", "anger", "", "", 1.0, 1, f"{i:02x}") for i, name in enumerate("abc")]
    words = [Clip(name, "", "labelled", "anger", "words", "", None, 0, "") for name in "defghij"]
    write_manifest(clips + words)
    with pytest.raises(PipelineError, match="extract_audio: 1 of 3 clips can't be used, more than"):
        extract_audio.main()
    write_manifest(clips[:2] + words)
    extract_audio.main()
    assert f"extract_audio: of 9 clips 7 have {NO_FILE}" in capsys.readouterr().out
    store = Store("data/audio")
    assert store.present.tolist() == [True] * 2 + [False] * 7 and set(store.reasons) == {"", NO_FILE}
    change(fusion__modalities=["emovclip"])
    with pytest.raises(PipelineError, match="slice_frames: of 9 clips 7 have no media file, 2 have no video stream, "
                                            "but fusion.modalities names emovclip"):
        slice_frames.main()
