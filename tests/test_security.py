"""What a user is given by others (checkpoints, corpora) can't run code: no pickle, no remote code, an inert report."""

import ast
import json
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from code_deps import ROOT
from fabricated_run import LABELS, SENTENCES, fabricate
from ruamel.yaml import YAML
from test_report import FLAGS
from test_transcribe import make_ctc

from stages.corpora.demo.checkpoints import make_baichuan, make_hubert
from stages.corpora.demo.clip_checkpoint import make_clip
from stages.encoders import asr, baichuan, clip, emovclip, hubert
from stages.engine.errors import PipelineError
from stages.engine.params import load
from stages.evaluation import figures
from stages.evaluation.artefacts import read_run
from stages.evaluation.report import render_report
from stages.rankings.transformers_provider import Transformers

# ---------------------------------------------------------------- our own code

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "code"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load", "torch.hub.load",
                   "pd.read_pickle", "pandas.read_pickle", "yaml.unsafe_load", "yaml.full_load"}
REQUIRED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False),
            "numpy.load": ("allow_pickle", False)}
FORBIDDEN_VALUES = [("shell", True), ("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False),
                    ("typ", "unsafe"), ("autoescape", False)]


def dangers(source: str) -> list[str]:
    """What in a module could run code that it reads, as `line: what`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"{node.lineno}: imports {n}" for n in names if n.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            if name in FORBIDDEN_CALLS or name == "yaml.load" and "Safe" not in ast.unparse(node):
                found.append(f"{node.lineno}: calls {name}")
            key, value = REQUIRED.get(name, (None, None))
            if key and given.get(key, ...) is not value:
                found.append(f"{node.lineno}: {name} without {key}={value}")
            found += [f"{node.lineno}: {k}={v}" for k, v in FORBIDDEN_VALUES if given.get(k, ...) == v]
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            given = {k.value: v.value for k, v in pairs if isinstance(k, ast.Constant) and isinstance(v, ast.Constant)}
            found += [f"{node.lineno}: {k}={v}" for k, v in FORBIDDEN_VALUES if given.get(k, ...) == v]
    return found


@pytest.mark.parametrize("folder", ["stages", "benchmarks"])
def test_no_module_can_run_what_it_reads(folder: str) -> None:
    modules = sorted((ROOT / folder).rglob("*.py"))
    assert modules
    assert {str(path): found for path in modules if (found := dangers(path.read_text()))} == {}


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads", "import joblib.numpy_pickle", "torch.load(p)", "eval(text)",
    "torch.load(p, weights_only=False)", "np.load(p)", "np.load(p, allow_pickle=True)", "yaml.load(text)",
    "subprocess.run(c, shell=True)", "f(trust_remote_code=True)", "YAML(typ='unsafe')", "{'trust_remote_code': True}",
])
def test_the_search_finds_each_danger(source: str) -> None:
    assert dangers(source)


# ---------------------------------------------------------------- checkpoints


def make_llama(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet) + 1, **sizes)).save_pretrained(folder)


def load_causal_lm_encoder(folder: Path) -> object:
    config = baichuan.Config(checkpoint=str(folder), revision=None, dtype="float32", layers=[-1], max_tokens=64)
    return baichuan.Encoder(config, "cpu")


def load_hubert(folder: Path) -> object:
    return hubert.Encoder(hubert.Config(checkpoint=str(folder), revision=None, dtype="float32", layers=[-1],
                                        resample=True, window_seconds=30), "cpu")


def load_ranker(folder: Path) -> object:
    return Transformers(str(folder), LABELS, "v1", revision=None, dtype="float32", device="cpu")


def load_recognizer(folder: Path) -> object:
    return asr.Recognizer(asr.Config(checkpoint=str(folder), revision=None, language=None, dtype="float32"), "cpu")


def load_clip_and_tokenizer(folder: Path) -> object:
    """As train_emovclip does."""
    from open_clip import get_tokenizer

    model, name = emovclip.load_promptable(str(folder), None, "float32", "cpu")
    return model, get_tokenizer(name)


# what: (make, load, the name that its weights have as a pickle)
READERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], str]] = {
    "hubert": (lambda f: make_hubert(f, 0), load_hubert, "pytorch_model.bin"),
    "clip": (lambda f: make_clip(f, 0),
             lambda f: clip.Encoder(clip.Config(checkpoint=str(f), revision=None, dtype="float32"), "cpu"),
             "open_clip_pytorch_model.bin"),
    "emovclip": (lambda f: make_clip(f, 0), load_clip_and_tokenizer, "open_clip_pytorch_model.bin"),
    "baichuan": (lambda f: make_baichuan(f, 0, SENTENCES), load_causal_lm_encoder, "pytorch_model.bin"),
    "another language model": (make_llama, load_causal_lm_encoder, "pytorch_model.bin"),
    "recogniser": (lambda f: make_ctc(f, "layer"), load_recognizer, "pytorch_model.bin"),
    "ranker": (make_llama, load_ranker, "pytorch_model.bin"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An intact checkpoint for each reader, which loads."""
    folders = {}
    for name, (make, read, _) in READERS.items():
        folder = folders[name] = tmp_path_factory.mktemp("checkpoints") / name
        make(folder)
        read(folder)
    return folders


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (self.marker,)


def save_evil(path: Path, form: str, marker: Path) -> None:
    content = {"state_dict": {"weight": torch.zeros(1), "evil": Evil(marker)}}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, pickle_module=pickle, _use_new_zipfile_serialization=form == "zip")


def test_the_evil_files_are_evil(tmp_path: Path) -> None:
    """Else the next tests would show nothing."""
    for i, form in enumerate(("zip", "old torch")):
        save_evil(tmp_path / f"{i}.bin", form, tmp_path / f"marker {i}")
        torch.load(tmp_path / f"{i}.bin", weights_only=False)
        assert (tmp_path / f"marker {i}").exists()


