"""The Ray cluster of runtime.executor: ray: joining it, looking at its nodes, and how much of it is free.

A node that does not see the repository's folder, or has other versions, would lose clips or write other bytes: every
node is looked at before a shard is handed out.
"""

import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.engine.errors import PipelineError, one_line
from stages.engine.files import replacing
from stages.engine.params import Runtime
from stages.engine.versions import ENCODERS, MEDIA, RUNNING

CONNECT_SECONDS = 5
ANSWER_SECONDS = 60  # for a node to start a Python process
SHARED_SECONDS = 60  # NFS clients may not see a new file at once
MARKERS = Path(".cache/ray")
PACKAGES = tuple(dict.fromkeys((*RUNNING, *ENCODERS, *MEDIA)))


@contextmanager
def connection(address: str) -> Iterator[Any]:
    """The ray module, connected to the cluster at the address. Raises PipelineError where there is none."""
    try:
        import ray
    except ImportError:
        raise PipelineError(
            "runtime.executor: found ray, but the package is not installed; install it with: "
            "uv pip install -c constraints.txt ray"
        ) from None
    start = "start one with `ray start --head`, and join it from the other machines"
    host, _, port = address.rpartition(":")
    try:
        if host:  # Ray itself tries for a minute
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ConnectionError, RuntimeError, ValueError) as error:
        text = f"runtime.ray_address: no Ray cluster to join at {address} ({one_line(error)}); {start}"
        raise PipelineError(text) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _make_look() -> Callable[..., dict[str, str]]:
    """The function that looks at a node. Nested, it travels by value: a node without our code can run it too."""

    def look(root: str, marker: str, answer: str, paths: Sequence[str], packages: Sequence[str]) -> dict[str, str]:
        """What a node has: "python", "code", each package's version; "shared" and each path: "yes" or what is wrong."""
        import hashlib
        import importlib.metadata
        import importlib.util
        import platform
        from pathlib import Path

        found = {"python": platform.python_version()}
        for package in packages:
            try:
                found[package] = importlib.metadata.version(package).partition("+")[0]  # torch's +cpu or +cu128
            except importlib.metadata.PackageNotFoundError:
                found[package] = "none"
        try:
            Path(root, answer).write_text(Path(root, marker).read_text())
            found["shared"] = "yes"
        except OSError as error:
            found["shared"] = str(error)
            return found
        found |= {path: "yes" if Path(root, path).exists() else "no" for path in paths}
        spec = importlib.util.find_spec("stages")
        content = hashlib.blake2b(digest_size=8)
        for folder in spec.submodule_search_locations or [] if spec else []:
            for path in sorted(Path(folder).rglob("*.py")):
                content.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
        found["code"] = content.hexdigest()
        return found

    return look


def sound_nodes(ray: Any, root: Path, paths: Sequence[str]) -> list[Mapping[str, Any]]:
    """The cluster's nodes. Raises PipelineError naming one that can't write `root`, or differs from this machine.

    `paths`, relative to root, must be on every node where they are on this one.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes, sound = living(ray), []
    look, nonce = _make_look(), uuid.uuid4().hex
    marker = MARKERS / nonce
    paths = [path for path in paths if (root / path).exists()]
    with replacing(root / marker) as file:
        file.write(nonce)
    answers = [root / f"{marker}.{node['NodeID']}" for node in nodes]
    try:
        own = look(str(root), str(marker), f"{marker}.own", paths, PACKAGES)
        task, asked = ray.remote(num_cpus=0, max_retries=0)(look), []
        for node, answer in zip(nodes, answers, strict=True):
            there = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            asked.append(there.remote(str(root), str(marker), str(answer), paths, PACKAGES))
        ready, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_SECONDS)
        for node, ref, answer in zip(nodes, asked, answers, strict=True):
            name = node_name(node)
            if ref not in ready:
                raise PipelineError(f"{name}: no answer within {ANSWER_SECONDS} s; see `ray status` and its logs")
            try:
                found = ray.get(ref)
            except ray.exceptions.RayError as error:
                if node["NodeID"] not in {other["NodeID"] for other in living(ray)}:
                    continue  # the node was lost a moment ago
                raise PipelineError(f"{name}: can't run Python: {one_line(error)}") from None
            compare(name, own, found, root)
            if not appears(answer) or answer.read_text() != nonce:
                raise PipelineError(f"{name}: its {root} is another folder than the one here; share one folder")
            sound.append(node)
        return sound
    finally:
        for path in (root / MARKERS).glob(f"{nonce}*"):
            path.unlink()


def living(ray: Any) -> list[Mapping[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def compare(name: str, own: Mapping[str, str], found: Mapping[str, str], root: Path) -> None:
    """Raise PipelineError where what `look` found on the node differs from what it found here."""
    if found["shared"] != "yes":
        raise PipelineError(
            f"{name}: does not share the folder {root} ({found['shared']}); mount it there, readable and writable, "
            f"at the same path"
        )
    for key in own:
        if found[key] == own[key]:
            continue
        if found[key] == "no":
            raise PipelineError(f"{name}: does not see {root / key}; mount it there at the same path")
        if key == "code":
            raise PipelineError(f"{name}: runs other code than this machine (a `stages` of its own, or a stale "
                                f"mount); expected that of {root}")
        raise PipelineError(f"{name}: has {key} {found[key]}, expected {own[key]} as on this machine: the same bytes "
                            f"come from the same versions only; make .venv there from the same constraints.txt")


def node_name(node: Mapping[str, Any]) -> str:
    return f"Ray node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def appears(path: Path) -> bool:
    """Whether the file is there, if need be after a while: another machine has written it."""
    deadline = time.monotonic() + SHARED_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@dataclass(frozen=True)
class Slot:
    """Room for one actor on one node."""

    node: str  # id
    name: str
    cpus: int
    gpus: float  # 0: computes on the CPU
    workers: int  # decoding workers


def plan_slots(nodes: Sequence[Mapping[str, Any]], runtime: Runtime, gpu: bool) -> list[Slot]:
    """The cluster's slots: of its GPUs, runtime.ray_gpus_per_task each; or, where none are to be used, of its nodes.

    Taken in turns, one of every node first. Raises PipelineError where there are none, or runtime.device names a GPU.
    """
    if ":" in runtime.device:
        raise PipelineError(f"params.yaml: runtime.device: found {runtime.device}, which is one machine's; expected "
                            f"auto, cpu or cuda with runtime.executor: ray")
    share = runtime.ray_gpus_per_task
    turns: list[tuple[int, int, Slot]] = []
    gpus = sum(node["Resources"].get("GPU", 0) for node in nodes)
    on_gpu = gpu and runtime.device != "cpu" and (gpus > 0 or runtime.device == "cuda")
    for node in nodes:
        cpus = int(node["Resources"].get("CPU", 0))
        count = int(node["Resources"].get("GPU", 0) / share + 1e-6) if on_gpu else min(1, cpus)
        if count:
            workers = (cpus if runtime.workers == "auto" else runtime.workers) // count
            slot = Slot(node["NodeID"], node_name(node), cpus // count, share if on_gpu else 0, max(1, workers))
            turns += [(turn, len(turns), slot) for turn in range(count)]
    if not turns:
        wanted = f"{share:g} GPUs on one of them (runtime.ray_gpus_per_task)" if on_gpu else "CPUs"
        raise PipelineError(f"runtime.ray_address: found {len(nodes)} nodes with {gpus:g} GPUs in all, "
                            f"expected {wanted}")
    return [slot for _, _, slot in sorted(turns, key=lambda entry: entry[:2])]
