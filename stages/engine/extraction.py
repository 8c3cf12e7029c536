"""The extraction engine: plan shards, skip the done ones, compute the others, put the store together.

A stage hands over its clips (with a digest of each clip's input) and a Work that turns clips into rows. Finished shards
lie in .cache/parts/<stage>/<fingerprint>/. So a run that is killed loses the shards in progress, going back to an old
parameter finds the old shards, and a stale shard can't be picked up: the fingerprint covers the stage's tracked params,
the bytes of its declared code and its checkpoint, the file name the clips' inputs.

There are two kinds of Work: per_clip.py (media: one function per clip in worker processes that may crash or hang) and
encoding.py (an encoder on one device). Executors: this process, a process for each of several devices (executors.py),
or the nodes of a Ray cluster (ray_executor.py). Where RANK and WORLD_SIZE are set, a Slurm array say, a process
computes its share of the shards only.
"""

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from stages.engine.errors import LACKING, PipelineError
from stages.engine.executors import compute
from stages.engine.files import empty_folder, replacing, write_rows
from stages.engine.fingerprint import PARTS
from stages.engine.params import Params
from stages.engine.store import Head, HeadRow, read_head, write_empty, write_index
from stages.engine.work import Input, Shard, Target, Work, part_fingerprint, plan

REASONS_SHOWN = 10
LEFT_BEHIND_SECONDS = 3600
MIXED = ("device", "versions")  # attributes that should be the same in all shards of a store


def write_store(
    target: Target, inputs: Sequence[Input], work: Work, params: Params, devices: Sequence[str], **origin: str
) -> bool:
    """Write the target's store, resuming from finished shards; origin: as write_index takes it. Where every clip lacks
    what it is made from, the store is empty.

    Returns whether the store is there: a rank of several computes its share of the shards only.
    Raises PipelineError if more than corpus.max_bad_fraction of the clips came out absent here. Clips that were already
    absent upstream do not count, nor those that lack a stream, a file or words by nature.
    """
    if not any(clip.item and not clip.absent for clip in inputs):
        leave_empty(target.stage, target.out, "no clip has what it is made from")
        return True
    shards = plan(target, inputs, params.corpus.shard_size)
    _sweep(PARTS / target.stage / target.fingerprint)
    heads = {shard.part: head for shard in shards if (head := _head_if_done(shard, target)) is not None}
    todo = [shard for shard in shards if shard.part not in heads]
    rank, ranks = _rank()
    share = [shard for shard in shards[rank::ranks] if shard.part not in heads]  # the same whatever is done already
    finished = compute(share, work, target, params, devices)
    next(finished, None)  # errors in opening the work are reported before the progress bar starts
    done = len(inputs) - sum(len(shard.clips) for shard in todo)
    with tqdm(total=len(inputs), initial=done, desc=target.stage, unit="clip", mininterval=1, disable=not share) as bar:
        for shard in finished:
            bar.update(len(shard.clips))
    if ranks > 1:  # ranks that end together must not put the store together at once
        print(f"{target.stage}: rank {rank} of {ranks}: its {len(share)} shards are done; once all ranks are, run dvc "
              f"repro without RANK")
        return False
    heads |= {shard.part: read_head(shard.part, part_fingerprint(target.fingerprint, shard.part)) for shard in todo}
    in_order = [heads[shard.part] for shard in shards]
    if lacking := _lacking(target, inputs, in_order, params.corpus.max_bad_fraction):
        leave_empty(target.stage, target.out, lacking)
        return True
    _warn_of_mixture(target, in_order)
    names = [f"shard-{i:05d}.h5" for i in range(len(shards))]
    _assemble(target.out, dict(zip(names, (shard.part for shard in shards), strict=True)))
    write_index(target.out, names, in_order, **origin)
    if not params.runtime.keep_parts and shards:
        shutil.rmtree(shards[0].part.parent)
    return True


def leave_empty(stage: str, out: Path, reason: str) -> None:
    """An empty store, and the line that says why."""
    write_empty(out, reason)
    print(f"{stage}: {out} stays empty: {reason}")


