import copy
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, train_config
from pydantic import ValidationError

from sdpipe.config import read_params
from sdpipe.errors import ConfigError
from sdpipe.params import check_params
from sdpipe.training.config import parse_run


@pytest.fixture
def params() -> dict[str, Any]:
    return copy.deepcopy(read_params(ROOT / "params.yaml"))


def put(params: dict[str, Any], key: str, value: object) -> None:
    *path, last = key.split(".")
    for part in path:
        params = params[part]
    params[last] = value


def test_parts_too_small_to_draw_for_each_image_are_refused() -> None:
    """2 images of a part are active at least: of 4 and more that is p_L 0.5 or less, of 3 it is not."""
    drawn = {"draw": "sample", "p_L": 0.5}
    assert train_config(**drawn, batch_size=16, micro_batches=4).micro_batches == 4
    with pytest.raises(ValidationError, match="micro_batches\n.*expected parts of at least 4 images"):
        train_config(**drawn, batch_size=15, micro_batches=5)
    train_config(p_L=0.5, batch_size=15, micro_batches=5)  # drawn for the batch
    train_config(draw="sample", p_L=1.0, batch_size=15, micro_batches=5)


def test_a_run_that_would_be_in_the_way_of_what_is_shipped_is_refused(params: dict[str, Any]) -> None:
    params["runs"]["variants"] = params["runs"].pop("stochastic")
    with pytest.raises(ConfigError, match=r"runs\.variants: expected another name"):
        check_params(params)


def test_a_long_wrong_value_is_cut(params: dict[str, Any]) -> None:
    put(params, "train.epochs", "x" * 5_000)
    with pytest.raises(ConfigError, match=r"train\.epochs: .*xxx\.\.\.$") as caught:
        check_params(params)
    assert len(str(caught.value)) < 400


def test_a_source_that_is_a_link_in_a_circle_is_a_files_matter(params: dict[str, Any], project: Path) -> None:
    (project / "loop").symlink_to("loop")
    put(params, "fetch.imagefolder.source", "loop")
    check_params(params)


