import pytest
import yaml

from at_smooth import InputError, OptionError, PluginError, Recipe, registry
from at_smooth.recipe import merge


def test_yaml_gives_the_same_recipe_back(tiny, tmp_path):
    recipe = tiny(
        norm="L2", eps="128/255", regularizer="kd-std-adv", regularizer_options={"adv_teacher": "a/b"}, smoother="swa"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    again = Recipe.from_yaml(path)
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()


def test_everything_is_resolved():
    recipe = Recipe(regularizer="kd-std-adv", smoother="swa")
    assert recipe.regularizer_options["temperature"] == 2.0
    assert recipe.regularizer_options["lambda_adv"] == 0.5
    assert recipe.regularizer_options["lambda_std"] == 0.25
    assert recipe.attack_options["step_size"] == recipe.eps / 4
    assert recipe.attack_options["steps"] == 10
    assert set(recipe.to_dict()) == set(Recipe.model_fields)


def test_the_data_set_has_its_defaults_and_the_user_the_last_word(tmp_path):
    digits, npz = Recipe(), Recipe(dataset="npz", data_dir=tmp_path)
    own = registry.load("datasets", "digits")
    assert own.recipe
    for field, value in own.recipe.items():
        resolved = getattr(digits, field)
        assert resolved == (resolved | value if isinstance(value, dict) else value)
    assert digits.eps == float(own.radii["Linf"])
    assert (npz.model, npz.eps, npz.epochs, npz.lr) == ("preact-resnet-18", 8 / 255, 200, 0.1)
    assert Recipe(dataset="npz", data_dir=tmp_path, norm="L2").eps == 128 / 255
    mine = Recipe(model="convnet", eps=0.1, epochs=7, model_options={"width": 4})
    assert (mine.model, mine.eps, mine.epochs) == ("convnet", 0.1, 7)
    assert mine.model_options == {"width": 4, "stages": 2}


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), (0.1, 0.1), ("0.1", 0.1), (0, 0.0)])
def test_eps_is_a_number_or_a_fraction(text, value):
    assert Recipe(eps=text).eps == value


@pytest.mark.parametrize("eps", ["junk", "8/0", -0.1, "nan", "inf", None])
def test_another_eps_is_refused(eps):
    with pytest.raises(OptionError, match="recipe: eps: "):
        Recipe(eps=eps)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"epohcs": 3}, "recipe: epohcs: there is no such option"),
        ({"epochs": 0}, "recipe: epochs: .*greater than or equal to 1 .*0"),
        ({"batch_size": "many"}, "recipe: batch_size: .*'many'"),
        ({"seed": -1}, "recipe: seed: "),
        ({"norm": "L3"}, "recipe: norm: .*'L3'"),
        ({"precision": "fp8"}, "recipe: precision: "),
        ({"validation": 1.0}, "recipe: validation: "),
        ({"milestones": [0.7, 0.2]}, "recipe: milestones: .*rise"),
        ({"regularizer_options": 3}, "recipe: regularizer_options: "),
        ({"regularizer_options": {"alpha": 0.1}}, "regularizer none: alpha: there is no such option"),
        ({"regularizer": "label-smoothing", "regularizer_options": {"alpha": 7}}, "label-smoothing: alpha: .*7"),
        ({"regularizer": "kd-std-adv", "regularizer_options": {"lambda_adv": 0.9}}, "lambda_adv . lambda_std is 1.15"),
        ({"dataset_options": {"pool": 3}}, "dataset digits: pool: .*20"),
        ({"model_options": {"width": 0}}, "model mlp: width: "),
        ({"smoother": "swa", "smoother_options": {"every": 0}}, "smoother swa: every: "),
        ({"attack": "fgms"}, "no attack 'fgms'"),
        ({"attack_options": {"steps": -3}}, "attack pgd: steps: "),
        ({"dataset": 3}, "dataset: "),
    ],
    ids=str,
)
def test_a_wrong_field_or_option_is_named(fields, words):
    with pytest.raises(OptionError, match=words):
        Recipe(**fields)


@pytest.mark.parametrize("field", ["dataset", "model", "method", "regularizer", "smoother"])
def test_an_unknown_plugin_is_refused(field):
    with pytest.raises(PluginError, match=f"there is no plugin 'digist' among the {field}s"):
        Recipe(**{field: "digist"})


