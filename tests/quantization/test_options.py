"""How a matrix is rounded: what can be asked for, and what is said of the rest."""

from __future__ import annotations

import math

import pytest

from compress.errors import UsageError
from compress.quantization.options import Ldlq, Nearest, rounding_of


def test_names_and_options() -> None:
    assert rounding_of("nearest") == Nearest()
    assert rounding_of("ldlq") == Ldlq()
    asked = {"damping": 0, "sweeps": 3, "order": False, "gain": "best", "sequential": "block", "fallback": "nearest"}
    made = rounding_of("ldlq", asked)
    assert made == Ldlq(damping=0.0, sweeps=3, order=False, gain="best", sequential="block", fallback="nearest")
    assert isinstance(made, Ldlq)
    assert isinstance(made.damping, float)
    assert rounding_of("ldlq", {"sequential": "nothing", "asymmetric": 0}) == Ldlq(sequential="nothing", asymmetric=0.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ldql", {}, r"no rounding 'ldql'.*Did you mean 'ldlq'\?"),
        ("gptq", {}, r"no rounding 'gptq'"),
        ("nearest", {"damping": 0.1}, r"'nearest' has no option 'damping'"),
        ("ldlq", {"dampin": 0.1}, r"no option 'dampin'.*Did you mean 'damping'\?"),
        ("ldlq", {"damping": "much"}, r"option 'damping' .* is 'much'"),
        ("ldlq", {"damping": True}, r"option 'damping' .* is True"),
        ("ldlq", {"damping": None}, r"option 'damping' .* is None"),
        ("ldlq", {"sweeps": 1.5}, r"option 'sweeps' .* is 1\.5"),
        ("ldlq", {"sweeps": True}, r"option 'sweeps' .* is True"),
        ("ldlq", {"order": 1}, r"option 'order' .* is 1"),
        ("ldlq", {"search": "yes"}, r"option 'search' .* is 'yes'"),
        ("ldlq", {"refit": 0}, r"option 'refit' .* is 0"),
        ("ldlq", {"gain": "longest"}, r"gain is 'longest'.*projection, norm, best"),
        ("ldlq", {"sequential": "layer"}, r"sequential is 'layer'.*matrix, block, nothing"),
        ("ldlq", {"fallback": "warn"}, r"fallback is 'warn'.*error, nearest"),
        ("ldlq", {"damping": -0.1}, r"damping -0\.1"),
        ("ldlq", {"damping": math.nan}, r"damping nan"),
        ("ldlq", {"damping": math.inf}, r"damping inf"),
        ("ldlq", {"sweeps": -1}, r"-1 sweeps"),
        ("ldlq", {"sweeps": 101}, r"101 sweeps"),
        ("ldlq", {"asymmetric": 1.5}, r"asymmetric 1\.5"),
        ("ldlq", {"asymmetric": -0.5}, r"asymmetric -0\.5"),
        ("ldlq", {"asymmetric": math.nan}, r"asymmetric nan"),
        ("ldlq", {"sequential": "nothing"}, r"asymmetric.*sequential=nothing,asymmetric=0"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(name: str, options: dict[str, float | str | bool | None], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        rounding_of(name, options)
    assert caught.value.remedy
    assert caught.value.exit_code == 2
