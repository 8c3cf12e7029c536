"""Work side by side on a CPU's cores: the same results as one after another, and threads that end when one fails."""

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_baichuan import SENTENCES
from test_baichuan import _text_model as make_text_model

from stages.corpora.demo.checkpoints import make_baichuan, make_hubert
from stages.corpora.demo.clip_checkpoint import make_clip
from stages.corpora.demo.text import sentences
from stages.encoders import baichuan, clip, hubert
from stages.encoders.pooling import encoded_row
from stages.engine import encoding
from stages.engine.devices import lanes
from stages.engine.encoding import Encode
from stages.engine.params import Runtime
from stages.engine.store import Row
from stages.engine.work import Input

RUNTIME = Runtime(device="cpu", workers=2, executor="local", ray_address="auto", ray_gpus_per_task=1,
                  batch_memory_mb="auto", gradient_checkpointing=False, clip_timeout_seconds=60, keep_parts=False)


def test_torchs_threads_are_shared_out_and_given_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        with lanes(3) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
        with pytest.raises(ZeroDivisionError), lanes(12) as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
            pool.submit(divmod, 1, 0).result()
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- encoders


def make_encoder(name: str, folder: Path) -> Any:
    if name == "hubert":
        make_hubert(folder, 1)
        return hubert.Encoder(hubert.Config(str(folder), None, "float32", [-2, -1], True, 30), "cpu")
    if name == "clip":
        make_clip(folder, 1)
        return clip.Encoder(clip.Config(str(folder), None, "float32"), "cpu")
    make_baichuan(folder, 1, sentences())
    return baichuan.Encoder(baichuan.Config(str(folder), None, "float32", [-2, -1], 512), "cpu")


def clips_of(name: str, encoder: Any) -> list[Any]:
    """What `prepare` would give for clips of many lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 24)
    if name == "hubert":
        return [rng.standard_normal(400 + 320 * n).astype(np.float32) for n in lengths]
    if name == "clip":
        return [rng.integers(0, 256, (n, *encoder._images.size, 3), np.uint8) for n in lengths]
    return [np.stack([rng.integers(3, 100, n), np.ones(n, np.int64)]) for n in lengths]


class Prepared:
    """An encoder whose clips are prepared already, and which notes the threads that call it."""

    def __init__(self, encoder: Any, prepared: list[np.ndarray]):
        self.dimension, self.unit_bytes, self.padded = encoder.dimension, encoder.unit_bytes, encoder.padded
        self.size, self.concurrent, self.variance = encoder.size, encoder.concurrent, encoder.variance
        self._encoder, self._prepared = encoder, prepared
        self.threads: set[int] = set()
        self.together = threading.Barrier(2, timeout=30)  # the first two calls wait for each other: both must run
        self.calls = 0

    def prepare(self, item: int) -> np.ndarray:
        return self._prepared[item]

    def encode(self, batch: list[np.ndarray]) -> Any:
        self.threads.add(threading.get_ident())
        self.calls += 1
        if self.calls <= 2 and not self.together.broken:
            self.together.wait()
        return self._encoder.encode(batch)


def rows_of(encoder: Prepared, **runtime: Any) -> list[Row]:
    changed = RUNTIME.model_copy(update=runtime)
    work = Encode(lambda _: encoder, int, partial(encoded_row, keep_frames=True), changed)
    work.open("cpu")
    rows = work.rows([Input(f"c{i}", i, b"") for i in range(len(encoder._prepared))])
    work.close()
    return rows


@pytest.mark.parametrize("name", ["hubert", "clip", "baichuan"])
def test_batches_side_by_side_equal_one_after_another(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder(name, tmp_path / name)
    monkeypatch.setattr(encoding, "cores", lambda: 3)
    beside = Prepared(encoder, clips_of(name, encoder))
    several = rows_of(beside)
    assert len(beside.threads) > 1
    monkeypatch.setattr(encoding, "cores", lambda: 1)
    single = Prepared(encoder, clips_of(name, encoder))
    single.together.abort()
    one = rows_of(single)
    assert single.threads == {threading.get_ident()}
    assert_same(several, one)


def assert_same(several: list[Row], one: list[Row]) -> None:
    for ours, theirs in zip(several, one, strict=True):
        assert ours.clip_id == theirs.clip_id and ours.values.shape == theirs.values.shape
        assert np.array_equal(ours.values, theirs.values)  # not only near: machines may differ in cores, bytes may not


@pytest.mark.parametrize("name", ["clip", "baichuan"])
def test_on_a_cpu_memory_decides_what_runs_side_by_side_and_no_byte(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """runtime.batch_memory_mb: a clip's features depend in their last digits on which clips share its batch."""
    monkeypatch.setattr(encoding, "cores", lambda: 3)
    encoder = make_encoder(name, tmp_path / name)
    encoder.unit_bytes = 1 << 20  # as of a larger network: were batch_memory_mb the budget, each clip would be alone
    single, beside = (Prepared(encoder, clips_of(name, encoder)) for _ in range(2))
    single.together.abort()
    one, several = rows_of(single, batch_memory_mb=1), rows_of(beside, batch_memory_mb="auto")
    assert single.threads == {threading.get_ident()} and len(beside.threads) > 1
    assert_same(several, one)


def test_no_more_lanes_than_memory_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder("clip", tmp_path / "clip")
    monkeypatch.setattr(encoding, "cores", lambda: 8)
    monkeypatch.setattr(encoding, "lane_bytes", lambda _: 1)
    crowded = Prepared(encoder, clips_of("clip", encoder))
    crowded.together.abort()
    rows_of(crowded)
    assert crowded.threads == {threading.get_ident()}


class Texts:
    """Stands in for an encoder of texts, of a byte a token; nothing is computed."""

    dimension, unit_bytes, padded, concurrent = 1, 1, True, True
    prepare = encode = None

    def size(self, prepared: np.ndarray) -> int:
        return len(prepared)


@pytest.mark.parametrize(("room", "count"), [(9, 1), (35, 1), (36, 2), (1000, 3)])
def test_padding_takes_memory_too(room: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "cores", lambda: 3)
    monkeypatch.setattr(encoding, "lane_bytes", lambda _: room)
    texts: Any = Texts()
    work = Encode(lambda _: texts, str, partial(encoded_row, keep_frames=False), RUNTIME)
    work.open("cpu")
    batch = [(0, np.zeros(9)), (1, np.zeros(1))]
    assert work._lane_count([batch] * 3) == count  # 18 tokens a batch, 10 of them real


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_models_of_transformers_keep_threads_apart(kind: str, tmp_path: Path) -> None:
    """They collect the hidden states of a pass; before transformers 5.2 passes at once got each other's."""
    make_text_model(tmp_path, kind)
    config = baichuan.Config(str(tmp_path), None, "float32", [-2, -1], 512)
    one, several = (baichuan.Encoder(config, "cpu") for _ in range(2))
    prepared = [one.prepare(text * repeat) for text in SENTENCES for repeat in range(1, 6)]
    expected = [one.encode([tokens])[0] for tokens in prepared]
    with lanes(4) as pool:
        found = list(pool.map(lambda tokens: several.encode([tokens])[0], prepared))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
