"""The trained system as one folder for other machines, models/release (stages/inference/bundle.py says what is in it).

    mer release
    mer predict --bundle models/release CLIP_OR_FOLDER ...
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stages.engine.errors import run_stage
from stages.inference.bundle import write_bundle
from stages.inference.card import read_details, render_card
from stages.inference.trained import trained_here

OUT = Path("models/release")
DETAILS = Path("reports/details.json")


def main(arguments: Sequence[str]) -> None:
    argparse.ArgumentParser("mer release", description=f"The trained models and all that they need, in {OUT}",
                            allow_abbrev=False).parse_args(arguments)
    trained = trained_here()
    card = render_card(trained, read_details(DETAILS))
    size = write_bundle(OUT, trained, (DETAILS, Path("reports/metrics.json")), card)
    print(f"release: {OUT}, {size / 1e6:.1f} MB; use it with: mer predict --bundle {OUT} CLIP_OR_FOLDER")


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
