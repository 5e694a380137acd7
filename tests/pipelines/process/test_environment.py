"""The environment is read while another thread deletes variables."""

import os
from collections.abc import Iterator

import pytest

from pipelines.process.environment import variables
from pipelines.process.redaction import HIDDEN, redacted


class Deleting(dict[str, str]):
    """Deletes a variable after all names were read, as a thread may."""

    def __iter__(self) -> Iterator[str]:
        names = list(super().__iter__())
        self.pop("SESSION", None)
        return iter(names)


def test_what_is_deleted_meanwhile_is_left_out_and_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"SESSION": "1", "HOME": "/home/me", "MY_SECRET": "0123456789abcdef"}
    monkeypatch.setattr(os, "environ", Deleting(given))
    assert {"HOME", "MY_SECRET"} <= variables().keys() <= os.environ.keys()
    monkeypatch.setattr(os, "environ", Deleting(given))
    assert redacted("key 0123456789abcdef") == f"key {HIDDEN}"
