"""Run the pipeline as `dvc repro` does, with one stage on the CPU's cores and one on the GPU side by side.

    mer repro [STAGE ...]

Every stage is run by a `dvc repro --single-item` of its own, so whatever DVC does for a stage (its locks, its cache and
run cache, dvc.lock) it does here too. DVC allows this: its lock on the repository is free while a stage's command runs,
and a lock on each path (dvc/rwlock.py) keeps others from the outs that are being written. Two stages of which neither
needs the other have no such path in common.
"""

import argparse
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeAlias

from tqdm import tqdm

from stages.engine.devices import pick_device
from stages.engine.errors import PipelineError, run_stage
from stages.engine.params import FusionParams, Params, Rankings, load_fusion

CORES, GPU, NEITHER = "cores", "GPU", "neither"  # NEITHER: done in seconds, or waiting for a server
USES = {  # by the name before @, where its params don't decide (uses): of each there is one at a time
    "plan": NEITHER, "demo": CORES, "corpus": CORES, "split_folds": NEITHER, "extract_audio": CORES, "transcribe": GPU,
    "slice_frames": CORES, "crop_faces": CORES, "rank_emotions": NEITHER, "extract": GPU, "train_emovclip": GPU,
    "gather_features": NEITHER, "train_fusion": GPU, "baselines": GPU, "nested_cv": GPU, "self_train": GPU,
    "evaluate": GPU,
}
REPORT_SECONDS = 30.0  # between a stage's lines of progress where there is no terminal
ERROR = re.compile("error: ", re.IGNORECASE)  # a stage's, then DVC's own
DVC = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--quiet", "--single-item"]
Events: TypeAlias = "SimpleQueue[tuple[str, str | None] | None]"  # a stage's text or its end; a signal


def uses(stage: str, p: FusionParams, gpu: bool) -> str:
    """What the stage keeps busy; gpu: whether there is one, else its work is the cores'."""
    name, _, key = stage.partition("@")
    found = USES.get(name, CORES)
    if isinstance(p, Params):
        if name == "extract" and key in p.extractors and p.extractors[key].encoder == "acoustic":
            found = CORES
        if name == "rank_emotions" and "transformers" in _providers(p.rankings):
            found = GPU
    return CORES if found == GPU and not gpu else found


def _providers(rankings: Rankings) -> set[str]:
    return {rankings.provider, *(rankings.voice(name).provider for name in rankings.providers)}


def plan(targets: Sequence[str]) -> dict[str, set[str]]:
    """The stages that may have to run, in dvc.yaml's order, each with those of them that it needs first.

    They are what DVC finds changed, and whatever depends on that; DVC decides on each when its turn comes. targets: as
    `dvc repro` takes them. Raises PipelineError with DVC's message.
    """
    import networkx
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            graph = networkx.relabel_nodes(repo.index.graph, lambda stage: stage.addressing)  # stage -> what it needs
            needs = {stage.addressing: networkx.descendants(graph, stage.addressing) for stage in repo.index.stages}
            wanted = {stage.addressing for target in targets for stage in repo.stage.collect(target)} or set(needs)
            changed = set(repo.status())
    except DvcException as error:
        raise PipelineError(f"dvc: {error}") from None
    wanted = wanted.union(*(needs[stage] for stage in wanted))
    stale = {stage for stage in wanted if stage in changed or needs[stage] & changed}
    return {stage: needs[stage] & stale for stage in needs if stage in stale}


class Screen:
    """What the stages say: lines as they come; of a progress bar the latest state, in place on a terminal."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}
        self._shown: dict[str, float] = {}

    def line(self, stage: str, text: str) -> None:
        named = text if text.startswith(stage) else f"{stage}: {text}"
        tqdm.write(named, file=sys.stderr)

    def progress(self, stage: str, text: str) -> None:
        if sys.stderr.isatty():
            if stage not in self._bars:
                self._bars[stage] = tqdm(bar_format="{desc}", leave=False)
            self._bars[stage].set_description_str(text)
        elif time.monotonic() - self._shown.get(stage, 0.0) >= REPORT_SECONDS:
            self._shown[stage] = time.monotonic()
            self.line(stage, text)

    def close(self, stage: str) -> None:
        if stage in self._bars:
            self._bars.pop(stage).close()


@dataclass
class Running:
    """A stage's process, in a session of its own: Ctrl-C comes to this program alone, which passes it on."""

    process: subprocess.Popen[bytes]
    start: float = field(default_factory=time.monotonic)
    errors: list[str] = field(default_factory=list)  # held back: the last thing to be said should the stage fail


