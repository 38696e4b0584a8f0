"""What the losses are measured against: the equations as one writes them in eager torch.

One row a channel, centred, times its transpose. Right for the batch of one device; the gradient is autograd's. The
covariance is written out, because torch.cov and torch.corrcoef break torch.compile's graph.
"""

from __future__ import annotations

import torch


def _covariance(mu: torch.Tensor) -> torch.Tensor:
    rows = mu.transpose(0, 1).reshape(mu.shape[1], -1)
    centred = rows - rows.mean(dim=1, keepdim=True)
    return centred @ centred.T / (rows.shape[1] - 1)


def _off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return matrix - torch.diag(torch.diagonal(matrix))


def sid(mu: torch.Tensor) -> torch.Tensor:
    """Eq. 3."""
    sigma = _covariance(mu)
    deviation = torch.diagonal(sigma).sqrt()
    return _off_diagonal(sigma / torch.outer(deviation, deviation)).square().sum() / mu.shape[1] ** 2


def covariance(mu: torch.Tensor) -> torch.Tensor:
    """Eq. 4."""
    return _off_diagonal(_covariance(mu)).square().sum() / mu.shape[1] ** 2


def variance(mu: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """Eq. 5."""
    deviation = mu.transpose(0, 1).reshape(mu.shape[1], -1).std(dim=1)
    return torch.relu(gamma - deviation).square().mean()


def vad(mu: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """Eq. 6, both terms from one covariance."""
    sigma = _covariance(mu)
    anchor = torch.relu(gamma - torch.diagonal(sigma).sqrt()).square().mean()
    return _off_diagonal(sigma).square().sum() / mu.shape[1] ** 2 + anchor
