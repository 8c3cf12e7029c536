"""What `mer estimate` says of the whole of MER2024: sums and their basis, from figures that were measured once."""

import pytest

from stages.commands import estimate
from stages.engine.params import load

UNITS = {"hubert": 37e9, "clip": 162e9, "13B": 1516e9, "7B": 779e9}  # as counted
CORE = {"face of a frame": 5e-3, "frames of a clip": 0.1, "sound of a clip": 0.01, "clip trained on once": 5e-4,
        "clip predicted": 1e-4, "clip predicted with every subset": 2e-4}  # seconds, as benchmarks/README.md has them


def hours(text: str) -> float:
    text = text.strip("* ")
    return float(text.removesuffix(" min")) / 60 if text.endswith("min") else float(text)


def test_the_table_sums_up_and_says_what_was_measured() -> None:
    header, _, *lines = estimate.table(estimate.stages_of(load("presets/mer2024.yaml"), UNITS, CORE)).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    *stages, together, measured, overlapped = rows
    assert "one H200" in header and all(row[1].startswith(("measured", "computed")) for row in stages)
    for column, machine in enumerate(estimate.MACHINES, start=2):
        assert hours(together[column]) == pytest.approx(sum(hours(row[column]) for row in stages), abs=0.3)
        cores = [hours(row[column]) for row in stages if row[1].startswith("measured")]
        assert hours(measured[column]) == pytest.approx(sum(cores), abs=0.15), machine.name
        assert hours(overlapped[column]) < hours(together[column])
    by_name = {row[0]: hours(row[2]) for row in stages}
    assert by_name["crop_faces, every frame"] == pytest.approx(120_625 * 4.5 * 25 * 5e-3 / 16 / 3600, abs=0.05)
    assert hours(overlapped[2]) <= 6  # the target


def test_the_fusion_is_measured_with_the_code_that_trains_it(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "DIMENSIONS", dict.fromkeys(estimate.DIMENSIONS, 8))
    seconds = estimate.fusion_seconds(load("presets/mer2024.yaml"))
    assert seconds.keys() == {"clip trained on once", "clip predicted", "clip predicted with every subset"}
    assert all(second > 0 for second in seconds.values())
