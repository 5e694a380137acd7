"""What a run has done so far: counts that add up over chunks and plans."""

from collections import Counter
from dataclasses import dataclass, field

from pipelines.labelling.stages.chunks import ChunkRow


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What was done; ``+`` puts two together.

    Attributes:
        labelled, errors: images of each outcome.
        kinds: errors of each kind.
        read: bytes of images that were read.
        cpu, wall: seconds of each stage, of CPU and on the wall; those of threads side by side add up. ``segment`` is
            all that an actor does with a chunk; ``decode``, ``predict`` and ``encode`` are its parts.
        held: seconds of actors, working or waiting: of the ``actor`` itself, and times each ``gpu`` and ``cpu`` of it.
    """

    labelled: int = 0
    errors: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    read: int = 0
    cpu: Counter[str] = field(default_factory=Counter)
    wall: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, row: ChunkRow) -> "Totals":
        """The counters of one chunk, as the last stage hands them over."""
        return cls(
            labelled=int(row["labelled"]),
            errors=int(row["errors"]),
            kinds=Counter(row["kinds"].split()),
            read=int(row["bytes"]),
            cpu=_named(row, "cpu_"),
            wall=_named(row, "wall_"),
            held=_named(row, "held_"),
        )

    @property
    def done(self) -> int:
        """Images that have a row now."""
        return self.labelled + self.errors

    def of_stage(self, stage: str) -> "Totals":
        """The seconds of one stage alone."""
        return Totals(cpu=Counter({stage: self.cpu[stage]}), wall=Counter({stage: self.wall[stage]}))

    def __add__(self, other: "Totals") -> "Totals":
        """Both together."""
        return Totals(
            labelled=self.labelled + other.labelled,
            errors=self.errors + other.errors,
            kinds=_together(self.kinds, other.kinds),
            read=self.read + other.read,
            cpu=_together(self.cpu, other.cpu),
            wall=_together(self.wall, other.wall),
            held=_together(self.held, other.held),
        )


def _named(row: ChunkRow, prefix: str) -> Counter[str]:
    return Counter({key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)})


def _together(left: Counter[str], right: Counter[str]) -> Counter[str]:
    both = Counter(left)  # Counter's own + drops what is not positive
    both.update(right)
    return both
