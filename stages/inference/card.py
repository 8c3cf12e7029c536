"""The model card of a release: README.md in Hugging Face's form, from reports/details.json and params alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.engine.errors import PipelineError
from stages.inference.trained import Trained

TEMPLATE = Path(__file__).parent / "card.md.j2"


def read_details(path: Path) -> dict[str, Any]:
    """reports/details.json. Raises PipelineError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"{path}: not found; a release's card shows its figures: make it with: dvc repro") from None
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path}: can't be read ({error}); make it anew with: dvc repro") from None


def render_card(trained: Trained, details: Mapping[str, Any]) -> str:
    """The card as Markdown. Raises PipelineError where the figures are of other models (seeds or folds differ)."""
    import jinja2

    description = json.loads((trained.ensemble / "ensemble.json").read_text(encoding="utf-8"))
    if (details.get("seeds"), details.get("folds")) != (len(description["seeds"]), description["folds"]):
        raise PipelineError(f"reports/details.json: of {details.get('folds')} folds x {details.get('seeds')} seeds, "
                            f"but {trained.ensemble} has {description['folds']} x {len(description['seeds'])}; "
                            f"run dvc repro")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(p=trained.params, modalities=[_modality(trained, name) for name in trained.modalities],
                           figures=details, models=description["folds"] * len(description["seeds"]))


def _modality(trained: Trained, name: str) -> dict[str, Any]:
    """A row of the card's table of encoders."""
    row = trained.params.extractors[name]
    checkpoint = row.options.get("checkpoint")
    return {
        "name": name,
        "encoder": row.encoder,
        "input": row.input,
        "checkpoint": checkpoint,
        "revision": row.options.get("revision"),
        "dtype": row.options.get("dtype"),
        "local": checkpoint is not None and Path(checkpoint).is_dir(),
    }
