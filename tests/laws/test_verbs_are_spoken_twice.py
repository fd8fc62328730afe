"""Every verb is a command and a method, with the same options, defaults and choices; a new one cannot be forgotten on either side."""

from __future__ import annotations

import inspect
from typing import Any, Literal, Union, get_args, get_origin

import click
import pytest

from patchhub.repository import Repository
from tests.laws.verbs import commands, methods

COMMANDS = dict(commands())

COMMANDS_ALONE = {"demo": "it shows the others"}
METHODS_ALONE = {
    "open": "a command opens what --repo says",
    "close": "a command ends",
    "load": "a model cannot be printed",
    "attach": "a model cannot be printed",
    "store": "no verb: what is below",
    "progress": "no verb: who hears",
    "made": "no verb: what init or clone found",
}
OPTIONS_ALONE = {
    "repo": "which repository: in Python that is the object itself",
    "as_json": "how results are printed: in Python they have to_json()",
    "quiet": "how much is printed",
}
OPTIONS_OF_ONE_COMMAND = {
    ("show", "everything"): "how many facts are printed",
    ("diff", "everything"): "how many facts are printed",
    ("show", "stat"): "what of a commit is printed",
    ("show", "verbose"): "what of a commit is printed",
    ("branch", "verbose"): "what of a branch is printed",
    ("branch", "listing"): "git's word for no name",
    ("tag", "listing"): "git's word for no name",
    ("log", "form"): "how a commit is printed",
    ("log", "oneline"): "how a commit is printed",
    ("log", "patch"): "whether show is told of each commit",
    ("log", "graph"): "how commits are printed",
    ("ask", "file"): "in Python, prompts are any list",
    ("bench", "markdown"): "how the table is printed",
    ("bench", "base"): "in Python, `Repository.init` of that base in a folder of one's own",
}
ARGUMENTS_ALONE = {
    "self": "the repository",
    "time": "for the command line SOURCE_DATE_EPOCH, or now",
    "progress": "for the command line, bars on a terminal",
}
ARGUMENTS_OF_ONE_METHOD = {("init", "folder"): "--repo"}


def options_of(verb: str) -> dict[str, click.Parameter]:
    found = {str(param.name): param for param in COMMANDS[verb].params}
    return {
        name: p for name, p in found.items() if name not in OPTIONS_ALONE and (verb, name) not in OPTIONS_OF_ONE_COMMAND
    }


def arguments_of(verb: str) -> dict[str, inspect.Parameter]:
    found = inspect.signature(getattr(Repository, verb)).parameters
    return {
        name: p
        for name, p in found.items()
        if name not in ARGUMENTS_ALONE and (verb, name) not in ARGUMENTS_OF_ONE_METHOD
    }


def test_every_command_is_a_method_and_every_method_a_command() -> None:
    assert COMMANDS.keys() - COMMANDS_ALONE.keys() == methods().keys() - METHODS_ALONE.keys()


def test_no_exception_is_left_over() -> None:
    assert COMMANDS_ALONE.keys() <= COMMANDS.keys()
    for verb, name in OPTIONS_OF_ONE_COMMAND:
        assert name in {param.name for param in COMMANDS[verb].params}
    for verb, name in ARGUMENTS_OF_ONE_METHOD:
        assert name in inspect.signature(getattr(Repository, verb)).parameters


VERBS = sorted(COMMANDS.keys() - COMMANDS_ALONE.keys())


@pytest.mark.parametrize("verb", VERBS)
def test_options_have_the_same_names(verb: str) -> None:
    assert options_of(verb).keys() == arguments_of(verb).keys()


@pytest.mark.parametrize("verb", VERBS)
def test_options_have_the_same_defaults(verb: str) -> None:
    context = click.Context(COMMANDS[verb])
    for name, option in options_of(verb).items():
        argument = arguments_of(verb)[name]
        if not option.required and option.nargs != -1:
            default = option.get_default(context)
            absent = default is None or "UNSET" in repr(default)
            wanted = argument.default if argument.default not in ((), "", inspect.Parameter.empty) else None
            assert (None if absent or default in ((), "") else default) == wanted or name == "rev", f"{verb} {name}"


@pytest.mark.parametrize("verb", VERBS)
def test_options_have_the_same_choices(verb: str) -> None:
    for name, option in options_of(verb).items():
        chosen = choices_in(arguments_of(verb)[name].annotation)
        if isinstance(option.type, click.Choice):
            assert list(option.type.choices) == chosen, f"{verb} {name}"
        else:
            assert not chosen, f"{verb} {name}"


@pytest.mark.parametrize("verb", VERBS)
def test_every_method_says_what_it_does(verb: str) -> None:
    method = getattr(Repository, verb)
    assert (method.__doc__ or "").strip().endswith((".", "`", ")")) or "Args:" in method.__doc__
    assert getattr(method, "is_verb", verb in ("init", "clone")), "its arguments are not checked"


def choices_in(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) is Union or "UnionType" in type(annotation).__name__:
        return [choice for part in get_args(annotation) for choice in choices_in(part)]
    return []
