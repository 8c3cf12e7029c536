"""The shard store: what was written is read back, same bytes for same content, damage is found and named."""

from pathlib import Path

import numpy as np
import pytest

from stages.encoders.pooling import pooled_row
from stages.engine.errors import PipelineError
from stages.engine.store import Row, Store, write_index, write_shard


def write(folder: Path, kind: str, shards: list[list[Row]], **attributes: object) -> Store:
    names = [f"shard-{i:05d}.h5" for i in range(len(shards))]
    for i, (name, rows) in enumerate(zip(names, shards, strict=True)):
        write_shard(folder / name, kind, rows, {"fingerprint": f"f{i}", **attributes})
    write_index(folder, names)
    return Store(folder)


def features(rng: np.random.Generator, name: str, length: int, **kwargs: bool) -> Row:
    options = {"keep_frames": True, "variance": True} | kwargs
    return pooled_row(name, rng.standard_normal((length, 5)).astype(np.float32), **options)


def test_audio_round_trip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    waveforms = {f"片段{i}": rng.integers(-32768, 32767, 1000 * i + 1).astype(np.int16) for i in range(4)}
    rows = [Row(name, values=samples) for name, samples in waveforms.items()] + [Row("z", reason="无音频 no audio")]
    store = write(tmp_path / "audio", "audio", [rows[:2], rows[2:]], sample_rate=24000)
    assert store.clip_ids == [*waveforms, "z"]
    assert store.present.tolist() == [True] * 4 + [False]
    assert store.reasons == [""] * 4 + ["无音频 no audio"]
    assert store.attrs["sample_rate"] == 24000
    for name, samples in waveforms.items():
        assert store.read(name).dtype == np.int16
        np.testing.assert_array_equal(store.read(name), samples)
    assert len(store.read("z")) == 0
    assert "z" in store and "y" not in store


def test_images_and_text_round_trip(tmp_path: Path) -> None:
    rows = [
        Row("a", values=[b"first", b"", b"third image"], items={"frame": [0, 5, 10]}),
        Row("b", reason="no video stream"),
        Row("c", values=[b"x"], items={"frame": [7]}, reason="partly"),
    ]
    store = write(tmp_path / "frames", "images", [rows])
    assert [store.read(c) for c in "abc"] == [[b"first", b"", b"third image"], [], [b"x"]]
    assert store.read_items("c", "frame").tolist() == [7]
    assert store.present.tolist() == [True, False, True]
    text = write(tmp_path / "text", "text", [[Row("a", values="你好"), Row("b"), Row("c", values="")]])
    assert [text.read(c) for c in "abc"] == ["你好", "", ""]
    assert text.present.tolist() == [True, False, True]


def test_features_pool_over_time_in_double_precision(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sequence = (1e4 + rng.standard_normal((3000, 5))).astype(np.float32)
    rows = [pooled_row("a", sequence, True, True), Row("b", reason="x"), pooled_row("c", sequence[:1], True, True)]
    store = write(tmp_path / "f", "features", [rows], dimension=5, variance=True)
    np.testing.assert_allclose(store.mean[0], sequence.astype(np.float64).mean(0), rtol=1e-6)
    assert store.var is not None
    np.testing.assert_allclose(store.var[0], sequence.astype(np.float64).var(0), rtol=1e-6)
    assert (store.mean[1] == 0).all() and (store.var[2] == 0).all()
    np.testing.assert_array_equal(store.read("a"), sequence)
    rows = [pooled_row("a", sequence, keep_frames=False, variance=False)]
    pooled = write(tmp_path / "g", "features", [rows], dimension=5, variance=False)
    assert pooled.var is None
    with pytest.raises(PipelineError, match="keep_frames"):
        pooled.read("a")


def test_same_content_same_bytes_and_digests_follow_content(tmp_path: Path) -> None:
    def store(name: str, seed: int) -> Store:
        rng = np.random.default_rng(seed)
        rows = [features(rng, f"c{i}", i + 1) for i in range(6)]
        return write(tmp_path / name, "features", [rows], dimension=5, variance=True)

    one, two, other = store("one", 0), store("two", 0), store("other", 1)
    assert (one.folder / "shard-00000.h5").read_bytes() == (two.folder / "shard-00000.h5").read_bytes()
    assert one.digest == two.digest != other.digest
    assert len(set(one.digests)) == 6


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="int16"):
        write_shard(tmp_path / "s.h5", "audio", [Row("a", values=np.zeros(3, np.float32))], {"fingerprint": "x"})
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_in_the_values_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    samples = rng.integers(-32768, 32767, 50_000).astype(np.int16)
    store = write(tmp_path / "audio", "audio", [[Row("a", values=samples)]])
    path = store.folder / "shard-00000.h5"
    good = path.read_bytes()
    start = good.index(samples.tobytes()[:64])
    for offset in (start, start + 12_345, start + 99_999):
        damaged = bytearray(good)
        damaged[offset] ^= 0x10
        path.write_bytes(bytes(damaged))
        with pytest.raises(PipelineError, match=r"shard-00000\.h5: damaged .*dvc repro"):
            Store(store.folder).read("a")
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(PipelineError, match=r"shard-00000\.h5: damaged"):
        Store(store.folder)


def test_missing_and_foreign_shards_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    shards = [[features(rng, f"c{i}", 2)] for i in range(3)]
    store = write(tmp_path / "f", "features", shards, dimension=5, variance=True)
    last = store.folder / "shard-00002.h5"
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(PipelineError, match=r"shard-00002\.h5: missing"):
        Store(store.folder)
    last.write_bytes((store.folder / "shard-00001.h5").read_bytes())
    with pytest.raises(PipelineError, match=r"shard-00002\.h5: not this store's"):
        Store(store.folder)
    last.write_bytes(content)
    assert len(Store(store.folder)) == 3
    with pytest.raises(PipelineError, match="no shards"):
        Store(tmp_path / "nowhere")
