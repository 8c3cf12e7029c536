"""The stage rank_emotions as a process: killed and started again, two at once, and the key in no file or message."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_server import KEY, TOKENS_IN, TOKENS_OUT, Held, Server, fail, ranking_of, serving
from stage_runs import TRANSCRIPTS, make_house, ranked, spent, start, stored

PRICE = (TOKENS_IN * 2.5 + TOKENS_OUT * 10.0) / 1e6
WAITS = "another process is asking; waiting for it to end"


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def server(held: Held) -> Iterator[Server]:
    with serving(Server()) as running:
        running.default = held
        yield running
        held.open.set()


@pytest.fixture
def house(tmp_path: Path, server: Server) -> Path:
    return make_house(tmp_path, server.url)


def read_until(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError("".join(seen))


@pytest.mark.parametrize("group", [False, True], ids=["the stage", "its process group"])
def test_after_a_kill_no_answer_is_lost_and_none_is_paid_twice(
    server: Server, held: Held, house: Path, group: bool
) -> None:
    process = start(house)
    held.full.wait()  # one is answered and 16 requests are under way
    (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
    output = process.communicate()[0]  # nobody holds the standard output or error any more
    assert process.returncode == -signal.SIGKILL and KEY not in output
    assert len(stored(house)) == 1 and not (house / "data/rankings.jsonl").exists()
    again = start(house)
    read_until(again, f"{WAITS} (after a kill, for the replies that are under way: 120 s at most)")
    held.open.set()
    output = again.communicate()[0]
    assert again.returncode == 0, output
    assert ranked(house) == {t: ranking_of(t) for t in TRANSCRIPTS}
    assert server.answered == dict.fromkeys(TRANSCRIPTS, 1)
    rest = len(TRANSCRIPTS) - 17
    assert f"{rest} transcripts to ask gpt-test" in output and "estimate:" in output
    assert f"{rest} of {rest} transcripts ranked, {rest * TOKENS_IN} input and {rest * TOKENS_OUT} output" in output
    assert spent(output) == pytest.approx(len(TRANSCRIPTS) * PRICE, abs=1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_an_interrupt_what_is_under_way_is_awaited(server: Server, held: Held, house: Path, number: int) -> None:
    process = start(house)
    held.full.wait()
    os.killpg(process.pid, number)
    held.open.set()
    output = process.communicate()[0]
    assert process.returncode == 1
    *_, told, error = [line for line in output.splitlines() if " - " not in line]  # of the SDK's log
    asked = len(stored(house))
    assert told.startswith(f"rank_emotions: {asked} of {len(TRANSCRIPTS)} transcripts ranked, ")
    assert error == (f"error: interrupted; {asked} of {len(TRANSCRIPTS)} transcripts were ranked now, and every "
                     f"answer is kept: run again to ask only for the rest")
    assert server.answered == dict.fromkeys(stored(house), 1) and asked >= 17
    assert spent(output) == pytest.approx(asked * PRICE, abs=1e-4)


def test_a_second_interrupt_ends_the_stage_and_not_what_is_paid_for(server: Server, held: Held, house: Path) -> None:
    process = start(house)
    held.full.wait()
    process.send_signal(signal.SIGINT)
    while handles_sigterm(process.pid):  # until the first one is handed on
        os.sched_yield()
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130 and output.splitlines()[-1] == "interrupted"
    again = start(house)
    read_until(again, WAITS)
    held.open.set()
    assert "23 of 23 transcripts ranked" in again.communicate()[0]
    assert server.answered == dict.fromkeys(TRANSCRIPTS, 1)


def test_a_process_that_asks_and_is_killed_is_one_line(server: Server, held: Held, house: Path) -> None:
    import psutil

    process = start(house)
    held.full.wait()
    (payer,) = psutil.Process(process.pid).children()
    payer.kill()
    assert "ended with exit code -9; what is stored is kept: run again\n" in process.communicate()[0]
    assert process.returncode == 1


def test_two_stages_at_once_pay_once(server: Server, held: Held, house: Path) -> None:
    first = start(house)
    held.full.wait()
    second = start(house)
    read_until(second, WAITS)
    held.open.set()
    for process in (first, second):
        output = process.communicate()[0]
        assert process.returncode == 0, output
    assert ranked(house) == {t: ranking_of(t) for t in TRANSCRIPTS}
    assert server.answered == dict.fromkeys(TRANSCRIPTS, 1)


def test_the_key_is_in_no_file_output_or_process_list(server: Server, held: Held, house: Path) -> None:
    server.script = [fail(400, f"no, Bearer {KEY}")] * 3
    process = start(house)
    held.full.wait()
    lists = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)]
    assert all(any(name in line for line in lists) for name in (b"stages.rank_emotions", b"stages.engine.apart"))
    held.open.set()
    output = [process.communicate()[0]]
    server.key = "another"
    (house / "data/transcripts.csv").write_text("clip_id,transcript,source\nc,新的一句,corpus\n", encoding="utf-8")
    rejected = start(house)
    output += rejected.communicate()[0]
    assert rejected.returncode == 1 and "the key was not accepted" in "".join(output)
    files = [path.read_bytes() for path in house.rglob("*") if path.is_file()]
    assert len(files) > 3 and b"no, Bearer ***" in b"".join(files)
    for place in [*lists, *files, "".join(output).encode()]:
        assert KEY.encode() not in place and b"0123456789" not in place


def handles_sigterm(pid: int) -> bool:
    """Whether the process is not ended by it, as the kernel says."""
    caught = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught[0], 16) >> (signal.SIGTERM - 1) & 1)


def readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:  # ended since
        return False
    return True
