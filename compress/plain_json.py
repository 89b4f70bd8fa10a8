"""JSON from files that somebody else wrote: parsed strictly, or refused with a reason.

`json.loads` takes more than JSON and hides what is wrong: of a key given twice it keeps the last value silently, it
takes NaN and Infinity, guesses the encoding, and ends in a RecursionError where the nesting is deep. Two readers of
such a text can see different things in it; one that checks a header and another that uses it must not.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from compress.errors import quoted


def parse_json(text: bytes | str, *, numbers: bool = True) -> Any:
    """The value of the JSON document `text` (bytes are UTF-8). NaN and infinities are refused unless `numbers` is
    False: configurations of some models have them.

    Raises `ValueError`, whose text is the reason: no JSON, a key given twice, half a character, deep nesting.
    """
    try:
        document = text.decode("utf-8") if isinstance(text, bytes) else text
        check = _finite if numbers else None
        value = json.loads(document, object_pairs_hook=_once, parse_constant=check, parse_float=check)
        if "\\ud" in document.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("a \\u escape is half of a character") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {quoted(twice)} is given twice")
    return table


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number
