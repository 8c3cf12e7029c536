"""Work that is brought to its end even where the program is killed: requests under way that cost money.

A process in a session of its own does it, which no signal to the program or its process group reaches. A socket tells
it when the program is gone: then, as at SIGTERM, the work begins nothing new, ends what is under way and stores it.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from stages.engine.errors import PipelineError, describe, is_machines


def run_apart(function: str, arguments: Mapping[str, Any], held: int) -> None:
    """Call `function` ("module:name") with these arguments, JSON all of them, in a process of its own.

    `held` is a file descriptor that stays open there: a lock on it lasts until what is under way has ended, whatever
    becomes of this process. What is printed there is printed here; the standard error is shared. The first SIGINT or
    SIGTERM asks the process to end and awaits it; the second one has its usual effect here. Raises PipelineError as the
    function does, or where the process ends without a word.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "stages.engine.apart", function], stdin=theirs.fileno(), stdout=subprocess.PIPE,
                encoding="utf-8", pass_fds=[held], start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )
        with _handed_on(process) as signals:
            with suppress(ConnectionError):  # it has ended
                ours.sendall(json.dumps(arguments).encode() + b"\n")
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    print(line, end="", flush=True)
            outcome = b""
            with suppress(ConnectionError), ours.makefile("rb") as channel:
                outcome = channel.read()
            code = process.wait()
    error = json.loads(outcome) if outcome else None
    if error is not None:
        raise PipelineError(error)
    for number in signals:
        signal.raise_signal(number)
    if not outcome:
        raise PipelineError(f"{function}: its process ended with exit code {code}; what is stored is kept: run again")


@contextmanager
def _handed_on(process: "subprocess.Popen[str]") -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM goes to the process, and into the list; then both have their former effect."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    watch = signal.set_wakeup_fd(-1)  # of engine.interrupts, which would end this process after a second

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(watch, warn_on_full_buffer=False)

    def hand_on(number: int, _: Any) -> None:
        restore()
        seen.append(number)
        process.terminate()

    for number in before:
        signal.signal(number, hand_on)
    try:
        yield seen
    finally:
        if not seen:
            restore()


def _main(function: str) -> None:
    """The process: its standard input is the socket."""
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    channel = socket.socket(fileno=0)
    with channel.makefile(encoding="utf-8") as lines:
        line = lines.readline()
    if not line.endswith("\n"):  # the program is gone already
        return
    threading.Thread(target=_watch, args=[channel], daemon=True).start()
    module, _, name = function.partition(":")
    error = None
    try:
        getattr(importlib.import_module(module), name)(**json.loads(line))
    except PipelineError as fault:
        error = str(fault)
    except (OSError, MemoryError) as fault:
        if not is_machines(fault):
            raise
        error = describe(fault)
    with suppress(OSError):
        channel.sendall(json.dumps(error).encode())


def _watch(channel: socket.socket) -> None:
    """Wait for the end of the program, which sends nothing more; nobody reads what is printed after that."""
    channel.recv(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    _main(sys.argv[1])
