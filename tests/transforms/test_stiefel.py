"""Riemannian optimisers against definitions written out plane by plane in float64, closed forms, geoopt's numbers."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from compress.errors import NumericsError, UsageError
from compress.transforms.stiefel import CayleySGD, RiemannianAdam, orthogonality, polar

Make = Callable[[list[Tensor], float], torch.optim.Optimizer]

MAKERS: dict[str, Make] = {
    "entry": lambda params, lr: RiemannianAdam(params, lr / 10),
    "matrix": lambda params, lr: RiemannianAdam(params, lr, second_moment="matrix"),
    "cayley": lambda params, lr: CayleySGD(params, lr),
    "cayley exact": lambda params, lr: CayleySGD(params, lr, iterations=None, stabilize=10),
}


def rotation(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random orthogonal matrices of either determinant, as leaves."""
    draws = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(draws)[0].to(dtype).requires_grad_()


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", [(1, 1), (4, 2, 2), (2, 2, 3, 3), (32, 32), (128, 128)], ids=str)
def test_stays_on_the_manifold(name: str, shape: tuple[int, ...]) -> None:
    """1,000 float32 steps with gradients that are half noise."""
    matrix, target = rotation(*shape), rotation(*shape, seed=1).detach()
    start, generator = matrix.detach().clone(), torch.Generator().manual_seed(2)
    optimizer, worst = MAKERS[name]([matrix], 0.05), 0.0
    for step in range(1000):
        matrix.grad = -target + torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        optimizer.step()
        if step % 37 == 0:
            worst = max(worst, orthogonality(matrix))
    assert max(worst, orthogonality(matrix)) <= 1e-5
    assert torch.linalg.det(matrix.detach()).round().equal(torch.linalg.det(start).round())
    assert shape[-1] == 1 or float((matrix.detach() - start).abs().max()) > 0.1


@pytest.mark.parametrize("name", MAKERS)
def test_procrustes(name: str) -> None:
    """min |X R - Y|_F over orthogonal R is the polar factor of X^T Y, taken here from a decomposition."""
    x = normal(3, 40, 6) * torch.linspace(0.5, 2, 6, dtype=torch.float64)
    y = x @ rotation(3, 6, 6, seed=5, dtype=torch.float64).detach() + 0.1 * normal(3, 40, 6, seed=6)
    left, _, right = torch.linalg.svd(x.mT @ y)
    best = left @ right
    matrix = rotation(3, 6, 6, seed=7, dtype=torch.float64)
    with torch.no_grad():
        matrix[..., 0] *= (torch.linalg.det(matrix) * torch.linalg.det(best)).sign().unsqueeze(-1)
    optimizer = MAKERS[name]([matrix], 0.5 if name in ("entry", "matrix") else 2.0)
    schedule, losses = CosineAnnealingLR(optimizer, 400), []
    for _ in range(400):
        optimizer.zero_grad()
        loss = (x @ matrix - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(matrix.detach(), best, rtol=0, atol=1e-6)
    least = float((x @ best - y).square().mean())
    assert losses[0] > 10 * least and losses[-1] == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (RiemannianAdam, {"betas": (0.0, 0.999)}),
        (RiemannianAdam, {"betas": (0.0, 0.999), "second_moment": "matrix"}),
        (CayleySGD, {"momentum": 0.0}),
    ],
)
def test_descends(optimizer: Any, options: dict[str, Any]) -> None:
    """Without momentum small steps never lead up."""
    matrix, factor = rotation(5, 8, 8, dtype=torch.float64), normal(5, 8, 8)
    optimizer, losses = optimizer([matrix], 1e-3, **options), []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (factor @ matrix).tanh().sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def smooth(matrix: Tensor) -> Tensor:
    places = torch.arange(matrix.numel(), dtype=matrix.dtype).view(matrix.shape)
    return (torch.sin(places + 1) * matrix + torch.cos(3 * places) * matrix.square()).sum()


def generator_of(i: int, j: int, n: int) -> Tensor:
    plane = torch.zeros(n, n, dtype=torch.float64)
    plane[i, j], plane[j, i] = 1, -1
    return plane


def slopes(matrix: Tensor) -> dict[tuple[int, int], float]:
    """dL / d angle for the rotation in each plane of two columns, by central differences."""
    n, small = matrix.shape[-1], 1e-5
    found = {}
    for plane in itertools.combinations(range(n), 2):
        ahead, behind = (
            float(smooth(matrix @ torch.linalg.matrix_exp(sign * small * generator_of(*plane, n)))) for sign in (1, -1)
        )
        found[plane] = (ahead - behind) / (2 * small)
    return found


