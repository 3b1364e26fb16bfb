"""JSON that others wrote, read in one place: whatever it holds, it is a value or one line of what is wrong."""

import json
import re

_DEEPEST = 100  # groups in groups; ours go to 10, and what walks them may recurse
_LARGEST = 1 << 63
_ESCAPED = re.compile(r"\\u[dD][89abABcdefCDEF]")


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -_LARGEST <= int(digits) < _LARGEST:
        raise ValueError(f"a number of {len(digits.lstrip('-'))} digits, beyond 64 bits")
    return int(digits)


def parse_json(text: str, halves: bool = False):
    """Returns the value of a JSON text. halves: lets half of a surrogate pair through, for who replaces it.

    Raises:
      ValueError: it is no JSON, is nested more than 100 deep, or holds a whole number beyond 64 bits or half of a
        surrogate pair, which no file and no terminal can be given.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"nested more than {_DEEPEST} deep") from None
    if text.count("[") + text.count("{") > _DEEPEST and _depth(value) > _DEEPEST:
        raise ValueError(f"nested more than {_DEEPEST} deep")
    if not halves and _ESCAPED.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("text with half of a surrogate pair (\\ud800 to \\udfff)") from None
    return value


def _depth(value) -> int:
    deepest, waiting = 0, [(value, 1)]
    while waiting and deepest <= _DEEPEST:
        one, depth = waiting.pop()
        if isinstance(one, (dict, list)):
            deepest = max(deepest, depth)
            waiting.extend((item, depth + 1) for item in (one.values() if isinstance(one, dict) else one))
    return deepest
