"""Without a terminal a long command says every so often how far it is."""

import threading

import vmm.progress
from vmm.progress import line, progress


def test_words():
    assert line(0, None, "building from folder", 0.0, 0, 5.0) == "building from folder …"
    assert line(30, 100, "reading clips", 10.0, 10, 20.0) == "reading clips: 30 of 100, about 35 s left"
    assert (
        line(10, 100, "reading clips", 10.0, 10, 20.0) == "reading clips: 10 of 100"
    )  # what was done before is no pace
    assert line(100, 100, "reading clips", 10.0, 10, 20.0) == "reading clips: 100 of 100"


def test_lines_come_also_while_nothing_is_told(monkeypatch, capsys):
    monkeypatch.setattr(vmm.progress, "_EVERY", 0.05)
    with progress("starting") as tell:
        threading.Event().wait(0.2)
        tell(3, 9, "reading files")
        threading.Event().wait(0.2)
        tell(4, 9)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and "starting …" in lines and any(text.startswith("reading files: 3 of 9") for text in lines)


def test_names_in_brackets_are_no_markup(monkeypatch, capsys):
    """On a terminal: the bar of a file that is called so."""
    import rich.console

    monkeypatch.setattr(rich.console.Console, "is_terminal", property(lambda self: True))
    with progress("reading data[/red].jsonl") as tell:
        tell(1, 2)
    assert "data[/red].jsonl" in capsys.readouterr().err


def test_a_short_command_says_nothing(capsys):
    with progress("starting") as tell:
        tell(1, 2)
    assert capsys.readouterr() == ("", "")
