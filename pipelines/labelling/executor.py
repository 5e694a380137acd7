"""The Ray Data chain of every labelling run: chunk numbers -> read -> segment -> write -> tiny rows for the driver."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import ray
import ray.data

from pipelines.cluster.memory import give_memory_back
from pipelines.cluster.ray_data import quiet_ray_data, rows_of
from pipelines.cluster.resources import Pool, Share
from pipelines.labelling.stages.chunks import ChunkRow, Work
from pipelines.labelling.stages.segment import Predictor, Segment
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.device import best_device, is_async
from pspnet_core.inference.segmenter import Segmenter

WAVE = 2048
"""Chunks handed to Ray Data at a time, so that the driver's memory does not grow with the plan."""

CALLS = 2
"""Chunks that an actor has under way, so that its network need not wait between them."""

Stage = Callable[[ChunkRow], ChunkRow]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What a chunk goes through.

    Attributes:
        read: adds ``payload`` to a row that has but an ``id``.
        write: puts the segmented chunk where it belongs.
    """

    work: Work
    read: Stage
    write: Stage
    pool: Pool
    make_predictor: Callable[[], Predictor]

    def run(self, chunks: Sequence[int], stopped: Callable[[], bool] = lambda: False) -> Iterator[ChunkRow]:
        """Send chunks through; yields each one's counters as it is done, in no fixed order.

        Args:
            stopped: whether the coordinator admits no more chunks; those of later waves are not even begun with then.
        """
        quiet_ray_data()
        for start in range(0, len(chunks), WAVE):
            if stopped():
                return
            yield from rows_of(self._wave(chunks[start : start + WAVE]))
            give_memory_back()

    def _wave(self, chunks: Sequence[int]) -> ray.data.Dataset:
        wave: ray.data.Dataset = ray.data.from_items(
            [{"id": chunk} for chunk in chunks], override_num_blocks=len(chunks)
        )
        # Reading and writing claim no CPU: a stage that may always start cannot be starved by actors, of this job or of
        # another on the same cluster, which would hang both. Their number is what bounds them.
        tasks = ray.data.TaskPoolStrategy(size=min(2 * self.pool.high, len(chunks)))
        wave = wave.map(self.read, compute=tasks, num_cpus=0)
        wave = wave.map(
            Segment,  # type: ignore[arg-type]  # a class is built once per actor
            fn_constructor_args=(self.work, self.make_predictor, self.pool.share),
            compute=ray.data.ActorPoolStrategy(
                min_size=self.pool.low,
                max_size=self.pool.high,
                max_concurrent_calls_per_actor=self._calls(),
                enable_true_multi_threading=True,  # else the calls would take turns as a whole
            ),
            num_cpus=self.pool.share.cpus,
            num_gpus=self.pool.share.gpus or None,
        )
        return wave.map(self.write, compute=tasks, num_cpus=0)

    def _calls(self) -> int:
        """Chunks under way on an actor; CUDA graphs stay in one thread."""
        compiled = isinstance(self.make_predictor, MakeSegmenter) and self.make_predictor.compile
        return 1 if compiled else CALLS


@dataclass(frozen=True, kw_only=True)
class MakeSegmenter:
    """Builds a model's segmenter on an actor.

    Attributes:
        checkpoint: in the object store, which carries the weights to every node once; no shared folder is needed.
        batch, compile: as for ``Segmenter``.
        share: of the actor, whose memory bounds the batches, too.
    """

    checkpoint: "ray.ObjectRef[Checkpoint]"
    batch: int
    compile: bool
    share: Share

    def __call__(self) -> Segmenter:
        """On the best device there is."""
        model: Checkpoint = ray.get(self.checkpoint)
        # What is compiled is for one thread at a time.
        lanes = None if self.compile or is_async(best_device()) else self.share.threads_here()
        return Segmenter(
            model.model,
            model.settings,
            batch=self.batch,
            memory=self.share.pass_memory_here(),
            lanes=lanes,
            compile=self.compile,
        )


def segmenter_of(checkpoint: Checkpoint, *, batch: int, compile: bool, share: Share) -> MakeSegmenter:
    """What builds a model's segmenter on an actor."""
    return MakeSegmenter(checkpoint=ray.put(checkpoint), batch=batch, compile=compile, share=share)
