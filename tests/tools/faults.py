"""Faults made by rule in Python and C++: other operators, bounds, strides and arguments."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One change of one file."""

    path: str
    start: int
    end: int
    new: str
    line: int

    def apply(self, text: str) -> str:
        """Return the file with the fault in it."""
        return text[: self.start] + self.new + text[self.end :]


def lines_of(text: str, fault: Fault) -> range:
    """Return the lines of a fault's statement in Python, down to the fault's own."""
    first = fault.line
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and node.lineno <= fault.line <= (node.end_lineno or 0):
            first = node.lineno  # ast.walk comes to the innermost last
    return range(first, fault.line + 1)


COMPARE = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
COMPARE |= {"is": "is not", "is not": "is", "in": "not in", "not in": "in"}
BINARY = {"+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "//", "&": "|", "|": "&"}
BINARY |= {"<<": ">>", ">>": "<<", "@": "*"}


def faults_in_python(path: str, text: str) -> Iterator[Fault]:
    """Yield other operators and bounds, conditions turned round, arguments swapped or left out."""
    lines = [0]
    for line in text.splitlines(keepends=True):
        lines.append(lines[-1] + len(line.encode()))
    data = text.encode()

    def place(node: ast.AST, end: bool = False) -> int:
        row, column = (
            (node.end_lineno, node.end_col_offset) if end else (node.lineno, node.col_offset)
        )
        return len(data[: lines[row - 1] + column].decode())

    def fault(start: int, end: int, new: str) -> Fault:
        return Fault(path, start, end, new, text.count("\n", 0, start) + 1)

    def between(left: ast.AST, right: ast.AST, table: dict[str, str]) -> Iterator[Fault]:
        start, end = place(left, end=True), place(right)
        for old in sorted(table, key=len, reverse=True):
            found = re.search(rf"(?<![<>=!/*]){re.escape(old)}(?![<>=/*])", text[start:end])
            if found and not text[start:end].strip(f"() \\\n{old}"):
                yield fault(start + found.start(), start + found.end(), table[old])
                return

    tree = ast.parse(text)
    typed = [n.annotation for n in ast.walk(tree) if isinstance(n, (ast.arg, ast.AnnAssign))]
    typed += [n.returns for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    types = {n for annotation in typed if annotation is not None for n in ast.walk(annotation)}
    for node in ast.walk(tree):
        if node in types:
            continue
        match node:
            case ast.Compare(left=left, comparators=[right]):
                yield from between(left, right, COMPARE)
            case ast.BinOp(left=left, right=right):
                yield from between(left, right, BINARY)
            case ast.BoolOp(values=[left, right, *_]):
                yield from between(left, right, {"and": "or", "or": "and"})
            case ast.If(test=test) | ast.IfExp(test=test):
                start, end = place(test), place(test, end=True)
                yield fault(start, end, f"(not ({text[start:end]}))")
            case ast.Constant(value=int(value)) if not isinstance(value, bool) and value < 100:
                yield fault(place(node), place(node, end=True), f"({value + 1})")
            case ast.Call(args=[first, second, *_]) if not isinstance(first, ast.Starred):
                a, b = (text[place(n) : place(n, end=True)] for n in (first, second))
                middle = text[place(first, end=True) : place(second)]
                if a != b and not isinstance(second, ast.Starred):
                    yield fault(place(first), place(second, end=True), f"{b}{middle}{a}")
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "mask":  # a load or a store past the end
                    yield fault(place(keyword), place(keyword, end=True), "mask=None")


CPP_RULES = {  # in code, not in comments or preprocessor lines
    r" < ": " <= ",
    r" <= ": " < ",
    r" \+ ": " - ",
    r" - ": " + ",
    r" == ": " != ",
    r" && ": " || ",
    r"std::min": "std::max",
    r"std::max": "std::min",
    r"\+= ": "= ",
    r" \* (?=\w*(?:stride|ld|row))": " + ",
    r"\(!": "(",
    r"(?<=[ (\[{])0(?=[;,)\]}])": "1",
    r"(\w+), (\w+)(?=[,)])": r"\2, \1",
}


def faults_in_cpp(path: str, text: str) -> Iterator[Fault]:
    """Yield other operators, bounds and strides, and arguments swapped."""
    at = 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        code = line.split("//")[0]
        if not code.lstrip().startswith(("#", "template", "using", "static_assert", "*")):
            for old, new in CPP_RULES.items():
                for found in re.finditer(old, code):
                    changed = found.expand(new)
                    if changed != found[0]:
                        yield Fault(path, at + found.start(), at + found.end(), changed, number)
        at += len(line)
