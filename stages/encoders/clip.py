"""Every image through CLIP's image tower: projected, not normalised features, (T, embed_dim) [paper 3.1].

Any open_clip model. `checkpoint` is one of
    a folder            open_clip_config.json beside the weights, open_clip's own `local-dir:` layout
    MODEL / TAG         a pretrained tag of open_clip, e.g. "ViT-L-14-quickgelu / openai" [paper]
    hf-hub:ORG/NAME     any repository of the Hugging Face hub in open_clip's layout
and `revision` pins the hub commit of the latter two. Weights are safetensors, or .bin through weights_only;
the tags of open_clip resolve to such files on the hub, never to OpenAI's own TorchScript archives.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from safetensors import safe_open

from stages.encoders.checkpoints import DTYPES, Dtype
from stages.engine.errors import PipelineError, Skip, one_line

FOLDER = "local-dir:"  # open_clip's prefix
PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")
DECODE = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
QUICK_GELU = 1.702  # its constant
BLOCK_VALUES = 14  # values per token and width alive at once in a block: stream, norm, qkv, attention, MLP


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Config:
    """The keys of a params.yaml row with `encoder: clip`."""

    checkpoint: Annotated[str, Field(min_length=1)]
    revision: str | None
    dtype: Dtype


# ---------------------------------------------------------------- loading


def load_clip(checkpoint: str, revision: str | None, dtype: str, device: str) -> tuple[Any, str]:
    """An open_clip model in eval mode, frozen, in `dtype` on `device`, and the name its tokenizer goes by.

    The model's parameters all have `dtype`, except logit_scale, which stays float32. Raises PipelineError
    naming the checkpoint, and the tensor where one is missing, superfluous or of the wrong shape.
    """
    import open_clip

    try:
        name, weights, preprocess = _locate(checkpoint, revision)
        _refuse_remote_code(checkpoint, open_clip.get_model_config(name))
        _check_tensors(checkpoint, open_clip.get_model_config(name), weights)
        model = open_clip.create_model(
            name, None if name.startswith(FOLDER) else weights, force_preprocess_cfg=preprocess,
            require_pretrained=True, weights_only=True,
        )
    except PipelineError:
        raise
    except Exception as error:  # open_clip's, torch's, the hub's and safetensors' errors share no base class
        raise PipelineError(f"checkpoint {checkpoint}: can't be loaded by open_clip: {one_line(error)}") from None
    model.requires_grad_(False).eval()
    _fuse_quick_gelu(model)
    scale = model.logit_scale.data.float()
    model.to(device, DTYPES[dtype])
    model.logit_scale.data = scale.to(device)
    return model, name


def _locate(checkpoint: str, revision: str | None) -> tuple[str, str | None, dict[str, Any] | None]:
    """open_clip's model name, the weights file (None: there is none) and what the name implies for preprocessing."""
    from open_clip.factory import _find_checkpoint_in_dir

    is_hub = checkpoint.startswith("hf-hub:")
    if is_hub or Path(checkpoint).is_dir():
        folder = _download(checkpoint.removeprefix("hf-hub:"), revision) if is_hub else checkpoint
        return FOLDER + folder, _find_checkpoint_in_dir(Path(folder)), None
    name, separator, tag = checkpoint.partition(" / ")
    if not separator:
        raise PipelineError(
            f"checkpoint {checkpoint}: no such folder, nor a name like 'MODEL / PRETRAINED_TAG' or 'hf-hub:ORG/NAME'"
        )
    import open_clip
    from open_clip.pretrained import download_pretrained_from_hf

    source, config = open_clip.get_pretrained_cfg(name, tag), open_clip.get_model_config(name)
    if config is None or not source:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none: it has no such model"
        raise PipelineError(f"checkpoint {checkpoint}: open_clip has no tag {tag!r} of {name}, but {known}")
    if source.get("quick_gelu", False) != config.get("quick_gelu", False):
        other = name.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{name}-quickgelu"
        raise PipelineError(f"checkpoint {checkpoint}: trained with another activation; expected {other} / {tag}")
    repository, _, file = source["hf_hub"].rpartition("/")
    if not repository:
        raise PipelineError(f"checkpoint {checkpoint}: not on the Hugging Face hub; name a folder that has it")
    weights = download_pretrained_from_hf(repository, filename=file or None, revision=revision)
    return name, weights, {key: source[key] for key in PREPROCESS_KEYS}


