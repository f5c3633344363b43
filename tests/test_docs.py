"""The docs against what they speak of."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from sdpipe.recipes import load_recipes

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To a file of the project, and to a heading in it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("name", [name for name, recipe in load_recipes().items() if recipe.num_train])
def test_each_recipe_of_the_papers_has_a_page(name: str) -> None:
    """Which holds the paper's errors, in percent, and our gate."""
    index = (ROOT / "docs" / "recipes.md").read_text()
    (row,) = re.findall(rf"^\| \[.*`{name}`.*\]\((recipes/[\w-]+\.md)\)", index, re.MULTILINE)
    page, recipe = (ROOT / "docs" / row).read_text(), load_recipes()[name]
    assert page.startswith("# ")
    assert re.search(rf"\b{name}\b", page.splitlines()[0])
    assert "| | the paper's" in page
    assert "| | ours |" in page
    assert re.search(rf"`deploy\.max_test_error`.*\b{100 * recipe.max_test_error:g}\b", page)
    for result in recipe.results.values():
        for error in (result.constant_error, result.stochastic_error):
            assert re.search(rf"\b{100 * error:.2f}\b", page), error


def test_the_readme_says_which_recipes_have_constant_depth_alone() -> None:
    """It said of each that it has both."""
    alone = [
        f"`{name}`"
        for name, recipe in load_recipes().items()
        if recipe.num_train and all(run.get("p_L", recipe.train["p_L"]) == 1 for run in recipe.runs.values())
    ]
    says = f"{', '.join(alone[:-1])} and {alone[-1]}, which have constant depth alone"
    assert says in " ".join((ROOT / "README.md").read_text().split())
