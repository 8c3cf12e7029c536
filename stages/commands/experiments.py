"""Series of experiments with the params that they change: each one `dvc exp run` in the workspace, its result kept.

params.yaml is put back byte for byte afterwards, and `dvc repro` brings the workspace's own results back from the run
cache. An experiment's result file is kept in .cache/experiments under a key, a hash of every parameter that it runs
with, of the code and of the data: one that is up to date is read from there, and one that a kill cut short starts from
what DVC and the stages had finished.
"""

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.engine.errors import PipelineError
from stages.engine.files import replacing
from stages.engine.yaml_file import read_yaml

RECORDS = Path(".cache/experiments")
ASIDE = RECORDS / "params.yaml"  # the user's, while experiments run
UNTRACKED = "runtime"  # may not change a result


@dataclass(frozen=True)
class Experiment:
    """One set of params."""

    name: str  # in the experiment's name, before its key
    title: str
    changes: Mapping[str, Any]  # to params.yaml: "fusion.hidden" -> value


@dataclass(frozen=True)
class Series:
    """What experiments of one kind run, and the file that they are run for."""

    result: Path
    targets: Sequence[str] = ()  # stages; none: the whole pipeline
    read: Sequence[str] = ()  # stages whose inputs decide the result; none: all of them

    def record(self, key: str) -> Path:
        return RECORDS / f"{key}{self.result.suffix}"

    def collect(self, experiments: Sequence[Experiment], wanted: Sequence[Experiment]) -> list[Path | None]:
        """The kept result of every experiment that is wanted or up to date; runs the wanted ones that are not.

        Raises PipelineError where DVC fails, and after a kill that left params.yaml changed.
        """
        check_aside()
        dvc("repro", "--quiet", *self.targets)
        own = Path("params.yaml").read_bytes()
        params, inputs = read_yaml("params.yaml"), self._inputs()
        keys = [key_of(changed(params, experiment.changes), inputs) for experiment in experiments]
        if (here := key_of(params, inputs)) in keys:
            self._keep(here)  # an experiment may be what the workspace holds already
        todo = [(experiment, key) for experiment, key in zip(experiments, keys, strict=True)
                if experiment in wanted and not self.record(key).exists()]
        if todo:
            RECORDS.mkdir(parents=True, exist_ok=True)
            ASIDE.write_bytes(own)
        try:
            for number, (experiment, key) in enumerate(todo, 1):
                Path("params.yaml").write_bytes(own)
                self._run(experiment, key, f"{number}/{len(todo)}")
                self._keep(key)
        finally:
            if todo:
                Path("params.yaml").write_bytes(own)
                dvc("repro", "--quiet", *self.targets)
                ASIDE.unlink()
        return [path if (path := self.record(key)).exists() else None for key in keys]

    def _inputs(self) -> list[tuple[str, str]]:
        stages = read_yaml("dvc.lock")["stages"]
        return sources({"stages": {name: stages[name] for name in self.read or stages}})

    def _run(self, experiment: Experiment, key: str, position: str) -> None:
        name = f"{experiment.name}-{key}"
        print(f"{position} {experiment.title} ({name})", flush=True)
        listed = subprocess.run(["dvc", "exp", "list", "--all-commits", "--name-only"], capture_output=True, text=True,
                                env=environment())
        if name in listed.stdout.split():  # its record is gone; DVC takes no name twice
            dvc("exp", "remove", "--quiet", name)
        settings = [f"{param}={json.dumps(value)}" for param, value in experiment.changes.items()]
        dvc("exp", "run", "--name", name, *(part for setting in settings for part in ("-S", setting)), *self.targets)

    def _keep(self, key: str) -> None:
        with replacing(self.record(key), "wb") as file:
            file.write(self.result.read_bytes())


def changed(params: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of params.yaml with these changes. KeyError for a parameter that it does not have."""
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


def sources(lock: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(path, digest) of all that these stages' results come from but parameters: code, corpus, manifest, truth."""
    stages = lock["stages"]
    made = {out["path"] for stage in stages.values() for out in stage["outs"]}
    read = {(dep["path"], dep["md5"]) for stage in stages.values() for dep in stage["deps"] if dep["path"] not in made}
    return sorted(read | {(out["path"], out["md5"]) for out in stages.get("corpus", {"outs": []})["outs"]})


def key_of(params: Mapping[str, Any], inputs: Sequence[tuple[str, str]]) -> str:
    """Hash of all that decides an experiment's result."""
    tracked = {section: values for section, values in params.items() if section != UNTRACKED}
    content = json.dumps([tracked, inputs], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def check_aside() -> None:
    """Raises PipelineError where a run was killed before it could put params.yaml back."""
    if ASIDE.exists() and ASIDE.read_bytes() != Path("params.yaml").read_bytes():
        raise PipelineError(f"params.yaml: may be an experiment's, whose run was killed; yours is in {ASIDE}: put it "
                            f"back with `mv {ASIDE} params.yaml`, or keep this one with `rm {ASIDE}`")


def environment() -> dict[str, str]:
    """This Python's programs first."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def dvc(*arguments: str) -> None:
    """Run dvc. Raises PipelineError where it fails."""
    if subprocess.run(["dvc", *arguments], env=environment()).returncode:
        raise PipelineError(f"dvc {' '.join(arguments)}: failed (see above)")
