"""The recipes against the papers."""

import re
from itertools import product

import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from sdpipe.network import expected_depth
from sdpipe.params import check_params
from sdpipe.recipes import _runs as grid_runs
from sdpipe.recipes import apply_recipe, load_recipes, with_seeds
from sdpipe.report.full_size import full_size_recipe
from sdpipe.training.config import RandomScaleCrop, RandomSizeCrop, TrainConfig, parse_run
from sdpipe.training.schedule import learning_rate_at

NAMES = list(load_recipes())
PARAMS = ROOT / "params.yaml"


def config_of(name: str, run: str) -> TrainConfig:
    recipe = load_recipes()[name]
    return parse_run(recipe.train, recipe.runs, run)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_makes_a_complete_params_yaml(name: str) -> None:
    values = YAML(typ="safe").load(apply_recipe(name, PARAMS, num_seeds=2))
    check_params(values)
    assert len(values["runs"]) == 2 * len(load_recipes()[name].runs)
    assert values["fetch"] == YAML(typ="safe").load(PARAMS)["fetch"], "where data come from is the user's"


def test_each_combination_of_a_grid_is_a_run_of_its_own_name() -> None:
    """Rounded to per cent, 0.125 and 0.12 had one name, and one of them was lost."""
    p_L = [0.5, 0.125, 0.12, 0.995, 1.0]
    runs = grid_runs({"grid": {"p_L": p_L, "dropout": [0.0, 0.1]}})
    assert sorted((run["p_L"], run["dropout"]) for run in runs.values()) == sorted(product(p_L, [0.0, 0.1]))
    assert {"p50-0_0", "p12_5-0_1", "p12-0_0", "p99_5-0_1", "p100-0_0"} <= set(runs)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in runs)
    with pytest.raises(AssertionError, match="two runs of one name: p50"):
        grid_runs({"grid": {"p_L": [0.5, 0.5]}})


def test_the_default_is_a_recipe_and_the_way_back() -> None:
    """params.yaml as committed is the recipe `digits`, to the byte and with its comments."""
    assert apply_recipe("digits", PARAMS) == PARAMS.read_text()


# Paper: depth, blocks, epochs, batch, and (epoch, learning rate) on both sides of each boundary.
@pytest.mark.parametrize(
    ("name", "depth", "rates"),
    [
        ("cifar10", 110, {0: 0.1, 249: 0.1, 250: 0.01, 374: 0.01, 375: 0.001, 499: 0.001}),
        ("cifar100", 110, {0: 0.1, 249: 0.1, 250: 0.01, 374: 0.01, 375: 0.001, 499: 0.001}),
        ("cifar10-plain-data", 110, {0: 0.1, 249: 0.1, 250: 0.01, 374: 0.01, 375: 0.001, 499: 0.001}),
        ("cifar100-plain-data", 110, {0: 0.1, 249: 0.1, 250: 0.01, 374: 0.01, 375: 0.001, 499: 0.001}),
        ("svhn", 152, {0: 0.1, 29: 0.1, 30: 0.01, 34: 0.01, 35: 0.001, 49: 0.001}),
        ("cifar10-1202", 1202, {0: 0.01, 9: 0.01, 10: 0.1, 149: 0.1, 150: 0.01, 225: 0.001, 299: 0.001}),
    ],
)
def test_a_recipe_is_the_papers(name: str, depth: int, rates: dict[int, float]) -> None:
    for run, p_L in (("stochastic", 0.5), ("constant", 1.0)):
        config = config_of(name, run)
        assert (config.depth, config.rule, config.p_L, config.draw) == (depth, "linear_decay", p_L, "batch")
        assert (config.epochs, config.batch_size) == (max(rates) + 1, 128)
        assert (config.momentum, config.weight_decay, config.dropout) == (0.9, 1e-4, 0.0)
        assert (config.family, config.skip, config.widths) == ("cifar", "A", (16, 32, 64))
        assert (config.drop_factor, config.micro_batches) == (10, 1)
        assert config.dataset == name.split("-", maxsplit=1)[0]
        if name != "svhn":
            assert (config.normalisation, config.validation) == ("pixel", 0.1)
        assert config.p_L_warmup_epochs == 0
        augmented = name in ("cifar10", "cifar100", "cifar10-1202")
        assert (config.shift_px, config.flip) == ((4, True) if augmented else (0, False))
        assert config.validate_steps == (200 if name == "svhn" else 0)
        for epoch, rate in rates.items():
            assert learning_rate_at(config, epoch) == pytest.approx(rate, rel=1e-12), epoch


