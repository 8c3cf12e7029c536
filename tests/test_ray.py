"""The Ray executor on a real cluster of three nodes: local's bytes; lost nodes cost no shard; faults are named."""

import dataclasses
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engine import ROOT, contents, inputs, small_shards, target
from media_files import write_small_clip
from ray_works import LOG, Words, computed, identity, make_ramps
from ruamel.yaml import YAML

from stages.encoders.pooling import encoded_row
from stages.engine.encoding import Encode
from stages.engine.errors import PipelineError
from stages.engine.extraction import write_store
from stages.engine.manifest import Clip, write_manifest
from stages.engine.params import Params, load
from stages.engine.ray_cluster import connection, plan_slots, sound_nodes
from stages.engine.store import Store
from stages.engine.work import plan

PATH = f"{ROOT}:{ROOT / 'tests'}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs and two nodes of one; a test may add one. The nodes' processes start in the root folder."""
    from ray.cluster_utils import Cluster

    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets need a short path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATH)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("RAY_TMPDIR", temporary)
        patch.chdir("/")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture
def p(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Params with small shards and the Ray executor, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", PATH)
    small_shards(tmp_path)
    return on_ray(cluster.address)


def on_ray(address: str, **runtime: Any) -> Params:
    """params.yaml set to this cluster."""
    values = YAML().load(Path("params.yaml"))
    values["runtime"] |= {"executor": "ray", "ray_address": address, **runtime}
    YAML().dump(values, Path("params.yaml"))
    return load()


def locally(p: Params) -> Params:
    return p.model_copy(update={"runtime": p.runtime.model_copy(update={"executor": "local"})})


def test_the_bytes_are_those_of_local_and_all_nodes_have_a_share(p: Params) -> None:
    clips = inputs(30)
    clips[7] = dataclasses.replace(clips[7], absent=True)
    work = Encode(make_ramps, identity, partial(encoded_row, keep_frames=True), p.runtime)
    write_store(target("a", kind="features"), clips, work, p, ["cpu"])
    assert sorted({clip for clip, _ in computed()}) == [clip.clip_id for clip in clips if not clip.absent]
    assert len({node for _, node in computed()}) == 2
    by_ray = contents(Path("out/a"))
    assert not list(Path(".cache/ray").iterdir())
    shutil.rmtree(".cache/parts")
    write_store(target("a", kind="features"), clips, work, locally(p), ["cpu"])
    assert contents(Path("out/a")) == by_ray and len(by_ray) > 8


def test_a_stage_as_dvc_runs_it(p: Params, tmp_path: Path) -> None:
    """`python -m stages.extract_audio`: what it defines is in __main__, and its decoders are processes on a node."""
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    shutil.copyfile(ROOT / "dvc.yaml", "dvc.yaml")
    clips = Path(p.corpus.path)
    clips.mkdir(parents=True)
    for i in range(5):
        write_small_clip(clips / f"c{i}.mp4", 0.2 + 0.1 * i)
    names = [f"c{i}" for i in range(5)]
    write_manifest(Clip(c, f"{c}.mp4", "unlabelled", "", "", "", 1.0, 1, f"{i:064x}") for i, c in enumerate(names))
    found = []
    for executor in ("ray", "local"):
        on_ray(p.runtime.ray_address, executor=executor)
        shutil.rmtree(".cache/parts", ignore_errors=True)
        done = subprocess.run([sys.executable, "-m", "stages.extract_audio"], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert "5/5" in done.stderr
        found.append(contents(Path("data/audio")))
    assert found[0] == found[1]
    assert Store("data/audio").present.all()


@pytest.mark.parametrize(("fault", "expected"), [
    ({"fails": "c05"}, r"failed: clip c05: ArithmeticError: the sum is wrong; finished shards are kept"),
    ({"dies": "c05"}, r"failed: its process was ended from outside 3 times .*; finished shards are kept"),
])
def test_a_task_that_fails_for_good_names_its_clip(p: Params, fault: dict[str, str], expected: str) -> None:
    with pytest.raises(PipelineError, match=expected) as caught:
        write_store(target("a"), inputs(8), Words(**fault), p, ["cpu"])
    assert "\n" not in str(caught.value)
    shard = next(s for s in plan(target("a"), inputs(8), 4) if "c05" in [clip.clip_id for clip in s.clips])
    first, last = shard.clips[0].clip_id, shard.clips[-1].clip_id
    assert f"the shard of {first}{f' to {last}' if last != first else ''} failed" in str(caught.value)
    assert [clip for clip, _ in computed()].count("c05") == (3 if "dies" in fault else 1)
    finished = [clip for clip, _ in computed() if clip not in [c.clip_id for c in shard.clips]]
    assert len(finished) == len(set(finished))  # what of the block was finished is not computed again


def test_no_cluster_at_the_address(p: Params) -> None:
    with pytest.raises(PipelineError, match=r"runtime\.ray_address: no Ray cluster to join at localhost:1 .*refused"):
        write_store(target("a"), inputs(8), Words(), on_ray("localhost:1"), ["cpu"])


def test_a_node_without_the_shared_folder(p: Params) -> None:
    Path("clips").mkdir()
    here = Path("/proc/self/cwd")  # the test's folder to this process, another to the nodes' processes
    with connection(p.runtime.ray_address) as ray:
        assert len(sound_nodes(ray, Path.cwd(), ["clips"])) == 3
        with pytest.raises(PipelineError, match=r"Ray node .*: does not share the folder /proc/self/cwd .*mount it"):
            sound_nodes(ray, here, [])
        with pytest.raises(PipelineError, match=r"Ray node .*: does not see /proc/self/cwd/clips; mount it"):
            sound_nodes(ray, Path.cwd(), ["/proc/self/cwd/clips"])
    assert not list(Path(".cache/ray").iterdir())


def test_versions_that_differ_between_nodes(
    p: Params, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(ROOT / "stages", other / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    with open(other / "stages/engine/store.py", "a") as code:
        code.write("# older\n")
    package = other / "h5py-0.0.1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: h5py\nVersion: 0.0.1\n")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{other}:{PATH}")
        patch.chdir("/")
        node = cluster.add_node(num_cpus=1)
    try:
        with pytest.raises(PipelineError, match=r"Ray node .*: has h5py 0\.0\.1, expected \d.*constraints\.txt"):
            write_store(target("a"), inputs(8), Words(), p, ["cpu"])
        shutil.rmtree(package)
        with pytest.raises(PipelineError, match=r"Ray node .*: runs other code than this machine") as caught:
            write_store(target("a"), inputs(8), Words(), p, ["cpu"])
    finally:
        cluster.remove_node(node)
    assert "\n" not in str(caught.value)
    assert not LOG.exists()


def node(name: str, cpus: int, gpus: int = 0) -> dict[str, Any]:
    return {"NodeID": name, "NodeManagerHostname": name, "NodeManagerAddress": "10.0.0.1",
            "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}


def test_slots_follow_the_share_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_shards(tmp_path)
    nodes = [node("a", 16, 2), node("b", 8, 1), node("head", 0)]

    def slots(gpu: bool, share: float = 1, device: str = "auto") -> list[tuple[str, int, float, int]]:
        runtime = on_ray("auto", ray_gpus_per_task=share, device=device).runtime
        return [(s.node, s.cpus, s.gpus, s.workers) for s in plan_slots(nodes, runtime, gpu)]

    assert slots(True) == [("a", 8, 1, 8), ("b", 8, 1, 8), ("a", 8, 1, 8)]
    assert [s[0] for s in slots(True, 0.5)] == ["a", "b", "a", "b", "a", "a"]
    assert slots(True, 0.5)[0] == ("a", 4, 0.5, 4)
    assert slots(True, 2) == [("a", 16, 2, 16)]
    assert slots(False) == slots(True, device="cpu") == [("a", 16, 0, 16), ("b", 8, 0, 8)]
    with pytest.raises(PipelineError, match=r"found 3 nodes with 3 GPUs in all, expected 4 GPUs on one of them"):
        slots(True, 4)
    with pytest.raises(PipelineError, match=r"runtime\.device: found cuda:1, which is one machine's"):
        slots(True, device="cuda:1")
    with pytest.raises(PipelineError, match=r"ray_gpus_per_task: found 1\.5, expected at most 1, or whole"):
        slots(True, 1.5)


# The last: for some seconds the cluster still counts the dead node.
def test_a_node_killed_in_the_middle_costs_no_shard(
    p: Params, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.chdir("/")
        third = cluster.add_node(num_cpus=1)

    def kill_at_work() -> None:
        while not (LOG.exists() and [clip for clip, node in computed() if node == third.node_id][4:]):
            time.sleep(0.02)
        cluster.remove_node(third, allow_graceful=False)

    killer = threading.Thread(target=kill_at_work)
    killer.start()
    write_store(target("a"), inputs(60), Words(doomed=third.node_id), p, ["cpu"])
    killer.join()
    lost = [clip for clip, node in computed() if node == third.node_id]
    assert len(lost) == 5
    assert len(computed()) <= 60 + 4  # at most the shard that was cut short is computed again
    assert Store("out/a").clip_ids == [clip.clip_id for clip in inputs(60)]
