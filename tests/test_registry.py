import subprocess
import sys
from pathlib import Path

import pytest

import at_smooth
from at_smooth import OptionError, PluginError, Regularizer, create, registry

GOOD = """
from at_smooth import Regularizer

class Calm(Regularizer):
    def terms(self, step):
        return {"method": step.loss}
"""


def test_importing_the_core_loads_neither_plugins_nor_torch():
    code = (
        "import sys, at_smooth, at_smooth.registry as registry\n"
        "[registry.entries(kind) for kind in registry.KINDS]\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('at_smooth_plugins', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_core_never_mentions_the_shipped_plugins():
    sources = list(Path(at_smooth.__file__).parent.rglob("*.py"))
    assert len(sources) > 10
    assert not [path.name for path in sources if "at_smooth_plugins" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("methods", {"standard", "at"}),
        ("regularizers", {"none", "label-smoothing", "tf-kd", "kd-std", "kd-adv", "kd-std-adv"}),
        ("smoothers", {"none", "swa", "iswa"}),
        ("datasets", {"digits", "npz"}),
        ("models", {"mlp", "convnet", "preact-resnet-18"}),
    ],
)
def test_shipped_plugins_are_registered_by_the_distribution(kind, names):
    shipped = {entry.name for entry in registry.entries(kind) if entry.distribution == "at-smooth"}
    assert names <= shipped
    assert all(registry.load(kind, name) for name in shipped)


def test_a_plugin_is_imported_only_when_asked_for(distribution):
    distribution("calm", {"regularizers": {"calm": "calm_plugin:Calm"}}, {"calm_plugin": GOOD})
    entry = registry.find("regularizers", "calm")
    assert (entry.distribution, entry.version) == ("calm", "1.0")
    assert "calm_plugin" not in sys.modules
    assert isinstance(create("regularizers", "calm"), Regularizer)
    assert "calm_plugin" in sys.modules


@pytest.mark.parametrize("source", ["import there_is_no_such_module", "1 / 0", "def ("])
def test_a_broken_plugin_breaks_only_who_asks_for_it(distribution, source):
    distribution("shoddy", {"regularizers": {"shoddy": "shoddy_plugin:Thing"}}, {"shoddy_plugin": source})
    assert "shoddy" in [entry.name for entry in registry.entries("regularizers")]
    assert isinstance(create("regularizers", "none"), Regularizer)
    with pytest.raises(PluginError, match=r"'shoddy' 1\.0 fails to import"):
        create("regularizers", "shoddy")


@pytest.mark.parametrize(("target", "words"), [("odd_plugin:x", "not a class"), ("odd_plugin:y", "fails to import")])
def test_an_entry_point_must_name_a_plugin_class(distribution, target, words):
    distribution("odd", {"regularizers": {"odd": target}}, {"odd_plugin": "x = 3"})
    with pytest.raises(PluginError, match=words) as caught:
        create("regularizers", "odd")
    assert "'odd'" in str(caught.value)


def test_a_plugin_of_another_kind_is_refused(distribution):
    distribution("calm", {"smoothers": {"calm": "calm_plugin:Calm"}}, {"calm_plugin": GOOD})
    with pytest.raises(PluginError, match="calm"):
        create("smoothers", "calm")


def test_a_name_that_two_distributions_claim_is_refused_with_both(distribution):
    for name in ("first", "second"):
        distribution(name, {"regularizers": {"calm": f"{name}_plugin:Calm"}}, {f"{name}_plugin": GOOD})
    with pytest.raises(PluginError, match=r"'first' 1\.0 and 'second' 1\.0"):
        create("regularizers", "calm")


def test_a_claim_on_a_shipped_name_is_refused(distribution):
    distribution("usurper", {"smoothers": {"swa": "usurper_plugin:SWA"}})
    with pytest.raises(PluginError, match=r"'at-smooth' .* and 'usurper'"):
        create("smoothers", "swa")


def test_an_unknown_name_gives_the_nearest_and_all(distribution):
    with pytest.raises(PluginError, match="did you mean 'kd-std-adv'") as caught:
        create("regularizers", "kd-std-avd")
    assert "label-smoothing" in str(caught.value)


def test_an_unknown_kind_gives_the_nearest():
    with pytest.raises(PluginError, match="did you mean 'methods'"):
        registry.entries("method")


def test_a_class_is_reached_by_its_module(distribution):
    distribution("calm", {}, {"calm_plugin": GOOD})
    assert type(create("regularizers", "calm_plugin:Calm")).__name__ == "Calm"
    with pytest.raises(PluginError, match="calm_plugin:Missing"):
        create("regularizers", "calm_plugin:Missing")


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("regularizers", "Plain", r"not a class derived from .*Regularizer\. Name such a class\.$"),
        ("models", "Plain", r"Name such a class, or a function that makes a network\.$"),
        ("methods", "Bare", "lacks the method loss"),
    ],
)
def test_what_a_module_holds_that_is_no_plugin_is_refused_without_a_distribution(distribution, kind, name, words):
    source = "from at_smooth import Method\nclass Plain: pass\nclass Bare(Method): pass\n"
    distribution("calm", {}, {"calm_plugin": source})
    with pytest.raises(PluginError, match=words) as caught:
        create(kind, f"calm_plugin:{name}")
    assert "distribution" not in str(caught.value)


def test_of_a_module_that_fails_the_line_is_named(distribution):
    source = "from at_smooth import Regularizer\nclass Loud(Regularizer):\n    weight = 2.0\n"
    distribution("loud", {}, {"loud_plugin": source})
    words = r"^regularizer 'loud_plugin:Loud' fails to import: PydanticUserError: .*`weight = 2.0`[^\n]*"
    with pytest.raises(PluginError, match=words + r"\(.*loud_plugin.py, line 2\)\.$"):
        create("regularizers", "loud_plugin:Loud")


def test_options_reach_the_plugin_and_errors_name_it():
    assert create("regularizers", "label-smoothing", {"alpha": "0.3"}).alpha == 0.3
    with pytest.raises(OptionError, match=r"regularizer label-smoothing: alpha: .*2"):
        create("regularizers", "label-smoothing", {"alpha": 2})


@pytest.mark.parametrize("name", ["os:system", "tf-kd"])
@pytest.mark.parametrize("kind", ["nonsense", "recipes", ""])
def test_a_plugin_of_no_kind_is_refused_however_it_is_named(kind, name):
    with pytest.raises(PluginError, match="no plugin kind"):
        registry.find(kind, name)


def test_a_plugin_that_fails_when_it_is_made_is_named_with_the_line(tmp_path, monkeypatch):
    source = GOOD + "    def __init__(self, **options):\n        self.weights = options['weights']\n"
    (tmp_path / "broken_init.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError, match=r"regularizer broken_init:Calm fails when it is made: KeyError.*line \d+"):
        create("regularizers", "broken_init:Calm")