def turned(matrix: Tensor, angles: dict[tuple[int, int], float]) -> Tensor:
    """R exp(2 arctan(A / 2)), which is what R Cayley(A) is; A from its coordinates."""
    n = matrix.shape[-1]
    a = torch.stack([angle * generator_of(*plane, n) for plane, angle in angles.items()]).sum(0)
    values, vectors = torch.linalg.eigh(-1j * a)
    logarithm = (vectors * (2j * torch.arctan(values / 2))) @ vectors.mH
    return matrix @ torch.linalg.matrix_exp(logarithm.real)


@pytest.mark.parametrize("name", ["entry", "matrix", "cayley exact"])
@pytest.mark.parametrize("n", [2, 4])
def test_steps_by_definition(name: str, n: int) -> None:
    """Every plane by itself, with scalars: Adam's moments, or momentum."""
    lr, first, second, eps = 0.3, 0.8, 0.95, 1e-3
    matrix = rotation(n, n, dtype=torch.float64)
    optimizer: torch.optim.Optimizer
    if name == "cayley exact":
        optimizer = CayleySGD([matrix], lr, first, iterations=None, stabilize=1000)
    else:
        optimizer = RiemannianAdam([matrix], lr, (first, second), eps, name, stabilize=1000)  # type: ignore[arg-type]
    expected = matrix.detach().clone()
    planes = list(itertools.combinations(range(n), 2))
    moment, square = dict.fromkeys(planes, 0.0), dict.fromkeys(planes, 0.0)
    for step in range(1, 5):
        slope = slopes(expected)
        if name == "cayley exact":
            moment = {p: first * moment[p] + slope[p] / 2 for p in planes}
            columns = [sum(abs(moment[p]) for p in planes if column in p) for column in range(n)]
            angles = {p: -min(lr, 1 / max(columns)) * moment[p] for p in planes}
        else:
            size = {p: slope[p] ** 2 if name == "entry" else sum(s * s for s in slope.values()) for p in planes}
            moment = {p: first * moment[p] + (1 - first) * slope[p] for p in planes}
            square = {p: second * square[p] + (1 - second) * size[p] for p in planes}
            angles = {
                p: -lr * moment[p] / (1 - first**step) / (math.sqrt(square[p] / (1 - second**step)) + eps)
                for p in planes
            }
        expected = turned(expected, angles)
        optimizer.zero_grad()
        smooth(matrix).backward()
        optimizer.step()
        torch.testing.assert_close(matrix.detach(), expected, rtol=0, atol=1e-7)


