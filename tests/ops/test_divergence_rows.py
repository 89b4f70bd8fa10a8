"""Rows of divergences by the compiled library: against definitions in float64 and autograd, for every instruction set.

The truth is written with log p, log q and log m of whole rows, as the papers have it; no function of the library is
used. Autograd gives its gradient. The temperature that the library can use is 1 / float32(1 / T), so the truth uses it.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress import ops
from compress.errors import CompressError
from compress.ops.native import DIVERGENCES, INSTRUCTIONS, NativeLibrary, find_library

WEIGHTS = (0.1, 0.5, 0.9)
CASES = [(kind, (w,)) for kind, count in DIVERGENCES.items() if count for w in WEIGHTS] + [
    (kind, ()) for kind, count in DIVERGENCES.items() if not count
]


@pytest.fixture(scope="module")
def library() -> NativeLibrary:
    path = find_library()
    if path is None:
        pytest.skip("the native library is not built")
    return NativeLibrary(path)


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, library: NativeLibrary) -> str:
    name: str = request.param
    if name not in library.instructions:
        pytest.skip(f"no {name} here")
    return name


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p log(p / q), in which a class with p = 0 counts nothing."""
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def mixture(w: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(w p + (1 - w) q)."""
    return torch.logaddexp(log_p + math.log(w), log_q + math.log1p(-w))


def jensen_shannon(log_p: Tensor, log_q: Tensor, w: float) -> Tensor:
    log_m = mixture(w, log_p, log_q)
    return w * kl(log_p, log_m) + (1 - w) * kl(log_q, log_m)


DEFINITIONS: dict[str, Callable[..., Tensor]] = {
    "kl": kl,
    "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
    "symmetric_kl": lambda log_p, log_q, w: w * kl(log_p, log_q) + (1 - w) * kl(log_q, log_p),
    "skew_kl": lambda log_p, log_q, w: kl(log_p, mixture(w, log_p, log_q)),
    "reverse_skew_kl": lambda log_p, log_q, w: kl(log_q, mixture(w, log_q, log_p)),
    "jensen_shannon": jensen_shannon,
    "total_variation": lambda log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1),
}


def truth(
    student: Tensor, teacher: Tensor, kind: str, options: tuple[float, ...], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Values [n] and their gradients [n, V], in float64."""
    used = 1 / float(np.float32(1 / temperature))
    logits = student.double().requires_grad_()
    log_p, log_q = (F.log_softmax(z / used, -1) for z in (teacher.double(), logits))
    values = DEFINITIONS[kind](log_p, log_q, *options)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    return values.detach(), gradient


def logits(rows: int, classes: int, distance: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of a student and a teacher; a KL divergence of about distance^2 / 2."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(rows, classes, generator=generator)
    return teacher + distance * torch.randn(rows, classes, generator=generator), teacher


def check(kind: str, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], vanishing: float = 2e-7) -> None:
    """Values to 1e-6 of themselves; gradients to 2e-6 of the largest of their row, or to `vanishing`: they are
    differences of a and q sum a, which are of the size of q.

    Total variation has the absolute error of p and q: it is at most 1.
    """
    assert torch.allclose(got[0].double(), want[0], rtol=1e-6, atol=2e-7 if kind == "total_variation" else 0)
    assert ((got[1] - want[1]).abs().amax(-1) <= 2e-6 * want[1].abs().amax(-1) + vanishing).all()


Case = tuple[str, tuple[float, ...]]
"""A kind and its options."""

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, (case[0], *case[1]))))


@every_case
def test_values_and_gradients(library: NativeLibrary, instructions: str, case: Case) -> None:
    for classes, temperature in ((7, 1.0), (17, 3.0), (4096, 1.0), (4099, 0.7)):
        student, teacher = logits(3, classes)
        gradient = torch.empty_like(student)
        values = library.divergence_rows(
            student, teacher, *case, temperature=temperature, gradient=gradient, instructions=instructions
        )
        check(case[0], (values, gradient), truth(student, teacher, *case, temperature))


@every_case
def test_a_large_vocabulary(library: NativeLibrary, case: Case) -> None:
    student, teacher = logits(1, 128_256)
    gradient = torch.empty_like(student)
    values = library.divergence_rows(student, teacher, *case, gradient=gradient)
    check(case[0], (values, gradient), truth(student, teacher, *case))


