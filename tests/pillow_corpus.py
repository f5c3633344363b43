"""`sdpipe predict` over a folder of odd and damaged files, such as Pillow's own test images.

Usage:
    pip download --no-binary pillow --no-deps pillow==VERSION && tar xf pillow-VERSION.tar.gz
    python tests/pillow_corpus.py pillow-VERSION/Tests/images

Every file is predicted whatever its name, by one command as a user would call it, then each alone in a
process that measures it. Fails on a traceback, a missing or torn line, or a file that takes over 2 s of
processor time or over 1 GiB.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from sdpipe.errors import on_one_line
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.predictor import predict

LIMIT_S, LIMIT_MIB, PATIENCE_S = 2.0, 1024, 60
CLI = "from sdpipe.cli import main; main(prog_name='sdpipe')"


def run_command(model: Path, files: list[Path]) -> list[dict[str, object]]:
    """The whole folder by one command: its JSON lines, all whole, and one error line for each failure."""
    done = subprocess.run(
        [sys.executable, "-c", CLI, "predict", "--json", "--model", str(model), *map(str, files)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    found: list[dict[str, object]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["file"] for line in found] == [str(path) for path in files]
    failed = [line for line in found if not line["ok"]]
    assert done.returncode == (1 if failed else 0), done.stderr[-2000:]
    errors = done.stderr.splitlines()
    expected = [f"error: {on_one_line(str(line['file']))}: {line['message']}" for line in failed]
    assert errors == expected, [*(set(errors) - set(expected)), *(set(expected) - set(errors))]
    return found


def measure(model: Path) -> None:
    """In the measuring process: seconds and peak MiB of each name in the list on standard input."""
    artifact = open_artifact(model, "cpu")
    for name in json.load(sys.stdin):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        started = time.process_time()
        list(predict(artifact, [name], top_k=1, batch_size=1))
        seconds = time.process_time() - started
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        print(json.dumps([seconds, int(status["VmHWM"].split()[0]) / 1024]), flush=True)


def measure_each(model: Path, files: list[Path]) -> list[tuple[float, float, str]]:
    """Seconds of processor time and peak MiB of each file, names last."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--measure", str(model)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    names = json.dumps([str(path) for path in files])  # JSON can say a name of any bytes
    output, _ = process.communicate(names, timeout=PATIENCE_S + LIMIT_S * len(files))
    assert process.returncode == 0, f"the process ended with {process.returncode}"
    figures = [json.loads(line) for line in output.splitlines()]
    return [(*pair, str(path)) for pair, path in zip(figures, files, strict=True)]


def main(folder: Path) -> None:
    """Run, check, print."""
    from conftest import export_to, make_weights  # not above: PyTorch would count in what is measured

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert files, f"no files in {folder}"
    with tempfile.TemporaryDirectory() as name:
        model = export_to(Path(name) / "model.onnx", make_weights(channels=3))
        started = time.perf_counter()
        found = run_command(model, files)
        whole_s = time.perf_counter() - started
        figures = measure_each(model, files)
    codes = Counter(str(line.get("error", "predicted")) for line in found)
    print(f"{len(files)} files in {whole_s:.1f} s: {dict(codes.most_common())}")
    for title, at, unit in (("slowest", 0, "s of processor time"), ("largest", 1, "MiB at the peak")):
        print(f"{title}:")
        for row in sorted(figures, key=lambda row: -row[at])[:3]:
            print(f"  {row[at]:.2f} {unit}: {on_one_line(str(Path(row[2]).relative_to(folder)))}")
    over = [row for row in figures if row[0] > LIMIT_S or row[1] > LIMIT_MIB]
    assert not over, over


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--measure":
        measure(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]).resolve())
