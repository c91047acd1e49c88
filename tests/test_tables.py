import pytest
from rich.console import Console

from at_smooth import InputError
from at_smooth.tables import Table, tex

TABLE = Table("a title", ["what", "how much"], [["50 % of a_b & c|d", "1.00 ± 0.50"], ["~x", "-"]], ["a < b"])


def test_markdown():
    assert TABLE.formatted("markdown").splitlines() == [
        "| what | how much |",
        "| --- | ---: |",
        r"| 50 % of a_b & c\|d | 1.00 ± 0.50 |",
        "| ~x | - |",
        "",
        "a < b.",
    ]


def test_latex():
    assert TABLE.formatted("latex").splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"what & how much \\",
        r"\midrule",
        r"50 \% of a\_b \& c|d & 1.00 $\pm$ 0.50 \\",
        r"$\sim$x & - \\",
        r"\bottomrule",
        r"\end{tabular}",
        "% a $<$ b.",
    ]


def test_nothing_is_left_of_what_latex_would_obey():
    assert tex("\\input{x}\n%$") == r"\textbackslash{}input\{x\} \%\$"


def test_another_format_is_refused():
    with pytest.raises(InputError, match="no table format 'html'"):
        TABLE.formatted("html")


def test_markup_of_others_is_no_markup_in_the_terminal(capsys):
    Console(width=80).print(Table("[bold]t[/bold]", ["a"], [["[red]x[/red]"]]).rich())
    shown = capsys.readouterr().out
    assert "[bold]t[/bold]" in shown
    assert "[red]x[/red]" in shown
