"""Prints the structure of the package in numbers.

    python scripts/house.py [FOLDER]

FOLDER is a checkout, by default this one. Its code is not run, only read.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

LONG = 60
"""Lines above which a function is counted as long, without its parameters and its docstring: a function that declares
thirty settings, a line for each and one that says what it is, is no long one."""
RUN = 6
"""Equal lines that count as a duplicate, without blank lines, comments, imports, lone brackets and parameters: what
implements an interface repeats its parameters, and two ways to set the same things have the same arguments."""
SETTINGS = ("GeneratorConfig", "ShardJob", "ShardOffer", "GenerationLimits", "Capacity")
"""Records of a language model's settings that are filled from each other."""
PATHS = re.compile(
    r"/(v1/|v2|models?/|version/|serving/|health|ping$|metrics$|docs$|info$|generate|tokenize$|chat_tokenize$|vertex$|"
    r"invocations$|openapi\.json$|api-doc/)"
)
"""Matches texts that are paths of the HTTP port."""


def main(root: Path) -> None:
    """Prints one line per number."""
    modules = {name_of(path, root): ast.parse(path.read_text()) for path in sources(root)}
    graph = {name: set(imported(tree, modules)) - {name} for name, tree in modules.items()}
    rooms = rooms_of(graph)
    own = sources(root)
    lines = sum(len(path.read_text().splitlines()) for path in own)
    native = sum(len(path.read_text().splitlines()) for path in (root / "inflight").rglob("*") if is_native(path))
    circles = [sorted(one) for one in components(graph) if len(one) > 1]
    settings = copies(modules)
    lists = route_lists(modules)
    tables = error_tables(modules)
    longest = long_functions(modules)
    runs = duplicates(own, root)
    numbers: list[tuple[str, int, Sequence[str]]] = [
        ("lines of Python in the package", lines, ()),
        ("lines of C++", native, ()),
        ("modules", len(modules), ()),
        ("rooms", len(rooms), ()),
        ("floors", 1 + max(depths(rooms).values()), ()),
        ("arrows between rooms that go up", *listed(upward(graph, root))),
        ("circles of modules", *listed([", ".join(one) for one in circles])),
        ("settings copied by hand", sum(settings.values()), [f"{where}: {n}" for where, n in settings.items()]),
        ("lists of routes", *listed(lists)),
        ("tables of errors", *listed(tables)),
        (f"functions over {LONG} lines", *listed(longest)),
        (f"runs of {RUN} lines or more that stand twice", *listed(runs)),
    ]
    for what, number, details in numbers:
        print(f"{number:7d}  {what}")
        for detail in details:
            print(f"           {detail}")


def listed(found: Sequence[str]) -> tuple[int, Sequence[str]]:
    """A list's length, and the list."""
    return len(found), found


def sources(root: Path) -> list[Path]:
    """Modules that were not generated."""
    found = [path for name in ("inflight", "mindspore_serving") for path in (root / name).rglob("*.py")]
    return sorted(path for path in found if "_pb2" not in path.name)


def is_native(path: Path) -> bool:
    return path.suffix in (".cpp", ".h")


def name_of(path: Path, root: Path) -> str:
    """A module's name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module, modules: Mapping[str, ast.Module]) -> Iterator[str]:
    """Modules that a module imports at any time. A name imported from a package counts as its defining module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                found = origin(node.module, alias.name, modules)
                if found is not None:
                    yield found


def origin(module: str, name: str, modules: Mapping[str, ast.Module]) -> str | None:
    """The module that defines a name which `module` exports; None if it is not defined in Python."""
    if f"{module}.{name}" in modules:
        return f"{module}.{name}"
    for node in modules[module].body:
        elsewhere = isinstance(node, ast.ImportFrom) and node.module in modules and node.module != module
        if elsewhere and any((alias.asname or alias.name) == name for alias in node.names):
            return origin(node.module, name, modules)
    named = name == "*" or re.search(rf"\b{name}\b", ast.unparse(modules[module]))
    return module if named else None


