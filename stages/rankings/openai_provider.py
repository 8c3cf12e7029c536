"""Rankings from any server that speaks OpenAI's chat completions.

One request per transcript, a bounded number at a time. Faults of the line (429, 5xx, dropped or stalled connections)
are retried with jittered exponential back-off or after the server's Retry-After; an answer that is no ranking is asked
again with the reason; what makes every further request pointless (bad key, unknown model, no credit) stops at once.
Every answer is handed to `record`, which stores it, before the worker asks its next question.

Costs: `max_cost_usd` is never passed. A request starts only if the money spent, the worst cases of all requests under
way and its own fit. Worst case: one token per UTF-8 byte sent (no byte-level tokenizer makes more) and the full output
allowance. A request whose answer got lost (time-out, dropped connection) counts with its worst case: it may be billed.
Of what a killed process had under way (CONCURRENCY requests at most) nothing is known: it may be billed, is not counted
and is asked again.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stages.engine.errors import PipelineError
from stages.rankings.cache import Answer
from stages.rankings.chat import LONG_OUTPUT_TOKENS, OUTPUT_TOKENS, Chat, Fault, Messages, Patience, Refused, waits

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion

CONCURRENCY = 16
GIVE_UP_AFTER = 20  # transcripts in a row without a ranking: not they are at fault, but server or model


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

    One object serves one call of `rank`.
    """

    def __init__(
        self,
        chat: Chat,
        *,
        price: tuple[float, float],
        max_cost_usd: float,
        spent_usd: float = 0.0,
        concurrency: int = CONCURRENCY,
        patience: Patience | None = None,
    ):
        self.chat = chat
        self.concurrency = concurrency
        self.patience = patience or Patience()
        self.budget = Budget(max_cost_usd, spent_usd, price)
        self.answered = self.tokens_in = self.tokens_out = 0
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
        tokens_in, tokens_out = self.chat.estimate(transcripts)
        cost = self.budget.cost(tokens_in, tokens_out)
        print(
            f"rank_emotions: {len(transcripts)} transcripts to ask {self.chat.model} at {self.chat.base_url}; "
            f"estimate: {tokens_in} input and {tokens_out} output tokens, {cost:.4f} USD; "
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
            api_key=self.chat.api_key, base_url=self.chat.base_url, timeout=self.patience.timeout, max_retries=0
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
        question = messages = self.chat.question(transcript)
        allowance, tokens_in, tokens_out, reason = OUTPUT_TOKENS, 0, 0, ""
        for _ in range(self.patience.answers):
            try:
                reply = await self._request(client, messages, allowance)
            except Refused as refusal:
                reason = str(refusal)
                break
            except Fault as fault:
                reason = str(fault)
                self._unasked.append(reason)
                break
            used = self.chat.usage(reply, messages)
            tokens_in, tokens_out = tokens_in + used[0], tokens_out + used[1]
            verdict = self.chat.read(reply, allowance)
            if verdict.ranking is not None:
                return Answer(transcript, verdict.ranking, tokens_in, tokens_out)
            reason, messages = verdict.reason, question + verdict.follow_up
            if verdict.cut_off:
                allowance = LONG_OUTPUT_TOKENS
        return Answer(transcript, None, tokens_in, tokens_out, reason)

    # ------------------------------------------------------------ one request

    async def _request(self, client: "AsyncOpenAI", messages: Messages, allowance: int) -> "ChatCompletion":
        """A reply with a choice. Raises Fault after patience.attempts, Refused, PipelineError, _Stopped."""
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Fault),
            stop=stop_after_attempt(self.patience.attempts),
            wait=waits(self.patience),
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

    async def _attempt(self, client: "AsyncOpenAI", messages: Messages, allowance: int) -> "ChatCompletion":
        import openai

        body = self.chat.body(messages, allowance)
        worst = self.budget.cost(*self.chat.worst_tokens(body))
        await self.budget.reserve(worst)
        actual = 0.0
        try:
            if self._stop is not None:
                raise _Stopped
            actual = worst  # until we know better
            reply = await client.chat.completions.create(**body)
            if not getattr(reply, "choices", None):
                raise Fault("a reply that is no chat completion")
            if reply.usage is not None:
                actual = self.budget.cost(reply.usage.prompt_tokens, reply.usage.completion_tokens)
            return reply
        except openai.APIStatusError as error:
            actual = 0.0
            raise self.chat.judge(error, body) from None
        except openai.APIConnectionError as error:
            if type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout"):
                actual = 0.0  # nothing was sent
            raise Fault(f"{error.message} ({type(error.__cause__).__name__})") from None
        except (openai.APIResponseValidationError, json.JSONDecodeError):
            raise Fault("a reply that is no JSON") from None
        finally:
            await self.budget.settle(worst, actual)
