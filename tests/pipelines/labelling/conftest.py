"""Fixtures of labelling."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipelines.labelling import job
from tests.support.here import Here


@pytest.fixture(scope="module")
def stages_here() -> Iterator[None]:
    """Runs without Ray execute their stages in the test's own process, which saves a start of Python and torch each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "InProcessExecutor", Here)
        yield
