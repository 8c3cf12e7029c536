"""Rankings through OpenAI's Batch API: half the price, within a day (rankings.batch: true).

Per batch: upload the requests, create the batch, poll, download, store the answers. The database knows how far each
batch is, so a process killed between any two steps goes on there and pays for nothing twice.
A batch whose creation was not confirmed is looked for in the server's list, by our key in its metadata, before
another one is created. One transcript is asked directly at first: a wrong key, model or request field shows at once
and not after hours, and so do the tokens that the model thinks. Without a ranking among the first PROBES no batch is
sent. What a batch brings no valid ranking for is asked again directly, with the reason.

Limits: 50,000 requests and 200 MB a batch, and as many enqueued tokens as the account may have: where the server turns
a batch down for that, batches go one at a time, then smaller. `max_cost_usd` holds as in openai_provider: the worst
cases of all batches under way count as spent.
"""

import json
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from stages.engine.errors import PipelineError
from stages.rankings import replies
from stages.rankings.cache import BATCH_DISCOUNT, Answer, Cache, Job, giving_up
from stages.rankings.chat import Chat, Fault, Patience, Refused, Verdict, allowance_of, waits
from stages.rankings.openai_provider import OpenAI
from stages.rankings.server import connect

if TYPE_CHECKING:
    import openai
    from openai.types import Batch

MAX_REQUESTS = 50_000
MAX_BYTES = 200_000_000
POLL_ATTEMPTS = 30  # a wait of hours meets longer faults than one request does
PROBES = 3  # transcripts asked directly until one is ranked
BARREN_BATCHES = 3  # batches in a row without an answer: the next would not bring one either
DAY = 86_400.0
MARK = "mer_job"  # our key in a batch's metadata
OVER = ("completed", "failed", "expired", "cancelled")

T = TypeVar("T")


