"""The engine's executor for several machines: shards are computed on the nodes of an existing Ray cluster.

Every node must see the repository's folder at the same path (NFS, for example): inputs are read from it, and finished
shards written to it as the local executor writes them. So the driver, which is the one command that DVC runs, only
hands out blocks of shards through Ray's actor pool. Each slot of the cluster (a share of a GPU, or on CPUs a node) is
an actor that opens the work once. Ray restarts an actor whose process or node was lost and gives its block to it again;
what of the block is finished already is not computed twice.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.engine.devices import pick_devices, use_cores
from stages.engine.errors import PipelineError, describe, is_machines, one_line
from stages.engine.params import Params
from stages.engine.ray_cluster import Slot, appears, connection, plan_slots, sound_nodes
from stages.engine.work import Shard, Target, Work, write_shards

RESTARTS = 2  # of an actor whose process ends
BLOCKS = 4  # for each slot: few, since a block's first shard waits for nothing while the one before it is encoded
PATIENCE_SECONDS = 30  # until it is said that all slots are taken


def compute_in_ray(todo: Sequence[Shard], work: Work, target: Target, params: Params, gpu: bool) -> Iterator[Any]:
    """Yield None once a block is done somewhere, then each shard.

    `gpu`: whether the work can use one; runtime.device says whether it does. Raises PipelineError for no cluster at
    runtime.ray_address, for nodes that can't share the work, and for a block that fails for good.
    """
    runtime = params.runtime
    with connection(runtime.ray_address) as ray:
        slots = plan_slots(sound_nodes(ray, Path.cwd(), [params.corpus.path]), runtime, gpu)
        _name_main()
        yield from _run(ray, todo, work, target, slots[: len(todo)])


class _Actor:
    """The work, open on one slot."""

    def __init__(self, root: str, work: Work, target: Target, slot: Slot):
        os.chdir(root)
        self._work, self._target, self._slot, self._open = work, target, slot, False

    def compute(self, block: Sequence[Shard]) -> str:
        """Write those of the shards that are not there yet; returns "", or an error that no retry would mend."""
        try:
            if not self._open:
                device = pick_devices("cuda")[0] if self._slot.gpus else "cpu"  # Ray shows it no GPUs but its own
                use_cores(self._slot.cpus)
                self._work.open(device, self._slot.workers)
                self._open = True
            for _ in write_shards((shard for shard in block if not shard.part.exists()), self._work, self._target):
                pass
        except PipelineError as error:
            return str(error)
        except Exception as error:
            error.__notes__ = [_name(block), *getattr(error, "__notes__", [])]
            raise
        return ""


def _name_main() -> None:
    """Name the module of what the running stage defines: in a node's processes __main__ is another module."""
    main = sys.modules["__main__"]
    if main.__spec__ is None:
        return
    sys.modules[main.__spec__.name] = main
    for value in vars(main).values():
        if getattr(value, "__module__", None) == "__main__":
            value.__module__ = main.__spec__.name


def _run(ray: Any, todo: Sequence[Shard], work: Work, target: Target, slots: Sequence[Slot]) -> Iterator[Any]:
    from ray.util import ActorPool
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    reference = ray.put(work)
    pool = ActorPool([
        ray.remote(_Actor).options(
            num_cpus=slot.cpus, num_gpus=slot.gpus, max_restarts=RESTARTS, max_task_retries=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node, soft=True),  # soft: a lost node's goes on
        ).remote(os.getcwd(), reference, target, slot)
        for slot in slots
    ])
    under_way: dict[str, Sequence[Shard]] = {}  # actor -> its block

    def submit(actor: Any, block: Sequence[Shard]) -> Any:
        under_way[actor._actor_id.hex()] = block
        return actor.compute.remote(block)

    size = -(-len(todo) // (BLOCKS * len(slots)))
    for start in range(0, len(todo), size):
        pool.submit(submit, todo[start : start + size])
    began, opened, left = time.monotonic(), False, list(todo)
    while pool.has_next():
        try:
            fault = pool.get_next_unordered(timeout=PATIENCE_SECONDS)
        except TimeoutError:
            if not opened and time.monotonic() - began < 2 * PATIENCE_SECONDS:
                print(f"{target.stage}: waiting for a first result of the Ray cluster; see `ray status` for its room",
                      file=sys.stderr)
        except ray.exceptions.RayError as error:
            raise PipelineError(_failure(ray, error, target, under_way)) from None
        else:
            if fault:
                raise PipelineError(fault)
            if not opened:
                yield None
            opened = True
        done = [shard for shard in left if shard.part.exists()]
        left = [shard for shard in left if shard not in done]
        yield from done
        while not pool._pending_submits and (idle := pool.pop_idle()) is not None:
            ray.kill(idle)  # its room serves an actor whose node was lost
    for shard in left:
        if not appears(shard.part):
            raise PipelineError(f"{shard.part}: a node has written it, but it does not appear here; check that the "
                                f"folder is shared")
        yield shard


def _name(block: Sequence[Shard]) -> str:
    """The clips of the block's first shard that is not there."""
    clips = next((shard for shard in block if not shard.part.exists()), block[0]).clips
    first, last = clips[0].clip_id, clips[-1].clip_id
    return f"the shard of {first}" if first == last else f"the shard of {first} to {last}"


def _failure(ray: Any, error: Any, target: Target, under_way: dict[str, Sequence[Shard]]) -> str:
    """One line on a block that failed: by an error that nobody foresaw, or since its process ended again and again."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        name, *notes = getattr(cause, "__notes__", None) or ["a block of shards"]
        what = describe(cause) if is_machines(cause) else f"{type(cause).__name__}: {one_line(cause)}"
        why = ": ".join([*notes, what])
    else:
        name = _name(under_way[error.actor_id])
        why = f"its process was ended from outside {RESTARTS + 1} times ({one_line(error)})"
    return f"{target.stage}: {name} failed: {why}; finished shards are kept"
