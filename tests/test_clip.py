"""The CLIP encoder: open_clip's own answer, batching, odd images, published names, broken checkpoints."""

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from skimage.data import astronaut

from stages.corpora.demo.clip_checkpoint import make_clip
from stages.encoders import clip
from stages.encoders.clip import Config, Encoder
from stages.engine.errors import PipelineError, Skip

WEIGHTS = "open_clip_model.safetensors"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy(clip_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own for a test to break."""
    return shutil.copytree(clip_checkpoint, tmp_path / "broken")


@pytest.fixture
def hub(clip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hugging Face cache of a machine without network that once fetched someone/mini at REVISION."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--mini" / "snapshots" / REVISION
    shutil.copytree(clip_checkpoint, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def encoder(checkpoint: Path | str, **changes: Any) -> Encoder:
    values: dict[str, Any] = {"checkpoint": str(checkpoint), "revision": None, "dtype": "float32"}
    return Encoder(Config(**values | changes), "cpu")


def jpeg(height: int, width: int, seed: int = 0, mode: str = "RGB") -> bytes:
    """A part of a photograph, resized: height x width."""
    top, left = np.random.default_rng(seed).integers(0, 256, 2)
    pixels = cv2.resize(astronaut()[top : top + 256, left : left + 256], (width, height), interpolation=cv2.INTER_AREA)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def clips() -> list[list[bytes]]:
    return [[jpeg(128, 128, 10 * n + i) for i in range(n)] for n in (3, 1, 7, 2)]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# ---------------------------------------------------------------- the answer


@pytest.mark.parametrize("change", [{}, {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3},
                                    {"resize_mode": "longest", "fill_color": 128}], ids=["clip", "squash", "longest"])
def test_same_as_open_clips_own_transform_and_tower(copy: Path, change: dict[str, Any]) -> None:
    import open_clip

    config = json.loads((copy / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= change
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{copy}")
    images = [jpeg(128, 128), jpeg(240, 320, 1), jpeg(97, 31, 2), jpeg(13, 47, 3), jpeg(64, 64, 4, "L")]
    ours = encoder(copy)
    prepared = ours.prepare(images)
    pixels = torch.stack([transform(Image.open(io.BytesIO(image))) for image in images])
    assert (ours._images.to_input(prepared, "cpu", torch.float32) - pixels).abs().max() < 1e-6
    with torch.inference_mode():
        expected = model.eval().encode_image(pixels).numpy()
    [found] = ours.encode([prepared])
    assert found.dtype == np.float32 and found.shape == (len(images), ours.dimension)
    assert relative(found, expected) < 1e-5


def test_batched_equals_one_image_at_a_time(clip_checkpoint: Path) -> None:
    ours = encoder(clip_checkpoint)
    prepared = [ours.prepare(images) for images in clips()]
    assert [ours.size(images) for images in prepared] == [3, 1, 7, 2]
    single = [np.concatenate([ours.encode([image[None]])[0] for image in images]) for images in prepared]
    for found, expected in zip(ours.encode(prepared), single, strict=True):
        assert relative(found, expected) < 1e-5


def test_half_precision_is_near(clip_checkpoint: Path) -> None:
    images = clips()[2]
    full, half = encoder(clip_checkpoint), encoder(clip_checkpoint, dtype="bfloat16")
    assert relative(half.encode([half.prepare(images)])[0], full.encode([full.prepare(images)])[0]) < 2e-2
    assert half.unit_bytes < full.unit_bytes


def test_logit_scale_stays_exact_in_half_precision(clip_checkpoint: Path) -> None:
    scales = (clip.load_clip(str(clip_checkpoint), None, d, "cpu")[0].logit_scale for d in ("float32", "bfloat16"))
    assert torch.equal(*scales)


def test_the_miniature_is_reproducible_and_blind_to_mirroring(clip_checkpoint: Path, tmp_path: Path) -> None:
    make_clip(tmp_path / "again", seed=1)
    make_clip(tmp_path / "other", seed=2)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (clip_checkpoint / WEIGHTS).read_bytes()
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != (clip_checkpoint / WEIGHTS).read_bytes()
    ours = encoder(clip_checkpoint)
    prepared = ours.prepare(clips()[0])
    found, mirrored = ours.encode([prepared, prepared[:, :, ::-1].copy()])
    assert relative(mirrored, found) < 1e-4
    assert relative(ours.encode([prepared[:, ::-1].copy()])[0], found) > 0.05


# ---------------------------------------------------------------- bad images


BAD_IMAGES = {"none": [], "empty": [b""], "text": [b"no image"], "truncated": [jpeg(32, 32)[:-200]],
              "second": [jpeg(32, 32), b"\xff\xd8\xff\xd9"]}


@pytest.mark.parametrize("images", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_images_that_cannot_be_used_skip_the_clip(clip_checkpoint: Path, images: list[bytes]) -> None:
    with pytest.raises(Skip) as caught:
        encoder(clip_checkpoint).prepare(images)
    assert str(caught.value)


# ---------------------------------------------------------------- checkpoints by name


def test_hub_repository_at_a_revision(clip_checkpoint: Path, hub: Path) -> None:
    ours, expected = encoder("hf-hub:someone/mini", revision=REVISION), encoder(clip_checkpoint)
    prepared = expected.prepare(clips()[0])
    assert np.array_equal(ours.encode([prepared])[0], expected.encode([prepared])[0])
    with pytest.raises(PipelineError, match="someone/mini"):
        encoder("hf-hub:someone/mini", revision="f" * 40)


def test_model_and_pretrained_tag_at_a_revision(clip_checkpoint: Path, hub: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip
    from open_clip import factory, pretrained

    config = json.loads((clip_checkpoint / "open_clip_config.json").read_text())
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-mini-quickgelu", config["model_cfg"])
    source = pretrained._pcfg(hf_hub="someone/mini/", quick_gelu=True, interpolation="bilinear")
    monkeypatch.setitem(pretrained._PRETRAINED, "ViT-mini-quickgelu", {"openai": source})
    (hub / "open_clip_config.json").unlink()  # the model's name says it all
    ours = encoder("ViT-mini-quickgelu / openai", revision=REVISION)
    monkeypatch.setitem(pretrained._PRETRAINED["ViT-mini-quickgelu"], "file", {**source, "file": str(hub / WEIGHTS)})
    model, _, transform = open_clip.create_model_and_transforms("ViT-mini-quickgelu", "file")
    images = clips()[0]
    with torch.inference_mode():
        expected = model.eval().encode_image(torch.stack([transform(Image.open(io.BytesIO(i))) for i in images]))
    assert relative(ours.encode([ours.prepare(images)])[0], expected.numpy()) < 1e-5


def test_the_papers_checkpoint_is_known_and_no_torchscript() -> None:
    import open_clip

    source = open_clip.get_pretrained_cfg("ViT-L-14-quickgelu", "openai")
    assert source["hf_hub"] == "timm/vit_large_patch14_clip_224.openai/"
    model = open_clip.get_model_config("ViT-L-14-quickgelu")
    assert model["quick_gelu"] and model["embed_dim"] == 768


# ---------------------------------------------------------------- broken checkpoints


def refused(checkpoint: Path | str, *mentions: str) -> None:
    with pytest.raises(PipelineError) as caught:
        encoder(checkpoint)
    message = str(caught.value)
    assert "\n" not in message
    for mention in (str(checkpoint), *mentions):
        assert mention in message


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def test_missing_tensor(copy: Path) -> None:
    rewrite(copy, lambda t: t.pop("visual.ln_post.weight"))
    refused(copy, "visual.ln_post.weight")


@pytest.mark.parametrize("name", ["visual.proj", "visual.positional_embedding", "positional_embedding"])
def test_wrong_shape_is_refused_and_never_interpolated(copy: Path, name: str) -> None:
    rewrite(copy, lambda t: t.update({name: torch.cat([t[name]] * 2)[:-1]}))
    refused(copy, name)


def test_superfluous_tensor(copy: Path) -> None:
    rewrite(copy, lambda t: t.update({"visual.transformer.resblocks.9.ln_1.weight": torch.ones(3)}))
    refused(copy, "visual.transformer.resblocks.9.ln_1.weight")


def test_damaged_weights(copy: Path) -> None:
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content[: len(content) // 2])
    refused(copy)


def test_no_weights_is_not_a_random_model(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    refused(copy)


def test_no_configuration(copy: Path) -> None:
    (copy / "open_clip_config.json").unlink()
    refused(copy, "open_clip_config.json")


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickled_code_never_runs(copy: Path, tmp_path: Path) -> None:
    torch.save({**load_file(copy / WEIGHTS)}, copy / "open_clip_pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    assert encoder(copy).dimension == 64  # tensors alone are fine
    with open(copy / "open_clip_pytorch_model.bin", "wb") as file:
        pickle.dump({"visual.proj": Trap(tmp_path / "ran")}, file)
    refused(copy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["models/nowhere", "ViT-L-14-quickgelu / nosuch", "ViT-nosuch / openai"])
def test_unknown_names(name: str) -> None:
    refused(name)


@pytest.mark.parametrize(("name", "right"), [
    ("ViT-L-14 / openai", "ViT-L-14-quickgelu / openai"),
    ("ViT-L-14 / metaclip_400m", "ViT-L-14-quickgelu / metaclip_400m"),
])
def test_the_wrong_activation_is_refused(name: str, right: str) -> None:
    refused(name, f"expected {right}")


@pytest.mark.parametrize("change", [{"dtype": "int8"}, {"layers": [-1]}, {"checkpoint": ""}, {"revision": 3}])
def test_config_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Config(**{"checkpoint": "x", "revision": None, "dtype": "float32"} | change)
