"""What Ray costs on one node: the same shards by the local executor and by Ray, one after the other.

    python -m benchmarks.ray_overhead                       # six shards of about ten seconds and more, two rounds
    python -m benchmarks.ray_overhead --shards 8 --clips 64

HuBERT-base (on a GPU -large) with random weights over noise, as in benchmarks.encoders; a cluster of one node with all
of this machine's cores and GPUs is started for it. Both times include opening the encoder; Ray's also joining the
cluster and looking at its nodes.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks import checkpoints
from benchmarks.encoders import write_audio
from stages.commands.published import LAYERS
from stages.encoders import hubert
from stages.encoders.pooling import encoded_row
from stages.engine.devices import stage_devices
from stages.engine.encoding import Encode
from stages.engine.extraction import write_store
from stages.engine.fingerprint import PARTS
from stages.engine.inputs import StoreReader, store_inputs
from stages.engine.params import Params, load
from stages.engine.store import Store
from stages.engine.work import Target

ROOT = Path(__file__).parent.parent


def make_encoder(device: str, checkpoint: str) -> hubert.Encoder:
    config = hubert.Config(checkpoint=checkpoint, revision=None, layers=LAYERS, resample=True, window_seconds=30,
                           dtype="bfloat16" if device.startswith("cuda") else "float32")
    return hubert.Encoder(config, device)


def seconds(p: Params, checkpoint: Path) -> float:
    """Of one extraction from the start; shards as p.corpus.shard_size says."""
    shutil.rmtree(PARTS, ignore_errors=True)
    work = Encode(partial(make_encoder, checkpoint=str(checkpoint)), StoreReader(Path("audio")),
                  partial(encoded_row, keep_frames=False), p.runtime)
    target = Target("ray_overhead", Path("out") / p.runtime.executor, "features", {}, "benchmark")
    start = time.perf_counter()
    write_store(target, store_inputs(Store("audio")), work, p, stage_devices(p.runtime))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--clips", type=int, default=40, help="per shard")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    from ray.cluster_utils import Cluster

    shipped = load(ROOT / "params.yaml")
    os.environ |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    gpus = torch.cuda.device_count()
    cluster = Cluster(initialize_head=True, head_node_args={
        "num_cpus": len(os.sched_getaffinity(0)), "num_gpus": gpus, "include_dashboard": False})
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        checkpoint = checkpoints.make_hubert(Path(folder) / "hubert", large=gpus > 0)
        write_audio(Path("audio"), options.shards * options.clips)
        found: dict[str, list[float]] = {"local": [], "ray": []}
        for _ in range(options.rounds):
            for executor, times in found.items():
                runtime = shipped.runtime.model_copy(update={"executor": executor, "ray_address": cluster.address})
                corpus = shipped.corpus.model_copy(update={"shard_size": options.clips, "path": "audio"})
                times.append(seconds(shipped.model_copy(update={"runtime": runtime, "corpus": corpus}), checkpoint))
        shards = [[path.read_bytes() for path in sorted(Path("out", name).glob("*.h5"))] for name in found]
        os.chdir("/")
    cluster.shutdown()
    local, ray = (statistics.median(times) for times in found.values())
    print(f"{options.shards} shards of {local / options.shards:.1f} s: local {local:.1f} s, Ray {ray:.1f} s, "
          f"{ray / local - 1:+.1%}; {'the same' if shards[0] == shards[1] else 'OTHER'} bytes")


if __name__ == "__main__":
    main()
