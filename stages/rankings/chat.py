"""One model behind a server that speaks OpenAI's protocol: how it is asked, what that may cost, what a reply means.

Apart from how requests travel: directly (openai_provider) or in batches (openai_batch). What one reply teaches about
the model (a field that it does not take, how many tokens it thinks) holds for every later request. `api_key` enters no
message and no file: all text that comes from a server passes through `clean`.
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
from stages.rankings import parse, prompt, replies
from stages.rankings.cache import MOST_REPLIES, REQUEST_SECONDS, VENDOR, Answer

if TYPE_CHECKING:
    from openai import APIStatusError
    from tenacity import RetryCallState

OUTPUT_TOKENS = 200  # the first allowance: six labels as JSON take about 40
MAX_OUTPUT_TOKENS = 4096  # rankings.max_output_tokens where nobody says: for a model that thinks first
THINKING_TOKENS = 1000  # of an answer, where the estimate has nothing better to go by [choice]
OVERHEAD_TOKENS = 64  # what a chat template wraps around the messages, for the worst case
LONGEST_RETRY_AFTER = 900.0  # seconds; a server that asks for more ends the run

# Request fields that some servers refuse, and what takes their place. The prompt asks for JSON in words, too.
SUBSTITUTES = {"max_tokens": "max_completion_tokens", "temperature": None, "response_format": None}
REFUSED_FIELD = re.compile(
    r"unsupported (parameter|field)|unrecogni[sz]ed|unknown|unexpected|not supported|extra inputs|not permitted"
    r"|instead",
    re.IGNORECASE,
)
TOO_LARGE = re.compile(
    r"too (large|high|big|long|many)|at most|less than|exceed|maximum|context (length|window)|reduce the length|range",
    re.IGNORECASE,
)

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Patience:
    """How often and how long to try again; seconds. The defaults outlast a rate limit of minutes."""

    attempts: int = 8  # per request, for faults of the line
    answers: int = MOST_REPLIES  # per transcript and in all runs together, for answers that are no ranking
    first_wait: float = 1.0  # doubles with every attempt, with full jitter
    longest_wait: float = 60.0
    timeout: float = REQUEST_SECONDS  # of one request
    first_poll: float = 10.0  # of a batch; grows by half each time
    longest_poll: float = 300.0
    settle: float = 60.0  # how long a batch just created may be missing from the server's list


class Fault(Exception):
    """Of the line or the server: worth another try, after `retry_after` seconds if the server said so."""

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class Learned(Fault):
    """The request was turned down for its form, which the next one has right: worth another try at once."""


class TooLarge(Learned):
    """The request asks for more output than the server gives to it: worth another try with `allowance`."""

    def __init__(self, reason: str, allowance: int):
        super().__init__(reason)
        self.allowance = allowance


class Refused(Exception):
    """The server refuses this request, mostly because of a content filter."""


@dataclass(frozen=True)
class Verdict:
    """What a reply gives: a ranking, or the reason why not and the correction to send.

    `tokens` are input and output as the server counted them, estimated where it does not say; `most` bounds what it can
    have billed.
    """

    ranking: list[str] | None
    reason: str
    tokens: tuple[int, int]
    most: tuple[int, int]
    follow_up: Messages = field(default_factory=list)
    cut_off: bool = False

    def answer(self, item: str, batch: str = "") -> Answer:
        return Answer(item, self.ranking, *self.tokens, self.reason, batch)


class Chat:
    """A model, the labels to rank and the wording; records which request fields the server refuses, and how many
    output tokens an answer needs."""

    def __init__(
        self,
        model: str,
        labels: Sequence[str],
        prompt_version: str,
        base_url: str | None,
        api_key: str,
        *,
        max_output_tokens: int = MAX_OUTPUT_TOKENS,
        reasoning_effort: str | None = None,
    ):
        self.model, self.labels, self.prompt_version = model, list(labels), prompt_version
        self.base_url = base_url or VENDOR
        self.api_key = api_key
        self._fields: dict[str, Any] = {
            "max_tokens": None,
            "temperature": 0,
            "response_format": prompt.response_format(labels),
        }
        self._thinks = reasoning_effort not in (None, "none")
        if reasoning_effort is not None:
            self._fields["reasoning_effort"] = reasoning_effort
        self.most_allowance = max_output_tokens
        self.allowance = max_output_tokens if self._thinks else min(OUTPUT_TOKENS, max_output_tokens)
        self._given = 0  # the largest allowance that the server has taken
        self.seen_output = 0  # output tokens of the last ranking

    # ------------------------------------------------------------ asking

    def question(self, item: str) -> Messages:
        return prompt.messages(item, self.labels, self.prompt_version)

    def fields(self, allowance: int | None = None) -> dict[str, Any]:
        """What a request holds besides model and messages; `allowance` is the most output tokens it may take."""
        allowance = self.allowance if allowance is None else allowance
        return {name: allowance if name.startswith("max_") else value for name, value in self._fields.items()}

    def body(self, messages: Messages, allowance: int | None = None) -> dict[str, Any]:
        return {"model": self.model, "messages": messages} | self.fields(allowance)

    def worst_tokens(self, body: dict[str, Any]) -> tuple[int, int]:
        """Input and output tokens that a request can't pass: no byte-level tokenizer makes more tokens than bytes."""
        return len(json.dumps(body, ensure_ascii=False).encode()) + OVERHEAD_TOKENS, allowance_of(body)

    def guess_tokens(self, messages: Messages) -> int:
        """About how many input tokens these take."""
        return estimate_tokens(messages)

    def estimate(self, items: Sequence[str]) -> tuple[int, int]:
        """About how many input and output tokens these take."""
        return sum(self.guess_tokens(self.question(item)) for item in items), self.estimate_output(items)

    def estimate_output(self, items: Sequence[str]) -> int:
        """As many as the last ranking took, if there was one."""
        answer = estimate_tokens([{"content": json.dumps({"ranking": self.labels})}])
        return len(items) * (self.seen_output or answer + (THINKING_TOKENS if self._thinks else 0))

    # ------------------------------------------------------------ replies

    def read(self, body: dict[str, Any], allowance: int, sent: Callable[[], dict[str, Any]]) -> Verdict:
        """What the body of an HTTP 200 is worth, whatever its shape; `sent` makes the request anew.

        Raises Fault for an error in it that is one of the line.
        """
        if (error := replies.error_in(body)) is not None:
            said, code = self.clean(error.get("message") or error), str(error.get("code"))
            if code.isdigit() and 400 <= int(code) < 500 and int(code) not in (408, 409, 425, 429):
                return Verdict(None, f"a refusal ({said})", (0, 0), (0, 0))
            raise Fault(said)
        reply = replies.read(body)
        tokens_in, tokens_out = most_in, most_out = reply.tokens_in, reply.tokens_out
        if tokens_in is None:
            request = sent()
            tokens_in, (most_in, _) = self.guess_tokens(request["messages"]), self.worst_tokens(request)
        if tokens_out is None:
            tokens_out, most_out = min(allowance, estimate_tokens([{"content": reply.text}])), allowance
        tokens, most = (tokens_in, tokens_out), (most_in or 0, most_out or 0)
        self._given = max(self._given, allowance)

        def invalid(reason: str, follow_up: Messages | None = None, cut_off: bool = False) -> Verdict:
            return Verdict(None, reason, tokens, most, follow_up or [], cut_off)

        if reply.finish == "length":
            self.allowance = max(self.allowance, self.most_allowance)  # for every request from now on
            return invalid(f"an answer that was cut off at {allowance} tokens", cut_off=True)
        if reply.refusal:
            return invalid(f"a refusal ({self.clean(reply.refusal)})")
        try:
            ranking = parse.parse(reply.text, self.labels)
        except parse.InvalidAnswer as fault:
            if reply.fault or reply.finish not in ("", "stop"):
                ended = f"finish_reason {self.clean(reply.finish)}" if reply.finish not in ("", "stop") else ""
                return invalid(f"no answer ({', '.join(filter(None, (reply.fault, ended)))})")
            return invalid(f"an invalid answer ({self.clean(fault)})", prompt.correction(reply.text, str(fault)))
        self.seen_output = max(1, tokens[1])
        return Verdict(ranking, "", tokens, most)

    def judge(self, error: "APIStatusError", sent: dict[str, Any]) -> Exception:
        """What an HTTP error means: a Fault to try again, a Refused transcript, or a PipelineError to end the run."""
        status, said = error.status_code, self.clean(replies.complaint(error))
        if status in (408, 409, 425, 429) or status >= 500:
            retry_after = parse_retry_after(error.response.headers)
            if error.code == "insufficient_quota":
                return PipelineError(f"{self.base_url}: no credit left: {said}")
            if retry_after is not None and retry_after > LONGEST_RETRY_AFTER:
                return PipelineError(f"{self.base_url}: the server asks to wait for {retry_after:.0f} s: {said}")
            return Fault(said, retry_after)
        wrong_model = error.param == "model" or error.code == "model_not_found" or f"'{self.model}'" in said
        if status in (400, 413, 422) and not wrong_model:
            return self._complaint(f"{error.param} {said}", said, sent)
        hints = {401: "the key was not accepted; check the variable that rankings.api_key_env names"}
        if status == 404 or wrong_model:
            hints[status] = f"rankings.model: {self.model} was not found there, or rankings.base_url is wrong"
        return PipelineError(f"{self.base_url}: {hints.get(status, 'the server will not serve this')}: {said}")

    def _complaint(self, text: str, said: str, sent: dict[str, Any]) -> Exception:
        """What a complaint about a request means: of a field, of the allowance's value, or of the transcript."""
        if "reasoning_effort" in sent and "reasoning_effort" in text:
            return PipelineError(f"rankings.reasoning_effort: {self.base_url} does not take it ({said}); set null")
        allowance = allowance_of(sent, 0)
        if allowance and TOO_LARGE.search(text) and not REFUSED_FIELD.search(text):
            if allowance <= OUTPUT_TOKENS:
                return Refused(f"a refusal ({said})")
            smaller = max(OUTPUT_TOKENS, allowance // 4)
            if allowance > self._given:  # too large for the model, not for this request alone
                self.most_allowance, self.allowance = smaller, min(self.allowance, smaller)
                print(f"rank_emotions: {self.base_url} gives no {allowance} output tokens ({said}); asking for "
                      f"{smaller}", file=sys.stderr)
            return TooLarge(said, smaller)
        refused = next((name for name in SUBSTITUTES if name in sent and name in text), None)
        if refused is None:
            return Refused(f"a refusal ({said})")
        self._substitute(refused, said)
        return Learned(said)

    def _substitute(self, refused: str, said: str) -> None:
        if refused not in self._fields:  # another worker's request was refused for it already
            return
        substitute, value = SUBSTITUTES[refused], self._fields.pop(refused)
        if substitute is not None:
            self._fields[substitute] = value
        print(f"rank_emotions: {self.base_url} does not take {refused} ({said}); going on without", file=sys.stderr)

    def clean(self, text: object) -> str:
        """One short line without the key, whatever a server writes."""
        line = " ".join(str(text).split()).replace(self.api_key, "***")
        return re.sub(r"\bsk-[\w*-]+", "***", line)[:300]


def allowance_of(body: dict[str, Any], default: int = OUTPUT_TOKENS) -> int:
    return next((value for name, value in body.items() if name.startswith("max_")), default)


def waits(patience: Patience) -> "Callable[[RetryCallState], float]":
    """For tenacity: the wait before the next attempt, as the server says or else exponential, both with jitter."""
    from tenacity import wait_random_exponential

    backoff = wait_random_exponential(multiplier=patience.first_wait, max=patience.longest_wait)

    def wait(state: "RetryCallState") -> float:
        fault = state.outcome.exception() if state.outcome else None
        if isinstance(fault, Learned):
            return 0.0
        if isinstance(fault, Fault) and fault.retry_after is not None:
            # all workers were given the same moment
            return fault.retry_after + random.uniform(0, patience.first_wait)
        return backoff(state)

    return wait


def estimate_tokens(messages: Sequence[dict[str, Any]]) -> int:
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
