"""One model behind a server that speaks OpenAI's protocol: how it is asked, what that may cost, what a reply means.

Apart from how requests travel: directly (openai_provider) or in batches (openai_batch). `api_key` enters no message and
no file: all text that comes from a server passes through `clean`.
"""

import email.utils
import json
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stages.engine.errors import PipelineError
from stages.rankings import prompt
from stages.rankings.cache import VENDOR

if TYPE_CHECKING:
    from openai import APIStatusError
    from openai.types.chat import ChatCompletion
    from tenacity import RetryCallState

OUTPUT_TOKENS = 200  # six labels as JSON take about 40
LONG_OUTPUT_TOKENS = 4096  # after an answer was cut off: a model that thinks aloud first
OVERHEAD_TOKENS = 64  # what a chat template wraps around the messages, for the worst case
LONGEST_RETRY_AFTER = 900.0  # seconds; a server that asks for more ends the run

# Request fields that some servers refuse, and what takes their place. The prompt asks for JSON in words, too.
SUBSTITUTES = {"max_tokens": "max_completion_tokens", "temperature": None, "response_format": None}

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Patience:
    """How often and how long to try again; seconds. The defaults outlast a rate limit of minutes."""

    attempts: int = 8  # per request, for faults of the line
    answers: int = 3  # per transcript, for answers that are no ranking
    first_wait: float = 1.0  # doubles with every attempt, with full jitter
    longest_wait: float = 60.0
    timeout: float = 120.0  # of one request
    first_poll: float = 10.0  # of a batch; grows by half each time
    longest_poll: float = 300.0
    settle: float = 60.0  # how long a batch just created may be missing from the server's list


class Fault(Exception):
    """Of the line or the server: worth another try, after `retry_after` seconds if the server said so."""

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class Refused(Exception):
    """The server will not have this very request: a content filter, mostly."""


@dataclass(frozen=True)
class Verdict:
    """What a reply is worth: a ranking, or why not and what to say when asking again."""

    ranking: list[str] | None
    reason: str = ""
    follow_up: Messages = field(default_factory=list)
    cut_off: bool = False


