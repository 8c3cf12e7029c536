"""Speech recognition with miniature Whisper and CTC checkpoints, and the stage transcribe around it."""

import csv
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages import transcribe
from stages.encoders.asr import Config, Recognizer
from stages.engine.encoding import Encode
from stages.engine.errors import PipelineError, Skip
from stages.engine.manifest import Clip, write_manifest
from stages.engine.params import load
from stages.engine.store import Row, write_index, write_shard
from stages.engine.work import Shard

ROOT = Path(__file__).parents[1]
RATE = 24_000
CHARACTERS = list("我你他不好开心难过生气怎么来了是")


def speech(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """int16 (n,): a wandering tone with noise, so that a random network's output varies."""
    noise = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = 200 + 150 * np.sin(2 * np.pi * (0.7 + 0.3 * seed) * time)
    wave = np.sin(2 * np.pi * np.cumsum(pitch) / rate) + 0.3 * noise.standard_normal(len(time))
    return (wave * 6000).astype(np.int16)


def randomize(model: torch.nn.Module, scale: float) -> None:
    """Every weight drawn anew, by a seed for which the CTC models' tokens come near no tie (a gap of 0.004 and more in
    the logits); biases zero, since transformers draws some from the global generator.
    """
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, scale, generator=generator)
        elif name.endswith("bias"):
            parameter.data.zero_()


def make_ctc(folder: Path, norm: str, family: str = "wav2vec2", mask: bool = True) -> Path:
    from transformers import (
        HubertConfig,
        HubertForCTC,
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
    )

    folder.mkdir()
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *CHARACTERS])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=mask, do_normalize=True).save_pretrained(folder)
    options: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": [16] * 7,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": norm,
        "do_stable_layer_norm": norm == "layer",
        "conv_bias": norm == "layer",
    }
    model = HubertForCTC(HubertConfig(**options)) if family == "hubert" else Wav2Vec2ForCTC(Wav2Vec2Config(**options))
    randomize(model, 0.3 if norm == "layer" else 0.1)
    model.save_pretrained(folder)
    return folder


