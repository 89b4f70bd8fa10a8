"""The bit budget: kept exactly, as near as widths allow (brute force over all assignments), groups never split."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from compress.codecs import CodecSpec, codec
from compress.errors import UsageError
from compress.modeling.loading import skeleton
from compress.modeling.structure import MatrixView, matrices
from compress.quantization.allocation import uniform
from tests import families

PYRAMID = codec("pyramid")
RATES = [2.0, 2.25, 3.0, 3.25, 3.5, 4.0, *(random.Random(0).uniform(2, 4) for _ in range(44))]
MEDIUM = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def views_of(**sizes: int) -> list[MatrixView]:
    return matrices(skeleton(families.config("llama", **sizes)))


def stored_bits(views: list[MatrixView], specs: Mapping[str, CodecSpec]) -> int:
    return sum(PYRAMID.bits(specs[view.name], view.shape) for view in views)


def of_widths(widths: Mapping[str, int]) -> dict[str, CodecSpec]:
    return {name: PYRAMID.spec(width) for name, width in widths.items()}


def weights(views: list[MatrixView]) -> int:
    return sum(view.weights for view in views)


def check_groups(views: list[MatrixView], specs: Mapping[str, CodecSpec]) -> None:
    by_group: dict[str, set[CodecSpec]] = {}
    for view in views:
        by_group.setdefault(view.group, set()).add(specs[view.name])
    assert all(len(found) == 1 for found in by_group.values())


@pytest.mark.parametrize("sizes", [{}, MEDIUM], ids=["tiny", "medium"])
def test_fifty_rates(sizes: dict[str, int]) -> None:
    views = views_of(**sizes)
    for bits in RATES:
        specs = uniform(views, PYRAMID, bits)
        rate = stored_bits(views, specs) / weights(views)
        assert rate <= bits
        assert rate >= bits - 0.02
        check_groups(views, specs)
        assert specs == uniform(views, PYRAMID, bits)
        assert specs.keys() == {view.name for view in views}
        assert all(spec == PYRAMID.spec(spec.width) for spec in specs.values())


def test_what_is_counted_is_what_is_stored() -> None:
    views = views_of()[:7]
    specs = uniform(views, PYRAMID, 3.25)
    generator = torch.Generator().manual_seed(0)
    found = 0
    for view in views:
        matrix = PYRAMID.quantize(torch.randn(view.shape, generator=generator), specs[view.name])
        found += 8 * matrix.payload().numel()
    assert found == stored_bits(views, specs)


@pytest.mark.parametrize("bits", [2.51, 3.25, 3.9])
def test_nearest_of_all_assignments(bits: float) -> None:
    """One block of four groups: every assignment of the widths around the budget, tried one by one."""
    views = views_of(num_hidden_layers=1)
    groups = sorted({view.group for view in views})
    near = [width for width in PYRAMID.widths() if abs(width / 16 - bits) < 0.35]
    best = 0
    for choice in itertools.product(near, repeat=len(groups)):
        widths = dict(zip(groups, choice, strict=True))
        total = stored_bits(views, of_widths({view.name: widths[view.group] for view in views}))
        if total <= bits * weights(views):
            best = max(best, total)
    found = stored_bits(views, uniform(views, PYRAMID, bits))
    assert found <= bits * weights(views)
    assert best - found <= 0.005 * weights(views)


def test_one_matrix_takes_the_widest_that_fits() -> None:
    view = MatrixView("w", "w.weight", None, (64, 64), 0, "w", "w")
    for bits in RATES:
        (spec,) = uniform([view], PYRAMID, bits).values()
        assert stored_bits([view], {"w": spec}) <= bits * view.weights
        if spec.width < PYRAMID.widths()[-1]:
            assert stored_bits([view], of_widths({"w": spec.width + 1})) > bits * view.weights


def test_ends_of_the_stack_and_small_groups_are_served_first() -> None:
    views = views_of(**MEDIUM)
    widths = {name: spec.width for name, spec in uniform(views, PYRAMID, 3.25).items()}
    wide, narrow = max(widths.values()), min(widths.values())
    by_block = [{widths[view.name] for view in views if view.block == block} for block in range(6)]
    assert wide == narrow + 1
    assert by_block[0] == by_block[5] == {wide}
    assert narrow in by_block[2] | by_block[3]


@pytest.mark.parametrize("bits", [0.5, 1.0, 5.0, float("nan"), float("inf"), -1.0])
def test_rates_out_of_reach(bits: float) -> None:
    with pytest.raises(UsageError, match=r"pyramid.*bits a weight, not in") as caught:
        uniform(views_of(), PYRAMID, bits)
    assert caught.value.exit_code == 2


def test_the_ends_of_the_range_can_be_asked_for() -> None:
    """Sizes whose rates are no short fractions: a rate times the weights is at times just below the bits it means."""
    for columns in range(33, 160, 2):
        view = MatrixView("w", "w.weight", None, (7, columns), 0, "w", "w")
        for width in (PYRAMID.widths()[0], 40, PYRAMID.widths()[-1]):
            specs = of_widths({"w": width})
            assert uniform([view], PYRAMID, stored_bits([view], specs) / view.weights) == specs
        with pytest.raises(UsageError, match="in "):
            uniform([view], PYRAMID, math.nextafter(stored_bits([view], of_widths({"w": 24})) / view.weights, 0))


def test_padding_is_never_paid_for() -> None:
    """A bound of 7 ends what bits can buy at 59 a group; a budget above is refused, with the range."""
    bounded = codec("pyramid", max=7)
    views = views_of(**MEDIUM)
    assert max(spec.width for spec in uniform(views, bounded, 3.6).values()) <= 59
    with pytest.raises(UsageError, match=r"in 1\.\d+ to 3\.7\d+ bits a weight, not in 4\.0"):
        uniform(views, bounded, 4.0)


def test_many_blocks_are_quick() -> None:
    """A model of 80 blocks with sizes that share few factors: sums are counted in rounded units, never over budget."""
    views = [
        MatrixView(f"{block}.{name}", "", None, (rows, columns), block, "", f"{block}.{name}")
        for block in range(80)
        for name, rows, columns in (("a", 8191, 8187), ("b", 28_657, 8191), ("c", 1023, 8190))
    ]
    rate = stored_bits(views, uniform(views, PYRAMID, 3.25)) / weights(views)
    assert 3.245 <= rate <= 3.25


def test_signs_of_mixed_sides_are_paid_for() -> None:
    """What `mixing` adds is a bit per channel of each mixed side, rounded up to bytes; it comes off the codes."""
    views = views_of(num_hidden_layers=1)
    words = dict(zip((view.name for view in views), itertools.cycle(["none", "input", "output", "both"]), strict=False))
    specs = uniform(views, PYRAMID, 4.0, words)
    assert {name: spec.mixing for name, spec in specs.items()} == words
    signs = 0
    for view in views:
        rows, columns = view.shape
        signs += 8 * math.ceil(rows / 8) * (words[view.name] in ("output", "both"))
        signs += 8 * math.ceil(columns / 8) * (words[view.name] in ("input", "both"))
    plain = {name: replace(spec, mixing="none") for name, spec in specs.items()}
    assert stored_bits(views, specs) == stored_bits(views, plain) + signs <= 4.0 * weights(views)
    assert stored_bits(views, plain) < stored_bits(views, uniform(views, PYRAMID, 4.0))
