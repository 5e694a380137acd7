"""Start a run or resume one. A record in the output holds how the run began, to compare a resume with."""

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipelines.process.config_tree import differences, flatten, leaves
from pipelines.process.redaction import redacted, redacted_values
from pipelines.storage import Store
from pipelines.tracking.registry import check_keeps_models
from pipelines.tracking.runs import Run, resume_run, start_run
from pipelines.training.config import StepConfig, TrainConfig
from pipelines.training.setup import Setup
from pspnet_core.errors import ConfigError, check
from pspnet_core.network.pspnet import PSPNetConfig
from pspnet_core.training.augment import AugmentConfig
from pspnet_core.training.losses import LossConfig
from pspnet_core.training.optim import OptimiserConfig, ScheduleConfig

log = logging.getLogger(__name__)
EXPERIMENT = "pspnet-training"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Settings that a run began with: ``<name>/config.json``.

    Attributes:
        data: root of the data.
        classes: names of the classes, by id.
        content: identify, as they were listed, the pairs of both splits, and the whole class table, by split; a record
            without it tells of no change.
        network: what the config's flags and its --init make of it.
        flags: the config's leaves, flat and without credentials.
    """

    run_id: str
    data: str
    classes: tuple[str, ...]
    content: dict[str, str] = field(default_factory=dict)
    network: PSPNetConfig
    flags: dict[str, Any]

    def __post_init__(self) -> None:
        if self.flags.keys() != leaves(TrainConfig).keys():
            raise ValueError("flags are not those of a run")

    @classmethod
    def of(cls, setup: Setup, run_id: str) -> "RunRecord":
        """Record a run that begins now."""
        return cls(
            run_id=run_id,
            data=redacted(setup.dataset.store.root),
            classes=setup.dataset.classes.names,
            content={name: setup.dataset.fingerprint(name) for name in (setup.config.train, setup.config.val)},
            network=setup.network,
            flags=redacted_values(flatten(setup.config)),
        )

    @property
    def shape(self) -> dict[str, Any]:
        """Flags that must be equal, because saved weights, momenta and averages fit no others."""
        network = self.network
        return {
            "backbone": network.backbone,
            "stem": network.stem,
            "output_stride": network.output_stride,
            "bins": list(network.bins),
            "aux_weight": "on" if network.auxiliary else "off",
            "data": self.data,
            "classes": network.classes,
            **{name: self.flags[name] for name in ("layout", "batch", "optimiser", "ema")},
        }

    @property
    def course(self) -> dict[str, Any]:
        """Flags that decide the images, crops, loss, learning rate and update of a step."""
        parts = (AugmentConfig, StepConfig, LossConfig, OptimiserConfig, ScheduleConfig)
        inside = [name for name, leaf in leaves(TrainConfig).items() if leaf.owner in parts]
        return {name: self.flags[name] for name in ("seed", "train", *inside)}


RECORD = TypeAdapter(RunRecord)


def open_run(setup: Setup, output: Store) -> tuple[Run, bool]:
    """Start or resume the run; return it, and whether it is new in MLflow.

    Raises:
        ConfigError: there is a run already, or the one to resume had another shape.
    """
    config = setup.config
    path, place = f"{config.name}/config.json", output.uri_of(config.name)
    if output.exists(path):
        remedy = "add --resume to go on with it, or choose another --name or --output"
        check(config.resume, "output", place, f"holds a run already; {remedy}")
        before = _read_record(output, path)
        check_resumable(before, RunRecord.of(setup, before.run_id), init=config.network.init)
        check_keeps_models(EXPERIMENT)
        run = resume_run(EXPERIMENT, config.name, before.run_id)
        return run, run.run_id != before.run_id
    check_keeps_models(EXPERIMENT)
    run = start_run(EXPERIMENT, config.name)
    if not output.put_if_absent(path, RECORD.dump_json(RunRecord.of(setup, run.run_id), indent=1)):
        raise ConfigError("output", place, "another run began there just now; choose another --name or --output")
    return run, True


def _read_record(output: Store, path: str) -> RunRecord:
    try:
        return RECORD.validate_json(output.read(path))
    except ValidationError as error:
        reason = " ".join(str(error).split())[:200]
        remedy = f"is no record of a run that can be resumed ({reason}); choose another --name"
        raise ConfigError("resume", output.uri_of(path), remedy) from error


def check_resumable(before: RunRecord, now: RunRecord, *, init: str | None) -> None:
    """Refuse settings that the saved state does not fit, and warn of other changes, such as a longer run.

    Raises:
        ConfigError: names the flag, its value, and what the run began with.
    """
    for flag, value, old in differences(now.shape, before.shape):
        raise ConfigError(flag, value, f"the run to resume has {old}; give that, or another --name")
    # Only --init changes the other fields; dropout may differ.
    remedy = "the run to resume has another network; give the --init that it began with, or another --name"
    check(dataclasses.replace(before.network, dropout=now.network.dropout) == now.network, "init", init, remedy)
    # Other classes of the same number, or in another order, would load without an error.
    for index, (new, old) in enumerate(zip(now.classes, before.classes, strict=True)):
        remedy = f"class {index} of the run to resume is {old}; give its classes in its order, or another --name"
        check(new == old, "classes", new, remedy)
    if changed := [name for name, content in now.content.items() if before.content.get(name, content) != content]:
        told = "data that has changed since the run began, files or class table: split %s; scores do not compare"
        log.warning(told, " and ".join(changed))
    changes = [
        f"--{flag.replace('_', '-')} {value} (before: {old})"
        for flag, value, old in differences(now.course, before.course)
    ]
    if changes:
        log.warning("the run goes on in another way than it began: %s", ", ".join(changes))
