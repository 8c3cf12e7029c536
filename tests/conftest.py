"""What every test shares."""

import os

import pytest

# One thread each: the tests' networks are miniatures, in which threads only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _working_directory(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests start in the repository root, wherever pytest was called from."""
    monkeypatch.chdir(request.config.rootpath)
