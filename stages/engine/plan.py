"""What the stage plan decided, in data/plan/: one file per medium, row of `extractors` and trained part.

A stage depends on its own file alone, so a row that joins fusion.modalities reruns what it needs and nothing else.
A file says "made", or why its part of the pipeline is left out.
"""

from collections.abc import Mapping
from pathlib import Path

from stages.engine.files import empty_folder, replacing

PLAN = Path("data/plan")
MADE = "made"


def write_plan(left: Mapping[str, str | None]) -> None:
    """name of the file -> why that part is left out, None where it is made."""
    empty_folder(PLAN)
    for name, reason in left.items():
        with replacing(PLAN / name) as file:
            file.write((reason or MADE) + "\n")


def left_out(name: str) -> str | None:
    """Why this part is left out; None where it is made, as all is where no stage has planned."""
    path = PLAN / name
    text = path.read_text(encoding="utf-8").strip() if path.exists() else MADE
    return None if text == MADE else text