class Chat:
    """A model, the labels to rank and the wording; learns which request fields the server does not take."""

    def __init__(self, model: str, labels: Sequence[str], prompt_version: str, base_url: str | None, api_key: str):
        self.model, self.labels, self.prompt_version = model, list(labels), prompt_version
        self.base_url = base_url or VENDOR
        self.api_key = api_key
        self._fields: dict[str, Any] = {
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            "response_format": prompt.response_format(labels),
        }

    # ------------------------------------------------------------ asking

    def question(self, transcript: str) -> Messages:
        return prompt.messages(transcript, self.labels, self.prompt_version)

    def fields(self, allowance: int = OUTPUT_TOKENS) -> dict[str, Any]:
        """What a request holds besides model and messages; `allowance` is the most output tokens it may take."""
        return {name: allowance if name.startswith("max_") else value for name, value in self._fields.items()}

    def body(self, messages: Messages, allowance: int = OUTPUT_TOKENS) -> dict[str, Any]:
        return {"model": self.model, "messages": messages} | self.fields(allowance)

    def worst_tokens(self, body: dict[str, Any]) -> tuple[int, int]:
        """Input and output tokens that a request can't pass: no byte-level tokenizer makes more tokens than bytes."""
        allowance = next(value for name, value in body.items() if name.startswith("max_"))
        return len(json.dumps(body, ensure_ascii=False).encode()) + OVERHEAD_TOKENS, allowance

    def estimate(self, transcripts: Sequence[str]) -> tuple[int, int]:
        """About how many input and output tokens these transcripts take."""
        answer = estimate_tokens([{"content": json.dumps({"ranking": self.labels})}])
        return sum(estimate_tokens(self.question(t)) for t in transcripts), len(transcripts) * answer

    # ------------------------------------------------------------ replies

    def usage(self, reply: "ChatCompletion", messages: Messages) -> tuple[int, int]:
        """Input and output tokens as the server counted them, estimated where it does not say."""
        if reply.usage is not None:
            return reply.usage.prompt_tokens, reply.usage.completion_tokens
        return estimate_tokens(messages), estimate_tokens([{"content": reply.choices[0].message.content or ""}])

    def read(self, reply: "ChatCompletion", allowance: int = OUTPUT_TOKENS) -> Verdict:
        """The ranking in a reply that has a choice, or the reason why there is none."""
        choice = reply.choices[0]
        if choice.finish_reason == "length":
            return Verdict(None, f"an answer that was cut off at {allowance} tokens", cut_off=True)
        refusal = getattr(choice.message, "refusal", None)
        if choice.finish_reason == "content_filter" or refusal:
            return Verdict(None, f"a refusal ({self.clean(refusal or 'content filter')})")
        content = choice.message.content or ""
        try:
            return Verdict(prompt.parse(content, self.labels))
        except prompt.InvalidAnswer as invalid:
            reason = f"an invalid answer ({self.clean(invalid)})"
            return Verdict(None, reason, prompt.correction(content, str(invalid)))

    def judge(self, error: "APIStatusError", sent: dict[str, Any]) -> Exception:
        """What an HTTP error means: a Fault to try again, a Refused transcript, or a PipelineError to end the run."""
        status, said = error.status_code, self.clean(complaint(error))
        if status in (408, 409, 425, 429) or status >= 500:
            retry_after = parse_retry_after(error.response.headers)
            if error.code == "insufficient_quota":
                return PipelineError(f"{self.base_url}: no credit left: {said}")
            if retry_after is not None and retry_after > LONGEST_RETRY_AFTER:
                return PipelineError(f"{self.base_url}: the server asks to wait for {retry_after:.0f} s: {said}")
            return Fault(said, retry_after)
        wrong_model = error.param == "model" or error.code == "model_not_found" or f"'{self.model}'" in said
        if status in (400, 422) and not wrong_model:
            refused = next((name for name in SUBSTITUTES if name in sent and name in f"{error.param} {said}"), None)
            if refused is None:
                return Refused(f"a refusal ({said})")
            self._substitute(refused, said)
            return Fault(said, retry_after=0.0)
        hints = {401: "the key was not accepted; check the variable that rankings.api_key_env names"}
        if status == 404 or wrong_model:
            hints[status] = f"rankings.model: {self.model} was not found there, or rankings.base_url is wrong"
        return PipelineError(f"{self.base_url}: {hints.get(status, 'the server will not serve this')}: {said}")

    def _substitute(self, refused: str, said: str) -> None:
        if refused not in self._fields:  # another worker's request taught us already
            return
        substitute, value = SUBSTITUTES[refused], self._fields.pop(refused)
        if substitute is not None:
            self._fields[substitute] = value
        print(f"rank_emotions: {self.base_url} does not take {refused} ({said}); going on without", file=sys.stderr)

    def clean(self, text: object) -> str:
        """One short line without the key, whatever a server writes."""
        line = " ".join(str(text).split()).replace(self.api_key, "***")
        return re.sub(r"\bsk-[\w*-]+", "***", line)[:300]


def complaint(error: "APIStatusError") -> str:
    """What the server wrote: OpenAI's message, FastAPI's detail (transformers serve, vLLM), or else the status."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or body.get("detail") or error.message)


def waits(patience: Patience) -> "Callable[[RetryCallState], float]":
    """For tenacity: the wait before the next attempt, as the server says or else exponential, both with jitter."""
    from tenacity import wait_random_exponential

    backoff = wait_random_exponential(multiplier=patience.first_wait, max=patience.longest_wait)

    def wait(state: "RetryCallState") -> float:
        fault = state.outcome.exception() if state.outcome else None
        if isinstance(fault, Fault) and fault.retry_after is not None:
            return fault.retry_after + random.uniform(0, patience.first_wait)  # all workers were told the same moment
        return backoff(state)

    return wait


def estimate_tokens(messages: Sequence[dict[str, str]]) -> int:
    """About how many tokens a chat takes: one per Chinese character, one per four others, four per message."""
    text = "".join(message["content"] for message in messages)
    wide = sum(ord(character) >= 0x2E80 for character in text)
    return wide + (len(text) - wide + 3) // 4 + 4 * len(messages)


def parse_retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait: Retry-After-Ms, Retry-After in seconds, or as an HTTP date (RFC 9110)."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return None
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
