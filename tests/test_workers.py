"""Worker processes that die, also while they have nothing to do."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages.engine.workers import Workers

ROOT = Path(__file__).parent.parent


@pytest.fixture
def workers() -> Iterator[Workers]:
    pool = Workers(2, timeout=60)
    yield pool
    pool.close()


def kill(count: int) -> None:
    """So many of the workers, and wait until that is noticed."""
    for process in multiprocessing.active_children()[:count]:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()


def square(number: int, seconds: float = 0.0) -> int:
    time.sleep(seconds)
    return number * number


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("noticed", [False, True])
def test_workers_that_die_idle_are_replaced(workers: Workers, count: int, noticed: bool) -> None:
    assert list(workers.map(pow, [(2, 2), (3, 2)])) == [4, 9]
    for _ in range(5):  # as often as it happens
        kill(count)
        if noticed:
            time.sleep(0.5)
        assert list(workers.map(pow, [(i, 2) for i in range(20)])) == [i * i for i in range(20)]
    assert len(multiprocessing.active_children()) == 2


def test_results_that_are_there_stay_when_all_die(workers: Workers) -> None:
    first = workers.map(square, [(i,) for i in range(3)])
    second = workers.map(square, [(i,) for i in range(3, 6)])  # as shards are begun, one ahead
    assert next(first) == 0
    list(workers.map(square, [(1, 1.0)] * 2))  # one for each worker: so all before is done
    kill(2)
    time.sleep(0.5)
    assert [*first, *second] == [1, 4, 9, 16, 25]


def test_one_that_dies_at_work_costs_its_clip_alone(workers: Workers) -> None:
    results: list[Any] = list(workers.map(os.kill, [(0, 0)]))
    assert results == [None]
    died, *others = workers.map(end_or_square, [(i,) for i in range(5)])
    assert str(died) == "the decoder crashed (SIGKILL, as when memory runs out)" and others == [1, 4, 9, 16]


def end_or_square(number: int) -> int:
    if not number:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_what_took_too_long_is_ended_and_what_raised_is_told(workers: Workers) -> None:
    workers.timeout = 0.5
    died, four = workers.map(square, [(1, 600.0), (2,)])
    assert str(died) == "stopped after 0.5 s (runtime.clip_timeout_seconds) without a result" and four == 4
    with pytest.raises(TypeError, match="can't multiply") as raised:
        list(workers.map(square, [("no number",)]))  # a mistake in the code
    assert "return number * number" in str(raised.value.__cause__)  # the worker's traceback


def wait_for_another(file: str) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        Path(file).write_text(str(process.pid))


@pytest.mark.parametrize("how", ["time-out", "close"])
def test_what_a_worker_runs_ends_with_it(workers: Workers, tmp_path: Path, how: str) -> None:
    file = tmp_path / "pid"
    workers.timeout = 2 if how == "time-out" else 60
    results = workers.map(wait_for_another, [(str(file),)])
    if how == "time-out":
        assert "stopped after 2 s" in str(next(results))
    else:
        while not (file.exists() and file.read_text()):
            time.sleep(0.01)
        workers.close()
    with suppress(psutil.NoSuchProcess):
        other = psutil.Process(int(file.read_text()))
        psutil.wait_procs([other], timeout=60)
        assert other.status() == psutil.STATUS_ZOMBIE  # where nobody reaps what lost its parent


def run(tmp_path: Path, program: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "program.py").write_text(program)
    return subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_workers_that_are_ended_while_they_start_say_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, """
import time
from stages.engine.errors import run_stage
from stages.engine.workers import Workers
def main():
    for hundredths in range(0, 40, 4):
        workers = Workers(2, 60)
        time.sleep(hundredths / 100)
        workers.close()
if __name__ == "__main__":
    run_stage(main)
""")
    assert (done.returncode, done.stderr) == (0, "")


def test_workers_that_never_live_are_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, """
import os
if __name__ == "__mp_main__":
    os._exit(3)  # in each worker, as it starts
from stages.engine.errors import run_stage
from stages.engine.workers import Workers
def main():
    workers = Workers(2, 60)
    try:
        list(workers.map(abs, [(1,)]))
    finally:
        workers.close()
if __name__ == "__main__":
    run_stage(main)
""")
    assert done.returncode == 1 and done.stderr.startswith("error: decoding processes end before they can work")
    assert done.stderr.count("\n") == 1
