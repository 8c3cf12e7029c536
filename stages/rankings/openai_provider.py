"""Rankings from any server that speaks OpenAI's chat completions.

One request per transcript, a bounded number at a time. Faults of the line (429, 5xx, dropped or stalled connections)
are retried with jittered exponential back-off or after the server's Retry-After; an answer that is no ranking is asked
again with the reason; what makes every further request pointless (bad key, unknown model, no credit) stops at once.
Every answer is handed to `record`, which stores it, before the worker asks its next question.

Costs: `max_cost_usd` is never passed. A request starts only if the money spent, the worst cases of all requests under
way and its own fit. Worst case: one token per UTF-8 byte sent (no byte-level tokenizer makes more) and the full output
allowance. A request whose answer got lost (time-out, dropped connection) counts with its worst case: it may be billed.
"""

import asyncio
import email.utils
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.errors import PipelineError
from stages.rankings import prompt
from stages.rankings.cache import Answer

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI
    from openai.types.chat import ChatCompletion
    from tenacity import RetryCallState

VENDOR = "https://api.openai.com/v1"
CONCURRENCY = 16
OUTPUT_TOKENS = 200  # six labels as JSON take about 40
LONG_OUTPUT_TOKENS = 4096  # after an answer was cut off: a model that thinks aloud first
OVERHEAD_TOKENS = 64  # what a chat template wraps around the messages, for the worst case
LONGEST_RETRY_AFTER = 900.0  # seconds; a server that asks for more has closed for the day
GIVE_UP_AFTER = 20  # transcripts in a row without a ranking: not they are at fault, but server or model

# Request fields that some servers refuse, and what takes their place. The prompt asks for JSON in words, too.
SUBSTITUTES = {"max_tokens": "max_completion_tokens", "temperature": None, "response_format": None}


@dataclass(frozen=True)
class Patience:
    """How long to insist; seconds. The defaults ride out a rate limit of minutes."""

    attempts: int = 8  # per request, for faults of the line
    answers: int = 3  # per transcript, for answers that are no ranking
    first_wait: float = 1.0  # doubles with every attempt, with full jitter
    longest_wait: float = 60.0
    timeout: float = 120.0  # of one request


class _Fault(Exception):
    """Of the line or the server: worth another try, after `retry_after` seconds if the server said so."""

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class _Refused(Exception):
    """The server will not have this very request: a content filter, mostly."""


class _Stopped(Exception):
    """Another worker found a reason to end the run."""


class Budget:
    """Money spent, and reserved for requests under way; USD. `price` is per million input and output tokens."""

    def __init__(self, limit: float, spent: float, price: tuple[float, float]):
        self.limit, self.spent, self.price = limit, spent, price
        self._reserved = 0.0
        self._under_way = 0
        self._settled = asyncio.Condition()

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.price[0] + tokens_out * self.price[1]) / 1e6

    async def reserve(self, worst: float) -> None:
        """Wait until the request's worst case fits. Raises PipelineError where it does not with none under way."""
        async with self._settled:
            await self._settled.wait_for(lambda: self._fits(worst) or not self._under_way)
            if not self._fits(worst):
                raise PipelineError(
                    f"rankings.max_cost_usd: found {self.limit:g}, of which {self.spent:.4f} are spent, and the next "
                    f"request may cost {worst:.4f}; expected a higher limit to go on"
                )
            self._reserved += worst
            self._under_way += 1

    async def settle(self, worst: float, actual: float) -> None:
        """Turn a reservation into what the request did cost."""
        async with self._settled:
            self._reserved -= worst
            self._under_way -= 1
            self.spent += actual
            self._settled.notify_all()

    def _fits(self, worst: float) -> bool:
        return self.spent + self._reserved + worst <= self.limit + 1e-9  # rounding


