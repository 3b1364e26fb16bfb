"""What the tests cost: processor seconds of every test and file, printed at the end of a run.

A test costs the user and system time of its process, of the children that it waited for and of what the fork server
ran for it, fixtures included. `BUDGET=strict` fails the run where a file costs more than FILE_LIMIT;
`BUDGET_FILE=PATH` writes every cost there, as JSON.
"""

import json
import os
from collections import defaultdict

import pytest

FILE_LIMIT = 60.0  # processor seconds
SHOWN = 10

_START = pytest.StashKey[float]()
_foreign = 0.0  # processor seconds of processes that are no children of this one


def add_foreign(seconds: float) -> None:
    """Counts what a process cost that another one waited for."""
    global _foreign
    _foreign += seconds


def foreign() -> float:
    """Returns the processor seconds that were counted so."""
    return _foreign


def spent() -> float:
    """Returns the processor seconds of this process and of its ended children so far."""
    return sum(os.times()[:4]) + _foreign


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    item.stash[_START] = spent()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    try:
        return (yield)
    finally:
        item.user_properties.append(("processor_seconds", spent() - item.stash.get(_START, spent())))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["processor_seconds"] = spent()


class Costs:
    """Gathers the costs that reports carry, from this process or from the workers of pytest-xdist."""

    def __init__(self):
        self.tests: dict[str, float] = {}
        self.workers = 0.0

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":
            self.tests[report.nodeid] = dict(report.user_properties).get("processor_seconds", 0.0)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error):
        self.workers += (getattr(node, "workeroutput", None) or {}).get("processor_seconds", 0.0)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == 0 and os.environ.get("BUDGET") == "strict" and self.beyond():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def files(self) -> dict[str, float]:
        """Returns processor seconds by file."""
        files = defaultdict(float)
        for name, cost in self.tests.items():
            files[name.split("::")[0]] += cost
        return dict(files)

    def total(self) -> float:
        """Returns the processor seconds of the run, collection included."""
        return self.workers + sum(os.times()[:2]) if self.workers else spent()

    def beyond(self) -> list[str]:
        """Returns a line for every file that cost more than FILE_LIMIT."""
        return [
            f"over the budget: {name} cost {cost:.0f} processor seconds; {FILE_LIMIT:.0f} are allowed"
            for name, cost in sorted(self.files().items())
            if cost > FILE_LIMIT
        ]


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Costs(), "processor-costs")


def _dearest(costs: dict[str, float]) -> list[str]:
    ordered = sorted(costs.items(), key=lambda item: -item[1])[:SHOWN]
    return [f"{cost:7.1f}  {name}" for name, cost in ordered]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    costs = config.pluginmanager.get_plugin("processor-costs")
    if not costs.tests:
        return
    if len(costs.tests) > SHOWN:
        terminalreporter.section("processor seconds of the dearest tests and files")
        for line in [*_dearest(costs.tests), "", *_dearest(costs.files())]:
            terminalreporter.write_line(line)
    for line in costs.beyond():
        terminalreporter.write_line(line, red=True)
    terminalreporter.write_line(f"{costs.total() / 60:.2f} processor minutes")
    if path := os.environ.get("BUDGET_FILE"):
        with open(path, "w") as file:
            json.dump({"total": costs.total(), "tests": costs.tests}, file, indent=0)
