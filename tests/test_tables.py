"""The tables' rows: what each changes, when it is up to date, and how it is shown. test_pipeline.py runs one."""

import copy
import re
from typing import Any

import pytest
from test_params import ROOT, flatten

from stages.commands.experiments import changed, key_of, sources
from stages.commands.tables import TABLE_1, TABLE_2, possible, render
from stages.engine.params import Params
from stages.engine.yaml_file import read_yaml

ROWS = (*TABLE_1, *TABLE_2)
SHIPPED = ("params.yaml", "presets/mer2024.yaml")


@pytest.mark.parametrize("file", SHIPPED)
def test_every_row_is_possible_and_valid(file: str) -> None:
    params = read_yaml(ROOT / file)
    before = copy.deepcopy(params)
    assert len({row.name for row in ROWS}) == len(ROWS) == 15
    for row in ROWS:
        assert possible(row, params), row.name
        values = changed(params, row.changes)
        Params.model_validate(values)
        now, then = flatten(values), flatten(before)
        assert {key for key in now if now[key] != then[key]} <= set(row.changes)
    assert params == before


def test_rows_are_the_papers() -> None:
    """Spot checks against section 9 of the design: what a row sets, and the paper's figures."""
    rows = {row.name: row for row in ROWS}
    assert rows["baichuan-text"].changes["extractors.baichuan.input"] == "transcripts.csv"
    assert "extractors.baichuan.input" not in rows["baichuan"].changes and rows["baichuan"].paper == (56.65, 56.84)
    assert rows["hubert"].paper == (71.46, 82.13) and rows["hubert"].baseline == (73.02, 83.42)
    assert all(row.changes["self_training.rounds"] == 0 for row in TABLE_1)
    dropout = {rows[name].changes["fusion.modality_dropout"]: rows[name].paper for name in ("p0", "p15", "p30", "p50")}
    assert dropout == {0.0: (84.25, 89.52), 0.15: (84.04, 89.87), 0.3: (83.76, 90.15), 0.5: (82.34, 89.08)}
    assert "emovclip" not in rows["without-emovclip"].changes["fusion.modalities"]
    assert rows["leaky"].changes["emovclip.scope"] == "all"


def test_rows_whose_features_are_missing_are_left_out() -> None:
    params = read_yaml(ROOT / "params.yaml")
    del params["extractors"]["baichuan"]
    params["fusion"]["modalities"] = ["hubert", "clip", "emovclip"]
    left = [row.name for row in ROWS if not possible(row, params)]
    assert left == ["baichuan-text", "baichuan", "plain", "without-emovclip"]


def test_a_row_is_up_to_date_until_a_parameter_the_code_or_the_corpus_changes() -> None:
    params, lock = read_yaml(ROOT / "params.yaml"), read_yaml(ROOT / "dvc.lock")
    key = key_of(params, sources(lock))
    assert key_of(changed(params, {"runtime.workers": 1}), sources(lock)) == key
    assert key_of(changed(params, {"fusion.hidden": 64}), sources(lock)) != key

    def touched(stage: str, kind: str, path: str) -> str:
        other = copy.deepcopy(lock)
        entry = next(entry for entry in other["stages"][stage][kind] if entry["path"] == path)
        entry["md5"] = "0" * 32
        return key_of(params, sources(other))

    assert touched("train_fusion", "deps", "stages/fusion/training.py") != key
    assert touched("corpus", "outs", "data/manifest.csv") != key
    assert touched("train_fusion", "outs", "models/fusion") == key  # the workspace's own results belong to no row


def figures(cv: float, test: float | None) -> dict[str, Any]:
    final = {"best_epoch": {"waf": cv, "waf_std": 0.5}, "last_epoch": {"waf": cv - 2, "waf_std": 1.0}}
    if test is not None:
        final["test"] = {"waf": test, "waf_std": 0.25}
    return {"final": final, "clips": {"labelled": 9, "unlabelled": 8, "test": 7}, "folds": 5, "seeds": 3}


def test_the_page_shows_every_row_beside_the_papers() -> None:
    found = {row.name: figures(80.0, 70.0) for row in ROWS}
    found |= {"leaky": figures(86.0, 71.0), "clip": figures(60.0, None)}
    del found["p50"]
    page = render(found, "demo")
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| ")}
    for row in ROWS:
        assert row.title in lines
    assert lines["HuBERT"] == "| HuBERT | 80.00 ± 0.50 | 78.00 ± 1.00 | 70.00 ± 0.25 | 71.46 / 82.13 | 73.02 / 83.42 |"
    assert lines["CLIP"].split(" | ")[3] == "–"
    assert lines["p = 0.5"].count("not run") == 3
    assert "+15.00 with leaky prompts, +10.00 without, a difference of +5.00" in page
    assert "random miniatures" in page and "random miniatures" not in render(found, "mer2024")
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in page.splitlines() if line.startswith("|")]
    assert set(widths) == {6, 7}