class OpenAI:
    """The provider `openai`. `spent_usd` is what these transcripts cost in earlier runs: the limit is for all of them.

    `api_key` enters no message and no file: all text that comes from a server passes through `_clean`.
    """

    def __init__(
        self,
        model: str,
        labels: Sequence[str],
        prompt_version: str,
        *,
        base_url: str | None,
        api_key: str,
        price: tuple[float, float],
        max_cost_usd: float,
        spent_usd: float = 0.0,
        concurrency: int = CONCURRENCY,
        patience: Patience | None = None,
    ):
        self.model, self.labels, self.prompt_version = model, list(labels), prompt_version
        self.base_url = base_url or VENDOR
        self.concurrency = concurrency
        self.patience = patience or Patience()
        self.budget = Budget(max_cost_usd, spent_usd, price)
        self.answered = self.tokens_in = self.tokens_out = 0
        self._api_key = api_key
        self._fields: dict[str, Any] = {
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            "response_format": prompt.response_format(labels),
        }
        self._stop: str | None = None
        self._stopped = asyncio.Event()
        self._failures_in_a_row = 0
        self._unasked: list[str] = []  # why, for each transcript that never reached the model

    # ------------------------------------------------------------ the run

    def rank(self, transcripts: Sequence[str], record: Callable[[Sequence[Answer]], None]) -> None:
        """Ask for every transcript. Raises PipelineError where some were not asked; `record` got the others."""
        self._print_estimate(transcripts)
        try:
            asyncio.run(self._run(transcripts, record))
        finally:
            print(
                f"rank_emotions: {self.answered} of {len(transcripts)} transcripts ranked, {self.tokens_in} input and "
                f"{self.tokens_out} output tokens; {self.budget.spent:.4f} USD spent in all",
                flush=True,
            )
        if self._stop is None and self._unasked:
            self._stop = f"{len(self._unasked)} transcripts could not be asked, the last for {self._unasked[-1]}"
        if self._stop is not None:
            raise PipelineError(
                f"{self._stop}; {self.answered} of {len(transcripts)} transcripts were ranked now, "
                "and every answer is kept: run again to ask only for the rest"
            )

    def _print_estimate(self, transcripts: Sequence[str]) -> None:
        tokens_in = sum(estimate_tokens(prompt.messages(t, self.labels, self.prompt_version)) for t in transcripts)
        tokens_out = len(transcripts) * estimate_tokens([{"content": json.dumps({"ranking": self.labels})}])
        print(
            f"rank_emotions: {len(transcripts)} transcripts to ask {self.model} at {self.base_url}; estimate: "
            f"{tokens_in} input and {tokens_out} output tokens, {self.budget.cost(tokens_in, tokens_out):.4f} USD; "
            f"spent before: {self.budget.spent:.4f}, rankings.max_cost_usd: {self.budget.limit:g}",
            flush=True,
        )

    async def _run(self, transcripts: Sequence[str], record: Callable[[Sequence[Answer]], None]) -> None:
        from openai import AsyncOpenAI
        from tqdm import tqdm

        queue = iter(transcripts)
        workers = min(self.concurrency, len(transcripts))
        # The SDK's own retries are off: they would go past the budget, and past a Retry-After of over two minutes.
        client = AsyncOpenAI(
            api_key=self._api_key, base_url=self.base_url, timeout=self.patience.timeout, max_retries=0
        )
        with tqdm(total=len(transcripts), desc="rank_emotions", unit="transcript", mininterval=1) as bar:
            async with client:
                await asyncio.gather(*(self._work(client, queue, record, bar) for _ in range(workers)))

    async def _work(
        self,
        client: "AsyncOpenAI",
        queue: Iterator[str],
        record: Callable[[Sequence[Answer]], None],
        bar: Any,
    ) -> None:
        """Rank transcripts until there is none left or a reason to stop. What is under way then is still awaited."""
        while self._stop is None and (transcript := next(queue, None)) is not None:
            try:
                answer = await self._rank(client, transcript)
                record([answer])
            except _Stopped:
                return
            except PipelineError as error:
                self._end(str(error))
                return
            self.tokens_in += answer.input_tokens
            self.tokens_out += answer.output_tokens
            self.answered += answer.ranking is not None
            self._failures_in_a_row = 0 if answer.ranking else self._failures_in_a_row + 1
            if self._failures_in_a_row == GIVE_UP_AFTER:
                self._end(f"{GIVE_UP_AFTER} transcripts in a row without a ranking, the last for {answer.reason}")
            bar.set_postfix_str(f"{self.budget.spent:.4f} USD", refresh=False)
            bar.update()

    def _end(self, reason: str) -> None:
        self._stop = self._stop or reason
        self._stopped.set()

    # ------------------------------------------------------------ one transcript

    async def _rank(self, client: "AsyncOpenAI", transcript: str) -> Answer:
        """Ask until the answer is a ranking, or patience.answers times. Raises PipelineError, _Stopped."""
        question = messages = prompt.messages(transcript, self.labels, self.prompt_version)
        allowance, tokens_in, tokens_out, reason = OUTPUT_TOKENS, 0, 0, ""
        for _ in range(self.patience.answers):
            try:
                reply = await self._request(client, messages, allowance)
            except _Refused as refusal:
                reason = str(refusal)
                break
            except _Fault as fault:
                reason = str(fault)
                self._unasked.append(reason)
                break
            used = self._usage(reply, messages)
            tokens_in, tokens_out = tokens_in + used[0], tokens_out + used[1]
            choice = reply.choices[0]
            if choice.finish_reason == "length":
                reason = f"an answer that was cut off at {allowance} tokens"
                allowance, messages = LONG_OUTPUT_TOKENS, question
            elif choice.finish_reason == "content_filter" or choice.message.refusal:
                reason = f"a refusal ({self._clean(choice.message.refusal or 'content filter')})"
                messages = question
            else:
                content = choice.message.content or ""
                try:
                    return Answer(transcript, prompt.parse(content, self.labels), tokens_in, tokens_out)
                except prompt.InvalidAnswer as invalid:
                    reason = f"an invalid answer ({self._clean(invalid)})"
                    messages = question + prompt.correction(content, str(invalid))
        return Answer(transcript, None, tokens_in, tokens_out, reason)

    def _usage(self, reply: "ChatCompletion", messages: list[dict[str, str]]) -> tuple[int, int]:
        """Input and output tokens as the server counted them, estimated where it does not say."""
        if reply.usage is not None:
            return reply.usage.prompt_tokens, reply.usage.completion_tokens
        return estimate_tokens(messages), estimate_tokens([{"content": reply.choices[0].message.content or ""}])

    # ------------------------------------------------------------ one request

    async def _request(self, client: "AsyncOpenAI", messages: list[dict[str, str]], allowance: int) -> "ChatCompletion":
        """A reply with a choice. Raises _Fault after patience.attempts, _Refused, PipelineError, _Stopped."""
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

        backoff = wait_random_exponential(multiplier=self.patience.first_wait, max=self.patience.longest_wait)

        def wait(state: "RetryCallState") -> float:
            fault = state.outcome.exception() if state.outcome else None
            if isinstance(fault, _Fault) and fault.retry_after is not None:
                # Jitter on top: all workers were told the same moment.
                return fault.retry_after + random.uniform(0, self.patience.first_wait)
            return backoff(state)

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Fault),
            stop=stop_after_attempt(self.patience.attempts),
            wait=wait,
            sleep=self._sleep,
            reraise=True,
        )
        return await retrying(self._attempt, client, messages, allowance)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not past the end of the run."""
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return

    async def _attempt(self, client: "AsyncOpenAI", messages: list[dict[str, str]], allowance: int) -> "ChatCompletion":
        import openai

        fields = {name: allowance if name.startswith("max_") else value for name, value in self._fields.items()}
        sent = json.dumps([messages, fields], ensure_ascii=False).encode()
        worst = self.budget.cost(len(sent) + OVERHEAD_TOKENS, allowance)
        await self.budget.reserve(worst)
        actual = 0.0
        try:
            if self._stop is not None:
                raise _Stopped
            actual = worst  # until we know better
            reply = await client.chat.completions.create(model=self.model, messages=messages, **fields)  # type: ignore
            if not getattr(reply, "choices", None):
                raise _Fault("a reply that is no chat completion")
            if reply.usage is not None:
                actual = self.budget.cost(reply.usage.prompt_tokens, reply.usage.completion_tokens)
            return reply
        except openai.APIStatusError as error:
            actual = 0.0
            raise self._judge(error, fields) from None
        except openai.APIConnectionError as error:
            if type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout"):
                actual = 0.0  # nothing was sent
            raise _Fault(f"{error.message} ({type(error.__cause__).__name__})") from None
        except (openai.APIResponseValidationError, json.JSONDecodeError):
            raise _Fault("a reply that is no JSON") from None
        finally:
            await self.budget.settle(worst, actual)

    def _judge(self, error: "APIStatusError", sent: dict[str, Any]) -> Exception:
        """What an HTTP error means: try again, give this transcript up, or end the run."""
        status, said = error.status_code, self._clean(error.message)
        if status in (408, 409, 425, 429) or status >= 500:
            retry_after = parse_retry_after(error.response.headers)
            if error.code == "insufficient_quota":
                return PipelineError(f"{self.base_url}: no credit left: {said}")
            if retry_after is not None and retry_after > LONGEST_RETRY_AFTER:
                return PipelineError(f"{self.base_url}: the server asks to wait for {retry_after:.0f} s: {said}")
            return _Fault(said, retry_after)
        if status in (400, 422):
            refused = next((name for name in SUBSTITUTES if name in sent and name in f"{error.param} {said}"), None)
            if refused is None:
                return _Refused(f"a refusal ({said})")
            substitute = SUBSTITUTES[refused]
            if refused in self._fields and substitute is not None:
                self._fields[substitute] = self._fields[refused]
            self._fields.pop(refused, None)
            return _Fault(said, retry_after=0.0)
        hints = {
            401: "the key was not accepted; check the variable that rankings.api_key_env names",
            404: f"rankings.model: {self.model} was not found there, or rankings.base_url is wrong",
        }
        return PipelineError(f"{self.base_url}: {hints.get(status, 'the server will not serve this')}: {said}")

    def _clean(self, text: object) -> str:
        """One short line without the key, whatever a server writes."""
        line = " ".join(str(text).split()).replace(self._api_key, "***")
        return re.sub(r"\bsk-[\w*-]+", "***", line)[:300]


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
