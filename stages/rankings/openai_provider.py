"""Rankings from any server that speaks OpenAI's chat completions.

One request per transcript, a bounded number at a time, after the first one alone has taught what the model takes.
Faults of the line (429, 5xx, dropped or stalled connections) are retried with jittered exponential back-off or after
the server's Retry-After; an answer that is no ranking is asked again with the reason; what makes every further request
pointless (bad key, unknown model, no credit) ends the run. Whatever ends it, an interrupt too, what is under way is
awaited, stored and counted. Every reply is stored before the worker asks its next question.

Costs: `max_cost_usd` is never passed, by all runs together. A request starts only if the money spent, the worst cases
of all requests under way and its own fit. Worst case: one token per UTF-8 byte sent (no byte-level tokenizer makes
more) and the full output allowance. It is in the database before the request is sent and is replaced by what the server
says: of a request whose reply got lost (time-out, dropped connection, a killed process) it stays counted.
"""

import asyncio
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.engine.errors import PipelineError
from stages.rankings import replies
from stages.rankings.cache import Answer, Cache
from stages.rankings.chat import Chat, Fault, Messages, Patience, Refused, TooLarge, Verdict, allowance_of, waits
from stages.rankings.server import connect

if TYPE_CHECKING:
    from openai import AsyncOpenAI

CONCURRENCY = 16
SILENT = 2  # transcripts that could not be asked, of a server that has not answered one: it is down
GIVE_UP_AFTER = 20  # transcripts in a row without a ranking: the server or the model is at fault


class _Stopped(Exception):
    """Another worker found a reason to end the run."""


class _Unbilled(Exception):
    """No reply of the model came of the request; `meaning` says what did."""

    def __init__(self, meaning: Exception):
        super().__init__(str(meaning))
        self.meaning = meaning


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


@dataclass
class _Ask:
    """A conversation about one item, and the most output tokens that the server gives to it, where it said so."""

    item: str
    messages: Messages
    allowance: int | None = None


