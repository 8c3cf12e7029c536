"""The ranking in what a model wrote: read wherever only one reading is possible, refused with the reason elsewhere.

Forgiven: thoughts, prose and code fences around the JSON, further braces, nesting, another key, numbering, case, the
labels' Chinese names and adjectives, scores or ranks beside the names, a list in lines or with separators. Not
forgiven: a label that is missing, doubled or unknown, and two different rankings in one answer.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stages.rankings.prompt import GLOSSARY

# Other names of the usual labels. One that is itself a label of the corpus means that label.
NAMES = {
    "neutral": "neutrality calm 中性 中立 平静",
    "anger": "angry 愤怒 憤怒 生气 生氣",
    "happiness": "happy joy joyful 高兴 高興 快乐 快樂 开心 開心 喜悦",
    "sadness": "sad 悲伤 悲傷 伤心 傷心 难过 難過",
    "worry": "worried worrying 担忧 擔憂 担心 擔心 忧虑",
    "surprise": "surprised 惊讶 驚訝 吃惊 惊奇",
}
NUMBERING = re.compile(r"^\s*(?:[-*•]\s*)?[(（\[]?\s*\d{1,2}\s*(?:[.):、：）\]]|\s)\s*")
MARKUP = re.compile(r"[\s\"'`*_#.,:;!，。、：；！“”‘’「」]+")
SEPARATORS = re.compile(r"\s*(?:->|=>|→|>|›|»|≥|、|，|,|;|；|/|\||\n)\s*")
LEAST_FIRST = re.compile(r"least|ascending|lowest|最不|从低到高|從低到高", re.IGNORECASE)
MOST_NESTED = 8
BRACKETS = 2000  # in an answer: more are not tried one by one


class InvalidAnswer(ValueError):
    """The answer is no ranking; str(error) says why, in words that are also sent back to the model."""


def parse(answer: str, labels: Sequence[str]) -> list[str]:
    """The ranking in a model's answer: a permutation of the labels. Raises InvalidAnswer."""
    text = _after_thought(answer)
    names = _names(labels)
    read: list[list[str]] = []
    fault = 'it is no JSON object with the key "ranking"'
    for found, keyed in _lists(text):
        try:
            read.append(_check(found, labels, names))
        except InvalidAnswer as error:
            if keyed:
                fault = str(error)
    if not read and "{" not in text and (listed := _listed(text, labels, names)):
        read.append(listed)
    if not read:
        raise InvalidAnswer(fault)
    if any(ranking != read[0] for ranking in read):
        raise InvalidAnswer("it holds several rankings that differ")
    return read[0]


def _after_thought(answer: str) -> str:
    """What follows the thoughts. Raises InvalidAnswer where they do not end."""
    _, tag, rest = answer.rpartition("</think>")
    if not tag and "<think>" in answer:
        raise InvalidAnswer("the thought does not end")
    return rest


def _names(labels: Sequence[str]) -> dict[str, str]:
    """Every name that stands for one label, as `_plain` writes it."""
    found: dict[str, str] = {}
    for label in labels:
        known = label.lower()
        others = [*NAMES.get(known, "").split(), GLOSSARY.get(known, "").split(",")[0]]
        found |= {_plain(other): label for other in others if other}
    return found | {_plain(label): label for label in labels}


def _plain(name: str) -> str:
    return MARKUP.sub(" ", unicodedata.normalize("NFKC", name)).strip().lower()


def _label(entry: Any, names: Mapping[str, str]) -> str | None:
    """The one label that an entry of a list names, with whatever stands beside it."""
    if isinstance(entry, dict):  # {"emotion": "worry", "probability": 0.4}
        named = {label for value in entry.values() if isinstance(value, str) and (label := _label(value, names))}
        return named.pop() if len(named) == 1 else None
    if not isinstance(entry, str):
        return None
    entry = NUMBERING.sub("", unicodedata.normalize("NFKC", entry))
    if label := names.get(_plain(entry)):
        return label
    words = re.split(r"[()\[\]:=/|,\-–—\s]+", entry)  # worry (担忧), 担忧/worry, worry: 0.4
    named = {names[plain] for word in words if (plain := _plain(word)) in names}
    rest = [word for word in words if (plain := _plain(word)) and plain not in names and not _is_number(plain)]
    return named.pop() if len(named) == 1 and not rest else None


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"[\d\s%]+", text))


