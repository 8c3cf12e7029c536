"""EmoVCLIP: prompts in open_clip's towers, words, training and its resumption, the two stages."""

import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from open_clip import get_tokenizer
from safetensors.torch import load_file, save_file

from stages import extract_emovclip, train_emovclip
from stages.corpus.demo.clip_checkpoint import make_clip
from stages.corpus.manifest import Clip, write_manifest, write_rows
from stages.encoders import emovclip
from stages.encoders.clip import Images, load_clip
from stages.encoders.emovclip import PromptedCLIP, Prompts, initial_prompts, label_tokens, video_features
from stages.encoders.emovclip_training import (
    Clips,
    Recipe,
    Trainer,
    augment,
    colour_jitter,
    schedule,
    segments,
    training_bytes,
)
from stages.errors import PipelineError
from stages.params import load
from stages.store import Row, Store, write_index, write_shard

ROOT = Path(__file__).parent.parent
LABELS = ["neutral", "anger", "happiness", "sadness", "worry", "surprise"]
TEMPLATE = "a photo of a person feeling {label}."
SIDE = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("emovclip")
    make_clip(root / "clip", seed=1)
    return root / "clip"


def loaded(folder: Path, prompts: int, depth: int = 12, dtype: str = "float32") -> tuple[PromptedCLIP, torch.Tensor]:
    model, name = emovclip.load_promptable(str(folder), None, dtype, "cpu")
    tokens = label_tokens(get_tokenizer(name), TEMPLATE, LABELS, prompts)
    return PromptedCLIP(model, initial_prompts(model, tokens, prompts, depth, seed=0)), tokens


