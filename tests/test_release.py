"""Deploy ships what passed its gates, all of it or nothing, and says what it left out."""

import json
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from deployable import VARIANT_FILES, add_variants, change_metrics, deploy, deploy_config, make_run

from sdpipe.deploy.release.release import judge, read_deployed
from sdpipe.errors import DataError, GateError


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "models" / "stochastic")


def contents(models: Path) -> dict[str, bytes]:
    """What deploy left, without the run's folder."""
    return {
        str(path.relative_to(models)): path.read_bytes()
        for path in models.rglob("*")
        if path.is_file() and "stochastic" not in path.parts
    }


def test_a_run_alone_is_deployed(run_folder: Path) -> None:
    """Without variants: the file, an empty folder, the card, the facts, and sums that sha256sum accepts."""
    models = run_folder.parent
    deployed = deploy(run_folder, models)
    assert set(contents(models)) == {"model.onnx", "variants.csv", "README.md", "deployed.json", "SHA256SUMS"}
    assert list((models / "variants").iterdir()) == []
    assert (models / "model.onnx").read_bytes() == (run_folder / "model.onnx").read_bytes()
    assert read_deployed(models) == deployed
    assert (deployed.run, deployed.test_error, deployed.variants) == ("stochastic", 0.1, {})


def test_the_sums_hold_for_everything_that_is_deployed(run_folder: Path) -> None:
    """`sha256sum --check` in the folder; one changed byte in a variant, and it fails."""
    add_variants(run_folder)
    models = run_folder.parent
    deploy(run_folder, models)
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(check, cwd=models, capture_output=True, text=True, check=True)
    named = {line.split(":")[0] for line in done.stdout.splitlines()}
    assert named == set(contents(models)) - {"SHA256SUMS"}
    assert {f"variants/{Path(file).name}" for file in VARIANT_FILES.values()} <= named
    (models / "variants" / "keep-7.int8.onnx").write_bytes(b"x")
    assert subprocess.run(check, cwd=models, capture_output=True, check=False).returncode == 1


def test_each_variant_has_its_own_gate(run_folder: Path) -> None:
    """0.1 + 0.005 for int8, 0.1 + 0.02 for fewer blocks: at the edge shipped, just over it left out."""
    add_variants(
        run_folder, int8=0.105, fp16=0.106, keep_7=0.12, keep_5=0.121, keep_7_int8=0.119, ensemble=0.9
    )
    candidate = judge(run_folder, deploy_config())
    assert set(candidate.variants) == {"int8", "keep-7", "keep-7.int8", "ensemble"}
    assert candidate.left_out == {
        "fp16": "test error 0.106 is over 0.1 by more than deploy.max_error_increase 0.005",
        "keep-5": "test error 0.121 is over 0.1 by more than deploy.max_pruned_error_increase 0.02",
    }


def test_rounding_is_not_one_more_mistake(run_folder: Path) -> None:
    """14 mistakes of 1,000 against 9: 5 more, as allowed, though 14 / 1000 > 9 / 1000 + 0.005 in floats."""
    assert 14 / 1000 > 9 / 1000 + 0.005
    add_variants(run_folder, int8=14 / 1000, fp16=15 / 1000)
    change_metrics(run_folder, test_error=9 / 1000)
    candidate = judge(run_folder, deploy_config(max_pruned_error_increase=0.5))
    assert "int8" in candidate.variants
    assert list(candidate.left_out) == ["fp16"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parity": False}, "its parity did not hold"),
        ({"parity": None}, "its parity did not hold"),
        ({"sha256": "0" * 64}, "metrics.json is about another file"),
        ({"test_error": None}, "test error None is over 0.1 by more than deploy.max_error_increase 0.005"),
        (
            {"test_error": 37 / 90},
            "test error 0.411111 is over 0.1 by more than deploy.max_error_increase 0.005",
        ),
    ],
)
def test_a_variant_that_was_not_proved_is_left_out(run_folder: Path, changes: dict, reason: str) -> None:
    add_variants(run_folder)
    variants = json.loads((run_folder / "metrics.json").read_text())["variants"]
    change_metrics(run_folder, variants=variants | {"int8": variants["int8"] | changes})
    assert judge(run_folder, deploy_config()).left_out == {"int8": reason}
    change_metrics(run_folder, variants={})
    assert set(judge(run_folder, deploy_config()).left_out.values()) == {"metrics.json says nothing of it"}


