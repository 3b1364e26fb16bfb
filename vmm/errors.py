"""Errors that a person can mend, each with the exit code that a launcher can read."""

_LONGEST_LINE = 4000  # characters


class UserError(Exception):
    """Something the user gave is wrong: the message is one line that says what, and how to mend it."""

    code = 2

    def __str__(self) -> str:
        # What is quoted may be a megabyte of somebody's file.
        text = super().__str__()
        return text if len(text) <= _LONGEST_LINE else f"{text[: _LONGEST_LINE // 2]} … {text[-_LONGEST_LINE // 2 :]}"


class DataBudgetError(UserError):
    """More files could not be decoded than the budget allows."""

    code = 3


class NumericError(UserError):
    """The loss is no longer finite."""

    code = 4


class StorageError(UserError):
    """A checkpoint or result could not be written; what was written before is whole."""

    code = 5


class CorruptionError(UserError):
    """Devices hold different bytes of one array: a memory or a chip is broken. The checkpoints before it are whole."""

    code = 7


class PeerError(UserError):
    """Another process of the job is not there, or is gone: to be started again, all together."""

    code = 1


class Preempted(Exception):
    """SIGTERM or Ctrl-C arrived: the state is saved and the same command resumes it."""

    code = 42


def one_of(name: object, known: object) -> str:
    """Returns the tail of an error line: the nearest known name, and all of them."""
    import difflib

    names = sorted(str(item) for item in known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(names) if names else 'none'}"
