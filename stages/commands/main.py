"""The program `mer`: one command with sub-commands, which act on the pipeline in the working directory.

    mer --help
    mer COMMAND --help
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from stages.engine.errors import PipelineError, run_stage

# name -> (module with a main(arguments), what `mer --help` says); imported only when chosen, since most load torch
COMMANDS = {
    "repro": ("stages.commands.repro", "dvc repro, with the CPU's cores and the GPU busy side by side"),
    "predict": ("stages.commands.predict", "emotions of new clips, by the trained ensemble"),
    "release": ("stages.commands.release", "the trained models as one folder for other machines, models/release"),
    "repair": ("stages.commands.repair", "remove a damaged store, so that dvc repro makes it anew"),
    "tables": ("stages.commands.tables", "the paper's Tables 1 and 2 on the current corpus, reports/tables.md"),
    "search": ("stages.commands.search", "random search of the fusion's params by nested cross-validation"),
    "compare": ("stages.commands.compare", "the WAF of two runs, their difference and whether it is more than chance"),
    "import-features": ("stages.commands.import_features", "a folder for dvc repro, made of feature files and labels"),
    "import-faces": ("stages.commands.import_faces", "face crops as MERTools keeps them, in place of crop_faces' own"),
    "export-features": ("stages.commands.export_features", "features of one extractor as MERTools' .npy files"),
    "compare-features": ("stages.commands.compare_features", "cosine per clip of two sets of features"),
    "estimate": ("stages.commands.estimate", "hours that the whole of MER2024 takes on several machines"),
}


def main() -> None:
    """The console script."""
    run_stage(dispatch, sys.argv[1:])


def dispatch(arguments: Sequence[str]) -> None:
    """Run the command that the first argument names. Raises PipelineError for an unknown one."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="mer", usage="mer COMMAND ...", epilog=f"commands (mer COMMAND --help says more):\n{listed}",
        description="Commands for the pipeline in the current folder; its stages run by dvc repro, or mer repro.",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments or ["--help"])
    if chosen.command not in COMMANDS:
        raise PipelineError(f"mer: found the command {chosen.command}, expected one of {', '.join(COMMANDS)}")
    importlib.import_module(COMMANDS[chosen.command][0]).main(chosen.rest)


if __name__ == "__main__":
    main()
