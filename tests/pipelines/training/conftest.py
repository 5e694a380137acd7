"""What the tests of training learn from."""

from pathlib import Path

import pytest

from pipelines.demo.demo import draw_dataset


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven scenes to learn from and two to score, in layout ``folder``; to be left as they are."""
    folder = tmp_path_factory.mktemp("scenes")
    draw_dataset(folder, train=11, val=2, seed=0)
    return folder
