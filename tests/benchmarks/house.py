"""The figures of the house: how large its rooms are, and what a commit walks through. Printed, never enforced.

python -m tests.benchmarks.house           # the source alone, a second
python -m tests.benchmarks.house --commit  # also a second commit of two facts on the demo model, about a minute
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "patchhub"
LONG = 60
MANY = 10
AUTHOR = "Ada <ada@example.org>"


def modules() -> dict[Path, int]:
    """Lines of every module; empty packages do not count."""
    found = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sorted(PACKAGE.rglob("*.py"))}
    return {path: lines for path, lines in found.items() if lines > 1}


def functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def lines_of(node: ast.FunctionDef, *, docstring: bool) -> int:
    """From `def` to the end, the signature too, with the docstring or without."""
    last = node.end_lineno or node.lineno
    if docstring:
        return last - node.lineno + 1
    first = node.body[0]
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return last - node.lineno + 1 - ((first.end_lineno or 0) - first.lineno + 1 if text else 0)


def is_command(node: ast.FunctionDef) -> bool:
    """Whether it is a command of click, which holds a description of each option."""
    marks = ("click.command", "click.group", "export.command", "_exports", ".command(")
    return any(mark in ast.unparse(each) for each in node.decorator_list for mark in marks)


def parameters_of(node: ast.FunctionDef) -> int:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([argument for argument in arguments if argument.arg not in ("self", "cls")])


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def of_the_source() -> Iterator[str]:
    sizes = modules()
    flat = Counter(path.parent for path in sizes if path.name != "__init__.py")
    folder, most = flat.most_common(1)[0]
    longest = max(sizes, key=lambda path: sizes[path])
    yield f"modules                          {len(sizes)} ({sum(sizes.values()):,} lines)"
    yield f"largest flat folder              {most} ({folder.relative_to(ROOT)})"
    yield f"median lines of a module         {median(sizes.values()):.0f}"
    yield f"longest module                   {sizes[longest]} ({place(longest)})"
    inside = [(path, node) for path, node in functions() if not is_command(node)]
    outside = [(path, node) for path, node in inside if place(path).split("/")[0] not in ("cli", "repository")]
    for what, most, sizes_of in (
        (f"functions over {LONG} code lines", LONG, [(lines_of(n, docstring=False), p, n) for p, n in inside]),
        ("... with their docstring", LONG, [(lines_of(n, docstring=True), p, n) for p, n in inside]),
        (f"functions over {MANY} parameters", MANY, [(parameters_of(n), p, n) for p, n in outside]),
    ):
        found = [one for one in sizes_of if one[0] > most]
        yield f"{what:<32} {len(found)}"
        for number, path, node in sorted(found, key=lambda one: -one[0]):
            yield f"    {number:>4} {place(path)}: {node.name}"


class Walk:
    """What of the package is entered while it is set, and which stored objects are read."""

    def __init__(self) -> None:
        self.entered: set[tuple[str, str, int]] = set()
        self.read: Counter[str] = Counter()

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
            self.entered.add((code.co_filename, code.co_name, code.co_firstlineno))


def of_a_commit() -> Iterator[str]:
    """A second commit of two facts."""
    import patchhub
    from patchhub.fsio import Span

    facts = json.loads((files("patchhub") / "demo_facts.json").read_text(encoding="utf-8"))
    walk, read = Walk(), Span.read

    def counted(place: Span, start: int = 0, size: int | None = None) -> bytes:
        if "objects" in place.path.parts and size is None:
            walk.read[place.path.name] += 1
        return read(place, start, size)

    with tempfile.TemporaryDirectory() as folder:
        model = str(files("patchhub") / "demo_model")
        with patchhub.Repository.init(folder, model, author=AUTHOR, progress=False) as repo:
            repo.commit(facts[:2], message="two facts", author=AUTHOR)
        with patchhub.open(folder, progress=False) as repo:
            Span.read = counted  # type: ignore[method-assign]
            sys.setprofile(walk)
            try:
                repo.commit(facts[2:4], message="two more", author=AUTHOR)
            finally:
                sys.setprofile(None)
                Span.read = read  # type: ignore[method-assign]
    rooms = Counter(place(Path(path)) for path, _, _ in walk.entered)
    yield f"modules entered by a commit      {len(rooms)}"
    yield f"functions entered by a commit    {len(walk.entered)}"
    for floor, names in groupby(sorted(rooms), key=lambda name: name.rpartition("/")[0] or "ground"):
        there = sorted(names, key=lambda name: -rooms[name])
        listed = ", ".join(f"{Path(name).stem} {rooms[name]}" for name in there)
        yield f"    {sum(rooms[name] for name in there):>4} {floor}: {listed}"
    yield f"reads of stored objects          {walk.read.total()} of {len(walk.read)} objects, {max(walk.read.values())} at most of one"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", action="store_true", help="also walk through a commit")
    for line in of_the_source():
        print(line)
    if parser.parse_args().commit:
        for line in of_a_commit():
            print(line)


if __name__ == "__main__":
    main()
