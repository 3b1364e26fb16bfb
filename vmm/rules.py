"""Ordered (regex, value) rules over parameter paths: the first full match counts, and a rule that matches nothing is an error."""

from collections.abc import Iterable, Sequence

import re2

from vmm.errors import UserError

_QUIET = re2.Options()
_QUIET.log_errors = False  # a bad pattern is our one line, not RE2's on stderr


def matcher(pattern: str, where: str):
    """Returns a compiled pattern whose `fullmatch` takes time linear in the path: a published config brings its own.

    where: config key of the rule, for error lines.

    Raises:
      UserError: it is no regular expression, or one that only backtracking can match.
    """
    if not isinstance(pattern, str):
        raise UserError(f"{where}: {pattern!r} is no regular expression; write it as a string")
    try:
        return re2.compile(pattern, _QUIET)
    except re2.error as error:
        why = error.args[0].decode(errors="replace") if error.args else "unknown"
        raise UserError(
            f"{where}: {pattern!r} is no regular expression of RE2, which has no look-around, no backreferences and no "
            f"repetition above 1000 ({why})"
        ) from None


def first_matches(
    rules: Sequence[tuple], paths: Iterable[str], where: str, examples: Sequence[str], whole: bool = False
) -> dict:
    """Returns path → the value of the first rule that matches all of it; paths that none matches are left out.

    where: config key of the rules, for error lines. examples: paths that they show. whole: whether every path must match.

    Raises:
      UserError: as `matcher`, a path that no rule matches where all must, or a rule that matches no path.
    """
    patterns = [(matcher(pattern, where), value) for pattern, value in rules]
    used, found = set(), {}
    for path in paths:
        for number, (pattern, value) in enumerate(patterns):
            if pattern.fullmatch(path):
                used.add(number)
                found.setdefault(path, value)
        if whole and path not in found:
            raise UserError(f'{where}: no rule matches the parameter {path}; end the list with (".*", value)')
    for number, (pattern, _) in enumerate(rules):
        if number not in used:
            raise UserError(f"{where}: {pattern!r} matches no parameter; paths look like {', '.join(examples)}")
    return found
