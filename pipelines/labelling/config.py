"""The flags of labelling."""

import datetime
from dataclasses import dataclass, field, replace

from pipelines.cluster.resources import ActorConfig
from pipelines.label_table.schema import utc_now
from pipelines.labelling.report.totals import Prices
from pipelines.labelling.retry_errors import check_kinds
from pipelines.models.loading import InferenceOverrides
from pipelines.sources import Inputs, find_source
from pipelines.sources.dates import run_date, since_time
from pipelines.storage import open_store
from pipelines.tracking.runs import TrackingConfig
from pspnet_core.errors import ConfigError, check_positive


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Label every image below a prefix and write masks and class statistics as Parquet."""

    input: str
    """Images: folders, globs or files, local or URIs (s3://...), comma-separated; {date} stands for the run's date."""
    output: str
    """Where the label table goes: a local folder or a URI."""
    model: str
    """Checkpoint: a local folder, a URI, runs:/... or models:/name@alias."""
    date: str | None = None
    """Partition dt= of new labels: YYYY-MM-DD, today (UTC, the default) or yesterday."""
    actors: ActorConfig = field(default_factory=ActorConfig)
    inference: InferenceOverrides = field(default_factory=InferenceOverrides)
    local: bool | None = None
    """Whether to label on this machine's CPUs, without Ray; by default for few images where no cluster is named, no GPU
    is there and neither --workers nor --gpus is given."""
    chunk: int = 256
    """Images per chunk, which is one Parquet file."""
    mask: str = "rle"
    """Mask columns to fill: rle (run lengths), png or both."""
    source: str = "images"
    """Input format: images, webdataset, parquet or manifest."""
    allow: tuple[str, ...] = ()
    """What a manifest may name besides its own folder, bucket or host: folders or URIs, comma-separated."""
    exclude: tuple[str, ...] = ()
    """Globs relative to the input's folder, comma-separated: what matches is left out, and what lies below it."""
    since: str | None = None
    """Label only what was modified then or later: a date, a time (UTC), or a span such as 36h or 7d."""
    max_pixels: int = 100_000_000
    """Largest image in pixels; a larger one becomes an error row."""
    max_errors: float = 1.0
    """Share of images that may become error rows before the run stops; judged from the first hundred on."""
    retry_errors: tuple[str, ...] | None = None
    """Label nothing new; try error rows of these kinds again (such as Missing,Denied), or all."""
    wait: bool = True
    """Whether to wait while another run labels with the same model into the same output; false works beside it."""
    price_gpu: float | None = None
    """Price of a GPU for an hour, in any currency: for the cost in the run record."""
    price_cpu: float | None = None
    """Price of a CPU for an hour."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check_positive(chunk=self.chunk, max_pixels=self.max_pixels)
        if not 0 <= self.max_errors <= 1:
            raise ConfigError("max_errors", self.max_errors, "give a share in 0..1")
        if self.retry_errors is not None:
            check_kinds(self.retry_errors)
        if self.mask not in ("rle", "png", "both"):
            raise ConfigError("mask", self.mask, "choose rle, png or both")
        if self.local and (self.actors.workers or self.actors.gpus):
            raise ConfigError("local", self.local, "has one worker, on CPUs; leave out --workers and --gpus")
        find_source(self.source)
        self.inputs(utc_now())
        self.prices()

    def inputs(self, now: datetime.datetime) -> Inputs:
        """What there is to label, for a run that starts ``now``."""
        since = None if self.since is None else since_time(self.since, now)
        date = run_date(self.date, now)
        inputs = Inputs.of(self.input, date=date, since=since, exclude=self.exclude, allow=self.allow)
        return replace(inputs, output=open_store(self.output, field="output").root)

    def prices(self) -> Prices:
        """Those that are given."""
        return Prices(gpu=self.price_gpu, cpu=self.price_cpu)
