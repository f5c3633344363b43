"""`python -m sdpipe.runtime.first_prediction [FILE BATCH DEVICE]`: what one costs a fresh process."""

import json
import sys
from pathlib import Path

import numpy as np

from sdpipe.errors import errors_on_one_line
from sdpipe.runtime.artifact import open_artifact


def peak_bytes() -> int:
    """The most resident memory that this process had so far."""
    # Not getrusage(): its peak goes over from the process that started this one.
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) * 1024


def main(arguments: list[str]) -> None:
    """Open FILE, predict one batch of black images, and say at once that it is done."""
    if arguments:
        name, batch_size, device = arguments
        artifact = open_artifact(Path(name), device)
        height, width = artifact.metadata.image_size
        artifact.run(np.zeros((int(batch_size), height, width, artifact.metadata.channels), dtype=np.uint8))
    print(json.dumps({"peak_bytes": peak_bytes()}), flush=True)


if __name__ == "__main__":
    with errors_on_one_line():
        main(sys.argv[1:])
