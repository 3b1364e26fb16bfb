"""What is due at a step, against a table; the time that a run has left."""

import pytest

from vmm.training import clock
from vmm.training.cadence import Cadence

CADENCE = Cadence(steps=12, log_every=2, save_every=5, eval_every=4, check_replicas=3, watch_every=6)
# step → letters of what is due: Log Read Save Evaluate Watch Compare
TABLE = {
    1: "", 2: "LR", 3: "C", 4: "LRE", 5: "RS", 6: "LRSWC", 7: "", 8: "LRE", 9: "C", 10: "LRS", 11: "", 12: "LRSWC",
}  # fmt: skip


def letters(due) -> str:
    return "".join(name[0].upper() for name, value in due._asdict().items() if value)


@pytest.mark.parametrize("step", TABLE)
def test_what_is_due(step: int):
    assert letters(CADENCE.due(step)) == TABLE[step]


@pytest.mark.parametrize(
    ("step", "given", "due"),
    [
        (1, dict(first=True), "R"),
        (7, dict(stopping=True), "RS"),
        (4, dict(stopping=True), "LRS"),  # the evaluation is made up by the attempt that goes on from here
        (6, dict(stopping=True), "LRSC"),
        (12, dict(stopping=True), "LRSWC"),
        (2, dict(skipped=True), "L"),
        (5, dict(skipped=True), "S"),
        (12, dict(skipped=True), "LSWC"),
        (5, dict(troubled=True), ""),  # what was read stays read
        (6, dict(troubled=True), "LRC"),
        (12, dict(troubled=True), "LRSWC"),
        (5, dict(troubled=True, stopping=True), "RS"),
    ],
)
def test_what_is_due_in_trouble(step: int, given: dict, due: str):
    assert letters(CADENCE.due(step, **given)) == due


def test_never_is_never():
    quiet = Cadence(steps=10, log_every=100, save_every=100)
    assert {letters(quiet.due(step)) for step in range(1, 10)} == {""}
    assert letters(quiet.due(10)) == "LRS"


def test_an_evaluation_that_was_cut_off_is_missed():
    assert [step for step in range(13) if CADENCE.missed(step, False)] == [4, 8]  # the last step has its own
    assert not any(CADENCE.missed(step, True) for step in range(13))


def test_time_left_is_of_the_last_laps(monkeypatch):
    """A run that becomes four times as slow says so within its last laps."""
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    told = clock.Clock(batch=4, flops=0)
    assert told.left(10) is None
    now[0] = 30.0
    told.lap(1)  # compiled
    assert told.left(10) is None
    for step in range(2, 102):
        now[0] += 1.0
        speed = told.lap(step)
    assert speed["clips_per_second"] == pytest.approx(4.0) and told.left(10) == pytest.approx(10.0)
    with told.waiting():
        now[0] += 2.0
    now[0] += 2.0
    assert told.lap(102)["input_wait"] == pytest.approx(0.5)
    for step in range(103, 123):
        now[0] += 4.0
        told.lap(step)
    assert told.left(10) == pytest.approx(40.0)
