"""What the tests of the extraction engine share."""

import copy
from pathlib import Path

from ruamel.yaml import YAML

from stages.engine.params import Params, load
from stages.engine.work import Input, Target
from stages.engine.yaml_file import read_yaml

ROOT = Path(__file__).parent.parent


def small_shards(folder: Path) -> Params:
    """Params with shards of four clips; params.yaml is written to the folder, which is the working directory."""
    values = copy.deepcopy(read_yaml(ROOT / "params.yaml"))
    values["corpus"]["shard_size"] = 4
    values["corpus"]["max_bad_fraction"] = 0.2
    values["runtime"]["device"] = "cpu"
    YAML().dump(values, folder / "params.yaml")
    return load()


def target(name: str = "some_stage", fingerprint: str = "f", kind: str = "text") -> Target:
    return Target(name, Path("out") / name, kind, {"extractor": name}, fingerprint)


def inputs(count: int) -> list[Input]:
    return [Input(f"c{i:02d}", i, i.to_bytes(16, "little")) for i in range(count)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
