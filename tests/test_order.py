"""Which clip when: every dataset's epochs, a mixture's weights and the buckets' shares, from the step alone."""

import collections

import numpy as np
import pytest

from vmm.data.order import Order, Part, Shares, position_to_sample, split_buckets


def part(first: int, count: int, weight: float = 1.0) -> Part:
    return Part(np.arange(first, first + count), weight)


def walk(order: Order, steps: int) -> list:
    return [order(step, place) for step in range(steps) for place in range(order.batch)]


def test_one_dataset_is_its_own_shuffle():
    order = Order([[part(0, 7)]], 4, seed=3)
    got = [(place.epoch, place.row) for place in walk(order, 14)]
    assert got == [position_to_sample(position, 7, 3) for position in range(56)]
    for epoch in range(8):
        assert sorted(row for e, row in got if e == epoch) == list(range(7))


def test_a_mixture_holds_its_weights_exactly():
    order = Order([[part(0, 30, 0.7), part(30, 500, 0.2), part(530, 11, 0.1)]], 10, seed=0)
    rows = [place.row for place in walk(order, 1000)]  # one cycle of 10,000
    counts = [sum(low <= row < high for row in rows) for low, high in ((0, 30), (30, 530), (530, 541))]
    assert counts == [7000, 2000, 1000]
    # and nearly so in any short stretch, in no fixed pattern
    first = np.array([row < 30 for row in rows]).reshape(20, 500).mean(1)
    assert 0.6 < first.min() < first.max() < 0.8
    assert len(set(first)) > 5


def test_each_dataset_of_a_mixture_runs_through_its_epochs():
    order = Order([[part(0, 300, 3.0), part(300, 470, 1.0)]], 8, seed=5)
    for place in walk(order, 20):
        assert set(place.peers) == (set(range(300)) if place.row < 300 else set(range(300, 770)))
    # Places within a cycle are not taken in order, so epochs overlap; each still holds each row once.
    whole = Order([[part(0, 300, 3.0), part(300, 470, 1.0)]], 10, seed=5)
    seen = collections.defaultdict(list)
    for place in walk(whole, 1000):
        seen[place.row < 300, place.epoch].append(place.row)
    assert all(sorted(rows) == list(range(300)) for (first, epoch), rows in seen.items() if first and epoch < 25)
    assert all(
        sorted(rows) == list(range(300, 770)) for (first, epoch), rows in seen.items() if not first and epoch < 5
    )


def test_shares_number_each_part_without_gaps():
    shares = Shares([5, 1, 0.001], seed=2)
    numbers = collections.defaultdict(list)
    for number in range(20_000):
        part, place = shares(number)
        numbers[part].append(place)
    assert all(sorted(places) == list(range(len(places))) for places in numbers.values())
    assert [len(numbers[i]) for i in range(3)] == [16_664, 3_332, 4]  # 8331.9, 1666.4 and 1.7 of each 10,000


def test_many_parts_too_small_for_a_cycle_all_get_one():
    shares = Shares([1e9] + [1.0] * 50, seed=0)
    assert sum(shares.counts) == 10_000
    assert shares.counts[1:] == [1] * 50


def test_a_row_goes_to_the_longest_bucket_that_it_fills():
    lengths = [1.0, 2.0, 3.9, 4.0, 9.0, None, 1.9999]
    parts = [Part(np.array([0, 1, 2, 3]), 1.0), Part(np.array([4, 5, 6]), 3.0)]
    short, middle, long = split_buckets(lengths, parts, [1.0, 2.0, 4.0])
    assert [list(p.rows) for p in short] == [[0], [5]]
    assert [list(p.rows) for p in middle] == [[1, 2], [6]]
    assert [list(p.rows) for p in long] == [[3], [4]]
    assert [p.weight for p in (*short, *middle, *long)] == pytest.approx([0.25, 1, 0.5, 1, 0.25, 1])
    assert split_buckets(lengths, parts, [1.0, 100.0])[1] == []


def test_a_batch_is_of_one_bucket_and_buckets_get_their_share_of_steps():
    buckets = [[part(0, 6000)], [part(6000, 2000, 1 / 3)]]
    order = Order(buckets, 2, seed=1)
    steps = collections.Counter()
    for step in range(10_000):
        of_step = {order(step, place).bucket for place in range(2)}
        assert len(of_step) == 1
        steps[of_step.pop()] += 1
    assert steps == {0: 7500, 1: 2500}


def test_any_step_can_be_computed_alone():
    straight, backwards = (Order([[part(0, 9, 2.0), part(9, 5)], [part(14, 3)]], 6, seed=8) for _ in range(2))
    straight = [place[:3] for place in walk(straight, 30)]
    alone = {(step, place): backwards(step, place)[:3] for step in reversed(range(30)) for place in range(6)}
    assert [alone[step, place] for step in range(30) for place in range(6)] == straight
