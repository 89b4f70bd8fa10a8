"""Learning orthogonal matrices: Riemannian Adam and Cayley SGD on batches of square matrices R [..., n, n].

Both work in the body frame. With G = dL/dR and a step R -> R exp(A), A skew,

    dL = <R^T G, A> = 1/2 <Omega, A>,    Omega = R^T G - G^T R    (skew: an element of the Lie algebra so(n))

so entry (i, j), i < j, of Omega is the slope of L in the angle by which columns i and j of R are turned into each
other. Momentum is kept as an element of so(n) and carried along by left translation, that is, left as it is: nothing is
transported, and nothing leaves the tangent space. A step is

    R <- R Cayley(A),    Cayley(A) = (I - A/2)^-1 (I + A/2) = I + (I - A/2)^-1 A,    A = -lr D

with D skew too. Cayley(A) is a rotation: det R stays what it was, so a start with det -1 can only reach those with
det -1 (flip the sign of a column to cross over). Where A has the eigenvalues +-i a, R turns by 2 arctan(a / 2) =
a - a^3 / 12 + ... radians in that plane, less than pi for any lr.

The system is solved in the parameters' own type, in the second form above, whose rounding error is relative to A and
not to I: 1,000 noisy float32 steps without any correction leave R^T R within 3e-6 of I for n = 2, 64, 128 and 384, and
a solve in float64 is no better, since what is left is the rounding of R. Every `stabilize` steps R is replaced by its
polar factor, which keeps it within 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from compress.errors import NumericsError, UsageError

SecondMoment = Literal["entry", "matrix"]


def orthogonality(x: Tensor) -> float:
    """max |x^T x - I| over all entries of all matrices of x [..., n, n], computed in float64."""
    return float(_defect(x.detach().double()).abs().amax()) if x.numel() else 0.0


def polar(x: Tensor) -> Tensor:
    """The orthogonal matrix nearest to x [..., n, n] in the Frobenius norm, U V^T of x = U S V^T, in x's type.

    By Newton-Schulz, x <- x (I - (x^T x - I) / 2), which squares the defect: two or three steps for what an optimiser
    leaves behind. It converges to the polar factor if |x^T x - I|_F < 1; an x further off gets a singular value
    decomposition, which for a singular x is one nearest matrix of many. Raises NumericsError if x is not finite.
    """
    defect = _defect(x)
    size = _size(defect)
    if not size < 1:
        if not bool(torch.isfinite(x).all()):
            raise NumericsError("A matrix to be made orthogonal is not finite.", remedy="Lower the learning rate.")
        left, _, right = torch.linalg.svd(x.double())
        return (left @ right).to(x.dtype)
    while size > torch.finfo(x.dtype).eps:
        x = x - 0.5 * (x @ defect)
        defect, size = _defect(x), size * size
    return x


class _OrthogonalOptimizer(Optimizer):
    """R <- R Cayley(A) for every parameter that has a gradient; a subclass says A."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        if not defaults["lr"] >= 0:
            raise UsageError(f"A learning rate of {defaults['lr']} was asked for.", remedy="Give one of at least 0.")
        if defaults["stabilize"] < 1:
            raise UsageError(
                f"'stabilize' is {defaults['stabilize']}.",
                remedy="Give the number of steps, at least 1, to go without.",
            )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            shape, dtype = tuple(parameter.shape), parameter.dtype
            if len(shape) < 2 or shape[-1] != shape[-2] or dtype not in (torch.float32, torch.float64):
                self.param_groups.pop()
                raise UsageError(
                    f"A parameter {list(shape)} of {dtype} cannot be learned as a batch of orthogonal matrices.",
                    remedy="Give square matrices [..., n, n] in float32 or float64.",
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; the value of `closure`, if there is one. Raises NumericsError within `stabilize` steps of a
        gradient that was not finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._rotate(parameter, group)
        return loss

    def _rotate(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        state["step"] = int(state.get("step", 0)) + 1
        slope = parameter.mT @ parameter.grad
        change = _cayley_change(self._algebra_step(slope - slope.mT, state, group), group["iterations"])
        parameter.add_(parameter @ change)
        if state["step"] % group["stabilize"] == 0:
            parameter.copy_(polar(parameter))

    def _algebra_step(self, omega: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class RiemannianAdam(_OrthogonalOptimizer):
    """Adam (Kingma and Ba 2015) in so(n), after Becigneul and Ganea 2019:

        m <- b1 m + (1 - b1) Omega,    v <- b2 v + (1 - b2) s(Omega),    A = -lr m^ / (sqrt(v^) + eps)

    with m^ = m / (1 - b1^t), v^ = v / (1 - b2^t), and

    - `second_moment="entry"`: s = Omega * Omega, entry by entry, one scale for each plane of two coordinates. A stays
      skew, since v is symmetric. With slopes of a steady sign each coordinate turns by about lr radians a step against
      each other one; all together by lr sqrt(n (n - 1) / 2). Depends on the basis, as Adam does;
    - `"matrix"`: s = <Omega, Omega> = sum_{i<j} Omega_ij^2, one scale for each matrix of a batch: the metric's own
      inner product, the same in any basis. With a steady gradient the angles of the planes in which R turns satisfy
      sum angle^2 = lr^2 (to the fourth order in lr), whatever n is.

    So the two want different rates: where "entry" has lr, "matrix" has lr sqrt(n (n - 1) / 2) for as large a step.
    geoopt's RiemannianAdam on its Stiefel manifold, which OSTQuant uses, is "matrix" with *twice* the rate: for square
    R it retracts a tangent u = R D to Cayley(u R^T - R u^T) R = R Cayley(2 D). OSTQuant's 0.0169 is 0.0338 here.

    `params`: leaf tensors [..., n, n], float32 or float64, or groups of them; every `stabilize` steps each is replaced
    by its polar factor. State in the parameters' type: m [..., n, n]; v [..., n, n] or [..., 1, 1]; the step. Raises
    UsageError for parameters that are not square.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        second_moment: SecondMoment = "entry",
        stabilize: int = 10,
    ) -> None:
        if second_moment not in ("entry", "matrix"):
            raise UsageError(f"There is no second moment '{second_moment}'.", remedy="It is 'entry' or 'matrix'.")
        if not all(0 <= beta < 1 for beta in betas):
            raise UsageError(f"The decay rates are {betas}.", remedy="Give two numbers from 0 to below 1.")
        if not eps > 0:
            raise UsageError(f"An eps of {eps} was asked for.", remedy="Give one above 0: the diagonal's slope is 0.")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "second_moment": second_moment,
                "stabilize": stabilize,
                "iterations": None,
            },
        )

    def _algebra_step(self, omega: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        first, second = group["betas"]
        square = omega.square()
        if group["second_moment"] == "matrix":
            square = 0.5 * square.sum((-2, -1), keepdim=True)
        if "moment" not in state:
            state["moment"], state["square"] = torch.zeros_like(omega), torch.zeros_like(square)
        state["moment"].lerp_(omega, 1 - first)
        state["square"].mul_(second).add_(square, alpha=1 - second)
        scale = (state["square"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        return state["moment"] / scale * (-group["lr"] / (1 - first ** state["step"]))


class CayleySGD(_OrthogonalOptimizer):
    """SGD with momentum and the Cayley transform (Li, Fuxin and Todorovic 2020, algorithm 1; SpinQuant's optimiser):

        V <- momentum V + Omega / 2,    A = -min(lr, 1 / |V|_1) V,    R <- R Cayley(A)

    R Omega / 2 is the orthogonal projection of G on the tangent space, so lr is a rate for G: a plane in which V has
    the eigenvalue v turns by lr v radians. |V|_1, the largest column sum, is at least the spectral norm: no plane turns
    by more than about one radian a step.

    `iterations` = k replaces Cayley(A) by Y_k of the fixed-point iteration Y_0 = I + A, Y_{j+1} = I + A/2 (I + Y_j),
    which agrees with it up to A^(k+1); None solves exactly. For tall matrices the iteration saves time; for square ones
    it and the polar step after it take no less than the solve. A plane of angle a comes out off the manifold by
    a^4 / 4 at k = 2, so R is replaced by its polar factor every `stabilize` = 1 steps.

    Differs from the paper: V is kept in the body frame. There the moment is a matrix in space, projected at each new
    point, which shortens it by the cosines of the angles just turned. Differs from SpinQuant's code: that has 5
    iterations, divides rows by their length each step and takes a QR decomposition at one random step in 101; nothing
    is random here. Its momentum buffer is never written (the new moment goes into a temporary), so it runs without
    momentum whatever is asked; `momentum=0` is that.

    `params`, state and errors as for `RiemannianAdam`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        iterations: int | None = 2,
        stabilize: int = 1,
    ) -> None:
        if not 0 <= momentum < 1:
            raise UsageError(f"A momentum of {momentum} was asked for.", remedy="Give one from 0 to below 1.")
        if iterations is not None and iterations < 1:
            raise UsageError(f"{iterations} iterations were asked for.", remedy="Give at least 1, or None to solve.")
        super().__init__(params, {"lr": lr, "momentum": momentum, "iterations": iterations, "stabilize": stabilize})

    def _algebra_step(self, omega: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if "moment" not in state:
            state["moment"] = torch.zeros_like(omega)
        moment = state["moment"].mul_(group["momentum"]).add_(omega, alpha=0.5)
        largest = moment.abs().sum(-2, keepdim=True).amax(-1, keepdim=True)
        return -moment * largest.reciprocal().clamp(max=group["lr"])


def _cayley_change(a: Tensor, iterations: int | None) -> Tensor:
    """Cayley(a) - I: exact, or by fixed-point iterations."""
    if iterations is None:
        return torch.linalg.solve(torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) - 0.5 * a, a)
    change = a
    for _ in range(iterations):
        change = a + 0.5 * (a @ change)
    return change


def _defect(x: Tensor) -> Tensor:
    defect = x.mT @ x
    defect.diagonal(dim1=-2, dim2=-1).sub_(1)
    return defect


def _size(defect: Tensor) -> float:
    """The largest Frobenius norm in a batch; it bounds the largest singular value."""
    return float(torch.linalg.matrix_norm(defect).amax()) if defect.numel() else 0.0
