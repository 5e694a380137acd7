"""The contract of both executors where it takes many deaths of actors, on Ray; without Ray it is tested in its room."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipelines.labelling.config import LabelConfig
from tests.pipelines.labelling.test_executors import (  # noqa: F401  # fixtures
    bucket,
    check_broken_machine,
    check_unborn,
    impatient,
    make_config,
)


@pytest.mark.usefixtures("ray_cluster", "impatient")
def test_a_broken_machine(make_config: Callable[..., LabelConfig], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    check_broken_machine(make_config, monkeypatch, local=False)


@pytest.mark.usefixtures("ray_cluster", "impatient")
def test_a_model_that_ends_its_process_while_it_is_loaded(make_config: Callable[..., LabelConfig]) -> None:  # noqa: F811
    check_unborn(make_config, local=False)
