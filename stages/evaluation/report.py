"""reports/report.html: one page with everything in it, readable offline and safe to open.

Vega, Vega-Lite and Vega-Embed are inlined once from vl-convert; specifications are JSON in the page. Every value
is escaped by Jinja, and the page's content security policy admits no network at all and no script but its own
two, by hash: a transcript can neither run nor fetch anything.
"""

import base64
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import vl_convert
from markupsafe import Markup

from stages.engine.params import FusionParams
from stages.evaluation import charts, figures, protocol
from stages.evaluation.agreement import agreement
from stages.evaluation.artefacts import Predictions, Run, read_rankings, read_transcripts
from stages.evaluation.calibration import BINS, reliability, tempered
from stages.evaluation.thumbnails import thumbnails

MISTAKES = 40       # shown, most confidently wrong first
PSEUDO_LABELS = 500  # shown, in order of selection
SKIPPED = 500       # shown
TRANSCRIPT = 300    # characters shown
PLACES = {"test": "test", "out_of_fold": "out of fold"}  # of the comparison with the baselines
DRAW = """
for (const element of document.querySelectorAll("[data-spec]")) {
  const spec = JSON.parse(document.getElementById(element.dataset.spec).textContent);
  vegaEmbed(element, spec, {actions: false, renderer: "svg"});
}
"""


def render_report(run: Run, p: FusionParams, details: dict[str, Any], predictions: pd.DataFrame,
                  robustness: pd.DataFrame | None) -> str:
    """The whole page. details: details.json's content; predictions: figures.prediction_table."""
    transcripts, rankings = read_transcripts(run), read_rankings()
    wrong, pseudo = mistakes(run, predictions), pseudo_labels(run)
    shown = [row["clip_id"] for row in wrong["rows"] + pseudo["rows"]]
    images = thumbnails(shown, Path("data/frames"))
    for row in wrong["rows"] + pseudo["rows"]:
        clip_id = row["clip_id"]
        text = transcripts.get(clip_id, "")
        row["transcript"] = text if len(text) <= TRANSCRIPT else text[:TRANSCRIPT] + "…"
        row["ranking"], row["image"] = rankings.get(clip_id, []), images.get(clip_id)
    split, confusion = figures.confusion_table(run, predictions)
    specs = {
        "confusion": charts.confusion_chart(confusion, run.labels),
        "rounds": charts.rounds_chart(figures.rounds_table(run)),
        "curves": charts.curves_chart(figures.curves_table(run)),
        "reliability": charts.reliability_chart(reliability_table(run, details["calibration"]["temperature"])),
    }
    if robustness is not None and len(robustness) > 1:
        specs["robustness"] = charts.robustness_chart(robustness)
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets the default
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2").render(
        run=run, p=p, figures=details, split=split, specs=specs, wrong=wrong, pseudo=pseudo,
        robustness=robustness is not None and robustness.to_dict("records"),
        colors={label: charts.COLORS[i % len(charts.COLORS)] for i, label in enumerate(run.labels)},
        voices=agreement(run, predictions),
        skipped=run.skipped.head(SKIPPED).to_dict("records"),
        rows=[*run.baselines, "round0", *(["final"] if run.self_trained else [])],
        row_names={"majority": "most frequent class", "logistic_regression": "logistic regression",
                   "round0": "fusion" + (", before self-training" if run.self_trained else ""),
                   "final": "fusion, after self-training"},
        places=[name for name in PLACES if name in details["final"]], place_names=PLACES,
        standardisation=protocol.standardisation(run, p), epoch=protocol.EPOCHS[run.final.epoch], bins=BINS,
        warnings=details["warnings"],
        scripts=[Markup(script) for script in (bundle, DRAW)],
        hashes=[script_hash(script) for script in (bundle, DRAW)],
    )


def script_hash(script: str) -> str:
    """The source expression that lets exactly this inline script run. Raises ValueError if it would end early."""
    if "</script" in script.lower() or "<!--" in script:
        raise ValueError("a script of the report holds </script or <!--: it can't be inlined")
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def reliability_table(run: Run, temperature: float) -> pd.DataFrame:
    """calibration.reliability before and after the temperature, of the test clips or, without truth, out of fold."""
    sets = figures.calibration_sets(run)
    probabilities, actual = sets.get("test", sets["out_of_fold"])
    tables = {"before": reliability(probabilities, actual)}
    if temperature != 1:
        tables["after the temperature"] = reliability(tempered(probabilities, temperature), actual)
    return pd.concat(tables, names=["line"]).reset_index("line").reset_index(drop=True)


def mistakes(run: Run, predictions: pd.DataFrame) -> dict[str, Any]:
    """The most confidently wrong clips: those of the test split, or out of fold where no test truth is known."""
    split, table = figures.confusion_table(run, predictions)
    known = run.known("test")
    positions = known if known.size else np.arange(len(run.actual))
    clips = [(run.final.others if known.size else run.final.labelled)[i] for i in positions]
    votes = run.final.votes[:, :, positions] if known.size else run.final.last[:, None]
    confidence = predictions.set_index("clip_id").loc[clips, "confidence"].to_numpy()
    wrong = np.flatnonzero((table["actual"] != table["predicted"]).to_numpy())
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    rows = [{
        "clip_id": clips[i], "actual": table["actual"][i], "predicted": table["predicted"][i],
        "confidence": float(confidence[i]), "votes": count_votes(votes[:, :, i], run.labels),
    } for i in worst]
    return {"split": split, "rows": rows, "total": int(wrong.size)}


def pseudo_labels(run: Run) -> dict[str, Any]:
    """One row per clip and label that self-training gave it, with the seeds and rounds that did.

    The votes are round 0's, before any model was trained on the label.
    """
    correct = figures.pseudo_label_correct(run)
    votes = votes_by_clip(run.round0, run.labels)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for entry, right in zip(run.pseudo_labels.to_dict("records"), correct, strict=True):
        row = rows.setdefault((entry["clip_id"], entry["label"]), {
            "clip_id": entry["clip_id"], "label": entry["label"], "chosen": [],
            "correct": None if np.isnan(right) else bool(right),
            "split": run.manifest.loc[entry["clip_id"], "split"], "votes": votes(entry["clip_id"])})
        row["chosen"].append({key: entry[key] for key in ("seed", "round", "confidence", "agreement")})
    ordered = sorted(rows.values(), key=lambda row: min(choice["round"] for choice in row["chosen"]))
    return {"rows": ordered[:PSEUDO_LABELS], "total": len(ordered)}


def votes_by_clip(predictions: Predictions, labels: list[str]) -> Any:
    """A function from clip id to count_votes of that clip."""
    position = {clip_id: i for i, clip_id in enumerate(predictions.others)}
    return lambda clip_id: count_votes(predictions.votes[:, :, position[clip_id]], labels)


def count_votes(softmax: np.ndarray, labels: list[str]) -> list[tuple[str, int]]:
    """(label, how many of the models call it), most first, of softmax (S, F, L)."""
    counts = Counter(softmax.reshape(-1, len(labels)).argmax(-1).tolist())
    return [(labels[k], n) for k, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