def test_expected_depth_of_the_recipe() -> None:
    """(3L - 1) / 4 for linear decay and p_L 0.5: 40.25 of 54 blocks."""
    network = config_of("cifar10", "stochastic").network_config(in_channels=3, num_classes=10)
    assert network.num_blocks == 54
    assert expected_depth(network.survival_probs) == pytest.approx(40.25, abs=1e-12)


@pytest.mark.parametrize("epochs", [90, 120])
def test_imagenet_is_the_papers_and_goes_on_to_120_epochs(epochs: int) -> None:
    """Divided by 10 every 30 epochs; the last 30 of 120 at 1e-4. 128 images over 4 GPUs are 32 each."""
    for run, p_L in (("stochastic", 0.5), ("constant", 1.0)):
        config = config_of("imagenet", run).model_copy(update={"epochs": epochs})
        assert (config.family, config.depth, config.skip, config.p_L) == ("imagenet", 152, "B", p_L)
        assert config_of("imagenet", run).epochs == 90
        assert (config.widths, config.validation) == ((64, 128, 256, 512), {"train": 10})
        assert (config.batch_size, config.micro_batches) == (128, 4)
        assert (config.momentum, config.weight_decay, config.normalisation) == (0.9, 1e-4, "channel")
        crop = config.crop
        assert isinstance(crop, RandomSizeCrop)
        assert crop.area == (0.08, 1.0)
        assert crop.aspect == pytest.approx((3 / 4, 4 / 3), abs=1e-15)
        assert (config.colour_jitter, config.lighting, config.flip, config.shift_px) == (0.4, 0.1, True, 0)
        rates = {0: 0.1, 29: 0.1, 30: 1e-2, 59: 1e-2, 60: 1e-3, 89: 1e-3, 90: 1e-4, 119: 1e-4}
        for epoch, rate in rates.items():
            assert epoch >= epochs or learning_rate_at(config, epoch) == pytest.approx(rate, rel=1e-12)


