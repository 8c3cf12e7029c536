"""How fast the encoders run in the engine, beside a plain per-clip loop of the same model in the same run.

    python -m benchmarks.encoders                  # by device: HuBERT-large, ViT-L/14 and Baichuan-13B on a GPU, else
    python -m benchmarks.encoders --only clip      #   HuBERT-base, ViT-B/32 and a small decoder

Random weights in the published file layouts, synthetic clips in real stores. Per encoder:

clips/s, units/s   of the engine, decoding included; units are seconds of audio, images or tokens
waits              share of the time for which the device had nothing to do but to wait for decoding
vs. loop           the engine's rate over that of: read one clip, prepare it, encode it, pool it, next clip
of peak            the encoder's own rate (its input decoded before) in floating-point operations, as a share of what
                   a large matrix product of the same dtype reaches here. Padding counts as no work
bf16               gain of bfloat16 over the row's dtype, on CPUs that compute in it
"""

import argparse
import functools
import inspect
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import checkpoints
from stages.commands.published import BAICHUAN_13B, LAYERS, DecoderSize
from stages.encoders import baichuan, clip, emovclip, hubert
from stages.encoders.checkpoints import DTYPES, Dtype
from stages.encoders.pooling import encoded_row
from stages.engine.devices import pick_device, set_threads
from stages.engine.encoding import Encode, Encoder
from stages.engine.inputs import StoreReader
from stages.engine.params import Runtime
from stages.engine.store import Row, write_index, write_shard
from stages.engine.work import Input, Shard

RATE = 24000  # Hz, as extract_audio stores
SHARD = 64  # clips, as in the presets
ROUNDS = 5  # alternating; the median of their ratios is shown


