"""QSUR, the quantization space utilisation rate (OSTQuant, Hu et al. 2025): how much of its cube a cloud fills.

A quantizer with one grid for all d channels covers a cube; data x ~ N(mu, Sigma) fill an ellipsoid in it, the one that
holds the part alpha of them. With c the alpha quantile of the chi-square distribution with d degrees of freedom,

    QSUR = V(ellipsoid) / V(cube)
    V(ellipsoid) = pi^(d/2) / Gamma(d/2 + 1) c^(d/2) det(Sigma)^(1/2)
    V(cube) = (max_j upper_j - min_j lower_j)^d,    upper_j, lower_j = mu_j +- sqrt(c Sigma_jj)

and what is computed is QSUR^(1/d), the ratio of two lengths. The ellipsoid's extent along channel j is exactly
sqrt(c Sigma_jj); the paper takes the end of its longest axis, sqrt(c lambda_1) |q_1|, which is never more than that.

An orthogonal transform keeps det(Sigma), so all it can do is shrink the cube. With GM and AM the geometric and the
arithmetic mean of the eigenvalues of Sigma, and b_d = (pi^(d/2) / Gamma(d/2 + 1))^(1/d) / 2,

    QSUR^(1/d) <= b_d (GM / max_j Sigma_jj)^(1/2)   equal if mu = 0; alpha then drops out
               <= b_d (GM / AM)^(1/2)               over all rotations; reached where all Sigma_jj are equal, since the
                                                    largest is at least their mean, tr(Sigma) / d = AM
               <= b_d                               over all linear transforms; reached where the data are white, and
                                                    then in any basis

which is what a rotation and a scaling are for. b_d falls as sqrt(pi e / 2 d): compare only clouds of one dimension.

A cloud that lies in a subspace of r < d dimensions (fewer rows than columns) has no volume. It is measured as a body of
r dimensions: the product is over the r eigenvalues that are not zero, and r takes the place of d in c, Gamma and all
exponents. The extents stay those along the d channels. The bounds become b_r (GM / (tr(Sigma) / d))^(1/2) and
b_r (d / r)^(1/2), so the value can be above 1: again, compare a matrix with itself transformed.
QSUR is a diagnosis. It knows nothing of the grids that are really used (one for each row or token), nor of clipping.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.errors import NumericsError, UsageError

ALPHA = 0.99
RANK_TOLERANCE = 1e-12
"""Eigenvalues below this part of the largest count as zero; rounding weights to float32 makes about 1e-14 of a zero."""
NEGATIVE_TOLERANCE = 1e-6
"""Eigenvalues may be that much below zero, relative to the largest: second moments summed up in float32."""


def qsur(mean: Tensor, covariance: Tensor, alpha: float = ALPHA) -> float:
    """QSUR^(1/r) of N(mean [d], covariance [d, d]), r the rank of the covariance; in float64. 0 if there is no spread.

    Raises UsageError for shapes that do not fit and for an alpha outside (0, 1), NumericsError if something is not
    finite or the covariance is not positive semidefinite.
    """
    if mean.ndim != 1 or covariance.shape != (mean.numel(), mean.numel()):
        raise UsageError(
            f"A mean {list(mean.shape)} and a covariance {list(covariance.shape)} do not fit.",
            remedy="Give [d] and [d, d].",
        )
    covariance = covariance.detach().double()
    _check_finite(covariance)
    eigenvalues = torch.linalg.eigvalsh(0.5 * (covariance + covariance.T))
    if bool((eigenvalues < -NEGATIVE_TOLERANCE * eigenvalues.abs().amax()).any()):
        raise NumericsError("A covariance has negative eigenvalues.", remedy="Sum up second moments in float64.")
    return _body(mean.detach().double(), covariance.diagonal(), eigenvalues, alpha)


def weight_qsur(weight: Tensor, alpha: float = ALPHA) -> float:
    """QSUR^(1/r) of the rows of W [o, n] as points: their mean, and their covariance over o. With o <= n the rank r is
    at most o - 1, and the eigenvalues are those of the smaller Gram matrix [o, o]. 0 for rows that are all the same."""
    rows = weight.detach().double()
    _check_finite(rows)
    mean = rows.mean(0)
    rows = rows - mean
    count, width = rows.shape
    gram = rows @ rows.T if count <= width else rows.T @ rows
    return _body(mean, rows.square().mean(0), torch.linalg.eigvalsh(gram / count), alpha)


def moment_qsur(moment: Tensor, tokens: int, mean: Tensor | None = None, alpha: float = ALPHA) -> float:
    """QSUR^(1/r) of inputs of which H = sum x x^T [n, n] over `tokens` rows and their `mean` [n] are known. Without a
    mean it is taken as 0: the cloud about zero with the same second moments, for which `tokens` does not matter."""
    if tokens < 1:
        raise UsageError(f"Second moments of {tokens} tokens.", remedy="Give the number of rows that were summed up.")
    covariance = moment.detach().double() / tokens
    if mean is None:
        return qsur(covariance.new_zeros(covariance.shape[0]), covariance, alpha)
    mean = mean.detach().double()
    return qsur(mean, covariance - torch.outer(mean, mean), alpha)


def qsur_bound(covariance: Tensor) -> tuple[float, float]:
    """The largest QSUR^(1/r) that a cloud of this covariance [d, d], of rank r, can be given: by a rotation, and by any
    linear transform."""
    width = covariance.shape[0]
    kept = _positive(torch.linalg.eigvalsh(covariance.detach().double()))
    rank = kept.numel()
    if rank == 0:
        return 0.0, 0.0
    ball = 0.5 * math.exp(_log_ball(rank))
    spread = math.exp(0.5 * float(kept.log().mean())) / math.sqrt(float(kept.sum()) / width)
    return ball * spread, ball * math.sqrt(width / rank)


def chi_square_quantile(degrees: int, alpha: float) -> float:
    """x with P(degrees / 2, x / 2) = alpha, P the regularised lower incomplete gamma function, by bisection to the last
    bit of float64."""
    if not 0 < alpha < 1:
        raise UsageError(f"There is no chi-square quantile of {alpha}.", remedy="Give an alpha between 0 and 1.")

    def below(x: float) -> bool:
        half = torch.tensor([0.5 * degrees, 0.5 * x], dtype=torch.float64)
        return float(torch.special.gammainc(half[0], half[1])) < alpha

    low, high = 0.0, float(degrees)
    while below(high):
        low, high = high, 2 * high
    while low < (middle := 0.5 * (low + high)) < high:
        low, high = (middle, high) if below(middle) else (low, middle)
    return high


def _body(mean: Tensor, variances: Tensor, eigenvalues: Tensor, alpha: float) -> float:
    """QSUR^(1/r) of an ellipsoid by its centre, its variances along the channels, and along its axes."""
    _check_finite(mean)
    kept = _positive(eigenvalues)
    rank = kept.numel()
    if rank == 0:
        return 0.0
    reach = chi_square_quantile(rank, alpha) ** 0.5
    extents = reach * variances.clamp_min(0).sqrt()
    side = float((mean + extents).amax() - (mean - extents).amin())
    return math.exp(_log_ball(rank) + 0.5 * float(kept.log().mean())) * reach / side


def _positive(eigenvalues: Tensor) -> Tensor:
    """Those of ascending eigenvalues that are not zero."""
    if eigenvalues.numel() == 0 or not eigenvalues[-1] > 0:
        return eigenvalues[:0]
    return eigenvalues[eigenvalues > RANK_TOLERANCE * eigenvalues[-1]]


def _log_ball(rank: int) -> float:
    """log of the r-th root of the volume of the unit ball in r dimensions."""
    return 0.5 * math.log(math.pi) - math.lgamma(0.5 * rank + 1) / rank


def _check_finite(x: Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        raise NumericsError("QSUR of numbers that are not finite.", remedy="Look for the matrix that overflowed.")
