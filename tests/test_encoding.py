"""Encoders in the engine: batched, cut, split over devices or short of memory, the features are the same."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from engine import ROOT, contents, inputs, small_shards, target

from stages.encoders.pooling import encoded_row
from stages.engine import encoding
from stages.engine.devices import CPU_BATCH_BYTES
from stages.engine.encoding import Ahead, Encode, batches, runs
from stages.engine.errors import PipelineError, Skip, run_stage
from stages.engine.extraction import write_store
from stages.engine.params import Params
from stages.engine.store import Store
from stages.engine.work import Input, Shard

UNITS = 20  # of the stand-in's that fit into a batch
PREPARED = 1 << 20  # bytes of a clip of the memory test


@pytest.fixture
def p(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    monkeypatch.chdir(tmp_path)
    return small_shards(tmp_path)


class Doubler:
    """A stand-in encoder: clip i has i + 1 units of the value i; the features are it and its double."""

    dimension, variance = 2, True
    unit_bytes = CPU_BATCH_BYTES // UNITS
    concurrent = False

    def __init__(self, padded: bool = True, device_units: int = 1 << 30):
        self.padded, self.device_units = padded, device_units
        self.passes: list[int] = []

    def prepare(self, item: int) -> np.ndarray:
        if item == 4:
            raise Skip("no words")
        if item == 99:
            raise PipelineError("data/audio: damaged")
        return np.full(item + 1, item, np.float32)

    def size(self, prepared: np.ndarray) -> int:
        return len(prepared)

    def encode(self, batch: list[np.ndarray]) -> list[np.ndarray]:
        units = len(batch) * max(map(len, batch)) if self.padded else sum(map(len, batch))
        assert units <= UNITS or len(batch) == 1
        if units > self.device_units:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.passes.append(units)
        return [np.where(v == 7, np.nan, v) for v in (np.stack([b, b * 2], axis=1) for b in batch)]


def make_doubler(device: str) -> Doubler:
    return Doubler()


def make_cutter(device: str) -> Doubler:
    return Doubler(padded=False)


def read(item: int) -> int:
    return item


def encode(p: Params, make: object = make_doubler, keep_frames: bool = True) -> Encode:
    return Encode(make, read, partial(encoded_row, keep_frames=keep_frames), p.runtime)  # type: ignore


def test_order_is_kept_skips_are_recorded_and_nan_is_refused(p: Params) -> None:
    clips = inputs(20)
    clips[2] = Input("c02", None, b"", absent=True)
    write_store(target(kind="features"), clips, encode(p), p, ["cpu"])
    store = Store("out/some_stage")
    assert store.clip_ids == [clip.clip_id for clip in clips]
    assert store.present.tolist() == [i not in (2, 4, 7) for i in range(20)]
    assert (store.reasons[2], store.reasons[4]) == ("", "no words")
    assert "non-finite" in store.reasons[7]
    assert store.mean[9].tolist() == [9, 18]
    assert store.var is not None and store.var.max() == 0


class Greedy(Doubler):
    """Asks the system for more memory than it can give."""

    def encode(self, batch: list[np.ndarray]) -> list[np.ndarray]:
        return [torch.empty(1 << 50, dtype=torch.uint8).numpy() for _ in batch]


def make_greedy(device: str) -> Greedy:
    return Greedy()


def test_a_cpu_without_memory_is_one_line(p: Params, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        run_stage(write_store, target(kind="features"), inputs(12), encode(p, make_greedy), p, ["cpu"])
    said = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: a batch of \d clips, c\d\d first: no memory left; free some, .*is kept\)", said)


@pytest.mark.parametrize("make", [make_doubler, make_cutter])
def test_several_devices_give_the_same_bytes_as_one(p: Params, tmp_path: Path, make: object) -> None:
    write_store(target(kind="features"), inputs(40), encode(p, make), p, ["cpu"])
    one = contents(Path("out/some_stage"))
    other = tmp_path / "other"
    other.mkdir()
    os.chdir(other)
    write_store(target(kind="features"), inputs(40), encode(p, make), p, ["cpu", "cpu"])
    assert contents(Path("out/some_stage")) == one
    assert Store("out/some_stage").read("c39").tolist() == [[39, 78]] * 40


def test_an_error_in_a_device_process_stops_the_others_and_is_one_line(p: Params) -> None:
    clips = inputs(60)
    clips[1] = Input("c01", 99, b"")
    with pytest.raises(PipelineError, match=r"^data/audio: damaged$"):
        write_store(target(kind="features"), clips, encode(p), p, ["cpu", "cpu"])


def die(item: int) -> int:
    os._exit(1)


def test_a_device_process_that_dies_is_said(p: Params) -> None:
    work = Encode(make_doubler, die, partial(encoded_row, keep_frames=False), p.runtime)
    with pytest.raises(PipelineError, match="ended from outside"):
        write_store(target(kind="features"), inputs(8), work, p, ["cpu", "cpu"])


@pytest.mark.parametrize("padded", [True, False])
def test_a_device_that_runs_out_of_memory_gets_smaller_batches(p: Params, padded: bool) -> None:
    clips = [clip for clip in inputs(9) if clip.item not in (4, 7)]
    small = Doubler(padded, device_units=9)
    write_store(target(kind="features"), clips, encode(p, lambda _: small), p, ["cpu"])
    assert max(small.passes) <= 9
    large = Doubler(padded)
    write_store(target("other", kind="features"), clips, encode(p, lambda _: large), p, ["cpu"])
    assert max(large.passes) > 9
    ours, theirs = Store("out/some_stage"), Store("out/other")
    assert all(np.array_equal(ours.read(clip.clip_id), theirs.read(clip.clip_id)) for clip in clips)


@pytest.mark.parametrize(("padded", "units"), [(True, 3), (False, 0)])
def test_a_clip_that_never_fits_is_one_line(p: Params, padded: bool, units: int) -> None:
    with pytest.raises(PipelineError, match=r"^clip c0[0-3]: .* memory .* \d+ samples, tokens or images"):
        write_store(target(kind="features"), inputs(4), encode(p, lambda _: Doubler(padded, units)), p, ["cpu"])


def test_batches_fit_the_budget_and_lose_nothing() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 1000, 200).tolist()
    found = list(batches(sizes, lambda s: s, unit_bytes=3, budget=6000))
    assert sorted(s for batch in found for s in batch) == sorted(sizes)
    assert all(len(batch) * max(batch) * 3 <= 6000 or len(batch) == 1 for batch in found)
    assert max(found[0]) == max(sizes)


def test_runs_fill_every_batch_but_the_last() -> None:
    arrays = [np.arange(n) + 100 * i for i, n in enumerate([5, 1, 12, 3])]
    found = list(runs(arrays, 4))
    assert [sum(len(piece) for _, piece in batch) for batch in found] == [4, 4, 4, 4, 4, 1]
    for i, array in enumerate(arrays):
        assert np.concatenate([piece for batch in found for j, piece in batch if j == i]).tolist() == array.tolist()


def test_decoding_goes_on_while_the_device_computes_but_not_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "AHEAD_BYTES", 10 * 80)
    started = []

    def prepare(clip: Input) -> np.ndarray:
        started.append(clip.item)
        return np.zeros(10)  # 80 bytes

    clips = inputs(100)
    first, second = Shard(Path("first"), clips[:3]), Shard(Path("second"), clips[3:])
    with Ahead(prepare, [first, second], threads=2) as ahead:
        shards = iter(ahead)
        assert next(shards) is first
        wait_until(lambda: len(started) >= 10)
        time.sleep(0.1)  # time for a thread to exceed the limit, if none stopped it
        assert 10 <= len(started) <= 14  # the second shard's clips too; what runs while the limit is met may finish
        for _ in range(3):
            ahead.take()
        wait_until(lambda: len(started) >= 13)
        assert next(shards) is second
        for _ in clips[3:]:
            ahead.take()
    assert sorted(started) == list(range(100))


def test_what_breaks_the_stream_of_shards_is_raised() -> None:
    def shards() -> Iterator[Shard]:
        yield Shard(Path("first"), inputs(1))
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), Ahead(lambda clip: np.zeros(1), shards(), threads=1) as ahead:
        for shard in ahead:
            for _ in shard.clips:
                ahead.take()


def test_no_thread_is_left_behind(p: Params) -> None:
    before = threading.active_count()
    clips = inputs(60)
    clips[5] = Input("c05", 99, b"")
    with pytest.raises(PipelineError, match="damaged"):
        write_store(target(kind="features"), clips, encode(p), p, ["cpu"])
    assert threading.active_count() == before


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Large(Doubler):
    def prepare(self, item: int) -> np.ndarray:
        return np.full((PREPARED // 4, 1), item, np.float32)

    def encode(self, batch: list[np.ndarray]) -> list[np.ndarray]:
        return [b[:1].repeat(2, axis=1) for b in batch]


def make_large(device: str) -> Large:
    return Large()


def extract_and_print_peaks() -> None:
    """For a process of its own: the peak of its memory in MB so far, after each extraction."""
    import resource

    p = small_shards(Path.cwd())
    for count, shard_size in ((100, 64), (1000, 64), (1000, 1000)):  # 100 MB and 1 GB of prepared input
        p = p.model_copy(update={"corpus": p.corpus.model_copy(update={"shard_size": shard_size})})
        clips = [Input(f"c{i}", i, i.to_bytes(16, "little")) for i in range(count)]
        write_store(target(kind="features"), clips, encode(p, make_large, keep_frames=False), p, ["cpu"])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def test_memory_grows_neither_with_the_corpus_nor_with_the_shards(tmp_path: Path) -> None:
    code = "import test_encoding as t; t.extract_and_print_peaks()"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    few, *many = map(int, done.stdout.split())
    assert max(many) - few < 300
