"""What stands between a feed-forward projection's output y and the residual stream: nothing, a scale a, or a norm with a gain g.

    x_out = x + phi(y),    phi(y) = a y    or    phi(y) = a g y / sqrt(mean(y^2) + eps)

A norm does not see how long y is, so what it can give is an ellipsoid, and of all outputs that give one point of it the nearest to the
present one can be written (docs/methods.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchhub.models.structure import StructureError

_SMALL = 1e-3  # length per channel of the vector that eps is read off
_TOLERANCE = 1e-3  # relative; of half-precision norms too
_HALVINGS = 100  # of the interval of the multiplier, which is searched on a logarithmic scale


@dataclass(frozen=True, eq=False)
class Behind:
    """phi of one layer, as numbers.

    Attributes:
        scale: a.
        gain: g (d,), float64 on the CPU; None: there is no norm.
        eps: under the norm's root.
    """

    scale: float = 1.0
    gain: Float[Tensor, " d"] | None = None
    eps: float = 0.0

    def __call__(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """phi(y), in y's type and on its device."""
        if self.gain is None:
            return y * self.scale
        return y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.scale * self.gain).to(y)

    def slope(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """What each channel of a small change of y is multiplied with, at an unchanged length of y."""
        if self.gain is None:
            return torch.full_like(y, self.scale)
        return (y.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.scale * self.gain).to(y)

    def residual(self, y: Float[Tensor, "n d"], share: Float[Tensor, "n d"], length: float) -> Float[Tensor, "n d"]:
        """What is to be added to y for the stream to move by ``share``, or as near to that as phi gets; ``length`` as in `toward`."""
        if self.gain is None:
            return share / self.scale
        return self.toward(self.nearest(self(y) + share), y, length)

    def nearest(self, wanted: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The v with mean(v^2) = 1 whose phi(v) is nearest to ``wanted``: the nearest point of an ellipsoid, for a layer with a norm.

        With h = a g it is v_i = h_i t_i / (h_i^2 + mu), where mu > -min h^2 gives v its length; a channel of no gain gets nothing.
        """
        assert self.gain is not None
        h = (self.scale * self.gain).to(wanted)
        square = h.square()
        least, most = square.min(), square.max()

        def mean_square(above: Float[Tensor, "n 1"]) -> Float[Tensor, "n 1"]:
            return (h * wanted / (square - least + above)).square().mean(-1, keepdim=True)

        # mean_square falls in mu; the interval of mu + min h^2 spans all that float64 can tell apart.
        tiny = torch.finfo(wanted.dtype).eps * most
        low = torch.full_like(wanted[:, :1], float(tiny.log()))
        high = (wanted.abs().amax(-1, keepdim=True) * h.abs().max() + most).log() + 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            long = mean_square(middle.exp()) > 1
            low, high = torch.where(long, middle, low), torch.where(long, high, middle)
        return h * wanted / (square - least + ((low + high) / 2).exp())

    def toward(self, target: Float[Tensor, "n d"], y: Float[Tensor, "n d"], length: float) -> Float[Tensor, "n d"]:
        """The smallest change of y after which phi gives what it gives for ``target``.

        With a norm that is c v - y, c = <v, y> / <v, v>, where the result is at least ``length`` times as long as y.
        """
        return target - y if self.gain is None else self.beyond(target, y, 0.0, length)

    def beyond(
        self, target: Float[Tensor, "n d"], y: Float[Tensor, "n d"], least: float, length: float
    ) -> Float[Tensor, "n d"]:
        """As `toward`, the smallest change that is at least ``least`` long; for a layer with a norm.

        It is c v - y with the larger root c of ||c v - y|| = least, where that is larger than c of the smallest change.
        """
        square = target.square().sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
        factor = (target * y).sum(-1, keepdim=True) / square
        aside = y.square().sum(-1, keepdim=True) - factor.square() * square
        more = ((least**2 - aside).clamp(min=0) / square).sqrt()
        floor = length * y.norm(dim=-1, keepdim=True) / square.sqrt()
        return torch.maximum(factor + more, floor) * target - y


@torch.no_grad()
def read_behind(norm: nn.Module | None, scale: float, width: int) -> Behind:
    """phi of a loaded layer, read off what its norm gives.

    Raises:
        StructureError: the norm is not y / rms(y) times a gain (it centres, or has a bias).
    """
    if norm is None:
        return Behind(scale)
    parameter = next(norm.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device

    def given(y: Tensor) -> Tensor:
        found: Any = norm(y.to(device)[None])
        return torch.as_tensor(found)[0].double().cpu()

    pattern = torch.linspace(-1.0, 1.0, width) + 0.5
    at_rest = given(pattern)
    gain = at_rest * pattern.double().square().mean().sqrt() / pattern.double()
    short = given(_SMALL * pattern / pattern.square().mean().sqrt())
    ratio = float((short * at_rest).sum() / at_rest.square().sum().clamp(min=1e-300))
    eps = max(0.0, _SMALL**2 * (1 / max(ratio, 1e-6) ** 2 - 1))
    behind = Behind(scale, gain * (1 + eps / pattern.double().square().mean()).sqrt(), eps)
    other = torch.cos(torch.arange(width, dtype=torch.float32)) + 0.25
    error = float((given(other) - behind(other.double()) / scale).norm())
    if not error <= _TOLERANCE * float(given(other).norm()) + 1e-9:
        raise StructureError(
            "has a norm behind the feed-forward network that is not a root-mean-square norm with a gain"
        )
    return behind
