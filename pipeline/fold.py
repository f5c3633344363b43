"""Stage fold@<run>: weights.safetensors to folded.safetensors."""

from pathlib import Path

from pipeline import run_stage
from sdpipe.deploy.fold import fold_file


def main(run: str) -> None:
    folder = Path("models") / run
    fold_file(folder / "weights.safetensors", folder / "folded.safetensors")


if __name__ == "__main__":
    run_stage(main)
