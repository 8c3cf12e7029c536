"""What every test shares."""

import os

import pytest

# One thread each: the tests' networks are miniatures, in which threads only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Files that take a minute and more: begun first, so that no worker is left alone with one at the end
LONG = ("test_pipeline.py", "test_broken_media.py", "test_crashes.py", "test_rankings_serve.py",
        "test_rankings_batch_kills.py", "test_import_features.py", "test_predict.py", "test_ray.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _working_directory(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests start in the repository root, wherever pytest was called from."""
    monkeypatch.chdir(request.config.rootpath)
