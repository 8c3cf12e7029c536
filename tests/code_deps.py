"""The modules that a stage really imports, derived from its source."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent


def module_path(module: str) -> Path | None:
    """The file of a module of ours, or None. Empty package files hold no code and do not count."""
    base = ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.exists():
            return path if path.stat().st_size else None
    return None


def imported_modules(path: Path) -> set[str]:
    """Names below `stages` that a file imports, at its top or within functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "stages"}


def code_deps(path: Path) -> set[str]:
    """Every file of ours that running `path` can import, itself included, relative to the repository root."""
    done: set[Path] = set()
    todo = [path]
    while todo:
        current = todo.pop()
        if current in done:
            continue
        done.add(current)
        for module in imported_modules(current):
            parts = module.split(".")
            # importing a.b.c runs a/__init__, a/b/__init__ too
            todo += filter(None, (module_path(".".join(parts[:i])) for i in range(1, len(parts) + 1)))
    return {str(p.relative_to(ROOT)) for p in done}
