"""Reading published checkpoints: a local folder or a hub name, never a pickle's code, never remote code.

Everything wrong with a checkpoint is one line that names the checkpoint and the file or tensor.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

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
            f"checkpoint {checkpoint}: no such folder, and not to be had from the hub{at}: {one_line(error)}"
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


def load_auto_model(folder: Path, checkpoint: str, dtype: torch.dtype, unused: tuple[str, ...]) -> Any:
    """The transformers PreTrainedModel of a checkpoint, in `dtype`, on the CPU, in eval mode.

    unused: prefixes of tensors that our features never touch and that a checkpoint may therefore lack.
    Raises PipelineError for an architecture that transformers only runs as remote code, for damaged
    weights, and for a tensor that is missing or of another shape than the config says.
    """
    from transformers import CONFIG_MAPPING, AutoModel

    config = read_json(folder / "config.json", checkpoint)
    if config.get("model_type") not in CONFIG_MAPPING:
        asks = " and asks for remote code (auto_map), which is never executed" if "auto_map" in config else ""
        raise PipelineError(
            f"checkpoint {checkpoint}: model_type {config.get('model_type')!r} is unknown to transformers{asks}"
        )
    try:
        with _quiet_transformers():
            model, report = AutoModel.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below in our own words
            )
    except Exception as error:  # transformers, safetensors, pickle and JSON errors share no base class
        raise PipelineError(f"checkpoint {checkpoint}: can't be loaded: {one_line(error)}") from None
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise _wrong_shape(checkpoint, name, found, expected)
    for name in sorted(report["missing_keys"]):
        if not name.startswith(unused):
            raise _missing(checkpoint, name)
    return model.eval()


def hidden_state_entries(layers: list[int], count: int, checkpoint: str) -> list[int]:
    """`layers` as indices from the start among `count` hidden states; PipelineError when out of range or twice."""
    for index in layers:
        if not -count <= index < count:
            raise PipelineError(f"checkpoint {checkpoint}: layers has {index}, but there are {count} hidden states")
    entries = [index % count for index in layers]
    if len(set(entries)) < len(entries):
        raise PipelineError(f"checkpoint {checkpoint}: layers {layers} names a hidden state twice")
    return entries


def fill(
    model: nn.Module,
    prefix: str,
    folder: Path,
    checkpoint: str,
    dtype: torch.dtype,
    device: Callable[[str], str | int],
) -> None:
    """Give a model built on the meta device its weights, tensor by tensor.

    prefix + parameter name is the tensor's name in the checkpoint; device(parameter name) says where
    it goes. Only one tensor is ever held twice, so host memory peaks at the weights plus the largest
    tensor, whatever type the files store. Reads model.safetensors, pytorch_model.bin or the shards
    that their index names; .bin through weights_only, so a pickle's code never runs.
    Raises PipelineError naming the tensor that is missing or has the wrong shape, or the bad file.
    """
    files = _tensor_files(folder, checkpoint)
    parameters = dict(model.named_parameters())
    for name in parameters:
        if prefix + name not in files:
            raise _missing(checkpoint, prefix + name)
    for path in sorted({files[prefix + name] for name in parameters}):
        read = _reader(path, checkpoint)
        for name, parameter in parameters.items():
            if files[prefix + name] != path:
                continue
            tensor = read(prefix + name)
            if tensor.shape != parameter.shape:
                raise _wrong_shape(checkpoint, prefix + name, tensor.shape, parameter.shape)
            # copy: a tensor of the same type would otherwise stay a view of the mapped file
            tensor = tensor.to(device=device(name), dtype=dtype, copy=True)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def _tensor_files(folder: Path, checkpoint: str) -> dict[str, Path]:
    """Which file holds each tensor of a checkpoint."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return dict.fromkeys(_tensor_names(folder / single, checkpoint), folder / single)
        if index.is_file():
            weight_map = read_json(index, checkpoint).get("weight_map")
            if not isinstance(weight_map, dict):
                raise PipelineError(f"checkpoint {checkpoint}: {index.name} has no weight_map")
            # only the file's own name counts: an index can't point outside its folder
            files = {name: folder / Path(file).name for name, file in weight_map.items()}
            for path in sorted(set(files.values())):
                if not path.is_file():
                    raise PipelineError(f"checkpoint {checkpoint}: shard {path.name} is missing, named by {index.name}")
            return files
    raise PipelineError(
        f"checkpoint {checkpoint}: no weights; expected model.safetensors or pytorch_model.bin, "
        "or an index of shards of either"
    )


def _tensor_names(path: Path, checkpoint: str) -> list[str]:
    if path.suffix == ".bin":
        return list(_load_bin(path, checkpoint))
    with _open_safetensors(path, checkpoint) as file:
        return list(file.keys())


def _reader(path: Path, checkpoint: str) -> Callable[[str], torch.Tensor]:
    """A function from a tensor's name to the tensor, for one weights file.

    The file is mapped anew for each tensor: what a mapping has touched counts as this process's
    memory until it is unmapped.
    """

    def from_safetensors(name: str) -> torch.Tensor:
        with _open_safetensors(path, checkpoint) as file:
            if name not in file.keys():  # noqa: SIM118  (not a mapping)
                raise _missing(checkpoint, name)
            return file.get_tensor(name)

    def from_bin(name: str) -> torch.Tensor:
        tensors = _load_bin(path, checkpoint) if unmappable is None else unmappable
        if name not in tensors:
            raise _missing(checkpoint, name)
        return tensors.pop(name)

    if path.suffix == ".safetensors":
        return from_safetensors
    # files older than torch 1.6 can't be mapped: read once
    unmappable = None if zipfile.is_zipfile(path) else _load_bin(path, checkpoint)
    return from_bin


@contextmanager
def _open_safetensors(path: Path, checkpoint: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise PipelineError(f"checkpoint {checkpoint}: {path.name} is damaged: {one_line(error)}") from None


def _load_bin(path: Path, checkpoint: str) -> dict[str, torch.Tensor]:
    """A .bin file's tensors, mapped; weights_only refuses anything that would run code."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # pickle, zip, runtime and end-of-file errors share no base class
        raise PipelineError(f"checkpoint {checkpoint}: {path.name} is refused: {one_line(error)}") from None
    if not isinstance(content, dict) or not all(torch.is_tensor(tensor) for tensor in content.values()):
        raise PipelineError(f"checkpoint {checkpoint}: {path.name} is not a dict of tensors")
    return content


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' loading table and bar: what matters in them becomes a PipelineError."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _missing(checkpoint: str, name: str) -> PipelineError:
    return PipelineError(f"checkpoint {checkpoint}: tensor {name} is missing")


def _wrong_shape(checkpoint: str, name: str, found: Any, expected: Any) -> PipelineError:
    return PipelineError(
        f"checkpoint {checkpoint}: tensor {name} has shape {tuple(found)}, its config says {tuple(expected)}"
    )
