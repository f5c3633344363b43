"""Which files a run has, and what each was made from."""

from pathlib import Path

from sdpipe.deploy.files_of_run import files_of_run


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def test_every_file_stands_behind_the_one_that_it_was_made_from(tmp_path: Path) -> None:
    """The larger network first, 12 blocks before 7; each with its name, kind, source and weights."""
    touch(
        tmp_path, "model.onnx", "model.int8.onnx", "model.fp16.onnx", "ensemble.onnx", "weights.safetensors",
        "pruned/keep-7.onnx", "pruned/keep-12.onnx", "pruned/keep-12.safetensors", "pruned/prune.json",
        "pruned-int8/keep-7.int8.onnx", "pruned-int8/keep-12.int8.onnx", "pruned-extra/keep-3.onnx",
    )  # fmt: skip
    found = files_of_run(tmp_path)
    facts = [
        (one.name, one.kind, *(str(path.relative_to(tmp_path)) for path in (one.path, one.source)))
        for one in found
    ]
    assert facts == [
        ("fp32", "float32", "model.onnx", "weights.safetensors"),
        ("fp16", "fp16", "model.fp16.onnx", "model.onnx"),
        ("int8", "int8", "model.int8.onnx", "model.onnx"),
        ("keep-12", "float32", "pruned/keep-12.onnx", "pruned/keep-12.safetensors"),
        ("keep-12.int8", "int8", "pruned-int8/keep-12.int8.onnx", "pruned/keep-12.onnx"),
        ("keep-7", "float32", "pruned/keep-7.onnx", "pruned/keep-7.safetensors"),
        ("keep-7.int8", "int8", "pruned-int8/keep-7.int8.onnx", "pruned/keep-7.onnx"),
        ("keep-3", "float32", "pruned-extra/keep-3.onnx", "pruned-extra/keep-3.safetensors"),
        ("ensemble", "ensemble", "ensemble.onnx", "weights.safetensors"),
    ]
    networks = {"weights": ["fp32", "fp16", "int8", "ensemble"]} | {
        name: [name, f"{name}.int8"] for name in ("keep-12", "keep-7")
    }
    for weights, names in networks.items():
        assert [one.name for one in found if one.weights.stem == weights] == names
    assert [one.name for one in found if one.is_whole] == networks["weights"]
    assert [one.name for one in found if one.is_extra] == ["keep-3"]


def test_what_is_gone_or_was_made_again_is_left_out(tmp_path: Path) -> None:
    """An int8 file without its source, and a size that the stage has made since; model.onnx always stands."""
    touch(tmp_path, "pruned/keep-5.onnx", "pruned-extra/keep-5.onnx", "pruned-int8/keep-9.int8.onnx")
    assert [one.path for one in files_of_run(tmp_path)] == [
        tmp_path / "model.onnx",
        tmp_path / "pruned/keep-5.onnx",
    ]
