"""Random search of the fusion's params, by nested cross-validation alone, with the table reports/search.md.

    mer search search.yaml --trials 20 --seed 0

search.yaml declares what is drawn, each param alone:

    search:
      fusion.hidden: [64, 128, 256]
      fusion.learning_rate: {low: 1e-4, high: 1e-2, log: true}
      fusion.epoch: [best, common]

A trial is params.yaml with what was drawn, trained by one `dvc exp run` of the stage nested_cv
(stages/commands/experiments.py); params.yaml as it stands is a trial too. For use the trial with the best mean inner
score wins. What the search is worth is told by clips that chose nothing: for every outer fold the trial with the best
inner score there predicts that fold's clips. No test clip is looked at.
"""

import argparse
import json
import math
import random
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors.numpy import load_file

from stages.commands.experiments import Experiment, Series, changed
from stages.engine.errors import PipelineError, run_stage
from stages.engine.files import replacing, require_writable
from stages.engine.manifest import read_folds, read_manifest
from stages.engine.params import FusionParams, check_fusion, load_fusion
from stages.engine.yaml_file import describe, read_yaml
from stages.evaluation import metrics

OUT = Path("reports/search.md")
SERIES = Series(Path("models/nested/predictions.safetensors"), ["nested_cv"],
                ["split_folds", "gather_features", "nested_cv"])
RUN = {"nested_cv.run": True}
SHIPPED = "params.yaml"


class Range(BaseModel):
    """Numbers between low and high; whole ones where both are; by their logarithms where log."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _is_a_range(self) -> "Range":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"found low {self.low} and high {self.high}, expected low < high, above 0 with log")
        return self

    def draw(self, chance: random.Random) -> int | float:
        """Three digits of a broken number: more would only make experiments hard to read."""
        if self.log:
            drawn = math.exp(chance.uniform(math.log(self.low), math.log(self.high)))
        elif isinstance(self.low, int) and isinstance(self.high, int):
            return chance.randint(self.low, self.high)
        else:
            drawn = chance.uniform(self.low, self.high)
        return round(drawn) if isinstance(self.low, int) and isinstance(self.high, int) else float(f"{drawn:.3g}")


Space = dict[str, list[Any] | Range]


def read_space(path: Path, params: Mapping[str, Any]) -> Space:
    """The section `search` of a YAML file. Raises PipelineError naming the key that is wrong."""
    found = read_yaml(path)
    declared = found.get("search") if isinstance(found, dict) else None
    if not isinstance(declared, dict) or not declared:
        raise PipelineError(f"{path}: expected a section search with the params to draw, e.g. fusion.hidden: [64, 128]")
    space: Space = {}
    for key, values in declared.items():
        name = str(key).removeprefix("fusion.")
        if name == key or name not in params["fusion"] or name == "seeds":
            raise PipelineError(f"{path}: search.{key}: expected params of fusion other than seeds: nested "
                                f"cross-validation compares nothing else")
        if isinstance(values, list) and values:
            space[key] = values
            continue
        try:
            space[key] = Range.model_validate(values)
        except ValidationError as error:
            raise PipelineError(f"{path}: search.{key}: expected a list, or {{low, high, log}}: {describe(error)}"
                                ) from None
    return space


def draw(space: Space, trials: int, seed: int, params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each of the trials changes, no two alike and none as params.yaml is; fewer where the space holds fewer.

    Raises PipelineError for a value that params.yaml may not have.
    """
    chance, found = random.Random(seed), list[dict[str, Any]]()
    for _ in range(100 * trials):
        if len(found) == trials:
            break
        drawn = {key: among.draw(chance) if isinstance(among, Range) else chance.choice(among)
                 for key, among in space.items()}
        if drawn not in found and (values := changed(params, drawn)) != params:
            check_fusion(values, f"search: {words(drawn)}")
            found.append(drawn)
    return found


def words(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.removeprefix('fusion.')} {value}" for key, value in changes.items()) or SHIPPED


# ---------------------------------------------------------------- what was found


@dataclass(frozen=True)
class Labelled:
    """The labelled clips in manifest order: the rows of nested predictions."""

    actual: np.ndarray  # (N,) class
    folds: np.ndarray  # (N,)
    groups: np.ndarray  # (N,) str, "" where a clip has none
    classes: int


@dataclass(frozen=True)
class Trial:
    """One set of params and its nested predictions."""

    changes: Mapping[str, Any]
    called: np.ndarray  # (S, N) class
    inner: np.ndarray  # (S, F) WAF in percent


def read_labelled(p: FusionParams) -> Labelled:
    clips = [clip for clip in read_manifest() if clip.split == "labelled"]
    index, folds = {label: i for i, label in enumerate(p.corpus.labels)}, read_folds()
    return Labelled(np.array([index[clip.label] for clip in clips]), np.array([folds[clip.clip_id] for clip in clips]),
                    np.array([clip.group for clip in clips], dtype=np.str_), len(index))


