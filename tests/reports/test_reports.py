"""Every report has tests."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.reports.reports import REPORTS

HERE = Path(__file__).parent


def test_every_report_is_in_the_table() -> None:
    assert set(REPORTS) == {1, 2, 3, 4, 6, 7, 9, 13, 16, 17, 19, 21, 22, 23, 26, 34}


@pytest.mark.parametrize("number", REPORTS)
def test_every_report_has_tests_that_say_so(number: int) -> None:
    tree = ast.parse((HERE / REPORTS[number].file).read_text())
    assert f"Report {number}" in (ast.get_docstring(tree) or ""), "its file's docstring names the report"
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert len(tests) >= 4, "the report's own case, and at least three more of its kind"
