"""Changing one value of a YAML file."""

from pathlib import Path

from ruamel.yaml import YAML


def set_value(file: Path, key: str, value: object) -> None:
    """`key` names the sections on the way too, as in fusion.hidden. All else stays, comments included."""
    yaml = YAML()
    values = yaml.load(file)
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section[last] = value
    yaml.dump(values, file)