def make_whisper(folder: Path, timestamps: int = 0) -> Path:
    """With tokens for so many moments, 0.02 s apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|translate|>", "<|transcribe|>"]
    special += ["<|notimestamps|>", *(f"<|{0.02 * i:.2f}|>" for i in range(timestamps))]
    plain = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(plain + special)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    end = vocabulary["<|endoftext|>"]
    published = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0])
    published.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=2).save_pretrained(folder)
    config = WhisperConfig(
        vocab_size=len(vocabulary),
        num_mel_bins=16,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=100,
        max_target_positions=32,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=vocabulary["<|startoftranscript|>"],
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    model = WhisperForConditionalGeneration(config)
    randomize(model, 0.6)
    model.generation_config = GenerationConfig(
        max_length=14,
        decoder_start_token_id=vocabulary["<|startoftranscript|>"],
        eos_token_id=end,
        pad_token_id=end,
        is_multilingual=True,
        lang_to_id={"<|en|>": vocabulary["<|en|>"], "<|zh|>": vocabulary["<|zh|>"]},
        task_to_id={"translate": vocabulary["<|translate|>"], "transcribe": vocabulary["<|transcribe|>"]},
        no_timestamps_token_id=vocabulary["<|notimestamps|>"],
        suppress_tokens=[i for token, i in vocabulary.items() if not ("a" <= token <= "z" or "." in token)],
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Miniature models: several threads only slow each other down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("asr")
    return {
        "wav2vec2": make_ctc(root / "wav2vec2", "layer"),
        "wav2vec2, group norm": make_ctc(root / "wav2vec2_group", "group", mask=False),
        "wav2vec2, group norm with a mask": make_ctc(root / "wav2vec2_group_mask", "group"),
        "hubert": make_ctc(root / "hubert", "layer", "hubert"),
        "whisper": make_whisper(root / "whisper"),
    }


def recognizer(folder: Path, language: str | None = "zh", dtype: Any = "float32") -> Recognizer:
    return Recognizer(Config(checkpoint=str(folder), revision=None, language=language, dtype=dtype), "cpu")


FAMILIES = ["wav2vec2", "wav2vec2, group norm", "wav2vec2, group norm with a mask", "hubert", "whisper"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_its_clips_give_alone(checkpoints: dict[str, Path], family: str) -> None:
    asr = recognizer(checkpoints[family])
    clips = [asr.prepare((speech(seconds, i), RATE)) for i, seconds in enumerate([1.3, 0.4, 1.9, 0.7])]
    alone = [asr.encode([clip])[0] for clip in clips]
    assert asr.encode(clips) == alone
    assert len(set(alone)) > 1 and all(alone)
    assert recognizer(checkpoints[family]).encode(clips) == alone
    assert all(asr.size(clip) >= len(clip) for clip in clips) and asr.unit_bytes > 0


def test_ctc_agrees_with_transformers(checkpoints: dict[str, Path]) -> None:
    from transformers import AutoModelForCTC, Wav2Vec2Processor

    asr = recognizer(checkpoints["wav2vec2"])
    waveform = asr.prepare((speech(1.5, rate=16_000), 16_000))
    processor = Wav2Vec2Processor.from_pretrained(checkpoints["wav2vec2"])
    model = AutoModelForCTC.from_pretrained(checkpoints["wav2vec2"]).eval()
    with torch.inference_mode():
        logits = model(**processor(waveform, sampling_rate=16_000, return_tensors="pt")).logits
    (text,) = processor.batch_decode(logits.argmax(-1))
    assert asr.encode([waveform]) == [re.sub("<unk>|</?s>", "", text)]


def test_whisper_agrees_with_transformers(checkpoints: dict[str, Path]) -> None:
    from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

    folder = checkpoints["whisper"]
    asr = recognizer(folder)
    waveform = asr.prepare((speech(1.5, rate=16_000), 16_000))
    features = AutoFeatureExtractor.from_pretrained(folder)(waveform, sampling_rate=16_000, return_tensors="pt")
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    tokens = model.generate(**features, language="zh", task="transcribe", num_beams=1)
    text = AutoTokenizer.from_pretrained(folder).decode(tokens[0], skip_special_tokens=True)
    assert asr.encode([waveform]) == [text]


def test_whisper_is_told_the_language(checkpoints: dict[str, Path]) -> None:
    waveform = recognizer(checkpoints["whisper"]).prepare((speech(1.5), RATE))
    texts = {recognizer(checkpoints["whisper"], language).encode([waveform])[0] for language in ("zh", "en")}
    assert len(texts) == 2
    with pytest.raises(PipelineError, match="transcribe.language: found 'xx', expected one of en, zh"):
        recognizer(checkpoints["whisper"], "xx")
    assert recognizer(checkpoints["hubert"], "xx")  # CTC checkpoints take none


def test_audio_is_resampled(checkpoints: dict[str, Path]) -> None:
    asr = recognizer(checkpoints["hubert"])
    tone = (np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE) * 20_000).astype(np.int16)
    waveform = asr.prepare((tone, RATE))
    assert waveform.dtype == np.float32 and len(waveform) == 16_000
    assert np.abs(np.fft.rfft(waveform)).argmax() == 440
    for samples in (np.zeros(0, np.int16), np.zeros(2000, np.int16)):
        with pytest.raises(Skip, match=f"{len(samples)} samples"):
            asr.prepare((samples, RATE))


def test_long_audio_is_cut_at_the_quietest_moments(checkpoints: dict[str, Path]) -> None:
    asr = recognizer(checkpoints["hubert"])
    waveform = asr.prepare((speech(70), RATE))
    pauses = [int(27.0 * 16_000), int((27.0 + 28.5) * 16_000)]
    for pause in pauses:
        waveform[pause - 2_400 : pause + 2_400] *= 0.001
    pieces = list(asr.windows(waveform))
    assert np.concatenate(pieces).tobytes() == waveform.tobytes()
    assert all(len(piece) <= 30 * 16_000 for piece in pieces) and len(pieces) == 3
    assert np.cumsum([len(piece) for piece in pieces])[:2] == pytest.approx(pauses, abs=1_700)


@pytest.mark.parametrize("family", ["wav2vec2", "whisper"])
def test_a_long_clip_is_the_sum_of_its_windows(checkpoints: dict[str, Path], family: str) -> None:
    asr = recognizer(checkpoints[family])
    short = asr.prepare((speech(0.8, 1), RATE))
    long = asr.prepare((speech(31.0 if family == "wav2vec2" else 5.0), RATE))
    pieces = list(asr.windows(long))
    assert len(pieces) == (2 if family == "wav2vec2" else 3)
    expected = " ".join(asr.encode([piece])[0] for piece in pieces)
    assert asr.encode([long, short]) == [expected, asr.encode([short])[0]]


def test_half_precision_runs(checkpoints: dict[str, Path]) -> None:
    for family in FAMILIES:
        asr = recognizer(checkpoints[family], dtype="bfloat16")
        assert isinstance(asr.encode([asr.prepare((speech(1.0), RATE))])[0], str)


def test_a_checkpoint_that_recognises_nothing_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no such folder"):
        recognizer(tmp_path / "nowhere")
    headless = tmp_path / "headless"
    shutil.copytree(checkpoints["hubert"], headless)
    from safetensors.torch import load_file, save_file

    tensors = load_file(headless / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("lm_head")}, headless / "model.safetensors")
    with pytest.raises(PipelineError, match=r"tensor lm_head\.\w+ is missing"):
        recognizer(headless)
    text = tmp_path / "text"
    text.mkdir()
    (text / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(PipelineError, match="found model_type 'llama', expected one of .*wav2vec2.*whisper"):
        recognizer(text)
    (text / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoModelForCTC": "evil.Evil"}}))
    with pytest.raises(PipelineError, match="found model_type 'x'"):
        recognizer(text)


# ---------------------------------------------------------------- the stage

CLIPS = {"c0": "你好", "c1": "", "c2": " 再见 ", "c3": "", "c4": "", "c5": ""}
SOUNDLESS = ("c2", "c4")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a manifest, audio and the real dvc.yaml; the working directory."""
    (tmp_path / "data").mkdir()
    for name in ("params.yaml", "dvc.yaml", "stages"):
        os.symlink(ROOT / name, tmp_path / name)
    clips = [Clip(c, f"{c}.mp4", "unlabelled", "", text, "", 1.0, 1, "00" * 32) for c, text in CLIPS.items()]
    write_manifest(clips, tmp_path / "data/manifest.csv")
    rows = [Row(c, values=None if c in SOUNDLESS else speech(1.0, i)) for i, c in enumerate(CLIPS)]
    audio = tmp_path / "data/audio"
    for i in range(2):
        attributes = {"sample_rate": RATE, "fingerprint": str(i)}
        write_shard(audio / f"shard-{i:05d}.h5", "audio", rows[3 * i : 3 * i + 3], attributes)
    write_index(audio, [f"shard-{i:05d}.h5" for i in range(2)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(checkpoint: Path | None, monkeypatch: pytest.MonkeyPatch, shard_size: int = 2) -> list[dict[str, str]]:
    p = load()
    chosen = p.transcribe.model_copy(update={"checkpoint": checkpoint and str(checkpoint)})
    corpus = p.corpus.model_copy(update={"shard_size": shard_size})
    runtime = p.runtime.model_copy(update={"device": "cpu"})
    changed = p.model_copy(update={"transcribe": chosen, "corpus": corpus, "runtime": runtime})
    monkeypatch.setattr(transcribe, "load", lambda: changed)
    transcribe.main()
    with open("data/transcripts.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_without_a_checkpoint_clips_stay_without_words(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(None, monkeypatch)
    assert rows == [
        {"clip_id": c, "transcript": text.strip(), "source": "corpus" if text else "none"}
        for c, text in CLIPS.items()
    ]


def test_clips_without_words_are_recognised(
    house: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run(checkpoints["wav2vec2"], monkeypatch)
    asr = recognizer(checkpoints["wav2vec2"])
    expected = {c: asr.encode([asr.prepare((speech(1.0, i), RATE))])[0] for i, c in enumerate(CLIPS)}
    assert [(row["clip_id"], row["source"]) for row in rows] == [
        ("c0", "corpus"), ("c1", "asr"), ("c2", "corpus"), ("c3", "asr"), ("c4", "none"), ("c5", "asr")
    ]
    assert [row["transcript"] for row in rows] == ["你好", expected["c1"], "再见", expected["c3"], "", expected["c5"]]
    written = (house / "data/transcripts.csv").read_bytes()
    assert run(checkpoints["wav2vec2"], monkeypatch, shard_size=64) and written == (
        house / "data/transcripts.csv"
    ).read_bytes()


def test_a_killed_run_goes_on_at_its_first_open_shard(
    house: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(checkpoints["hubert"], monkeypatch)
    shutil.rmtree(house / ".cache")
    wordless = [["c1"], ["c3", "c4"], ["c5"]]  # as the clips' names cut them
    computed: list[list[str]] = []
    shards = Encode.shards

    def one_and_no_more(self: Encode, todo: Iterable[Shard]) -> Iterator[tuple[Shard, list[Row]]]:
        for shard, rows in shards(self, todo):
            if len(computed) == 1:
                raise KeyboardInterrupt
            computed.append([clip.clip_id for clip in shard.clips])
            yield shard, rows

    monkeypatch.setattr(Encode, "shards", one_and_no_more)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints["hubert"], monkeypatch)
    assert computed == [wordless[0]]
    computed.append([])  # no more kills
    assert run(checkpoints["hubert"], monkeypatch) == whole
    assert computed[2:] == wordless[1:]
