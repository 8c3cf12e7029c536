"""The question put to a language model.

[paper 3.4] GPT-4 reads the transcript alone and ranks the six emotions by likelihood. The paper does not print its
prompt: the wording is ours [choice]. Prompts are versioned, never edited: an answer in the cache belongs to exactly
one wording, so a better wording is a new version next to the old one.
"""

import json
from collections.abc import Sequence
from typing import Any

# Each label in Chinese and in English, so that neither language has to be guessed from the other.
GLOSSARY = {
    "neutral": "中性, calm or matter-of-fact",
    "anger": "愤怒, also annoyance, contempt and reproach",
    "happiness": "高兴, also relief, fondness and amusement",
    "sadness": "悲伤, also disappointment, hurt and regret",
    "worry": "担忧, also fear, anxiety and unease",
    "surprise": "惊讶, also disbelief",
}

PROMPTS = {  # by what is sent, then by version: the instructions and the question
    "transcript": {
        "v1": (
            "You are an expert in recognising emotions from what people say in Chinese films and television series. "
            "You get the transcript of one spoken line, without sound or picture. Rank all {count} emotions by how "
            "likely the speaker feels them, the most likely first. Judge the speaker's own feeling, not the topic. "
            "Take neutral as the most likely where nothing in the words speaks for an emotion.\n"
            "The emotions:\n{glossary}\n"
            'Answer with one JSON object and nothing else: {{"ranking": [{count} names, each exactly once, '
            "spelt as above, the most likely first]}}.",
            "Transcript: {transcript}",
        )
    },
    "clip": {
        "v1": (
            "You are an expert in recognising emotions from Chinese films and television series. You get one short "
            "clip: frames of it in order, its sound, and the transcript of what is said, as far as there are any. Rank "
            "all {count} emotions by how likely the speaker feels them, the most likely first, from face, voice and "
            "words together. Judge the speaker's own feeling, not the topic. Take neutral as the most likely where "
            "nothing speaks for an emotion.\n"
            "The emotions:\n{glossary}\n"
            'Answer with one JSON object and nothing else: {{"ranking": [{count} names, each exactly once, '
            "spelt as above, the most likely first]}}.",
            "Transcript: {transcript}",
        )
    },
}


def messages(transcript: str, labels: Sequence[str], version: str, source: str = "transcript") -> list[dict[str, str]]:
    """The chat messages that ask for one ranking, from this source. KeyError for an unknown version."""
    system, user = PROMPTS[source][version]
    lines = [f"- {label} ({GLOSSARY[label]})" if label in GLOSSARY else f"- {label}" for label in labels]
    return [
        {"role": "system", "content": system.format(count=len(labels), glossary="\n".join(lines))},
        {"role": "user", "content": user.format(transcript=json.dumps(transcript, ensure_ascii=False))},
    ]


def correction(answer: str, reason: str) -> list[dict[str, str]]:
    """The messages that follow an invalid answer and ask again."""
    return [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": f"That answer can't be used: {reason}. Answer again, with the JSON object alone."},
    ]


def response_format(labels: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of an answer, for servers that constrain decoding. It can't forbid a doubled label."""
    items = {"type": "string", "enum": list(labels)}
    ranking = {"type": "array", "items": items, "minItems": len(labels), "maxItems": len(labels)}
    schema = {
        "type": "object",
        "properties": {"ranking": ranking},
        "required": ["ranking"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "ranking", "strict": True, "schema": schema}}
