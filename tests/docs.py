"""docs/cli.md, docs/python.md and docs/rooms.md, from the source; and the table of adapters in docs/hub.md, from its tests.

`python -m tests.docs` writes them, `--check` says whether they are as they would be.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from patchhub.cli.main import main
from patchhub.repository.arguments import explained
from tests.export.adapters import table

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "patchhub"
WIDTH = 100
_SECTIONS = ("Args:", "Raises:", "Attributes:", "Returns:")

CLI = """# The command line

Every command takes `--json` (one JSON document on stdout) and `--repo`. Talk and progress go to stderr; a kind of error has an exit code.
REV is a branch, a tag, a commit id or a unique prefix of one, HEAD, HEAD~2, main@{1}, or `base` for the unpatched model.
This page is written from the program: `python -m tests.docs`.
"""

PYTHON = """# Python

    import patchhub

    repo = patchhub.open()                                         # the repository of this folder, or of one above it
    print(repo.status())
    print(repo["HEAD"].facts)                                      # what a revision holds; repo["HEAD~2"], repo["v1"]
    for entry in repo.log(limit=3):
        print(entry, entry.to_json()["added"])                     # every result has the document that --json prints

A verb of the command line is a method of the same name with the same options ([cli.md](cli.md)): a dash is an underscore, `--no-x` is
`x=False`, a word that Python keeps for itself ends with an underscore (`import_`, `continue_`), and verbs of a group carry its name
(`remote_add`). Beside them, who changes something and when are `author` and `time`: by default the config's `author`, git's identity or the
login name, and now.

Facts are a path, an open file, a pandas DataFrame, a datasets.Dataset, or mappings in any iterable. Results are frozen dataclasses
that say in words what happened and show as tables in notebooks. All errors are `patchhub.PatchhubError`s; `patchhub.errors` has the
tree. Warnings go through Python's `warnings`. Bars are shown on a terminal and in a notebook unless the repository was opened with
`progress=False`.

`Place` is a path, `Count` a whole number of at least 1, `Index` and `Amount` a number of at least 0, `Source` facts, and `Settings` a
mapping or `KEY=VALUE` texts. This page is written from the source: `python -m tests.docs`.
"""


def cli_page() -> str:
    return CLI + "".join(_command(path, command) for path, command in _commands(main, ()))


def _commands(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))


def _command(path: tuple[str, ...], command: click.Command) -> str:
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    words = [param.metavar or _placeholder(param) for param in arguments]
    rows = [_option(param) for param in command.params if isinstance(param, click.Option)]
    table = "\n".join(["| option | |", "|---|---|", *rows]) + "\n" if rows else ""
    return f"\n## patchhub {' '.join([*path, *words])}\n{_help(command.help or '')}\n{table}"


def _placeholder(param: click.Argument) -> str:
    name = str(param.name).rstrip("_").upper()
    name = f"{name}..." if param.nargs == -1 else name
    return name if param.required else f"[{name}]"


def _option(param: click.Option) -> str:
    choices = param.type.choices if isinstance(param.type, click.Choice) else ()
    value = param.metavar or "\\|".join(map(str, choices)) or param.type.name.upper()
    names = ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
    shown = "" if param.is_flag else f" {value}"
    default = f" Default: {param.default}." if param.show_default and param.default is not None else ""
    return f"| {names}{shown} | {param.help or ''}{default} |"


def _help(text: str) -> str:
    """A docstring of click's as Markdown: what stands under a backspace is an example."""
    parts = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        example = paragraph.startswith("\b\n")
        parts.append(textwrap.indent(textwrap.dedent(paragraph[2:].lstrip(chr(10))), "    ") if example else paragraph)
    return "\n\n".join(parts) + "\n"


def python_page() -> str:
    loading, runtime = _tree("worktree/loading.py"), _tree("runtime/patched_model.py")
    functions = [_function(node, "patchhub") for node in _named(_tree("repository/__init__.py"), "open", "clone")]
    functions += [_function(node, "patchhub") for node in _named(loading, "load", "attach")]
    functions += [_function(node, "patchhub") for node in _named(runtime, "detach")]
    parts = [PYTHON, "\n## Functions\n", *functions, "\n## Repository\n"]
    for file in ("__init__", "writing", "looking", "refs", "model"):
        tree = _tree(f"repository/{file}.py")
        for class_ in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            parts.append(f"\n{_docstring(class_)}")
            parts += [
                _function(node, "repo") for node in class_.body if isinstance(node, ast.FunctionDef) and _public(node)
            ]
    parts += ["\n## Results\n", *_results()]
    return "".join(parts)


def _results() -> Iterator[str]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(
                isinstance(b, ast.Name) and b.id in ("Result", "Moved") for b in node.bases
            ):
                found[node.name, path.stem] = node
    for (name, module), class_ in sorted(found.items()):
        also = f" (`{module}`)" if sum(other == name for other, _ in found) > 1 else ""
        fields = [
            f"`{ast.unparse(s.target)}`"
            for s in class_.body
            if isinstance(s, ast.AnnAssign) and "ClassVar" not in ast.unparse(s)
        ]
        properties = [f"`{s.name}`" for s in class_.body if isinstance(s, ast.FunctionDef) and _is_property(s)]
        text = _docstring(class_)
        listed = "" if "Attributes:" in text else f"\nFields: {', '.join([*fields, *properties])}.\n"
        yield f"\n### {name}{also}\n{text}{listed}"


