"""PMET (Li et al. 2024, "PMET: Precise Model Editing in a Transformer").

Changes of the attention's and of the feed-forward projection's output are optimised together, and only the feed-forward one is
written, as in all published settings.
"""

from __future__ import annotations

import math

from patchhub.editing.editor import Editor
from patchhub.editing.record import Spread
from patchhub.editing.settings import EditSettings, default_layers, inner_width, is_narrow
from patchhub.editing.sites import Projections
from patchhub.models.architectures import Architecture

ROOT_SHARES = Spread("projection", math.sqrt)
"""What is missing at the last layer's feed-forward output, over the root of the number of layers left."""


def default_settings(architecture: Architecture) -> EditSettings:
    """The published settings, with layers and lambda from the model's size (docs/methods.md gives the measurements)."""
    narrow = is_narrow(architecture)
    return EditSettings(
        layers=default_layers(architecture),
        ridge=inner_width(architecture) / 16,
        steps=30,
        learning_rate=0.5 if narrow else 0.2,
        weight_decay=0.5,
        kl_factor=0.25 if narrow else 1.0,
        clamp=8.0 if narrow else 0.75,
    )


PMET = Editor(default_settings, Projections, ROOT_SHARES, until_sure=True)
