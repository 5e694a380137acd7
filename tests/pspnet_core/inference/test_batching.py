"""Groups of one size: whatever the order, complete, in order, bounded, and told by the sizes alone."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from pspnet_core.inference.batching import Window, by_size, one_ahead

MOST = {1: 4, 2: 3, 3: 1, 5: 2}
sequences = st.lists(st.sampled_from(sorted(MOST)), max_size=60)
windows = st.builds(lambda items, size: Window(items=items, bytes=size), st.integers(1, 20), st.integers(1, 40))


def _groups(sizes: list[int], window: Window, salt: str = "") -> list[list[tuple[int, str]]]:
    items = [(place, f"{size}{salt}") for place, size in enumerate(sizes)]
    return list(by_size(items, size=_size, most=MOST.__getitem__, cost=_size, window=window))


def _size(item: str) -> int:
    return int(item[0])


@given(sequences, windows)
def test_every_item_is_in_one_group_of_its_size(sizes: list[int], window: Window) -> None:
    groups = _groups(sizes, window)
    assert sorted(entry for group in groups for entry in group) == sorted(enumerate(map(str, sizes)))
    for group in groups:
        assert len({item for _, item in group}) == 1
        assert len(group) <= MOST[_size(group[0][1])]
        assert group == sorted(group)


@given(sequences, windows)
def test_groups_follow_from_the_sizes_alone(sizes: list[int], window: Window) -> None:
    places = [[place for place, _ in group] for group in _groups(sizes, window)]
    assert places == [[place for place, _ in group] for group in _groups(sizes, window, salt=" other")]


@given(sequences, windows)
def test_what_a_caller_holds_who_answers_in_order_is_bounded(sizes: list[int], window: Window) -> None:
    taken = 0

    def watched() -> Iterator[tuple[int, str]]:
        nonlocal taken
        for place, size in enumerate(sizes):
            taken += 1
            yield place, str(size)

    answered: set[int] = set()
    for group in by_size(watched(), size=_size, most=MOST.__getitem__, cost=_size, window=window):
        oldest = next(place for place in range(taken) if place not in answered)
        held = sizes[oldest:taken]
        alike = len(set(held)) == 1
        assert len(held) <= window.items
        # One item may go beyond the bytes: it was taken before its size was known.
        assert alike or sum(held[:-1]) < window.bytes or len(set(held[:-1])) == 1
        answered |= {place for place, _ in group}
    assert answered == set(range(len(sizes)))


def test_images_of_one_size_fill_their_batch_whatever_it_takes() -> None:
    window = Window(items=20, bytes=10)
    groups = list(by_size(enumerate("aaaaa"), size=str, most=lambda _: 4, cost=lambda _: 1000, window=window))
    assert [len(group) for group in groups] == [4, 1]


@given(st.lists(st.integers(), max_size=10))
def test_one_ahead_is_taken_and_no_more(items: list[int]) -> None:
    taken: list[int] = []

    def take() -> Iterator[int]:
        for item in items:
            taken.append(item)
            yield item

    for count, item in enumerate(one_ahead(take()), start=1):
        assert item == items[count - 1]
        assert taken == items[: count + 1]
    assert taken == items
