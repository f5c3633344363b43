"""The ONNX files of a run, models/<run>/, and what each was made from.

model.onnx            the whole network, of weights.safetensors
model.fp16.onnx       the same as 16-bit floats, and
model.int8.onnx       as 8-bit integers
pruned/keep-N.onnx    N of its blocks, of pruned/keep-N.safetensors
pruned-int8/keep-N.int8.onnx
                      the same as 8-bit integers
pruned-extra/         further sizes, which `sdpipe prune --keep` makes and no stage looks at
ensemble.onnx         its sub-networks, of weights.safetensors
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdpipe.runtime.artifact import ENSEMBLE

WEIGHTS, MODEL = "weights.safetensors", "model.onnx"
PRUNED, PRUNED_INT8, EXTRA = "pruned", "pruned-int8", "pruned-extra"
FP32 = "fp32"  # the name of model.onnx; others are named by what they are of it
FLOAT32, FLOAT16, INT8 = "float32", "fp16", "int8"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One file of a run."""

    name: str  # as in its metadata: fp32, fp16, int8, keep-17, keep-17.int8, ensemble
    path: Path
    kind: str  # float32, fp16, int8, ensemble
    source: Path  # what it was made from: weights, or of fp16 and int8 the float32 file
    weights: Path  # of its network

    @property
    def is_whole(self) -> bool:
        """Whether it has all blocks."""
        return self.weights.name == WEIGHTS

    @property
    def is_extra(self) -> bool:
        """Whether it was asked for later, so that no stage knows of it."""
        return self.path.parent.name == EXTRA


def files_of_run(folder: Path) -> list[Variant]:
    """The files that a run has: model.onnx, there or not, and the others that are there.

    A file comes after the one that it was made from, the larger of the pruned networks first. A size of
    pruned-extra/ that the stage has made since is left out, and so is an int8 file whose source is gone.
    """
    model, trained = folder / MODEL, folder / WEIGHTS
    found = [Variant(name=FP32, path=model, kind=FLOAT32, source=trained, weights=trained)]
    for kind in (FLOAT16, INT8):
        path = folder / f"model.{kind}.onnx"
        found.append(Variant(name=kind, path=path, kind=kind, source=model, weights=trained))
    made = list(_pruned(folder / PRUNED))
    for one in made:
        name = f"{one.name}.{INT8}"
        path = folder / PRUNED_INT8 / f"{name}.onnx"
        found += [one, Variant(name=name, path=path, kind=INT8, source=one.path, weights=one.weights)]
    names = {one.name for one in made}
    found += [one for one in _pruned(folder / EXTRA) if one.name not in names]
    ensemble = folder / f"{ENSEMBLE}.onnx"
    found.append(Variant(name=ENSEMBLE, path=ensemble, kind=ENSEMBLE, source=trained, weights=trained))
    return [one for one in found if one.path == model or one.path.is_file()]


def _pruned(folder: Path) -> Iterator[Variant]:
    """The float32 files in it, more blocks first: keep-23 before keep-9."""
    for path in sorted(folder.glob("*.onnx"), key=lambda path: (len(path.stem), path.stem), reverse=True):
        weights = path.with_suffix(".safetensors")
        yield Variant(name=path.stem, path=path, kind=FLOAT32, source=weights, weights=weights)
