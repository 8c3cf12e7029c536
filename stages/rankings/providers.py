"""Answers to transcripts: from the cache where they were paid for, from params.rankings.provider where not."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stages.devices import pick_device
from stages.errors import PipelineError
from stages.fingerprint import checkpoint_digest
from stages.params import Params, Rankings
from stages.rankings.cache import Answer, Cache

if TYPE_CHECKING:
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
    cache = Cache(p.rankings.provider, model_identity(p.rankings), p.rankings.prompt_version, labels)
    known = cache.load(transcripts)
    if unanswered(transcripts, known):
        with cache.asking():
            known = cache.load(transcripts)  # another process may have asked while we waited
            wanted = unanswered(transcripts, known)
            if wanted:
                make = openai if p.rankings.provider == "openai" else transformers
                make(p, known).rank(wanted, cache.append)
        known = cache.load(transcripts)
    return known


def unanswered(transcripts: Sequence[str], known: Mapping[str, Answer]) -> list[str]:
    """What has to be asked: the unknown, and what got no valid answer so far."""
    return [t for t in transcripts if t not in known or known[t].ranking is None]


def model_identity(rankings: Rankings) -> str:
    """What tells this model's answers from another's in the cache."""
    if rankings.provider == "openai":
        return rankings.model
    digest = checkpoint_digest(rankings.model).hex()[:16]
    return "@".join(filter(None, [rankings.model, rankings.revision, digest, rankings.dtype]))


def openai(p: Params, known: Mapping[str, Answer]) -> "OpenAI":
    """The openai provider, knowing what these transcripts cost so far. Raises PipelineError without a key."""
    from stages.rankings.openai_provider import OpenAI

    rankings, price = p.rankings, p.rankings.price_per_million
    name = rankings.api_key_env
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # a key, most likely: not to be repeated
        raise PipelineError("params.yaml: rankings.api_key_env: expected the NAME of an environment variable")
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise PipelineError(f"rankings.api_key_env: the environment variable {name} holds characters that no key has")
    if not key and rankings.base_url is None:
        raise PipelineError(f"rankings.api_key_env: the environment variable {name} is not set; expected the key in it")
    spent = sum(a.input_tokens * price.input + a.output_tokens * price.output for a in known.values()) / 1e6
    return OpenAI(
        rankings.model,
        p.corpus.labels,
        rankings.prompt_version,
        base_url=rankings.base_url,
        api_key=key or "no-key-needed",  # a server of one's own
        price=(price.input, price.output),
        max_cost_usd=rankings.max_cost_usd,
        spent_usd=spent,
    )


def transformers(p: Params, known: Mapping[str, Answer]) -> "Transformers":
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
