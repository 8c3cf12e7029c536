"""EmoVCLIP: CLIP with learnable prompts in both frozen towers [paper 3.2, after ViFi-CLIP].

Vision: the first layer's N prompt tokens are appended after the patch tokens, after the positional embedding
and before ln_pre; before each of the layers 1..D-1 the last N tokens are replaced by that layer's prompts.
Text: the tokens at positions 1..N, right after the start token, are replaced before the positional embedding
is added, and by their layer's prompts before each of the layers 1..D-1; causal mask, end-token pooling and
length are unchanged. Past the depth D the prompts' outputs flow on. A clip's feature is the mean of its
frames' projected, un-normalised features; logits = exp(logit_scale) * cosine with the labels' text features.

Hooks on open_clip's own modules do all of it. With N = 0 it is plain zero-shot CLIP.

train_emovclip trains prompts per fold. The encoder runs all folds' prompts over each frame: a clip gets one feature
per fold [choice], so that fold f's fusion sees the features of fold f's prompts alone.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from stages.encoders.checkpoints import DTYPES, Dtype, read_json
from stages.encoders.clip import ImageEncoder, load_clip
from stages.engine.errors import PipelineError, one_line
from stages.engine.fingerprint import checkpoint_digest

TRAINED = "trained.json"  # what the prompts beside it were trained for
MOST_FOLDS = 1000
INIT_STD = 0.02  # of the prompts that no word initialises, as in ViFi-CLIP


class Prompts(nn.Module):
    """The learnable tokens, float32: vision (Dv, N, Wv) and text (Dt, N, Wt), N tokens for each of D layers."""

    def __init__(self, vision: torch.Tensor, text: torch.Tensor):
        super().__init__()
        self.vision, self.text = nn.Parameter(vision.float()), nn.Parameter(text.float())


class PromptedCLIP:
    """A frozen open_clip model whose towers see `prompts`, or in a thread those that it has chosen by `using`."""

    def __init__(self, model: Any, prompts: Prompts):
        self.model, self._prompts = model, prompts
        self._chosen = threading.local()
        visual, text = model.visual, _text_tower(model)
        visual.ln_pre.register_forward_pre_hook(self._append)
        text.token_embedding.register_forward_hook(self._replace_words)
        for layer, block in list(enumerate(visual.transformer.resblocks))[1:]:
            block.register_forward_pre_hook(partial(self._replace_last, layer))
        for layer, block in list(enumerate(text.transformer.resblocks))[1:]:
            block.register_forward_pre_hook(partial(self._replace_after_start, layer))

    @property
    def prompts(self) -> Prompts:
        return getattr(self._chosen, "prompts", self._prompts)

    @prompts.setter
    def prompts(self, prompts: Prompts) -> None:
        self._prompts = prompts

    @contextmanager
    def using(self, prompts: Prompts) -> Iterator[None]:
        """Other prompts, in this thread only."""
        self._chosen.prompts = prompts
        try:
            yield
        finally:
            del self._chosen.prompts

    # The hooks: (module, args) -> args. A block's first argument is its tokens (batch, length, width).

    def _append(self, _: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (torch.cat([args[0], _expand(self.prompts.vision[0], args[0])], dim=1),)

    def _replace_last(self, layer: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if layer >= len(self.prompts.vision):
            return args
        tokens, prompts = args[0], self.prompts.vision[layer]
        kept = tokens[:, : tokens.shape[1] - len(prompts)]
        return (torch.cat([kept, _expand(prompts, tokens)], dim=1), *args[1:])

    def _replace_words(self, _: nn.Module, args: Any, words: torch.Tensor) -> torch.Tensor:
        return _after_start(words, self.prompts.text[0])

    def _replace_after_start(self, layer: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if layer >= len(self.prompts.text):
            return args
        return (_after_start(args[0], self.prompts.text[layer]), *args[1:])

    def frame_features(self, frames: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) normalised frames, in the towers' dtype, to (n, E), projected and not normalised."""
        return self.model.encode_image(frames)

    def text_features(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(L, context length) token ids, a row per label, to (L, E) float32 of length 1."""
        return functional.normalize(self.model.encode_text(token_ids).float(), dim=-1)

    def logits(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Video features (B, E) and text features (L, E), both of length 1, to (B, L)."""
        return self.model.logit_scale.exp() * video @ text.T


def video_features(frame_features: torch.Tensor) -> torch.Tensor:
    """(B, T, E) un-normalised frame features to (B, E) float32: the mean over frames, then L2-normalised."""
    return functional.normalize(frame_features.float().mean(dim=1), dim=-1)


def _expand(prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return prompts.to(tokens.dtype).expand(len(tokens), -1, -1)


def _after_start(tokens: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    return torch.cat([tokens[:, :1], _expand(prompts, tokens), tokens[:, 1 + len(prompts) :]], dim=1)


def _text_tower(model: Any) -> Any:
    return getattr(model, "text", model)  # open_clip's CLIP is its own text tower, its CustomTextCLIP has one


def load_promptable(checkpoint: str, revision: str | None, dtype: str, device: str) -> tuple[Any, str]:
    """load_clip's answer. PipelineError for a model that is not two transformers, the vision one with class token."""
    model, name = load_clip(checkpoint, revision, dtype, device)
    visual, text = model.visual, _text_tower(model)
    if getattr(visual, "pool_type", None) != "tok" or visual.attn_pool is not None:
        raise PipelineError(f"{checkpoint}: found a {type(visual).__name__}; prompts need a vision transformer that is "
                            f"pooled by its class token")
    if not hasattr(text, "token_embedding"):
        raise PipelineError(f"{checkpoint}: found a {type(text).__name__}; prompts need open_clip's text transformer")
    return model, name


# ---------------------------------------------------------------- the words and the first prompts


def label_tokens(tokenizer: Any, template: str, labels: Sequence[str], prompts: int) -> torch.Tensor:
    """Token ids (L, context length) of the template filled with each label, made for `prompts` replaced positions.

    The prompts take the place of the words before the label: of "a photo of a person feeling worry" the first
    four. Where there are fewer words than prompts, placeholders X go in front, so that no token of a label is
    ever replaced. Raises PipelineError where prompts and template are too long for the context.
    """
    texts = [template.replace("{label}", label) for label in labels]
    without_label, *filled = tokenizer([template.replace("{label}", ""), *texts])
    words = min(int((row != without_label).nonzero()[0, 0]) for row in filled) - 1  # after the start token
    placeholders = "X " * max(0, prompts - words)
    token_ids, longer = (tokenizer([placeholders + text + end for text in texts]) for end in ("", " X"))
    if (token_ids == longer).all(dim=1).any():  # the end was cut off
        raise PipelineError(f"params.yaml: emovclip: {prompts} prompts and template {template!r} do not fit into the "
                            f"{token_ids.shape[1]} tokens of the checkpoint's context")
    return token_ids


def initial_prompts(model: Any, token_ids: torch.Tensor, count: int, depth: int, seed: int) -> Prompts:
    """The first layer's text prompts start as the words that they replace, all others as small normal noise.

    token_ids: label_tokens' answer. depth: clipped to each tower's number of layers.
    """
    generator = torch.Generator().manual_seed(seed)
    text = _text_tower(model)
    shapes = [
        (min(depth, len(tower.transformer.resblocks)), count, width)
        for tower, width in zip((model.visual, text), _widths(model), strict=True)
    ]
    vision_prompts, text_prompts = (INIT_STD * torch.randn(shape, generator=generator) for shape in shapes)
    text_prompts[0] = text.token_embedding.weight.detach()[token_ids[0, 1 : 1 + count]].float().cpu()
    return Prompts(vision_prompts, text_prompts)


def load_prompts(path: str | Path, model: Any) -> Prompts:
    """Read what train_emovclip wrote: tensors `vision` and `text`, for the model's towers.

    Raises PipelineError naming the file and the tensor.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PipelineError(f"{path}: can't be read as prompts: {one_line(error)}") from None
    for name, width in zip(("vision", "text"), _widths(model), strict=True):
        found = tuple(tensors[name].shape) if name in tensors else ()
        if len(found) != 3 or found[2] != width:
            raise PipelineError(f"{path}: tensor {name}: found {found or 'none'}, expected (layers, prompts, {width})")
    return Prompts(tensors["vision"], tensors["text"])


def _widths(model: Any) -> tuple[int, int]:
    """Channels of the vision and of the text tower."""
    return model.visual.class_embedding.shape[0], _text_tower(model).token_embedding.weight.shape[1]


# ---------------------------------------------------------------- extraction


def trained_files(folder: Path, checkpoint: str, revision: str | None) -> list[Path]:
    """Every fold's prompts in a folder that train_emovclip wrote; one file with emovclip.scope: all.

    Raises PipelineError where the folder does not say what the prompts were trained for, or where that is another
    checkpoint: a folder with other files, or another published name or revision.
    """
    trained = read_json(folder / TRAINED, str(folder))
    digest = checkpoint_digest(checkpoint).hex()
    ours = {"revision": revision, "digest": digest} | ({} if digest else {"checkpoint": checkpoint})
    for key, value in ours.items():
        if trained.get(key) != value:
            raise PipelineError(f"{folder}: its prompts were trained for checkpoint {trained.get('checkpoint')}, {key} "
                                f"{trained.get(key)!r}, but found {checkpoint}, {key} {value!r}; set it back, or run: "
                                f"dvc repro train_emovclip")
    folds = trained.get("folds")
    if not isinstance(folds, int) or not 1 <= folds <= MOST_FOLDS:
        raise PipelineError(f"{folder / TRAINED}: folds: found {folds!r}, expected 1 to {MOST_FOLDS}; run: dvc repro "
                            f"train_emovclip")
    names = ["all"] if trained.get("scope") == "all" else [f"fold-{fold}" for fold in range(folds)]
    return [folder / f"{name}.safetensors" for name in names]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Config:
    """The CLIP checkpoint as in stages.encoders.clip, and the folder that train_emovclip wrote."""

    checkpoint: Annotated[str, Field(min_length=1)]
    revision: str | None
    dtype: Dtype
    prompts: str


class Encoder(ImageEncoder):
    """(T, folds * E) float32 features, fold after fold; their mean over a clip's frames are its video features.

    A frame is decoded and moved once for all folds. dimension: E.
    """

    variance = False  # over time; the paper's feature is the mean alone

    def __init__(self, config: Config, device: str):
        model, _ = load_promptable(config.checkpoint, config.revision, config.dtype, device)
        files = trained_files(Path(config.prompts), config.checkpoint, config.revision)
        self._folds = [load_prompts(file, model).to(device) for file in files]
        self._prompted = PromptedCLIP(model, self._folds[0])
        self.folds, self.leaky = len(files), files[0].stem == "all"
        super().__init__(model.visual, self._every_fold, device, DTYPES[config.dtype])
        self.dimension //= self.folds

    def _every_fold(self, frames: torch.Tensor) -> torch.Tensor:
        found = []
        for fold in self._folds:
            with self._prompted.using(fold):
                found.append(self._prompted.frame_features(frames))
        return torch.cat(found, dim=1)
