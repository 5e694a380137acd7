"""The errors tell their parts in one line, and survive the trip between processes."""

from __future__ import annotations

import pickle

import pytest

from pspnet_core.errors import ConfigError, ImageError, PspnetError


def test_config_error_names_field_value_and_remedy() -> None:
    error = ConfigError("workers", "0:x", "give N or MIN:MAX")
    assert str(error) == "workers=0:x: give N or MIN:MAX"
    assert (error.field, error.value, error.remedy) == ("workers", "0:x", "give N or MIN:MAX")


def test_image_error_is_kind_and_message() -> None:
    error = ImageError("Truncated", "3 bytes not processed")
    assert str(error) == "Truncated: 3 bytes not processed"
    assert (error.kind, error.message) == ("Truncated", "3 bytes not processed")


@pytest.mark.parametrize("error", [ConfigError("a", "1\n2", "x\r\n y"), ImageError("Bad", "x\n\ny")])
def test_errors_are_one_line_and_survive_pickling(error: PspnetError) -> None:
    assert len(str(error).splitlines()) == 1
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_the_tree() -> None:
    assert issubclass(ConfigError, PspnetError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ImageError, PspnetError)
    assert not issubclass(ImageError, ValueError)