def run_all(needs: Mapping[str, set[str]], use: Callable[[str], str], nice: bool = False) -> None:
    """Run the stages, each once those that it needs are done; of one use, but NEITHER, one at a time.

    nice: stages on the cores give way to others, so that a GPU's stage is not kept from decoding what it computes next.
    Raises PipelineError with its own line if a stage fails, KeyboardInterrupt on a signal. First the other stages are
    interrupted (killed on a further signal) and awaited; what they finished is kept.
    """
    screen, todo, running = Screen(), list(needs), dict[str, Running]()
    events: Events = SimpleQueue()
    reason: BaseException | None = None  # why what runs has been interrupted
    handlers = _handle_signals(lambda *_: events.put(None))
    try:
        while running or (todo and reason is None):
            for stage in _ready(todo, running, needs, use) if reason is None else []:
                first = ["nice"] if nice and use(stage) == CORES else []
                running[stage] = _start(stage, [*first, *DVC, stage], events)
                todo.remove(stage)
                screen.line(stage, "starts")
            event = events.get()
            if event is None:
                _send(running, signal.SIGINT if reason is None else signal.SIGKILL)
                reason = reason or KeyboardInterrupt()
                continue
            stage, text = event
            if text is None:
                screen.close(stage)
                error = _finish(stage, running.pop(stage), screen)
                if error is not None and reason is None:
                    _send(running, signal.SIGINT)
                    reason = error
            elif ERROR.match(text):
                running[stage].errors.append(text.rstrip())
            elif reason is None and text.strip():
                (screen.line if text.endswith("\n") else screen.progress)(stage, text.strip())
    finally:
        _send(running, signal.SIGINT)  # an error of this program itself
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if reason is not None:
        raise reason


def _handle_signals(handler: Callable[..., None]) -> dict[signal.Signals, Any]:
    """Let the handler have the signals that mean to end this program; returns the former handlers.

    SIGINT also where it is ignored, as for a job in the background of a script: the stages would ignore it too.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, handler) for number in numbers}


def _ready(
    todo: Sequence[str], running: Mapping[str, Running], needs: Mapping[str, set[str]], use: Callable[[str], str]
) -> list[str]:
    """The stages that may start now, in order."""
    found: list[str] = []
    for stage in todo:
        busy = {use(other) for other in [*running, *found]} - {NEITHER}
        if use(stage) not in busy and not needs[stage] & {*todo, *running}:
            found.append(stage)
    return found


def _start(stage: str, command: Sequence[str], events: Events) -> Running:
    """Start the command; whatever it writes comes to `events`, cut at each \\n or \\r, then None."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    assert process.stdout is not None
    output = io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline="")

    def read() -> None:
        for text in output:
            events.put((stage, text))
        events.put((stage, None))

    Thread(target=read, daemon=True).start()
    return Running(process)


def _finish(stage: str, run: Running, screen: Screen) -> PipelineError | None:
    """What the stage failed with; None, and said so, where it did not."""
    if run.process.wait():
        said = [ERROR.sub("", text, 1) for text in run.errors] or [f"exited with {run.process.returncode}"]
        return PipelineError(f"{stage}: {said[0]}")
    for text in run.errors:
        screen.line(stage, text)
    screen.line(stage, f"done in {tqdm.format_interval(time.monotonic() - run.start)}")
    return None


def _send(running: Mapping[str, Running], number: signal.Signals) -> None:
    for run in running.values():
        with suppress(ProcessLookupError):
            os.killpg(run.process.pid, number)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("mer repro", description="Run the pipeline as dvc repro does, with one stage on "
                                     "the CPU's cores and one on the GPU side by side", allow_abbrev=False)
    parser.add_argument("stages", metavar="STAGE", nargs="*", help="as dvc repro takes them; default: all")
    asked = parser.parse_args(arguments)
    p = load_fusion()
    elsewhere = isinstance(p, Params) and p.runtime.executor == "ray"  # GPUs that this machine need not have
    gpu = elsewhere or pick_device(p.runtime.device) != "cpu"
    run_all(plan(asked.stages), lambda stage: uses(stage, p, gpu), nice=gpu)
    left = ", ".join(plan(asked.stages))
    print(f"repro: changed while it ran, so run it again: {left}" if left else "repro: everything is up to date")


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
