"""Pages and tables show what data and names hold as text: a caption, a class or a file's name never acts."""

import json
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

import vmm.report as drawn
from vmm.ablate import _write
from vmm.ablation.tables import html_table, page
from vmm.data.inspection.show import show

EVIL = "<script>alert(1)</script><img src=x onerror='f()'> \"&amp;"
QUIET = EVIL.replace("/", "∕")  # as a file may be called


class Page(HTMLParser):
    """What a browser would make of a page: its tags, what they may run or fetch, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.wants, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.wants += [(key, value) for key, value in attrs if key.startswith("on") or key in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def _show(folder) -> str:
    """A dataset whose file, id, caption, label, class, reason and detail are hostile."""
    build = folder / QUIET
    build.mkdir()
    line = {"id": EVIL, "path": f"{QUIET}.mp4", "caption": EVIL, "labels": {EVIL: 0}}
    (build / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    (build / "classes.json").write_text(json.dumps({EVIL: [EVIL]}))
    (build / "quarantine.jsonl").write_text(json.dumps({"id": EVIL, "reason": EVIL, "detail": EVIL}) + "\n")
    show(build / "manifest.jsonl", folder / "page.html")
    return (folder / "page.html").read_text()


def _study(folder) -> str:
    """A study of a hostile name, score and variant."""
    row = dict(
        seed=0, config="c", data={EVIL: "d"}, commit="e", host="h", workdir=QUIET, tested={EVIL: EVIL}, parameters=1, flops=1e6, peak_bytes=1e6,
        step_seconds=1.0, values={EVIL: 0.5},
    )  # fmt: skip
    rows = [row | {"variant": name} for name in (EVIL, "plain")]
    study = dict(score=EVIL, scores=(), chance={}, seeds=(0,), variants={EVIL: (EVIL,), "plain": ()})
    _write(folder, EVIL, study, study["variants"], rows)
    return (folder / "table.html").read_text()


def _report_ablation(folder) -> str:
    (folder / QUIET).mkdir()
    (folder / QUIET / "table.json").write_text(json.dumps([{"variant": EVIL, EVIL: EVIL}]))
    return "".join(drawn._ablation(folder / QUIET))


def _report_numbers(folder) -> str:
    key = f"{EVIL.replace('/', '∕')}/{QUIET}"
    run = SimpleNamespace(experiment=SimpleNamespace(data=SimpleNamespace(labels={QUIET: 3})))
    return drawn._grid_table(run, "eval", {f"eval/{key}": 0.5, f"eval/{QUIET}": 2.0}, {})


def _report_robustness(folder) -> str:
    one = {"values": {f"{QUIET}/V/x": 0.5}, "intervals": {f"{QUIET}/V/x": [0.4, 0.6]}}
    return drawn._robustness({f"{QUIET}/{severity}": one for severity in (1, 2)}, {f"{QUIET}/V/x": 0.7})


def _report_calibration(folder) -> str:
    numbers = dict(accuracy=0.5, confidence=0.5, error=0.1, brier=0.2)
    bins = {"confidence": [0.5], "accuracy": [0.5]}
    return drawn._calibration({EVIL: {"values": numbers, "intervals": {k: [0, 1] for k in numbers}, "bins": bins}})


def _report_losses(folder) -> str:
    metrics = [{"step": step, "loss": 1.0, EVIL: 1.0, f"{EVIL}/video": 1.0} for step in (1, 2)]
    return drawn._losses(metrics, {EVIL: {}})


def _report_pictures(folder) -> str:
    return drawn._labelled(np.zeros((4, 4)), (EVIL, "plain"))


PAGES = {
    "data show": (_show, True), "study": (_study, True), "table": (lambda _: page(EVIL, [html_table([{EVIL: EVIL}])]), True),
    "report, ablation": (_report_ablation, True), "report, numbers": (_report_numbers, True),
    "report, robustness": (_report_robustness, True), "report, calibration": (_report_calibration, True),
    "report, losses": (_report_losses, False), "report, pictures": (_report_pictures, True),
}  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_nothing_that_is_shown_acts(name, tmp_path, capsys):
    """told: whether the page has the words as text; of a picture they are lines."""
    make, told = PAGES[name]
    text = make(tmp_path)
    seen = Page(text)
    assert "<script" not in text.lower() and "script" not in seen.tags
    assert all(key == "src" and value.startswith("data:") or value.startswith("#") for key, value in seen.wants)
    assert not told or EVIL in seen.text or QUIET in seen.text
