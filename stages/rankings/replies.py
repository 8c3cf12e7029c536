"""What a server wrote, read without trusting its shape: a reply's text, why it ended, what it cost.

Works on plain JSON, not on the SDK's models, which take any shape as it comes and raise AttributeError later: a message
that is null, content as a list of parts, half a usage. The same code reads direct replies and the lines of a batch.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import APIStatusError

MOST_TOKENS = 10**9  # a count above is a server's slip


@dataclass(frozen=True)
class Reply:
    """`tokens_in`, `tokens_out`: as the server counted them, None where it does not say; thinking is output."""

    text: str
    finish: str  # finish_reason, "" where there is none
    refusal: str
    tokens_in: int | None
    tokens_out: int | None
    fault: str = ""  # why there is nothing to read


def decode(content: bytes) -> dict[str, Any] | None:
    """The JSON object in a body, None where it is anything else."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def read(body: dict[str, Any]) -> Reply:
    """The reply in the body of an HTTP 200."""
    usage = _mapping(body.get("usage"))
    tokens_in, tokens_out = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    total = _count(usage.get("total_tokens"))
    if total is not None and tokens_in is not None:  # some count thinking in the total only
        tokens_out = max(tokens_out or 0, total - tokens_in)
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        fault = "an empty list of choices" if choices == [] else "a reply without a choice"
        return Reply("", "", "", tokens_in, tokens_out, fault)
    finish, message = choice.get("finish_reason"), choice.get("message")
    fields = _mapping(message)
    text, refusal = _text(fields.get("content")), _text(fields.get("refusal"))
    fault = ""
    if not text:
        fault = "a message that is null" if not isinstance(message, dict) else "a message without text"
        if fields.get("tool_calls") or fields.get("function_call"):
            fault = "a call of a tool"
    return Reply(text, "" if finish is None else str(finish), refusal, tokens_in, tokens_out, fault)


def _text(content: Any) -> str:
    """A string, or the texts of a list of parts ({"type": "text", "text": ...} or plain strings)."""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    """A number of tokens; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_TOKENS:
        return None
    return int(value)


def error_in(body: dict[str, Any]) -> dict[str, Any] | None:
    """The error that some servers send with HTTP 200, in place of the choices; None where there are choices."""
    error = body.get("error")
    if not error or body.get("choices"):
        return None
    return error if isinstance(error, dict) else {"message": str(error)}


def complaint(error: "APIStatusError") -> str:
    """What the server wrote: OpenAI's message, FastAPI's detail (transformers serve, vLLM), or else the status.

    An error's body may be a list with the error in it (Google's compatible server).
    """
    body: Any = error.body
    if isinstance(body, list):
        body = body[0] if body else None
        body = _mapping(body).get("error", body)
    fields = _mapping(body)
    text = body if isinstance(body, str) else ""
    return str(fields.get("message") or fields.get("detail") or text or error.message)
