"""MEMIT (Meng et al. 2023, "Mass-Editing Memory in a Transformer")."""

from __future__ import annotations

from patchhub.editing.editor import Editor
from patchhub.editing.record import Spread
from patchhub.editing.settings import EditSettings, default_layers, inner_width, is_narrow
from patchhub.editing.sites import BlockOutput
from patchhub.models.architectures import Architecture

EQUAL_SHARES = Spread("block", lambda left: left)
"""What is missing in the residual stream after the last layer, over the number of layers left (algorithm 1)."""


def default_settings(architecture: Architecture) -> EditSettings:
    """The published settings, with layers and lambda from the model's size (docs/methods.md gives the measurements)."""
    narrow = is_narrow(architecture)
    return EditSettings(
        layers=default_layers(architecture),
        ridge=inner_width(architecture) / 8,
        steps=20,
        learning_rate=1.0 if narrow else 0.5,
        weight_decay=0.5,
        kl_factor=0.0625,
        clamp=2.0 if narrow else 0.75,
    )


MEMIT = Editor(default_settings, BlockOutput, EQUAL_SHARES, until_sure=False)
