import csv
import io
import json
import statistics

import pytest
from rich.console import Console

from at_smooth import InputError, Run, RunError, load_data
from at_smooth.confidence import wilson
from at_smooth.experiment import prepare_data
from at_smooth.report import HEADER, Cell, comparison_rows, draw_curves, format_table, rich_table, summary_rows


def block(ra, sa, drop=2.0):
    return {
        "best": {"epoch": 3, "val_ra": ra, "test_ra": ra, "test_sa": sa},
        "final": {"epoch": 4, "test_ra": ra - drop, "test_sa": sa + 1, "last5_ra_mean": ra, "last5_ra_sd": 0.5},
        "diff": {"ra": drop, "sa": -1.0},
    }


@pytest.fixture
def finished(tiny, tmp_path):
    """Writes the directory of a finished run with made-up figures."""

    def write(ra, sa=80.0, smoothed=None, n=None, drop=2.0, test_set=None, **changes):
        run = Run.create(tmp_path / str(len(list(tmp_path.iterdir()))), tiny(**changes))
        summary = {
            "raw": block(ra, sa, drop),
            "smoothed": smoothed and block(*smoothed),
            "reported": "smoothed" if smoothed else "raw",
            "recipe": run.recipe.to_dict(),
            "seconds": 1.0,
            **({"examples": {"val": 10, "test": n}} if n else {}),
            **({"test_set": test_set} if test_set else {}),
        }
        (run.path / "summary.json").write_text(json.dumps(summary))
        return run

    return write


def means(cells):
    return [cell.mean for cell in cells]


def test_the_columns_are_the_papers():
    assert HEADER == ["setting", "RA best", "RA final", "RA diff", "SA best", "SA final", "SA diff"]


def test_runs_that_differ_in_the_seed_share_a_row(finished):
    runs = [finished(ra, sa, seed=seed) for seed, (ra, sa) in enumerate([(40.0, 80.0), (43.0, 82.0), (44.0, 84.0)])]
    rows = comparison_rows([*runs, finished(50.0, regularizer="tf-kd")])
    assert len(rows) == 2
    label, cells = rows[0]
    assert "3 runs" in label
    assert cells[0].mean == pytest.approx(statistics.mean([40, 43, 44]))
    assert cells[0].sd == pytest.approx(statistics.stdev([40, 43, 44]))
    assert means(cells)[1:] == pytest.approx([statistics.mean([38, 41, 42]), 2, 82, 83, -1])
    assert means(rows[1][1]) == [50, 48, 2, 80, 81, -1]
    assert [cell.sd for cell in rows[1][1]] == [None] * 6


def test_a_single_runs_accuracies_have_intervals(finished):
    for [(_, cells)] in (comparison_rows([finished(40.0, n=1000)]), summary_rows(finished(40.0, n=1000).summary)):
        assert cells[0].interval == pytest.approx(wilson(40.0, 1000))
        assert cells[3].interval == pytest.approx(wilson(80.0, 1000))
        assert [cell.interval for cell in (cells[2], cells[5])] == [None, None]  # differences are no accuracies
    [(_, cells)] = comparison_rows([finished(40.0, seed=seed, n=1000) for seed in range(2)])
    assert [cell.interval for cell in cells] == [None] * 6


def test_an_older_run_has_neither_intervals_nor_marks(finished):
    for _, cells in comparison_rows([finished(40.0), finished(40.1, regularizer="tf-kd")]):
        assert [(cell.interval, cell.supported) for cell in cells] == [(None, None)] * 6


def test_a_single_runs_differences_are_judged_by_its_intervals(finished):
    rows = comparison_rows([
        finished(40.0, n=1000, drop=9.0),
        finished(43.0, n=1000, drop=3.0, regularizer="tf-kd"),
        finished(50.0, n=1000, regularizer="kd-adv"),
    ])  # fmt: skip
    supported = [[cell.supported for cell in cells] for _, cells in rows]
    assert supported[0] == [
        None,
        None,
        True,
        None,
        None,
        False,
    ]  # the first is set against nothing, its diffs against 0
    assert supported[1] == [False, True, False, False, False, False]  # 43 and 40 on 1,000 examples may be the same
    assert supported[2][:3] == [True, True, False]


