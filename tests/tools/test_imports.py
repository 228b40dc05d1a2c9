"""Which module imports which: nowhere in a circle, and the layers only downwards."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("lora_ext", "benchmarks", "tests")


def modules_of(root: Path, packages: tuple[str, ...]) -> dict[str, Path]:
    """Return {dotted name: file} of the modules in some packages."""
    found = {}
    for path in (path for package in packages for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Return what runs when a module is imported: no function's body, nothing for types alone."""
    found = []
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            body = node.orelse
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        else:
            found.append(node)
            body = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            body += [s for h in getattr(node, "handlers", ()) for s in h.body]
        found += statements(body)
    return found


def imports(modules: dict[str, Path], *, lazy: bool = False) -> dict[str, set[str]]:
    """Return {module: those of `modules` that it imports}, with `lazy` inside functions too."""
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        tree = ast.parse(path.read_text())
        used: set[str] = set()
        for node in ast.walk(tree) if lazy else statements(tree.body):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*(above if node.level else ()), *filter(None, [node.module])])
                # Of a package its submodules: what else is taken from it is its __init__'s.
                taken = {f"{base}.{alias.name}" for alias in node.names}
                used |= taken & modules.keys() or {base}
                used |= {base} if taken - modules.keys() else set()
        graph[name] = {other for other in used if other in modules} - {name}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Return modules that import each other in a circle, the first one again at the end."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph[name]):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(graph) if (found := visit(name, []))), None)


@pytest.mark.parametrize("lazy", [False, True], ids=["at import", "inside functions too"])
def test_no_module_imports_itself_in_a_circle(lazy):
    graph = imports(modules_of(ROOT, PACKAGES), lazy=lazy)
    assert len(graph) > 100 and sum(map(len, graph.values())) > 200
    assert circle(graph) is None


def test_the_library_imports_neither_benchmarks_nor_tests():
    graph = imports(modules_of(ROOT, PACKAGES), lazy=True)
    for name, used in graph.items():
        own = name.partition(".")[0]
        allowed = {"lora_ext": ("lora_ext",), "benchmarks": ("lora_ext", "benchmarks")}
        wrong = [other for other in used if other.split(".")[0] not in allowed.get(own, PACKAGES)]
        assert not wrong, f"{name} imports {wrong}"


def test_a_circle_is_found(tmp_path):
    files = {
        "__init__": "",
        "a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .c import z\n",
        "b": "from . import a\ndef later():\n    from .c import z\n",
        "c": "try:\n    from pack.b import y\nexcept ImportError:\n    import pack.a\n",
    }
    (tmp_path / "pack").mkdir()
    for name, text in files.items():
        (tmp_path / "pack" / f"{name}.py").write_text(text)
    modules = modules_of(tmp_path, ("pack",))
    assert imports(modules) == {
        "pack": set(),
        "pack.a": set(),
        "pack.b": {"pack.a"},
        "pack.c": {"pack.a", "pack.b"},
    }
    assert circle(imports(modules)) is None
    assert circle(imports(modules, lazy=True)) == ["pack.a", "pack.c", "pack.a"]
