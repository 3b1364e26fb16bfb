"""Regexes that a tokenizer.json brings: those whose matching may need exponential time are refused before they are compiled.

The tokenizers library matches them by backtracking. RE2 would be linear, but lacks the look-around of published ones (that of
GPT-2 ends in `\\s+(?!\\S)`).
"""

import re
import warnings
from collections.abc import Iterator
from re import _constants as codes
from re import _parser as parser

_FEW = 3  # repetitions within which what is repeated may itself be of any length
_MOST = 10_000  # copies of a part that counted repetitions make, in the compiled program
_PROPERTY = re.compile(r"\\[pP]\{[^{}]*\}")
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)


def patterns_of(value) -> Iterator[str]:
    """Yields every {"Regex": pattern} in a part of a tokenizer.json."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if isinstance(one.get("Regex"), str):
                yield one["Regex"]
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def check_pattern(pattern: str) -> None:
    """Raises ValueError: a regex that may be matched in exponentially many ways, or cannot be read.

    Refused are a repetition whose body is of variable length, as (a+)+ and (a*b?)*; one whose body has alternatives that do not
    all begin with letters of their own, as (a|a)* and (a|ab)*; backreferences; and what Python's parser does not read.
    Not detected is what needs time of a power of the text's length, as a*a*a*b.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sets in sets, which mean more to the tokenizers library
            tree = parser.parse(_PROPERTY.sub(r"\\w", pattern))  # \p{L}: any class of letters
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"its regex {_short(pattern)} cannot be read ({error})") from None
    why = _trouble(tree, 1, 1)
    if why:
        raise ValueError(f"its regex {_short(pattern)} {why}; matching it may never end")


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else f"{pattern[:80]}…")


def _trouble(part, times: int, copies: int) -> str:
    """Returns what is wrong with a part of a regex, "" for nothing. times: it may be repeated; copies: of it in the program."""
    for code, about in part:
        bodies, again, more = [], times, copies
        if code in _REPEATS:
            least, most, body = about
            if times > _FEW and least != most:
                return "repeats what is itself repeated"
            again, more = times * int(most), copies * (int(least) if most == codes.MAXREPEAT else int(most))
            bodies = [body]
        elif code is codes.BRANCH:
            bodies = about[1]
            if times > _FEW and not _apart(bodies):
                return "repeats alternatives that may begin alike"
        elif code is codes.SUBPATTERN:
            bodies = [about[-1]]
        elif code in (codes.ASSERT, codes.ASSERT_NOT):
            bodies = [about[1]]
        elif code is codes.ATOMIC_GROUP:
            bodies = [about]
        elif code in (codes.GROUPREF, codes.GROUPREF_EXISTS):
            return "refers back to a group"
        if more > _MOST:
            return f"asks for more than {_MOST} copies of a part"
        for body in bodies:
            if why := _trouble(body, again, more):
                return why
    return ""


def _apart(branches) -> bool:
    """Whether each branch begins with a letter that no other begins with."""
    firsts = [chr(branch[0][1]).lower() if len(branch) and branch[0][0] is codes.LITERAL else "" for branch in branches]
    return all(firsts) and len(set(firsts)) == len(firsts)
