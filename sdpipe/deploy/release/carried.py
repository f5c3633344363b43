"""What a version in MLflow's registry carries beside the ONNX file: all of sdpipe that a server needs."""

import hashlib
from pathlib import Path

import sdpipe
from sdpipe.files import sha256_of
from sdpipe.provenance import code_digest

SERVED = Path(__file__).with_name("served.py")

# What served.py imports of sdpipe; a registered model carries its own copy.
PACKAGE = Path(sdpipe.__file__).parent
SHIPPED = (
    "__init__.py",
    "errors.py",
    "runtime/__init__.py",
    "runtime/artifact.py",
    "runtime/cores.py",
    "runtime/image.py",
    "runtime/jpeg_2000_limits.py",
    "runtime/manifest.py",
    "runtime/memory.py",
    "runtime/metadata.py",
    "runtime/onnx_file.py",
    "runtime/picture_limits.py",
    "runtime/pixel_modes.py",
    "runtime/serving.py",
    "runtime/shapes.py",
    "runtime/tiff_limits.py",
)

# As in pyproject.toml; the CPU's package, which has wheels for every platform.
REQUIREMENTS = ["numpy>=1.26", "Pillow>=11.2.1", "onnxruntime>=1.24", "pandas"]


def carried_digest() -> str:
    """SHA-256 over what a registered model carries beside the ONNX file, and the packages it asks for."""
    facts = [*REQUIREMENTS, sha256_of(SERVED), code_digest(PACKAGE, SHIPPED)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()
