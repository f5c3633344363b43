"""`sdpipe prune`: the sizes of all runs side by side, and one picked."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import make_dataset
from deployable import sha256
from pruned_runs import make_pruned_run

from sdpipe.cli import main
from sdpipe.data.store import DataSet
from sdpipe.files import read_json, write_json
from sdpipe.runtime.artifact import open_artifact
from sdpipe.training.weights import load_weights, save_weights


@pytest.fixture(scope="module")
def stochastic(tmp_path_factory: pytest.TempPathFactory, dataset: DataSet) -> Path:
    return make_pruned_run(tmp_path_factory.mktemp("models") / "stochastic", dataset)


@pytest.fixture
def runs(stochastic: Path, project: Path) -> Path:
    """A project with one pruned run of 14 layers."""
    make_dataset(project / "data" / "animals")
    shutil.copytree(stochastic, project / "models" / "stochastic")
    return project / "models"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["prune", *map(str, arguments)])


def compared(folder: Path) -> list[dict[str, str]]:
    """The rows of its pareto.csv."""
    with (folder / "pareto.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_the_command_compares_and_picks(runs: Path, tmp_path: Path) -> None:
    """A table, a CSV of the same rows, a picture; further sizes outside DVC's folder; a copy of the pick."""
    before = {path: path.read_bytes() for path in (runs / "stochastic" / "pruned").iterdir()}
    result = call("--keep", "2")
    assert result.exit_code == 0, result.output
    rows = compared(runs)
    assert [(row["variant"], row["blocks"]) for row in rows] == [
        ("fp32", "6"), ("keep-5", "5"), ("keep-3", "3"), ("keep-2", "2"),
    ]  # fmt: skip
    assert [line.split()[1] for line in result.stdout.splitlines()[1:]] == [row["variant"] for row in rows]
    assert float(rows[0]["speedup"]) == 1
    assert (runs / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert {path: path.read_bytes() for path in (runs / "stochastic" / "pruned").iterdir()} == before
    images_N, labels_N = np.load("data/animals/test_images.npy"), np.load("data/animals/test_labels.npy")
    for row in rows:
        logits_NK = open_artifact(Path(row["path"]), "cpu").run(images_N)[0]
        assert float(row["test_error"]) == (logits_NK.argmax(axis=1) != labels_N).mean()
    picked = call("--max-error", "1", "--copy-to", tmp_path / "new" / "chosen.onnx", "--batch-size", 2)
    assert picked.exit_code == 0, picked.output
    path = Path(picked.stdout.strip())
    assert (tmp_path / "new" / "chosen.onnx").read_bytes() == path.read_bytes()
    none = call("--latency-ms", "0.000001")
    assert none.exit_code == 1
    assert "error: no file takes at most 1e-06 ms at batch 1; the fastest, models/stochastic/" in none.stderr


def test_what_was_picked_is_said_before_it_is_copied(runs: Path) -> None:
    """To a place that the measuring itself took away."""
    result = call("--max-error", "1", "--out", "out", "--copy-to", "out/pareto.png/chosen.onnx")
    assert result.exit_code == 1
    assert Path(result.stdout.strip()).is_file()
    assert "out/pareto.png" in result.stderr.splitlines()[-1]


def test_a_failed_parity_is_marked(runs: Path) -> None:
    """By the file's SHA-256 in metrics.json; what was made again since is not the one that failed."""
    run = runs / "stochastic"
    digests = {name: sha256(run / "pruned" / f"{name}.onnx") for name in ("keep-5", "keep-3")}
    variants = {name: {"sha256": digest, "parity": name != "keep-3"} for name, digest in digests.items()}
    metrics = {"model_sha256": "0" * 64, "parity": False, "variants": variants}
    (run / "metrics.json").write_text(json.dumps(metrics))
    result = call()
    assert result.exit_code == 0, result.output
    rows = compared(runs)
    assert [(row["variant"], row["parity"]) for row in rows] == [
        ("fp32", ""), ("keep-5", "True"), ("keep-3", "False"),
    ]  # fmt: skip
    assert rows[2]["on_front"] == "False"
    assert [line.split()[-1] for line in result.stdout.splitlines()[2:]] == ["held", "failed"]


def test_an_older_run_stops_the_others_only_where_it_is_named(runs: Path) -> None:
    """Its metrics.json has no variants; its files are compared as any that evaluate did not look at."""
    older = "models/stochastic/metrics.json: expected an entry variants; an older sdpipe wrote it"
    damaged = "models/stochastic/metrics.json: expected sha256 and parity of each variant"
    metrics = {"model_sha256": sha256(runs / "stochastic" / "model.onnx"), "parity": True}
    for found, said in ((metrics, older), (metrics | {"variants": None}, damaged)):
        (runs / "stochastic" / "metrics.json").write_text(json.dumps(found))
        named = call("models/stochastic")
        assert named.exit_code == 1
        assert named.stderr.startswith(f"error: {said}")
        result = call()
        assert result.exit_code == 0, result.output
        (note,) = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
        assert note.startswith(f"note: {said}")
        assert note.endswith("whether the parity of its files held is not known")
        assert [row["parity"] for row in compared(runs)] == ["", "", ""]


@pytest.mark.slow
def test_a_run_that_is_not_exported_yet_stops_no_other(runs: Path) -> None:
    """As where a sweep was stopped, or the papers' recipe trains alone; unless it is asked for."""
    (runs / "alone").mkdir()
    shutil.copy(runs / "stochastic" / "weights.safetensors", runs / "alone")
    result = call()
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("note: models/alone: left out, it has no model.onnx yet\n")
    assert "models/alone/model.onnx: no such model file" in call("models/alone").stderr
    (runs / "stochastic" / "model.onnx").unlink()
    assert "error: models/: no run has a model.onnx; `dvc repro` makes it" in call().stderr


@pytest.mark.slow
def test_runs_of_older_data_are_passed_over(runs: Path) -> None:
    """Unless they are asked for; `alt` stands before the others, so it would have decided the data set."""
    shutil.copytree(runs / "stochastic", runs / "alt")
    weights = load_weights(runs / "alt" / "weights.safetensors")
    info = replace(weights.info, dataset="gone", dataset_digest="0" * 64)
    save_weights(runs / "alt" / "weights.safetensors", replace(weights, info=info))
    result = call()
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("note: models/alt: left out, data/gone is not what it was trained on\n")
    assert "alt" not in result.stdout
    assert "data/gone" in call("models/alt").stderr
    shutil.rmtree(runs / "stochastic")
    assert "data/gone" in call().stderr


@pytest.mark.slow
def test_a_size_made_with_other_settings_is_refused(runs: Path) -> None:
    """Beside a family that the stage made anew it would be compared with what it is no part of."""
    assert call("--keep", "2").exit_code == 0
    path = runs / "stochastic" / "pruned" / "prune.json"
    facts = read_json(path)
    facts["prune"]["keep"] = [0.9]
    write_json(path, facts)
    assert call().exit_code == 0
    facts["prune"]["num_statistics"] += 1
    write_json(path, facts)
    result = call()
    assert result.exit_code == 1
    assert "pruned-extra/keep-2.onnx: made with other settings than models/stochastic/pruned" in result.stderr
    assert call("--keep", "2").exit_code == 0


def test_files_of_another_training_are_refused(runs: Path) -> None:
    path = runs / "stochastic" / "weights.safetensors"
    weights = load_weights(path)
    save_weights(path, replace(weights, info=replace(weights.info, fingerprint="f" * 16)))
    result = call()
    assert result.exit_code == 1
    assert "model.onnx: of training 0123456789abcdef" in result.stderr
    assert "made from another training; run `dvc repro`" in call("--keep", 2).stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--keep", "6"), 1, "expected 1 to 5 of its 6 blocks, got 6"),
        (("--keep", "0"), 1, "expected 1 to 5 of its 6 blocks, got 0"),
        (("--keep", "two"), 2, "expected numbers of blocks like 17,14, got 'two'"),
        (("--keep", ""), 2, "expected numbers of blocks"),
        (("--latency-ms", "0"), 2, "x>0"),
        (("--latency-ms", "nan"), 2, "expected a finite number, got nan"),
        (("--max-error", "2"), 2, "0<=x<=1"),
        (("--latency-ms", "1", "--max-error", "0.5"), 2, "not both"),
        (("--copy-to", "x.onnx"), 2, "--copy-to needs"),
        (("models/none",), 1, "models/none: no weights.safetensors there; expected a run's folder"),
        (("models",), 1, "expected a run's folder such as models/stochastic"),
        (("--out", "data/animals/meta.json/x"), 1, "error: [Errno 20] Not a directory"),
        (("--max-error", "1", "--copy-to", "x" * 300), 1, "error: [Errno 36] File name too long"),
        (("--max-error", "1", "--copy-to", "data/animals/meta.json/x/y"), 1, "Not a directory"),
        (("--max-error", "1", "--copy-to", "/proc/net.onnx"), 1, "directory: '/proc/net.onnx'\n"),
        (("--out", "/proc"), 1, "directory: '/proc/pareto.csv'\n"),
    ],
)
def test_odd_arguments(runs: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    """They are seen before anything is measured."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (runs / "pareto.csv").exists()


@pytest.mark.parametrize(
    ("folders", "said"), [((), "no finished run"), (("models/none",), "expected a run's folder")]
)
def test_without_a_run_the_command_says_so_and_makes_no_folder(folders: tuple[str, ...], said: str) -> None:
    result = call(*folders, "--max-error", "1", "--out", "new", "--copy-to", "other/new/net.onnx")
    assert result.exit_code == 1
    assert said in result.stderr
    assert list(Path().iterdir()) == []


def test_a_command_that_fails_leaves_no_folder(runs: Path, tmp_path: Path) -> None:
    """It is seen beforehand whether they can be made, and they are made when something comes into them."""
    before = sorted(runs.parent.rglob("*"))
    new = ("--out", "a/../a/b", "--copy-to", "c/d/net.onnx", "--max-error", "1")
    for wrong in (("--keep", "9"), ("models/stochastic", "--keep", "0")):
        assert call(*wrong, *new).exit_code == 1
        assert sorted(runs.parent.rglob("*")) == before
    (runs / "stochastic" / "model.onnx").rename(tmp_path / "model.onnx")
    before.remove(runs / "stochastic" / "model.onnx")
    result = call(*new)
    assert (result.exit_code, "no run has a model.onnx" in result.stderr) == (1, True)
    assert sorted(runs.parent.rglob("*")) == before
    (tmp_path / "model.onnx").rename(runs / "stochastic" / "model.onnx")
    assert call(*new).exit_code == 0
    assert {path.name for path in Path("a/b").iterdir()} == {"pareto.csv", "pareto.png"}
    assert Path("c/d/net.onnx").is_file()


def test_runs_of_one_name_stay_apart(runs: Path) -> None:
    """Two of one name are called by the ends of their paths; one that is given twice counts once."""
    for place in ("A/x", "B/x"):
        shutil.copytree(runs / "stochastic", Path(place) / "run")
    (runs / "link").symlink_to(runs / "stochastic")
    folders = ("A/x/run", "B/x/run", "models/stochastic", "models/link", "A/../A/x/run")
    result = call(*folders, "--out", "out")
    assert result.exit_code == 0, result.output
    rows = compared(Path("out"))
    expected = [name for name in ("A/x/run", "B/x/run", "stochastic") for _ in range(3)]
    assert [row["run"] for row in rows] == expected
    assert [float(row["speedup"]) for row in rows if row["variant"] == "fp32"] == [1, 1, 1]
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == expected


@pytest.mark.slow
def test_each_run_is_validated_on_its_own_images(runs: Path) -> None:
    """Another seed holds out others; the numbers of a run do not depend on who stands beside it."""
    shutil.copytree(runs / "stochastic", runs / "other")
    weights = load_weights(runs / "other" / "weights.safetensors")
    params = {**weights.info.train_params, "seed": 1, "validation": 0.5}
    info = replace(weights.info, train_params=params)
    save_weights(runs / "other" / "weights.safetensors", replace(weights, info=info))

    def errors(*names: str) -> set[tuple[str, str, str]]:
        result = call(*(runs / name for name in names), "--out", "out")
        assert result.exit_code == 0, result.output
        rows = compared(Path("out"))
        return {(row["run"], row["variant"], row["validation_error"]) for row in rows}

    alone = errors("other") | errors("stochastic")
    assert len({validation_error for _, variant, validation_error in alone if variant == "fp32"}) == 2
    assert errors("other", "stochastic") == errors("stochastic", "other") == alone


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("order.csv", "ell,rank\n1,1\n2,2\n", "ell: expected the blocks 1 to 6, each once, got 1,2;"),
        ("order.csv", "ell\n1\n2\n3\nx\n5\n6\n", "each once, got 1,2,3,x,5,6;"),
        ("order.csv", f"ell\n{'1' * 2**18}\n", "order.csv: cannot be read: field larger than field limit"),
        ("prune.json", "{}", "expected an entry fingerprint"),
        ("prune.json", None, "prune.json: seed: expected a valid integer"),
    ],
)
def test_a_damaged_family_is_not_taken_further(
    runs: Path, file: str, content: str | None, message: str
) -> None:
    """Of two blocks of an order the size of two took one, and was called keep-2."""
    path = runs / "stochastic" / "pruned" / file
    if content is None:
        facts = read_json(path)
        content = json.dumps(facts | {"prune": {**facts["prune"], "seed": "x"}})
    path.write_text(content)
    result = call("models/stochastic", "--keep", "2")
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (runs / "stochastic" / "pruned-extra" / "keep-2.onnx").exists()
