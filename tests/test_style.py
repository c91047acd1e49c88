import subprocess
import sys

import matplotlib
import pytest

from at_smooth import presets, style

PAPER = ["at", "at + kd-std-adv", "at + swa", "at + kd-std-adv + swa", "at + label-smoothing", "at + tf-kd",
         "at + kd-adv", "at + kd-std", "at + iswa"]  # fmt: skip


def test_the_papers_settings_all_look_different():
    looks = [style.style_of(label) for label in PAPER]
    assert len({look.colour for look in looks}) == len(PAPER)
    assert len({look.marker for look in looks}) == len(PAPER)


def test_a_settings_look_does_not_depend_on_what_it_stands_beside():
    alone = {label: style.style_of(label) for label in PAPER}
    assert style.styles_of(PAPER[::-1]) == alone
    assert style.styles_of(PAPER[2:4]) == {label: alone[label] for label in PAPER[2:4]}


def test_settings_that_nobody_declared_have_a_look_that_follows_from_the_label():
    script = "from at_smooth.style import style_of; print(style_of('mart + penalty'))"
    elsewhere = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert elsewhere.stdout.strip() == repr(style.style_of("mart + penalty"))


def test_no_two_settings_of_a_figure_have_the_same_colour():
    labels = ["at", "at (eps=0.1)", "at (eps=0.2)", *(f"mart + thing-{number}" for number in range(8))]
    looks = style.styles_of(labels)
    assert looks["at"] == style.style_of("at")
    assert len({look.colour for look in looks.values()}) == len(labels)


def test_a_distribution_declares_looks_of_its_own_settings(distribution, tmp_path):
    distribution("house", {"recipes": {"house": "house_recipes"}})
    folder = tmp_path / "site-house" / "house_recipes"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "styles.yaml").write_text("at + penalty: {colour: sky, marker: d}\nat: {colour: '#123456'}\n")
    style._declared.cache_clear()
    try:
        assert style.style_of("at + penalty") == style.Style(style.PALETTE["sky"], "d")
        assert style.style_of("at").colour == style.PALETTE["blue"]
        assert "styles" not in presets.names()
    finally:
        style._declared.cache_clear()


def drawn():
    with style.paper_style():
        figure = style.new_figure()
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], label="a line")
        style.legend_above(figure)
    return figure


def test_the_same_figure_gives_the_same_bytes():
    assert style.as_svg(drawn()) == style.as_svg(drawn())
    assert style.as_png(drawn()) == style.as_png(drawn())


def test_words_in_svg_are_words_and_there_is_no_date():
    text = style.as_svg(drawn()).decode()
    assert "a line" in text
    assert "<dc:date>" not in text


def test_matplotlibs_own_settings_are_left_alone():
    before = dict(matplotlib.rcParams)
    drawn()
    style.as_svg(drawn())
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_not_touched():
    script = "import sys; from at_smooth import style; style.new_figure(); sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("width", [style.COLUMN, style.DOUBLE])
@pytest.mark.parametrize("count", [1, 5, 9])
def test_a_legend_keeps_within_the_figure(width, count):
    with style.paper_style():
        figure = style.new_figure(width)
        axes = figure.add_subplot()
        for label in PAPER[:count]:
            axes.plot([0, 1], [0, 1], label=label)
        style.legend_above(figure)
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent().transformed(figure.transFigure.inverted())
    assert box.x0 >= 0
    assert box.x1 <= 1
    assert box.y0 > axes.get_position().y1 - 1e-6