@pytest.mark.parametrize("kind", [kind for kind in DIVERGENCES if kind != "total_variation"])
def test_close_models_keep_their_digits(library: NativeLibrary, instructions: str, kind: str) -> None:
    student, teacher = logits(4, 40_000, distance=3e-3)
    gradient = torch.empty_like(student)
    case = (kind, (0.5,) * DIVERGENCES[kind])
    values = library.divergence_rows(student, teacher, *case, gradient=gradient, instructions=instructions)
    want = truth(student, teacher, *case)
    assert want[0].min() > 1e-7 and want[0].max() < 1e-5
    check(kind, (values, gradient), want, vanishing=0)


@every_case
def test_scale_and_absence_of_a_gradient(library: NativeLibrary, case: Case) -> None:
    student, teacher = logits(2, 100)
    gradient, scaled = torch.empty_like(student), torch.empty_like(student)
    values = library.divergence_rows(student, teacher, *case, temperature=2.0, gradient=gradient)
    four = library.divergence_rows(student, teacher, *case, temperature=2.0, scale=4.0, gradient=scaled)
    assert torch.equal(four, 4 * values)
    assert torch.equal(scaled, 4 * gradient)
    assert torch.equal(library.divergence_rows(student, teacher, *case, temperature=2.0), values)


@every_case
def test_the_gradient_may_replace_the_student(library: NativeLibrary, case: Case) -> None:
    student, teacher = logits(3, 1000)
    gradient = torch.empty_like(student)
    values = library.divergence_rows(student, teacher, *case, gradient=gradient)
    assert torch.equal(library.divergence_rows(student, teacher, *case, gradient=student), values)
    assert torch.equal(student, gradient)


@pytest.mark.parametrize(("rows", "classes"), [(1, 40_000), (3, 40_000), (5, 300)])
def test_threads_change_nothing(library: NativeLibrary, rows: int, classes: int) -> None:
    student, teacher = logits(rows, classes)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            gradient = torch.empty_like(student)
            found.append((library.divergence_rows(student, teacher, "skew_kl", (0.1,), gradient=gradient), gradient))
    finally:
        torch.set_num_threads(threads)
    for values, gradient in found[1:]:
        assert torch.equal(values, found[0][0])
        assert torch.equal(gradient, found[0][1])


@every_case
def test_one_class_and_no_rows(library: NativeLibrary, instructions: str, case: Case) -> None:
    student, teacher, gradient = torch.tensor([[3.0]]), torch.tensor([[-7.0]]), torch.full((1, 1), 9.0)
    values = library.divergence_rows(student, teacher, *case, gradient=gradient, instructions=instructions)
    assert values.item() == 0 and gradient.item() == 0
    none = torch.empty(0, 5)
    assert library.divergence_rows(none, none, *case, gradient=none, instructions=instructions).shape == (0,)


@every_case
def test_a_class_that_both_leave_out(library: NativeLibrary, instructions: str, case: Case) -> None:
    """It changes nothing, wherever it is: also where it fills whole blocks."""
    student, teacher = logits(2, 1500)
    absent = torch.full((2, 1100), -math.inf)
    wide = [torch.cat((z[:, :3], absent[:, :20], z[:, 3:], absent), 1) for z in (student, teacher)]
    gradient = torch.full_like(wide[0], 9.0)
    values = library.divergence_rows(*wide, *case, gradient=gradient, instructions=instructions)
    present = torch.cat((gradient[:, :3], gradient[:, 23:1520]), 1)
    check(case[0], (values, present), truth(student, teacher, *case))
    assert not gradient[:, 3:23].any() and not gradient[:, 1520:].any()


INFINITE_WITHOUT = {"student": {"kl", "symmetric_kl"}, "teacher": {"reverse_kl", "symmetric_kl"}}
"""The divergences that are infinite where this model leaves a class out."""


@pytest.mark.parametrize("side", INFINITE_WITHOUT)
@every_case
def test_a_class_that_one_leaves_out(library: NativeLibrary, instructions: str, case: Case, side: str) -> None:
    student, teacher = logits(1, 50)
    left_out = student if side == "student" else teacher
    left_out[0, 20] = -math.inf
    gradient = torch.empty_like(student)
    values = library.divergence_rows(student, teacher, *case, gradient=gradient, instructions=instructions)
    left_out[0, 20] = -1e4
    want = truth(student, teacher, *case)
    if case[0] in INFINITE_WITHOUT[side]:
        assert values.item() == math.inf
        values = want[0].float()
        if side == "teacher":  # the gradient is infinite too
            assert not gradient.any()
            return
    check(case[0], (values, gradient), want)