def room(module: str) -> str:
    """The room of a module: a package or a file below `inflight`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "inflight" and len(parts) > 1 else parts[0]


def rooms_of(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The other rooms that each room imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, others in graph.items():
        found[room(module)] |= {room(other) for other in others} - {room(module)}
    return dict(found)


def upward(graph: Mapping[str, set[str]], root: Path) -> list[str]:
    """Imports that violate the table of levels in tests/unit/test_layers.py."""
    tree = ast.parse((root / "tests" / "unit" / "test_layers.py").read_text())
    tables = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LEVELS"]
    levels: dict[str, int] = ast.literal_eval(tables[0].value)
    return [
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in others
        if room(module) != room(other)
        and room(module) in levels
        and levels.get(room(other), 0) >= max(1, levels[room(module)])
    ]


def components(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Strongly connected components (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            one: set[str] = set()
            while node not in one:
                one.add(stack.pop())
            found.append(one)

    sys.setrecursionlimit(10_000)
    for node in graph:
        if node not in index:
            visit(node)
    return found


def depths(rooms: Mapping[str, set[str]]) -> dict[str, int]:
    """Length of the longest chain of imports below each room; rooms in a cycle count as one."""
    one_of = {name: min(one) for one in components(rooms) for name in one}
    found: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in found:
            found[name] = 0
            below = {one_of[other] for member, one in one_of.items() if one == name for other in rooms.get(member, ())}
            found[name] = 1 + max((depth(other) for other in below if other != name), default=-1)
        return found[name]

    for name in rooms:
        depth(one_of[name])
    return found


def copies(modules: Mapping[str, ast.Module]) -> dict[str, int]:
    """Number of fields by which modules fill records of settings one by one, by module."""
    found: Counter[str] = Counter()
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in SETTINGS:
                given = sum(keyword.arg is not None for keyword in node.keywords)
                if given >= 4:
                    found[f"{name}, {ast.unparse(node.func)}"] += given
    return dict(found.most_common())


def route_lists(modules: Mapping[str, ast.Module]) -> list[str]:
    """Modules that name three or more routes outside of tables of `Route`; the tables count as one list."""
    found = []
    tables = 0
    for name, tree in modules.items():
        within = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Route", "generation")
            for inner in ast.walk(node)
        }
        tables += bool(within) and not name.endswith(".routes")
        paths = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and PATHS.match(node.value)
            and id(node) not in within
            and not node.value.endswith("/")  # a prefix of paths
            and "\n" not in node.value
        }
        if len(paths) >= 3:
            found.append(f"{name}: {len(paths)} paths")
    return found + ([f"the tables of {tables} protocols' routes"] if tables else [])


def error_tables(modules: Mapping[str, ast.Module]) -> list[str]:
    """Places that distinguish three kinds of errors: by `isinstance`, or in a mapping by their codes or causes."""
    tree = modules["inflight.errors"]
    kinds = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    causes = {"overloaded", "invalid", "too_large", "not_found", "deadline", "cancelled"}
    found = ["inflight.errors"]
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                tested = {
                    ast.unparse(inner)
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "isinstance"
                    for inner in ast.walk(call.args[1])
                    if isinstance(inner, ast.Name)
                }
                if len(tested & kinds) >= 3:
                    found.append(f"{name}.{node.name}")
            elif isinstance(node, ast.Dict):
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                coded = "_STATUS" in ast.unparse(node) or "StatusCode." in ast.unparse(node)
                if len(keys & causes) >= 2 or (coded and len(node.keys) >= 3):
                    found.append(f"{name}:{node.lineno}")
    return found


def long_functions(modules: Mapping[str, ast.Module]) -> list[str]:
    """Functions whose bodies have more than `LONG` lines."""
    return [
        f"{name}.{node.name}: {length(node)}"
        for name, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and length(node) > LONG
    ]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, behind its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and is_text(first.value)
    start = first.end_lineno if documented else first.lineno - 1
    return (function.end_lineno or 0) - (start or 0)


def duplicates(paths: Sequence[Path], root: Path) -> list[str]:
    """Runs of equal lines, each named by its two places."""
    texts: dict[Path, list[tuple[int, str]]] = {path: significant(path) for path in paths}
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    for path, lines in texts.items():
        for at in range(len(lines) - RUN + 1):
            places[tuple(text for _, text in lines[at : at + RUN])].append((path, at))
    pairs = sorted({(one, other) for found in places.values() for one in found for other in found if one < other})
    twice = set(pairs)
    firsts = [(one, other) for one, other in pairs if ((one[0], one[1] - 1), (other[0], other[1] - 1)) not in twice]
    return [
        " ~ ".join(f"{path.relative_to(root)}:{texts[path][at][0]}" for path, at in (one, other))
        for one, other in firsts
    ]


def significant(path: Path) -> list[tuple[int, str]]:
    """Lines that count for duplicates, with their numbers."""
    found = []
    tree = ast.parse(path.read_text())
    skipped = {
        line
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom)) or (isinstance(node, ast.Expr) and is_text(node.value))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            skipped.update(range(node.lineno + 1, node.body[0].lineno))  # a short signature is one line
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.strip()
        if number not in skipped and not text.startswith("#") and re.search(r"\w", text):
            found.append((number, text))
    return found


def is_text(node: ast.expr) -> bool:
    """Whether an expression is a text, as a docstring is."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]).resolve())
