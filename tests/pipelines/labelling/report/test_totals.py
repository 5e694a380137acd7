"""What a run took and what that cost; totals that add up; seconds of stages."""

import json
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from pipelines.labelling.report.totals import Prices, Totals, spent
from pipelines.labelling.stages.clocks import Start, Stopwatch
from pspnet_core.errors import ConfigError

ONE = Totals(
    images=5,
    labelled=3,
    kinds=Counter(Missing=1, Empty=1),
    bytes_read=1000,
    cpu=Counter({"read": 0.25}),
    wall=Counter({"read": 1.5}),
    held=Counter({"gpu": 7200.0, "cpu": 1800.0}),
)


def test_totals_add_up() -> None:
    both = ONE + Totals(images=2, labelled=1, kinds=Counter(Empty=1), given_up=1, cpu=Counter({"write": 0.5}))
    assert (both.images, both.labelled, both.errors, both.done, both.bytes_read, both.given_up) == (7, 4, 3, 7, 1000, 1)
    assert both.kinds == Counter(Missing=1, Empty=2)
    assert (both.cpu, both.wall, both.held) == ({"read": 0.25, "write": 0.5}, ONE.wall, ONE.held)
    assert ONE + Totals() == Totals() + ONE == ONE


def test_totals_as_json() -> None:
    assert Totals.from_json(json.loads(json.dumps(ONE.to_json()))) == ONE


def test_one_stage_alone() -> None:
    found = (ONE + Totals(cpu=Counter({"write": 0.5}), wall=Counter({"write": 2.0}))).of_stage("write")
    assert found == Totals(cpu=Counter({"write": 0.5}), wall=Counter({"write": 2.0}))
    assert dict(ONE.of_stage("write").cpu) == {"write": 0}


@pytest.mark.parametrize(
    ("totals", "prices", "cost", "per_1000"),
    [
        (ONE, Prices(gpu=2.0, cpu=0.04), 4.02, 804.0),
        (ONE, Prices(gpu=1.0), 2.0, 400.0),
        (ONE, Prices(cpu=1.0), 0.5, 100.0),
        (ONE, Prices(), None, None),
        (Totals(), Prices(gpu=1.0), 0.0, None),
    ],
)
def test_what_images_cost(totals: Totals, prices: Prices, cost: float | None, per_1000: float | None) -> None:
    found = spent(totals, prices)
    assert (found["images"], found["bytes_read"]) == (totals.done, totals.bytes_read)
    assert (found["gpu_seconds"], found["cpu_seconds"]) == (totals.held["gpu"], totals.held["cpu"])
    assert (found["cost"], found["cost_per_1000_images"]) == (pytest.approx(cost), pytest.approx(per_1000))


@pytest.mark.parametrize("price", [-0.01, float("nan"), float("inf")])
def test_bad_prices(price: float) -> None:
    with pytest.raises(ConfigError, match=r"^price_gpu="):
        Prices(gpu=price)
    with pytest.raises(ConfigError, match=r"^price_cpu="):
        Prices(cpu=price)


def busy() -> None:
    start = time.thread_time()
    while time.thread_time() < start + 0.01:
        pass


def test_seconds_of_a_stage() -> None:
    start = Start.now()
    busy()
    found = start.spent("read")
    assert found.cpu.keys() == found.wall.keys() == {"read"}
    assert found.wall["read"] >= found.cpu["read"] >= 0.01


def test_the_network_is_what_waits_for_neither_images_nor_threads() -> None:
    watch = Stopwatch()

    def images() -> Iterator[int]:
        for number in range(2):
            start = Start.now()
            busy()
            watch.add("decode", start)
            yield number

    def predictions() -> Iterator[int]:
        for number in watch.waiting("images", images()):
            busy()
            busy()
            yield number

    assert list(watch.waiting("predict", predictions())) == [0, 1]
    found = watch.spent()
    assert found.cpu["encode"] == found.wall["encode"] == 0
    for seconds in (found.cpu, found.wall):
        assert seconds["decode"] >= 0.02
        assert seconds["predict"] >= 0.04
    assert found.wall["segment"] >= found.wall["predict"] + found.wall["decode"]
    assert found.cpu["segment"] == pytest.approx(found.cpu["predict"] + found.cpu["decode"])
