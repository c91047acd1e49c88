import pytest

from at_smooth import RunError
from at_smooth.presets import table
from at_smooth.progress import Silent
from at_smooth.reproduce import Forecast, carry_out, own_figures, plan

SHORT = {"epochs": 2, "eval_steps": 1, "attack_options": {"steps": 1}}


class Listening(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AT_SMOOTH_CACHE", str(tmp_path_factory.mktemp("cache")))
        planned = plan(table("table-a10"), tmp_path_factory.mktemp("table"), SHORT, rehearse=True)
        carry_out(planned, Silent())
    return planned


def test_a_rehearsal_keeps_the_plugins_and_shrinks_the_rest(tmp_path):
    full = plan(table("table-2"), tmp_path, {}, rehearse=False)
    small = plan(table("table-2"), tmp_path, {}, rehearse=True)
    for field in ("model", "method", "attack", "norm", "regularizer", "smoother"):
        assert [getattr(item.recipe, field) for item in small] == [getattr(item.recipe, field) for item in full]
    assert {item.recipe.dataset for item in small} == {"digits"}
    assert max(item.recipe.epochs for item in small) <= 5


def test_a_table_is_run_whole(rehearsed):
    assert [item.path.name for item in rehearsed] == ["cifar10--kd-swa", "cifar10--kd-iswa"]
    assert all(item.run.finished for item in rehearsed)


def test_what_is_done_is_not_run_again_and_what_was_interrupted_goes_on(rehearsed):
    before = (rehearsed[0].path / "metrics.csv").stat().st_mtime_ns
    (rehearsed[1].path / "summary.json").unlink()
    listening = Listening()
    carry_out(rehearsed, listening)
    assert [note.split(": ")[1] for note in listening.notes if note.startswith("[")] == ["done before", "continued"]
    assert (rehearsed[0].path / "metrics.csv").stat().st_mtime_ns == before
    assert rehearsed[1].run.finished


def test_own_figures_are_those_of_the_reported_weights(rehearsed):
    run = rehearsed[0].run
    summary = run.summary
    best, final = summary["smoothed"]["best"], summary["smoothed"]["final"]
    expected = [best["test_ra"], final["test_ra"], best["test_sa"], final["test_sa"]]
    assert own_figures(run, last5=False) == expected
    of_the_last = [row["smoothed_test_sa"] for row in run.history if row["smoothed_test_sa"] is not None]
    assert own_figures(run, last5=True)[1] == final["last5_ra_mean"]
    assert own_figures(run, last5=True)[3] == pytest.approx(sum(of_the_last) / len(of_the_last))


def test_another_recipes_run_is_not_taken_for_the_rows(rehearsed):
    planned = plan(table("table-a10"), rehearsed[0].path.parent, {**SHORT, "seed": 1}, rehearse=True)
    with pytest.raises(RunError, match="seed was 0, is now 1"):
        carry_out(planned, Silent())


def test_a_table_can_be_based_on_another_preset(tmp_path):
    planned = plan(table("table-a10"), tmp_path, {}, preset="official-code")
    assert planned[0].recipe.smoother_options["start"] == 55


def test_a_forecast_counts_epochs_and_each_teacher_once(tmp_path):
    rows = {item.row.name: item.recipe for item in plan(table("table-5"), tmp_path, SHORT, rehearse=True)}
    forecast = Forecast()
    short = forecast.seconds(rows["cifar10/baseline"])
    assert short > 0
    long = forecast.seconds(rows["cifar10/baseline"].replacing(epochs=20))
    assert long == pytest.approx(10 * short)
    with_teachers, again = forecast.seconds(rows["cifar10/kd"]), forecast.seconds(rows["cifar10/kd"])
    assert with_teachers > again == pytest.approx(short)
    assert forecast.teachers(rows["cifar10/kd"]) == ["standard", "at"]
    assert forecast.teachers(rows["cifar10/kd-adv"]) == ["at"]
    assert forecast.teachers(rows["cifar10/swa"]) == []


def test_the_teachers_of_table_6_are_of_their_own_kinds(tmp_path):
    planned = {item.row.name: item.recipe for item in plan(table("table-6"), tmp_path, {}, rehearse=False)}
    assert planned["cifar10/kd-fgsm"].regularizer_options["adv_attack"] == "fgsm"
    assert planned["cifar10/kd-pgd100"].regularizer_options["adv_steps"] == 100


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table-2", "table-3", "table-6"])
def test_a_whole_table_can_be_rehearsed(name, tmp_path):
    planned = plan(table(name), tmp_path, SHORT, rehearse=True)
    carry_out(planned, Silent())
    assert all(item.run.finished for item in planned)
