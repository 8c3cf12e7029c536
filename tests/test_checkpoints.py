"""Reading published checkpoints, tried on Baichuan's: every file layout, broken files, no code, little memory."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from stages.corpora.demo.checkpoints import make_baichuan
from stages.encoders.baichuan import Config, Encoder
from stages.engine.errors import PipelineError

TEXT = "今天下午三点开会，你昨天去哪里了？"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("checkpoints") / "intact"
    make_baichuan(folder, 1, [TEXT])
    return folder


@pytest.fixture
def copy(intact: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own for a test to change."""
    return shutil.copytree(intact, tmp_path / "copy")


def encoder(folder: Path | str) -> Encoder:
    return Encoder(
        Config(checkpoint=str(folder), revision=None, dtype="float32", layers=[-4, -3, -2, -1], max_tokens=512), "cpu"
    )


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _shards(weights: dict[str, torch.Tensor], folder: Path, stem: str, save: Callable[[Any, Path], object]) -> None:
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:17], names[17:]), start=1):
        file = folder / f"{stem.replace('.', f'-0000{number}-of-00002.')}"
        save({name: weights[name] for name in part}, file)
        weight_map |= dict.fromkeys(part, file.name)
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("layout", ["sharded safetensors", "bin", "sharded bin", "old bin"])
def test_every_published_layout_gives_the_same_features(intact: Path, copy: Path, layout: str) -> None:
    weights = load((copy / "model.safetensors").read_bytes())
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(4)}  # the 7B has these
    (copy / "model.safetensors").unlink()
    if layout == "sharded safetensors":
        _shards(weights, copy, "model.safetensors", save_file)
    elif layout == "sharded bin":
        _shards(weights, copy, "pytorch_model.bin", torch.save)
    else:
        torch.save(weights, copy / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "bin")
    model = encoder(copy)
    prompt = model.prepare(TEXT)
    assert np.array_equal(model.encode([prompt])[0], encoder(intact).encode([prompt])[0])


def test_remote_code_is_never_run(copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for name in ("configuration_baichuan", "modeling_baichuan", "tokenization_baichuan"):
        (copy / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')")
    change_config(
        copy,
        auto_map={
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
    )
    auto_tokenizer = {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]}
    (copy / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "auto_map": auto_tokenizer}))
    encoder(copy)
    change_config(copy, model_type="surprise")
    with pytest.raises(PipelineError, match="copy: model_type 'surprise'.*remote code.*never executed"):
        encoder(copy)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("tensor", "words"),
    [(None, "is missing"), (torch.zeros(3, 96), r"has shape \(3, 96\), its config says \(288, 96\)")],
)
def test_a_bad_tensor_is_named(copy: Path, tensor: torch.Tensor | None, words: str) -> None:
    weights = load((copy / "model.safetensors").read_bytes())
    name = "model.layers.2.self_attn.W_pack.weight"
    del weights[name]
    save_file(weights if tensor is None else weights | {name: tensor}, copy / "model.safetensors")
    with pytest.raises(PipelineError, match=f"checkpoint .*copy: tensor {name} {words}"):
        encoder(copy)


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("executed", "w"))


def test_a_pickle_with_code_is_refused(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (copy / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Payload()}, copy / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(PipelineError, match="copy: pytorch_model.bin can't be loaded") as caught:
        encoder(copy)
    assert "\n" not in str(caught.value) and not (tmp_path / "executed").exists()


def test_other_broken_checkpoints_are_one_line(copy: Path, tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(PipelineError, match=words) as caught:
            encoder(copy)
        assert "\n" not in str(caught.value)

    with pytest.raises(PipelineError, match="nowhere: no such folder"):
        encoder(tmp_path / "nowhere")
    weights = load((copy / "model.safetensors").read_bytes())
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:900])
    refused("copy: model.safetensors can't be loaded")
    (copy / "model.safetensors").unlink()
    refused("copy: no weights; expected model.safetensors")
    _shards(weights, copy, "model.safetensors", save_file)
    (copy / "model-00002-of-00002.safetensors").unlink()
    refused("model.safetensors.index.json names shard model-00002-of-00002.safetensors, expected a file beside it")
    index = copy / "model.safetensors.index.json"
    shutil.copy(copy / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    for outside in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, outside)}))
        refused("copy: model.safetensors.index.json names shard .*outside.safetensors, expected a file beside it")
    index.write_text("{}")
    refused("copy: model.safetensors.index.json has no weight_map")
    save_file(weights, copy / "model.safetensors")
    change_config(copy, vocab_size=64)
    refused("model.embed_tokens.weight has shape")
    (copy / "tokenizer.model").write_bytes(b"nonsense")
    refused("tokenizer.model can't be read")
    (copy / "tokenizer.model").unlink()
    refused("tokenizer.model can't be read")
    (copy / "config.json").write_text("[]")
    refused("config.json is not a JSON object")


def test_a_config_that_lacks_a_size(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["num_attention_heads"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match="config.json lacks 'num_attention_heads'"):
        encoder(copy)


def test_loading_peaks_at_the_weights(tmp_path: Path) -> None:
    """A 120 MB decoder stored as .bin in bfloat16 and loaded as float32, in a process of its own.

    Only memory of its own counts: what it has mapped of the file can be dropped at any time.
    """
    width, inner, layers = 768, 2048, 4
    shapes = {"embed_tokens.weight": (256, width), "norm.weight": (width,)}
    for i in range(layers):
        shapes |= {f"layers.{i}.self_attn.W_pack.weight": (3 * width, width)}
        shapes |= {f"layers.{i}.self_attn.o_proj.weight": (width, width)}
        shapes |= {f"layers.{i}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"layers.{i}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"layers.{i}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    weights = {f"model.{name}": torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    config: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "vocab_size": 256,
    }
    config |= {"num_attention_heads": 12, "rms_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = f"""
import re, threading, torch
from pathlib import Path
from stages.encoders.baichuan import load_decoder

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, own())

import transformers.modeling_utils, accelerate
torch.ones(8, dtype=torch.bfloat16).float()
before = own()
watching = threading.Thread(target=watch)
watching.start()
decoder = load_decoder(Path({str(tmp_path)!r}), "big", "float32", "cpu", [-1])
done.set()
watching.join()
print((max(peak, own()) - before) / sum(p.numel() * 4 for p in decoder.parameters()))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert 0.9 < float(result.stdout) < 1.15
