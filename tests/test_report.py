"""details.json and metrics.json against hand-made figures; the report: opened in a browser, self-contained, inert."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dvc.compare import metrics_table
from fabricated_run import COUNTS, FOLDS, LABELS, ROUNDS, SEEDS, SENTENCES, fabricate
from sklearn.metrics import f1_score, recall_score
from tabulate import tabulate

from stages.engine.errors import PipelineError
from stages.engine.params import load
from stages.evaluation import figures
from stages.evaluation.agreement import agreement
from stages.evaluation.artefacts import UNKNOWN, Run, read_run
from stages.evaluation.report import render_report

ROOT = Path(__file__).parent.parent
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=5000")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(ROOT)
    fabricate(tmp_path, confidence=0.7)
    monkeypatch.chdir(tmp_path)
    return read_run(LABELS)


def waf(actual: np.ndarray, called: np.ndarray) -> float:
    return 100 * f1_score(actual, called, labels=range(len(LABELS)), average="weighted", zero_division=0)


def test_every_figure_is_sklearns(run: Run) -> None:
    found = figures.details(run, load())
    truth = pd.read_csv("data/truth.csv").set_index("clip_id")["label"]
    test = [i for i, clip in enumerate(run.final.others) if clip.startswith("test")]
    actual = np.array([LABELS.index(truth[run.final.others[i]]) for i in test])
    by_seed = [waf(actual, run.final.votes[s].mean(0)[test].argmax(-1)) for s in range(SEEDS)]
    final = found["final"]
    assert final["test"]["waf"] == pytest.approx(np.mean(by_seed), abs=1e-3)
    assert final["test"]["waf_std"] == pytest.approx(np.std(by_seed, ddof=1), abs=1e-3)
    assert final["test"]["clips"] == COUNTS["test"] and final["test"]["resampled"] == "30 clips"
    assert final["test"]["interval"][0] < final["test"]["waf"] < final["test"]["interval"][1]
    folds = [
        np.mean([waf(run.actual[run.folds == f], run.final.best[s].argmax(-1)[run.folds == f]) for f in range(FOLDS)])
        for s in range(SEEDS)
    ]
    assert final["best_epoch"]["waf"] == pytest.approx(np.mean(folds), abs=1e-3)
    out_of_fold = np.mean([waf(run.actual, run.final.last[s].argmax(-1)) for s in range(SEEDS)])
    assert final["out_of_fold"]["waf"] == pytest.approx(out_of_fold, abs=1e-3)
    theirs = np.mean([waf(actual, run.baselines["logistic_regression"].by_seed[s][test].argmax(-1))
                      for s in range(SEEDS)])
    assert found["logistic_regression"]["test"]["waf"] == pytest.approx(theirs, abs=1e-3)
    assert found["majority"]["test"]["waf"] == pytest.approx(waf(actual, np.zeros_like(actual)), abs=1e-3)
    over = final["test"]["over"]["logistic_regression"]
    assert over["waf"] == pytest.approx(np.mean(by_seed) - theirs, abs=1e-3)
    assert over["interval"][0] < over["waf"] < over["interval"][1]
    uar = [recall_score(actual, run.final.votes[s].mean(0)[test].argmax(-1), average="macro") for s in range(SEEDS)]
    assert final["test"]["uar"] == pytest.approx(100 * np.mean(uar), abs=1e-3)
    assert found["pseudo_labels"] == {"count": 36.0, "accuracy": pytest.approx(100 * 32 / 36, abs=1e-3)}
    assert found["leaky"] is False and found["clips"] == COUNTS and (found["seeds"], found["folds"]) == (SEEDS, FOLDS)
    assert sum(row["support"] for row in final["test"]["per_class"].values()) == COUNTS["test"]


def test_every_block_says_how_it_was_made(run: Run) -> None:
    found = figures.details(run, load())
    for models in ("final", "round0", "majority", "logistic_regression"):
        for name, block in found[models].items():
            said = block["protocol"]
            assert said.endswith(".") and "2 seeds" in said, (models, name)
            assert ("Void" in said) == (models == "final" and name in ("out_of_fold", "last_epoch", "best_epoch"))
            assert ("Transductive" in said) == ((models, name) == ("final", "test"))
    assert found["final"]["test"]["protocol"].startswith("30 test clips; each fold's model at the epoch")
    assert "C by an inner cross-validation" in found["logistic_regression"]["out_of_fold"]["protocol"]


def test_metrics_are_what_people_compare(run: Run) -> None:
    found = figures.details(run, load())
    final, round0 = found["final"], found["round0"]
    assert figures.headline(found) == {
        "test": round(final["test"]["waf"], 2), "lo": round(final["test"]["interval"][0], 1),
        "hi": round(final["test"]["interval"][1], 1), "acc": round(final["test"]["accuracy"], 1),
        "uar": round(final["test"]["uar"], 1), "last": round(round0["last_epoch"]["waf"], 2),
        "oof": round(round0["out_of_fold"]["waf"], 2), "best": round(round0["best_epoch"]["waf"], 2),
        "r0": round(round0["test"]["waf"], 1), "LR": round(found["logistic_regression"]["test"]["waf"], 1),
        "flags": "trans"}
    honest = figures.headline(found | {"void": False, "transductive": [], "leaky": True})
    assert honest["oof"] == round(final["out_of_fold"]["waf"], 2) != figures.headline(found)["oof"]
    assert honest["flags"] == "leaky"


@pytest.mark.parametrize("value", [88.8888, 99.999])
def test_dvc_metrics_show_fits_a_terminal(run: Run, value: float) -> None:
    """Of 100 columns, by DVC's own table, whatever the figures are."""
    found = figures.details(run, load()) | {"leaky": True}
    short = figures.headline(json.loads(json.dumps(found), parse_float=lambda text: value))
    assert len(short) == 11 and short["flags"] == "both"
    shown = metrics_table({"workspace": {"data": {"reports/metrics.json": {"data": short}}}}, precision=5,
                          round_digits=True)
    lines = tabulate(list(shown), headers=shown.keys(), tablefmt="plain", disable_numparse=True).splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 100