@pytest.mark.parametrize(
    ("field", "target"),
    [
        ("smoother", "at_smooth:Regularizer"),
        ("regularizer", "at_smooth:WeightSmoother"),
        ("method", "at_smooth:Regularizer"),
        ("model", "at_smooth:Regularizer"),
        ("dataset", "at_smooth:Regularizer"),
    ],
)
def test_a_plugin_of_another_kind_is_refused(field, target):
    with pytest.raises(PluginError, match=target):
        Recipe(**{field: target})


def test_a_newly_named_plugin_does_not_inherit_options():
    fields = {"regularizer": "kd-std-adv", "regularizer_options": {"temperature": 3.0}, "epochs": 5}
    assert merge(fields, {"regularizer": "tf-kd"}) == {"regularizer": "tf-kd", "epochs": 5}
    assert merge(fields, {"regularizer": "kd-std-adv", "epochs": 6}) == {**fields, "epochs": 6}


def test_options_are_changed_one_by_one(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("regularizer: kd-adv\nregularizer_options: {temperature: 3, lambda_adv: 0.4}\nepochs: 5\n")
    kept = Recipe.from_yaml(path, {"regularizer_options": {"temperature": 4}, "epochs": 6})
    assert (kept.regularizer_options["temperature"], kept.regularizer_options["lambda_adv"]) == (4, 0.4)
    assert kept.epochs == 6
    swapped = Recipe.from_yaml(path, {"regularizer": "tf-kd"})
    assert swapped.regularizer_options == Recipe(regularizer="tf-kd").regularizer_options


def test_the_data_set_has_a_radius_for_each_norm():
    assert Recipe(norm="L2").eps == float(registry.load("datasets", "digits").radii["L2"])
    assert Recipe(norm="L2", eps=0.5).eps == 0.5


@pytest.mark.parametrize(
    ("content", "words"),
    [("a: [1", "is no YAML"), ("- 1\n- 2\n", "is no recipe"), ("", "is no recipe"), ("3: 4", "is no recipe")],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        Recipe.from_yaml(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="is no text in UTF-8"):
        Recipe.from_yaml(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "recipe.yaml")


def test_a_data_folder_is_known_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Recipe(dataset="npz", data_dir="somewhere").data_dir == tmp_path / "somewhere"


def test_a_copy_differs_in_what_is_changed(tiny):
    recipe = tiny()
    assert recipe.replacing(seed=5).to_dict() == {**recipe.to_dict(), "seed": 5}
    assert recipe.replacing() == recipe


@pytest.mark.parametrize(
    ("field", "name", "options"),
    [
        ("model", "convnet", {"width": 4}),
        ("attack", "torchattacks:MIFGSM", {"steps": 3}),
        ("smoother", "swa", {"start": 3}),
    ],
)
def test_fields_may_come_in_any_order(field, name, options):
    fields = {field: name, f"{field}_options": options}
    assert Recipe(**dict(reversed(fields.items()))) == Recipe(**fields)


@pytest.mark.parametrize("field", ["model", "method", "attack", "regularizer", "smoother", "norm"])
def test_naming_what_is_the_default_changes_nothing(field):
    assert Recipe(**{field: getattr(Recipe(), field)}) == Recipe()


def test_a_new_radius_takes_its_own_step_and_a_new_norm_its_own_radius():
    recipe = Recipe(eps="8/255")
    assert recipe.attack_options["step_size"] == "2/255"
    assert recipe.replacing(eps=0.4).attack_options["step_size"] == 0.1
    assert recipe.replacing(eps="8/255").attack_options["step_size"] == "2/255"
    assert recipe.replacing(eps=0.4, attack_options={"step_size": 0.3}).attack_options["step_size"] == 0.3
    l2 = recipe.replacing(norm="L2")
    assert (l2.eps, l2.attack_options["step_size"]) == (0.5, 0.5 * 15 / 128)
    assert recipe.replacing(norm="L2", eps=1).eps == 1


def test_another_attack_keeps_the_models_mode():
    assert Recipe().attack_options["mode"] == Recipe(attack="fgsm").attack_options["mode"] == "eval"


@pytest.mark.parametrize("norm", [["L2"], {"a": 1}, 3])
def test_a_norm_of_a_wrong_type_is_refused(norm):
    with pytest.raises(OptionError, match="norm"):
        Recipe(norm=norm)


@pytest.mark.parametrize(
    "fields",
    [
        {"data_dir": "~nobody-here/x"},
        {"regularizer": "kd-adv", "regularizer_options": {"adv_teacher": "~nobody-here/x"}},
    ],
    ids=str,
)
def test_the_folder_of_a_user_that_is_not_there_is_refused(fields):
    with pytest.raises(OptionError, match=r"_(dir|teacher): ~nobody-here/x: there is no such user"):
        Recipe(**fields)
