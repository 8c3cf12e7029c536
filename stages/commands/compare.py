"""Two runs of the pipeline compared clip by clip: whether their WAF differs by more than chance.

    mer compare main workspace           # git revisions, experiments of `dvc exp list`, or workspace
    cd meld && mer compare HEAD wide     # a folder of imported features: its own runs

Both runs' files are read through DVC, from git and DVC's cache or remote; the workspace is left alone. What is compared
are the predictions of reports/predictions.csv: of the test clips those of all models together, of the labelled ones the
seeds' mean out of fold. The interval resamples the clips, for both runs the same ones, or whole groups where the
manifest has groups (metrics.paired_interval).
"""

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from stages.engine.errors import PipelineError, one_line, run_stage
from stages.engine.files import file_digest
from stages.evaluation import metrics
from stages.evaluation.warnings import FEW_GROUPS

WORKSPACE = "workspace"
SPLITS = {"test": "test", "labelled": "labelled, out of fold"}


@dataclass(frozen=True)
class Predicted:
    """One run: what it predicts, what is true, and what it was made with."""

    name: str
    params: dict[str, Any]  # "fusion.hidden" -> value
    clips: pd.DataFrame  # index clip_id; split, prediction, truth ("" where unknown), group


class Revision:
    """The files of one revision below the current folder."""

    def __init__(self, name: str):
        """Raises PipelineError for a revision that neither git nor DVC knows, and outside a DVC repository."""
        from dvc.api import DVCFileSystem
        from dvc.exceptions import NotDvcRepoError
        from dvc.repo import Repo
        from dvc.scm import RevError, resolve_rev

        try:
            with Repo() as repo:
                root, revision = repo.root_dir, None if name == WORKSPACE else resolve_rev(repo.scm, name)
        except NotDvcRepoError as error:
            raise PipelineError(f"{one_line(error)}; run from the repository root or a folder of imported features"
                                ) from None
        except RevError:
            raise PipelineError(f"{name}: no such revision or experiment; expected one of git log, dvc exp list, or "
                                f"{WORKSPACE}") from None
        self.files = DVCFileSystem(root, rev=revision)
        self.name, self.folder = name, "/" / Path.cwd().relative_to(root)  # else DVC takes it from where we are

    def read(self, path: str) -> str:
        """A file of the revision. One that DVC only reads, as the manifest of imported features, is the workspace's,
        where that is still what the revision's run has read.

        Raises PipelineError naming the file.
        """
        content = self._kept(path)
        if content is None and Path(path).exists() and file_digest(path, "md5") in (self._kept("dvc.lock") or ""):
            content = Path(path).read_text(encoding="utf-8")
        if content is None:
            raise PipelineError(f"{self.name}: {path}: neither in git nor in DVC's cache or remote; bring it with "
                                f"`dvc fetch --all-commits`, or `dvc exp pull` for an experiment, or run it again")
        return content

    def _kept(self, path: str) -> str | None:
        from dvc.exceptions import DvcException

        try:
            return self.files.read_text((self.folder / path).as_posix(), encoding="utf-8")
        except (OSError, DvcException):
            return None

    def table(self, path: str) -> pd.DataFrame:
        return pd.read_csv(io.StringIO(self.read(path)), dtype=str, keep_default_na=False).set_index("clip_id")

    def run(self) -> Predicted:
        """Raises PipelineError naming a file that is not there."""
        from ruamel.yaml import YAML

        params = flat(YAML(typ="safe", pure=True).load(self.read("params.yaml")))
        manifest, known = self.table("data/manifest.csv"), self.table("data/truth.csv")["label"]
        clips = self.table("reports/predictions.csv")[["split", "prediction"]]
        own = manifest.loc[clips.index]
        truth = own["label"].where(own["split"] == "labelled", known.reindex(clips.index).fillna(""))
        return Predicted(self.name, params, clips.assign(truth=truth, group=own["group"]))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parameters as DVC names them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