def honest(trials: Sequence[Trial], labelled: Labelled) -> tuple[np.ndarray, list[int]]:
    """(S, N) classes, each clip's by the trial with the best inner score of its outer fold; and which one that is."""
    scores = np.stack([trial.inner.mean(axis=0) for trial in trials])  # (T, F)
    chosen = scores.argmax(axis=0)
    called = np.stack([trial.called for trial in trials])  # (T, S, N)
    return called[chosen[labelled.folds], :, np.arange(len(labelled.folds))].T, chosen.tolist()


def figures(called: np.ndarray, shipped: np.ndarray | None, clips: Labelled, p: FusionParams) -> tuple[str, str]:
    """Nested WAF with its interval, and the difference to the shipped params' with its own, as the table has them."""
    e = p.evaluate
    waf = float(metrics.waf(clips.actual, called, clips.classes).mean())
    low, high = metrics.bootstrap_interval(clips.actual, called, clips.classes, e.bootstrap, e.seed, clips.groups)
    first = f"{waf:.2f} ({low:.2f} to {high:.2f})"
    if shipped is None:
        return first, "–"
    change = waf - float(metrics.waf(clips.actual, shipped, clips.classes).mean())
    low, high = metrics.paired_interval(clips.actual, called, shipped, clips.classes, e.bootstrap, e.seed, clips.groups)
    return first, f"{change:+.2f} ({low:+.2f} to {high:+.2f})"


def render(trials: Sequence[Trial], clips: Labelled, p: FusionParams, asked: str) -> str:
    """reports/search.md; trials[0] is params.yaml as it stands."""
    shipped = trials[0].called
    called, chosen = honest(trials, clips)
    found, change = figures(called, shipped, clips, p)
    order = sorted(range(len(trials)), key=lambda i: -trials[i].inner.mean())
    rows = [["params", "inner score", "nested WAF (95 %)", "minus params.yaml's (95 %)", "outer folds that chose it"]]
    rows.append(["---"] * len(rows[0]))
    for i in order:
        trial = trials[i]
        own = figures(trial.called, shipped if i else None, clips, p)
        rows.append([words(trial.changes), f"{trial.inner.mean():.2f}", *own, str(chosen.count(i))])
    best = trials[order[0]]
    settings = [part for key, value in best.changes.items() for part in ("-S", f"{key}={json.dumps(value)}")]
    use = f"`{shlex.join(['dvc', 'exp', 'run', *settings])}`" if settings else "params.yaml as it stands."
    unit = "groups" if metrics.cluster_count(clips.groups) > 1 and (clips.groups != "").any() else "clips"
    return "\n".join([
        "# Search by nested cross-validation", "",
        f"Made by `mer search {asked}`: {len(trials) - 1} trials and params.yaml as it stands, {len(p.fusion.seeds)} "
        f"seeds, {trials[0].inner.shape[1]} outer folds, {len(clips.actual)} labelled clips. WAF in percent, mean over "
        f"seeds; intervals by bootstrap over {unit}. The inner score chooses, the nested WAF is of clips that had no "
        f"part in it; no test clip was looked at.", "",
        f"**The search is worth {found}**, each outer fold predicted by the trial that the others chose: {change} "
        f"against params.yaml as it stands. A trial's own nested WAF is optimistic once the best of many is picked by "
        f"it; this figure is not.", "",
        f"For use, by the best inner score: {use}", "",
        *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("mer search", allow_abbrev=False,
                                     description=f"Random search of fusion params by nested cross-validation, in {OUT}")
    parser.add_argument("space", type=Path, help="YAML file with a section search: what is drawn")
    parser.add_argument("--trials", type=int, default=20, help="how many sets of params (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    values = parser.parse_args(arguments)
    if values.trials < 1:
        raise PipelineError(f"--trials: found {values.trials}, expected 1 or more")
    p, params = load_fusion(), read_yaml("params.yaml")
    changes = [{}, *draw(read_space(values.space, params), values.trials, values.seed, params)]
    require_writable(OUT)
    experiments = [Experiment("search", words(own), {**own, **RUN}) for own in changes]
    trials = []
    for own, path in zip(changes, SERIES.collect(experiments, experiments), strict=True):
        assert path is not None  # every one was wanted
        tensors = load_file(path)
        trials.append(Trial(own, tensors["probabilities"].argmax(axis=-1), tensors["inner"]))
    asked = f"{values.space} --trials {values.trials} --seed {values.seed}"
    with replacing(OUT) as file:
        file.write(render(trials, read_labelled(p), p, asked))
    print(f"\n{OUT.read_text(encoding='utf-8')}\n{OUT}")


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
