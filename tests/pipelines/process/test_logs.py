"""What comes from outside forges no line of the log, and no secret stands in one."""

from __future__ import annotations

import logging

import pytest

from pipelines.process.logs import Printable


def test_a_record_is_one_line_whatever_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    name = 'a.jpg\n{"run_id": "forged"}\x1b[31m very-secret \udce9'
    record = logging.LogRecord("x", logging.WARNING, "x", 1, "%s is left out", (name,), None)
    line = Printable("%(levelname)s %(message)s").format(record)
    assert line == 'WARNING a.jpg\\n{"run_id": "forged"}\\x1b[31m *** \\udce9 is left out'


def test_a_traceback_keeps_its_lines() -> None:
    try:
        raise ValueError("\x1b[31m")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "x", 1, "told", (), (type(error), error, error.__traceback__))
    first, *_, last = Printable("%(message)s").format(record).splitlines()
    assert (first, last) == ("told", "ValueError: \\x1b[31m")