@dataclass(frozen=True)
class Difference:
    """One split's figures, in percent."""

    split: str
    clips: int
    groups: int  # that were resampled; 0: clips were
    waf: tuple[float, float]
    interval: tuple[float, float]  # 95 %, of the second minus the first

    @property
    def verdict(self) -> str:
        low, high = self.interval
        if low <= 0 <= high:
            return "the interval holds 0: no difference can be claimed."
        return f"the second run is {'better' if low > 0 else 'worse'}; the interval does not hold 0."


def difference(first: Predicted, second: Predicted, split: str) -> Difference | None:
    """None where the runs have no clips of the split in common whose truth is known.

    Raises PipelineError for runs of other classes, or another truth.
    """
    labels = first.params["corpus.labels"]
    if set(labels) != set(second.params["corpus.labels"]):
        raise PipelineError(f"corpus.labels: found {labels} in {first.name} and {second.params['corpus.labels']} in "
                            f"{second.name}; only runs with the same classes can be compared")
    rows = [run.clips[(run.clips["split"] == split) & (run.clips["truth"] != "")] for run in (first, second)]
    common = rows[0].index.intersection(rows[1].index)
    if not len(common):
        return None
    a, b = (part.loc[common] for part in rows)
    if len(other := common[a["truth"] != b["truth"]]):
        clip = other[0]
        raise PipelineError(f"data/manifest.csv, data/truth.csv: clip {clip} is {a.loc[clip, 'truth']} in {first.name} "
                            f"and {b.loc[clip, 'truth']} in {second.name}; only runs with one truth can be compared")
    index = {label: position for position, label in enumerate(labels)}
    actual, one, two = (column.map(index).to_numpy() for column in (a["truth"], a["prediction"], b["prediction"]))
    groups = a["group"].to_numpy(dtype=str)
    interval = metrics.paired_interval(actual, two, one, len(labels), first.params["evaluate.bootstrap"],
                                       first.params["evaluate.seed"], groups)
    wafs = [float(metrics.waf(actual, called, len(labels))) for called in (one, two)]
    distinct = metrics.cluster_count(groups) if (groups != "").any() else 0
    return Difference(split, len(common), distinct if distinct > 1 else 0, (wafs[0], wafs[1]), interval)


def render(first: Predicted, second: Predicted, found: Sequence[Difference]) -> str:
    lines = [("WAF, %", "clips", first.name, second.name, "difference", "95 % interval", "resampled")]
    for row in found:
        low, high = row.interval
        lines.append((SPLITS[row.split], str(row.clips), f"{row.waf[0]:.2f}", f"{row.waf[1]:.2f}",
                      f"{row.waf[1] - row.waf[0]:+.2f}", f"{low:+.2f} to {high:+.2f}",
                      f"{row.groups} groups" if row.groups else "clips"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += ["", *(f"{SPLITS[row.split]}: {row.verdict}".capitalize() for row in found)]
    if any(run.params.get("self_training.rounds") and run.params.get("self_training.voters") != "fold"
           for run in (first, second)):
        text.append("Out of fold after self-training is void (self_training.voters: fold makes it honest): trust the "
                    "test.")
    if any(0 < row.groups < FEW_GROUPS for row in found):
        text.append(f"Intervals of fewer than {FEW_GROUPS} groups are too narrow: other groups may differ by more.")
    keys = sorted(first.params.keys() | second.params.keys())
    changed = [(key, *(run.params.get(key, "not there") for run in (first, second))) for key in keys]
    told = [f"  {key}: {a} -> {b}" for key, a, b in changed if a != b and not key.startswith("runtime.")]
    return "\n".join([*text, "", *(["Params that differ:", *told] if told else ["No param differs."])])


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("mer compare", allow_abbrev=False,
                                     description="The WAF of two runs, their difference and its interval")
    for name in ("first", "second"):
        parser.add_argument(name, metavar="REV", help=f"git revision, experiment, or {WORKSPACE}")
    values = parser.parse_args(arguments)
    first, second = (Revision(name).run() for name in (values.first, values.second))
    found = [row for split in SPLITS if (row := difference(first, second, split)) is not None]
    if not found:
        raise PipelineError(f"{first.name}, {second.name}: no clip in common whose truth is known; only runs on the "
                            f"same clips can be compared")
    print(render(first, second, found))


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
