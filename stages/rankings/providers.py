"""Answers to items: from the cache where they were paid for, from params.rankings.provider where not.

An item is a transcript, or for a voice with `input: clip` what clips.item_of names.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.engine.apart import run_apart
from stages.engine.devices import pick_device
from stages.engine.errors import PipelineError
from stages.engine.fingerprint import checkpoint_digest
from stages.engine.manifest import Segment, Source
from stages.engine.params import Params, Rankings
from stages.rankings.cache import MOST_REPLIES, VENDOR, Answer, Cache, Question, giving_up
from stages.rankings.clips import ClipChat, form
from stages.rankings.earlier import earlier_answers
from stages.rankings.voices import FIRST

if TYPE_CHECKING:
    from stages.rankings.openai_batch import Batches
    from stages.rankings.openai_provider import OpenAI


def voices(p: Params) -> dict[str, Params]:
    """The params of each voice as if it were alone, the first one first."""
    further = {name: p.model_copy(update={"rankings": p.rankings.voice(name)}) for name in p.rankings.providers}
    return {FIRST: p} | further


def rank(
    items: Sequence[str], p: Params, clips: Mapping[str, Source] | None = None, spent_elsewhere: float = 0.0
) -> dict[str, Answer]:
    """An answer to each of these distinct items, from the cache or else the provider.

    `clips`: where the clip of each item lies, for `input: clip`. `spent_elsewhere`: USD that other voices cost.
    """
    if p.rankings.provider == "lexicon":
        from stages.rankings.lexicon import Lexicon

        # Not cached: as fast as the cache, and a change of its word list shows at once.
        answers: list[Answer] = []
        Lexicon(p.rankings.model, p.corpus.labels).rank(items, answers.extend)
        return {answer.transcript: answer for answer in answers}
    cache = Cache(question(p))
    known = cache.load(items)
    if unanswered(items, known) or under_way(p, cache):
        with cache.asking() as lock:
            known = cache.load(items)  # another process may have asked while we waited
            wanted = unanswered(items, known)
            if wanted and not under_way(p, cache):
                needed = p.rankings.provider == "openai" and not known
                cache.append(earlier_answers(wanted, cache.question, needed))
                wanted = unanswered(items, cache.load(items))
            if wanted or under_way(p, cache):
                if p.rankings.provider == "openai":
                    before = cache.spent(items, prices(p.rankings)) + spent_elsewhere
                    pay(p, wanted, clips or {}, before, lock.fileno())
                else:
                    transformers(p, wanted, cache, clips or {})
        known = cache.load(items)
    return known


def pay(p: Params, items: Sequence[str], clips: Mapping[str, Source], spent_usd: float, lock: int) -> None:
    """Ask the openai provider, in a process that keeps the lock and stores what is under way should this be killed."""
    sources = {item: asdict(clip) if isinstance(clip, Segment) else str(clip) for item, clip in clips.items()}
    work = {"params": p.model_dump_json(), "items": items, "clips": sources, "spent_usd": spent_usd}
    run_apart("stages.rankings.providers:pay_here", work, lock)


def pay_here(params: str, items: Sequence[str], clips: Mapping[str, Any], spent_usd: float) -> None:
    """What `pay` has done elsewhere."""
    p = Params.model_validate_json(params)
    sources = {item: Segment(**clip) if isinstance(clip, dict) else clip for item, clip in clips.items()}
    openai(p, Cache(question(p)), spent_usd, sources).rank(items)


def spent(items: Sequence[str], p: Params) -> float:
    """USD that these items cost so far."""
    return Cache(question(p)).spent(items, prices(p.rankings)) if p.rankings.provider == "openai" else 0.0


def prices(rankings: Rankings) -> tuple[float, float]:
    return rankings.price_per_million.input, rankings.price_per_million.output


def question(p: Params) -> Question:
    """What these params ask."""
    r = p.rankings
    server = (r.base_url or VENDOR) if r.provider == "openai" else ""
    effort = (r.reasoning_effort or "") if server else ""
    clip = form(r) if r.input == "clip" else ""
    return Question(r.provider, model_identity(r), r.prompt_version, tuple(p.corpus.labels), server, effort, clip)


def under_way(p: Params, cache: Cache) -> bool:
    """Whether batches of an earlier run wait to be collected."""
    return p.rankings.batch and bool(cache.jobs())


def unanswered(items: Sequence[str], known: Mapping[str, Answer]) -> list[str]:
    """What has to be asked: the unknown, and what got no valid answer in fewer than MOST_REPLIES."""
    return [t for t in items if t not in known or (not known[t].ranking and known[t].replies < MOST_REPLIES)]


def model_identity(rankings: Rankings) -> str:
    """What tells this model's answers from another's in the cache."""
    if rankings.provider != "transformers":
        return rankings.model
    files = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in Path(rankings.model).rglob("*"))
    digest = _digest(rankings.model, files)
    return "@".join(filter(None, [rankings.model, rankings.revision, digest, rankings.dtype]))


@lru_cache
def _digest(checkpoint: str, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of a checkpoint folder's content, read once for as long as its files look the same."""
    return checkpoint_digest(checkpoint).hex()[:16]


def openai(p: Params, cache: Cache, spent_usd: float, clips: Mapping[str, Source]) -> "OpenAI | Batches":
    """The openai provider, after a look at the model. Raises PipelineError without a key."""
    from stages.rankings.chat import Chat
    from stages.rankings.openai_batch import Batches
    from stages.rankings.openai_provider import OpenAI
    from stages.rankings.server import look_up

    r = p.rankings
    name = r.api_key_env
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # a key, most likely: not to be repeated
        raise PipelineError("params.yaml: rankings.api_key_env: expected the NAME of an environment variable")
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise PipelineError(f"rankings.api_key_env: the environment variable {name} holds characters that no key has")
    if not key and r.base_url is None:
        raise PipelineError(f"rankings.api_key_env: the environment variable {name} is not set; expected the key in it")
    jobs = cache.jobs()
    if jobs and not r.batch:
        raise PipelineError(
            f"rankings.batch: found false, but {len(jobs)} batches are under way or wait to be collected; "
            f"expected true, or give up what they cost: {giving_up(jobs[0])}"
        )
    key = key or "no-key-needed"  # a server of one's own needs none
    asked = (r.model, p.corpus.labels, r.prompt_version, r.base_url, key)
    options: dict[str, Any] = {"max_output_tokens": r.max_output_tokens, "reasoning_effort": r.reasoning_effort}
    if r.input == "clip":
        chat: Chat = ClipChat(*asked, paths=clips, rankings=r, **options)
    else:
        chat = Chat(*asked, **options)
    look_up(chat)
    kind = Batches if r.batch else OpenAI
    return kind(chat, cache, price=prices(r), max_cost_usd=r.max_cost_usd, spent_usd=spent_usd)


def transformers(p: Params, items: Sequence[str], cache: Cache, clips: Mapping[str, Source]) -> None:
    """Ask the local model, on this machine's device."""
    asked = (p.rankings, p.corpus.labels, pick_device(p.runtime.device))
    if p.rankings.input == "clip":
        from stages.rankings.omni_provider import Omni

        return Omni(*asked, clips).rank(items, cache.append)
    from stages.rankings.transformers_provider import Transformers

    Transformers(*asked).rank(items, cache.append)
