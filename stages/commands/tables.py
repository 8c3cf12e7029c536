"""The paper's Tables 1 and 2 on the current corpus, ours beside the paper's figures, in reports/tables.md.

    mer tables                 # every row
    mer tables hubert clip     # some rows; `mer tables --help` lists them

Each row is one `dvc exp run` of the experiment tables-<row>-<key> (stages/commands/experiments.py): params.yaml as it
stands but for what the row names.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.commands.experiments import Experiment, Series, changed
from stages.engine.errors import PipelineError, run_stage
from stages.engine.files import replacing, require_writable
from stages.engine.params import load
from stages.engine.yaml_file import read_yaml

OUT = Path("reports/tables.md")
SERIES = Series(Path("reports/details.json"))
Pair = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One row of a table: its parameters, and WAF in percent on Train&Val and test as published."""

    name: str  # in the experiment's name and on the command line
    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    paper: Pair | None = None
    baseline: Pair | None = None


def single(name: str, title: str, modalities: list[str], paper: Pair, baseline: Pair | None = None, **more: Any) -> Row:
    """A row of Table 1: no self-training; one modality can't be dropped, so neither is one of two [choice]."""
    changes = {"fusion.modalities": modalities, "fusion.modality_dropout": 0.0, "self_training.rounds": 0, **more}
    return Row(name, title, changes, paper, baseline)


WITHOUT_RANKINGS = {"extractors.baichuan.input": "transcripts.csv"}
THREE = ["hubert", "clip", "baichuan"]
P = "fusion.modality_dropout"

TABLE_1 = (
    single("hubert", "HuBERT", ["hubert"], (71.46, 82.13), (73.02, 83.42)),
    single("baichuan-text", "Baichuan, transcript alone", ["baichuan"], (53.81, 55.44), (54.86, 56.63),
           **WITHOUT_RANKINGS),
    single("baichuan", "Baichuan with rankings (GPT4-Baichuan)", ["baichuan"], (56.65, 56.84)),
    single("clip", "CLIP", ["clip"], (61.96, 60.02), (66.66, 63.27)),
    single("emovclip", "EmoVCLIP", ["emovclip"], (68.43, 61.08)),
    single("clip-emovclip", "CLIP + EmoVCLIP", ["clip", "emovclip"], (66.83, 64.18)),
)
TABLE_2 = (
    Row("plain", "no EmoVCLIP, rankings, standardisation, modality dropout or self-training; batch 32 (the "
        "paper's figure: of the MER2024 baseline, whose features are means without variances)",
        {"fusion.modalities": THREE, **WITHOUT_RANKINGS, "fusion.standardize": "none", P: 0.0,
         "fusion.batch_size": 32, "self_training.rounds": 0}, (80.34, 86.32)),
    Row("without-emovclip", "p = 0, without EmoVCLIP", {"fusion.modalities": THREE, P: 0.0}, (82.64, 88.68)),
    Row("p0", "p = 0", {P: 0.0}, (84.25, 89.52)),
    Row("p15", "p = 0.15", {P: 0.15}, (84.04, 89.87)),
    Row("p30", "p = 0.3", {P: 0.3}, (83.76, 90.15)),
    Row("p50", "p = 0.5", {P: 0.5}, (82.34, 89.08)),
    Row("without-self-training", "p = 0.3, without self-training", {P: 0.3, "self_training.rounds": 0}),
    Row("without-standardisation", "p = 0.3, without standardisation", {P: 0.3, "fusion.standardize": "none"}),
    Row("leaky", "p = 0.3, leaky EmoVCLIP (emovclip.scope: all)", {P: 0.3, "emovclip.scope": "all"}),
)


# ---------------------------------------------------------------- what a row is


def possible(row: Row, params: Mapping[str, Any]) -> bool:
    """Whether params.yaml has what the row changes, and the features that it uses."""
    try:
        values = changed(params, row.changes)
    except KeyError:
        return False
    return set(values["fusion"]["modalities"]) <= {*params["extractors"], "emovclip"}


