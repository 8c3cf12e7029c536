"""mer compare on a real repository: three runs of a pipeline that leaves what the real one leaves for it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score
from test_pipeline import Repository

from stages.commands.compare import Difference, Revision, difference, main
from stages.engine.errors import PipelineError
from stages.evaluation import metrics

LABELS = ["calm", "angry", "sad"]
PARAMS = """\
corpus: {labels: [calm, angry, sad]}
fusion: {hidden: 8, seeds: [0, 1]}
evaluate: {bootstrap: 400, seed: 3}
self_training: {rounds: 0}
runtime: {device: cpu}
"""
PIPELINE = """\
stages:
  run:
    cmd: python run.py
    deps: [run.py]
    params: [corpus.labels, fusion]
    outs: [data/manifest.csv, data/truth.csv, reports/predictions.csv]
"""
RUN = '''\
"""90 labelled, 60 test and 20 unlabelled clips of five speakers; the wider the fusion, the more clips are right."""
import csv, random
from pathlib import Path
from ruamel.yaml import YAML

params = YAML(typ="safe").load(Path("params.yaml"))
labels, hidden, chance = params["corpus"]["labels"], params["fusion"]["hidden"], random.Random(0)
clips = [(f"c{i:03d}", "labelled" if i < 90 else "test" if i < 150 else "unlabelled", labels[i % 3], f"s{i % 5}")
         for i in range(170)]

def write(path, header, rows):
    Path(path).parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])

write("data/manifest.csv", ["clip_id", "split", "label", "group"],
      [(c, split, label if split == "labelled" else "", group) for c, split, label, group in clips])
write("data/truth.csv", ["clip_id", "label"], [(c, label) for c, split, label, _ in clips if split == "test"])
write("reports/predictions.csv", ["clip_id", "split", "prediction"],
      [(c, split, label if chance.random() < 0.3 + hidden / 40 else chance.choice(labels))
       for c, split, label, _ in clips])
'''


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A first run, committed; the experiment `wide`; and in the workspace another one, whose cache is not kept."""
    folder = tmp_path_factory.mktemp("runs")
    for name, text in {"params.yaml": PARAMS, "dvc.yaml": PIPELINE, "run.py": RUN}.items():
        (folder / name).write_text(text)
    repository = Repository(folder)
    for command in ("git init -q", "dvc init -q", "dvc repro -q", "git add -A", "git commit -qm first"):
        repository.run(*command.split())
    repository.run("dvc", "exp", "run", "-q", "--name", "wide", "-S", "fusion.hidden=24")
    repository.set("fusion.hidden", 12)
    repository.run("dvc", "repro", "-q")
    return repository


@pytest.fixture(autouse=True)
def _in_the_repository(runs: Repository, _working_directory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.folder)


def status(runs: Repository) -> tuple[str, str, bytes]:
    changed = runs.run("git", "status", "--short"), runs.run("dvc", "status")
    return *changed, (runs.folder / "reports/predictions.csv").read_bytes()


def test_figures_and_interval_are_those_of_the_predictions(runs: Repository) -> None:
    first, second = Revision("HEAD").run(), Revision("wide").run()
    assert (first.params["fusion.hidden"], second.params["fusion.hidden"]) == (8, 24)
    for split, count in (("test", 60), ("labelled", 90)):
        found = difference(first, second, split)
        assert found is not None and (found.clips, found.groups) == (count, 5)
        rows = [run.clips[run.clips["split"] == split] for run in (first, second)]
        expected = [100 * f1_score(part["truth"], part["prediction"], average="weighted") for part in rows]
        np.testing.assert_allclose(found.waf, expected)
        codes = [np.array([LABELS.index(name) for name in column])
                 for column in (rows[0]["truth"], rows[1]["prediction"], rows[0]["prediction"])]
        assert found.interval == metrics.paired_interval(*codes, 3, 400, 3, rows[0]["group"])
        assert found.interval[0] < found.waf[1] - found.waf[0] < found.interval[1]
    assert difference(first, second, "unlabelled") is None  # nobody knows their truth


