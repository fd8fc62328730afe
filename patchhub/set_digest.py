"""The digest of an active set: one number per element, summed, so that a change of the set costs what it changes.

Each element (patch id, request id or None) is spread over 2048 bytes by SHAKE-256 and read as a whole number; a set is the
sum of its elements' numbers modulo 2^16384, and its digest is the SHA-256 of that sum. Order does not matter, and adding or
removing an element is one addition or subtraction. To make two sets with one sum is the problem of subset sums modulo
2^16384; the best attack known (a generalised birthday) takes about 2^(2 sqrt(16384)) = 2^256 steps. The construction is
AdHash (Bellare and Micciancio, EUROCRYPT 1997), with the width of LtHash16 (Lewi et al., 2019).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

WIDTH: Final = 2048
"""Bytes of an element's number and of a sum."""


def element_sum(elements: Iterable[tuple[str, str | None]]) -> int:
    """The sum of the numbers of distinct elements, not reduced; sums of disjoint sets add up."""
    return sum(_number(patch, request) for patch, request in elements)


def digest_of_sum(total: int) -> str:
    """The set digest that a sum stands for, 64 hexadecimal digits; `total` may be negative or too large by multiples."""
    return hashlib.sha256((total % (1 << 8 * WIDTH)).to_bytes(WIDTH, "little")).hexdigest()


def _number(patch: str, request: str | None) -> int:
    name = patch + (request or "")
    return int.from_bytes(hashlib.shake_256(name.encode("ascii")).digest(WIDTH), "little")
