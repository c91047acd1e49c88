import csv
import json
import random

import pytest
from click.testing import CliRunner

from at_smooth import Run
from at_smooth.cli import cli
from at_smooth.measuring import COLUMNS
from at_smooth.overfitting import decline_in, decline_of, drops_of
from at_smooth.recovery import Figure, at_a_glance, figures, table


def history(values, every=1, prefix="", validated=None):
    """Rows with these test accuracies; the last five epochs are always measured, as in training."""
    rows = []
    for epoch, value in enumerate(values, start=1):
        measured = epoch % every == 0 or epoch > len(values) - 5
        row = dict.fromkeys(COLUMNS)
        row.update(epoch=epoch, lr=0.1, train_loss=1.0, train_acc=50.0, seconds=1.0)
        row[f"{prefix}test_ra"] = value if measured else None
        row[f"{prefix}val_ra"] = validated[epoch - 1] if validated else value
        rows.append(row)
    return rows


def falling(onset, slope, epochs=100, start=40.0, top=50.0, drop=50):
    """RA that jumps when the learning rate drops, stays, and falls in a line from the onset on."""
    return [start if e <= drop else top - slope * max(0, e - onset) for e in range(1, epochs + 1)]


def noisy(values, sd=1.0, seed=0):
    rng = random.Random(seed)
    return [value + rng.gauss(0, sd) for value in values]


def test_a_line_that_falls_from_a_known_epoch():
    found = decline_of(history(falling(onset=62, slope=0.25)), drops=[25, 50])
    assert found.verdict == "declines"
    assert (found.onset, found.drop, found.since_drop) == (62, 50, 12)
    assert found.slope == pytest.approx(-0.25)
    assert (found.best, found.best_epoch) == (50.0, 51)
    assert found.last == pytest.approx(50 - 0.25 * 36)
    assert found.last_sd == pytest.approx(0.25 * 2.5**0.5)
    assert (found.peak, found.fall) == (50.0, pytest.approx(9.0))
    assert found.noise == 0
    assert found.part == "test"


def test_a_step_down_begins_before_the_step():
    found = decline_of(history([70.0] * 60 + [65.0] * 40))
    assert (found.onset, found.drop, found.fall) == (60, None, 5.0)
    assert found.since_drop is None


def test_an_onset_at_the_drop_itself_is_found_within_the_smoothing():
    found = decline_of(history(falling(onset=51, slope=0.1)), drops=[50])
    assert found.onset == pytest.approx(51, abs=2)


def test_a_decline_that_slows_down_is_found_where_it_begins():
    values = [40.0] * 20 + [52.0] * 30 + [47 + 5 * 0.9**e for e in range(1, 51)]
    assert decline_of(history(values)).onset == 50


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_the_onset_little(seed):
    found = decline_of(history(noisy(falling(onset=62, slope=0.25), sd=0.3, seed=seed)), drops=[50])
    assert found.verdict == "declines"
    assert found.onset == pytest.approx(64, abs=6)
    assert found.noise == pytest.approx(0.3, rel=0.5)
    assert found.slope == pytest.approx(-0.25, rel=0.2)


def test_chance_alone_rarely_makes_a_decline():
    verdicts = [decline_of(history(noisy([60.0] * 80, seed=seed))).verdict for seed in range(200)]
    assert verdicts.count("declines") <= 8


def test_ra_that_never_stops_rising_does_not_decline():
    found = decline_of(history(noisy([40 + 0.1 * e for e in range(100)], sd=0.5)))
    assert (found.verdict, found.onset, found.slope) == ("no decline", None, None)
    assert found.fall == pytest.approx(0, abs=2)


def test_a_fall_of_less_than_a_point_is_none_however_smooth():
    assert decline_of(history([70.0] * 50 + [69.1] * 50)).verdict == "no decline"
    assert decline_of(history([70.0] * 50 + [68.9] * 50)).verdict == "declines"


def test_too_few_measurements_say_so():
    found = decline_of(history([70.0, 65.0, 60.0, 50.0, 40.0, 30.0, 20.0]))
    assert (found.verdict, found.noise) == ("too few measurements", None)
    assert (found.peak, found.last, found.fall) == (65.0, 40.0, 25.0)  # the median of 70, 65 and 60


def test_an_empty_history():
    found = decline_of([])
    assert (found.verdict, found.best, found.last, found.fall) == ("too few measurements", None, None, None)


def test_a_test_set_that_is_looked_at_now_and_then():
    found = decline_of(history(falling(onset=60, slope=0.25), every=5), drops=[50])
    assert (found.onset, found.since_drop) == (60, 10)
    assert found.slope == pytest.approx(-0.25)
    assert found.last == pytest.approx(50 - 0.25 * 38)


