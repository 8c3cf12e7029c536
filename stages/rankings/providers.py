"""Answers to transcripts: from the cache where they were paid for, from params.rankings.provider where not."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stages.engine.devices import pick_device
from stages.engine.errors import PipelineError
from stages.engine.fingerprint import checkpoint_digest
from stages.engine.params import Params, Rankings
from stages.rankings.cache import MOST_REPLIES, VENDOR, Answer, Cache, Question, giving_up
from stages.rankings.earlier import earlier_answers
from stages.rankings.takeover import take_over

if TYPE_CHECKING:
    from stages.rankings.openai_batch import Batches
    from stages.rankings.openai_provider import OpenAI
    from stages.rankings.transformers_provider import Transformers


def rank(transcripts: Sequence[str], p: Params) -> dict[str, Answer]:
    """An answer to each of these distinct transcripts, from the cache or else the provider."""
    labels = p.corpus.labels
    if p.rankings.provider == "lexicon":
        from stages.rankings.lexicon import Lexicon

        # Not cached: as fast as the cache, and a change of its word list shows at once.
        answers: list[Answer] = []
        Lexicon(p.rankings.model, labels).rank(transcripts, answers.extend)
        return {answer.transcript: answer for answer in answers}
    cache = Cache(question(p))
    take_over(cache)
    known = cache.load(transcripts)
    if unanswered(transcripts, known) or under_way(p, cache):
        with cache.asking():
            known = cache.load(transcripts)  # another process may have asked while we waited
            wanted = unanswered(transcripts, known)
            if wanted and not under_way(p, cache):
                needed = p.rankings.provider == "openai" and not known
                cache.append(earlier_answers(wanted, cache.question, needed))
                wanted = unanswered(transcripts, cache.load(transcripts))
            if wanted or under_way(p, cache):
                if p.rankings.provider == "openai":
                    openai(p, cache, transcripts).rank(wanted)
                else:
                    transformers(p).rank(wanted, cache.append)
        known = cache.load(transcripts)
    return known


def question(p: Params) -> Question:
    """What these params ask."""
    server = (p.rankings.base_url or VENDOR) if p.rankings.provider == "openai" else ""
    model, labels = model_identity(p.rankings), tuple(p.corpus.labels)
    effort = (p.rankings.reasoning_effort or "") if server else ""
    return Question(p.rankings.provider, model, p.rankings.prompt_version, labels, server, effort)


def under_way(p: Params, cache: Cache) -> bool:
    """Whether batches of an earlier run wait to be collected."""
    return p.rankings.batch and bool(cache.jobs())


def unanswered(transcripts: Sequence[str], known: Mapping[str, Answer]) -> list[str]:
    """What has to be asked: the unknown, and what got no valid answer in fewer than MOST_REPLIES."""
    return [t for t in transcripts if t not in known or (not known[t].ranking and known[t].replies < MOST_REPLIES)]


def model_identity(rankings: Rankings) -> str:
    """What tells this model's answers from another's in the cache."""
    if rankings.provider != "transformers":
        return rankings.model
    digest = checkpoint_digest(rankings.model).hex()[:16]
    return "@".join(filter(None, [rankings.model, rankings.revision, digest, rankings.dtype]))


def openai(p: Params, cache: Cache, transcripts: Sequence[str]) -> "OpenAI | Batches":
    """The openai provider, knowing what these transcripts cost so far. Raises PipelineError without a key."""
    from stages.rankings.chat import Chat
    from stages.rankings.openai_batch import Batches
    from stages.rankings.openai_provider import OpenAI
    from stages.rankings.server import look_up

    rankings, price = p.rankings, (p.rankings.price_per_million.input, p.rankings.price_per_million.output)
    name = rankings.api_key_env
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # a key, most likely: not to be repeated
        raise PipelineError("params.yaml: rankings.api_key_env: expected the NAME of an environment variable")
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise PipelineError(f"rankings.api_key_env: the environment variable {name} holds characters that no key has")
    if not key and rankings.base_url is None:
        raise PipelineError(f"rankings.api_key_env: the environment variable {name} is not set; expected the key in it")
    # a server of one's own needs no key
    key = key or "no-key-needed"
    chat = Chat(
        rankings.model,
        p.corpus.labels,
        rankings.prompt_version,
        rankings.base_url,
        key,
        max_output_tokens=rankings.max_output_tokens,
        reasoning_effort=rankings.reasoning_effort,
    )
    look_up(chat)
    spent = cache.spent(transcripts, price)
    if rankings.batch:
        return Batches(chat, cache, price=price, max_cost_usd=rankings.max_cost_usd, spent_usd=spent)
    if jobs := cache.jobs():
        raise PipelineError(
            f"rankings.batch: found false, but {len(jobs)} batches are under way or wait to be collected; "
            f"expected true, or give up what they cost: {giving_up(jobs[0])}"
        )
    return OpenAI(chat, cache, price=price, max_cost_usd=rankings.max_cost_usd, spent_usd=spent)


def transformers(p: Params) -> "Transformers":
    """The transformers provider on this machine's device."""
    from stages.rankings.transformers_provider import Transformers

    rankings = p.rankings
    return Transformers(
        rankings.model,
        p.corpus.labels,
        rankings.prompt_version,
        revision=rankings.revision,
        dtype=rankings.dtype,
        device=pick_device(p.runtime.device),
    )