class OpenAI:
    """The provider `openai`. `spent_usd` is what these transcripts cost in earlier runs: the limit is for all of them.

    One object serves one call of `rank`.
    """

    def __init__(
        self,
        chat: Chat,
        cache: Cache,
        *,
        price: tuple[float, float],
        max_cost_usd: float,
        spent_usd: float = 0.0,
        concurrency: int = CONCURRENCY,
        patience: Patience | None = None,
    ):
        self.chat, self.cache = chat, cache
        self.concurrency = concurrency
        self.patience = patience or Patience()
        self.budget = Budget(max_cost_usd, spent_usd, price)
        self.answered = self.tokens_in = self.tokens_out = 0
        self._replies: dict[str, int] = {}  # that are stored already, per transcript
        self._stop: str | None = None
        self._stopped, self._taught = asyncio.Event(), asyncio.Event()
        self._failures_in_a_row, self._heard = 0, False
        self._unasked: list[str] = []  # why, for each transcript that never reached the model

    # ------------------------------------------------------------ the run

    def rank(self, transcripts: Sequence[str]) -> None:
        """Ask for every transcript and store the answers. Raises PipelineError where some were not asked."""
        self._replies = {item: answer.replies for item, answer in self.cache.load(transcripts).items()}
        print(
            f"rank_emotions: {len(transcripts)} transcripts to ask {self.chat.model} at {self.chat.base_url}; "
            f"estimate: {self._estimate(transcripts)}; "
            f"spent before: {self.budget.spent:.4f}, rankings.max_cost_usd: {self.budget.limit:g}",
            flush=True,
        )
        try:
            asyncio.run(self._run(transcripts))
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

    def _estimate(self, transcripts: Sequence[str]) -> str:
        tokens_in, tokens_out = self.chat.estimate(transcripts)
        cost = self.budget.cost(tokens_in, tokens_out)
        return f"{tokens_in} input and {tokens_out} output tokens, {cost:.4f} USD"

    async def _run(self, transcripts: Sequence[str]) -> None:
        from openai import AsyncOpenAI
        from tqdm import tqdm

        with tqdm(total=len(transcripts), desc="rank_emotions", unit="transcript", mininterval=1) as bar:
            async with connect(AsyncOpenAI, self.chat, self.patience.timeout) as client:
                with self._interruptible():
                    # Alone, unless it has to wait: what it teaches need not be learned by 16 at once.
                    queue = iter(transcripts)
                    workers = [asyncio.create_task(self._work(client, queue, bar))]
                    workers[0].add_done_callback(lambda _: self._taught.set())
                    await self._taught.wait()
                    ended: list[BaseException | None] = []
                    try:
                        if len(transcripts) > 1 and self.chat.seen_output and self._stop is None:
                            rest = self._estimate(transcripts[1:])
                            print(f"rank_emotions: after the first answer, estimate for the rest: {rest}", flush=True)
                    except OSError as error:  # nobody reads it any more
                        self._end("interrupted")
                        ended.append(error)
                    others = range(min(self.concurrency, len(transcripts)) - 1)
                    workers += [asyncio.create_task(self._work(client, queue, bar)) for _ in others]
                    ended += await asyncio.gather(*workers, return_exceptions=True)
        for outcome in ended:
            if isinstance(outcome, BaseException):
                raise outcome

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """SIGINT or SIGTERM ends the run after what is under way; a further SIGINT ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) or signal.SIG_DFL for number in signals}

        def restore(number: signal.Signals) -> None:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])

        def interrupted() -> None:
            self._end("interrupted")
            restore(signal.SIGINT)

        for number in signals:
            loop.add_signal_handler(number, interrupted)
        try:
            yield
        finally:
            for number in signals:
                restore(number)

    async def _work(self, client: "AsyncOpenAI", queue: Iterator[str], bar: Any) -> None:
        """Rank transcripts until there is none left or a reason to stop. What is under way then is still awaited."""
        while self._stop is None and (transcript := next(queue, None)) is not None:
            try:
                reason = await self._rank(client, transcript)
                self._taught.set()
                self.answered += not reason
                self._failures_in_a_row = self._failures_in_a_row + 1 if reason else 0
                if self._failures_in_a_row == GIVE_UP_AFTER:
                    self._end(f"{GIVE_UP_AFTER} transcripts in a row without a ranking, the last for {reason}")
                bar.set_postfix_str(f"{self.budget.spent:.4f} USD", refresh=False)
                bar.update()
            except _Stopped:
                return
            except PipelineError as error:
                self._end(str(error))
                return
            except BaseException as error:  # of this program: the others' replies are still stored
                self._end(f"{type(error).__name__}")
                raise

    def _end(self, reason: str) -> None:
        self._stop = self._stop or reason
        self._stopped.set()

    # ------------------------------------------------------------ one transcript

    async def _rank(self, client: "AsyncOpenAI", transcript: str) -> str:
        """Ask until a reply is a ranking, or it had patience.answers replies in all runs; why there is none, or "".

        Raises PipelineError, _Stopped.
        """
        try:
            question = await asyncio.to_thread(self.chat.question, transcript)  # a clip is decoded there
        except Refused as refusal:
            self.cache.append([Answer(transcript, None, reason=str(refusal))])
            return str(refusal)
        before = self._replies.get(transcript, 0)
        ask, reason = _Ask(transcript, question), f"{before} replies before, none of which was a ranking"
        for _ in range(self.patience.answers - before):
            try:
                verdict = await self._request(client, ask)
            except Refused as refusal:
                return str(refusal)
            except Fault as fault:
                self._unasked.append(str(fault))
                if len(self._unasked) == SILENT and not self._heard:
                    self._end(f"no reply to {SILENT} transcripts and none to any before, the last for {fault}")
                return str(fault)
            if verdict.ranking is not None:
                return ""
            reason, ask.messages = verdict.reason, question + verdict.follow_up
        return reason

    # ------------------------------------------------------------ one request

    async def _request(self, client: "AsyncOpenAI", ask: _Ask) -> Verdict:
        """What the reply is worth. Raises Fault after patience.attempts, Refused, PipelineError, _Stopped."""
        from tenacity import AsyncRetrying, retry_if_exception_type

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Fault),
            stop=lambda state: state.attempt_number >= self._attempts(),
            wait=waits(self.patience),
            sleep=self._sleep,
            reraise=True,
        )
        return await retrying(self._attempt, client, ask)

    def _attempts(self) -> int:
        """One fewer, so half the waiting, as long as the server has answered nothing: most likely it is down."""
        return self.patience.attempts if self._heard else max(2, self.patience.attempts - 1)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not past the end of the run."""
        if seconds > 0:
            self._taught.set()
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return

    async def _attempt(self, client: "AsyncOpenAI", ask: _Ask) -> Verdict:
        allowance = self.chat.allowance if ask.allowance is None else min(ask.allowance, self.chat.allowance)
        body = self.chat.body(ask.messages, allowance)
        tokens = self.chat.worst_tokens(body)
        worst = self.budget.cost(*tokens)
        await self.budget.reserve(worst)
        actual = 0.0
        try:
            if self._stop is not None:
                raise _Stopped
            number = self.cache.begin(ask.item, tokens)
            actual = worst  # the worst case stands until the reply says what was used
            try:
                verdict = await self._exchange(client, ask, body)
            except _Unbilled as free:
                actual = 0.0
                refusal = isinstance(free.meaning, Refused)
                self.cache.end(number, Answer(ask.item, None, reason=str(free.meaning)) if refusal else None)
                raise free.meaning from None
            actual = self.budget.cost(*verdict.most)
            self.cache.end(number, verdict.answer(ask.item), verdict.most)
            self.tokens_in += verdict.tokens[0]
            self.tokens_out += verdict.tokens[1]
            return verdict
        finally:
            await self.budget.settle(worst, actual)

    async def _exchange(self, client: "AsyncOpenAI", ask: _Ask, body: dict[str, Any]) -> Verdict:
        """One request and what its reply is worth. Raises _Unbilled for what costs nothing, Fault for a lost reply."""
        import openai

        try:
            raw = await client.chat.completions.with_raw_response.create(**body)
        except openai.APIStatusError as error:
            meaning = self.chat.judge(error, body)
            if isinstance(meaning, TooLarge):
                ask.allowance = meaning.allowance
            raise _Unbilled(meaning) from None
        except openai.APIConnectionError as error:
            fault = Fault(f"{error.message} ({type(error.__cause__).__name__})")
            if type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout"):  # nothing was sent
                raise _Unbilled(fault) from None
            raise fault from None
        if (content := replies.decode(raw.content)) is None:
            raise Fault("a reply that is no JSON")
        self._heard = True
        try:
            return self.chat.read(content, allowance_of(body), lambda: body)
        except Fault as fault:
            raise _Unbilled(fault) from None
