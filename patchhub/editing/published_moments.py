"""Second moments in the files that the published editors keep: one .npz per layer, ``transformer.h.3.mlp.c_proj_float32_mom2_100000.npz``.

Such a file holds the state of a running sum (rome's and memit's util/runningstats.py, and EasyEdit's copy): ``mom2.mom2``, the sum
of k k^T over ``mom2.count`` tokens. Nothing in it is unpickled.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from patchhub.errors import SettingsError

_SUM, _COUNT = "mom2.mom2", "mom2.count"
_ASYMMETRY = 1e-3  # relative to the largest entry; float32 sums of one triangle and the other differ by rounding alone


class PublishedMoment(NamedTuple):
    """The mean of k k^T in float32, and the number of tokens that it is over."""

    moment: Float[np.ndarray, "in in"]
    tokens: int

    @property
    def digest(self) -> str:
        """SHA-256 of the moment in row-major order."""
        return hashlib.sha256(np.ascontiguousarray(self.moment, "<f4").data).hexdigest()


def read_moment(path: Path, width: int) -> PublishedMoment:
    """Read one file.

    Args:
        width: inputs of the weight that it is for.

    Raises:
        SettingsError: it is not such a file, is of another width, or holds no second moment.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            total, count = archive[_SUM], int(archive[_COUNT])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise _unusable(path, reason, "Give the .npz files of rome's or memit's layer_stats.") from None
    if total.shape != (width, width) or total.dtype.kind != "f":
        raise _unusable(
            path, f"its sum has shape {total.shape}, not {(width, width)}", "Is it of another model or layer?"
        )
    if count < 1 or not np.isfinite(total).all():
        raise _unusable(path, "its sum or count is not a number above 0", "Download or compute the file again.")
    moment = (total / np.float64(count)).astype(np.float32)
    size = float(np.abs(moment).max())
    if moment.diagonal().min() < 0 or float(np.abs(moment - moment.T).max()) > _ASYMMETRY * size:
        raise _unusable(path, "its sum is not symmetric with a diagonal of at least 0", "Is it a second moment?")
    return PublishedMoment(moment, count)


def weight_of(path: Path, weights: Iterable[str]) -> str:
    """The weight that a file is for, by its name.

    Raises:
        SettingsError: its name begins with no weight's.
    """
    weights = list(weights)
    for weight in weights:
        module = weight.removesuffix(".weight")
        if path.stem == module or path.stem.startswith(f"{module}_"):
            return weight
    raise SettingsError(
        f"the name of {path} does not say which weight it is for",
        remedy=f"Name it like {weights[0].removesuffix('.weight')}_float32_mom2_100000.npz, or say the layer: 3={path}",
        file=str(path),
    )


def _unusable(path: Path, reason: str, remedy: str) -> SettingsError:
    return SettingsError(f"{path} cannot be used as a second moment: {reason}", remedy=remedy, file=str(path))
