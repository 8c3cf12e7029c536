"""Predictions as one HTML page: every recording's segments on a line of time, and a table of what is known of each.

It holds no script and, by its content security policy, loads nothing: a transcript can neither run nor fetch anything.
Every value is escaped by Jinja.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.corpora.folders import escaped
from stages.engine.manifest import Segment
from stages.inference.predictor import Prediction

TICKS = 10  # on a line of time, about
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200)  # seconds between two
COLORS = ["#6b7280", "#dc2626", "#f59e0b", "#2563eb", "#7c3aed", "#0d9488", "#db2777", "#65a30d", "#0891b2",
          "#92400e"]  # by position among the labels, as in the report


@dataclass(frozen=True)
class Part:
    """One prediction as the page shows it."""

    start: float  # seconds
    end: float
    probabilities: list[float]  # by label; empty without a prediction
    label: str
    transcript: str
    reason: str


@dataclass(frozen=True)
class Recording:
    """One file's predictions in order; `seconds` is where its last segment ends, 0 where the file is one clip."""

    name: str
    seconds: float
    parts: list[Part]

    @property
    def ticks(self) -> list[float]:
        step = next((step for step in STEPS if self.seconds <= TICKS * step), STEPS[-1])
        return [i * step for i in range(int(self.seconds / step) + 1)]

    def shares(self) -> list[tuple[str, float]]:
        """(label, share of the time that has a prediction), largest first."""
        spent: dict[str, float] = {}
        for part in self.parts:
            if part.label:
                spent[part.label] = spent.get(part.label, 0.0) + part.end - part.start
        total = sum(spent.values()) or 1.0
        return sorted(((label, seconds / total) for label, seconds in spent.items()), key=lambda pair: -pair[1])


def recordings(predictions: Sequence[Prediction], labels: Sequence[str]) -> list[Recording]:
    """Predictions by file, in their order."""
    files: dict[str, list[Part]] = {}
    for found in predictions:
        clip = found.clip
        path, start, end = (clip.path, clip.start, clip.end) if isinstance(clip, Segment) else (str(clip), 0.0, 0.0)
        values = [] if found.probabilities is None else found.probabilities.astype(float).tolist()
        label = labels[values.index(max(values))] if values else ""
        files.setdefault(path, []).append(Part(start, end or 0.0, values, label, found.transcript, found.reason))
    return [Recording(escaped(path), max(part.end for part in parts), parts) for path, parts in files.items()]


def clock(seconds: float, digits: int = 0) -> str:
    """83.25 -> 1:23, or 1:23.3 with one digit."""
    minutes, rest = divmod(round(seconds, digits), 60)
    text = f"{rest:0{digits + 3 if digits else 2}.{digits}f}"
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{text}" if hours else f"{minutes}:{text}"


def render_timeline(predictions: Sequence[Prediction], labels: Sequence[str]) -> str:
    """The whole page."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    colors = {label: COLORS[i % len(COLORS)] for i, label in enumerate(labels)}
    return environment.get_template("timeline.html.j2").render(
        recordings=recordings(predictions, labels), labels=labels, colors=colors, clock=clock)
