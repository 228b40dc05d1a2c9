r"""PEFT's name patterns, matched in bounded time whatever the pattern.

PEFT gives a layer the value of the first pattern with `re.match(rf"(.*\.)?({pattern})$", name)`.
Python's `re` tries one way to match after the other, and their number can grow exponentially with
the name. Here all ways are followed at once: the set of positions that they have reached, one bit
for each, goes through the parsed expression.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from itertools import accumulate
from operator import or_
from typing import Any

try:  # the parser behind `re`, so that what it takes is taken here
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as parser

from .files import quoted

_LONGEST, _DEEPEST = 1000, 100  # characters of a pattern, and parentheses within another
_STEPS = 1_000_000  # of all patterns over all names: a few seconds
_PER_STEP = 16  # comparisons with a plain name, about as long as one step

_PLAIN = re.compile(r"[\w.-]+")  # as PEFT's users write a name: a dot is any character
_ESCAPED = re.compile(r"\^?((?:[\w-]|\\[.-])+)")  # as save_peft_adapter writes it


class Patterns:
    """The patterns of a PEFT configuration, and the value that they give a layer.

    Args:
        values: patterns, in the order in which they are tried, and their values.

    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._names = {pattern: _as_name(pattern) for pattern in values}
        self._expressions: dict[str, Any] = {}
        self._steps = _STEPS

    def value_for(self, name: str, default: Any) -> Any:
        """Return the value of the first pattern that PEFT finds for `name`, or `default`.

        Raises:
            ValueError: a pattern that is no regular expression or too long, or one with references
                to groups, atomic groups, possessive repeats or flags; or all take too long.

        """
        self._spend(1 + len(self._values) // _PER_STEP)
        text = _Text(name)
        for pattern, value in self._values.items():
            try:
                if self._matches(pattern, text):
                    return value
            except (ValueError, RecursionError, OverflowError, re.error) as error:
                why = "nested too deep" if isinstance(error, RecursionError) else error
                raise ValueError(f"{quoted(pattern)}: {quoted(str(why))}") from None
        return self._values.get(name, default)

    def _matches(self, pattern: str, text: "_Text") -> bool:
        name, plain = text.name, self._names[pattern]
        if plain is not None and "\n" not in name:  # before which a $ matches too
            literal, whole, any_dots = plain
            if len(literal) > len(name):
                return False
            if name == literal or (not whole and name.endswith(f".{literal}")):
                return True
            return any_dots and _is_end(literal, name)
        if pattern not in self._expressions:
            if len(pattern) > _LONGEST:
                raise ValueError(f"{len(pattern)} characters, at most {_LONGEST} are read")
            if _depth(pattern) > _DEEPEST:
                raise RecursionError  # as the parser does, at a limit that a program may set
            self._spend(len(pattern))
            self._expressions[pattern] = parser.parse(rf"(.*\.)?({pattern})$")
        return self._follow(self._expressions[pattern], 1, text) != 0

    def _spend(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise ValueError("the patterns take too long to match")

    def _follow(self, nodes: Any, at: int, text: "_Text") -> int:
        """Return where `nodes`, one after the other, can end if they start at any of `at`."""
        for op, argument in nodes:
            if not at:
                break
            self._spend(1)
            at = self._follow_one(op.name, argument, at, text)
        return at

    def _follow_one(self, op: str, argument: Any, at: int, text: "_Text") -> int:
        if op in _CHARACTERS:
            return (at & text.places(op, argument)) << 1
        if op == "AT":
            return at & text.anchors(argument.name)
        if op == "BRANCH":
            return _union(self._follow(branch, at, text) for branch in argument[1])
        if op == "SUBPATTERN" and not argument[1] and not argument[2]:  # flags on and off
            return self._follow(argument[3], at, text)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):  # greedy or not, the same names match
            least, most, nodes = argument
            return self._repeat(least, most, nodes, at, text)
        if op in ("ASSERT", "ASSERT_NOT"):
            direction, nodes = argument
            holds = self._look(direction, nodes, at, text)
            return at & (holds if op == "ASSERT" else ~holds)
        raise ValueError(f"{op.lower()} is not supported, nor are flags")

    def _repeat(self, least: int, most: int, nodes: Any, at: int, text: "_Text") -> int:
        """Return where `nodes` can end after `least` to `most` times."""
        op, argument = nodes[0] if len(nodes) == 1 else (None, None)
        if least == 0 and most == parser.MAXREPEAT and op and op.name in _CHARACTERS:  # as in .*
            mask = text.places(op.name, argument)
            # Adding carries each position to the end of the run of ones that it stands in.
            return (((at & mask) + mask) ^ mask) | at
        # Of more repetitions than there are characters some are empty, and an empty one can be
        # repeated or left out: so they reach what one repetition more than characters reaches.
        enough = len(text.name) + 1
        reached = at if least == 0 else 0
        for count in range(1, min(most, enough) + 1):
            before, at = at, self._follow(nodes, at, text)
            if count >= min(least, enough) or at == before:
                reached |= at
            if not at or at == before:
                break
        return reached

    def _look(self, direction: int, nodes: Any, at: int, text: "_Text") -> int:
        """Return those positions of `at` that have `nodes` ahead (1) or behind them (-1)."""
        width, longest = nodes.getwidth()
        if direction < 0 and width != longest:
            raise ValueError("look-behind requires fixed-width pattern")
        holds = 0
        for place in _bits(at):
            start = place - width if direction < 0 else place
            ends = self._follow(nodes, 1 << start, text) if start >= 0 else 0
            if ends >> place & 1 if direction < 0 else ends:
                holds |= 1 << place
        return holds


class _Text:
    """A layer's name: where in it a character or an anchor matches, one bit for each position."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._places: dict[tuple[str, str], int] = {}

    def places(self, op: str, argument: Any) -> int:
        """Return the positions of the characters that one of `_CHARACTERS` takes."""
        key = (op, str(argument))
        if key not in self._places:
            takes = _CHARACTERS[op]
            self._places[key] = _union(
                1 << i for i, character in enumerate(self.name) if takes(argument, character)
            )
        return self._places[key]

    def anchors(self, kind: str) -> int:
        r"""Return the positions of ^, $, \A, \Z, \b or \B."""
        end = 1 << len(self.name)
        if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return 1
        if kind == "AT_END_STRING":
            return end
        if kind == "AT_END":
            return end | end >> 1 if self.name.endswith("\n") else end
        words = _union(1 << i for i, c in enumerate(self.name) if re.match(r"\w", c))
        boundaries = words ^ words << 1
        return boundaries if kind == "AT_BOUNDARY" else (2 * end - 1) & ~boundaries


def _as_name(pattern: str) -> tuple[str, bool, bool] | None:
    """Return a pattern that is a layer's name, whether it is the whole one, and if dots are any."""
    if escaped := _ESCAPED.fullmatch(pattern):
        return escaped[1].replace("\\", ""), pattern[0] == "^", False
    return (pattern, False, True) if _PLAIN.fullmatch(pattern) else None


def _depth(pattern: str) -> int:
    return max(accumulate((c == "(") - (c == ")") for c in pattern), default=0)


def _is_end(pattern: str, name: str) -> bool:
    """Whether a name is, or ends after a dot in, a pattern of plain characters and any (dots)."""
    start = len(name) - len(pattern)
    if start < 0 or (start and name[start - 1] != "."):
        return False
    return all(p in (".", c) for p, c in zip(pattern, name[start:], strict=True))


def _in_set(items: Any, character: str) -> bool:
    r"""Whether a set such as [^a-z\d_] takes a character."""
    negated = items[0][0].name == "NEGATE"
    return negated != any(_is_item(op.name, value, character) for op, value in items[negated:])


def _is_item(op: str, value: Any, character: str) -> bool:
    if op == "LITERAL":
        return ord(character) == value
    if op == "RANGE":
        return value[0] <= ord(character) <= value[1]
    return re.match(_CATEGORIES[value.name], character) is not None


_CATEGORIES = {
    f"CATEGORY_{prefix}{name}": rf"\{letter}"
    for name, letters in {"DIGIT": "dD", "SPACE": "sS", "WORD": "wW"}.items()
    for prefix, letter in zip(("", "NOT_"), letters, strict=True)
}
_CHARACTERS = {
    "LITERAL": lambda code, character: ord(character) == code,
    "NOT_LITERAL": lambda code, character: ord(character) != code,
    "ANY": lambda _, character: character != "\n",
    "IN": _in_set,
}


def _union(sets: Iterable[int]) -> int:
    return reduce(or_, sets, 0)


def _bits(positions: int) -> Iterator[int]:
    while positions:
        yield positions.bit_length() - 1
        positions ^= 1 << positions.bit_length() - 1
