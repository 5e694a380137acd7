"""Dates in flags: the run's own, templates that hold it, and points in time to look back to. All of them in UTC."""

import datetime
import re

from pspnet_core.errors import ConfigError

_DAYS_AGO = {"today": 0, "yesterday": 1}
_BRACES = re.compile(r"(?<!\[)\{([^{}]*)\}")
_TEMPLATE = re.compile(r"date(?::(.*))?")
_SPAN = re.compile(r"(\d+)([mhdw])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def run_date(text: str | None, now: datetime.datetime) -> datetime.date:
    """The date that ``--date`` means: ``YYYY-MM-DD``, ``today`` (also None) or ``yesterday``.

    Raises:
        ConfigError: it is none of these.
    """
    if text is None or text in _DAYS_AGO:
        return now.date() - datetime.timedelta(days=_DAYS_AGO[text or "today"])
    try:
        date = datetime.date.fromisoformat(text)
    except ValueError:
        date = None
    if date is None or date.isoformat() != text:
        raise ConfigError("date", text, "give a date as YYYY-MM-DD, today or yesterday")
    return date


def with_date(text: str, date: datetime.date, *, field: str) -> str:
    """Fill ``{date}`` (as YYYY-MM-DD) and ``{date:FORMAT}`` (as ``strftime`` writes it) in.

    Raises:
        ConfigError: other braces, or a format without a ``%``.
    """

    def fill(match: re.Match[str]) -> str:
        template = _TEMPLATE.fullmatch(match[1])
        if template is None or (template[1] is not None and "%" not in template[1]):
            raise ConfigError(field, text, "write {date} or {date:%Y/%m/%d}; a brace of its own is [{]")
        return format(date, template[1] or "")

    return _BRACES.sub(fill, text)


def since_time(text: str, now: datetime.datetime) -> datetime.datetime:
    """The moment that ``--since`` means: a date, a date and time (in UTC unless it says otherwise), or a span before
    ``now``: ``90m``, ``36h``, ``7d``, ``2w``.

    Raises:
        ConfigError: it is none of these, or lies in the future.
    """
    span = _SPAN.fullmatch(text)
    remedy = "give a date or time such as 2026-01-31 or 2026-01-31T18:00, or a span such as 36h or 7d"
    try:
        # Python 3.10 does not know the Z.
        moment = (
            now - datetime.timedelta(**{_UNITS[span[2]]: int(span[1])})
            if span
            else datetime.datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
        )
    except (ValueError, OverflowError) as error:
        raise ConfigError("since", text, remedy) from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.timezone.utc)
    if moment > now:
        raise ConfigError("since", text, f"lies in the future; {remedy}")
    return moment
