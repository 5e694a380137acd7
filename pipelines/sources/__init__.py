"""Input formats: what there is to label, and how its bytes are read.

``Inputs`` (inputs) walks what ``--input`` names. A source is one object with ``find`` and ``read`` (base) and one row
of ``SOURCES``: ``images``, an object each; ``archives`` and ``parquet``, files that hold many (containers);
``manifests``, lists of URIs. ``read_listed`` (reading) tells an image's fault from the storage's.
"""

from pipelines.sources.archives import WebDataset
from pipelines.sources.base import Source
from pipelines.sources.images import LooseImages
from pipelines.sources.inputs import Inputs
from pipelines.sources.manifests import Manifest
from pipelines.sources.parquet import ParquetRows
from pipelines.sources.reading import read_listed
from pspnet_core.errors import ConfigError

__all__ = ["SOURCES", "Inputs", "Source", "find_source", "read_listed"]

SOURCES: dict[str, Source] = {
    "images": LooseImages(),
    "webdataset": WebDataset(),
    "parquet": ParquetRows(),
    "manifest": Manifest(),
}


def find_source(name: str) -> Source:
    """The source called ``name``; ConfigError when there is none."""
    if name not in SOURCES:
        raise ConfigError("source", name, f"choose one of {', '.join(SOURCES)}")
    return SOURCES[name]
