"""What the machine has: which devices compute, how many processes decode, how much memory a batch may take."""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

from stages.engine.errors import PipelineError
from stages.engine.params import Runtime

NARROW = 256  # features; the smallest published encoders have 512
CPU_BATCH_BYTES = 54 << 20  # about what its caches hold: 16 images of ViT-B/32, the fastest, as measured
GPU_BATCH_BYTES = 4 << 30  # fills an H200; more would only put short clips beside long ones

_share: int | None = None  # of the machine's cores, as use_cores set it; None: all that the system allows


def pick_devices(device: str) -> list[str]:
    """`auto`: every GPU, or the CPU; `cuda`: every GPU. Raises PipelineError where the GPU asked for is not there."""
    if device == "cpu":
        return ["cpu"]
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return [f"cuda:{i}" for i in range(count)] or ["cpu"]
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise PipelineError(
            f"params.yaml: runtime.device: found {device}, but this machine has {count} usable GPUs; "
            f"expected auto, cpu{''.join(f', cuda:{i}' for i in range(count))}"
        )
    return [device] if ":" in device else [f"cuda:{i}" for i in range(count)]


def stage_devices(runtime: Runtime) -> list[str]:
    """The devices on which a stage extracts: this machine's; with Ray runtime.device itself: nodes have their own."""
    return [runtime.device] if runtime.executor == "ray" else pick_devices(runtime.device)


def pick_device(device: str) -> str:
    """The one device of a stage that uses one: the first of pick_devices."""
    return pick_devices(device)[0]


def cores() -> int:
    """The CPU cores that this process may use."""
    found = len(os.sched_getaffinity(0))
    return found if _share is None else min(found, _share)


def use_cores(count: int) -> None:
    """Let this process compute on so many cores only: its share of a machine."""
    global _share
    _share = max(1, count)


def pick_workers(runtime: Runtime) -> int:
    """Decoding workers: runtime.workers, or the cores this process may use."""
    return cores() if runtime.workers == "auto" else runtime.workers


def set_threads(narrow: bool) -> None:
    """On a CPU, one thread for a narrow network, else all cores.

    Threads synchronise after every operation. Where an operation takes microseconds they mostly wait for one another,
    ten times as long as they compute when anything else runs on the machine.
    """
    import torch

    torch.set_num_threads(1 if narrow else cores())


@contextmanager
def lanes(count: int) -> Iterator[Executor]:
    """`count` threads for work on a CPU that need not synchronise, torch's own threads shared out among them.

    Threads inside an operation wait for one another after each; lanes don't.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // count))  # what a new thread computes with
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def free_bytes(device: str) -> int:
    """Memory for activations: what is free on a GPU; on a CPU half of the machine's."""
    if not device.startswith("cuda"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free


def batch_bytes(runtime: Runtime, device: str) -> int:
    """Activations that one forward pass may take, which decides which clips share a batch.

    On a CPU a fixed number, so that runtime changes no result: little, since there computing binds and padding only
    costs. On a GPU half of its free memory, runtime.batch_memory_mb, or GPU_BATCH_BYTES, whichever is least: another
    batching moves features in their seventh digit.
    """
    if not device.startswith("cuda"):
        return CPU_BATCH_BYTES
    return min(free_bytes(device) // 2, GPU_BATCH_BYTES, _given_bytes(runtime) or GPU_BATCH_BYTES)


def lane_bytes(runtime: Runtime) -> int:
    """Activations that all batches side by side on a CPU may take: runtime.batch_memory_mb, or half of its memory."""
    return _given_bytes(runtime) or free_bytes("cpu")


def _given_bytes(runtime: Runtime) -> int | None:
    return None if runtime.batch_memory_mb == "auto" else runtime.batch_memory_mb << 20


def device_name(device: str) -> str:
    """What a shard says of the device that made it: cpu, or the GPU's name."""
    if not device.startswith("cuda"):
        return device
    import torch

    return f"cuda: {torch.cuda.get_device_name(device)}"
