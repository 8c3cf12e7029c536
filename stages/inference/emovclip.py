"""EmoVCLIP under every fold's prompts at once: a new clip is of no fold, so each fold's models see it."""

from collections.abc import Sequence
from pathlib import Path

import torch

from stages.encoders.checkpoints import DTYPES
from stages.encoders.clip import ImageEncoder
from stages.encoders.emovclip import PromptedCLIP, load_promptable, load_prompts
from stages.engine.params import EmoVCLIP


class EveryFold(ImageEncoder):
    """(T, F * E) features, fold after fold, from one frozen CLIP: a frame is decoded and moved once for all folds.

    prompts: F files of train_emovclip. dimension: E. Raises PipelineError as the loaders do.
    """

    concurrent = False  # a pass exchanges the prompts

    def __init__(self, config: EmoVCLIP, prompts: Sequence[Path], device: str):
        model, _ = load_promptable(config.checkpoint, config.revision, config.dtype, device)
        folds = [load_prompts(path, model).to(device) for path in prompts]
        prompted = PromptedCLIP(model, folds[0])

        def features(frames: torch.Tensor) -> torch.Tensor:
            found = []
            for fold in folds:
                prompted.prompts = fold
                found.append(prompted.frame_features(frames))
            return torch.cat(found, dim=1)

        super().__init__(model.visual, features, device, DTYPES[config.dtype])
        self.dimension //= len(folds)


def make_encoder(device: str, config: EmoVCLIP, prompts: Sequence[Path]) -> EveryFold:
    return EveryFold(config, prompts, device)