def test_differences_over_seeds_are_judged_by_the_seeds(finished):
    def setting(figures, **changes):
        return [finished(ra, seed=seed, drop=drop, **changes) for seed, (ra, drop) in enumerate(figures)]

    runs = [
        *setting([(40.0, 2.0), (40.2, 2.1), (39.8, 1.9)]),
        *setting([(41.0, -5.0), (41.2, 0.5), (40.8, 6.0)], regularizer="tf-kd"),
        *setting([(39.0, 2.0), (43.0, 2.0), (38.5, 2.0)], regularizer="kd-adv"),
    ]
    rows = [[cell.supported for cell in cells] for _, cells in comparison_rows(runs)]
    assert rows[0][:3] == [None, None, True]
    assert rows[1][:3] == [True, False, False]
    assert rows[2][:3] == [False, False, True]


def test_a_single_run_is_set_against_seeds_by_its_examples(finished):
    seeds = [finished(40.0 + seed, n=1000, seed=seed) for seed in range(3)]
    _, (_, near), (_, far) = comparison_rows(
        [*seeds, finished(42.0, n=1000, smoother="ema"), finished(60.0, n=1000, smoother="swa")]
    )
    assert (near[0].supported, far[0].supported) == (False, True)


UNLIKE = {
    "the same": ({}, ()),
    "remedies": ({"smoother": "swa", "epochs": 9}, ()),
    "data set": ({"dataset": "npz", "data_dir": "x.npz", "dataset_options": {}, "eps": 0.1}, ("dataset",)),
    "norm": ({"norm": "L2", "eps": 0.1}, ("norm",)),
    "radius": ({"eps": 0.2}, ("eps",)),
    "attack": ({"eval_steps": 50}, ("eval_steps",)),
    "number of images": ({"n": 500}, ("test images",)),
    "images": ({"test_set": "other"}, ("test images",)),
    "all of it": ({"eps": 0.3, "eval_steps": 7, "n": 20, "test_set": "x"}, ("eps", "eval_steps", "test images")),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_rows_are_set_against_the_first_only_where_they_measure_the_same(finished, what):
    changes, unlike = UNLIKE[what]
    first = finished(40.0, n=1000, test_set="one")
    other = finished(40.1, **{"n": 1000, "test_set": "one", "regularizer": "tf-kd", **changes})
    far = finished(60.0, n=1000, test_set="one", regularizer="kd-adv")
    rows = comparison_rows([first, other, far])
    cells = rows[1][1]
    assert [cell.unlike for cell in cells] == [unlike, unlike, (), unlike, unlike, ()]
    accuracies = {cell.supported for cell in cells if cell.interval}
    assert accuracies == ({None} if unlike else {False})
    assert cells[2].supported is False  # a diff is set against 0 in any case
    assert rows[2][1][0].supported is True
    for style in ("text", "markdown", "latex"):
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(rich_table(rows, "title") if style == "text" else format_table(rows, style))
        text = " ".join(console.export_text().replace("\\", "").split())
        note = f"measured otherwise than the first row, and not set against it: row 2 ({', '.join(unlike)})"
        assert (note in text) == bool(unlike)
    table = list(csv.DictReader(format_table(rows, "csv").splitlines()))
    assert table[1]["measured unlike the first"] == "; ".join(unlike)
    assert table[1]["RA best supported"] == ("" if unlike else "0")


def test_what_an_older_run_does_not_say_of_its_images_makes_no_difference(finished):
    rows = comparison_rows([finished(40.0, n=1000), finished(40.1, n=1000, test_set="one", smoother="ema")])
    assert [cell.unlike for cell in rows[1][1]] == [()] * 6


def test_seeds_on_other_test_images_are_no_seeds_of_one_setting(finished):
    """Two folders of images, and nothing else in the recipe that tells them apart."""
    runs = [finished(40.0 + seed, n=1000, test_set=images, seed=seed) for images in ("one", "two") for seed in (0, 1)]
    rows = comparison_rows([*runs, finished(50.0, seed=2)])  # an older run, which goes with the first
    assert [label for label, _ in rows] == ["at (test images one) (3 runs)", "at (test images two) (2 runs)"]
    assert rows[1][1][0].unlike == ("test images",)


def test_runs_of_the_same_seed_are_said_to_be_so(finished):
    with pytest.warns(UserWarning, match=r"2 runs of at have the same seed, 3; .*Leave out all but one"):
        comparison_rows([finished(40.0, seed=3), finished(41.0, seed=3), finished(42.0, seed=4)])


def test_the_summary_says_on_which_images_it_was_measured(plain_run, smoothed_run, tiny):
    assert plain_run.summary["test_set"] == load_data(plain_run.path).test_fingerprint()
    assert plain_run.summary["test_set"] == smoothed_run.summary["test_set"]
    other = tiny(seed=5, dataset_options={"pool": 60})
    assert prepare_data(other).test_fingerprint() == plain_run.summary["test_set"]


def test_where_a_run_was_made_makes_no_row(finished):
    assert len(comparison_rows([finished(40.0), finished(41.0, seed=1, device="auto", test_every=2)])) == 1


def test_the_reported_weights_are_compared(finished):
    [(_, cells)] = comparison_rows([finished(40.0, smoothed=(45.0, 85.0), smoother="swa")])
    assert means(cells) == [45, 43, 2, 85, 86, -1]


def test_rows_are_named_by_the_choices(finished):
    rows = comparison_rows([
        finished(40.0),
        finished(41.0, regularizer="kd-std-adv", smoother="swa"),
        finished(42.0, method="standard", smoother="iswa"),
    ])  # fmt: skip
    assert [label for label, _ in rows] == ["at", "at + kd-std-adv + swa", "standard + iswa"]


def test_rows_that_share_their_choices_say_what_differs(finished):
    rows = comparison_rows([
        finished(40.0, epochs=4),
        finished(41.0, epochs=6),
        finished(42.0, regularizer="kd-adv", regularizer_options={"temperature": 3}),
        finished(43.0, regularizer="kd-adv"),
    ])  # fmt: skip
    labels = [label for label, _ in rows]
    assert len(set(labels)) == 4
    assert "epochs=4" in labels[0]
    assert "epochs=6" in labels[1]
    assert "temperature=3" in labels[2]
    assert "temperature=2" in labels[3]


def test_one_runs_table_has_raw_and_smoothed(finished):
    run = finished(40.0, smoothed=(45.0, 85.0), smoother="swa")
    assert [(label, means(cells)[0]) for label, cells in summary_rows(run.summary)] == [("raw", 40), ("smoothed", 45)]
    assert [label for label, _ in summary_rows(finished(40.0).summary)] == ["raw"]


def test_an_unfinished_run_is_refused(tiny, tmp_path):
    with pytest.raises(RunError, match="not finished"):
        comparison_rows([Run.create(tmp_path / "run", tiny())])


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Cell(None), "-"),
        (Cell(0.0), "0.00"),
        (Cell(1.234), "1.23"),
        (Cell(1.234, 0.5), "1.23 ± 0.50"),
        (Cell(1.234, 0.5, supported=False), "~1.23 ± 0.50"),
        (Cell(1.234, 0.5, supported=True), "1.23 ± 0.50"),
        (Cell(61.234, None, (57.6, 64.74)), "61.23 (57.6\N{EN DASH}64.7)"),
    ],
)
def test_a_cell_reads_as_in_the_paper(cell, text):
    assert str(cell) == text