def _download(repository: str, revision: str | None) -> str:
    """The hub repository's configuration, tokenizer and weights (safetensors first); the folder they lie in."""
    from huggingface_hub import snapshot_download
    from open_clip.pretrained import download_pretrained_from_hf

    folder = snapshot_download(repository, revision=revision, allow_patterns=["*.json", "*.txt", "*.model"])
    download_pretrained_from_hf(repository, revision=Path(folder).name)
    return folder


def _refuse_remote_code(checkpoint: str, config: Any) -> None:
    """open_clip hands a configuration's tokenizer_kwargs to transformers, which trust_remote_code lets run code."""
    if isinstance(config, dict):
        if config.get("trust_remote_code"):
            raise PipelineError(f"checkpoint {checkpoint}: its configuration asks for remote code "
                                f"(trust_remote_code), which is never executed")
        for value in config.values():
            _refuse_remote_code(checkpoint, value)


def _check_tensors(checkpoint: str, config: dict[str, Any], weights: str | None) -> None:
    """Compare names and shapes with the configuration before open_clip loads anything.

    It would name all that is wrong in one long message, and resizes positional embeddings without a warning. Models
    with a text or vision tower of another library have other names in older files: those are left to open_clip.
    """
    from open_clip.model import CLIP

    keys = {*config, *config["text_cfg"], *config["vision_cfg"]}
    if weights is None or keys & {"custom_text", "hf_model_name", "timm_model_name"}:
        return
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in CLIP(**config).state_dict().items()}
    found = _shapes(weights)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise PipelineError(f"checkpoint {checkpoint}: tensor {name} is missing")
        if name not in expected:
            raise PipelineError(f"checkpoint {checkpoint}: tensor {name} is in the file, but not in its configuration")
        if found[name] != expected[name] and name != "logit_scale":  # () or (1,): open_clip takes both
            raise PipelineError(f"checkpoint {checkpoint}: tensor {name} has shape {found[name]}, its configuration "
                                f"says {expected[name]}")


