"""What `sdpipe recipe` does to a params.yaml."""

import os
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML
from test_recipes import PARAMS

from sdpipe.cli import main
from sdpipe.config import read_params
from sdpipe.errors import ConfigError
from sdpipe.recipes import apply_recipe, use_recipe


@pytest.fixture
def params(project: Path) -> Path:
    return Path(shutil.copy(PARAMS, project / "params.yaml"))


def test_use_keeps_the_file_before(params: Path) -> None:
    params.write_text(params.read_text().replace("source: images ", "source: mine   "))
    before = params.read_text()
    backup = use_recipe("svhn-small", params)
    assert backup is not None
    assert backup.read_text() == before
    assert "source: mine" in params.read_text()
    assert "depth: 26 " in params.read_text()
    assert use_recipe("svhn-small", params) is None, "nothing to change, and the backup stands"
    assert backup.read_text() == before


@pytest.mark.parametrize(
    "names",
    [("imagenet",), ("svhn",), ("cifar10-1202",), ("pictures-20-56", "imagenet-he-small", "svhn-small")],
)
def test_digits_is_the_way_back(params: Path, names: tuple[str, ...]) -> None:
    """To the bytes of params.yaml as committed: formats of numbers, and columns of comments."""
    committed = params.read_text()
    for name in (*names, "digits"):
        use_recipe(name, params)
    assert params.read_text() == committed


@pytest.mark.parametrize(
    "override",
    [
        "train.milestones=[3,5]",
        "train.widths=[8,8,8]",
        "train.crop={area: [0.08, 1]}",
        "train.validation={train: [10]}",
        "+runs.stochastic.milestones=[3,5]",
        "deploy.max_test_error=[0.1]",
    ],
)
def test_digits_is_the_way_back_from_what_dvc_wrote(params: Path, override: str) -> None:
    """`dvc exp run -S` writes the whole file anew, and each item of every list on a line."""
    committed = params.read_text()
    apply_overrides(params, [override])
    assert "  keep:                     # of the blocks, a file for each\n  - 0.85\n" in params.read_text()
    for name in ("imagenet", "pictures-20-56", "digits"):
        use_recipe(name, params)
    assert params.read_text() == committed


LISTS = {
    f"{section}.{key}": value
    for section, values in YAML(typ="safe").load(PARAMS).items()
    for key, value in values.items()
    if isinstance(value, list) and section != "train"
}


@pytest.mark.parametrize("key", LISTS)
def test_use_keeps_a_list_that_dvc_wrote(params: Path, key: str) -> None:
    """Beside what a recipe has: the value as the user set it, on one line again."""
    section, name = key.split(".")
    apply_overrides(params, [f"{key}={LISTS[key][:1]}"])
    use_recipe("imagenet", params)
    assert read_params(params)[section][name] == LISTS[key][:1]
    assert f"\n  {name}: [" in params.read_text()


def test_use_keeps_a_comment_between_the_items_of_a_list(params: Path) -> None:
    lines = "  threads:\n  - 1\n  # as many as there are cores\n  - 2\n"
    params.write_text(re.sub(r"  threads: .*\n", lines, params.read_text()))
    use_recipe("svhn-small", params)
    assert lines in params.read_text()


def test_use_keeps_who_may_read_it(params: Path) -> None:
    """Addresses in it may hold passwords, and so may the file that is kept."""
    params.chmod(0o660)
    backup = use_recipe("svhn-small", params)
    assert backup is not None
    assert [path.stat().st_mode & 0o777 for path in (params, backup)] == [0o660, 0o660]


def test_use_leaves_what_is_write_protected(params: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = params.read_bytes()
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (params, os.W_OK))  # root may
    with pytest.raises(ConfigError, match=r"params\.yaml: is write-protected, and stays as it is"):
        use_recipe("svhn-small", params)
    assert (params.read_bytes(), list(params.parent.glob("*.bak*"))) == (before, [])


def test_use_keeps_the_ends_of_lines(params: Path) -> None:
    """A file from Windows stays one, and its backup has the same bytes."""
    before = params.read_bytes().replace(b"\n", b"\r\n")
    params.write_bytes(before)
    backup = use_recipe("svhn-small", params)
    assert backup is not None
    assert backup.read_bytes() == before
    assert params.read_bytes().count(b"\n") == params.read_bytes().count(b"\r\n")
    assert b"\r\r" not in params.read_bytes()
    assert use_recipe("svhn-small", params) is None


def test_use_keeps_what_stands_above_the_document(params: Path) -> None:
    params.write_text("# ours\n\n---\n" + params.read_text())
    use_recipe("svhn-small", params)
    assert params.read_text().startswith("# ours\n\n---\n# The one home")
    assert use_recipe("svhn-small", params) is None


@pytest.mark.parametrize(
    ("line", "wrong"), [("depth: 26", "depth: 26.0"), ("dropout: 0.0", "dropout: false")]
)
def test_use_mends_what_only_equals_the_recipes(params: Path, line: str, wrong: str) -> None:
    """The stages would refuse it."""
    use_recipe("svhn-small", params)
    text = params.read_text()
    assert line in text
    params.write_text(text.replace(line, wrong))
    use_recipe("svhn-small", params)
    assert re.search(line + r" +#", params.read_text())


