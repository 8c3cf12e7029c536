"""The ranking as a modality of its own."""

import numpy as np
import pytest

from stages.encoders.ranking import Config, Encoder
from stages.engine.errors import NO_TRANSCRIPT, PipelineError, Skip

LABELS = ["neutral", "anger", "worry"]


def item(ranking: list[str] | None, transcript: str = "好") -> dict[str, object]:
    return {"transcript": transcript, "ranking": ranking, "reason": None if ranking else "a refusal"}


def test_the_labels_weigh_by_their_rank() -> None:
    encoder = Encoder(Config(labels=LABELS), "cpu")
    vector = encoder.prepare(item(["worry", "neutral", "anger"]))
    assert vector.dtype == np.float32 and vector.shape == (1, encoder.dimension) and encoder.size(vector) == 1
    assert vector[0] == pytest.approx(np.array([1 / 2, 1 / 3, 1]) / (1 + 1 / 2 + 1 / 3))
    wordless = encoder.prepare(item(LABELS, transcript=""))  # seen and heard
    assert wordless[0].argmax() == 0 and encoder.encode([vector, wordless])[1] is wordless


def test_a_clip_without_a_ranking_is_skipped() -> None:
    encoder = Encoder(Config(labels=LABELS), "cpu")
    with pytest.raises(Skip, match="no ranking: a refusal"):
        encoder.prepare(item(None))
    for lacking in ("", item(None, transcript="")):
        with pytest.raises(Skip, match=NO_TRANSCRIPT):
            encoder.prepare(lacking)  # type: ignore[arg-type]


def test_a_row_that_does_not_fit_is_named() -> None:
    encoder = Encoder(Config(labels=LABELS), "cpu")
    with pytest.raises(PipelineError, match="takes input: rankings.jsonl"):
        encoder.prepare("好")
    with pytest.raises(PipelineError, match="found labels .*'worry'.*, expected .*'joy'"):
        encoder.prepare(item(["joy", "neutral", "anger"]))