def test_imagenet_he_is_the_papers() -> None:
    """Up to 60e4 steps of 256 images: 1,281,167 less 10 of each class to validate on make 4,965 an epoch."""
    runs = load_recipes()["imagenet-he"].runs
    configs = {run: config_of("imagenet-he", run) for run in runs}
    kinds = {(config.depth, config.skip, config.p_L) for config in configs.values()}
    assert kinds == {(18, "A", 1), (34, "A", 1), (18, "plain", 1), (34, "plain", 1), (34, "A", 0.5)}
    for config in configs.values():
        assert (config.batch_size, config.learning_rate, config.plateau_epochs) == (256, 0.1, 5)
        assert config.milestones == ()
        steps = config.epochs * ((1_281_167 - 1000 * 10) // 256)
        assert 59e4 < steps <= 60e4
        assert isinstance(config.crop, RandomScaleCrop)
        assert config.crop.shorter_side == (256, 480)
        assert (config.colour_jitter, config.widths) == (0.0, (64, 128, 256, 512))
        assert (config.validation, config.weight_decay) == ({"train": 10}, 1e-4)


def test_degradation_is_resnets() -> None:
    """Plain and residual nets, 20 and 56 layers each."""
    kinds = {
        (config.depth, config.skip, config.p_L)
        for run in load_recipes()["degradation"].runs
        if (config := config_of("degradation", run))
    }
    assert kinds == {(20, "A", 1.0), (56, "A", 1.0), (20, "plain", 1.0), (56, "plain", 1.0)}


def test_depths_are_those_of_resnets_table_6() -> None:
    """But 1202 layers, whose schedule is another. All else is as in cifar10 at constant depth."""
    configs = [config_of("depths", run) for run in load_recipes()["depths"].runs]
    assert sorted(config.depth for config in configs) == [20, 32, 44, 56, 110]
    constant = config_of("cifar10", "constant")
    assert all(config == constant.model_copy(update={"depth": config.depth}) for config in configs)


def test_skips_are_those_of_resnets_table_3() -> None:
    """Options A, B and C of 34 layers beside the plain net, as in imagenet-he."""
    configs = [config_of("skips", run) for run in load_recipes()["skips"].runs]
    assert [config.skip for config in configs] == ["A", "B", "C", "plain"]
    residual = config_of("imagenet-he", "residual-34")
    assert all(config == residual.model_copy(update={"skip": config.skip}) for config in configs)


def test_draws_differ_in_the_draw_alone() -> None:
    batch, sample, constant = (config_of("draws", run) for run in ("batch", "sample", "constant"))
    assert (batch, constant) == (config_of("cifar10", "stochastic"), config_of("cifar10", "constant"))
    assert sample == batch.model_copy(update={"draw": "sample"})


def test_svhn_holds_out_400_and_200_of_each_class() -> None:
    """Of 10 classes: 4,000 and 2,000, 6,000 in all."""
    assert config_of("svhn", "constant").validation == {"train": 400, "extra": 200}


def test_constant_depth_is_run_once_in_a_grid_over_rules() -> None:
    runs = load_recipes()["figure8-left"].runs
    assert [name for name, run in runs.items() if run["p_L"] == 1] == ["p100-linear"]
    assert len(runs) == 2 * 8 + 1


def test_seeds() -> None:
    runs = with_seeds({"a": {"p_L": 0.5}}, 2)
    assert runs == {"a-s0": {"p_L": 0.5, "seed": 0}, "a-s1": {"p_L": 0.5, "seed": 1}}


def test_full_size_is_told_from_small() -> None:
    recipes = load_recipes()
    as_run = config_of("cifar10", "stochastic").model_dump()
    cifar: tuple[int, tuple[int, int]] = (45_000, (32, 32))
    assert full_size_recipe(as_run, *cifar) == "cifar10"
    assert full_size_recipe({**as_run, "seed": 7, "p_L": 0.2}, *cifar) == "cifar10"
    assert full_size_recipe({**as_run, "epochs": 499}, *cifar) is None
    assert full_size_recipe({**as_run, "depth": 38}, *cifar) == "figure8-right"
    assert full_size_recipe(as_run, 9000, (32, 32)) is None
    assert full_size_recipe(as_run, 45_000, (9, 9)) is None
    assert full_size_recipe(as_run, 45_000, None) is None
    for name in ("cifar10-small", "digits", "pictures-20-56"):
        assert full_size_recipe(recipes[name].train, *cifar) is None, name
    imagenet = recipes["imagenet"].train
    for epochs, name in ((89, None), (90, "imagenet"), (120, "imagenet")):
        assert full_size_recipe({**imagenet, "epochs": epochs}, 1_271_167, (224, 224)) == name


# Training images and their side: SVHN's 73,257 and 531,131 less 6,000, ImageNet's 1,281,167 less
# 10 of each of 1,000 classes, CIFAR's 50,000 less 5,000.
SIZES_OF_THE_PAPERS = {
    **dict.fromkeys(("cifar10", "cifar100", "cifar10-plain-data", "cifar100-plain-data"), (45_000, 32)),
    **dict.fromkeys(
        ("cifar10-1202", "figure8-left", "figure8-right", "degradation", "depths", "draws", "dropout"),
        (45_000, 32),
    ),
    "svhn": (598_388, 32),
    **dict.fromkeys(("imagenet", "imagenet-he", "skips"), (1_271_167, 224)),
}


def test_every_recipe_of_the_papers_has_their_size_and_no_other() -> None:
    sizes = {recipe.name: (recipe.num_train, recipe.image_px) for recipe in load_recipes().values()}
    assert {name: size for name, size in sizes.items() if size != (None, None)} == SIZES_OF_THE_PAPERS


# SD's table 1, the text's error where it is another, and table 2 in hours and minutes; by epochs.
RESULTS_OF_THE_PAPER = {
    ("cifar10", 500): (0.0641, None, 0.0525, (20, 42), (15, 7)),
    ("cifar100", 500): (0.2776, 0.2722, 0.2498, (20, 51), (15, 20)),
    ("cifar10-plain-data", 500): (0.1363, None, 0.1166, None, None),
    ("cifar100-plain-data", 500): (0.4474, None, 0.378, None, None),
    ("svhn", 50): (0.0180, None, 0.0175, (33, 43), (25, 33)),
    ("cifar10-1202", 300): (0.0667, None, 0.0491, None, None),
    ("imagenet", 90): (0.2306, None, 0.2338, None, None),
    ("imagenet", 120): (0.2178, None, 0.2198, None, None),
}


def test_the_papers_results_are_the_papers() -> None:
    """Every one that a recipe has, and no other."""
    found = {
        (recipe.name, epochs): (
            paper.constant_error,
            paper.constant_error_in_text,
            paper.stochastic_error,
            paper.constant_train_s,
            paper.stochastic_train_s,
        )
        for recipe in load_recipes().values()
        for epochs, paper in recipe.results.items()
    }
    assert found == {
        key: (*errors, *(time and 3600 * time[0] + 60 * time[1] for time in (constant, stochastic)))
        for key, (*errors, constant, stochastic) in RESULTS_OF_THE_PAPER.items()
    }
