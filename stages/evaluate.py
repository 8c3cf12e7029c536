"""Stage evaluate: WAF and what lies behind it: metrics, details, predictions, the submission, plots and the report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stages.engine.devices import pick_device, set_threads
from stages.engine.errors import run_stage
from stages.engine.files import file_digest, replacing, write_json
from stages.engine.params import FusionParams, load_fusion

if TYPE_CHECKING:
    import pandas as pd

    from stages.evaluation.artefacts import Run

PLOTS = Path("reports/plots")
ROBUSTNESS = ("removed", "kept", "cv_waf", "cv_waf_std", "test_waf", "test_waf_std")


def main() -> None:
    p = load_fusion()
    import pandas as pd

    from stages.evaluation import figures
    from stages.evaluation.artefacts import read_run
    from stages.evaluation.report import render_report

    run = read_run(p.corpus.labels)
    details = figures.details(run, p)
    temperature = details["calibration"]["temperature"]
    predictions = figures.prediction_table(run, temperature)
    robustness = robustness_table(run, p) if p.evaluate.missing == "report" else None
    tables: dict[str | Path, pd.DataFrame] = {
        "reports/predictions.csv": predictions.round(6),
        "reports/submission.csv": figures.submission_table(predictions, p.corpus.adapter),
        PLOTS / "confusion.csv": figures.confusion_table(run, predictions)[1],
        PLOTS / "rounds.csv": figures.rounds_table(run).round(4),
        PLOTS / "curves.csv": figures.curves_table(run).round(6),
        "reports/robustness.csv": pd.DataFrame(columns=ROBUSTNESS) if robustness is None else robustness.round(4),
    }
    for path, table in tables.items():
        with replacing(path) as file:
            table.to_csv(file, index=False, lineterminator="\n")
    with replacing("reports/report.html") as file:
        file.write(render_report(run, p, details, predictions, robustness))
    ensemble = file_digest("models/self_training/ensemble.safetensors")  # predict refuses it for any other
    write_json("models/calibration.json", {"temperature": temperature, "ensemble": ensemble})
    write_json("reports/details.json", details)
    write_json("reports/metrics.json", figures.headline(details))
    for text in details["warnings"]:
        print(f"warning: evaluate: {text}", file=sys.stderr)


def robustness_table(run: Run, p: FusionParams) -> pd.DataFrame:
    """WAF of the final models with every subset of modalities removed (figures.robustness_table)."""
    import numpy as np

    from stages.evaluation import figures
    from stages.fusion.ensemble import load_ensemble
    from stages.fusion.features import load_inputs

    inputs = load_inputs(p.fusion.modalities, p.corpus.labels, pick_device(p.runtime.device))
    set_threads(True)  # chunks of clips are computed side by side, each by one thread
    ensemble = load_ensemble("models/self_training")
    known = inputs.others[run.known("test")]

    def predict(removed: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
        by_fold = ensemble.predict(inputs, inputs.labelled, removed).numpy()  # (S, F, labelled, L)
        own = by_fold[:, run.folds, np.arange(len(run.folds))]
        others = np.zeros((len(own), len(inputs.others), own.shape[-1]), own.dtype)
        if known.size:  # only the clips that are scored: nothing uses the others' predictions
            others[:, run.known("test")] = ensemble.predict(inputs, known, removed).mean(dim=1).numpy()
        return own, others

    return figures.robustness_table(run, predict)


if __name__ == "__main__":
    run_stage(main)