def _function(node: ast.FunctionDef, owner: str) -> str:
    arguments = [ast.unparse(part) for part in _split(node.args)]
    line = f"{owner}.{node.name}({', '.join(arguments)}){_returns(node)}"
    if len(line) > WIDTH:
        inside = "\n".join(_packed(arguments))
        line = f"{owner}.{node.name}(\n{textwrap.indent(inside, '    ')}\n){_returns(node)}"
    return f"\n### {node.name}\n\n```\n{line}\n```\n\n{_docstring(node)}"


def _packed(arguments: list[str]) -> Iterator[str]:
    """Arguments on as few lines as they fit on."""
    line = ""
    for argument in arguments:
        if line and len(line) + len(argument) + 6 > WIDTH:
            yield f"{line},"
            line = ""
        line = f"{line}, {argument}" if line else argument
    yield line


def _split(arguments: ast.arguments) -> Iterator[ast.AST]:
    """Each argument by itself, with its default, without self and cls."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    for place, (argument, default) in enumerate(zip(plain, defaults, strict=True)):
        if not (place == 0 and argument.arg in ("self", "cls")):
            yield _argument(argument, default)
    if arguments.vararg:
        yield ast.Name(f"*{ast.unparse(arguments.vararg)}")
    elif arguments.kwonlyargs:
        yield ast.Name("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _argument(argument, default)
    if arguments.kwarg:
        yield ast.Name(f"**{ast.unparse(arguments.kwarg)}")


def _argument(argument: ast.arg, default: ast.expr | None) -> ast.Name:
    text = ast.unparse(argument)
    return ast.Name(text if default is None else f"{text} = {ast.unparse(default)}")


def _returns(node: ast.FunctionDef) -> str:
    return "" if node.returns is None else f" -> {ast.unparse(node.returns).strip(chr(39))}"


def _docstring(node: ast.FunctionDef | ast.ClassDef) -> str:
    """The docstring as Markdown: each name of a section is an item of a list."""
    out, inside = [], False
    text = ast.get_docstring(node) or ""
    if isinstance(node, ast.FunctionDef) and any(ast.unparse(mark) == "verb" for mark in node.decorator_list):
        text = explained(text, [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)])
    for line in text.split("\n"):
        if line.strip() in _SECTIONS and not line.startswith(" "):
            inside = True
            out.append(f"{line.strip()}\n")
        elif inside and line.startswith("    ") and not line.startswith("     ") and ": " in f"{line} ":
            name, _, rest = line.strip().partition(": ")
            out.append(f"- `{name}`: {rest}")
        else:
            inside = inside and (line.startswith(" ") or not line)
            out.append(f"  {line.strip()}" if inside and line else line)
    return "\n".join(out).replace("``", "`").rstrip() + "\n"


def _tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def _named(tree: ast.Module, *names: str) -> list[ast.FunctionDef]:
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    return [found[name] for name in names]


def _public(node: ast.FunctionDef) -> bool:
    """Whether a method is shown: not a form of one that has several, whose implementation says it all."""
    forms = [ast.unparse(decorator) for decorator in node.decorator_list]
    return "overload" not in forms and (not node.name.startswith("_") or node.name in ("__getitem__", "__init__"))


def _is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in node.decorator_list)


ROOMS = """# The rooms of the house

Floors from top to bottom, each with its rooms. A room may import from floors below its own, from no floor above, and no rooms of one
folder import each other in a circle; import-linter checks all three. This page is written from the modules' first sentences:
`python -m tests.docs`.
"""

FLOORS = {
    "cli": "the verbs, typed; knows click and the terminal",
    "repository": "the verbs, called: `patchhub.Repository`",
    "porcelain": "one public function for each verb",
    "worktree": "the base in memory at a state; store and torch",
    "sets": "what a revision holds and how one becomes another; store and NumPy, no torch",
    "export": "other programs' forms; NumPy",
    "remotes": "where stores are shared",
    "signing": "who vouches for what: signatures as notes",
    "runtime": "patched models in memory",
    "evaluation": "measuring models",
    "store": "bytes, refs, operations, index; SQLite",
    "editing": "from facts to columns; torch, no disk but the cache",
    "text": "texts as a model reads them",
    "models": "base models: architecture, files, identity, running them in pieces",
    "": "the ground: the algebra of columns and deltas, objects, files, errors",
}


def rooms_page() -> str:
    parts = [ROOMS]
    for floor, idea in FLOORS.items():
        folder = PACKAGE / floor
        rooms = sorted(folder.rglob("*.py") if floor else folder.glob("*.py"))
        first = {path: _docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0] for path in rooms}
        lines = [
            f"| `{path.relative_to(PACKAGE).with_suffix('')}` | {sentence} |"
            for path, sentence in first.items()
            if path.name not in ("__init__.py", "__main__.py")
        ]
        parts.append(f"\n## {floor or 'ground'}: {idea}\n\n| room | |\n|---|---|\n" + "\n".join(lines) + "\n")
    return "".join(parts)


def hub_page() -> str:
    """The page as it is, with the table of adapters anew."""
    before, _, rest = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8").partition("| adapter | import |\n")
    return before + table() + rest[re.search(r"^(?!\|)", rest, re.M).start() :]  # type: ignore[union-attr]


PAGES = {"docs/cli.md": cli_page, "docs/hub.md": hub_page, "docs/python.md": python_page, "docs/rooms.md": rooms_page}


def run(check: bool) -> list[str]:
    """The pages that are not as they would be; without ``check``, they are written."""
    stale = []
    for name, page in PAGES.items():
        path, text = ROOT / name, page()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    return stale


if __name__ == "__main__":
    checked = "--check" in sys.argv
    changed = run(checked)
    print("\n".join(f"{name} {'is not as the source says' if checked else 'written'}" for name in changed))
    sys.exit(1 if checked and changed else 0)
