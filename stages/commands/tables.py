"""The paper's Tables 1 and 2 on the current corpus, ours beside the paper's figures, in reports/tables.md.

    mer tables                 # every row
    mer tables hubert clip     # some rows; `mer tables --help` lists them

Each row is one `dvc exp run` of the experiment tables-<row>-<key>: params.yaml as it stands but for what the row
names. Afterwards params.yaml is put back byte for byte and `dvc repro` brings the workspace's own results back from the
run cache. A row's details.json is kept in .cache/tables/<key>.json, the key a hash of every parameter that the row runs
with, of the code and of the corpus: a row that is up to date is read from there, and one that a kill cut short starts
from what DVC and the stages had finished.
"""

import argparse
import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.engine.errors import PipelineError, run_stage
from stages.engine.files import replacing, require_writable
from stages.engine.params import load, read_yaml

OUT = Path("reports/tables.md")
RECORDS = Path(".cache/tables")
ASIDE = RECORDS / "params.yaml"  # the user's, while rows run
UNTRACKED = "runtime"  # may not change a result
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


def changed(params: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of params.yaml with the row's changes. KeyError for a parameter that it does not have."""
    values: dict[str, Any] = copy.deepcopy(dict(params))
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        if last not in section:
            raise KeyError(key)
        section[last] = value
    return values


def possible(row: Row, params: Mapping[str, Any]) -> bool:
    """Whether params.yaml has what the row changes, and the features that it uses."""
    try:
        values = changed(params, row.changes)
    except KeyError:
        return False
    return set(values["fusion"]["modalities"]) <= {*params["extractors"], "emovclip"}


def sources(lock: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(path, digest) of all that the pipeline's results come from but parameters: code, corpus, manifest, truth."""
    stages = lock["stages"]
    made = {out["path"] for stage in stages.values() for out in stage["outs"]}
    read = {(dep["path"], dep["md5"]) for stage in stages.values() for dep in stage["deps"] if dep["path"] not in made}
    return sorted(read | {(out["path"], out["md5"]) for out in stages["corpus"]["outs"]})


def row_key(params: Mapping[str, Any], lock: Mapping[str, Any]) -> str:
    """Hash of all that decides a row's figures."""
    tracked = {section: values for section, values in params.items() if section != UNTRACKED}
    content = json.dumps([tracked, sources(lock)], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


# ---------------------------------------------------------------- running


def dvc(*arguments: str) -> None:
    """Run dvc with this Python's programs first. Raises PipelineError where it fails."""
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if subprocess.run(["dvc", *arguments], env={**os.environ, "PATH": search}).returncode:
        raise PipelineError(f"dvc {' '.join(arguments)}: failed (see above)")


def run_row(row: Row, key: str, position: str) -> dict[str, Any]:
    """The row's details.json, from a `dvc exp run` in the workspace; params.yaml is left changed."""
    experiment = f"tables-{row.name}-{key}"
    print(f"tables: {position} {row.title} ({experiment})", flush=True)
    listed = subprocess.run(["dvc", "exp", "list", "--all-commits", "--name-only"], capture_output=True, text=True)
    if experiment in listed.stdout.split():  # its record is gone; DVC takes no name twice
        dvc("exp", "remove", "--quiet", experiment)
    settings = [f"{name}={json.dumps(value)}" for name, value in row.changes.items()]
    dvc("exp", "run", "--name", experiment, *(part for setting in settings for part in ("-S", setting)))
    return read_details()


def read_details() -> dict[str, Any]:
    return json.loads(Path("reports/details.json").read_text(encoding="utf-8"))


def collect(wanted: list[Row]) -> dict[str, dict[str, Any]]:
    """row name -> details.json, of every row that is wanted or up to date; runs the wanted ones that are not."""
    check_aside()
    dvc("repro", "--quiet")
    own = Path("params.yaml").read_bytes()
    params, lock = read_yaml("params.yaml"), read_yaml("dvc.lock")
    keys = {row.name: row_key(changed(params, row.changes), lock) for row in (*TABLE_1, *TABLE_2)
            if possible(row, params)}
    keep(row_key(params, lock), read_details())  # a row may be what the workspace holds already
    todo = [row for row in wanted if row.name in keys and not record(keys[row.name]).exists()]
    if todo:
        ASIDE.write_bytes(own)
    try:
        for number, row in enumerate(todo, 1):
            Path("params.yaml").write_bytes(own)
            keep(keys[row.name], run_row(row, keys[row.name], f"{number}/{len(todo)}"))
    finally:
        if todo:
            Path("params.yaml").write_bytes(own)
            dvc("repro", "--quiet")
            ASIDE.unlink()
    return {name: json.loads(record(key).read_text()) for name, key in keys.items() if record(key).exists()}


def check_aside() -> None:
    """Raises PipelineError where a run was killed before it could put params.yaml back."""
    if ASIDE.exists() and ASIDE.read_bytes() != Path("params.yaml").read_bytes():
        raise PipelineError(f"params.yaml: may be a table's row, whose run was killed; yours is in {ASIDE}: put it "
                            f"back with `mv {ASIDE} params.yaml`, or keep this one with `rm {ASIDE}`")


def record(key: str) -> Path:
    return RECORDS / f"{key}.json"


def keep(key: str, figures: Mapping[str, Any]) -> None:
    with replacing(record(key)) as file:
        file.write(json.dumps(figures) + "\n")


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
