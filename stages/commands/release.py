"""The trained system as one folder for other machines, models/release (stages/inference/bundle.py says what is in it).

    make release
    mer predict --bundle models/release CLIP_OR_FOLDER ...
"""

from pathlib import Path

from stages.engine.errors import run_stage
from stages.inference.bundle import write_bundle
from stages.inference.card import read_metrics, render_card
from stages.inference.trained import trained_here

OUT = Path("models/release")
METRICS = Path("reports/metrics.json")


def main() -> None:
    trained = trained_here()
    card = render_card(trained, read_metrics(METRICS))
    size = write_bundle(OUT, trained, METRICS, card)
    print(f"release: {OUT}, {size / 1e6:.1f} MB; use it with: mer predict --bundle {OUT} CLIP_OR_FOLDER")


if __name__ == "__main__":
    run_stage(main)
