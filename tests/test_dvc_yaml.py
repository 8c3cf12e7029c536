"""dvc.yaml against the code: each stage declares exactly the modules that it can import, and the params it reads."""

import re
from pathlib import Path
from typing import Any

import pytest
from code_deps import ROOT, code_deps

from stages.engine.yaml_file import read_yaml

STAGES: dict[str, Any] = read_yaml(ROOT / "dvc.yaml")["stages"]
EXTRACTORS: dict[str, Any] = read_yaml(ROOT / "params.yaml")["extractors"]
ARCHITECTURE: str = read_yaml(ROOT / "params.yaml")["fusion"]["architecture"]
UNTRACKED = {"runtime"}
# Neither a dependency nor hashed; its constants in version.py are, raised by hand
PLUMBING = ("stages/engine/", "stages/__init__.py")


def entries() -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """(name as dvc shows it, stage, its entry, what ${item...} stands for)."""
    found = []
    for name, entry in STAGES.items():
        if "foreach" in entry:
            found += [(f"{name}@{key}", name, entry["do"], {"key": key, **row}) for key, row in EXTRACTORS.items()]
        else:
            found.append((name, name, entry, {}))
    return found


def declared_code(entry: dict[str, Any], item: dict[str, Any]) -> list[str]:
    deps = [re.sub(r"\$\{item\.(\w+)\}", lambda m: str(item[m.group(1)]), dep) for dep in entry["deps"]]
    deps = [dep.replace("${fusion.architecture}", ARCHITECTURE) for dep in deps]
    return [dep for dep in deps if dep.endswith(".py")]


@pytest.mark.parametrize(("shown", "name", "entry", "item"), entries(), ids=[e[0] for e in entries()])
def test_code_deps_are_exactly_the_imports(shown: str, name: str, entry: dict[str, Any], item: dict[str, Any]) -> None:
    needed = code_deps(ROOT / f"stages/{name}.py")
    if item:  # the encoder, which the stage imports by the name in its row
        needed |= code_deps(ROOT / f"stages/encoders/{item['encoder']}.py")
        if item["encoder"] == "emovclip":
            needed.remove("stages/encoders/clip.py")  # its digest is in models/emovclip/trained.json
    if "stages/fusion/architectures.py" in needed:  # which imports the one that params.yaml names
        needed |= code_deps(ROOT / f"stages/fusion/{ARCHITECTURE}.py")
    declared = declared_code(entry, item)
    if item and "checkpoint" not in item:  # of weights there are none to load, but every row's stage names the loader
        needed.add("stages/encoders/checkpoints.py")
    assert len(declared) == len(set(declared))
    needed = {path for path in needed if not path.startswith(PLUMBING)}
    missing, superfluous = sorted(needed - set(declared)), sorted(set(declared) - needed)
    assert not missing and not superfluous, f"{shown}: missing {missing}, superfluous {superfluous}"


def test_every_stage_has_a_module_and_a_description() -> None:
    for shown, name, entry, _ in entries():
        assert entry["desc"], shown
        assert entry["cmd"].split()[:3] == ["python", "-m", f"stages.{name}"]
        assert (ROOT / f"stages/{name}.py").exists()


def test_modules_directly_in_stages_are_the_dvc_stages() -> None:
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"} == set(STAGES)


@pytest.mark.parametrize(("shown", "name", "entry", "item"), entries(), ids=[e[0] for e in entries()])
def test_tracked_params_cover_what_the_stage_reads(
    shown: str, name: str, entry: dict[str, Any], item: dict[str, Any]
) -> None:
    """Whatever a stage module reads as p.<section>.<name> is tracked; runtime never is."""
    tracked = {param.split(".")[0] for param in entry.get("params", []) if isinstance(param, str)}
    assert not tracked & UNTRACKED
    source = (ROOT / f"stages/{name}.py").read_text()
    sections = set(read_yaml(ROOT / "params.yaml"))
    read = set(re.findall(r"\bp(?:arams)?\.(\w+)", source)) & sections
    # corpus.path says where the clips lie today; their content is tracked through the manifest's digests
    assert read - UNTRACKED <= tracked | {"corpus"}, f"{shown} reads {sorted(read)}, tracks {sorted(tracked)}"


def test_how_to_evaluate_retrains_nothing() -> None:
    assert not [name for name, entry in STAGES.items() if name != "evaluate" and "evaluate" in entry.get("params", [])]


def test_the_cmd_holds_nothing_of_runtime() -> None:
    assert "runtime" not in (ROOT / "dvc.yaml").read_text()


def test_committed_files_name_no_registry_host() -> None:
    hosts = re.compile(r"https?://[^\s/]*(pypi|pythonhosted|npmjs|debian\.org|pytorch\.org)", re.I)
    for name in ("constraints.txt", "pyproject.toml", "Makefile", "README.md", ".ci/run"):
        assert not hosts.search((ROOT / name).read_text()), name
    assert not Path(ROOT / "uv.lock").exists() or "uv.lock" in (ROOT / ".gitignore").read_text()
