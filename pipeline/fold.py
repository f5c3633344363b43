"""Stage fold@<run>: weights.safetensors to folded.safetensors."""

import sys
from pathlib import Path

from sdpipe.deploy.fold import fold_file
from sdpipe.errors import errors_on_one_line


def main(run: str) -> None:
    folder = Path("models") / run
    fold_file(folder / "weights.safetensors", folder / "folded.safetensors")


if __name__ == "__main__":
    with errors_on_one_line():
        main(*sys.argv[1:])
