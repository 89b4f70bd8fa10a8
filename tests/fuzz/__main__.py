"""`make fuzz`: executions one after the other in a child process, watched for crashes and hangs by this one.

    python -m tests.fuzz --seconds 600                run, from execution 0
    python -m tests.fuzz --replay FOLDER              one finding again, with its traceback

A finding is a folder in `--findings`: `finding.json` says the number, the seed and the mutations, `input/` is what was
read. Exit code 1 when there is one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz.campaign import Campaign, quiet
from tests.fuzz.reader import read


def main() -> int:
    asked = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    asked.add_argument("--seconds", type=float, default=600.0)
    asked.add_argument("--first", type=int, default=0, help="number of the first execution")
    asked.add_argument("--findings", type=Path, default=Path("build/fuzz"))
    asked.add_argument("--replay", type=Path, default=None)
    given = asked.parse_args()
    quiet()
    if given.replay is not None:
        print(read(given.replay / "input", measure=True))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        campaign = Campaign(Path(scratch), given.findings)
        campaign.run(given.seconds, given.first)
    print(campaign.report())
    return 1 if campaign.counts["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
