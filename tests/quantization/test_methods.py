"""What can be asked of a transform, how it is written, and what is said of the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.codecs import codec
from compress.codecs.dynamic import GroupQuantizer, TokenQuantizer
from compress.errors import UsageError
from compress.quantization.dynamic import Dynamic
from compress.quantization.methods import check_words, method_of, method_text
from compress.quantization.transforms import (
    TRANSFORMS,
    Auto,
    Hadamard,
    Ost,
    Untransformed,
    chosen_transform,
    parse_transform,
    transform_of,
)
from compress.recipe.method import parse_method
from compress.transforms.learned import PARTS


@dataclass(frozen=True)
class Sorting:
    """A method with one option of each kind."""

    name: ClassVar[str] = "sorting"
    passes: int = 3
    rate: float = 0.5
    stable: bool = True
    order: Literal["up", "down"] = "up"

    def __post_init__(self) -> None:
        check_words("sorter", self)


KNOWN = {"sorting": Sorting}


@settings(max_examples=60, deadline=None)
@given(
    passes=st.integers(-(10**6), 10**6),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    stable=st.booleans(),
    order=st.sampled_from(["up", "down"]),
)
def test_the_text_says_it_all(passes: int, rate: float, stable: bool, order: Any) -> None:
    """As text and back, in as many words as differ."""
    method = Sorting(passes, rate, stable, order)
    text = method_text(method)
    parsed = parse_method(text)
    assert method_of("sorter", KNOWN, parsed.name, parsed.options) == method
    assert parsed.options.keys() == {
        field.name for field in fields(method) if getattr(method, field.name) != field.default
    }


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sortin", {}, r"There is no sorter 'sortin'\. Did you mean 'sorting'\?"),
        ("other", {}, r"There is no sorter 'other'\. There are.*sorting"),
        ("sorting", {"pases": 1}, r"The sorter 'sorting' has no option 'pases'\. Did you mean 'passes'\?"),
        ("sorting", {"colour": 1}, r"no option 'colour'\. It takes.*passes"),
        ("sorting", {"passes": 1.0}, r"'passes' of the sorter 'sorting' is 1\.0\. Give a whole number"),
        ("sorting", {"passes": True}, r"'passes' .* is True\. Give a whole number"),
        ("sorting", {"rate": True}, r"'rate' .* is True\. Give a number"),
        ("sorting", {"rate": "high"}, r"'rate' .* is 'high'\. Give a number"),
        ("sorting", {"rate": None}, r"'rate' .* is None\. Give a number"),
        ("sorting", {"stable": 1}, r"'stable' .* is 1\. Give true or false"),
        ("sorting", {"order": True}, r"'order' .* is True\. Give a word"),
        ("sorting", {"order": "left"}, r"The sorter's order is 'left'\. It is one of up, down"),
    ],
    ids=str,
)
def test_what_a_method_does_not_take(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        method_of("sorter", KNOWN, name, options)
    assert caught.value.exit_code == 2


def test_a_whole_number_is_a_number() -> None:
    rate = method_of("sorter", KNOWN, "sorting", {"rate": 2}).rate
    assert rate == 2 and isinstance(rate, float)


def test_transforms_by_name() -> None:
    assert [parse_transform(name) for name in TRANSFORMS] == [Auto(), Untransformed(), Hadamard(), Ost()]
    assert parse_transform("ost:steps=30,scale_rate=1,tail=partial,gates=false") == Ost(
        steps=30, scale_rate=1.0, tail="partial", gates=False
    )
    assert transform_of("ost", {"kv": 4}) == Ost(kv=4)


@pytest.mark.parametrize(
    "text", ["ost", "ost:steps=1", "ost:k=5,tail=conditional,start=womi,residual=false,activations=4,kv=4,kv_group=16"]
)
def test_ost_is_written_as_it_was_asked_for(text: str) -> None:
    chosen = parse_transform(text)
    assert isinstance(chosen, Ost) and chosen.text == text


def test_what_ost_does() -> None:
    assert Ost().dynamic == Dynamic()
    assert Ost(activations=4, kv=8).dynamic == Dynamic(TokenQuantizer(4), GroupQuantizer(8))
    assert Ost(kv=4, kv_group=32).dynamic == Dynamic(kv=GroupQuantizer(4, 32))
    assert Ost().parts == PARTS
    for part in PARTS:
        options: dict[str, Any] = {part: False}
        assert Ost(**options).parts == tuple(other for other in PARTS if other != part)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("osst", r"no transform 'osst'\. Did you mean 'ost'\?"),
        ("hadamard:steps=3", r"'hadamard' has no option 'steps'"),
        ("ost:step=3", r"no option 'step'\. Did you mean 'steps'\?"),
        ("ost:steps=many", r"'steps' .* is 'many'"),
        ("ost:steps=0", r"0 steps, 8 rows a step and k = 1000"),
        ("ost:batch=0", r"0 rows a step"),
        ("ost:k=0", r"k = 0"),
        ("ost:tail=rest", r"tail is 'rest'\. It is one of residual, partial, renormalised, conditional"),
        ("ost:optimizer=sgd", r"optimizer is 'sgd'\. It is one of adam, cayley"),
        ("ost:start=random", r"start is 'random'\. It is one of hadamard, womi"),
        ("ost:rotation_rate=-0.1", r"rates -0\.1 and "),
        ("ost:scale_rate=1.5", r"rates [\d.]+ and 1\.5"),
        ("ost:activations=1", r"no activations of 1 bits"),
        ("ost:activations=9", r"no activations of 9 bits"),
        ("ost:kv=1", r"no activations of 1 bits"),
        ("ost:kv=4,kv_group=-1", r"group cannot have -1 channels"),
        (f"ost:{','.join(f'{part}=false' for part in PARTS)}", r"nothing to learn\. Leave one of residual, values"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_asked_of_a_transform(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_transform(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf])
def test_rates_are_numbers(rate: float) -> None:
    with pytest.raises(UsageError, match=f"rates .*{rate}"):
        Ost(rotation_rate=rate)
    with pytest.raises(UsageError, match=f"rates .*{rate}"):
        Ost(scale_rate=rate)


def test_auto_is_for_calibrated_half_pyramids_alone() -> None:
    half, integer = codec("half_pyramid"), codec("integer")
    assert chosen_transform(Auto(), half, calibrated=True) == Auto()
    assert chosen_transform(Auto(), half, calibrated=False) == Untransformed()
    assert chosen_transform(Auto(), half, calibrated=True, exported=True) == Untransformed()
    assert chosen_transform(Auto(), integer, calibrated=True) == Untransformed()
    for asked in (Ost(steps=3), Hadamard(), Untransformed()):
        assert chosen_transform(asked, integer, calibrated=False, exported=True) == asked
