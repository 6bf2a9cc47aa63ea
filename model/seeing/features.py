"""What patches have in common: principal components, clusters, artefacts of position, and tokens that are no patch's.

Legend: B images, N patches, D features, k components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_OUTLIER = 8.0  # deviations; of a normal distribution one in 1e15
_NORMAL = 1.4826  # standard deviation of a normal distribution, in median absolute deviations
POSITIONAL = 0.5
"""A component of which a larger share of the variance goes by the place alone is one of position."""


@dataclass(frozen=True)
class Components:
    """Principal components of the patches of all images.

    Attributes:
        values: [B, N, k], the sign such that the largest is positive. explained: [k], shares of the variance.
            positional: [k], what share of each one's variance goes by the place alone: estimated from that of its mean
            over images, place by place, less what means of so few images vary by anyway; NaN of one image. Near 1, the
            component shows where a patch is, not what is on it.
    """

    values: Tensor
    explained: Tensor
    positional: Tensor


def components(features: Tensor, count: int = 3) -> Components:
    """Of [B, N, D]. Outliers (`outliers`) should be the mean of the others by now: a few of them are the first one."""
    b, n, d = features.shape
    flat = features.reshape(b * n, d).double()
    flat = flat - flat.mean(0)
    variances, directions = torch.linalg.eigh(flat.T @ flat / len(flat))
    values = (flat @ directions.flip(1)[:, :count]).view(b, n, count)
    furthest = values.flatten(0, 1).abs().argmax(0)
    values = values * values.flatten(0, 1)[furthest, torch.arange(count)].sign()
    of_means = values.mean(0).var(0, correction=0) / values.flatten(0, 1).var(0, correction=0)
    explained = (variances.flip(0)[:count] / variances.sum()).clamp(min=0)
    positional = ((b * of_means - 1) / (b - 1)).clamp(0) if b > 1 else torch.full_like(of_means, torch.nan)
    return Components(values.float(), explained.float(), positional.float())


def outliers(features: Tensor) -> Tensor:
    """Tokens that a model uses as registers (Darcet et al. 2024): those of far larger norm than others, by median and
    median absolute deviation over all patches. [B, N, D] -> bool [B, N]."""
    norms = features.float().norm(dim=-1)
    middle = norms.median()
    spread = (norms - middle).abs().median() * _NORMAL
    return norms > middle + _OUTLIER * spread


def clusters(features: Tensor, count: int, seed: int = 0) -> Tensor:
    """k-means of the directions of patches, over all images alike: [B, N, D] -> int64 [B, N]."""
    from sklearn.cluster import KMeans  # takes seconds

    flat = torch.nn.functional.normalize(features.float(), dim=-1).flatten(0, 1)
    found = KMeans(count, n_init=4, random_state=seed).fit_predict(flat.cpu().numpy())
    return torch.from_numpy(found).long().view(features.shape[:2])
