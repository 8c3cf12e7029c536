"""Stage extract@<name>: one row of `extractors` in params.yaml, its encoder over all clips, in features/<name>/."""

import sys
from pathlib import Path

from stages.encoders.assembly import encode_work, loaded_digest
from stages.engine.devices import stage_devices
from stages.engine.errors import PipelineError, run_stage
from stages.engine.extraction import leave_empty, write_store
from stages.engine.fingerprint import stage_fingerprint
from stages.engine.inputs import medium_digest, medium_inputs, medium_reader
from stages.engine.params import load
from stages.engine.plan import left_out
from stages.engine.work import Target


def main() -> None:
    p = load()
    name = sys.argv[1]
    if name not in p.extractors:
        raise PipelineError(f"params.yaml: extractors: found no row {name!r}, expected one of {sorted(p.extractors)}")
    row = p.extractors[name]
    if reason := left_out(f"extract/{name}"):
        leave_empty(f"extract@{name}", Path("features") / name, reason)
        return
    loaded, inputs = loaded_digest(row), medium_inputs(row.input)
    attributes = {"extractor": name, "encoder": row.encoder,
                  **{key: row.options.get(key) for key in ("checkpoint", "revision", "dtype")}}
    target = Target(f"extract@{name}", Path("features") / name, "features", attributes,
                    stage_fingerprint(f"extract@{name}", loaded))
    work = encode_work(name, row, medium_reader(row.input), p.runtime, row.keep_frames)
    write_store(target, inputs, work, p, stage_devices(p.runtime), source=medium_digest(row.input, inputs),
                loaded=loaded.hex())


if __name__ == "__main__":
    run_stage(main)