def _check(found: Any, labels: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """The labels in a list, or in an object of ranks or scores. Raises InvalidAnswer."""
    if isinstance(found, dict):
        found = _ordered(found, names)
    if isinstance(found, str):
        found = SEPARATORS.split(found) if SEPARATORS.search(found) else None
    if not isinstance(found, list) or not all(isinstance(entry, str | dict) for entry in found):
        raise InvalidAnswer('"ranking" is no list of names')
    ranks = {entry["rank"]: entry for entry in found if isinstance(entry, dict) and isinstance(entry.get("rank"), int)}
    if len(ranks) == len(found):
        found = [ranks[rank] for rank in sorted(ranks)]
    ranking = [_label(entry, names) for entry in found]
    counts = Counter(ranking)
    unknown = [str(entry).strip().lower()[:40] for entry, label in zip(found, ranking, strict=True) if label is None]
    faults = {
        "unknown": list(dict.fromkeys(unknown)),
        "missing": [label for label in labels if label not in counts],
        "more than once": [label for label, count in counts.items() if label is not None and count > 1],
    }
    if any(faults.values()):
        raise InvalidAnswer("; ".join(f"{what}: {', '.join(which)}" for what, which in faults.items() if which))
    return [label for label in ranking if label is not None]


def _ordered(found: dict[str, Any], names: Mapping[str, str]) -> list[Any] | None:
    """{"1": "worry", ...} by number; {"worry": 1, ...} by rank; {"worry": 0.4, ...} by score; None for others."""
    if all(key.strip().isdigit() for key in found):
        return [found[key] for key in sorted(found, key=int)]
    values = list(found.values())
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return None
    if len(set(values)) < len(values):
        return None
    if sorted(values) == list(range(1, len(values) + 1)):
        return sorted(found, key=found.__getitem__)
    if all(0 <= value <= 1 for value in values):
        return sorted(found, key=found.__getitem__, reverse=True)
    return None


def _lists(text: str) -> Iterator[tuple[Any, bool]]:
    """What may be the ranking in each JSON value of a text, and whether a key says that it is."""
    decoder, start = json.JSONDecoder(), 0
    for _ in range(BRACKETS):
        opening = re.compile(r"[{\[]").search(text, start)
        if opening is None:
            return
        try:
            value, start = decoder.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            start = opening.start() + 1
            continue
        yield from _within(value, MOST_NESTED)


def _within(value: Any, depth: int) -> Iterator[tuple[Any, bool]]:
    if isinstance(value, list):
        yield value, False
    if depth == 0 or not isinstance(value, dict):
        return
    keyed = [inner for key, inner in value.items() if key.strip().lower() in ("ranking", "rankings", "排序", "排名")]
    for inner in keyed:
        nested = list(_within(inner, depth - 1)) if isinstance(inner, dict) else []
        yield from ((found, True) for found, _ in nested) if nested else [(inner, True)]
    if not keyed:
        for inner in value.values():
            yield from _within(inner, depth - 1)


def _listed(text: str, labels: Sequence[str], names: Mapping[str, str]) -> list[str] | None:
    """The ranking in a text without JSON: numbered lines, or one line of labels between separators."""
    if LEAST_FIRST.search(text):
        return None
    lines = [line for line in text.splitlines() if line.strip()]
    numbered = [line for line in lines if re.match(r"^\s*[(（\[]?\d{1,2}\s*[.):、：）\]]", line)]
    candidates: list[list[str]] = [numbered]
    candidates += [SEPARATORS.split(re.sub(r"^[^:：]*[:：]", "", line)) for line in lines]
    found = []
    for candidate in candidates:
        try:
            found.append(_check(candidate, labels, names))
        except InvalidAnswer:
            continue
    return found[0] if found and all(ranking == found[0] for ranking in found) else None