@dataclass(frozen=True)
class Case:
    """One encoder with its clips. unit: "s of audio", "images" or "tokens"."""

    name: str
    unit: str
    make: Callable[[Dtype, str], Encoder]  # (dtype, device)
    read: Callable[[Any], Any]
    items: Sequence[Any]
    looped: int  # the loop runs over the first so many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--clips", type=float, default=1.0, help="factor on the number of clips")
    options = parser.parse_args()
    device = pick_device(options.device)
    dtype: Dtype = options.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    runtime = Runtime(device=device, workers="auto", executor="local", ray_address="auto", ray_gpus_per_task=1,
                      batch_memory_mb="auto", gradient_checkpointing=False, clip_timeout_seconds=60, keep_parts=False)
    peak = matmul_peak(DTYPES[dtype], device)
    print(f"{device_name(device)}, {len(os.sched_getaffinity(0))} CPU cores, {dtype}: matrix products reach "
          f"{peak / 1e12:.2f} TFLOP/s\n")
    print("| encoder | clips/s | units/s | waits | vs. loop | of peak | bf16 |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, make_case in CASES.items():
            gpu = device.startswith("cuda")
            if options.only in (None, name) and not (gpu and name == "wider"):
                case = make_case(Path(folder) / name, gpu, dtype, options.clips)
                print(row(case, dtype, device, runtime, peak), flush=True)


# ---------------------------------------------------------------- measuring


def row(case: Case, dtype: Dtype, device: str, runtime: Runtime, peak: float) -> str:
    encoder = case.make(dtype, device)
    set_threads(False)
    timed_engine(encoder, case.read, case.items[: case.looped], runtime)  # warms up: allocations, lazy kernels
    timed_loop(encoder, case.read, case.items[: max(1, case.looped // 4)])
    ratios, rates, waits = [], [], []
    for _ in range(ROUNDS):
        seconds, waited = timed_engine(encoder, case.read, case.items, runtime)
        looped = timed_loop(encoder, case.read, case.items[: case.looped]) / case.looped
        rates.append(len(case.items) / seconds)
        waits.append(waited / seconds)
        ratios.append(looped * rates[-1])
    prepared = [encoder.prepare(case.read(item)) for item in case.items]
    units = sum(unit_count(case, encoder, array) for array in prepared) / len(prepared)
    alone = statistics.median(timed_engine(Prepared(encoder, prepared), int, range(len(prepared)), runtime)[0]
                              for _ in range(ROUNDS))
    counted = prepared[: max(1, case.looped // 4)]
    encode = inspect.unwrap(type(encoder).encode)  # in inference mode a linear layer is no product that is counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for array in counted:
            encode(encoder, [array])
    work = counter.get_total_flops() * len(prepared) / len(counted)
    rate = statistics.median(rates)
    gain = bfloat16_gain(case, dtype, device, runtime, len(prepared) / alone)
    return (f"| {case.name} | {rate:.2f} | {rate * units:.1f} {case.unit} | {statistics.median(waits):.0%} | "
            f"{statistics.median(ratios):.2f} | {work / alone / peak:.0%} | {gain} |")


def timed_engine(
    encoder: Encoder, read: Callable[[Any], Any], items: Sequence[Any], runtime: Runtime
) -> tuple[float, float]:
    """(seconds, of which the device waited) for all items in the engine, rows pooled but not written."""
    work = Encode(lambda _: encoder, read, functools.partial(encoded_row, keep_frames=False), runtime)
    work.open(runtime.device)
    clips = [Input(str(i), item, b"") for i, item in enumerate(items)]
    start = time.perf_counter()
    shards = (Shard(Path(str(i)), part) for i, part in enumerate(batched(clips, SHARD)))
    rows = [row for _, found in work.shards(shards) for row in found]
    seconds = time.perf_counter() - start
    assert len(rows) == len(items) and all(row.present for row in rows)
    return seconds, work.waited


def timed_loop(encoder: Encoder, read: Callable[[Any], Any], items: Sequence[Any]) -> float:
    start = time.perf_counter()
    for i, item in enumerate(items):
        [features] = encoder.encode([encoder.prepare(read(item))])
        encoded_row(encoder, str(i), features, keep_frames=False)
    return time.perf_counter() - start


class Prepared:
    """An encoder whose clips are prepared already; items are their numbers."""

    def __init__(self, encoder: Any, prepared: Sequence[np.ndarray]):
        self.dimension, self.unit_bytes, self.padded = encoder.dimension, encoder.unit_bytes, encoder.padded
        self.size, self.encode, self.concurrent = encoder.size, encoder.encode, encoder.concurrent
        self.variance = encoder.variance
        self._prepared = prepared

    def prepare(self, item: int) -> np.ndarray:
        return self._prepared[item]


def unit_count(case: Case, encoder: Encoder, prepared: np.ndarray) -> float:
    size = encoder.size(prepared)
    return size / 16000 if case.unit.startswith("s ") else size


def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations a second of a large square matrix product, the best of several."""
    side = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    seconds = []
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        torch.matmul(a, b)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def bfloat16_gain(case: Case, dtype: Dtype, device: str, runtime: Runtime, rate: float) -> str:
    if device.startswith("cuda") or dtype == "bfloat16":
        return ""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "not in this CPU"
    encoder = case.make("bfloat16", device)
    prepared = [encoder.prepare(case.read(item)) for item in case.items]
    seconds, _ = timed_engine(Prepared(encoder, prepared), int, range(len(prepared)), runtime)
    return f"{len(prepared) / seconds / rate:.2f}"


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return next(line.split(": ")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name"))


def batched(items: Sequence[Any], count: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + count] for i in range(0, len(items), count))


# ---------------------------------------------------------------- the cases


def hubert_case(folder: Path, gpu: bool, dtype: Dtype, factor: float) -> Case:
    checkpoint = checkpoints.make_hubert(folder / "hubert", large=gpu)
    config: dict[str, Any] = {"checkpoint": str(checkpoint), "revision": None, "layers": LAYERS, "resample": True,
                              "window_seconds": 30}
    items = write_audio(folder / "audio", int((2000 if gpu else 16) * factor))
    return Case(f"HuBERT-{'large' if gpu else 'base'}", "s of audio",
                lambda dtype, device: hubert.Encoder(hubert.Config(**config, dtype=dtype), device),
                StoreReader(folder / "audio"), items, int((100 if gpu else 16) * factor))


def clip_case(folder: Path, gpu: bool, dtype: Dtype, factor: float) -> Case:
    name = "ViT-L-14" if gpu else "ViT-B-32"
    checkpoint = checkpoints.make_clip(folder / name, f"{name}-quickgelu")
    items = write_images(folder / "faces", int((600 if gpu else 12) * factor), 100 if gpu else 12, 128)
    return Case(f"CLIP {name}, every face", "images",
                lambda dtype, device: clip.Encoder(clip.Config(str(checkpoint), None, dtype), device),
                StoreReader(folder / "faces"), items, int((100 if gpu else 12) * factor))


def emovclip_case(folder: Path, gpu: bool, dtype: Dtype, factor: float) -> Case:
    name = "ViT-L-14" if gpu else "ViT-B-32"
    checkpoint = checkpoints.make_clip(folder / name, f"{name}-quickgelu")
    prompts = checkpoints.make_prompts(folder / "prompts", checkpoint)
    items = write_images(folder / "frames", int((2000 if gpu else 8) * factor), 16, 224)
    return Case(f"EmoVCLIP {name}, 16 frames", "images",
                lambda dtype, device: emovclip.Encoder(
                    emovclip.Config(str(checkpoint), None, dtype, str(prompts)), device),
                StoreReader(folder / "frames"), items, int((100 if gpu else 8) * factor))


def baichuan_case(folder: Path, gpu: bool, dtype: Dtype, factor: float,
                  size: DecoderSize = checkpoints.SMALL_DECODER) -> Case:
    size = BAICHUAN_13B if gpu else size
    checkpoint = checkpoints.make_decoder(folder / "decoder", size, DTYPES[dtype], "cuda" if gpu else "cpu")
    rng = np.random.default_rng(0)
    count = int((10000 if gpu else 128) * factor)
    texts = ["".join(rng.choice(checkpoints.ALPHABET, rng.integers(20, 61))) for _ in range(count)]
    config: dict[str, Any] = {"checkpoint": str(checkpoint), "revision": None, "layers": LAYERS, "max_tokens": 512}
    return Case("Baichuan-13B" if gpu else f"decoder of {size.layers} x {size.width}, 20 to 60 tokens", "tokens",
                lambda dtype, device: baichuan.Encoder(baichuan.Config(**config, dtype=dtype), device),
                str, texts, int((200 if gpu else 128) * factor))


def wider_case(folder: Path, gpu: bool, dtype: Dtype, factor: float) -> Case:
    return baichuan_case(folder, gpu, dtype, factor, checkpoints.WIDER_DECODER)


CASES = {"hubert": hubert_case, "clip": clip_case, "emovclip": emovclip_case, "baichuan": baichuan_case,
         "wider": wider_case}


def write_audio(folder: Path, count: int) -> list[str]:
    """Noise of log-normal length around 4 s, 1 to 15 s, as MER2024's clips; returns the clip ids."""
    rng = np.random.default_rng(0)
    seconds = np.exp(rng.normal(np.log(4), 0.5, count)).clip(1, 15)
    rows = [Row(f"c{i}", values=rng.integers(-8000, 8000, int(s * RATE), np.int16)) for i, s in enumerate(seconds)]
    return write_store(folder, "audio", rows)


def write_images(folder: Path, count: int, per_clip: int, side: int) -> list[str]:
    """Smooth random pictures as JPEG; returns the clip ids."""
    rng = np.random.default_rng(0)
    pictures = [cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
                for _ in range(32)]
    jpegs = [cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes() for picture in pictures]
    rows = [Row(f"c{i}", values=[jpegs[k] for k in rng.integers(0, len(jpegs), per_clip)],
                items={"frame": list(range(per_clip))}) for i in range(count)]
    return write_store(folder, "images", rows)


def write_store(folder: Path, kind: str, rows: list[Row]) -> list[str]:
    names = []
    for i, part in enumerate(batched(rows, SHARD)):
        names.append(f"shard-{i:05d}.h5")
        write_shard(folder / names[-1], kind, part, {"fingerprint": str(i), "sample_rate": RATE})
    write_index(folder, names)
    return [row.clip_id for row in rows]


if __name__ == "__main__":
    main()