class Batches:
    """The provider `openai` with rankings.batch. `spent_usd` as in OpenAI; one object serves one call of `rank`."""

    def __init__(
        self,
        chat: Chat,
        cache: Cache,
        *,
        price: tuple[float, float],
        max_cost_usd: float,
        spent_usd: float = 0.0,
        patience: Patience | None = None,
    ):
        self.chat, self.cache = chat, cache
        self.price, self.limit, self.spent = price, max_cost_usd, spent_usd
        self.patience = patience or Patience()
        self.answered = self.tokens_in = self.tokens_out = 0
        self._wanted: set[str] = set()
        self._todo: deque[str] = deque()
        self._jobs: list[Job] = []
        self._invalid: list[str] = []  # what batches brought no ranking for
        self._largest, self._one_at_a_time = MAX_REQUESTS, False
        self._at_once = 0  # batches under way in this round of polls
        self._probed = False  # by direct requests in this run
        self._barren, self._last_fault = 0, "no reason given"
        self._shown: dict[str, str] = {}

    # ------------------------------------------------------------ the run

    def rank(self, transcripts: Sequence[str]) -> None:
        """Ask for every transcript and store the answers. Raises PipelineError where some were not asked."""
        import openai

        self._jobs = self.cache.jobs()
        under_way = {transcript for job in self._jobs for transcript in job.transcripts}
        self._wanted = set(transcripts)  # a batch of an earlier run may hold others: these are stored, not asked again
        self._todo = deque(t for t in transcripts if t not in under_way)
        self._print_estimate()
        try:
            with connect(openai.OpenAI, self.chat, self.patience.timeout) as client:
                while self._todo or self._jobs:
                    if self._probed or self._jobs:
                        self._run_batches(client)
                    else:
                        self._probe()
            if self._invalid:
                self._ask_directly(self._invalid)
        finally:
            print(
                f"rank_emotions: {self.answered} transcripts ranked in batches, {self.tokens_in} input and "
                f"{self.tokens_out} output tokens at half price; {self.spent:.4f} USD spent in all",
                flush=True,
            )

    def _probe(self) -> None:
        """Ask directly until one transcript is ranked: what that teaches holds for the batches."""
        asked = [self._todo.popleft() for _ in range(min(PROBES, len(self._todo)))]
        while asked and not self.chat.seen_output:
            transcript = asked.pop(0)
            self._ask_directly([transcript])
        if not self.chat.seen_output and self._todo:
            reason = self.cache.load([transcript])[transcript].reason
            raise PipelineError(
                f"rankings.batch: none of the first {PROBES} transcripts got a ranking, the last for {reason}; "
                f"no batch was sent"
            )
        self._todo.extendleft(reversed(asked))
        self._probed = True
        if self._todo:
            self._print_estimate()

    def _print_estimate(self) -> None:
        tokens_in, tokens_out = self.chat.estimate(self._todo)
        cost = self._cost(tokens_in, tokens_out)
        print(
            f"rank_emotions: {len(self._todo)} transcripts to ask {self.chat.model} at {self.chat.base_url} in "
            f"batches; estimate: {tokens_in} input and {tokens_out} output tokens, {cost:.4f} USD at half price; "
            f"{len(self._jobs)} batches under way; spent before: {self.spent:.4f}, rankings.max_cost_usd: "
            f"{self.limit:g}",
            flush=True,
        )

    def _cost(self, tokens_in: int, tokens_out: int) -> float:
        """USD, by batch."""
        return BATCH_DISCOUNT * (tokens_in * self.price[0] + tokens_out * self.price[1]) / 1e6

    def _ask_directly(self, transcripts: Sequence[str]) -> None:
        """With no batch under way, whose worst case would have to be left room for."""
        options: dict[str, Any] = {"price": self.price, "max_cost_usd": self.limit, "spent_usd": self.spent}
        provider = OpenAI(self.chat, self.cache, patience=self.patience, **options)
        try:
            provider.rank(transcripts)
        finally:
            self.spent = provider.budget.spent

    def _run_batches(self, client: "openai.OpenAI") -> None:
        """Until no batch is under way or to be made. Raises PipelineError; what is under way then goes on there."""
        try:
            self._loop(client)
        except PipelineError as error:
            rest = f"; {len(self._jobs)} batches go on at the server" if self._jobs else ""
            raise PipelineError(f"{error}{rest}; every answer is kept: run again to go on") from None

    def _loop(self, client: "openai.OpenAI") -> None:
        wait = self.patience.first_poll
        while self._jobs or (self._todo and self._probed):
            while (job := self._next_job()) is not None:
                self._jobs.append(job)
                wait = self.patience.first_poll
            for job in self._jobs:
                self._submit(client, job)
            time.sleep(wait * random.uniform(0.9, 1.1))
            wait = min(1.5 * wait, self.patience.longest_poll)
            self._at_once = len(self._jobs)
            for job in list(self._jobs):
                batch = self._poll(client, job)
                if batch.status in OVER:
                    self._close(client, job, batch)

    # ------------------------------------------------------------ the steps of one batch

    def _next_job(self) -> Job | None:
        """The next batch, on disk; None where there is nothing to ask, or it has to wait for one under way.

        Raises PipelineError where not even one request fits below max_cost_usd.
        """
        if not self._todo or not self._probed or (self._jobs and self._one_at_a_time):
            return None
        room = self.limit - self.spent - sum(job.worst_usd for job in self._jobs) + 1e-9  # rounding
        fields = self.chat.fields()
        chosen: list[str] = []
        size, worst, next_worst = 0, 0.0, 0.0
        while self._todo:
            try:
                body = self._body(self._todo[0], fields)
            except Refused as refusal:
                self.cache.append([Answer(self._todo.popleft(), None, reason=str(refusal))])
                continue
            size += len(self._line(self._todo[0], body))
            next_worst = worst + self._cost(*self.chat.worst_tokens(body))
            if len(chosen) == self._largest or size > MAX_BYTES or next_worst > room:
                break
            worst = next_worst
            chosen.append(self._todo.popleft())
        if not chosen:
            if not self._todo:
                return None
            if self._jobs:
                return None
            raise PipelineError(
                f"rankings.max_cost_usd: found {self.limit:g}, of which {self.spent:.4f} are spent, and the next "
                f"request may cost {next_worst:.4f}; expected a higher limit to go on"
            )
        job = Job(chosen, fields, worst)
        self.cache.save(job)
        return job

    def _body(self, transcript: str, fields: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.chat.model, "messages": self.chat.question(transcript)} | fields

    def _line(self, transcript: str, body: dict[str, Any]) -> bytes:
        """The request as a batch's file has it."""
        request = {"custom_id": self.cache.question.custom_id(transcript), "method": "POST"}
        line = request | {"url": "/v1/chat/completions", "body": body}
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"

    def _submit(self, client: "openai.OpenAI", job: Job) -> None:
        """Upload and create what is not yet, each step in the database before the next."""
        if job.batch_id is None:
            job.batch_id = self._call(lambda: self._create(client, job))
            self.cache.save(job)
            print(f"rank_emotions: batch {job.batch_id} of {len(job.transcripts)} transcripts created", flush=True)

    def _create(self, client: "openai.OpenAI", job: Job) -> str:
        """The id of the job's batch: of one that exists already, whose creation was not confirmed, or of a new one."""
        import openai

        if job.creating is not None and (found := self._find(client, job)) is not None:
            return found
        if job.file_id is None:
            content = b"".join(self._line(item, self._body(item, job.fields)) for item in job.transcripts)
            job.file_id = client.files.create(file=(f"{job.key}.jsonl", content), purpose="batch").id
            self.cache.save(job)
        job.creating = time.time()
        self.cache.save(job)
        try:
            return client.batches.create(
                input_file_id=job.file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={MARK: job.key},
            ).id
        except openai.APIStatusError as error:
            unknown_file = job.file_id in replies.complaint(error)
            if error.status_code < 500:  # it was understood and refused
                job.creating = None
                if unknown_file and time.time() > job.created + DAY:  # expired since
                    job.file_id = None
                self.cache.save(job)
            if unknown_file:  # just uploaded, and not known everywhere at once
                raise Fault(self.chat.clean(replies.complaint(error))) from None
            raise

    def _find(self, client: "openai.OpenAI", job: Job) -> str | None:
        """The id of the batch that carries the job's key, or None once it would have to be in the list."""
        assert job.creating is not None
        while True:
            late = time.time() >= job.creating + self.patience.settle
            for batch in client.batches.list(limit=100):  # the newest first
                if (batch.metadata or {}).get(MARK) == job.key:
                    return batch.id
                if (batch.created_at or job.creating) < job.creating - DAY:
                    break
            if late:
                return None
            time.sleep(min(self.patience.first_poll, self.patience.settle / 2))

    def _poll(self, client: "openai.OpenAI", job: Job) -> "Batch":
        import openai

        def retrieve() -> "Batch":
            assert job.batch_id is not None
            try:
                return client.batches.retrieve(job.batch_id)
            except openai.NotFoundError:
                raise PipelineError(
                    f"{self.chat.base_url} knows no batch {job.batch_id}; set back the key that it was created with, "
                    f"or give up its answers: {giving_up(job)}"
                ) from None

        batch = self._call(retrieve, POLL_ATTEMPTS)
        counts = batch.request_counts
        done, failed, total = (getattr(counts, name, None) for name in ("completed", "failed", "total"))
        news = f"{batch.status}, {(done or 0) + (failed or 0)} of {total}" if total else str(batch.status)
        if self._shown.get(job.key) != news:
            self._shown[job.key] = news
            print(f"rank_emotions: batch {batch.id}: {news}", flush=True)
        return batch

    def _close(self, client: "openai.OpenAI", job: Job, batch: "Batch") -> None:
        """Store what a finished batch brought, and queue what it did not. Raises PipelineError where it was stopped."""
        verdicts = self._collect(client, job, batch)
        answers = [verdict.answer(transcript, batch.id) for transcript, verdict in verdicts.items()]
        self.cache.close(job, answers, [verdict.most for verdict in verdicts.values()])
        self._jobs.remove(job)
        self.spent += sum(self._cost(*verdict.most) for verdict in verdicts.values())
        self.tokens_in += sum(answer.input_tokens for answer in answers)
        self.tokens_out += sum(answer.output_tokens for answer in answers)
        self.answered += sum(answer.ranking is not None for answer in answers)
        self._invalid += [a.transcript for a in answers if a.ranking is None and a.transcript in self._wanted]
        self._todo.extendleft(t for t in reversed(job.transcripts) if t not in verdicts and t in self._wanted)

        errors = (batch.errors and batch.errors.data) or []
        said = self.chat.clean("; ".join(f"{e.code}: {e.message}" for e in errors) or "no reason given")
        if batch.status == "failed" and any(error.code == "token_limit_exceeded" for error in errors):
            if self._at_once == 1:
                if len(job.transcripts) == 1:
                    raise PipelineError(f"rankings.batch: batch {batch.id} failed: {said}")
                self._largest = len(job.transcripts) // 2
            self._one_at_a_time = True
            print(f"rank_emotions: batch {batch.id} is too large for the account now ({said})", flush=True)
        elif batch.status == "failed":
            raise PipelineError(f"rankings.batch: batch {batch.id} failed: {said}")
        elif batch.status == "cancelled":
            raise PipelineError(f"rankings.batch: batch {batch.id} was cancelled; {len(answers)} answers came before")
        else:
            self._barren = 0 if answers else self._barren + 1
            if self._barren == BARREN_BATCHES:
                raise PipelineError(f"rankings.batch: {BARREN_BATCHES} batches in a row brought no answer, the last "
                                    f"({batch.id}, {batch.status}) for: {self._last_fault}")

    def _collect(self, client: "openai.OpenAI", job: Job, batch: "Batch") -> dict[str, Verdict]:
        """What a batch's output and error files hold for each transcript; what was not asked after all is missing."""
        transcript_of = {self.cache.question.custom_id(transcript): transcript for transcript in job.transcripts}
        verdicts: dict[str, Verdict] = {}
        for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
            for line in self._download(client, job, file_id):
                transcript = transcript_of.get(str(line.get("custom_id")))
                verdict = self._verdict(transcript, line, job) if transcript is not None else None
                if transcript is not None and verdict is not None:
                    verdicts.setdefault(transcript, verdict)
        return verdicts

    def _verdict(self, transcript: str, line: dict[str, Any], job: Job) -> Verdict | None:
        """What a line of an output or error file is worth; None where the model was not asked, so may be again."""
        response = line["response"] if isinstance(line.get("response"), dict) else {}
        status, body = response.get("status_code"), response.get("body")
        body = body if isinstance(body, dict) else {}
        if status == 200 and body:
            try:
                return self.chat.read(body, allowance_of(job.fields), lambda: self._sent(transcript, job.fields))
            except Fault as fault:
                self._last_fault = str(fault)
                return None
        error = line.get("error") or body.get("error")
        said = error.get("message") or error.get("code") if isinstance(error, dict) else error
        self._last_fault = self.chat.clean(said or f"status {status}")
        return Verdict(None, f"a refusal ({self._last_fault})", (0, 0), (0, 0)) if status in (400, 413, 422) else None

    def _sent(self, transcript: str, fields: dict[str, Any]) -> dict[str, Any]:
        """The request as it was sent; without its messages where the clip is not there any more."""
        try:
            return self._body(transcript, fields)
        except Refused:
            return {"messages": []} | fields

    def _download(self, client: "openai.OpenAI", job: Job, file_id: str) -> list[dict[str, Any]]:
        import openai

        def lines() -> list[dict[str, Any]]:
            try:
                content = client.files.content(file_id).content
            except openai.NotFoundError:
                raise PipelineError(
                    f"{self.chat.base_url}: the server has deleted the answers of batch {job.batch_id} ({file_id}); "
                    f"to ask for them again: {giving_up(job)}"
                ) from None
            rows = [json.loads(line) for line in content.split(b"\n") if line.strip()]
            return [row for row in rows if isinstance(row, dict)]

        return self._call(lines, POLL_ATTEMPTS)

    # ------------------------------------------------------------ one call of the API

    def _call(self, call: Callable[[], T], attempts: int | None = None) -> T:
        """What `call` returns, trying again as patience says. Raises PipelineError."""
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

        retrying = Retrying(
            retry=retry_if_exception_type(Fault),
            stop=stop_after_attempt(attempts or self.patience.attempts),
            wait=waits(self.patience),
            reraise=True,
        )
        try:
            return retrying(self._attempt, call)
        except (Fault, Refused) as error:
            raise PipelineError(f"{self.chat.base_url}: {error}") from None

    def _attempt(self, call: Callable[[], T]) -> T:
        import openai

        try:
            return call()
        except openai.NotFoundError as error:
            said = self.chat.clean(replies.complaint(error))
            raise PipelineError(f"rankings.batch: {self.chat.base_url} has no Batch API ({said}); set false") from None
        except openai.APIStatusError as error:
            raise self.chat.judge(error, {}) from None
        except openai.APIConnectionError as error:
            raise Fault(f"{error.message} ({type(error.__cause__).__name__})") from None
        except (openai.APIResponseValidationError, json.JSONDecodeError):
            raise Fault("a reply that is no JSON") from None
