"""Learning EmoVCLIP's prompts: cross-entropy over the labels' text features, towers frozen [choice, after ViFi-CLIP].

AdamW with linear warm-up and cosine decay per step; segment-sampled frames; one mild crop, flip and colour jitter
per clip; label smoothing. Everything random in an epoch is drawn from (seed, epoch), so a run that is resumed
after any epoch ends in the same bits as one that never stopped. Half-precision towers make it mixed precision:
the prompts, their gradients, the loss and the optimiser stay float32. Pure: no files.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torchvision.transforms import v2

from stages.encoders.clip import Images
from stages.encoders.emovclip import PromptedCLIP, video_features

CROP_AREA = 0.9  # smallest part of the image that a crop keeps: open_clip's own training default
JITTER = 0.2  # brightness, contrast and saturation change by up to this
BETAS = (0.9, 0.98)  # CLIP's and ViFi-CLIP's
AHEAD = 2  # batches decoded ahead
DRAWING = threading.Lock()
PIECES = 8  # of a batch, for as many threads
SAVED_VALUES = 11  # per token and channel that a block keeps for backward: norms, qkv, attention, MLP; measured


@dataclass(frozen=True)
class Clips:
    """Labelled clips. frames(clip, indices) gives uint8 (len(indices), H, W, 3); thread-safe."""

    frames: Callable[[int, np.ndarray], np.ndarray]
    counts: np.ndarray  # (n,) frames that each clip has
    labels: np.ndarray  # (n,) class indices

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters, as in params.yaml's emovclip section. seed: several numbers make independent runs."""

    frames: int
    epochs: int
    batch_size: int
    learning_rate: float
    warmup_epochs: int
    weight_decay: float
    label_smoothing: float
    seed: tuple[int, ...]


class Trainer:
    """Trains clip.prompts in place. `epoch` counts the finished ones."""

    def __init__(self, clip: PromptedCLIP, images: Images, token_ids: torch.Tensor, train: Clips, recipe: Recipe,
                 threads: Executor):
        """token_ids: (labels, context length), emovclip.label_tokens' answer."""
        self.clip, self.images, self.train, self.recipe, self.threads = clip, images, train, recipe, threads
        weight = clip.model.visual.conv1.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.token_ids = token_ids.to(self.device)
        self.epoch = 0
        self.steps = math.ceil(len(train) / recipe.batch_size)
        self.optimizer = torch.optim.AdamW(
            clip.prompts.parameters(), lr=recipe.learning_rate, betas=BETAS, weight_decay=recipe.weight_decay
        )
        self.scheduler = schedule(self.optimizer, recipe.warmup_epochs * self.steps, recipe.epochs * self.steps)
        self.augmentation = augmentation(images.size)
        # float16 gradients underflow without a scale; bfloat16 and float32 need none
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def run_epoch(self) -> float:
        """One pass over the training clips; returns its mean loss."""
        rng = np.random.default_rng([*self.recipe.seed, self.epoch])
        order = rng.permutation(len(self.train))
        rows = [order[i : i + self.recipe.batch_size] for i in range(0, len(order), self.recipe.batch_size)]
        picks = [[segments(self.train.counts[row], self.recipe.frames, rng) for row in batch] for batch in rows]
        total = torch.zeros((), device=self.device)
        for batch, pixels in self._decoded(self.train, rows, picks):
            varied = augment(pixels, self.augmentation, int(rng.integers(2**63)))
            total += self._step(varied, batch) * len(batch)
        self.epoch += 1
        return float(total) / len(order)

    def _step(self, pixels: torch.Tensor, batch: np.ndarray) -> torch.Tensor:
        labels = torch.from_numpy(self.train.labels[batch]).to(self.device)
        logits = self.clip.logits(self._video(pixels), self.clip.text_features(self.token_ids))
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return loss.detach()

    def _video(self, pixels: torch.Tensor) -> torch.Tensor:
        clips, frames = pixels.shape[:2]
        features = self.clip.frame_features(self.images.normalise(pixels.flatten(0, 1)).to(self.dtype))
        return video_features(features.unflatten(0, (clips, frames)))

    def predict(self, clips: Clips) -> np.ndarray:
        """(n, labels) float32 logits of each clip's middle-of-segment frames, without augmentation."""
        size = self.recipe.batch_size
        rows = [np.arange(i, min(i + size, len(clips))) for i in range(0, len(clips), size)]
        picks = [[segments(clips.counts[row], self.recipe.frames) for row in batch] for batch in rows]
        with torch.inference_mode():
            text = self.clip.text_features(self.token_ids)
            found = [self.clip.logits(self._video(pixels), text) for _, pixels in self._decoded(clips, rows, picks)]
            return torch.cat(found).cpu().numpy()

    def _decoded(
        self, clips: Clips, rows: Sequence[np.ndarray], picks: Sequence[Sequence[np.ndarray]]
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Batches as (rows, pixels (B, frames, 3, H, W) float32 in 0..1 on the device), decoded ahead."""
        pending: deque[tuple[np.ndarray, list[Future[np.ndarray]]]] = deque()
        for batch, pick in zip(rows, picks, strict=True):
            # in a few pieces: handing clips over one by one costs more than a frame that is decoded already
            pieces = np.array_split(np.arange(len(batch)), min(PIECES, len(batch)))
            decoding = [self.threads.submit(self._decode, clips, batch, pick, piece) for piece in pieces]
            pending.append((batch, decoding))
            if len(pending) > AHEAD:
                yield self._to_device(*pending.popleft())
        while pending:
            yield self._to_device(*pending.popleft())

    def _decode(self, clips: Clips, batch: np.ndarray, pick: Sequence[np.ndarray], piece: np.ndarray) -> np.ndarray:
        return np.stack([clips.frames(batch[i], pick[i]) for i in piece])

    def _to_device(self, batch: np.ndarray, pieces: list[Future[np.ndarray]]) -> tuple[np.ndarray, torch.Tensor]:
        images = torch.from_numpy(np.concatenate([piece.result() for piece in pieces]))
        images = images.to(self.device, non_blocking=True)
        return batch, images.permute(0, 1, 4, 2, 3).float().div(255)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, JSON-able values) from which `restore` goes on as without the interruption."""
        tensors = {}
        for name, parameter in self.clip.prompts.named_parameters():
            tensors[name] = parameter.detach().cpu().clone()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{name}.{key}"] = value.cpu().clone()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return tensors, {"epoch": self.epoch, "rates": rates, "schedule": self.scheduler.state_dict(),
                         "scaler": self.scaler.state_dict()}

    def restore(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        with torch.no_grad():
            for name, parameter in self.clip.prompts.named_parameters():
                parameter.copy_(tensors[name])
                prefix = f"{name}."
                moments = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
                # AdamW keeps `step` on the CPU, the moments beside their parameter
                self.optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(self.device, copy=True)
                    for key, value in moments.items()
                }
        for group, rate in zip(self.optimizer.param_groups, values["rates"], strict=True):
            group["lr"] = rate  # from which the schedule computes the next
        self.epoch = values["epoch"]
        self.scheduler.load_state_dict(values["schedule"])
        self.scaler.load_state_dict(values["scaler"])


