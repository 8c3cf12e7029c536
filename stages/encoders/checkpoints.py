"""Reading published checkpoints: a local folder or a hub name, never a pickle's code, never remote code.

Everything wrong with a checkpoint is one line that names the checkpoint and the file or tensor.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch

from stages.engine.errors import PipelineError, one_line

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What a published repository holds besides weights that we read; never its Python files
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.vocab"]
# Safetensors first: a repository that has both is fetched once
_WEIGHT_FILES = ["model*.safetensors", "pytorch_model*.bin"]


def resolve(checkpoint: str, revision: str | None) -> Path:
    """Folder that holds `checkpoint`: the local folder of that name, else the hub's snapshot of it.

    A hub name (owner/name) is fetched into the Hugging Face cache at `revision`, or taken from the
    cache when offline. Raises PipelineError when there is neither a folder nor such a repository.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
        raise PipelineError(f"checkpoint {checkpoint}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(checkpoint, revision=revision, allow_patterns=_SMALL_FILES))
        for pattern in _WEIGHT_FILES:
            snapshot_download(checkpoint, revision=revision, allow_patterns=[pattern])
            if any(snapshot.glob(pattern)):
                break
    except Exception as error:  # network, cache, authorisation and naming errors share no base class
        at = f" at revision {revision}" if revision else ""
        raise PipelineError(
            f"checkpoint {checkpoint}: no such folder, and the hub does not give it{at}: {one_line(error)}"
        ) from None
    return snapshot


def read_json(path: Path, checkpoint: str) -> dict[str, Any]:
    """One of the checkpoint's JSON files as a dict; PipelineError when it is absent or not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"checkpoint {checkpoint}: {path.name} is missing") from None
    except (ValueError, OSError) as error:
        raise PipelineError(f"checkpoint {checkpoint}: {path.name} can't be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise PipelineError(f"checkpoint {checkpoint}: {path.name} is not a JSON object")
    return content


def load_model(
    model_class: Any, folder: Path, checkpoint: str, dtype: torch.dtype, unused: tuple[str, ...] = (), **options: Any
) -> Any:
    """The model that transformers makes of a checkpoint folder, in `dtype`, in eval mode, on the CPU.

    model_class: the name of one of transformers' Auto classes, or a PreTrainedModel. unused: prefixes of tensors that
    we never touch and that a checkpoint may therefore lack. options: further ones of from_pretrained.

    Files are mapped, so host memory peaks at the weights; .bin files are read with weights_only, so a pickle's code
    never runs. Raises PipelineError for an architecture that transformers only runs as remote code, for damaged
    weights, and for a tensor that is missing or of another shape than the config says.
    """
    import transformers
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # what matters in its loading report becomes a PipelineError
    logging.disable_progress_bar()
    if isinstance(model_class, str):
        config = read_json(folder / "config.json", checkpoint)
        if config.get("model_type") not in transformers.CONFIG_MAPPING:
            asks = " and asks for remote code (auto_map), which is never executed" if "auto_map" in config else ""
            raise PipelineError(
                f"checkpoint {checkpoint}: model_type {config.get('model_type')!r} is unknown to transformers{asks}"
            )
        model_class = getattr(transformers, model_class)
    weights = _weights(folder, checkpoint)
    try:
        model, report = model_class.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            **options,
        )
    except Exception as error:  # transformers, safetensors, pickle and JSON errors share no base class
        raise PipelineError(
            f"checkpoint {checkpoint}: {weights} can't be loaded as {model_class.__name__}: {one_line(error)}"
        ) from None
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise PipelineError(
            f"checkpoint {checkpoint}: tensor {name} has shape {tuple(found)}, its config says {tuple(expected)}"
        )
    for name in sorted(report["missing_keys"]):
        if not name.startswith(unused):
            raise PipelineError(
                f"checkpoint {checkpoint}: tensor {name} is missing; expected a full {model_class.__name__}"
            )
    return model.eval()


def _weights(folder: Path, checkpoint: str) -> str:
    """The file of weights, or their index, that transformers prefers. PipelineError where there is neither, or where
    an index names a shard that is missing or, which transformers would follow, outside the folder."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return single
        if index.is_file():
            weight_map = read_json(index, checkpoint).get("weight_map")
            if not isinstance(weight_map, dict):
                raise PipelineError(f"checkpoint {checkpoint}: {index.name} has no weight_map")
            for shard in sorted(set(map(str, weight_map.values()))):
                if Path(shard).name != shard or not (folder / shard).is_file():
                    raise PipelineError(
                        f"checkpoint {checkpoint}: {index.name} names shard {shard}, expected a file beside it"
                    )
            return index.name
    raise PipelineError(
        f"checkpoint {checkpoint}: no weights; expected model.safetensors or pytorch_model.bin, "
        "or an index of shards of either"
    )


def load_part(auto_class: str, folder: Path, checkpoint: str) -> Any:
    """A checkpoint's AutoTokenizer or AutoFeatureExtractor. Raises PipelineError where it has none."""
    import transformers

    try:
        return getattr(transformers, auto_class).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # missing files, unknown classes and remote code share no base class
        raise PipelineError(f"checkpoint {checkpoint}: no usable {auto_class}: {one_line(error)}") from None


def hidden_state_entries(layers: list[int], count: int, checkpoint: str) -> list[int]:
    """`layers` as indices from the start among `count` hidden states; PipelineError when out of range or twice."""
    for index in layers:
        if not -count <= index < count:
            raise PipelineError(f"checkpoint {checkpoint}: layers has {index}, but there are {count} hidden states")
    entries = [index % count for index in layers]
    if len(set(entries)) < len(entries):
        raise PipelineError(f"checkpoint {checkpoint}: layers {layers} names a hidden state twice")
    return entries
