"""What the demo costs: seconds per stage, a `dvc repro` with nothing to do, and peak memory.

    python -m benchmarks.demo

Clones this repository into a temporary folder, so what is measured is what is committed.
"""

import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1",
                         "PYTHONUNBUFFERED": "1"}


def timed_repro(folder: Path) -> tuple[list[tuple[str, float]], float]:
    """Run `dvc repro`: ((stage, seconds from its start to the next one's), ...) and the seconds in all."""
    start = time.monotonic()
    process = subprocess.Popen(["dvc", "repro"], cwd=folder, env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    marks: list[tuple[str, float]] = []
    assert process.stdout is not None
    for line in process.stdout:
        found = re.match(r"Running stage '(.+)'", line)
        if found:
            marks.append((found.group(1), time.monotonic()))
    if process.wait():
        raise SystemExit(f"dvc repro failed in {folder}")
    end = time.monotonic()
    following = [*(moment for _, moment in marks), end][1:]
    return [(name, after - at) for (name, at), after in zip(marks, following, strict=True)], end - start


class MemoryWatch:
    """Peak of the summed resident memory of this process's descendants, sampled from /proc.

    Of statm, since smaps_rollup, which accounts for shared pages, visits every page: 16 ms for a process with torch, a
    tenth of the demo's time.
    """

    def __enter__(self) -> "MemoryWatch":
        self.peak_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self.peak_mb = max(self.peak_mb, resident_mb(descendants(os.getpid())))


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = [int(child) for child in task.read_text().split()]
        except OSError:  # it has just ended
            continue
        children += found + [deeper for child in found for deeper in descendants(child)]
    return children


def resident_mb(pids: list[int]) -> float:
    """What the processes hold for themselves, summed, and the largest of what each may share with others: libraries
    that all have loaded count once."""
    own, shared = [0], [0]
    for pid in pids:
        try:
            resident, common = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
        except OSError:  # it has just ended
            continue
        own.append(resident - common)
        shared.append(common)
    return (sum(own) + max(shared)) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        subprocess.run([sys.executable, "-m", "compileall", "-q", "stages"], cwd=folder, check=True)  # as make setup
        with MemoryWatch() as memory:
            stages, total = timed_repro(folder)
        again, nothing = timed_repro(folder)
    print("| stage | seconds |\n|---|---|")
    for stage, seconds in stages:
        print(f"| {stage} | {seconds:.1f} |")
    print(f"| **all** | **{total:.1f}** |")
    print(f"\n`dvc repro` with nothing to do: {nothing:.1f} s ({len(again)} stages run). "
          f"Peak memory: {memory.peak_mb:.0f} MB. Cores: {len(os.sched_getaffinity(0))}. "
          f"CPU time: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime:.0f} s.")


if __name__ == "__main__":
    main()
