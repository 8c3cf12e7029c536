"""A local model that sees and hears: a miniature of the Qwen2.5-Omni kind with random weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import LABELS
from clip_files import write_clip
from miniature_omni import save_omni
from ruamel.yaml import YAML

from stages import rank_emotions
from stages.engine.errors import PipelineError, Skip
from stages.engine.files import file_digest, write_rows
from stages.engine.manifest import Clip, write_manifest
from stages.engine.params import load
from stages.engine.yaml_file import read_yaml
from stages.rankings.clips import item_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import torch

    folder = tmp_path_factory.mktemp("omni")
    save_omni(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)


def local(folder: Path, clips: dict[str, Path]) -> Any:
    from stages.rankings.omni_provider import Omni

    changes = {"model": str(folder), "frames": 3, "frame_side": 32}
    return Omni(load(ROOT / "params.yaml").rankings.model_copy(update=changes), LABELS, "cpu", clips)


@pytest.mark.parametrize("lacking", ["nothing", "picture", "sound"])
def test_a_label_scores_by_the_likelihood_of_its_tokens(omni: Path, tmp_path: Path, lacking: str) -> None:
    """Against one full forward pass per label, without a cache or a batch."""
    import torch

    item, path = item_of("d", "我很开心"), tmp_path / "a.mp4"
    write_clip(path, 1.0, picture=lacking != "picture", sound=lacking != "sound")
    provider = local(omni, {item: path})
    inputs, labels = provider.encode(item)
    assert ("pixel_values" in inputs) == (lacking != "picture")
    assert ("input_features" in inputs) == (lacking != "sound")
    text = provider._processor.tokenizer.decode(inputs["input_ids"][0])
    assert 'Transcript: "我很开心"' in text and text.endswith('[assistant]{"ranking": ["')
    expected = []
    for label, tokens in zip(LABELS, labels, strict=True):
        assert provider._processor.tokenizer.decode(tokens).removesuffix('"') == label
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
        with torch.inference_mode():
            whole = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = provider._model(**whole).logits[0].log_softmax(-1)
        before = inputs["input_ids"].shape[1] - 1
        expected.append(sum(float(logits[before + i, token]) for i, token in enumerate(tokens)) / len(tokens))
    assert provider.scores(inputs, labels).tolist() == pytest.approx(expected, abs=1e-4)


def test_what_is_seen_and_heard_matters(omni: Path, tmp_path: Path) -> None:
    paths = {}
    for name, options in {"a": {}, "dark": {"brightness": -20}, "low": {"pitch": 0.05}, "again": {}}.items():
        path = tmp_path / f"{name}.mp4"
        write_clip(path, 1.0, **options)  # type: ignore[arg-type]
        paths[item_of(name, "好")] = path
    provider = local(omni, paths)
    scores = [provider.scores(*provider.encode(item)) for item in paths]
    assert scores[0].tolist() == scores[3].tolist()
    assert all(abs(scores[0] - other).max() > 1e-4 for other in scores[1:3])


def test_the_thinker_of_a_whole_model_is_loaded(omni: Path, tmp_path: Path) -> None:
    item = item_of("d", "好")
    write_clip(tmp_path / "a.mp4", 1.0)
    save_omni(tmp_path / "whole", nested=True)
    scores = [p.scores(*p.encode(item)).tolist()
              for p in (local(folder, {item: tmp_path / "a.mp4"}) for folder in (omni, tmp_path / "whole"))]
    assert scores[0] == scores[1]


def test_another_kind_of_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(PipelineError, match="is a llama, expected one of qwen2_5_omni, .*input: clip"):
        local(tmp_path, {})


def test_a_clip_that_can_not_be_decoded_is_skipped(omni: Path, tmp_path: Path) -> None:
    item = item_of("d", "好")
    (tmp_path / "a.mp4").write_text("no clip")
    with pytest.raises(Skip, match="can't be opened"):
        local(omni, {item: tmp_path / "a.mp4"}).encode(item)


def test_the_stage_ranks_clips_with_it(omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in "ab":
        write_clip(tmp_path / f"{name}.mp4", 1.0, brightness=-20 * (name == "b"))
    (tmp_path / "c.mp4").write_text("no clip")
    write_manifest([Clip(n, f"{n}.mp4", "test", "", "", "", None, 1, file_digest(f"{n}.mp4")) for n in "abc"])
    write_rows("data/transcripts.csv", ["clip_id", "transcript", "source"], [(n, "", "none") for n in "abc"])
    values = read_yaml(ROOT / "params.yaml")
    values["corpus"] |= {"path": ".", "max_bad_fraction": 0.4}
    values["rankings"] |= {"provider": "transformers", "model": str(omni), "input": "clip", "frames": 2}
    values["runtime"]["device"] = "cpu"
    YAML().dump(values, tmp_path / "params.yaml")
    rank_emotions.main()
    rows = [json.loads(line) for line in Path("data/rankings.jsonl").read_text().splitlines()]
    assert [row["clip_ids"] for row in rows] == [["a"], ["b"], ["c"]]
    assert all(sorted(row["ranking"]) == sorted(LABELS) for row in rows[:2])
    assert rows[2]["ranking"] is None and "can't be opened" in rows[2]["reason"]
    write_manifest([Clip(n, f"{n}.mp4", "test", "", "", "", None, 1, file_digest(f"{n}.mp4")) for n in "ab"])
    monkeypatch.setattr("stages.rankings.omni_provider.Omni.__init__", None)
    rank_emotions.main()  # from the cache: no model is loaded
