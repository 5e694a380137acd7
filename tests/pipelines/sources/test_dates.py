"""Dates in flags: what they mean, and how mistakes are told."""

import datetime

import pytest

from pipelines.sources.dates import run_date, since_time, with_date
from pspnet_core.errors import ConfigError

NOW = datetime.datetime(2026, 3, 1, 0, 30, tzinfo=datetime.timezone.utc)
DATE = datetime.date(2026, 1, 5)


@pytest.mark.parametrize(
    ("text", "date"),
    [(None, "2026-03-01"), ("today", "2026-03-01"), ("yesterday", "2026-02-28"), ("2024-02-29", "2024-02-29")],
)
def test_the_date_of_a_run(text: str | None, date: str) -> None:
    assert run_date(text, NOW).isoformat() == date


@pytest.mark.parametrize("text", ["tomorrow", "", "2026-1-5", "20260105", "2026-02-30", "2026-01-05T00:00"])
def test_what_is_no_date(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^date={text}: give a date as YYYY-MM-DD, today or yesterday"):
        run_date(text, NOW)


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("s3://b/photos", "s3://b/photos"),
        ("s3://b/{date}/", "s3://b/2026-01-05/"),
        ("s3://b/{date:%Y/%m/%d}/{date:%j}", "s3://b/2026/01/05/005"),
        ("s3://b/[{]x}/{date:%y}", "s3://b/[{]x}/26"),
    ],
)
def test_templates(text: str, filled: str) -> None:
    assert with_date(text, DATE, field="input") == filled


@pytest.mark.parametrize("text", ["{}", "{day}", "{date:YYYY}", "{date:}", "{date.year}", "a/{date}/{x}"])
def test_what_is_no_template(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^input=.*: write \{date\} or \{date:%Y/%m/%d\}"):
        with_date(text, DATE, field="input")


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-02-28", "2026-02-28T00:00:00+00:00"),
        ("2026-02-28T18:30", "2026-02-28T18:30:00+00:00"),
        ("2026-02-28T18:30:00Z", "2026-02-28T18:30:00+00:00"),
        ("2026-02-28 20:30+02:00", "2026-02-28T18:30:00+00:00"),
        ("90m", "2026-02-28T23:00:00+00:00"),
        ("36h", "2026-02-27T12:30:00+00:00"),
        ("7d", "2026-02-22T00:30:00+00:00"),
        ("2w", "2026-02-15T00:30:00+00:00"),
    ],
)
def test_points_in_time(text: str, moment: str) -> None:
    assert since_time(text, NOW) == datetime.datetime.fromisoformat(moment)


@pytest.mark.parametrize("text", ["", "7", "7 d", "d", "-7d", "7y", "yesterday", "28.02.2026", f"{10**9}w"])
def test_what_is_no_point_in_time(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^since={text}: give a date or time such as"):
        since_time(text, NOW)


def test_the_future_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"^since=2026-03-02: lies in the future"):
        since_time("2026-03-02", NOW)
