"""The files that runs can be deployed as, side by side: error, latency, size; and the choice among them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sdpipe.data.store import DataSet
from sdpipe.deploy.confidence import error_fraction
from sdpipe.deploy.files_of_run import EXTRA, FLOAT32, INT8, PRUNED, WEIGHTS, files_of_run
from sdpipe.deploy.held_out import open_held_out
from sdpipe.deploy.proof.parity import ImageSlices, onnx_logits
from sdpipe.deploy.pruning.further import settings_of
from sdpipe.deploy.timing.latency import measure_latency
from sdpipe.errors import DataError, ModelError, SdpipeError
from sdpipe.files import read_json, sha256_of, write_csv
from sdpipe.runtime.artifact import Artifact, open_artifact
from sdpipe.training.weights import load_info

THROUGHPUT_BATCH = 64
_BATCH = 256  # images at a time for the errors
_REPEATS = 30  # timed calls of each file at each batch size, interleaved


@dataclass(frozen=True, kw_only=True)
class ParetoRow:
    """A file of a run; a row of pareto.csv. Errors are fractions, of the ONNX file."""

    run: str  # its folder's name, unlike that of every other run
    variant: str
    path: Path
    blocks: int  # kept
    num_blocks: int
    validation_error: float
    test_error: float
    latency_ms: dict[int, float]  # by batch size, median
    speedup: float  # throughput at batch 64 over that of the run's full fp32 file
    num_bytes: int
    on_front: bool  # no other has a lower test error at no more latency, or the reverse
    parity: bool | None  # whether evaluate proved this very file; None: it did not look at it


def check_same_data(folders: Sequence[Path]) -> None:
    """Raise DataError if the runs were trained on different data."""
    if len({load_info(folder / WEIGHTS).dataset_digest for folder in folders}) > 1:
        raise DataError(
            f"{', '.join(map(str, folders))}: trained on different data; compare one data set at a time"
        )


def open_families(folders: Sequence[Path]) -> list[list[Artifact]]:
    """The files of each run, opened on the processor: fp32, int8, the pruned ones, then these as int8.

    Raises ModelError if a run has no model.onnx, if a file cannot be read, is of another training or was made
    with other settings.
    """
    families = []
    for folder in folders:
        artifacts = []
        info = load_info(folder / WEIGHTS)
        # float16 is for GPUs.
        model, *others = (one for one in files_of_run(folder) if one.kind in (FLOAT32, INT8))
        if not model.path.is_file():
            raise ModelError(f"{model.path}: no such model file; run `dvc repro`")
        others.sort(key=lambda one: (not one.is_whole, one.kind == INT8))
        for one in (model, *others):
            path = one.path
            artifact = open_artifact(path, "cpu")
            if artifact.metadata.fingerprint != info.fingerprint:
                raise ModelError(
                    f"{path}: of training {artifact.metadata.fingerprint}, and {folder} holds "
                    f"{info.fingerprint}; run `dvc repro`, or delete it if it lies in {EXTRA}"
                )
            if one.is_extra:
                _check_settings(path, folder)
            artifacts.append(artifact)
        families.append(artifacts)
    return families


def _check_settings(extra: Path, run_folder: Path) -> None:
    """Raise ModelError unless a size of pruned-extra/ was made as those of pruned/ are now."""
    made, now = extra.with_suffix(".json"), run_folder / PRUNED / "prune.json"
    if not made.exists() or settings_of(read_json(made)) != settings_of(read_json(now)):
        raise ModelError(
            f"{extra}: made with other settings than {run_folder / PRUNED}; delete it, or make it again "
            "with --keep"
        )


def measure(
    folders: Sequence[Path],
    parities: Mapping[str, bool],
    dataset: DataSet,
    batch_size: int,
) -> list[ParetoRow]:
    """Errors and latency of all files of the runs, measured now. batch_size: at which the front is drawn.

    folders: each run once, all trained on `dataset`, else DataError; parities: as `read_parities` gives them,
    of all. Raises as `open_families` does.
    """
    families = open_families(folders)
    artifacts = [one for family in families for one in family]
    # Each run's own: a run of another seed was trained on others' held-out images.
    validated = [open_held_out(load_info(folder / WEIGHTS), dataset)[1] for folder in folders]
    calls: dict[str, Callable[[np.ndarray], object]] = {str(one.path): one.run for one in artifacts}
    sizes = sorted({1, THROUGHPUT_BATCH, batch_size})
    times = measure_latency(calls, dataset.test_images_NHWC, sizes, _REPEATS)

    def latency_of(artifact: Artifact) -> dict[int, float]:
        return {size: times[f"batch_{size}"][str(artifact.path)]["median_ms"] for size in sizes}

    variants: list[ParetoRow] = []
    with tqdm(total=len(artifacts), desc="errors", unit="file", disable=None) as progress:
        for run, family, held_out in zip(run_names(folders), families, validated, strict=True):
            full_ms = latency_of(family[0])[THROUGHPUT_BATCH]
            for artifact in family:
                latency_ms = latency_of(artifact)
                variants.append(
                    ParetoRow(
                        run=run,
                        variant=artifact.metadata.variant,
                        path=artifact.path,
                        blocks=sum(scale != 0 for scale in artifact.metadata.scales),
                        num_blocks=len(artifact.metadata.scales),
                        validation_error=_error(artifact, held_out, held_out.labels_N),
                        test_error=_error(artifact, dataset.test_images_NHWC, dataset.test_labels_N),
                        latency_ms=latency_ms,
                        speedup=full_ms / latency_ms[THROUGHPUT_BATCH],
                        num_bytes=artifact.path.stat().st_size,
                        on_front=False,
                        parity=parities.get(sha256_of(artifact.path)),
                    )
                )
                progress.update()
    return mark_front(variants, batch_size)


def read_parities(run_folder: Path) -> dict[str, bool]:
    """SHA-256 -> whether its parity held, of the files that the run's metrics.json is about.

    Empty before evaluate has run. Raises DataError if metrics.json cannot be read.
    """
    path = run_folder / "metrics.json"
    if not path.exists():
        return {}
    metrics = read_json(path, ("model_sha256", "parity", "variants"))
    try:
        found = [(each["sha256"], each["parity"]) for each in metrics["variants"].values()]
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected sha256 and parity of each variant; run `dvc repro`") from error
    return {
        digest: proved is True for digest, proved in [(metrics["model_sha256"], metrics["parity"]), *found]
    }


def run_names(folders: Sequence[Path]) -> list[str]:
    """The name of each folder; of those with one name, the shortest end of the path that no other has."""
    parts = [folder.absolute().parts for folder in folders]

    def is_alone(end: tuple[str, ...]) -> bool:
        return sum(other[-len(end) :] == end for other in parts) == 1

    def shortest(own: tuple[str, ...]) -> tuple[str, ...]:
        return next(own[-num:] for num in range(1, len(own) + 1) if is_alone(own[-num:]))

    return ["/".join(shortest(own)) for own in parts]


def _error(artifact: Artifact, images_NHWC: ImageSlices, labels_N: np.ndarray) -> float:
    return error_fraction(onnx_logits(artifact, images_NHWC, _BATCH), labels_N)


def mark_front(variants: Sequence[ParetoRow], batch_size: int) -> list[ParetoRow]:
    """The same, and whether each lies on the Pareto front of test error against latency.

    A file that failed its parity does not, and keeps no other from it.
    """
    proved = [one for one in variants if one.parity is not False]

    def dominates(other: ParetoRow, one: ParetoRow) -> bool:
        ours = (one.test_error, one.latency_ms[batch_size])
        theirs = (other.test_error, other.latency_ms[batch_size])
        return theirs != ours and theirs[0] <= ours[0] and theirs[1] <= ours[1]

    return [
        replace(one, on_front=one in proved and not any(dominates(other, one) for other in proved))
        for one in variants
    ]


def _offered(variants: Sequence[ParetoRow]) -> list[ParetoRow]:
    """Those that may be picked. Raises SdpipeError if each failed its parity."""
    proved = [one for one in variants if one.parity is not False]
    if not proved:
        raise SdpipeError("no file to pick: the parity of each has failed; metrics.json says so")
    return proved


def pick_by_latency(variants: Sequence[ParetoRow], latency_ms: float, batch_size: int) -> ParetoRow:
    """The one of lowest validation error among those that take at most so long for a batch.

    The validation part decides, so that the test error of the chosen one is still an honest one. Of equals
    the faster is taken. None that failed its parity is. Raises SdpipeError, naming the fastest, if there is
    none.
    """
    offered = _offered(variants)
    fitting = [one for one in offered if one.latency_ms[batch_size] <= latency_ms]
    if not fitting:
        nearest = min(offered, key=lambda one: one.latency_ms[batch_size])
        raise SdpipeError(
            f"no file takes at most {latency_ms:g} ms at batch {batch_size}; the fastest, {nearest.path}, "
            f"takes {nearest.latency_ms[batch_size]:.3g} ms"
        )
    return min(fitting, key=lambda one: (one.validation_error, one.latency_ms[batch_size]))


def pick_by_error(variants: Sequence[ParetoRow], max_error: float, batch_size: int) -> ParetoRow:
    """The fastest among those whose validation error is at most so much; of equals the better one.

    None that failed its parity is. Raises SdpipeError, naming the best, if there is none.
    """
    offered = _offered(variants)
    fitting = [one for one in offered if one.validation_error <= max_error]
    if not fitting:
        nearest = min(offered, key=lambda one: one.validation_error)
        raise SdpipeError(
            f"no file has a validation error of at most {max_error:g}; the best, {nearest.path}, has "
            f"{nearest.validation_error:.4f}"
        )
    return min(fitting, key=lambda one: (one.latency_ms[batch_size], one.validation_error))


def write_table(path: Path, variants: Sequence[ParetoRow]) -> None:
    """pareto.csv: a row for each file."""
    sizes = list(variants[0].latency_ms)
    header = [
        *("run", "variant", "path", "blocks", "num_blocks", "validation_error", "test_error"),
        *(f"batch_{size}_ms" for size in sizes),
        *("speedup", "bytes", "on_front", "parity"),
    ]
    rows = []
    for one in variants:
        facts = [one.run, one.variant, one.path, one.blocks, one.num_blocks]
        times = [f"{one.latency_ms[size]:.4f}" for size in sizes]
        measured = [one.validation_error, one.test_error, *times, f"{one.speedup:.3f}"]
        rows.append([*facts, *measured, one.num_bytes, one.on_front, one.parity])
    write_csv(path, header, rows)