def frames(clips: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(clips, count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def pictures(labels: np.ndarray, count: int, noise: float, seed: int = 0) -> np.ndarray:
    """(n, count, H, W, 3) uint8: a texture for each label, and noise."""
    rng = np.random.default_rng(seed)
    textures = cv2.GaussianBlur(rng.normal(0, 1, (SIDE, SIDE, 3 * len(LABELS))), (0, 0), 2)
    textures = np.moveaxis(textures.reshape(SIDE, SIDE, len(LABELS), 3) / textures.std(), 2, 0)
    shown = textures[labels][:, None] + noise * rng.normal(0, 1, (len(labels), count, SIDE, SIDE, 3))
    return np.clip(128 + 50 * shown, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------- prompts


def test_without_prompts_it_is_open_clips_zero_shot(folder: Path) -> None:
    import open_clip

    clip, tokens = loaded(folder, prompts=0)
    plain = open_clip.create_model(f"local-dir:{folder}").eval()
    images = frames(4, 3)
    words = get_tokenizer(f"local-dir:{folder}")([TEMPLATE.format(label=label) for label in LABELS])
    assert torch.equal(tokens, words)
    with torch.inference_mode():
        expected, _ = plain.get_logits(images[:, 0], words)
        features = clip.frame_features(images.flatten(0, 1)).unflatten(0, (4, 3))
        text = clip.text_features(tokens)
        assert torch.allclose(clip.logits(video_features(features[:, :1]), text), expected, rtol=1e-4, atol=1e-4)
        mean = plain.encode_image(images.flatten(0, 1)).unflatten(0, (4, 3)).mean(1)
        mean /= mean.norm(dim=-1, keepdim=True)
        whole = plain.logit_scale.exp() * mean @ plain.encode_text(words, normalize=True).T
        assert torch.allclose(clip.logits(video_features(features), text), whole, rtol=1e-4, atol=1e-4)


def test_golden_case_through_the_loader(tmp_path: Path) -> None:
    """The very path of a published checkpoint: folder layout, fp16 weights, fused activation."""
    golden = ROOT / "tests/golden/emovclip/a"
    case = load_file(golden / "case.safetensors")
    config = json.loads((golden / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    shutil.copy(golden / "model.safetensors", tmp_path / "open_clip_model.safetensors")
    model, _ = load_clip(str(tmp_path), None, "float32", "cpu")
    clip = PromptedCLIP(model, Prompts(case["vision_prompts"], case["text_prompts"]))
    with torch.inference_mode():
        found = clip.frame_features(case["frames"].flatten(0, 1)).view_as(case["frame_features"])
        logits = clip.logits(video_features(found), clip.text_features(case["token_ids"]))
    for ours, expected in ((found, case["frame_features"]), (logits, case["logits"])):
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("depth", [1, 2, 12])
def test_depth_is_clipped_to_the_towers_and_every_prompt_counts(folder: Path, depth: int) -> None:
    clip, tokens = loaded(folder, prompts=3, depth=depth)
    layers = min(depth, len(clip.model.transformer.resblocks))
    assert clip.prompts.vision.shape[:2] == clip.prompts.text.shape[:2] == (layers, 3)
    features = clip.frame_features(frames(2, 1)[:, 0])
    clip.logits(torch.nn.functional.normalize(features, dim=-1), clip.text_features(tokens)).sum().backward()
    for parameter in clip.prompts.parameters():
        assert parameter.grad is not None and (parameter.grad.abs().sum(-1) > 0).all()
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


def test_more_layers_of_prompts_than_the_tower_has_are_not_used(folder: Path) -> None:
    clip, tokens = loaded(folder, prompts=2)
    images = frames(2, 1)[:, 0]
    with torch.inference_mode():
        expected = clip.frame_features(images), clip.text_features(tokens)
        longer = [torch.cat([p.detach(), torch.randn(5, *p.shape[1:])]) for p in clip.prompts.parameters()]
        clip.prompts = Prompts(*longer)
        assert torch.equal(clip.frame_features(images), expected[0])
        assert torch.equal(clip.text_features(tokens), expected[1])


def test_gradient_checkpointing_changes_no_gradient(folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        clip, tokens = loaded(folder, prompts=2)
        clip.model.set_grad_checkpointing(checkpointing)
        video = video_features(clip.frame_features(frames(1, 2)[0])[None])
        clip.logits(video, clip.text_features(tokens))[0, 2].backward()
        gradients.append([parameter.grad for parameter in clip.prompts.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and recomputed is not None and torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-6)


def test_the_estimate_of_saved_activations_is_about_right(folder: Path) -> None:
    clip, _ = loaded(folder, prompts=1)
    weights = {parameter.data_ptr() for parameter in clip.model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = clip.frame_features(torch.zeros(8, 3, SIDE, SIDE))
    assert features.requires_grad and 0.7 < training_bytes(clip.model, 8) / sum(saved.values()) < 1.5


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


def test_a_model_without_class_token_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "average")
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["pool_type"] = "avg"
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match="average.*class token"):
        emovclip.load_promptable(str(copy), None, "float32", "cpu")


# ---------------------------------------------------------------- words


@pytest.mark.parametrize("template", [TEMPLATE, "{label}", "a face: {label}!", "I feel {label}"])
@pytest.mark.parametrize("prompts", [1, 4, 9])
def test_no_token_of_a_label_is_replaced(template: str, prompts: int) -> None:
    tokenizer = get_tokenizer("ViT-B-32")
    tokens = label_tokens(tokenizer, template, LABELS, prompts)
    kept = tokens[:, 1 + prompts :]
    for row, label in zip(kept, LABELS, strict=True):
        word = tokenizer([label])[0, 1:]
        word = word[: int(word.argmax())]  # up to the end token, whose number is the largest
        assert any(torch.equal(row[i : i + len(word)], word) for i in range(len(row) - len(word)))
    assert (tokens[:, : 1 + prompts] == tokens[0, : 1 + prompts]).all()  # the same words for every label


def test_the_first_text_prompts_are_the_templates_words(folder: Path) -> None:
    clip, tokens = loaded(folder, prompts=4)
    words = get_tokenizer("ViT-B-32")(["a photo of a"])[0, 1:5]
    assert torch.equal(clip.prompts.text[0].detach(), clip.model.token_embedding.weight[words])
    assert torch.equal(tokens, get_tokenizer("ViT-B-32")([TEMPLATE.format(label=label) for label in LABELS]))


def test_too_long_for_the_context_is_refused() -> None:
    with pytest.raises(PipelineError, match="80 prompts"):
        label_tokens(get_tokenizer("ViT-B-32"), TEMPLATE, LABELS, 80)


# ---------------------------------------------------------------- training


def test_schedule_warms_up_and_decays_to_zero() -> None:
    factors = [schedule(step, 10, 100) for step in range(100)]
    assert factors[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert factors[10] == 1 and factors[55] == pytest.approx(0.5) and factors[-1] < 1e-3
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert schedule(0, 0, 1) == 1


@pytest.mark.parametrize(("count", "wanted"), [(1, 4), (3, 4), (4, 4), (25, 8), (1000, 16)])
def test_segments(count: int, wanted: int) -> None:
    rng = np.random.default_rng(0)
    for indices in [segments(count, wanted)] + [segments(count, wanted, rng) for _ in range(50)]:
        assert len(indices) == wanted and indices.min() >= 0 and indices.max() < count
        assert (np.diff(indices) >= 0).all()
        assert (np.abs(indices - (np.arange(wanted) + 0.5) * count / wanted) <= count / wanted / 2 + 1).all()


def test_colour_jitter_is_torchvisions() -> None:
    from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

    pixels = 0.3 + 0.4 * torch.rand(3, 1, 3, 8, 9)  # in the middle: nothing is clamped on the way
    factors = torch.tensor([[0.9, 1.1, 1.0], [0.8, 1.2, 1.1], [1.2, 0.9, 0.8]])
    found = colour_jitter(pixels, *factors)
    for clip, (brightness, contrast, saturation) in enumerate(factors.T.tolist()):
        expected = adjust_contrast(adjust_brightness(pixels[clip, 0], brightness), contrast)
        assert torch.allclose(found[clip, 0], adjust_saturation(expected, saturation), atol=2e-4)


def test_augmentation_is_mild_and_one_draw_per_clip() -> None:
    image = torch.from_numpy(pictures(np.array([0, 1]), 1, 0)).permute(0, 1, 4, 2, 3).float().div(255)
    clips = image.expand(2, 3, 3, SIDE, SIDE)
    changed = augment(clips, np.random.default_rng(0))
    assert changed.shape == clips.shape and changed.min() >= 0 and changed.max() <= 1
    assert torch.equal(changed[:, 0], changed[:, 2])
    assert not torch.equal(changed, clips)
    distance = [min((changed[i, 0] - c).abs().mean() for c in (image[i, 0], image[i, 0].flip(2))) for i in (0, 1)]
    assert max(distance) < 0.15


def trainer(folder: Path, threads: ThreadPoolExecutor, epochs: int, dtype: str = "float32") -> tuple[Trainer, Clips]:
    clip, tokens = loaded(folder, prompts=4, dtype=dtype)
    labels = np.random.default_rng(3).integers(0, len(LABELS), 30)
    shown = pictures(labels, 3, noise=0.3)
    clips = Clips(lambda row, indices: shown[row][indices], np.full(len(labels), 3), labels)
    recipe = Recipe(frames=2, epochs=epochs, batch_size=8, learning_rate=0.008, warmup_epochs=2, weight_decay=0.001,
                    label_smoothing=0.1, seed=(0, 1))
    return Trainer(clip, Images(clip.model.visual), tokens, clips, recipe, threads), clips


def test_it_learns_and_leaves_the_towers_alone(folder: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        training, clips = trainer(folder, threads, epochs=25)
        before = {name: tensor.clone() for name, tensor in training.clip.model.state_dict().items()}
        losses = [training.run_epoch() for _ in range(25)]
        accuracy = (training.predict(clips).argmax(1) == clips.labels).mean()
    assert losses[-1] < 0.75 * losses[0]
    assert accuracy > 0.7  # a sixth by chance
    assert all(torch.equal(before[name], tensor) for name, tensor in training.clip.model.state_dict().items())


def test_resumed_after_any_epoch_equals_uninterrupted(folder: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        whole, _ = trainer(folder, threads, epochs=4)
        losses = [whole.run_epoch() for _ in range(4)]
        path = tmp_path / "state.safetensors"
        curve: list[list[float]] = []
        for epoch in range(4):  # a new process each time
            training, _ = trainer(folder, threads, epochs=4)
            assert train_emovclip.resume(training, path) == curve and training.epoch == epoch
            curve = [*curve, [epoch + 1, training.run_epoch()]]
            train_emovclip.keep(training, path, curve)
    assert [loss for _, loss in curve] == losses
    for ours, expected in zip(training.clip.prompts.parameters(), whole.clip.prompts.parameters(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_towers_train_single_precision_prompts(folder: Path, dtype: str) -> None:
    with ThreadPoolExecutor(1) as threads:
        training, clips = trainer(folder, threads, epochs=4, dtype=dtype)
        losses = [training.run_epoch() for _ in range(4)]
        assert training.clip.prompts.vision.dtype == torch.float32
        assert losses[-1] < losses[0] and np.isfinite(training.predict(clips)).all()


# ---------------------------------------------------------------- the stages


@pytest.fixture
def house(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with 12 labelled and 4 other clips, two folds, a miniature CLIP and a short recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copytree(folder, tmp_path / "models/demo/clip")
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
    assert set(expected) == {"fold-0.safetensors", "fold-1.safetensors", "curves.csv"}
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


def test_features_of_every_clip_under_every_folds_prompts(house: Path) -> None:
    train_emovclip.main()
    extract_emovclip.main()
    stores = [Store(f"features/emovclip/fold-{fold}") for fold in (0, 1)]
    for fold, store in enumerate(stores):
        assert len(store) == 16 and store.present.sum() == 15 and not store.present[-1]
        assert store.var is None and store.mean.shape == (16, 64)
        encoder = emovclip.Encoder(emovclip.Config("models/demo/clip", None, "float32",
                                                   f"models/emovclip/fold-{fold}.safetensors"), "cpu")
        [expected] = encoder.encode([encoder.prepare(Store("data/frames").read("clip_07"))])
        assert np.allclose(store.mean[7], expected.mean(0), rtol=1e-4, atol=1e-5)
    assert not np.allclose(stores[0].mean, stores[1].mean, atol=1e-3)
    with open("models/emovclip/curves.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["fold"], row["epoch"]) for row in rows] == [(str(f), str(e)) for f in (0, 1) for e in (1, 2, 3)]
    assert all(0 <= float(row["valid_waf"]) <= 100 for row in rows)


def test_scope_all_makes_one_store(house: Path) -> None:
    set_params(scope="all", epochs=1, warmup_epochs=0)
    train_emovclip.main()
    assert set(outputs()) == {"all.safetensors", "curves.csv"}
    extract_emovclip.main()
    assert len(Store("features/emovclip")) == 16


def test_no_prompts_is_no_training_and_zero_shot_features(house: Path) -> None:
    set_params(prompts=0)
    train_emovclip.main()
    extract_emovclip.main()
    first, second = (Store(f"features/emovclip/fold-{fold}").mean for fold in (0, 1))
    assert np.array_equal(first, second) and first.any()


@pytest.mark.parametrize("change", ["gone", "narrow", "flat", "text"])
def test_bad_prompt_files(folder: Path, tmp_path: Path, change: str) -> None:
    path = tmp_path / "fold-0.safetensors"
    tensors = {"vision": torch.zeros(2, 4, 64), "text": torch.zeros(2, 4, 32)}
    if change == "gone":
        del tensors["text"]
    elif change != "text":
        tensors["text"] = torch.zeros(2, 4, 31) if change == "narrow" else torch.zeros(8, 32)
    save_file(tensors, path)
    if change == "text":
        path.write_text("not prompts")
    with pytest.raises(PipelineError, match="fold-0.safetensors: (tensor text|can't be read)"):
        emovclip.Encoder(emovclip.Config(str(folder), None, "float32", str(path)), "cpu")
