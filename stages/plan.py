"""Stage plan: what fusion.modalities needs of this pipeline, in data/plan/, and whether all that it needs is there.

It runs before anything is decoded: a corpus, checkpoint, binary or key that is missing is found now, with all others.
"""

from stages.engine.errors import PipelineError, run_stage
from stages.engine.params import load
from stages.engine.plan import write_plan
from stages.planning.needs import left_out
from stages.planning.requirements import missing, row_left_out


def main() -> None:
    p = load()
    if faults := missing(p):
        count = f"{len(faults)} things that this run needs are missing: " if len(faults) > 1 else ""
        raise PipelineError(count + "; ".join(faults))
    write_plan(left_out(p) | {f"extract/{name}": row_left_out(p, name) for name in p.extractors})


if __name__ == "__main__":
    run_stage(main)