def _shapes(weights: str) -> dict[str, tuple[int, ...]]:
    """Of every tensor in the file, without reading the tensors."""
    if not weights.endswith(".safetensors"):
        from open_clip.factory import load_state_dict

        return {name: tuple(tensor.shape) for name, tensor in load_state_dict(weights, device="meta").items()}
    with safe_open(weights, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no dict


def _fuse_quick_gelu(model: torch.nn.Module) -> None:
    """QuickGELU x * sigmoid(1.702 x) as SiLU(1.702 x) / 1.702, the factors moved into the weights around it.

    The same function, but one pass over the widest activation of a block instead of three.
    """
    from open_clip.transformer import QuickGELU

    for block in model.modules():
        mlp: Any = getattr(block, "mlp", None)
        if isinstance(getattr(mlp, "gelu", None), QuickGELU):
            mlp.c_fc.weight.data *= QUICK_GELU
            mlp.c_fc.bias.data *= QUICK_GELU
            mlp.c_proj.weight.data /= QUICK_GELU
            mlp.gelu = torch.nn.SiLU()


# ---------------------------------------------------------------- images


class Images:
    """JPEG bytes to a model's input, as its own preprocess_cfg says and with open_clip's own transform.

    Resizing and cropping stay on the CPU as bytes; scaling and normalising happen on the device, so a
    quarter of the bytes is copied there. Thread-safe.
    """

    def __init__(self, visual: Any):
        from open_clip.transform import PreprocessCfg, image_transform_v2
        from torchvision.transforms import Compose, Normalize

        config = PreprocessCfg(**visual.preprocess_cfg)
        steps = image_transform_v2(config, is_train=False).transforms
        if not isinstance(steps[-1], Normalize):
            raise RuntimeError(f"open_clip's transform ends with {steps[-1]}, expected ToTensor and Normalize")
        self._geometry = Compose(steps[:-2])
        self.size = config.input_size[1:]  # (height, width)
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))

    def decode(self, jpegs: Sequence[bytes]) -> np.ndarray:
        """(T, H, W, 3) uint8, RGB, resized and cropped. Skip if there is no image or one can't be decoded."""
        if not jpegs:
            raise Skip("no images")
        return np.stack([self._decode(i, jpeg) for i, jpeg in enumerate(jpegs)])

    def _decode(self, index: int, jpeg: bytes) -> np.ndarray:
        # OpenCV decodes to the same bytes as Pillow in two thirds of the time, but accepts a file that is cut off
        whole = jpeg[:2] == JPEG_START and jpeg.rstrip(b"\0")[-2:] == JPEG_END
        pixels = cv2.imdecode(np.frombuffer(jpeg, np.uint8), DECODE) if whole else None
        if pixels is None:
            raise Skip(f"image {index} can't be decoded: {len(jpeg)} bytes that are not a whole JPEG")
        return np.asarray(self._geometry(Image.fromarray(pixels)))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(..., 3, H, W) float32 in 0..1 to the tower's range."""
        return (pixels - self._mean.to(pixels.device)) / self._std.to(pixels.device)

    def to_input(self, images: np.ndarray, device: str, dtype: torch.dtype) -> torch.Tensor:
        """(T, H, W, 3) uint8 to the tower's (T, 3, H, W) input."""
        pixels = torch.from_numpy(images).to(device, non_blocking=True).permute(0, 3, 1, 2)
        return self.normalise(pixels.float().div(255)).to(dtype)


def image_bytes(visual: Any, dtype: torch.dtype) -> int:
    """Estimated peak activation bytes of one image in the tower, its float32 input included."""
    height, width = Images(visual).size
    positions = getattr(visual, "positional_embedding", None)
    if positions is None:  # a ResNet or timm tower: its early maps dominate
        return int(height * width * 64 * 4)
    tokens, channels = positions.shape
    return tokens * channels * BLOCK_VALUES * dtype.itemsize + 2 * 3 * height * width * 4


class ImageEncoder:
    """One feature per image, through `features`: (n, 3, H, W) -> (n, C), of a model with the tower `visual`."""

    padded = False  # a clip of any number of images may share a batch with others, or be cut
    concurrent = True
    variance = True  # over a clip's images is a feature

    def __init__(self, visual: Any, features: Callable[[torch.Tensor], torch.Tensor], device: str, dtype: torch.dtype):
        self._images, self._features = Images(visual), features
        self._device, self._dtype = device, dtype
        self.unit_bytes = image_bytes(visual, dtype)
        probe = np.zeros((1, *self._images.size, 3), np.uint8)
        self.dimension = self.encode([probe])[0].shape[1]

    def prepare(self, item: Sequence[bytes]) -> np.ndarray:
        """JPEG bytes of one clip's images to (T, H, W, 3) uint8. Skip if there are none or one is broken."""
        return self._images.decode(item)

    def size(self, prepared: np.ndarray) -> int:
        """Number of images."""
        return len(prepared)

    @torch.inference_mode()
    def encode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Clips of (T_i, H, W, 3) uint8 to (T_i, C) float32 each, projected and not normalised, in one pass."""
        images = self._images.to_input(np.concatenate(batch), self._device, self._dtype)
        found = self._features(images).float().cpu().numpy()
        return np.split(found, np.cumsum([len(clip) for clip in batch])[:-1])


class Encoder(ImageEncoder):
    """CLIP's image tower."""

    def __init__(self, config: Config, device: str):
        model, _ = load_clip(config.checkpoint, config.revision, config.dtype, device)
        super().__init__(model.visual, model.encode_image, device, DTYPES[config.dtype])
