"""Memory that is given up: a training keeps it, what decodes pictures does not. Each in its own process."""

import subprocess
import sys

import pytest

NUM_BYTES = 40 * 2**20  # of a tensor; up to 32 MiB glibc may keep by itself
PAGES = NUM_BYTES // 4096
TAKEN_AND_GIVEN_UP = (
    "from resource import RUSAGE_SELF, getrusage\n"
    "import torch\n"
    "faults = []\n"
    "for _ in range(20):\n"
    "    before = getrusage(RUSAGE_SELF).ru_minflt\n"
    f"    torch.zeros({NUM_BYTES}, dtype=torch.uint8)\n"
    "    faults.append(getrusage(RUSAGE_SELF).ru_minflt - before)\n"
    "print(sorted(faults)[10])\n"
)


def faults(before: str) -> int:
    """Median page faults where the same memory is taken and given up again and again."""
    code = before + TAKEN_AND_GIVEN_UP
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_training_on_the_processor_keeps_its_memory() -> None:
    of_training = "from sdpipe.training.compute import choose_compute\nchoose_compute('cpu', 'auto')\n"
    assert faults(of_training) < PAGES / 100


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_process_that_decodes_for_a_training_gives_its_memory_back() -> None:
    """As a fork of the training, it starts with what that has set."""
    of_worker = (
        "from sdpipe.training.compute import choose_compute\nchoose_compute('cpu', 'auto')\n"
        "from sdpipe.training.decoding_worker import start_worker\nstart_worker(0)\n"
    )
    assert faults(of_worker) >= PAGES
