"""Read what a Ray Data execution makes, in the caller's thread.

``Dataset.iter_rows`` fetches and formats in threads of its own. They cost the driver more than small rows do, and may
outlive it: Ray ends a process that disconnects before they end, with exit code 1.
"""

import logging
from collections.abc import Generator
from typing import Any

import ray
import ray.data
from ray.data.block import Block, BlockAccessor

from pipelines.cluster.failures import in_plain_words
from pipelines.cluster.machine import LONGEST_SILENCE_S


def blocks_of(dataset: ray.data.Dataset) -> Generator[Block, None, None]:
    """The dataset's blocks as they are made. Closing the generator ends the execution.

    Raises:
        PspnetError: as ``in_plain_words``.
    """
    with in_plain_words():
        for bundle in dataset.iter_internal_ref_bundles():
            for block in bundle.block_refs:
                yield ray.get(block)


def rows_of(dataset: ray.data.Dataset) -> Generator[dict[str, Any], None, None]:
    """The dataset's rows as they are made, as ``Dataset.iter_rows`` gives them; otherwise as ``blocks_of``."""
    for block in blocks_of(dataset):
        yield from BlockAccessor.for_block(block).iter_rows(public_row_format=True)


REPORTERS = ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state")
"""Loggers that write the traceback and some advice before the error of a stage is raised."""


def quiet_ray_data() -> None:
    """Leave progress and errors to us: Ray Data's own bars, lines and tracebacks would stand beside ours."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = LONGEST_SILENCE_S
    context.raise_original_map_exception = True  # so that in_plain_words finds ours
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    for name in REPORTERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
