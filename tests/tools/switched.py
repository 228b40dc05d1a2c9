"""Many faults in one C++ file, each behind a switch: one compilation serves all of them.

A fault changes a piece of a statement. The statement, or in a declaration and a condition the
expression, is written once for each fault in it and once without one:

    a = b + c;    ->    if (lora_ext_fault(7)) { a = b - c; } else { a = b + c; }
    f(T x = b);   ->    f(T x = (lora_ext_fault(8) ? (c) : (b)));

The environment variable LORA_EXT_FAULT names the one that is on, and `lora_ext_reached` has a byte
for each that ran, on or off. The pieces are found by brackets
and semicolons; what is no C++ after that, the compiler refuses.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MOST_FAULTS = 4096
HEADER = f"""#include <cstdlib>
extern "C" {{
inline unsigned char lora_ext_reached[{MOST_FAULTS}];
}}
inline bool lora_ext_fault(int number) {{
  static const char* const named = std::getenv("LORA_EXT_FAULT");
  static const int on = named == nullptr ? 0 : std::atoi(named);
  unsigned char* const to = &lora_ext_reached[number];  // which several threads reach
  if (__atomic_load_n(to, __ATOMIC_RELAXED) == 0) __atomic_store_n(to, 1, __ATOMIC_RELAXED);
  return on == number;
}}
"""
OPEN, CLOSE = "([{", ")]}"
HIDDEN = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'", re.DOTALL)
TEMPLATE = re.compile(r"(?<=\w)<[\w:,\s*&/+-]+>")
CONTROL = re.compile(r"\s*(?:else\b|(?:if|for|while)\s*(?=\())")
NO_TYPE = "return|throw|delete|else|goto|case"
DECLARATION = re.compile(
    rf"\s*(?:(?:static|const|constexpr|using|auto|typename)\b|(?!{NO_TYPE})[\w:]+[\s*&]+\w+\s*[=({{\[;])"
)
BEFORE_A_BLOCK = re.compile(
    r"(?:[){};:]|^|\b(?:else|do|try|const|override|noexcept)"
    r"|\b(?:struct|class|namespace|enum|union)\b[^;{}]*)\s*$"
)
ASSIGNED = re.compile(r"(?<![=!<>])=(?!=)")


@dataclass(frozen=True)
class Change:
    """A piece of a text and what it becomes; `number` switches it on."""

    start: int
    end: int
    new: str
    number: int


def smallest(text: str, start: int, end: int, new: str, number: int) -> Change:
    """Return a change without the tokens at its ends that it leaves as they are."""
    old, code = text[start:end], re.compile(r"[\w.]+|\s+|[()\[\]{};,]|[^\w\s.()\[\]{};,]+")
    olds, news = code.findall(old), code.findall(new)
    first = 0
    while first < min(len(olds), len(news)) and olds[first] == news[first]:
        first += 1
    last = 0
    while last < min(len(olds), len(news)) - first and olds[-1 - last] == news[-1 - last]:
        last += 1
    kept = ((f, k) for f in range(first, -1, -1) for k in range(last, -1, -1))
    for before, after in sorted(kept, key=sum, reverse=True):
        parts = ["".join(tokens[before : len(tokens) - after]) for tokens in (olds, news)]
        if all(map(is_balanced, parts)):
            begin = start + len("".join(olds[:before]))
            return Change(begin, begin + len(parts[0]), parts[1], number)
    return Change(start, end, new, number)


def is_balanced(piece: str) -> bool:
    """Whether each bracket of a piece has its other one in it."""
    depths = itertools.accumulate((c in OPEN) - (c in CLOSE) for c in piece)
    return min([*depths, 0]) == 0 and sum((c in OPEN) - (c in CLOSE) for c in piece) == 0


def blanked(text: str) -> str:
    """Return a text of the same length without comments, strings and template arguments."""
    text = HIDDEN.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    text = re.sub(r"^[ \t]*#.*$", lambda m: " " * len(m[0]), text, flags=re.MULTILINE)
    return TEMPLATE.sub(lambda m: "_" * len(m[0]), text)


def matches_of(code: str) -> dict[int, int]:
    """Return the bracket that belongs to each one, both ways."""
    found: dict[int, int] = {}
    opened: list[int] = []
    for at, c in enumerate(code):
        if c in OPEN:
            opened.append(at)
        elif c in CLOSE and opened:
            found[at] = opened.pop()
            found[found[at]] = at
    return found


class Text:
    """A C++ file in which faults look for the piece that they are in."""

    def __init__(self, text: str) -> None:
        self.text, self.code = text, blanked(text)
        self.match = matches_of(self.code)

    def is_block(self, at: int) -> bool:
        """Whether a brace opens or closes a block, and no list of values."""
        at = min(at, self.match[at])
        return BEFORE_A_BLOCK.search(self.code[max(0, at - 120) : at]) is not None

    def is_scope(self, at: int) -> bool:
        """Whether a character is one of the two of `::`."""
        return self.code[at] == ":" and ":" in (self.code[at - 1], self.code[at + 1])

    def left(self, at: int, stop: str) -> int:
        """Return where the piece begins that ends at `at`: after an open bracket or a stop."""
        while at > 0:
            c = self.code[at - 1]
            if c in CLOSE:
                if c == "}" and self.is_block(at - 1):
                    return at
                at = self.match[at - 1]
            elif c in OPEN or (c in stop and not self.is_scope(at - 1)):
                return at
            else:
                at -= 1
        return at

    def right(self, at: int, stop: str) -> int:
        """Return where the piece ends that begins before `at`."""
        while at < len(self.code):
            c = self.code[at]
            if c in OPEN:
                if c == "{" and self.is_block(at) and ";" in stop and "," not in stop:
                    return at
                at = self.match[at] + 1
            elif c in CLOSE or (c in stop and not self.is_scope(at)):
                return at
            else:
                at += 1
        return at

    def statement(self, change: Change) -> tuple[int, int] | None:
        """Return the statement around a change; None in a condition or a declaration."""
        start, end = change.start, change.end
        while (opener := self.left(start, "")) > 0 and self.code[opener - 1] in OPEN:
            opener -= 1
            if self.code[opener] == "{" and self.is_block(opener):
                break
            if re.search(r"\b(?:if|for|while|switch|constexpr)\s*$", self.code[:opener][-40:]):
                return None
            start, end = opener, max(end, self.match[opener] + 1)
        start = self.left(start, ";")
        end = self.right(end - (self.code[end - 1] == ";"), ";") + 1
        if self.code[end - 1] != ";":
            return None
        while control := CONTROL.match(self.code, start, end):
            after = control.end()
            if self.code[after] == "(":
                after = self.match[after] + 1
            if after > change.start:
                break
            start = after
        if DECLARATION.match(self.code, start, end):
            return None
        return start, end

    def expression(self, change: Change) -> tuple[int, int]:
        """Return the expression around a change: up to a comma, an assignment or a bracket."""
        choice = re.search(r"(?<!:):(?!:)", self.code[change.start : change.end])
        stop = ",;" if choice else ",;?:"
        start, end = self.left(change.start, stop), self.right(change.end, stop)
        if self.right(change.start, ",") < change.end:  # arguments swapped: their call
            opener = self.left(start, "") - 1
            start, end = self.left(opener, stop), self.right(self.match[opener] + 1, stop)
        assigned = [m.end() for m in ASSIGNED.finditer(self.code, start, change.start)]
        start = max([start, *assigned])
        if returned := re.match(r"\s*return\b", self.code[start : change.start]):
            start += returned.end()
        return start, end


def switched(text: str, changes: list[Change]) -> str:
    """Return a C++ file with every change in it, each behind its number."""
    file = Text(text)
    pieces: list[tuple[int, int, bool, list[Change]]] = []
    for change in changes:
        found = file.statement(change)
        start, end = found or file.expression(change)
        pieces.append((start, end, found is not None, [change]))
    merged: list[tuple[int, int, bool, list[Change]]] = []
    for start, end, whole, held in sorted(pieces, key=lambda p: (p[0], -p[1])):
        if merged and start < merged[-1][1]:  # within the one before
            merged[-1][3].extend(held)
        else:
            merged.append((start, end, whole, list(held)))
    for start, end, whole, held in reversed(merged):
        text = text[:start] + _choice(text[start:end], start, whole, held) + text[end:]
    return text


def _choice(old: str, offset: int, whole: bool, changes: list[Change]) -> str:
    """Return a piece with each change of it to choose from. Lines stay where they were."""
    result = f"{{ {old} }}" if whole else f"({old})"
    for change in changes:
        new = old[: change.start - offset] + change.new + old[change.end - offset :]
        new = re.sub(r"//[^\n]*", "", new).replace("\n", " ")
        on = f"lora_ext_fault({change.number})"
        result = f"if ({on}) {{ {new} }} else {result}" if whole else f"({on} ? ({new}) : {result})"
    return f" {result}"


def switch_all(folder: Path, faults: Iterable[tuple[str, str, str]]) -> None:
    """Put faults (file, a piece that it has once, what that becomes) into files, by number."""
    changes: dict[str, list[Change]] = {}
    for number, (file, old, new) in enumerate(faults, 1):
        text = (folder / file).read_text()
        assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times: fix the test"
        start = text.index(old)
        change = smallest(text, start, start + len(old), new, number)
        changes.setdefault(file, []).append(change)
    for file, held in changes.items():
        (folder / file).write_text(switched((folder / file).read_text(), held))
