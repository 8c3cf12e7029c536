"""Versions of the packages that a shard's bytes depend on, besides our own code."""

import importlib.metadata
import json
from collections.abc import Sequence

MEDIA = ("av", "numpy", "opencv-python-headless", "onnxruntime", "h5py")
ENCODERS = ("torch", "torchvision", "transformers", "open_clip_torch", "sentencepiece", "librosa", "soxr", "numpy",
            "h5py")
RUNNING = ("ray", "pydantic", "accelerate")  # of every node of a cluster, too


def version(package: str) -> str:
    """Without the build that torch adds (+cpu, +cu130); "none" where it is not installed."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "none"


def versions(packages: Sequence[str]) -> str:
    """JSON of package -> version."""
    return json.dumps({package: version(package) for package in packages}, sort_keys=True)
