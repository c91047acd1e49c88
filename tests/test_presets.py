import pytest
import yaml

from at_smooth import InputError, Recipe
from at_smooth.presets import layer, names, recipe_from, resolve, table, tables

PAPERS_TABLES = ["table-1", "table-2", "table-3", "table-5", "table-6", "table-a10", "table-a7", "table-a8"]


def test_the_papers_tables_are_there():
    assert [each.name for each in tables()] == PAPERS_TABLES
    assert {"paper", "official-code", "rehearse"} <= set(names())


@pytest.mark.parametrize("name", PAPERS_TABLES)
def test_every_row_is_a_recipe_of_its_own(name):
    found = table(name)
    recipes = [found.recipe(row, {}).to_yaml() for row in found.rows]
    assert len(set(recipes)) == len(recipes)
    assert all(0 < figure < 100 for row in found.rows for figure in row.paper)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("paper", {"epochs": 200, "milestones": (50, 150), "lr": 0.1, "batch_size": 128, "eps": 8 / 255}),
        ("table-1/tiny-imagenet/baseline", {"epochs": 100, "milestones": (50, 80), "dataset": "tiny-imagenet"}),
        ("table-1/cifar10/kd-swa", {"regularizer": "kd-std-adv", "smoother": "swa"}),
        ("table-2/fgsm-l2/baseline", {"norm": "L2", "eps": 128 / 255, "attack": "fgsm"}),
        ("table-2/trades-linf/kd-swa", {"method": "trades", "method_options": {"beta": 6.0}}),
        ("table-3/wrn-34-10/cifar100/baseline", {"model": "wrn-34-10", "dataset": "cifar100"}),
        ("table-a7/l2/baseline", {"dataset": "cifar100", "milestones": (100, 150), "norm": "L2"}),
        ("table-a8/svhn/baseline", {"epochs": 80, "lr": 0.01, "lr_schedule": "cosine"}),
        ("table-a10/cifar10/kd-iswa", {"smoother": "iswa"}),
    ],
)
def test_a_row_is_what_the_paper_says(source, expected):
    recipe = recipe_from(source, {})
    assert {field: getattr(recipe, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("source", "weights", "start"), [("paper", (0.5, 0.25), None), ("official-code", (0.6, 0.1), 55)]
)
def test_the_presets_differ_where_paper_and_code_do(source, weights, start):
    recipe = recipe_from(source, {"regularizer": "kd-std-adv", "smoother": "swa"})
    assert (recipe.regularizer_options["lambda_adv"], recipe.regularizer_options["lambda_std"]) == weights
    assert recipe.smoother_options["start"] == start


@pytest.mark.parametrize(
    ("dataset", "split", "seed"), [("cifar10", "last", None), ("tiny-imagenet", "permutation", 10)]
)
def test_the_published_code_splits_in_its_own_way(dataset, split, seed):
    recipe = recipe_from("official-code", {"dataset": dataset})
    assert (recipe.split, recipe.split_seed) == (split, seed)


def test_what_the_user_says_lies_on_top():
    recipe = recipe_from("paper", {"dataset": "svhn", "epochs": 3, "regularizer": "kd-adv",
                                   "regularizer_options": {"temperature": 9}})  # fmt: skip
    assert (recipe.epochs, recipe.lr) == (3, 0.01)
    assert (recipe.regularizer_options["temperature"], recipe.regularizer_options["lambda_adv"]) == (9, 0.5)


def test_a_resolved_row_is_the_same_from_its_own_file(tmp_path):
    recipe = recipe_from("table-1/cifar100/kd-swa", {})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert recipe_from(str(tmp_path / "recipe.yaml"), {}).to_dict() == recipe.to_dict()


def test_layers_and_conditions():
    base = {"a": 1, "b": 1, "for_dataset": {"d": {"b": 2}}, "plugin_defaults": {"model": {"m": {"x": 1}}}}
    top = {"based_on": "base", "a": 3, "for_dataset": {"d": {"c": 4}}, "plugin_defaults": {"model": {"m": {"y": 2}}}}
    merged = layer(top, base)
    assert resolve(merged, {"dataset": "d", "model": "m", "model_options": {"y": 5}}) == {
        "a": 3, "b": 2, "c": 4, "dataset": "d", "model": "m", "model_options": {"x": 1, "y": 5},
    }  # fmt: skip
    assert resolve(merged, {"dataset": "other", "model": "n"}) == {
        "a": 3, "b": 1, "dataset": "other", "model": "n", "model_options": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("papre", "did you mean 'paper'"),
        ("table-1/cifar10/kd-sw", "table-1/cifar10/kd-swa"),
        ("missing.yaml", "cannot be read"),
    ],
)
def test_an_unknown_recipe_is_refused_with_the_nearest(source, words):
    with pytest.raises(InputError, match=words):
        recipe_from(source, {})


def test_a_preset_is_no_table():
    with pytest.raises(InputError, match="preset, not a table"):
        table("paper")


def test_a_recipe_file_may_leave_fields_out(tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"dataset": "digits", "epochs": 5}))
    assert recipe_from(str(tmp_path / "own.yaml"), {"lr": 0.5}).to_dict() == Recipe(epochs=5, lr=0.5).to_dict()


def test_a_file_may_be_based_on_a_preset(tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"based_on": "official-code", "smoother": "swa", "lr": 0.05}))
    recipe = recipe_from(str(tmp_path / "own.yaml"), {})
    assert (recipe.epochs, recipe.lr, recipe.split, recipe.smoother_options["start"]) == (200, 0.05, "last", 55)