def test_geoopt() -> None:
    """Five steps of geoopt 0.5.1, RiemannianAdam([R], lr=0.0169) on Stiefel(), float64, from the R and with the
    gradients below."""
    a = torch.tensor([[0, 0.5, -0.25], [-0.5, 0, 1], [0.25, -1, 0]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    matrix = torch.linalg.solve(eye - a / 2, eye + a / 2).requires_grad_()
    optimizer = RiemannianAdam([matrix], 2 * 0.0169, second_moment="matrix", stabilize=1000)
    for step in range(5):
        matrix.grad = torch.sin(torch.arange(9, dtype=torch.float64).view(3, 3) * (step + 1) + step)
        optimizer.step()
    pinned = [
        [0.8983174432678409, 0.439346323868045, 0.0007608050765465638],
        [-0.24037359062850652, 0.49003324678471166, 0.8379068886063615],
        [0.36775849147108575, -0.7528892513173958, 0.5458126667654777],
    ]
    torch.testing.assert_close(matrix.detach(), torch.tensor(pinned, dtype=torch.float64), rtol=0, atol=1e-14)


def turn_angles(before: Tensor, after: Tensor) -> Tensor:
    """The angles of the rotation R^T R', one of each pair +-."""
    angles: Tensor = torch.linalg.eigvals(before.mT @ after).angle()
    return angles[angles > 0]


@pytest.mark.parametrize("lr", [1e-3, 0.0169, 0.5])
def test_rate_is_an_angle(lr: float) -> None:
    before = rotation(2, 2, dtype=torch.float64).detach()
    matrix = before.clone().requires_grad_()
    matrix.grad = normal(2, 2)
    RiemannianAdam([matrix], lr, eps=1e-12).step()
    assert turn_angles(before, matrix.detach()).sum().item() == pytest.approx(2 * math.atan(lr / 2), rel=1e-9)
    before = rotation(9, 9, dtype=torch.float64).detach()
    matrix = before.clone().requires_grad_()
    matrix.grad = normal(9, 9)
    RiemannianAdam([matrix], lr, eps=1e-12, second_moment="matrix").step()
    halves = torch.tan(turn_angles(before, matrix.detach()) / 2) * 2
    assert float(halves.square().sum()) == pytest.approx(lr**2, rel=1e-9)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_fixed_point(iterations: int) -> None:
    """In one plane the iteration is that of a complex number y = 1 + i a / 2 (1 + y); polar keeps its argument."""
    for lr in (0.01, 0.3):
        before = rotation(2, 2, dtype=torch.float64).detach()
        matrix = before.clone().requires_grad_()
        matrix.grad = normal(2, 2)
        slope = before.T @ matrix.grad
        a = -lr * float(slope[0, 1] - slope[1, 0]) / 2
        y = 1 + 1j * a
        for _ in range(iterations):
            y = 1 + 0.5j * a * (1 + y)
        CayleySGD([matrix], lr, iterations=iterations).step()
        turn = before.detach().T @ matrix.detach()
        assert math.atan2(float(turn[0, 1]), float(turn[0, 0])) == pytest.approx(math.atan2(y.imag, y.real), rel=1e-9)
        assert orthogonality(matrix) < 1e-14


def test_no_plane_turns_by_more_than_a_radian() -> None:
    matrix = rotation(16, 16, dtype=torch.float64)
    before = matrix.detach().clone()
    matrix.grad = 1e6 * normal(16, 16)
    CayleySGD([matrix], 1.0, iterations=None).step()
    assert 0.1 < float(turn_angles(before, matrix.detach()).max()) <= 1


def test_bases() -> None:
    """ "matrix" and Cayley SGD in so(n) do the same in any basis of the columns; "entry", like Adam, does not."""
    basis = rotation(6, 6, seed=3, dtype=torch.float64).detach()
    results = {}
    for name in ("entry", "matrix"):
        here = rotation(6, 6, dtype=torch.float64)
        there = (here.detach() @ basis).requires_grad_()
        optimizers = [MAKERS[name]([matrix], 0.1) for matrix in (here, there)]
        for step in range(5):
            here.grad = normal(6, 6, seed=step)
            there.grad = here.grad @ basis
            for optimizer in optimizers:
                optimizer.step()
        results[name] = float((here @ basis - there).detach().abs().max())
    assert results["matrix"] < 1e-12 and results["entry"] > 1e-3


@pytest.mark.parametrize("name", MAKERS)
def test_batches_are_matrices_by_themselves(name: str) -> None:
    whole = rotation(3, 5, 5, dtype=torch.float64)
    parts = [part.clone().requires_grad_() for part in whole.detach()]
    together, apart = MAKERS[name]([whole], 0.3), MAKERS[name](parts, 0.3)
    for step in range(6):
        gradient = normal(3, 5, 5, seed=step) * torch.tensor([1e-3, 1, 1e3], dtype=torch.float64).view(3, 1, 1)
        whole.grad = gradient
        for part, one in zip(parts, gradient, strict=True):
            part.grad = one.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(whole, torch.stack(parts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_resumes_bit_by_bit(name: str, tmp_path: Any) -> None:
    def run(matrices: list[Tensor], optimizer: torch.optim.Optimizer, schedule: Any, steps: range) -> None:
        for step in steps:
            for place, matrix in enumerate(matrices):
                matrix.grad = normal(*matrix.shape, seed=100 * place + step, dtype=torch.float32)
            optimizer.step()
            schedule.step()

    def make() -> tuple[list[Tensor], torch.optim.Optimizer, Any]:
        matrices = [rotation(2, 7, 7), rotation(3, 3, seed=1)]
        optimizer = MAKERS[name](matrices, 0.2)
        return matrices, optimizer, CosineAnnealingLR(optimizer, 30)

    unbroken = make()
    run(*unbroken, range(30))
    first = make()
    run(*first, range(13))
    torch.save([[m.detach() for m in first[0]], first[1].state_dict(), first[2].state_dict()], tmp_path / "state.pt")
    kept, optimizer_state, schedule_state = torch.load(tmp_path / "state.pt")
    later = make()
    for matrix, value in zip(later[0], kept, strict=True):
        matrix.data.copy_(value)
    later[1].load_state_dict(copy.deepcopy(optimizer_state))
    later[2].load_state_dict(schedule_state)
    run(*later, range(13, 30))
    assert all(a.equal(b) for a, b in zip(unbroken[0], later[0], strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_resumes_from_tensors_alone(name: str) -> None:
    """The state of a parameter may be kept as tensors, the step too, as a safetensors file would."""
    matrix = rotation(5, 5)
    optimizer = MAKERS[name]([matrix], 0.2)
    for step in range(7):
        matrix.grad = normal(5, 5, seed=step, dtype=torch.float32)
        optimizer.step()
    later = matrix.detach().clone().requires_grad_()
    resumed = MAKERS[name]([later], 0.2)
    resumed.state[later] = {key: torch.as_tensor(value).clone() for key, value in optimizer.state[matrix].items()}
    for step in range(7, 14):
        matrix.grad = normal(5, 5, seed=step, dtype=torch.float32)
        later.grad = matrix.grad.clone()
        optimizer.step()
        resumed.step()
    assert later.equal(matrix)


def test_only_what_has_a_gradient() -> None:
    still, moving = rotation(3, 3), rotation(3, 3, seed=1)
    before = still.detach().clone()
    optimizer = RiemannianAdam([{"params": [still]}, {"params": [moving], "lr": 0.5}], 0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = moving.sum()
        loss.backward()
        return loss.detach()

    start = float(moving.detach().sum())
    assert float(optimizer.step(closure)) == start
    assert still.equal(before) and float(moving.detach().sum()) < start


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [1e-6, 1e-2, 0.5])
def test_polar(dtype: torch.dtype, noise: float) -> None:
    x = rotation(4, 9, 9, dtype=torch.float64).detach() + noise * normal(4, 9, 9)
    left, _, right = torch.linalg.svd(x)
    found, exact = polar(x.to(dtype)), 1e-15 if dtype == torch.float64 else 1e-6
    assert found.dtype == dtype and orthogonality(found) < 10 * exact
    torch.testing.assert_close(found.double(), left @ right, rtol=0, atol=30 * exact)


def test_polar_of_anything() -> None:
    assert orthogonality(polar(torch.zeros(3, 3))) < 1e-6
    assert orthogonality(polar(1e4 * normal(5, 5))) < 1e-12
    assert polar(torch.zeros(0, 4, 4)).shape == (0, 4, 4)
    with pytest.raises(NumericsError, match="not finite"):
        polar(torch.full((2, 2), math.nan))


def test_orthogonality() -> None:
    x = normal(2, 3, 3)
    worst = max(
        abs(sum(float(m[k, i] * m[k, j]) for k in range(3)) - (i == j)) for m in x for i in range(3) for j in range(3)
    )
    assert orthogonality(x) == pytest.approx(worst)
    assert orthogonality(torch.eye(4)) == 0


def test_gradients_that_are_not_finite() -> None:
    matrix = rotation(3, 3)
    optimizer = RiemannianAdam([matrix], 0.1, stabilize=3)
    with pytest.raises(NumericsError, match="not finite"):
        for _ in range(3):
            matrix.grad = torch.full((3, 3), math.inf)
            optimizer.step()


@pytest.mark.parametrize(
    "parameter",
    [torch.zeros(3, 4), torch.zeros(5), torch.zeros(2, 2, dtype=torch.bfloat16)],
    ids=["wide", "1-d", "type"],
)
@pytest.mark.parametrize("optimizer", [RiemannianAdam, CayleySGD])
def test_refuses_parameters(optimizer: Any, parameter: Tensor) -> None:
    with pytest.raises(UsageError, match="square matrices"):
        optimizer([parameter.requires_grad_()], 0.1)
    good = optimizer([rotation(2, 2)], 0.1)
    with pytest.raises(UsageError, match="square matrices"):
        good.add_param_group({"params": [parameter]})
    assert len(good.param_groups) == 1


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (RiemannianAdam, {"lr": -1.0}, "learning rate of -1.0"),
        (RiemannianAdam, {"lr": math.nan}, "learning rate of nan"),
        (RiemannianAdam, {"lr": 0.1, "second_moment": "row"}, "no second moment 'row'"),
        (RiemannianAdam, {"lr": 0.1, "betas": (0.9, 1.0)}, "decay rates"),
        (RiemannianAdam, {"lr": 0.1, "stabilize": 0}, "'stabilize' is 0"),
        (RiemannianAdam, {"lr": 0.1, "eps": 0.0}, "eps of 0.0"),
        (CayleySGD, {"lr": 0.1, "momentum": 1.0}, "momentum of 1.0"),
        (CayleySGD, {"lr": 0.1, "iterations": 0}, "0 iterations"),
    ],
)
def test_refuses_options(optimizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        optimizer([rotation(2, 2)], **options)