@every_case
def test_extreme_logits(library: NativeLibrary, instructions: str, case: Case) -> None:
    """u up to 2e4, one-hot rows on either side, logits far from each other, and classes 60 to 120 below the first."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (10 * torch.randn(6, 40, generator=generator) for _ in range(2))
    student[0, :2], teacher[0, :2] = torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4])
    student[1, 5] = 1e4
    teacher[2, 5] = 1e4
    student[3], teacher[3] = student[3] + 2**16, teacher[3] - 2**16
    student[4, 1:] -= 100
    teacher[5, 1:] -= 100
    gradient = torch.empty_like(student)
    values = library.divergence_rows(student, teacher, *case, gradient=gradient, instructions=instructions)
    want, want_gradient = truth(student, teacher, *case)
    assert torch.allclose(values.double(), want, rtol=2e-6, atol=2e-7)
    rounding = 1e-6 * want.clamp(min=1)  # of a and q sum a, whose difference the gradient is
    assert ((gradient - want_gradient).abs().amax(-1) < rounding).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("classes", [1, 40])
@every_case
def test_a_logit_that_is_no_number_shows(
    library: NativeLibrary, instructions: str, case: Case, classes: int, bad: float
) -> None:
    for side in (0, 1):
        pair = logits(2, classes)
        pair[side][1, -1] = bad
        gradient = torch.empty_like(pair[0])
        values = library.divergence_rows(*pair, *case, gradient=gradient, instructions=instructions)
        assert values[1].isnan() and gradient[1].isnan().all()
        assert values[0].isfinite() and gradient[0].isfinite().all()


def test_sum_over_many_equal_classes(library: NativeLibrary, instructions: str) -> None:
    """q uniform, and half of p on one class. Equal terms are rounded alike, which a long float32 sum shows."""
    classes = 2**20
    student = torch.zeros(1, classes)
    teacher = torch.zeros(1, classes)
    teacher[0, 777_777] = math.log(classes - 1)
    values = library.divergence_rows(student, teacher, "kl", instructions=instructions)
    p = torch.softmax(teacher.double(), -1)
    assert values.item() == pytest.approx(math.log(classes) + (p * p.log()).sum().item(), rel=1e-6)


def test_refusals(library: NativeLibrary) -> None:
    student, teacher = logits(4, 6)
    for kind, options in (("kl_divergence", ()), ("kl", (0.5,)), ("skew_kl", ()), ("skew_kl", (0.0,))):
        with pytest.raises(CompressError, match=kind):
            library.divergence_rows(student, teacher, kind, options)
    with pytest.raises(CompressError, match="temperature"):
        library.divergence_rows(student, teacher, "kl", temperature=0.0)
    with pytest.raises(CompressError, match="strides"):
        library.divergence_rows(student.t(), teacher.t(), "kl")
    with pytest.raises(CompressError, match="float64"):
        library.divergence_rows(student, teacher.double(), "kl")
    with pytest.raises(CompressError, match="gradient is"):
        library.divergence_rows(student, teacher, "kl", gradient=torch.empty(4, 5))
    with pytest.raises(CompressError, match="avx10"):
        library.divergence_rows(student, teacher, "kl", instructions="avx10")


def test_the_public_function(library: NativeLibrary) -> None:
    student, teacher = logits(2, 30)
    assert ops.native_divergences() == set(DIVERGENCES)
    values = ops.divergence_rows(student, teacher, "jensen_shannon", (0.3,), temperature=2.0)
    assert torch.allclose(values.double(), truth(student, teacher, "jensen_shannon", (0.3,), 2.0)[0], rtol=1e-6)


KERNEL = """
#include "divergence.cuh"
template <class Divergence>
__device__ void sum(Divergence divergence, const float* p, const float* q, const float* u, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const compress::Term term = divergence(p[i], q[i], u[i]);
  atomicAdd(out, term.f);
  atomicAdd(out + 1, term.a);
}
__global__ void all(const float* p, const float* q, const float* u, float w, float* out) {
  sum(compress::ForwardKL{}, p, q, u, out);
  sum(compress::ReverseKL{}, p, q, u, out + 2);
  sum(compress::SymmetricKL{w, 1 - w}, p, q, u, out + 4);
  sum(compress::SkewKL{w, 1 - w}, p, q, u, out + 6);
  sum(compress::ReverseSkewKL{w, 1 - w}, p, q, u, out + 8);
  sum(compress::JensenShannon{w, 1 - w}, p, q, u, out + 10);
  sum(compress::TotalVariation{}, p, q, u, out + 12);
  out[14] = compress::exp_negative(-u[0] * u[0]);
}
"""


def test_header_compiles_under_nvcc(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    folder = Path(__file__).resolve().parents[2] / "cuda"
    source = tmp_path / "kernel.cu"
    source.write_text(KERNEL)
    command = [nvcc, "-std=c++17", "-arch=sm_90", f"-I{folder}", "-cubin", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernel.cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kernel.cubin").stat().st_size > 0
