"""A table is one thing on a page, in Markdown and in the terminal."""

from __future__ import annotations

from persona_lora.cli.console import to_rich
from persona_lora.report.sections import Table


def test_a_table_in_markdown_has_a_line_for_each_row():
    table = Table(("Name\nand more", "n"), (("a", "1"), ("b", None)))
    assert table.markdown() == "| Name and more | n |\n| --- | --- |\n| a | 1 |\n| b |  |"


def test_a_cell_takes_the_columns_of_those_that_are_none():
    assert Table.spans(("a", "why", None, None, "b")) == [("a", 1), ("why", 3), ("b", 1)]


def test_a_table_in_the_terminal_has_its_headings_on_one_line_and_every_cell():
    shown = to_rich(Table(("Name\nand more", "n"), (("a", "1"), ("b", None))))
    assert [column.header for column in shown.columns] == ["Name and more", "n"]
    assert [list(column.cells) for column in shown.columns] == [["a", "b"], ["1", ""]]


def test_a_terminal_shows_some_columns_of_a_page_s_table():
    table = Table(("Name", "n", "why\nnot"), (("a", "1", "x"), ("b", None, "y")), "T").only(2, 0)
    assert (table.title, table.headings) == ("T", ["why not", "Name"])
    assert table.rows == (("x", "a"), ("y", "b"))