def _sweep(folder: Path) -> None:
    """Remove the half-written files of kills; young ones may be another rank's or node's, at work."""
    for path in folder.glob(".*.tmp"):
        if time.time() - path.stat().st_mtime > LEFT_BEHIND_SECONDS:
            path.unlink(missing_ok=True)


def _rank() -> tuple[int, int]:
    """This process's number and how many share the work, as torchrun and others set them. Raises PipelineError."""
    given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(text.isdecimal() for text in given) or int(given[0]) >= int(given[1]):
        raise PipelineError(f"RANK, WORLD_SIZE: found {given[0]!r}, {given[1]!r}, expected a number from 0 on and a "
                            f"larger one")
    return int(given[0]), int(given[1])


def _head_if_done(shard: Shard, target: Target) -> Head | None:
    """What the part says of its clips, or None where it does not exist or has to be made again.

    Only its head is read: of 120,000 clips the parts are tens of gigabytes. Damage further in is found by whoever reads
    the store, and `mer repair` removes such parts.
    """
    if not shard.part.exists():
        return None
    try:
        return read_head(shard.part, part_fingerprint(target.fingerprint, shard.part))
    except PipelineError as error:
        print(f"{target.stage}: {error}; it is made again", file=sys.stderr)
        return None


def _lacking(target: Target, inputs: Sequence[Input], heads: Sequence[Head], limit: float) -> str:
    """What all clips lack by nature, "" where some clip has it. Raises PipelineError where too many can't be used."""
    known = {clip.clip_id for clip in inputs if clip.absent}
    rows = [row for head in heads for row in head.rows if row.clip_id not in known]
    lacking = Counter(row.reason for row in rows if row.reason in LACKING)
    expected = [row for row in rows if row.reason not in LACKING]
    shown = ", ".join(f"{count} have {reason}" for reason, count in sorted(lacking.items()))
    if rows and not expected:
        return f"of {len(rows)} clips {shown}"
    if lacking:
        print(f"{target.stage}: of {len(rows)} clips {shown}")
    _check_bad_fraction(target, [row for row in expected if not row.present], len(expected), limit)
    return ""


def _check_bad_fraction(target: Target, bad: Sequence[HeadRow], count: int, limit: float) -> None:
    again = [row for row in bad if row.died]
    hint = (f"; `mer repair --retry {target.out}` lets {len(again)} of them whose decoder died or took too long be "
            f"tried again") if again else ""
    if len(bad) <= limit * count:
        if again:
            print(f"{target.stage}: {len(bad)} clips can't be used{hint}", file=sys.stderr)
        return
    listing = Path(".cache") / f"skipped-{target.stage}.csv"
    write_rows(listing, ["clip_id", "reason"], [(row.clip_id, row.reason) for row in bad])
    shown = "; ".join(f"{row.clip_id}: {row.reason}" for row in bad[:REASONS_SHOWN])
    raise PipelineError(
        f"{target.stage}: {len(bad)} of {count} clips can't be used, more than corpus.max_bad_fraction "
        f"= {limit} allows; all in {listing}{hint}; {shown}{' ...' if len(bad) > REASONS_SHOWN else ''}"
    )


def _warn_of_mixture(target: Target, heads: Sequence[Head]) -> None:
    """Say so where the shards were made by different devices or versions of packages."""
    for name in MIXED:
        found = Counter(str(head.attributes.get(name, "unknown")) for head in heads)
        if len(found) > 1:
            shown = "; ".join(f"{count} shards: {value}" for value, count in found.most_common())
            print(f"warning: {target.out}: its shards were made with different {name}, so that clips may differ in "
                  f"their last digits: {shown}. To make them alike: rm -r {PARTS / target.stage / target.fingerprint}, "
                  f"then dvc repro -f -s {target.stage}", file=sys.stderr)


def _assemble(out: Path, parts: Mapping[str, Path]) -> None:
    """Link (or, across file systems, copy) the parts into the out folder; nothing is ever written through a link."""
    empty_folder(out)
    for name, part in parts.items():
        try:
            os.link(part, out / name)
        except OSError:
            with open(part, "rb") as source, replacing(out / name, "wb") as copy:
                shutil.copyfileobj(source, copy)
