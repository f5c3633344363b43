"""What a module reaches by imports, read from the source without running it."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sdpipe", "pipeline")


def module_path(module: str) -> Path | None:
    """The file of one of our modules, relative to the root; None if it is no module of ours."""
    base = Path(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if (ROOT / path).is_file():
            return path
    return None


def imported_names(path: Path) -> set[str]:
    """Every dotted name that a file imports, at any depth, `if TYPE_CHECKING` included."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@cache
def our_imports(path: Path) -> set[Path]:
    """Files of ours that a file imports directly."""
    names = {name for name in imported_names(path) if name.split(".")[0] in PACKAGES}
    return {found for name in names if (found := module_path(name))}


@cache
def reached(start: Path) -> set[Path]:
    """Files of ours that a file reaches, itself and the packages' __init__ files included."""
    found, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            parents = {
                parent / "__init__.py" for parent in path.parents if (ROOT / parent / "__init__.py").is_file()
            }
            parents.discard(Path("__init__.py"))
            waiting += our_imports(path) | parents
    return found


def stage_files(stage: str) -> set[Path]:
    """Files of ours that a stage reaches by imports; of `deploy` also those that it registers, unimported."""
    found = reached(Path(f"pipeline/{stage}.py"))
    return found | reached(Path("sdpipe/deploy/release/served.py")) if stage == "deploy" else found