def test_the_best_is_that_of_validation_not_of_the_test_set():
    validated = [30.0] * 100
    validated[69] = 31.0
    found = decline_of(history(falling(onset=60, slope=0.25), validated=validated))
    assert (found.best_epoch, found.best) == (70, 47.5)


def test_a_best_that_is_known_from_elsewhere_counts():
    found = decline_of(history(falling(onset=60, slope=0.25), every=5), best=(53, 51.0))
    assert (found.best_epoch, found.best, found.fall) == (53, 51.0, pytest.approx(9.5))  # of which the fall is apart


def test_a_run_can_fall_from_its_peak_and_end_above_the_epoch_that_validation_picked(made_up):
    """Each figure of the row is of one definition, and the verdict follows from those beside it."""
    values = [60.0] * 20 + [69.0] * 40 + [66.0] * 40
    validated = [50.0] * 100
    validated[9] = 51.0
    found = decline_of(history(values, validated=validated))
    assert (found.best_epoch, found.best, found.last) == (10, 60.0, 66.0)
    assert (found.verdict, found.onset, found.peak, found.fall) == ("declines", 60, 69.0, 3.0)
    seen = at_a_glance([made_up(values, validated=validated)])
    shown = table(seen)
    row = dict(zip(shown.columns, shown.rows[0], strict=True))
    assert (row["RA peak"], row["last five"], row["fall"]) == ("69.00", "66.00 ± 0.00", "3.00")
    assert row["onset"] == "60 (25 + 35)"
    assert "60.00" not in row.values()  # of the epoch that validation picked
    [line] = figures(seen)
    assert (line["RA peak"], line["RA at best val"], line["epoch of best val"]) == (69.0, 60.0, 10)


def test_a_verdict_agrees_with_the_fall_whatever_validation_picked():
    rng = random.Random(0)
    for seed in range(100):
        turn, slope = rng.randint(20, 80), rng.uniform(0, 0.4)
        values = [40 + 0.3 * min(e, turn) - slope * max(0, e - turn) for e in range(100)]
        rows = history(noisy(values, sd=0.7, seed=seed), validated=[rng.random() for _ in range(100)])
        found = decline_of(rows)
        assert (found.verdict == "declines") == (found.fall >= max(1.0, 3 * found.noise))
        assert found.fall == pytest.approx(found.peak - found.last)
        if found.verdict == "declines":
            assert values[found.onset - 1] > found.last


def test_what_is_no_number_is_left_out():
    values = falling(onset=62, slope=0.25)
    rows = history(values)
    for epoch in (5, 55, 80):
        rows[epoch - 1]["test_ra"] = float("nan")
    assert decline_of(rows).onset == 62


def test_without_a_test_set_the_validation_set_serves():
    rows = [{**row, "test_ra": None} for row in history(falling(onset=62, slope=0.25))]
    found = decline_of(rows, best=(1, 99.0))
    assert (found.part, found.onset, found.best) == ("val", 62, 50.0)


def test_smoothed_weights_have_a_history_of_their_own():
    rows = history([70.0] * 60 + [65.0] * 40)
    for row, value in zip(rows, [None] * 20 + [72.0] * 80, strict=True):
        row["smoothed_test_ra"] = row["smoothed_val_ra"] = value
    assert decline_of(rows, weights="smoothed").verdict == "no decline"
    assert decline_of(rows, weights="raw").verdict == "declines"


def test_the_drops_are_the_recipes():
    assert drops_of({"epochs": 200, "milestones": [0.25, 0.75], "other": 1}) == [50, 150]
    assert drops_of({"epochs": 200, "lr_schedule": "cosine"}) == []


