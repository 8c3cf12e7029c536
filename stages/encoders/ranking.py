"""What a ranking says of a clip, as a modality of its own: the labels by likelihood -> (1, L) [choice].

The distribution that a ranking stands for: the label at rank r weighs 1 / r, and all of them 1. The ranking is that of
the first voice, `rankings` itself; with its `input: clip`, of a model that sees and hears.
"""

from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from stages.engine.errors import NO_TRANSCRIPT, PipelineError, Skip


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Config:
    """The keys of an extractors row in params.yaml that name this encoder. There is no checkpoint."""

    labels: Annotated[list[str], Field(min_length=2)]  # those of corpus.labels: the order of the dimensions


class Encoder:
    """dimension: the number of labels. Needs no device."""

    padded, concurrent = True, True
    variance = False  # there is one vector a clip

    def __init__(self, config: Config, device: str) -> None:
        self._labels = config.labels
        self.dimension = len(config.labels)
        self.unit_bytes = self.dimension * 4

    def prepare(self, item: str | dict[str, Any]) -> np.ndarray:
        """{"ranking": labels, most likely first} -> float32 (1, L). Skip where there is none.

        Raises PipelineError for another input, and for labels that are not the corpus's.
        """
        if not item or isinstance(item, dict) and not item["transcript"] and item["ranking"] is None:
            raise Skip(NO_TRANSCRIPT)
        if isinstance(item, str):
            raise PipelineError("extractors: the encoder ranking takes input: rankings.jsonl")
        ranking = item["ranking"]
        if ranking is None:
            raise Skip(f"no ranking: {item['reason']}")
        if sorted(ranking) != sorted(self._labels):
            raise PipelineError(f"extractors: the encoder ranking: found labels {self._labels}, expected {ranking}")
        weights = np.array([1 / (1 + ranking.index(label)) for label in self._labels], np.float32)
        return weights[None] / weights.sum()

    def size(self, prepared: np.ndarray) -> int:
        """Vectors: one."""
        return len(prepared)

    def encode(self, batch: list[np.ndarray]) -> list[np.ndarray]:
        """What prepare made."""
        return batch
