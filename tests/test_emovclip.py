"""EmoVCLIP: prompts in open_clip's towers, words, training and its resumption."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from open_clip import get_tokenizer
from safetensors.torch import load_file

from stages import train_emovclip
from stages.encoders import emovclip
from stages.encoders.clip import Images, load_clip
from stages.encoders.emovclip import PromptedCLIP, Prompts, initial_prompts, label_tokens, video_features
from stages.encoders.emovclip_training import (
    Clips,
    Recipe,
    Trainer,
    augment,
    augmentation,
    schedule,
    segments,
    training_bytes,
)
from stages.engine.errors import PipelineError

ROOT = Path(__file__).parent.parent
LABELS = ["neutral", "anger", "happiness", "sadness", "worry", "surprise"]
TEMPLATE = "a photo of a person feeling {label}."
SIDE = 48


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


def test_without_prompts_it_is_open_clips_zero_shot(clip_checkpoint: Path) -> None:
    import open_clip

    clip, tokens = loaded(clip_checkpoint, prompts=0)
    plain = open_clip.create_model(f"local-dir:{clip_checkpoint}").eval()
    images = frames(4, 3)
    words = get_tokenizer(f"local-dir:{clip_checkpoint}")([TEMPLATE.format(label=label) for label in LABELS])
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
def test_depth_is_clipped_to_the_towers_and_every_prompt_counts(clip_checkpoint: Path, depth: int) -> None:
    clip, tokens = loaded(clip_checkpoint, prompts=3, depth=depth)
    layers = min(depth, len(clip.model.transformer.resblocks))
    assert clip.prompts.vision.shape[:2] == clip.prompts.text.shape[:2] == (layers, 3)
    features = clip.frame_features(frames(2, 1)[:, 0])
    clip.logits(torch.nn.functional.normalize(features, dim=-1), clip.text_features(tokens)).sum().backward()
    for parameter in clip.prompts.parameters():
        assert parameter.grad is not None and (parameter.grad.abs().sum(-1) > 0).all()
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


def test_more_layers_of_prompts_than_the_tower_has_are_not_used(clip_checkpoint: Path) -> None:
    clip, tokens = loaded(clip_checkpoint, prompts=2)
    images = frames(2, 1)[:, 0]
    with torch.inference_mode():
        expected = clip.frame_features(images), clip.text_features(tokens)
        longer = [torch.cat([p.detach(), torch.randn(5, *p.shape[1:])]) for p in clip.prompts.parameters()]
        clip.prompts = Prompts(*longer)
        assert torch.equal(clip.frame_features(images), expected[0])
        assert torch.equal(clip.text_features(tokens), expected[1])


def test_gradient_checkpointing_changes_no_gradient(clip_checkpoint: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        clip, tokens = loaded(clip_checkpoint, prompts=2)
        clip.model.set_grad_checkpointing(checkpointing)
        video = video_features(clip.frame_features(frames(1, 2)[0])[None])
        clip.logits(video, clip.text_features(tokens))[0, 2].backward()
        gradients.append([parameter.grad for parameter in clip.prompts.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and recomputed is not None and torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-6)


def test_the_estimate_of_saved_activations_is_about_right(clip_checkpoint: Path) -> None:
    clip, _ = loaded(clip_checkpoint, prompts=1)
    weights = {parameter.data_ptr() for parameter in clip.model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = clip.frame_features(torch.zeros(8, 3, SIDE, SIDE))
    assert features.requires_grad and 0.7 < training_bytes(clip.model, 8) / sum(saved.values()) < 1.5


def test_a_model_without_class_token_is_refused(clip_checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(clip_checkpoint, tmp_path / "average")
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


def test_the_first_text_prompts_are_the_templates_words(clip_checkpoint: Path) -> None:
    clip, tokens = loaded(clip_checkpoint, prompts=4)
    words = get_tokenizer("ViT-B-32")(["a photo of a"])[0, 1:5]
    assert torch.equal(clip.prompts.text[0].detach(), clip.model.token_embedding.weight[words])
    assert torch.equal(tokens, get_tokenizer("ViT-B-32")([TEMPLATE.format(label=label) for label in LABELS]))


def test_too_long_for_the_context_is_refused() -> None:
    with pytest.raises(PipelineError, match="80 prompts"):
        label_tokens(get_tokenizer("ViT-B-32"), TEMPLATE, LABELS, 80)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(("warmup", "total"), [(10, 100), (1, 40), (0, 40), (0, 1), (8, 8)])
def test_schedule_warms_up_and_decays_to_zero(warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler, rates = schedule(optimizer, warmup, total), []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [2 * (step + 1) / warmup if step < warmup
                else 1 + np.cos(np.pi * (step - warmup) / (total - warmup)) for step in range(total)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(("count", "wanted"), [(1, 4), (3, 4), (4, 4), (25, 8), (1000, 16)])
def test_segments(count: int, wanted: int) -> None:
    rng = np.random.default_rng(0)
    for indices in [segments(count, wanted)] + [segments(count, wanted, rng) for _ in range(50)]:
        assert len(indices) == wanted and indices.min() >= 0 and indices.max() < count
        assert (np.diff(indices) >= 0).all()
        assert (np.abs(indices - (np.arange(wanted) + 0.5) * count / wanted) <= count / wanted / 2 + 1).all()


def test_augmentation_is_mild_and_one_draw_per_clip() -> None:
    image = torch.from_numpy(pictures(np.array([0, 1]), 1, 0)).permute(0, 1, 4, 2, 3).float().div(255)
    clips = image.expand(2, 3, 3, SIDE, SIDE)
    changed = augment(clips, augmentation((SIDE, SIDE)), 0)
    assert changed.shape == clips.shape and changed.min() >= 0 and changed.max() <= 1
    assert torch.allclose(changed[:, 0], changed[:, 2], atol=1e-6)
    assert not torch.equal(changed, clips)
    distance = [min((changed[i, 0] - c).abs().mean() for c in (image[i, 0], image[i, 0].flip(2))) for i in (0, 1)]
    assert max(distance) < 0.15


def test_draws_depend_on_the_seed_alone_and_leave_the_global_generator_as_it_was() -> None:
    clips, transform = frames(4, 2).sigmoid(), augmentation((SIDE, SIDE))
    expected = [augment(clips, transform, seed) for seed in range(8)]
    assert not any(torch.equal(expected[0], other) for other in expected[1:])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda seed: augment(clips, transform, seed), range(8)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def trainer(folder: Path, threads: ThreadPoolExecutor, epochs: int, dtype: str = "float32") -> tuple[Trainer, Clips]:
    clip, tokens = loaded(folder, prompts=4, dtype=dtype)
    labels = np.random.default_rng(3).integers(0, len(LABELS), 30)
    shown = pictures(labels, 3, noise=0.3)
    clips = Clips(lambda row, indices: shown[row][indices], np.full(len(labels), 3), labels)
    recipe = Recipe(frames=2, epochs=epochs, batch_size=8, learning_rate=0.008, warmup_epochs=2, weight_decay=0.001,
                    label_smoothing=0.1, seed=(0, 1))
    return Trainer(clip, Images(clip.model.visual), tokens, clips, recipe, threads), clips


def test_it_learns_and_leaves_the_towers_alone(clip_checkpoint: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        training, clips = trainer(clip_checkpoint, threads, epochs=25)
        before = {name: tensor.clone() for name, tensor in training.clip.model.state_dict().items()}
        losses = [training.run_epoch() for _ in range(25)]
        accuracy = (training.predict(clips).argmax(1) == clips.labels).mean()
    assert losses[-1] < 0.75 * losses[0]
    assert accuracy > 0.7  # a sixth by chance
    assert all(torch.equal(before[name], tensor) for name, tensor in training.clip.model.state_dict().items())


def test_resumed_after_any_epoch_equals_uninterrupted(clip_checkpoint: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        whole, _ = trainer(clip_checkpoint, threads, epochs=4)
        losses = [whole.run_epoch() for _ in range(4)]
        path = tmp_path / "state.safetensors"
        curve: list[list[float]] = []
        for epoch in range(4):  # a new process each time
            training, _ = trainer(clip_checkpoint, threads, epochs=4)
            assert train_emovclip.resume(training, path) == curve and training.epoch == epoch
            curve = [*curve, [epoch + 1, training.run_epoch()]]
            train_emovclip.keep(training, path, curve)
    assert [loss for _, loss in curve] == losses
    for ours, expected in zip(training.clip.prompts.parameters(), whole.clip.prompts.parameters(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_towers_train_single_precision_prompts(clip_checkpoint: Path, dtype: str) -> None:
    with ThreadPoolExecutor(1) as threads:
        training, clips = trainer(clip_checkpoint, threads, epochs=4, dtype=dtype)
        losses = [training.run_epoch() for _ in range(4)]
        assert training.clip.prompts.vision.dtype == torch.float32
        assert losses[-1] < losses[0] and np.isfinite(training.predict(clips)).all()