def collect(wanted: list[Row]) -> dict[str, dict[str, Any]]:
    """row name -> details.json, of every row that is wanted or up to date; runs the wanted ones that are not."""
    params = read_yaml("params.yaml")
    rows = [row for row in (*TABLE_1, *TABLE_2) if possible(row, params)]
    experiments = [Experiment(f"tables-{row.name}", row.title, row.changes) for row in rows]
    asked = [experiment for row, experiment in zip(rows, experiments, strict=True) if row in wanted]
    found = zip(rows, SERIES.collect(experiments, asked), strict=True)
    return {row.name: json.loads(path.read_text(encoding="utf-8")) for row, path in found if path}


# ---------------------------------------------------------------- writing


def cells(figures: Mapping[str, Any] | None) -> list[str]:
    """Cross-validated WAF at the best and the last epoch, and on the test clips, with deviations over seeds."""
    if figures is None:
        return ["not run"] * 3
    blocks = [figures["final"].get(name) for name in ("best_epoch", "last_epoch", "test")]
    return [f"{block['waf']:.2f} ± {block['waf_std']:.2f}" if block else "–" for block in blocks]


def pair(figures: Pair | None) -> str:
    return "{:.2f} / {:.2f}".format(*figures) if figures else "–"


def table(rows: tuple[Row, ...], found: Mapping[str, Any], baseline: bool) -> list[str]:
    """One table's lines."""
    header = ["", "cv, best epoch", "cv, last epoch", "test", "paper, Train&Val / test"]
    header += ["MER2024 baseline"] * baseline
    lines = [header, ["---"] * len(header)]
    for row in rows:
        published = [pair(row.paper)] + [pair(row.baseline)] * baseline
        lines.append([row.title, *cells(found.get(row.name)), *published])
    return [f"| {' | '.join(line)} |" for line in lines]


def leak(found: Mapping[str, Any]) -> str:
    """How far the cross-validation lies above the test, with leaky prompts and without."""
    blocks = [found[name]["final"] for name in ("leaky", "p30") if name in found]
    gaps = [block["best_epoch"]["waf"] - block["test"]["waf"] for block in blocks if "test" in block]
    if len(gaps) < 2:
        return "How far a leaked cross-validation lies above the test: needs the rows p30 and leaky, and a test."
    return ("Cross-validation (best epoch) minus test: {:+.2f} with leaky prompts, {:+.2f} without, a difference of "
            "{:+.2f}.").format(*gaps, gaps[0] - gaps[1])


def render(found: Mapping[str, Any], adapter: str) -> str:
    """reports/tables.md. found: row name -> details.json."""
    any_row = next(iter(found.values()))
    clips = any_row["clips"]
    lines = [
        "# The paper's tables on this corpus",
        "",
        f"Made by `make tables`. Corpus: {adapter}, {clips['labelled']} labelled, {clips['unlabelled']} unlabelled and "
        f"{clips['test']} test clips; {any_row['folds']} folds, {any_row['seeds']} seeds. WAF in percent, mean over "
        "seeds ± their deviation. cv, best epoch is what the paper's Train&Val is, and optimistic; cv, last epoch "
        "picks nothing.",
    ]
    if adapter == "demo":
        lines += ["", "**The demo's clips are drawn and its networks are random miniatures.** These figures show that "
                      "every row runs and what it changes; beside the paper's they mean nothing."]
    lines += ["", "## Table 1: single modalities, without self-training", "", *table(TABLE_1, found, baseline=True)]
    lines += ["", "## Table 2: all modalities, by modality dropout p", "", *table(TABLE_2, found, baseline=False)]
    lines += ["", leak(found)]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    rows = {row.name: row for row in (*TABLE_1, *TABLE_2)}
    parser = argparse.ArgumentParser("mer tables", allow_abbrev=False,
                                     description=f"The paper's Tables 1 and 2 on the current corpus, in {OUT}")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"which rows to run, of: {', '.join(rows)} (all)")
    names = parser.parse_args(arguments).rows or list(rows)
    if unknown := sorted(set(names) - set(rows)):
        raise PipelineError(f"{', '.join(unknown)}: no such row, expected some of {', '.join(rows)}")
    p = load()
    require_writable(OUT)
    found = collect([rows[name] for name in names])
    if not found:
        raise PipelineError(f"params.yaml: lacks the features that {', '.join(names)} would need")
    with replacing(OUT) as file:
        file.write(render(found, p.corpus.adapter))
    print(f"\n{OUT.read_text(encoding='utf-8')}\n{OUT}")


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