def test_the_committed_params_are_right(params: dict[str, Any]) -> None:
    check_params(params)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.p_L", 1.5, r"train\.p_L: .*1.*got 1\.5"),
        ("train.p_L", 0, r"train\.p_L"),
        ("train.epochs", "60", r"train\.epochs: .*integer.*got '60'"),
        ("train.epochs", True, r"train\.epochs"),
        ("train.epocs", 60, r"train\.epocs: key not permitted"),
        ("train.depth", 21, r"^params\.yaml: train\.depth: expected a depth of 6n \+ 2 [^;]*, got 21$"),
        ("train.widths", [16, 32], r"train\.widths: expected 3"),
        ("train.widths", [16, 8, 64], r"train\.widths: expected 3 .*, never falling, got \[16, 8, 64\]"),
        ("train.widths", [16, "32", 64], r"train\.widths\.1"),
        ("train.milestones", [45, 30], r"train\.milestones: expected rising"),
        ("train.warmup.epochs", -1, r"train\.warmup\.epochs"),
        ("train.warmup.epochs", 120, r"train\.warmup: expected fewer epochs than the 120"),
        (
            "train.p_L_warmup_epochs",
            120,
            r"train\.epochs: expected more than the 120 of p_L_warmup_epochs, got 120$",
        ),
        ("train.learning_rate", float("nan"), r"train\.learning_rate"),
        ("train.learning_rate", float("inf"), r"train\.learning_rate: expected a finite number, got inf"),
        (
            "fetch.cifar10.source",
            "data/cifar10",
            r"fetch\.cifar10\.source: data/cifar10 lies in data/cifar10",
        ),
        ("fetch.imagenet.source", "data/imagenet/x", r"fetch\.imagenet\.source: .* lies in data/imagenet"),
        ("fetch.imagefolder.source", ".", r"fetch\.imagefolder\.source: \. holds data/imagefolder"),
        ("fetch.imagefolder.source", "http://[bad", r"imagefolder\.source: .*http or https, or a path"),
        ("fetch.imagefolder.source", "s3://bucket/x", r"imagefolder\.source: .*got 's3://bucket/x'"),
        ("fetch.imagefolder.source", "~nobodyhere/x", r"imagefolder\.source: .*got '~nobodyhere/x'"),
        ("fetch.imagefolder.source", "a\0b", r"imagefolder\.source: .*NUL"),
        ("fetch.imagefolder.source", "ftp://me:secret@host/x", r"got 'ftp://\*\*\*@host/x'"),
        ("fetch.imagefolder.source", "http://me:secret@[bad/x", r"got 'http://\*\*\*@\[bad/x'"),
        ("train.rule", "linear", r"train\.rule: expected 'linear_decay' or 'uniform', got 'linear'"),
        ("train.dataset", "cifr10", r"train\.dataset: expected one of digits"),
        ("runs.stochastic", {"p_l": 0.5}, r"runs\.stochastic\.p_l: key not permitted"),
        ("runs.stochastic", {"p_L": 2.0}, r"runs\.stochastic\.p_L"),
        ("runs.stochastic", {"dataset": "digits"}, r"runs\.stochastic\.dataset"),
        ("runs.stochastic", {"depth": 21}, r"^params\.yaml: runs\.stochastic\.depth: [^;]*, got 21$"),
        ("runs.stochastic", {"p_L": 1.0}, r"runs\.constant: is the same training as runs\.stochastic"),
        ("train.validation", 2, r"train\.validation: expected less than 1, got 2"),
        ("train.validation", {}, r"train\.validation: expected at least 1 of them, got"),
        ("train.p_L", 1e-300, r"train\.p_L: expected greater than or equal to 0\.000001"),
        ("train.widths", [16, 32, 10**18], r"train\.widths\.2: expected less than or equal to 65536"),
        (
            "train.crop",
            {"area": [8, 100], "aspect": [0.75, 1.3]},
            r"train\.crop\.RandomSizeCrop\.area: expected numbers from 0 to 1, got \[8\.0, 100\.0\]",
        ),
        (
            "train.crop",
            {"area": [0.08, 1], "aspect": [50, 100]},
            r"RandomSizeCrop\.aspect: expected numbers from 0\.1 to 10, got \[50\.0, 100\.0\]",
        ),
        ("train.crop", {"shorter_side": [256, 1e30]}, r"RandomScaleCrop\.shorter_side: .* from 1 to 10000,"),
        ("train.seed", 2**40, r"train\.seed"),
        ("runs.stochastic", 3, r"runs\.stochastic"),
        ("runs.a/b", {}, r"runs\.a/b"),
        ("runs.SHA256SUMS", {}, r"runs\.SHA256SUMS: expected another name; models/SHA256SUMS is taken"),
        (f"runs.{'ä' * 101}", {}, r"runs\.ä*: expected a name of at most 200 bytes"),
        ("evaluate.threads", [100_000], r"evaluate\.threads\.0: expected .* to 256, got 100000$"),
        ("evaluate.latency_batch_sizes", [10**12], r"latency_batch_sizes\.0: expected .* to 4096, got"),
        ("runs", {}, r"runs"),
        ("deploy.run", "best", r"deploy\.run: expected one of stochastic, constant"),
        ("deploy.max_test_error", 2, r"deploy\.max_test_error"),
        ("fetch.cifar10.sha256", {"a": "xyz"}, r"fetch\.cifar10\.sha256"),
        ("fetch.imagefolder.channels", 2, r"fetch\.imagefolder\.channels: expected 1 or 3, got 2"),
        ("evaluate.batch_sizes", [], r"evaluate\.batch_sizes: expected at least 1 of them, got \[\]$"),
        ("evaluate.batch_sizes", [0], r"evaluate\.batch_sizes\.0: expected [^;]*, got 0$"),
        ("prune.scale_steps", [2], r"prune\.scale_steps\.0: expected [^;]*, got 2$"),
        ("quantize.methods", ["minmax"] * 2, r"quantize\.methods: expected each once, got \['minmax'"),
        ("evaluate.batch_sizes", [7, 7], r"evaluate\.batch_sizes: expected each once, got \[7, 7\]"),
        ("evaluate.threads", [1, 2, 1], r"evaluate\.threads: expected each once, got \[1, 2, 1\]"),
        ("exprot", {}, r"exprot: key not permitted"),
        ("train", [], r"train"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(
    params: dict[str, Any], key: str, value: object, said: str
) -> None:
    put(params, key, value)
    with pytest.raises(ConfigError, match=said):
        check_params(params)


@pytest.mark.parametrize("key", ["train.momentum", "fetch.digits.seed", "export", "deploy.run"])
def test_a_missing_key_is_named(params: dict[str, Any], key: str) -> None:
    *path, last = key.split(".")
    section = params
    for part in path:
        section = section[part]
    del section[last]
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        check_params(params)


def test_an_empty_run_is_the_train_section_itself(params: dict[str, Any]) -> None:
    assert parse_run(params["train"], {"plain": None}, "plain").p_L == 0.5


def test_yaml_is_read_as_dvc_reads_it(tmp_path: Path) -> None:
    """YAML 1.2: 1e-4 is a number (PyYAML says string), yes is a string (PyYAML says True)."""
    (tmp_path / "params.yaml").write_text("a: 1e-4\nb: yes\n")
    assert read_params(tmp_path / "params.yaml") == {"a": 1e-4, "b": "yes"}


@pytest.mark.parametrize("text", ["a: [1", "a: 1\na: 2\n", "- 1\n", "", "\t: x"])
def test_what_is_no_mapping_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        read_params(tmp_path / "params.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        read_params(tmp_path / "nowhere.yaml")


def test_sections_are_frozen(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_run(params["train"], params["runs"], "constant").epochs = 3