def test_without_any_truth_only_the_cross_validation_is_scored(run: Run) -> None:
    Path("data/truth.csv").write_text("clip_id,label\n")
    blind = read_run(LABELS)
    assert (blind.truth == UNKNOWN).all()
    found = figures.details(blind, load())
    assert "test" not in found["final"] and "unlabelled" not in found["final"]
    assert "accuracy" not in found["pseudo_labels"]
    assert figures.confusion_table(blind, figures.prediction_table(blind, 1.0))[0] == "labelled"
    # cross-validation after self-training is void: what leads is round 0's
    assert found["lead"] == {"models": "round0", "on": "out_of_fold"}
    short, lead = figures.headline(found), found["round0"]["out_of_fold"]
    assert "test" not in short and short["r0"] == round(short["oof"], 1) and short["acc"] == round(lead["accuracy"], 1)
    shown = page(blind)
    assert f'<b id="waf">{lead["waf"]:.2f}</b>' in shown and "Out-of-fold WAF, before self-training" in shown


def test_without_self_training_nothing_is_void(run: Run) -> None:
    shutil.copytree("models/fusion", "models/self_training", dirs_exist_ok=True)
    Path("data/truth.csv").write_text("clip_id,label\n")
    found = figures.details(read_run(LABELS), load())
    assert found["void"] is False and found["transductive"] == []
    assert found["lead"] == {"models": "final", "on": "out_of_fold"}


def test_predictions_cover_every_clip_and_hold_no_truth(run: Run) -> None:
    table = figures.prediction_table(run, 2.0)
    assert table["clip_id"].tolist() == run.manifest.index.tolist()
    probabilities = table[[f"prob_{label}" for label in LABELS]].to_numpy()
    assert np.abs(probabilities.sum(1) - 1).max() < 1e-5
    assert (np.array(LABELS)[probabilities.argmax(1)] == table["prediction"]).all()
    assert not {"label", "truth", "actual"} & set(table.columns)
    submission = figures.submission_table(table, "mer2024")
    assert len(submission) == COUNTS["test"]
    assert set(submission["discrete"]) <= {"neutral", "angry", "happy", "sad", "worried", "surprise"}
    assert set(figures.submission_table(table, "features")["discrete"]) <= set(LABELS)


def test_rounds_gain_what_only_the_truth_can_tell(run: Run) -> None:
    table = figures.rounds_table(run)
    assert len(table) == ROUNDS + 1
    assert table["pseudo_label_accuracy"][1:].between(80, 100).all() and table["test_waf"].between(1, 100).all()


def test_files_that_do_not_line_up_are_refused(run: Run) -> None:
    clips = pd.read_csv("models/fusion/clips.csv")
    clips.iloc[::-1].to_csv("models/fusion/clips.csv", index=False)
    with pytest.raises(PipelineError, match=r"models/fusion/clips\.csv"):
        read_run(LABELS)