def test_use_replaces_runs_of_any_names(params: Path) -> None:
    text = params.read_text()
    start = text.index("\nruns:") + 1
    end = text.index("\n\n", start)
    params.write_text(f"{text[:start]}runs: {{1: {{p_L: 1.0}}, wide: {{p_L: 2020-01-01}}}}{text[end:]}")
    use_recipe("svhn-small", params)
    assert set(read_params(params)["runs"]) == {"stochastic", "constant"}


def test_no_backup_is_ever_lost(params: Path) -> None:
    """Not the user's own file under two recipes, and no file is kept twice."""
    mine = params.read_text().replace("source: images ", "source: mine   ")
    params.write_text(mine)
    backups = [use_recipe(name, params) for name in ("svhn-small", "cifar10-small")]
    assert [path and path.name for path in backups] == ["params.yaml.bak", "params.yaml.bak2"]
    assert backups[0] is not None
    assert backups[0].read_text() == mine
    params.write_text(mine)
    assert use_recipe("svhn-small", params) == backups[0]


def test_use_keeps_how_a_training_is_computed(params: Path) -> None:
    """device, precision, compile and recompute are the user's; the number of parts is the recipe's."""
    text = params.read_text()
    for was, mine in (
        ("device: auto", "device: cuda"),
        ("precision: auto", "precision: fp32"),
        ("recompute: false", "recompute: true"),
        ("compile: false", "compile: true"),
    ):
        assert was in text
        text = text.replace(was, mine)
    params.write_text(text)
    use_recipe("imagenet", params)
    train = YAML(typ="safe").load(params)["train"]
    kept = [train[key] for key in ("device", "precision", "recompute", "compile", "micro_batches")]
    assert kept == ["cuda", "fp32", True, True, 4]


def test_use_restores_the_papers_size_of_images(params: Path) -> None:
    """Of those that params.yaml lets one choose; where they come from is the user's."""
    use_recipe("imagenet", params)
    papers = params.read_text()
    changed = papers.replace("image_size: 224", "image_size: 160").replace("resize: 256", "resize: 180")
    params.write_text(changed.replace("source: imagenet ", "source: mine     "))
    assert use_recipe("imagenet", params) is not None
    assert params.read_text() == papers.replace("source: imagenet ", "source: mine     ")
    params.write_text(changed)
    use_recipe("imagenet-small", params)
    assert "image_size: 160" in params.read_text(), "it trains on other images"


def test_use_writes_through_a_link(params: Path) -> None:
    """params.yaml may be a link to a file elsewhere; the backup stands beside the link."""
    elsewhere = params.rename(params.with_name("shared.yaml"))
    params.symlink_to(elsewhere.name)
    before = params.read_text()
    backup = use_recipe("cifar10", params)
    assert params.is_symlink()
    assert "dataset: cifar10" in elsewhere.read_text()
    assert backup == params.with_name("params.yaml.bak")
    assert backup.read_text() == before


def test_what_params_yaml_says_of_a_number_is_true_of_every_recipe(params: Path) -> None:
    """The reason of the digits' weight decay once stood beside the papers' 1e-4."""
    (line,) = [line for line in apply_recipe("cifar10", params).splitlines() if "weight_decay" in line]
    assert line.split("#") == ["  weight_decay: 1.0e-4      ", " on every parameter"]


def test_commands(params: Path) -> None:
    run = CliRunner().invoke
    listed = run(main, ["recipe", "list"]).output
    assert "cifar10-1202-small" in listed
    assert "after 500 epochs: 27.76% (text 27.22%) -> 24.98%" in listed
    assert "after 120 epochs: 21.78% -> 21.98%" in listed
    shown = run(main, ["recipe", "show", "degradation"]).output
    assert shown != params.read_text()
    assert run(main, ["recipe", "use", "degradation"]).exit_code == 0
    assert params.read_text() == shown


NO_YAML = [
    f"x: {'[' * 1000}{']' * 1000}\n", "x: 2020-13-45\n", "x: !!bool x\n", "x: 0x_\n", "x: !!omap 3\n",
    "? {a: 1}\n: 2\n", "x: !!python/object:os.system 1\n", f"x: {'9' * 5000}\n",
]  # fmt: skip
"""What the YAML library's own errors do not cover, or only when it reads for changing."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("train: [", "not valid YAML"),
        ("- a", "expected a mapping"),
        ("fetch: {}\ntrain: {}\ndeploy: {}\n", "Field required"),
        ("train: {}\ndeploy: {}\n", "expected a mapping with the section fetch"),
        *((PARAMS.read_text() + last, "params.yaml: not valid YAML") for last in NO_YAML),
    ],
)
def test_bad_params_yaml_is_named_and_left(project: Path, text: str | None, says: str) -> None:
    path = project / "params.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        use_recipe("cifar10", path)
    assert (path.read_text() if path.exists() else None) == text
    assert not (project / "params.yaml.bak").exists()


@pytest.mark.slow
@pytest.mark.parametrize("text", [*NO_YAML[:4], "- a", "\x00", None])
def test_stages_name_a_bad_params_yaml_too(project: Path, text: str | None) -> None:
    if text is not None:
        (project / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match="^params.yaml: "):
        read_params(Path("params.yaml"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cifar11", "did you mean cifar10 or cifar100"),
        ("figure8", "did you mean figure8-left or figure8-right"),
        ("xyz", "no such recipe; `sdpipe recipe list` shows all"),
    ],
)
def test_unknown_recipe_names_those_that_are_close(params: Path, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        use_recipe(name, params)
