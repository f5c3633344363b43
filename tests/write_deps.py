"""`python tests/write_deps.py`: bring the lists of Python files in dvc.yaml up to date with the imports."""

import re

from imports import ROOT, stage_files

_STAGE = re.compile(r"  (\w+):")
_FILE = re.compile(r"( +- )(pipeline|sdpipe)/\S+\.py")


def with_deps(text: str) -> str:
    """dvc.yaml where each stage names the Python files that its result depends on, no others."""
    lines: list[str] = []
    stage, listed = "", ""
    for line in text.splitlines():
        if found := _STAGE.fullmatch(line):
            stage = found[1]
        if not (found := _FILE.fullmatch(line)):
            lines.append(line)
        elif stage != listed:  # the first of this stage stands for all
            lines += [f"{found[1]}{path}" for path in sorted(stage_files(stage))]
            listed = stage
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    definition = ROOT / "dvc.yaml"
    definition.write_text(with_deps(definition.read_text()))