def robustness(run: Run) -> pd.DataFrame:
    return figures.robustness_table(run, lambda removed: (run.final.best, run.final.by_seed))


def page(run: Run) -> str:
    p = load()
    return render_report(run, p, figures.details(run, p), figures.prediction_table(run, 1.0), robustness(run))


def test_the_page_is_self_contained_and_small(run: Run) -> None:
    html = page(run)
    assert len(html) < 5_000_000
    markup = re.sub(r"<script\b.*?</script>", "", html, flags=re.S)
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", markup)
    assert "default-src 'none'" in html and "connect-src" not in html
    assert markup.count("data:image/jpeg;base64,") > 20 and "我今天很高兴" in markup


def test_the_voices_of_the_rankings_are_compared(run: Run) -> None:
    predictions = figures.prediction_table(run, 1.0)
    rows = [json.loads(line) for line in Path("data/rankings.jsonl").read_text().splitlines()]
    called = dict(zip(predictions["clip_id"], predictions["prediction"], strict=True))
    actual = {clip: run.labels[k] for clip, k in zip(run.final.labelled, run.actual, strict=True)}
    actual |= {clip: run.labels[k] for clip, k in zip(run.final.others, run.truth, strict=True)}
    split = []
    for row in rows:  # a row per clip, a second voice that is always right and a third that is silent on the labelled
        for clip in row["clip_ids"]:
            right = [actual[clip], *(label for label in run.labels if label != actual[clip])]
            silent = None if clip in run.final.labelled else right[::-1]
            voices = {"right": {"ranking": right}, "other": {"ranking": silent}}
            split.append(row | {"clip_ids": [clip], "voices": voices})
    Path("data/rankings.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in split))
    found = {row["voice"]: row for row in agreement(run, predictions)}
    assert list(found) == ["ranking", "right", "other"]
    assert found["right"]["labels"] == found["right"]["second"] == 100 and found["right"]["ranked"] == len(actual)
    agreed = [called[clip] == actual[clip] for clip in actual]
    assert found["right"]["ensemble"] == pytest.approx(100 * sum(agreed) / len(agreed))
    assert found["other"]["ranked"] == len(run.final.others) and found["other"]["labels"] == 0
    surprised = [label == run.labels[-1] for label in actual.values()]
    assert found["ranking"]["labels"] == found["ranking"]["others"]["right"] == pytest.approx(
        100 * sum(surprised) / len(surprised))
    assert found["other"]["others"]["right"] == found["right"]["others"]["other"] == 0
    html = page(run)
    assert 'id="voices"' in html and "<td>right" in html


def test_a_transcript_can_do_nothing(run: Run) -> None:
    evil = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"
    manifest = Path("data/manifest.csv").read_text().replace(SENTENCES[0], '"' + evil.replace('"', '""') + '"')
    Path("data/manifest.csv").write_text(manifest)
    html = page(read_run(LABELS))
    assert evil not in html and "&lt;script&gt;document.title" in html


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed (apt-get install chromium)")
def test_it_opens_in_a_browser_without_fetching_or_failing(run: Run, tmp_path: Path) -> None:
    html = page(run)
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    log = tmp_path / "net.json"
    options = [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr"]
    done = subprocess.run(["chromium", *FLAGS, *options, "--dump-dom", f"file://{tmp_path / 'report.html'}"],
                          text=True, capture_output=True, timeout=120)
    figure = figures.details(run, load())["final"]["test"]["waf"]
    shown = re.search(r'<b id="waf">([\d.]+)</b>', done.stdout)
    assert shown and float(shown.group(1)) == pytest.approx(figure, abs=0.005)
    drawn = re.findall(r'<div class="chart[^>]*id="chart-(\w+)"[^>]*>.*?<svg', done.stdout, re.S)
    assert {"confusion", "rounds", "curves", "robustness", "reliability"} <= set(drawn)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    hosts = set(re.findall(r'"url":"(?:https?|wss?)://([^/":]+)', log.read_text()))
    own = {host for host in hosts if host.endswith((".google.com", ".googleapis.com", ".gvt1.com"))}  # the browser's
    assert hosts <= own and "google" not in re.sub(r"<script\b.*?</script>", "", html, flags=re.S)


def test_metrics_are_plain_json(run: Run) -> None:
    text = json.dumps(figures.details(run, load()))
    assert "NaN" not in text and text == json.dumps(figures.details(run, load()))
