"""A miniature CLIP of the real architecture (open_clip, QuickGELU) with seeded random weights.

Saved in open_clip's `local-dir:` layout and loaded like a published one. The weights are open_clip's own random
initialisation, except for three properties that training gives a real tower, so that a miniature of 64
channels still tells expressions apart:
- patch filters are zero-mean noise on luminance: contrast and shape, not the colour of the wall
- filters and positions are mirror-symmetric: a face and its mirror image give the same feature
- the class token starts at zero: its feature is what the patches say and not mostly a constant
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

IMAGE, PATCH, WIDTH, LAYERS, EMBEDDING, TEXT_WIDTH = 48, 16, 64, 2, 64, 32
LUMINANCE = (0.299, 0.587, 0.114)


def make_clip(folder: Path, seed: int) -> None:
    """Write open_clip_config.json and open_clip_model.safetensors; the same bytes for the same seed."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.model import CLIP

    config = {
        "embed_dim": EMBEDDING,
        "quick_gelu": True,
        "vision_cfg": {"image_size": IMAGE, "patch_size": PATCH, "width": WIDTH, "layers": LAYERS, "head_width": 32},
        # the real BPE tokenizer, so the real vocabulary
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": TEXT_WIDTH, "heads": 2, "layers": LAYERS},
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = CLIP(**config)
        adapt(model.visual)
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic",
                  "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2) + "\n"
    )
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def adapt(visual: Any) -> None:
    """Give a randomly initialised vision tower the three properties that the module's docstring names."""
    filters = torch.randn(WIDTH, 1, PATCH, PATCH)
    filters += filters.flip(3)
    filters -= filters.mean(dim=(2, 3), keepdim=True)
    filters = filters * torch.tensor(LUMINANCE).view(1, 3, 1, 1)
    visual.conv1.weight.copy_(filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    visual.class_embedding.zero_()
    visual.positional_embedding[0] = 0
    side = IMAGE // PATCH
    grid = visual.positional_embedding[1:].view(side, side, WIDTH)
    grid.copy_((grid + grid.flip(1)) / 2**0.5)
