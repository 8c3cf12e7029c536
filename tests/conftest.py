"""What tests share. Heavy imports stay inside the fixtures: every pytest call reads this file."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from chat_server import Server

    from stages.rankings.cache import Cache

# One thread each: the tests' networks are miniatures, in which threads only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell's background jobs ignore Ctrl-C, and so would the programs that tests interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that take a minute and more: begun first, so that no worker is left alone with one at the end
LONG = ("test_pipeline.py", "test_broken_media.py", "test_crashes.py", "test_rankings_serve.py",
        "test_rankings_batch_kills.py", "test_import_features.py", "test_ray.py", "test_search.py", "test_compare.py")


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: tests that run DVC or servers wait for a sixth of their time."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _working_directory(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests start in the repository root, wherever pytest was called from."""
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture
def server() -> "Iterator[Server]":
    """A chat-completions server on loopback."""
    from chat_server import Server, serving

    with serving(Server()) as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> "Cache":
    """An empty cache of rankings for chat_server.QUESTION."""
    from chat_server import QUESTION

    from stages.rankings.cache import Cache

    return Cache(QUESTION, tmp_path)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For files that ask for it with `pytestmark`: stages set torch's threads for the whole process."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def clip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a miniature CLIP, for reading only."""
    import torch

    from stages.corpora.demo.clip_checkpoint import make_clip

    torch.set_num_threads(1)  # in a miniature they only wait for one another
    folder = tmp_path_factory.mktemp("checkpoint") / "clip"
    make_clip(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with trained models, for reading only."""
    from trained_run import make_trained

    root = tmp_path_factory.mktemp("trained") / "repository"
    make_trained(root)
    return root


@pytest.fixture
def trained_copy(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one's own, which is the working directory."""
    folder = Path(shutil.copytree(trained, tmp_path / "repository"))
    monkeypatch.chdir(folder)
    return folder
