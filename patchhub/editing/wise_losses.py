"""The two losses of WISE: of the edited prompts' targets, and of the activations that routing tells prompts by."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def margin_loss(
    inside: Float[Tensor, " n"], outside: Float[Tensor, " m"], margins: tuple[float, float, float]
) -> Float[Tensor, ""]:
    """relu(d_out - d_in + gamma) + relu(d_out - alpha) + relu(beta - d_in), each as the mean of its positive entries.

    The first term compares every pair. (Wang et al. 2024, eq. 5; the published code takes means in the same way.)

    Args:
        inside: distances of edited prompts.
        outside: distances of unrelated texts.
        margins: alpha, beta, gamma.
    """
    alpha, beta, gamma = margins
    pairs = outside[None, :] - inside[:, None] + gamma
    terms = (pairs.reshape(-1), outside - alpha, beta - inside)
    return torch.stack([_mean_of_positive(term) for term in terms]).sum()


def _mean_of_positive(values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    positive = values.clamp(min=0.0)
    return positive.sum() / (values > 0).sum().clamp(min=1)