@pytest.fixture
def made_up(tiny, tmp_path):
    """Writes an unfinished run with a made-up history of test RA."""

    def write(values, smoothed=None, validated=None, **changes):
        run = Run.create(tmp_path / str(len(list(tmp_path.iterdir()))), tiny(epochs=100, **changes))
        rows = history(values, validated=validated)
        for row, value in zip(rows, smoothed or [], strict=False):
            row["smoothed_test_ra"] = row["smoothed_val_ra"] = value
        with (run.path / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        return run

    return write


def test_what_a_remedy_recovers(made_up):
    baseline = made_up([70.0] * 60 + [60.0] * 40)
    remedy = made_up([72.0] * 60 + [69.0] * 40, smoothed=[73.0] * 60 + [72.0] * 40, smoother="swa")
    one, raw, smoothed = at_a_glance([remedy, baseline])[::-1][0], *at_a_glance([remedy, baseline])[:2]
    assert one.is_baseline
    assert (one.recovered, one.regained) == (None, None)
    assert (raw.weights, smoothed.weights) == ("raw", "smoothed")
    assert raw.recovered == pytest.approx(70)  # of a fall of 10 points 3 are left
    assert raw.regained == Figure(9.0)
    assert smoothed.recovered == pytest.approx(90)
    assert smoothed.regained == Figure(12.0)


def test_seeds_are_paired_and_averaged(made_up):
    baseline = [made_up([70.0] * 60 + [end] * 40, seed=seed) for seed, end in enumerate((60.0, 64.0))]
    remedy = [
        made_up([70.0] * 60 + [end] * 40, seed=seed, regularizer="tf-kd") for seed, end in enumerate((67.0, 69.0))
    ]
    first, second = at_a_glance([*baseline, *remedy])
    assert first.mean("fall") == Figure(8.0, pytest.approx(8**0.5))
    assert second.mean("fall") == Figure(2.0, pytest.approx(2**0.5))
    assert second.recovered == pytest.approx(75)
    assert second.regained == Figure(6.0, pytest.approx(2**0.5))  # 7 and 5, seed by seed


def test_there_is_nothing_to_recover_where_the_baseline_does_not_decline(made_up):
    _, remedy = at_a_glance([made_up([60.0] * 100), made_up([65.0] * 100, smoother="ema")])
    assert remedy.recovered is None
    assert remedy.regained == Figure(5.0)


def test_a_baseline_differs_in_the_remedy_alone(made_up):
    others = made_up([70.0] * 60 + [60.0] * 40, method="trades"), made_up([70.0] * 100, smoother="swa")
    _, remedy = at_a_glance(others)
    assert (remedy.recovered, remedy.regained) == (None, None)


def test_the_table_says_it_in_words(made_up):
    runs = [made_up(falling(onset=onset, slope=0.25), seed=seed) for seed, onset in enumerate((60, 70))]
    runs += [made_up([70.0] * 100, smoother="swa"), made_up([60.0] * 5, smoother="ema")]
    rows = {row[0]: row for row in table(at_a_glance(runs)).rows}
    assert rows["at, not finished (2 runs)"][4:7] == [
        "60\N{EN DASH}70 (25 + 35\N{EN DASH}45) (2 of 2)",
        "-2.50 ± 0.00",
        "baseline",
    ]
    assert rows["at + swa, not finished"][4:] == ["none", "-", "100 %", "+29.50"]
    assert rows["at + ema, not finished"][4] == "too few epochs"


def test_figures_are_run_by_run_and_in_full(made_up):
    runs = [made_up(falling(onset=60, slope=1 / 3), seed=seed) for seed in range(2)]
    first, second = figures(at_a_glance(runs))
    assert (first["run"], second["run"], first["onset"]) == (1, 2, 60)
    assert first["points per epoch"] == pytest.approx(-1 / 3)


def test_a_finished_runs_best_is_its_summarys(smoothed_run):
    found = decline_in(smoothed_run, "smoothed")
    best = smoothed_run.summary["smoothed"]["best"]
    assert (found.best_epoch, found.best) == (best["epoch"], best["test_ra"])
    final = smoothed_run.summary["smoothed"]["final"]
    assert (found.last, found.last_sd) == (final["last5_ra_mean"], final["last5_ra_sd"])
    assert found.verdict == "too few measurements"


def test_a_run_without_smoothed_weights_has_no_such_decline(plain_run):
    assert decline_in(plain_run, "smoothed") is None


@pytest.mark.parametrize(
    ("style", "first"), [("text", "robust overfitting"), ("markdown", "| setting |"), ("latex", r"\begin{tabular}"),
                         ("csv", "setting,weights")]
)  # fmt: skip
def test_the_command_prints_the_table(plain_run, smoothed_run, style, first):
    result = CliRunner().invoke(cli, ["overfitting", str(plain_run.path), str(smoothed_run.path), "--format", style])
    assert result.exit_code == 0
    assert result.stdout.startswith(first)
    assert "at + kd-std-adv + swa" in " ".join(result.stdout.split()) or style == "text"


def test_the_command_says_that_nothing_is_measured_yet(tiny, tmp_path):
    run = Run.create(tmp_path / "run", tiny())
    result = CliRunner().invoke(cli, ["overfitting", str(run.path)])
    assert result.exit_code == 2
    assert "no epoch is measured yet" in result.stderr


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    result = CliRunner().invoke(cli, ["overfitting", str(tmp_path)])
    assert result.exit_code == 2
    assert "no run directory" in result.stderr
    assert json.dumps(str(tmp_path))[1:-1] in result.stderr


def test_an_unfinished_seed_does_not_count_beside_a_finished_one(plain_run, stopped_run):
    _, path = stopped_run(seed=1)
    [seen] = at_a_glance([Run(path), plain_run])
    assert seen.label == "at"
    assert seen.declines == [decline_in(plain_run, "raw")]