def training_bytes(model: Any, images: int) -> int:
    """Estimated activations that a step over so many images keeps for its backward pass, without checkpointing.

    Every block keeps its own: its weights are frozen, but prompts stand before it. The text tower adds little.
    """
    visual = model.visual
    tokens, channels = visual.positional_embedding.shape
    blocks = len(visual.transformer.resblocks)
    return images * blocks * tokens * channels * SAVED_VALUES * visual.conv1.weight.dtype.itemsize


def schedule(optimizer: torch.optim.Optimizer, warmup: int, total: int) -> LRScheduler:
    """The learning rate by step: 1/warmup of it, linearly up to all of it, then half a cosine down to 0 at `total`."""
    decay = CosineAnnealingLR(optimizer, max(1, total - warmup))
    if not warmup:
        return decay
    return SequentialLR(optimizer, [LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1), decay], [warmup])


def segments(count: int, wanted: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """`wanted` frame indices, one from each of as many equal segments of range(count): random, or the middle.

    A clip with fewer frames than segments repeats some. int64 (wanted,), ascending.
    """
    inside = np.full(wanted, 0.5) if rng is None else rng.random(wanted)
    return np.minimum((np.arange(wanted) + inside) * count / wanted, count - 1).astype(np.int64)


def augmentation(size: Sequence[int]) -> v2.Compose:
    """A mild crop that keeps the aspect ratio, a flip and colour jitter, to (height, width)."""
    return v2.Compose([
        v2.RandomResizedCrop(size, scale=(CROP_AREA, 1), ratio=(1, 1)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(JITTER, JITTER, JITTER),
    ])


def augment(pixels: torch.Tensor, transform: v2.Compose, seed: int) -> torch.Tensor:
    """One draw for each clip's frames: (B, T, 3, H, W) float32 in 0..1 to the same. A seed's draws never vary.

    torchvision draws from torch's global generator on the CPU, whatever the device: it is seeded, and as before after.
    """
    with DRAWING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return torch.stack([transform(clip) for clip in pixels])