def test_the_command_prints_both_the_params_and_a_verdict_and_touches_nothing(
    runs: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    before = status(runs)
    main(["HEAD", "wide"])
    told = capsys.readouterr().out
    assert "Test: the second run is better; the interval does not hold 0." in told
    assert told.endswith("Params that differ:\n  fusion.hidden: 8 -> 24\n")
    assert "5 groups" in told and "Intervals of fewer than 10 groups are too narrow" in told
    assert max(map(len, told.splitlines())) <= 100
    main(["wide", "workspace"])
    assert "  fusion.hidden: 24 -> 12\n" in capsys.readouterr().out
    main(["HEAD", "HEAD"])
    told = capsys.readouterr().out
    assert told.count("the interval holds 0: no difference can be claimed.") == 2 and "No param differs." in told
    assert status(runs) == before


def test_a_folder_of_the_repository_has_runs_of_its_own(
    runs: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = runs.folder / "inner"
    shutil.copytree(runs.folder, inner, ignore=shutil.ignore_patterns(".*", "inner"))
    monkeypatch.chdir(inner)
    main(["workspace", "workspace"])
    assert "No param differs." in capsys.readouterr().out
    runs.run("git", "add", "-f", "inner/params.yaml", "inner/dvc.lock", "inner/reports/predictions.csv")
    runs.run("git", "commit", "-qm", "inner")
    main(["HEAD", "workspace"])  # its manifest is in neither git nor DVC's cache under this name, but the same
    assert "No param differs." in capsys.readouterr().out
    runs.run("git", "reset", "-q", "HEAD~")
    with pytest.raises(PipelineError, match="HEAD: params.yaml: neither in git nor"):
        main(["HEAD", "workspace"])
    shutil.rmtree(inner)


def test_what_cannot_be_compared_is_one_line(runs: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PipelineError, match="never: no such revision or experiment; .*dvc exp list, or workspace"):
        main(["HEAD", "never"])
    elsewhere = tmp_path / "clone"
    runs.run("git", "clone", "-q", str(runs.folder), str(elsewhere))
    monkeypatch.chdir(elsewhere)
    with pytest.raises(PipelineError, match=r"HEAD: data/manifest.csv: neither in git nor .*`dvc fetch"):
        main(["HEAD", "HEAD"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match="not inside of a DVC repository"):
        main(["HEAD", "HEAD"])


def test_runs_of_other_classes_another_truth_or_other_clips_are_refused(
    runs: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Revision("HEAD").run(), Revision("wide").run()
    second.clips.loc["c100", "truth"] = "sad" if second.clips.loc["c100", "truth"] != "sad" else "calm"
    with pytest.raises(PipelineError, match="clip c100 is .* in HEAD and .* in wide; only runs with one truth"):
        difference(first, second, "test")
    second.params["corpus.labels"] = ["calm", "sad"]
    with pytest.raises(PipelineError, match=r"corpus.labels: found \['calm', 'angry', 'sad'\] in HEAD and"):
        difference(first, second, "test")
    own = Revision.run

    def renamed(self: Revision) -> object:
        run = own(self)
        if self.name == "wide":
            run.clips.index = "other " + run.clips.index
        return run

    monkeypatch.setattr(Revision, "run", renamed)
    with pytest.raises(PipelineError, match="HEAD, wide: no clip in common whose truth is known"):
        main(["HEAD", "wide"])


def test_the_verdict_follows_the_interval() -> None:
    verdicts = [Difference("test", 9, 0, (1.0, 2.0), interval).verdict
                for interval in ((-1.0, 2.0), (0.0, 2.0), (0.1, 2.0), (-2.0, -0.1))]
    assert [("no difference" in v, "better" in v, "worse" in v) for v in verdicts] == [
        (True, False, False), (True, False, False), (False, True, False), (False, False, True)]
