"""The engine's executor for several machines: shards are computed on the nodes of an existing Ray cluster.

Every node must see the repository's folder at the same path (NFS, for example): inputs are read from it, and finished
shards written to it as the local executor writes them. So the driver, which is the one command that DVC runs, only
hands out shards and counts. Each slot of the cluster (a share of a GPU, or on CPUs a node) is a Ray actor that opens
the work once and is given blocks of shards, smaller ones towards the end. What a lost node had begun is given to
another; a shard that fails RETRIES times ends the stage.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.engine.devices import pick_devices, use_cores
from stages.engine.errors import PipelineError, one_line
from stages.engine.extraction import Shard, Stage, Work, write_shards
from stages.engine.params import Params
from stages.engine.ray_cluster import Slot, appears, connection, living, plan_slots, sound_nodes

RETRIES = 3  # attempts at one shard, on different nodes where there are some
PATIENCE_SECONDS = 30  # until it is said that all slots are taken


def compute_in_ray(todo: Sequence[Shard], work: Work, stage: Stage, params: Params, gpu: bool) -> Iterator[int]:
    """Yield 0 once the work is open somewhere, then the number of clips of each shard as it is done.

    `gpu`: whether the work can use one; runtime.device says whether it does. Raises PipelineError for no cluster at
    runtime.ray_address, for nodes that can't share the work, and for a shard that fails for good.
    """
    runtime = params.runtime
    with connection(runtime.ray_address) as ray:
        slots = plan_slots(sound_nodes(ray, Path.cwd(), [params.corpus.path]), runtime, gpu)
        _name_main()
        yield from _Run(ray, todo, work, stage, slots[: len(todo)]).results()


# ---------------------------------------------------------------- on a node


class _Actor:
    """The work, open on one slot."""

    def __init__(self, root: str, work: Work, stage: Stage, slot: Slot):
        os.chdir(root)
        self._work, self._stage, self._slot, self._open = work, stage, slot, False

    def compute(self, shards: Sequence[Shard]) -> Iterator[int]:
        """Yield 0 once the work is open, then the number of clips of each shard once it is written."""
        if not self._open:
            device = pick_devices("cuda")[0] if self._slot.gpus else "cpu"  # Ray shows it no GPUs but its own
            use_cores(self._slot.cpus)
            self._work.open(device, self._slot.workers)
            self._open = True
        yield 0
        yield from write_shards(shards, self._work, self._stage)


def _name_main() -> None:
    """Give what the running stage defines its module's name: in a node's processes, __main__ is another."""
    main = sys.modules["__main__"]
    if main.__spec__ is None:
        return
    sys.modules[main.__spec__.name] = main
    for value in vars(main).values():
        if getattr(value, "__module__", None) == "__main__":
            value.__module__ = main.__spec__.name


# ---------------------------------------------------------------- handing out shards


@dataclass
class _Busy:
    """An actor at work on a block of shards; `block` loses each one as it is done."""

    slot: Slot
    actor: Any
    block: deque[Shard] = field(default_factory=deque)
    results: Any = None  # the generator of compute


class _Run:
    def __init__(self, ray: Any, todo: Sequence[Shard], work: Work, stage: Stage, slots: Sequence[Slot]):
        self._ray, self._todo, self._name = ray, deque(todo), stage.name
        self._work, self._stage = ray.put(work), stage
        self._failed: dict[Path, list[str]] = {}  # part -> nodes on which it failed
        self._nodes = {slot.node for slot in slots}  # that live
        self._busy: dict[Any, _Busy] = {}
        self._idle = [self._start(slot) for slot in slots]

    def results(self) -> Iterator[int]:
        began = time.monotonic()
        opened = False
        while self._todo or self._busy:
            self._hand_out()
            ready, _ = self._ray.wait([*self._busy], num_returns=1, timeout=PATIENCE_SECONDS, fetch_local=False)
            if not ready and not opened and time.monotonic() - began > PATIENCE_SECONDS:
                print(f"{self._name}: waiting for room in the Ray cluster; `ray status` shows who has it",
                      file=sys.stderr)
                began = float("inf")
            for results in ready:
                for count in self._collect(self._busy.pop(results)):
                    if count or not opened:
                        yield count
                    opened = True
        for busy in self._idle:
            self._ray.kill(busy.actor)

    def _start(self, slot: Slot) -> _Busy:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self._ray.remote(_Actor).options(
            num_cpus=slot.cpus, num_gpus=slot.gpus, max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node, soft=False),
        ).remote(os.getcwd(), self._work, self._stage, slot)
        return _Busy(slot, actor)

    def _hand_out(self) -> None:
        """Give every idle actor a block. Raises PipelineError if there is none left to give to."""
        idle, self._idle = self._idle, []
        for busy in idle:
            block = self._take(busy.slot.node, len(idle) + len(self._busy))
            if not block:
                self._idle.append(busy)
                continue
            busy.block = deque(block)
            busy.results = busy.actor.compute.options(num_returns="streaming").remote(block)
            self._busy[busy.results] = busy
        if not self._busy:
            raise PipelineError(f"{self._name}: every node of the Ray cluster was lost; finished shards are kept, run "
                                f"it again to go on")

    def _take(self, node: str, actors: int) -> list[Shard]:
        """The next block for an actor on this node: fewer shards the fewer are left; one that has failed goes alone."""
        count = max(1, len(self._todo) // (2 * actors))
        block: list[Shard] = []
        for shard in [*self._todo]:
            failed = self._failed.get(shard[0], [])
            if len(block) == count or (failed and block):
                break
            if node in failed and self._nodes - {*failed}:
                continue  # for another node to try
            block.append(shard)
            self._todo.remove(shard)
            if failed:
                break
        return block

    def _collect(self, busy: _Busy) -> Iterator[int]:
        """Take an actor's next result, and keep it at work, or make good for it."""
        errors = self._ray.exceptions
        try:
            count = self._ray.get(next(busy.results))
        except StopIteration:
            self._idle.append(busy)
            return
        except errors.RayTaskError as error:
            self._ray.kill(busy.actor)  # after an error a device may be good for nothing
            if isinstance(error.cause, PipelineError):
                raise PipelineError(str(error.cause)) from None
            yield from self._lost(busy, _describe(error.cause))
        except errors.RayError as error:
            self._ray.kill(busy.actor)
            yield from self._lost(busy, f"its process was ended from outside ({one_line(error)})")
        else:
            self._busy[busy.results] = busy
            if count:
                part, _ = busy.block.popleft()
                if not appears(part):
                    raise PipelineError(f"{part}: {busy.slot.name} has written it, but it does not appear here; check "
                                        f"that the folder is shared")
            yield count

    def _lost(self, busy: _Busy, why: str) -> Iterator[int]:
        """Put back what was not done. Unless the node is known to be lost, the first shard has failed there, and a new
        actor is tried.
        """
        undone: deque[Shard] = deque()
        for part, chunk in busy.block:
            if part.exists():
                yield len(chunk)
            else:
                undone.append((part, chunk))
        if any(node["NodeID"] == busy.slot.node for node in living(self._ray)):
            if undone:
                self._count_failure(undone[0], busy.slot, why)
            self._idle.append(self._start(busy.slot))
        else:
            self._nodes.discard(busy.slot.node)
            why = "the machine is lost"
        print(f"{self._name}: {busy.slot.name}: {why}; its {len(undone)} shards are given out again", file=sys.stderr)
        self._todo.extendleft(reversed(undone))

    def _count_failure(self, shard: Shard, slot: Slot, why: str) -> None:
        part, chunk = shard
        failed = self._failed.setdefault(part, [])
        failed.append(slot.node)
        if len(failed) >= RETRIES:
            clips = chunk[0].clip_id if len(chunk) == 1 else f"{chunk[0].clip_id} to {chunk[-1].clip_id}"
            raise PipelineError(f"{self._name}: the shard of {clips} failed {RETRIES} times, at last on {slot.name}: "
                                f"{why}; finished shards are kept")


def _describe(error: BaseException) -> str:
    """One line: the notes, which name the clip, then the error."""
    text = f"{type(error).__name__}: {one_line(error)}"
    return ": ".join([*getattr(error, "__notes__", []), text])

