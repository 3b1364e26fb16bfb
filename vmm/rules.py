"""Ordered (regex, value) rules over parameter paths: the first full match counts, and a rule that matches nothing is an error."""

import re
from collections.abc import Iterable, Sequence

from vmm.errors import UserError


def first_matches(
    rules: Sequence[tuple], paths: Iterable[str], where: str, examples: Sequence[str], whole: bool = False
) -> dict:
    """Returns path → the value of the first rule that matches all of it; paths that none matches are left out.

    where: config key of the rules, for error lines. examples: paths that they show. whole: whether every path must match.

    Raises:
      UserError: a bad regex, a path that no rule matches where all must, or a rule that matches no path.
    """
    patterns = []
    for pattern, value in rules:
        try:
            patterns.append((re.compile(pattern), value))
        except re.error as error:
            raise UserError(f"{where}: {pattern!r} is no regular expression ({error})") from None
    used, found = set(), {}
    for path in paths:
        for number, (pattern, value) in enumerate(patterns):
            if pattern.fullmatch(path):
                used.add(number)
                found.setdefault(path, value)
        if whole and path not in found:
            raise UserError(f'{where}: no rule matches the parameter {path}; end the list with (".*", value)')
    for number, (pattern, _) in enumerate(patterns):
        if number not in used:
            raise UserError(f"{where}: {pattern.pattern!r} matches no parameter; paths look like {', '.join(examples)}")
    return found