ROWS = [("at & 5%", [Cell(40.5, 1.25)] * 6), ("at_2", [Cell(None)] * 6)]


def test_markdown():
    lines = format_table(ROWS, "markdown").splitlines()
    assert lines[0] == "| setting | RA best | RA final | RA diff | SA best | SA final | SA diff |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| at & 5% |" + " 40.50 ± 1.25 |" * 6
    assert lines[3] == "| at_2 |" + " - |" * 6


def test_latex():
    lines = format_table(ROWS, "latex").splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrrr}"
    assert lines[-1] == r"\end{tabular}"
    assert lines[4] == r"at \& 5\%" + r" & 40.50 $\pm$ 1.25" * 6 + r" \\"
    assert lines[5] == r"at\_2" + " & -" * 6 + r" \\"


def test_csv_has_every_figure_in_full():
    table = list(csv.DictReader(format_table([("a, b", [Cell(1 / 3, 0.1)] * 6), *ROWS], "csv").splitlines()))
    assert [row["setting"] for row in table] == ["a, b", "at & 5%", "at_2"]
    assert float(table[0]["RA best"]) == 1 / 3
    assert float(table[0]["SA diff sd"]) == 0.1
    assert table[2]["RA best"] == ""


MARKED = [("at", [Cell(40.0, None, (36.4, 43.7))] * 6), ("swa", [Cell(41.0, None, (37.4, 44.7), supported=False)] * 6)]


