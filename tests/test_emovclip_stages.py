"""EmoVCLIP's training stage and its encoder: resumption, folds kept apart, whose prompts they are, bad files."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_emovclip import LABELS, SIDE, pictures

from stages import train_emovclip
from stages.encoders import emovclip
from stages.encoders.clip import Images
from stages.encoders.emovclip import PromptedCLIP
from stages.encoders.emovclip_training import Trainer
from stages.engine.devices import lanes
from stages.engine.errors import PipelineError
from stages.engine.files import write_rows
from stages.engine.manifest import Clip, write_manifest
from stages.engine.params import load
from stages.engine.store import Row, Store, write_index, write_shard

ROOT = Path(__file__).parent.parent


@pytest.fixture
def house(clip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with 12 labelled and 4 other clips, two folds, a miniature CLIP and a short recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copytree(clip_checkpoint, tmp_path / "models/demo/clip")
    set_params(epochs=3, warmup_epochs=1, batch_size=4, frames=2)
    make_data(np.arange(12) % len(LABELS))
    return tmp_path


def set_params(**changes: Any) -> None:
    """params.yaml of the repository, on the CPU, with other values in its section emovclip."""
    lines = (ROOT / "params.yaml").read_text().splitlines()
    start = lines.index("emovclip:")
    for i in range(start + 1, start + 20):
        key = lines[i].strip().partition(":")[0]
        if key in changes:
            lines[i] = f"  {key}: {changes[key]}"
    text = "\n".join(lines).replace("device: auto", "device: cpu").replace("workers: auto", "workers: 2")
    Path("params.yaml").write_text(text + "\n")


def make_data(labels: np.ndarray) -> None:
    """Manifest, folds (0 for the first six) and frames; the last clip has none."""
    names = [f"clip_{i:02d}" for i in range(len(labels) + 4)]
    clips = [Clip(name, f"{name}.mp4", "labelled" if i < len(labels) else "test", LABELS[labels[i]] if i < len(labels)
                  else "", "", "", 1.0, 1, "") for i, name in enumerate(names)]
    write_manifest(clips)
    write_rows("data/folds.csv", ("clip_id", "fold"), [(n, i // 6) for i, n in enumerate(names[: len(labels)])])
    shown = pictures(np.arange(len(names)) % len(LABELS), 3, noise=0.3)
    rows = [Row(n, values=[cv2.imencode(".jpg", image)[1].tobytes() for image in images], items={"frame": [0, 1, 2]})
            for n, images in zip(names[:-1], shown, strict=False)]
    rows.append(Row(names[-1], reason="no video stream"))
    shutil.rmtree("data/frames", ignore_errors=True)
    write_shard(Path("data/frames/shard-00000.h5"), "images", rows, {"fingerprint": "x", "short_side": SIDE})
    write_index(Path("data/frames"), ["shard-00000.h5"])


def outputs(folder: str = "models/emovclip") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_killed_training_goes_on_at_the_last_finished_epoch(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_emovclip.main()
    expected = outputs()
    assert set(expected) == {"fold-0.safetensors", "fold-1.safetensors", "curves.csv", "trained.json"}
    keep, epochs = train_emovclip.keep, Trainer.run_epoch
    done: list[int] = []

    def killed_after_four(*args: Any) -> None:
        keep(*args)
        if len(done) == 4:
            raise KeyboardInterrupt

    def counted(self: Trainer) -> float:
        done.append(self.epoch)
        return epochs(self)

    monkeypatch.setattr(train_emovclip, "keep", killed_after_four)
    monkeypatch.setattr(Trainer, "run_epoch", counted)
    with pytest.raises(KeyboardInterrupt):
        train_emovclip.main()
    monkeypatch.setattr(train_emovclip, "keep", keep)
    monkeypatch.setattr(train_emovclip, "CACHE_BYTES", 0)  # as on a large corpus: decoded whenever asked for
    train_emovclip.main()
    assert done == [0, 1, 2, 0, 1, 2]  # six epochs of two folds, none twice
    assert outputs() == expected


def test_a_folds_prompts_never_see_its_validation_labels(house: Path) -> None:
    labels = np.arange(12) % len(LABELS)
    train_emovclip.main()
    before = outputs()
    make_data(np.concatenate([labels[:6][::-1], labels[6:]]))  # other labels for fold 0's clips
    train_emovclip.main()
    after = outputs()
    assert after["fold-0.safetensors"] == before["fold-0.safetensors"]
    assert after["fold-1.safetensors"] != before["fold-1.safetensors"]


def encoder(**changes: Any) -> emovclip.Encoder:
    options: dict[str, Any] = {"checkpoint": "models/demo/clip", "revision": None, "dtype": "float32"}
    return emovclip.Encoder(emovclip.Config(**{**options, "prompts": "models/emovclip", **changes}), "cpu")


def test_features_of_a_frame_under_every_folds_prompts(house: Path) -> None:
    train_emovclip.main()
    both = encoder()
    assert (both.folds, both.dimension, both.variance) == (2, 64, False)
    jpegs = Store("data/frames").read("clip_07")
    [found] = both.encode([both.prepare(jpegs)])
    assert found.shape == (3, 2 * 64) and found.dtype == np.float32
    for fold, features in enumerate(np.split(found, 2, axis=1)):
        model, _ = emovclip.load_promptable("models/demo/clip", None, "float32", "cpu")
        alone = PromptedCLIP(model, emovclip.load_prompts(f"models/emovclip/fold-{fold}.safetensors", model))
        images = Images(model.visual)
        with torch.inference_mode():
            expected = alone.frame_features(images.to_input(images.decode(jpegs), "cpu", torch.float32))
        assert np.array_equal(features, expected.numpy())
    assert not np.allclose(*np.split(found, 2, axis=1), atol=1e-3)


def test_threads_at_once_each_have_their_folds_prompts(house: Path) -> None:
    train_emovclip.main()
    both, rng = encoder(), np.random.default_rng(0)
    clips = [rng.integers(0, 256, (1, SIDE, SIDE, 3), np.uint8) for _ in range(40)]
    expected = [both.encode([clip])[0] for clip in clips]
    assert both.concurrent
    with lanes(4) as pool:
        for found, alone in zip(pool.map(lambda clip: both.encode([clip])[0], clips), expected, strict=True):
            np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)


def test_curves(house: Path) -> None:
    train_emovclip.main()
    with open("models/emovclip/curves.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["fold"], row["epoch"]) for row in rows] == [(str(f), str(e)) for f in (0, 1) for e in (1, 2, 3)]
    assert all(0 <= float(row["valid_waf"]) <= 100 for row in rows)


def test_scope_all_is_one_fold(house: Path) -> None:
    set_params(scope="all", epochs=1, warmup_epochs=0)
    train_emovclip.main()
    assert set(outputs()) == {"all.safetensors", "curves.csv", "trained.json"}
    assert encoder().folds == 1


def test_no_prompts_is_no_training_and_zero_shot_features(house: Path) -> None:
    set_params(prompts=0)
    train_emovclip.main()
    both = encoder()
    [found] = both.encode([both.prepare(Store("data/frames").read("clip_07"))])
    assert np.array_equal(*np.split(found, 2, axis=1)) and found.any()


def test_prompts_of_another_checkpoint_are_refused(house: Path) -> None:
    set_params(prompts=0)
    train_emovclip.main()
    trained = json.loads(Path("models/emovclip/trained.json").read_text())
    assert {"checkpoint", "revision", "dtype", "digest", "scope", "folds", "prompts", "depth", "code"} == set(trained)
    with pytest.raises(PipelineError, match="models/emovclip: .* trained for .* revision None, .* revision 'other'"):
        encoder(revision="other")
    shutil.copytree("models/demo/clip", "moved")
    encoder(checkpoint="moved")  # the same files
    Path("moved/notes.json").write_text("{}")
    with pytest.raises(PipelineError, match="models/emovclip: .* trained for checkpoint models/demo/clip, digest"):
        encoder(checkpoint="moved")
    for folds in (0, "2", 10**9):
        Path("models/emovclip/trained.json").write_text(json.dumps(trained | {"folds": folds}))
        with pytest.raises(PipelineError, match=f"models/emovclip/trained.json: folds: found {folds!r}"):
            encoder()
    Path("models/emovclip/trained.json").write_text("[")
    with pytest.raises(PipelineError, match="models/emovclip: trained.json can't be read"):
        encoder()


@pytest.mark.parametrize(("chosen", "free", "expected"),
                         [("auto", 1 << 40, False), ("auto", 1 << 10, True), (True, 1 << 40, True), (False, 0, False)])
def test_gradients_are_checkpointed_when_memory_asks(
    house: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | bool, free: int, expected: bool
) -> None:
    p = load()
    runtime = p.runtime.model_copy(update={"gradient_checkpointing": chosen})
    monkeypatch.setattr(train_emovclip, "load", lambda: p.model_copy(update={"runtime": runtime}))
    monkeypatch.setattr(train_emovclip, "free_bytes", lambda device: free)
    used: list[bool] = []
    run_epoch = Trainer.run_epoch

    def noted(self: Trainer) -> float:
        used.append(self.clip.model.visual.transformer.grad_checkpointing)
        return run_epoch(self)

    monkeypatch.setattr(Trainer, "run_epoch", noted)
    train_emovclip.main()
    assert set(used) == {expected}


@pytest.mark.parametrize("change", ["gone", "narrow", "flat", "text", "missing"])
def test_bad_prompt_files(house: Path, change: str) -> None:
    set_params(prompts=0)
    train_emovclip.main()
    path = Path("models/emovclip/fold-1.safetensors")
    tensors = {"vision": torch.zeros(2, 4, 64), "text": torch.zeros(2, 4, 32)}
    if change == "gone":
        del tensors["text"]
    elif change in ("narrow", "flat"):
        tensors["text"] = torch.zeros(2, 4, 31) if change == "narrow" else torch.zeros(8, 32)
    save_file(tensors, path)
    if change == "text":
        path.write_text("not prompts")
    elif change == "missing":
        path.unlink()
    with pytest.raises(PipelineError, match="fold-1.safetensors: (tensor text|can't be read)"):
        encoder()
