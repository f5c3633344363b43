"""Stage check: every key of params.yaml, before anything runs for hours.

Its output never changes, so that a change in one section re-runs only the stages that read it.
"""

from pathlib import Path

from pipeline import run_stage
from sdpipe.config import read_params
from sdpipe.files import replacing
from sdpipe.params import check_params


def main() -> None:
    check_params(read_params(Path("params.yaml")))
    with replacing(Path("data/params.checked")) as beside:
        beside.write_text("The keys, types and ranges of params.yaml are right.\n")


if __name__ == "__main__":
    run_stage(main)