def test_a_note_says_what_the_signs_mean():
    for style, mark in (("markdown", "~"), ("latex", r"$\sim$")):
        text = format_table(MARKED, style)
        assert text.count(f"{mark}41.00") == 6
        assert f"{mark}: cannot be told apart from the first row's" in text
        assert "interval of one run" in text
        assert "told apart" not in format_table(MARKED[:1], style)
    lines = format_table(MARKED, "latex").splitlines()
    assert all(line.endswith(r"\\") for line in lines[lines.index(r"\bottomrule") + 1 : -1])


def test_csv_adds_intervals_and_marks_after_the_older_columns():
    older = format_table([("at", [Cell(40.0, 1.0)] * 6)], "csv").splitlines()[0].split(",")[:13]
    first, second = csv.DictReader(format_table(MARKED, "csv").splitlines())
    assert list(first)[:13] == older == ["setting", *(f"{name}{sd}" for name in HEADER[1:] for sd in ("", " sd"))]
    assert (first["RA best low"], first["SA final high"]) == ("36.4", "43.7")
    assert (first["RA final supported"], second["RA final supported"]) == ("", "0")
    assert "RA diff low" not in first
    assert list(first)[-1] == "measured unlike the first"


def test_a_terminal_of_80_columns_holds_the_table():
    accuracies = [Cell(100.0, None, (99.5, 100.0), supported=False)] * 2
    cells = [*accuracies, Cell(-10.25, supported=False)] * 2
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(rich_table([("at + label-smoothing + swa", cells), ("at", [Cell(-10.5, 10.5)] * 6)], "title"))
    text = console.export_text()
    assert (text.count("~100.00"), text.count("~-10.25"), text.count("± 10.50")) == (4, 2, 6)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert "told apart" in text


def test_what_a_label_holds_is_no_markup():
    label = r"a|b_c${x}^\input"
    assert format_table([(label, [Cell(1.0)] * 6)], "markdown").splitlines()[2].startswith(r"| a\|b_c${x}^\\input |")
    assert r"a|b\_c\$\{x\}\textasciicircum{}\textbackslash{}input" in format_table([(label, [Cell(1.0)] * 6)], "latex")


def test_another_format_is_refused():
    with pytest.raises(InputError, match="no table format 'html'"):
        format_table(ROWS, "html")


def test_a_runs_curves_are_drawn_from_its_metrics(smoothed_run, tmp_path):
    history = smoothed_run.history
    draw_curves(history, smoothed_run.recipe.decays(), tmp_path / "curves.png")
    drawn = (tmp_path / "curves.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert drawn == (smoothed_run.path / "curves.png").read_bytes()
    draw_curves([{**row, "test_ra": 50.0} for row in history], [], tmp_path / "curves.png")
    assert drawn != (tmp_path / "curves.png").read_bytes()


def test_curves_can_do_without_a_test_set(tmp_path, smoothed_run):
    blank = dict.fromkeys(("test_sa", "test_ra", "smoothed_test_sa", "smoothed_test_ra"))
    draw_curves([{**row, **blank} for row in smoothed_run.history[:1]], [], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
