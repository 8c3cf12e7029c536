"""The providers that run on this machine: the lexicon and a local language model."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.engine.errors import NO_KNOWN_WORD, PipelineError
from stages.engine.params import load
from stages.rankings import providers
from stages.rankings.cache import Answer
from stages.rankings.lexicon import Lexicon

ROOT = Path(__file__).parents[1]
LABELS = ["neutral", "anger", "happiness", "sadness", "worry", "surprise"]


# ---------------------------------------------------------------- lexicon


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon("DUTIR", LABELS)


@pytest.mark.parametrize(
    ("transcript", "first"),
    [
        ("明天上午九点开会", "neutral"),
        ("我是你妈妈", "neutral"),
        ("我今天非常开心，终于见到你了", "happiness"),
        ("真是令人愤怒", "anger"),
        ("气死我了", "anger"),
        ("奶奶去世了，我心里很难受", "sadness"),
        ("我好担心她会出事", "worry"),
        ("怎么办啊，来不及了", "worry"),
        ("没想到他竟然来了", "surprise"),
        ("天哪，真的吗", "surprise"),
    ],
)
def test_an_emotion_word_decides(lexicon: Lexicon, transcript: str, first: str) -> None:
    ranking = lexicon.ranking(transcript)
    assert ranking[0] == first and sorted(ranking) == sorted(LABELS)


@pytest.mark.parametrize("transcript", ["我一点都不难过", "没有什么好担心的", "别生气了好吗", "我不怕"])
def test_a_negated_unpleasant_word_is_neutral(lexicon: Lexicon, transcript: str) -> None:
    assert lexicon.ranking(transcript)[0] == "neutral"


def test_a_negated_pleasant_word_is_unpleasant(lexicon: Lexicon) -> None:
    assert lexicon.ranking("我很高兴")[0] == "happiness"
    assert lexicon.ranking("我不是很高兴").index("happiness") > lexicon.ranking("我不是很高兴").index("sadness")


def test_a_negation_does_not_reach_past_a_comma(lexicon: Lexicon) -> None:
    assert lexicon.ranking("不，我很开心")[0] == "happiness"


def test_a_degree_word_weighs(lexicon: Lexicon) -> None:
    assert lexicon.scores("我很难过")["sadness"] > lexicon.scores("我难过")["sadness"]


@pytest.mark.parametrize("transcript", ["", "？？？", "hello there", "嗯", "𠀀\x00", "好" * 5000])
def test_odd_text_is_ranked_too(lexicon: Lexicon, transcript: str) -> None:
    assert sorted(lexicon.ranking(transcript)) == sorted(LABELS)


def test_ties_follow_the_label_order() -> None:
    assert Lexicon("DUTIR", LABELS).ranking("一") == LABELS
    assert Lexicon("DUTIR", ["surprise", "neutral"]).ranking("一") == ["neutral", "surprise"]


@pytest.mark.parametrize(("labels", "transcript", "first", "unknown"), [
    ([*LABELS, "disgust"], "我很高兴", "happiness", ""),
    (["neutral", "anger", "happiness", "sadness", "fear", "disgust", "boredom"], "怎么办，我很担心", "fear", "boredom"),
    (["negative", "neutral", "positive"], "太好了，我很开心", "positive", ""),
    (["negative", "neutral", "positive"], "我恨你，气死我了", "negative", ""),
    (["negative", "neutral", "positive"], "现在是三月", "neutral", ""),
    (["Anger", "Joy"], "我很高兴", "Joy", ""),
    (["contempt", "calm", "sadness"], "我想哭", "sadness", "contempt, calm"),
    ([f"class {i}" for i in range(40)] + ["surprise"], "没想到", "surprise", "class 0, class 1"),
])
def test_label_sets_of_any_size(labels: list[str], transcript: str, first: str, unknown: str,
                                capsys: pytest.CaptureFixture[str]) -> None:
    ranking = Lexicon("DUTIR", labels).ranking(transcript)
    assert ranking[0] == first and sorted(ranking) == sorted(labels)
    said = capsys.readouterr().err
    assert (f"has no words for {unknown}" in said and said.count("\n") == 1) if unknown else not said


@pytest.mark.parametrize(("transcript", "known"), [
    ("I am so happy and delighted today", False),
    ("Ich bin so traurig", False),
    ("Мне очень грустно", False),
    ("너무 슬퍼요", False),
    ("OK, 123 !?", False),
    ("……", False),
    ("现在是三月", True),
    ("我很高兴", True),
    ("嗯", True),
    ("这个 OK 吗", True),
])
def test_a_text_without_a_chinese_word_gets_no_ranking(lexicon: Lexicon, transcript: str, known: bool) -> None:
    answers: list[Answer] = []
    lexicon.rank([transcript], answers.extend)
    assert (answers[0].ranking is not None) is known
    assert answers[0].reason == ("" if known else NO_KNOWN_WORD)


def test_a_model_or_labels_that_the_lexicon_does_not_know_are_refused() -> None:
    with pytest.raises(PipelineError, match="corpus.labels: found boredom, calm, none of which .*lexicon"):
        Lexicon("DUTIR", ["boredom", "calm"])
    with pytest.raises(PipelineError, match="rankings.model: found 'HowNet'"):
        Lexicon("HowNet", LABELS)


def test_the_lexicon_writes_nothing_and_does_not_import_cntext(tmp_path: Path) -> None:
    code = (
        "import sys; from stages.rankings.lexicon import Lexicon\n"
        f"print(Lexicon('DUTIR', {LABELS}).ranking('我很开心'))\n"
        "assert 'cntext' not in sys.modules"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("['happiness'")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Llama of two small layers with random weights and a byte-level BPE tokenizer, as a published folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["neutral anger happiness the emotions of the speaker"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in a miniature model several threads only slow each other down
    yield folder
    torch.set_num_threads(threads)


def local(folder: Path) -> Any:
    from stages.rankings.transformers_provider import Transformers

    rankings = load(ROOT / "params.yaml").rankings.model_copy(update={"model": str(folder)})
    return Transformers(rankings, LABELS, "cpu")


def test_a_label_scores_by_the_likelihood_of_its_tokens(language_model: Path) -> None:
    """Against one full forward pass per label, without a cache or a batch."""
    import torch

    provider = local(language_model)
    transcripts = ["我很开心", "我很难过", "没想到你今天会来"]
    answers: list[Answer] = []
    provider.rank(transcripts, answers.extend)
    found = {answer.transcript: answer for answer in answers}
    assert set(found) == set(transcripts)
    for transcript in transcripts:
        ids, labels = provider.encode(transcript)
        assert len({len(tokens) for tokens in labels}) > 1
        expected = []
        for tokens in labels:
            with torch.inference_mode():
                logits = provider._model(input_ids=torch.tensor([ids + tokens])).logits[0].log_softmax(-1)
            steps = [logits[len(ids) + i - 1, token] for i, token in enumerate(tokens)]
            expected.append(float(sum(steps)) / len(tokens))
        scores = provider.scores([(ids, labels)])[0]
        assert scores.tolist() == pytest.approx(expected, abs=1e-5)
        order = sorted(range(6), key=lambda i: -expected[i])
        assert found[transcript].ranking == [LABELS[i] for i in order]
        assert found[transcript].input_tokens == len(ids)


def test_the_prompt_ends_where_the_labels_part(language_model: Path) -> None:
    provider = local(language_model)
    ids, labels = provider.encode("你好")
    text = provider._tokenizer.decode(ids)
    assert 'Transcript: "你好"\nAnswer: {"ranking": [' in text
    for label, tokens in zip(LABELS, labels, strict=True):
        assert provider._tokenizer.decode(ids + tokens).endswith(f'{{"ranking": ["{label}"')


def test_a_chat_template_is_used_with_or_without_a_system_role(language_model: Path, tmp_path: Path) -> None:
    for template, expected in (
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]", "[system]You are"),
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]",
            "[user]You are",
        ),
    ):
        folder = tmp_path / expected[1:5]
        shutil.copytree(language_model, folder)
        (folder / "chat_template.jinja").write_text(template)
        provider = local(folder)
        text = provider._tokenizer.decode(provider.encode("你好")[0])
        assert text.startswith(expected) and '"你好"[assistant]{"ranking"' in text


def test_a_checkpoint_that_is_not_to_be_trusted_is_refused(language_model: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no such folder"):
        local(tmp_path / "nowhere")
    remote = tmp_path / "remote"
    shutil.copytree(language_model, remote)
    config = {"model_type": "homemade", "auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(PipelineError, match="remote") as error:
        local(remote)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_the_cache_tells_local_models_apart(language_model: Path) -> None:
    published = load(ROOT / "params.yaml").rankings
    model = published.model_copy(update={"provider": "transformers", "model": str(language_model)})
    half = model.model_copy(update={"dtype": "bfloat16"})
    assert providers.model_identity(model) != providers.model_identity(half)
    before = providers.model_identity(model)
    (language_model / "chat_template.jinja").write_text("other")
    assert providers.model_identity(model) != before
    (language_model / "chat_template.jinja").unlink()
    assert providers.model_identity(model) == before
