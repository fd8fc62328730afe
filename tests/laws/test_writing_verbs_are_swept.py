"""No verb that writes is forgotten by the sweep of faults: each method of `Repository` is swept, only looks, or is named with a reason."""

from __future__ import annotations

from tests.faults.sweep import LOOKS, MODEL_VERBS, UNSWEPT, VERBS
from tests.laws.verbs import method_name, methods

SWEPT = {
    method_name(tuple(word for word in name.partition(",")[0].split() if not word.startswith("-")))
    for name in (*VERBS, *MODEL_VERBS)
}


def test_every_verb_that_writes_is_swept_or_says_why_not() -> None:
    left = {
        name for name in methods() if name not in SWEPT and name not in LOOKS and name.partition("_")[0] != "export"
    }
    assert left == UNSWEPT.keys() - {"export"}
    assert methods().keys() >= SWEPT | set(LOOKS)


def test_no_verb_that_says_who_changed_something_only_looks() -> None:
    """A verb with an author writes into the store; `audit` and `log` only read who did."""
    from inspect import signature

    authored = {
        name for name, found in methods().items() if callable(found) and "author" in signature(found).parameters
    }
    assert authored - {"log", "bench"} <= SWEPT
