"""Loading a published checkpoint together with its head (recogniser, language model), through transformers.

No remote code, no pickle (transformers reads .bin files with weights_only); every fault is one line that names the
checkpoint and, where there is one, the tensor.
"""

from pathlib import Path
from typing import Any

import torch

from stages.engine.errors import PipelineError, one_line


def load_with_head(auto_class: str, folder: Path, checkpoint: str, dtype: torch.dtype, device: str) -> Any:
    """The model that transformers' `auto_class` makes of a checkpoint folder, in eval mode on the device.

    Raises PipelineError for an architecture without this head or with remote code only, for damaged files, and for
    weights that the checkpoint lacks: transformers would draw them at random, and the output be noise.
    """
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()  # what matters in its loading report becomes a PipelineError
    logging.disable_progress_bar()
    try:
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # transformers, safetensors, pickle and JSON errors share no base class
        raise PipelineError(f"checkpoint {checkpoint}: can't be loaded as {auto_class}: {one_line(error)}") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise PipelineError(f"checkpoint {checkpoint}: tensor {missing[0]} is missing; expected a full {auto_class}")
    return model.to(device).eval()


def load_part(auto_class: str, folder: Path, checkpoint: str) -> Any:
    """A checkpoint's AutoTokenizer or AutoFeatureExtractor. Raises PipelineError where it has none."""
    import transformers

    try:
        return getattr(transformers, auto_class).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise PipelineError(f"checkpoint {checkpoint}: no {auto_class} to be had: {one_line(error)}") from None
