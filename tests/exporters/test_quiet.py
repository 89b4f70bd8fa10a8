"""What `quiet` swallows, and that it puts everything back."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from compress.exporters.quiet import quiet


def test_nothing_comes_out_within(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with quiet():
        print("progress")
        print("progress", file=sys.stderr)
        logging.getLogger("torch.onnx").warning("torchvision is not installed")
        warnings.warn("an axis is renamed", stacklevel=1)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_errors_are_still_logged(caplog: pytest.LogCaptureFixture) -> None:
    with quiet():
        logging.getLogger("torch.onnx").error("broken")
    assert [record.message for record in caplog.records] == ["broken"]


def test_all_is_as_before(caplog: pytest.LogCaptureFixture) -> None:
    streams, filters, disabled = (sys.stdout, sys.stderr), list(warnings.filters), logging.root.manager.disable
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert (sys.stdout, sys.stderr) == streams
    assert warnings.filters == filters
    assert logging.root.manager.disable == disabled
    logging.getLogger("torch.onnx").warning("heard")
    assert [record.message for record in caplog.records] == ["heard"]
