"""The arguments of the front door, checked against the annotations of the method that takes them.

So a wrong type or value raises `SettingsError` with words before any work is done, and a new argument cannot go unchecked.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Annotated, Any, Concatenate, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from patchhub.errors import SettingsError
from patchhub.who import refuse_undecoded

Owner = TypeVar("Owner")
Taken = ParamSpec("Taken")
Given = TypeVar("Given")

_WORDS: Mapping[Any, str] = {
    str: "text",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    Mapping: "a mapping",
    PathLike: "a path",
}


def verb(method: Callable[Concatenate[Owner, Taken], Given]) -> Callable[Concatenate[Owner, Taken], Given]:
    """Mark a method as a verb of the command line, and refuse arguments that its annotations do not allow."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def checked(owner: Owner, /, *args: Taken.args, **kwargs: Taken.kwargs) -> Given:
        for name, value in signature.bind(owner, *args, **kwargs).arguments.items():
            parameter = signature.parameters[name]
            many = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            for one in value if many else (value,):
                check(name, one, parameter.annotation)
        return method(owner, *args, **kwargs)

    checked.is_verb = True  # type: ignore[attr-defined]
    return checked


def check(name: str, value: Any, kind: Any) -> None:
    """Refuse an argument that is not of a kind, where that is an annotation that says what fits.

    Raises:
        SettingsError: it is not, or it is text that is not UTF-8.
    """
    for text in (value,) if isinstance(value, str) else value if isinstance(value, tuple | list) else ():
        if isinstance(text, str):
            refuse_undecoded(text, name.strip("_").replace("_", " "))
    if not fits(value, kind):
        shown = repr(value) if len(repr(value)) < 80 else f"a {type(value).__name__}"
        raise SettingsError(f"{name.strip('_')} cannot be {shown}", remedy=f"It is {words(kind)}.")


def fits(value: Any, kind: Any) -> bool:  # noqa: PLR0911  # one way out for each form of annotation
    """Whether a value is of a kind: a type, a union, a literal, a sequence of a kind, or a number with its least value."""
    if kind is Any or kind is inspect.Parameter.empty:
        return True
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return fits(value, parts[0]) and value >= parts[1]
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(fits(one, parts[0]) for one in value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, NoneType if kind is None else origin or kind)


def words(kind: Any) -> str:
    """A kind as an error says it: `text or None`, `one of refuse, replace, keep`, `a whole number of at least 1`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{words(parts[0])} of at least {parts[1]}"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(words, parts)))
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin is Sequence:
        return f"a list, each item {words(parts[0])}"
    return "None" if kind in (None, NoneType) else _WORDS.get(origin or kind, f"a {getattr(kind, '__name__', kind)}")
