"""The ranking in what models write."""

import json

import pytest

from stages.rankings.parse import InvalidAnswer, parse

LABELS = ["neutral", "anger", "happiness", "sadness", "worry", "surprise"]
RIGHT = ["worry", "anger", "happiness", "sadness", "neutral", "surprise"]
JSON = json.dumps({"ranking": RIGHT})
CHINESE = ["担忧", "愤怒", "高兴", "悲伤", "中性", "惊讶"]


@pytest.mark.parametrize(
    "answer",
    [
        JSON,
        JSON.replace("worry", "Worry").replace("anger", " ANGER"),
        f"```json\n{JSON}\n```",
        f"<think>{{hm}} {{\"ranking\": [1]}}</think> {JSON} Done.",
        f"thought without an opening tag </think>{JSON}",
        f"Here it is: {JSON} {{I hope this helps}}",
        f"{{not JSON}} {JSON}",
        f"{JSON}\n{JSON}",
        json.dumps({"result": {"ranking": RIGHT}, "note": ["a"]}),
        json.dumps({"Ranking": RIGHT, "confidence": 0.8}),
        json.dumps({"ranking": {"ranking": RIGHT}}),
        json.dumps({"emotions": RIGHT}),
        json.dumps([{"ranking": RIGHT}][0] | {"runner_up": ["anger"]}),
        json.dumps(RIGHT),
        json.dumps({"ranking": CHINESE}, ensure_ascii=False),
        json.dumps({"ranking": ["擔憂", "憤怒", "高興", "悲傷", "中立", "驚訝"]}, ensure_ascii=False),
        json.dumps({"ranking": ["worried", "angry", "happy", "sad", "neutral", "surprised"]}),
        json.dumps({"ranking": [f"{i}. {name}" for i, name in enumerate(RIGHT, 1)]}),
        json.dumps({"ranking": [f"{name} ({other})" for name, other in zip(RIGHT, CHINESE, strict=True)]}),
        json.dumps({"ranking": [f"**{name}**: 0.{9 - i}" for i, name in enumerate(RIGHT)]}),
        json.dumps({"ranking": [{"emotion": name, "probability": 0.1} for name in RIGHT]}),
        json.dumps({"ranking": [{"label": RIGHT[i], "rank": i + 1} for i in (3, 1, 0, 2, 5, 4)]}),
        json.dumps({"ranking": {str(i): name for i, name in reversed(list(enumerate(RIGHT, 1)))}}),
        json.dumps({"ranking": {name: i for i, name in reversed(list(enumerate(RIGHT, 1)))}}),
        json.dumps({"ranking": {name: 0.5 - i / 20 for i, name in enumerate(RIGHT)}}),
        json.dumps({"ranking": " > ".join(RIGHT)}),
        "\n".join(f"{i}. {name.title()}" for i, name in enumerate(RIGHT, 1)),
        "The ranking is:\n" + "\n".join(f"{i}) **{name}**" for i, name in enumerate(RIGHT, 1)) + "\nI am sure.",
        " > ".join(RIGHT),
        "排序：" + "、".join(CHINESE),
    ],
)
def test_a_ranking_that_can_be_read_one_way_only_is_read(answer: str) -> None:
    assert parse(answer, LABELS) == RIGHT


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "no JSON object"),
        ("I can't say.", "no JSON object"),
        ('["neutral"]', "no JSON object"),
        ('{"order": ["neutral"]}', "no JSON object"),
        ('{"ranking": "neutral"}', "no list of names"),
        ('{"ranking": [1, 2]}', "no list of names"),
        ('{"ranking": null}', "no list of names"),
        (json.dumps({"ranking": LABELS[1:]}), "^missing: neutral$"),
        (json.dumps({"ranking": [*LABELS, "anger"]}), "^more than once: anger$"),
        (json.dumps({"ranking": [*LABELS[:5], "suprise"]}), "^unknown: suprise; missing: surprise$"),
        (json.dumps({"ranking": [*LABELS[:5], "not surprise"]}), "unknown: not surprise; missing: surprise"),
        (json.dumps({"ranking": [*LABELS[:4], "worry/surprise", "surprise"]}), "unknown: worry/surprise; missing: w"),
        (json.dumps({"ranking": dict.fromkeys(LABELS, 0.5)}), "no list of names"),
        (JSON + json.dumps({"ranking": LABELS}), "several rankings"),
        (f"<think>{JSON}", "the thought does not end"),
        ("From least to most likely, neutral and anger, happiness sadness; worry, surprise", "no JSON object"),
        ("From least to most likely:\n" + "\n".join(f"{i}. {x}" for i, x in enumerate(LABELS)), "no JSON object"),
        ("{" * 100_000, "no JSON object"),
        ("[" * 100_000, "no JSON object"),
    ],
)
def test_what_is_no_ranking_or_more_than_one_is_refused_with_the_reason(answer: str, reason: str) -> None:
    with pytest.raises(InvalidAnswer, match=reason):
        parse(answer, LABELS)


def test_a_name_that_is_a_label_of_the_corpus_means_that_label() -> None:
    labels = ["joy", "happiness", "Contempt"]
    assert parse('{"ranking": ["contempt", "joy", "happy"]}', labels) == ["Contempt", "joy", "happiness"]