@pytest.mark.parametrize("name", ["fingerprint", "max_abs_logit_diff", "variants"])
def test_damaged_metrics_are_named(run_folder: Path, name: str) -> None:
    """One line in place of a traceback, before anything is written."""
    add_variants(run_folder)
    metrics = json.loads((run_folder / "metrics.json").read_text())
    changed = {**metrics, "variants": None} if name == "variants" else metrics | {}
    if name != "variants":
        del changed[name]
    (run_folder / "metrics.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match=rf"metrics\.json: .*{name}"):
        deploy(run_folder, run_folder.parent)


def test_a_variant_that_is_left_out_leaves_models(run_folder: Path) -> None:
    """A second deployment takes away what the first one shipped and this one does not."""
    models = run_folder.parent
    add_variants(run_folder)
    deploy(run_folder, models)
    add_variants(run_folder, int8=0.2)
    deployed = deploy(run_folder, models)
    assert "int8" not in deployed.variants
    assert {path.name for path in (models / "variants").iterdir()} == set(deployed.variants.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_error": 0.51}, r"test error 0\.51 is over deploy\.max_test_error 0\.5"),
        ({"test_error": None}, "test error None"),
        ({"parity": False}, "parity with PyTorch did not hold"),
        ({"model_sha256": "0" * 64}, "about another file"),
    ],
)
def test_a_failing_gate_leaves_what_is_deployed(run_folder: Path, changes: dict, message: str) -> None:
    """Nothing of models/ changes: no file, no variant, no card, no sum."""
    add_variants(run_folder)
    models = run_folder.parent
    deploy(run_folder, models)
    before = contents(models)
    change_metrics(run_folder, **changes)
    with pytest.raises(GateError, match=message):
        deploy(run_folder, models)
    assert contents(models) == before


def test_a_disk_that_fills_while_deploying_changes_nothing(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last file that is copied fails; what was deployed stays, and no half of a release lies about."""
    models = run_folder.parent
    deploy(run_folder, models)
    before = contents(models)
    add_variants(run_folder)

    def full_disk(source: Path, destination: Path) -> None:
        if source.name == "keep-7.int8.onnx":
            raise OSError(28, "No space left on device")
        destination.write_bytes(source.read_bytes())

    monkeypatch.setattr("shutil.copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        deploy(run_folder, models)
    assert contents(models) == before
    assert sorted(path.name for path in models.iterdir() if path.name.startswith(".")) == []


def test_the_same_run_gives_the_same_bytes(run_folder: Path, tmp_path: Path) -> None:
    """Card and sums hold no time and no path of the machine."""
    add_variants(run_folder)
    deploy(run_folder, tmp_path / "a")
    deploy(run_folder, tmp_path / "somewhere" / "else")
    assert contents(tmp_path / "a") == contents(tmp_path / "somewhere" / "else")
    assert not [
        name for name, content in contents(tmp_path / "a").items() if str(tmp_path).encode() in content
    ]


def test_another_model_in_place_of_the_deployed_one_is_noticed(run_folder: Path) -> None:
    models = run_folder.parent
    with pytest.raises(DataError, match=r"deployed\.json: cannot be read"):
        read_deployed(models)
    deploy(run_folder, models)
    (models / "model.onnx").write_bytes(b"other")
    with pytest.raises(DataError, match="is not the file that deployed.json is about"):
        read_deployed(models)


def test_a_table_that_lacks_a_file_stops_the_release(run_folder: Path) -> None:
    """Of the run's own evaluation: `sdpipe inspect` would show nothing, and nobody would notice."""
    models = run_folder.parent
    deploy(run_folder, models)
    before = contents(models)
    add_variants(run_folder)
    table = run_folder / "variants.csv"
    lines = table.read_text().splitlines()
    for text in ("\n".join(lines[:-1]), "\n".join(lines).replace("0123456789abcdef", "f" * 16), None):
        if text is None:
            table.unlink()
        else:
            table.write_text(text + "\n")
        with pytest.raises(DataError, match=r"variants\.csv: expected a row for "):
            deploy(run_folder, models)
        assert contents(models) == before


def test_two_releases_take_turns(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that came second took the folder of the first for one that was left behind."""
    models = run_folder.parent
    copy = shutil.copyfile

    def slow(source: Path, destination: Path) -> None:
        copy(source, destination)
        time.sleep(0.2)

    monkeypatch.setattr("shutil.copyfile", slow)
    with ThreadPoolExecutor(2) as pool:
        deployed = [each.result() for each in [pool.submit(deploy, run_folder, models) for _ in range(2)]]
    assert read_deployed(models) == deployed[0] == deployed[1]
