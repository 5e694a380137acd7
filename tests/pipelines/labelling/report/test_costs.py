"""What a run took and what that cost; totals that add up; seconds of stages."""

import time
from collections import Counter
from collections.abc import Iterator

import pytest

from pipelines.labelling.report.costs import Prices, spent
from pipelines.labelling.report.totals import Totals
from pipelines.labelling.stages.clocks import Start, Stopwatch
from pspnet_core.errors import ConfigError

ROW = {
    "chunk": 3,
    "images": 5,
    "labelled": 3,
    "errors": 2,
    "kinds": "Missing Empty",
    "bytes": 1000,
    "cpu_read": 0.25,
    "wall_read": 1.5,
    "held_gpu": 7200.0,
    "held_cpu": 1800.0,
}


def test_the_counters_of_chunks_add_up() -> None:
    one = Totals.of(ROW)
    both = one + Totals.of(ROW | {"labelled": 1, "errors": 1, "kinds": "Empty", "cpu_write": 0.5})
    assert (both.labelled, both.errors, both.done, both.read) == (4, 3, 7, 2000)
    assert both.kinds == Counter(Missing=1, Empty=2)
    assert dict(both.cpu) == {"read": 0.5, "write": 0.5}
    assert dict(both.wall) == {"read": 3.0}
    assert dict(both.held) == {"gpu": 14400.0, "cpu": 3600.0}
    assert one + Totals() == Totals() + one == one


def test_one_stage_alone() -> None:
    found = Totals.of(ROW | {"cpu_write": 0.5, "wall_write": 2.0}).of_stage("write")
    assert found == Totals(cpu=Counter({"write": 0.5}), wall=Counter({"write": 2.0}))
    assert dict(Totals.of(ROW).of_stage("write").cpu) == {"write": 0}


def test_the_cost_of_a_thousand_images() -> None:
    found = spent(Totals.of(ROW), Prices(gpu=2.0, cpu=0.04))
    assert (found["images"], found["bytes_read"]) == (5, 1000)
    assert (found["gpu_seconds"], found["cpu_seconds"]) == (7200.0, 1800.0)
    assert found["cost"] == pytest.approx(4.02)
    assert found["cost_per_1000_images"] == pytest.approx(804.0)


def test_one_price_alone() -> None:
    assert spent(Totals.of(ROW), Prices(gpu=1.0))["cost"] == pytest.approx(2.0)
    assert spent(Totals.of(ROW), Prices(cpu=1.0))["cost"] == pytest.approx(0.5)


def test_without_prices_or_images_there_is_no_cost() -> None:
    unknown = spent(Totals.of(ROW), Prices())
    assert (unknown["cost"], unknown["cost_per_1000_images"]) == (None, None)
    nothing = spent(Totals(), Prices(gpu=1.0))
    assert (nothing["cost"], nothing["cost_per_1000_images"]) == (0.0, None)


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
    assert found.keys() == {"wall_read", "cpu_read"}
    assert found["wall_read"] >= found["cpu_read"] >= 0.01


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
    assert found["cpu_encode"] == found["wall_encode"] == 0
    assert found["cpu_decode"] >= 0.02
    assert found["wall_decode"] >= 0.02
    assert found["wall_predict"] >= 0.04
    assert found["cpu_predict"] >= 0.04
    assert found["wall_segment"] >= found["wall_predict"] + found["wall_decode"]
    assert found["cpu_segment"] == pytest.approx(found["cpu_predict"] + found["cpu_decode"])