@pytest.mark.parametrize("form", ["zip", "old torch", "plain pickle"])
@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_is_never_run(sound: dict[str, Path], tmp_path: Path, reader: str, form: str) -> None:
    folder = Path(shutil.copytree(sound[reader], tmp_path / "copy"))
    _, read, weights = READERS[reader]
    for path in folder.glob("*.safetensors"):
        path.unlink()
    save_evil(folder / weights, form, tmp_path / "marker")
    with pytest.raises(PipelineError, match="checkpoint .*copy: ") as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "marker").exists()
    # the same under a name that promises no pickle
    safe = "open_clip_model.safetensors" if "open_clip" in weights else "model.safetensors"
    (folder / weights).rename(folder / safe)
    with pytest.raises(PipelineError, match="checkpoint .*copy: ") as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("reader", READERS)
def test_remote_code_and_strange_files_are_never_run(sound: dict[str, Path], tmp_path: Path, reader: str) -> None:
    """Every configuration asks for code that lies beside it; it loads without, or is refused in one line."""
    folder = Path(shutil.copytree(sound[reader], tmp_path / "copy"))
    marker = tmp_path / "marker"
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.bin", "merges.pkl"):
        save_evil(folder / name, "zip", marker)
    (folder / "evil.py").write_text(f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\nclass Evil: pass\n")
    for name in ("conftest.py", "__init__.py", "setup.py", "modeling_evil.py"):
        shutil.copyfile(folder / "evil.py", folder / name)
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForCTC", "AutoFeatureExtractor",
               "AutoProcessor", "AutoImageProcessor", "AutoModelForSpeechSeq2Seq")
    auto_map: dict[str, Any] = dict.fromkeys(classes, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
                 "generation_config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | {"auto_map": auto_map, "trust_remote_code": True}))
    try:
        READERS[reader][1](folder)
    except PipelineError as error:
        assert "\n" not in str(error)
    assert not marker.exists()


@pytest.mark.parametrize("reader", [name for name in READERS if "clip" not in name])
def test_an_architecture_that_needs_remote_code_is_refused(
    sound: dict[str, Path], tmp_path: Path, reader: str
) -> None:
    folder = Path(shutil.copytree(sound[reader], tmp_path / "copy"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForCTC"), "evil.Evil")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(PipelineError, match="checkpoint .*copy: ") as caught:
        READERS[reader][1](folder)
    assert "\n" not in str(caught.value) and not (tmp_path / "marker").exists()


@pytest.mark.parametrize("reader", ["clip", "emovclip"])
def test_open_clips_own_way_to_remote_code_is_refused(sound: dict[str, Path], tmp_path: Path, reader: str) -> None:
    folder = Path(shutil.copytree(sound[reader], tmp_path / "copy"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Evil: pass\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(PipelineError, match="copy: .*remote code .*never executed"):
        READERS[reader][1](folder)
    assert not (tmp_path / "marker").exists()


def test_a_chat_template_runs_in_a_sandbox(sound: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound["ranker"], tmp_path / "copy"))
    escape = "{{ cycler.__init__.__globals__.os.mkdir('" + str(tmp_path / "marker") + "') }}"
    (folder / "chat_template.jinja").write_text(escape)
    ranker = load_ranker(folder)
    with pytest.raises(PipelineError, match="chat template fails") as caught:
        ranker.rank(["你好"], lambda answers: None)  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value) and not (tmp_path / "marker").exists()


# ---------------------------------------------------------------- the report

EVIL = "<script>document.title='owned'</script><img src=x onerror=document.title=String(1)>{{7*7}}</script>"


@pytest.fixture
def evil_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The report of a run in which a clip, a label, a transcript, a reason and a ranking are markup."""
    monkeypatch.chdir(ROOT)
    fabricate(tmp_path, confidence=0.7, frames=False)
    monkeypatch.chdir(tmp_path)
    for path in [p for p in tmp_path.rglob("*") if p.suffix in (".csv", ".json", ".jsonl", ".yaml")]:
        text = path.read_text()
        for name in ("anger", *SENTENCES, "no audio stream"):
            text = text.replace(name, f"{name}{EVIL}")
        for name in ("test_00", "unlabelled_01", "labelled_003"):
            text = re.sub(rf"\b{name}\d*", lambda m: m.group() + EVIL, text)
        path.write_text(text)
    values = YAML().load(ROOT / "params.yaml")
    labels = [label.replace("anger", f"anger{EVIL}") for label in LABELS]
    values["corpus"]["labels"] = labels
    YAML().dump(values, tmp_path / "params.yaml")
    run, p = read_run(labels), load()
    details, predictions = figures.details(run, p), figures.prediction_table(run, 1.0)
    robustness = figures.robustness_table(run, lambda removed: (run.final.best, run.final.by_seed))
    return render_report(run, p, details, predictions, robustness)


def test_whatever_a_corpus_says_is_only_text(evil_page: str) -> None:
    for found in (EVIL, "<img src=x", "document.title='owned'</script>"):
        assert found not in evil_page
    for kind in (r"test_00\d", "anger", SENTENCES[0], "no audio stream"):
        assert re.search(kind + "&lt;script&gt;", evil_page), kind
    assert evil_page.count("{{7*7}}") > 10


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed (apt-get install chromium)")
def test_in_a_browser_it_is_only_text_too(evil_page: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(evil_page, encoding="utf-8")
    command = ["chromium", *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, f"file://{tmp_path / 'report.html'}"], text=True, capture_output=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title and "owned" not in title.group(1) and title.group(1) != "1"
    assert "<svg" in done.stdout and not re.search(r"<img[^>]*src=.?x\b", done.stdout)
