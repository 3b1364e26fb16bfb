"""Which tests run: the small suite (`make test`), and with `--exhaustive` those that say why they are not in it.

`@pytest.mark.exhaustive("reason")` leaves a test to `make test-all`. `covering` makes a table of cases of which the
small suite runs as many as it takes to see every value once.
"""

import itertools
from collections.abc import Iterable

import pytest


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="also the tests that `make test-all` alone runs")


def pytest_configure(config):
    config.addinivalue_line("markers", "exhaustive(reason): runs in `make test-all` alone")


def pytest_collection_modifyitems(config, items):
    kept, left = [], []
    for item in items:
        marker = item.get_closest_marker("exhaustive")
        if marker and not (marker.args and isinstance(marker.args[0], str)):
            raise pytest.UsageError(
                f'{item.nodeid}: give a reason, as @pytest.mark.exhaustive("transformers at run time")'
            )
        (left if marker and not config.getoption("--exhaustive") else kept).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def covering(*axes: Iterable, ids=str) -> list:
    """Returns the product of the axes as cases; the small suite runs a part in which every value of each axis occurs.

    Case i of that part is the i-th value of every axis, where a shorter axis begins again: of axes of m and n values,
    max(m, n) of m × n. The others are exhaustive.

    Args:
      ids: value → its name in a case's name.
    """
    axes = [list(axis) for axis in axes]
    lengths = [len(axis) for axis in axes]
    small = {tuple(i % length for length in lengths) for i in range(max(lengths))}
    cases = []
    for places in itertools.product(*map(range, lengths)):
        values = [axis[place] for axis, place in zip(axes, places)]
        marks = () if places in small else pytest.mark.exhaustive("the rest of a product of cases")
        cases.append(pytest.param(*values, marks=marks, id="-".join(map(ids, values))))
    return cases


def first(cases: Iterable, count: int = 1, ids=str) -> list:
    """Returns cases of one argument, or of several in tuples, of which the small suite runs the first ones alone."""
    marked = []
    for number, case in enumerate(cases):
        marks = () if number < count else pytest.mark.exhaustive("more cases of the same kind")
        values = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*values, marks=marks, id=ids(case)))
    return marked
