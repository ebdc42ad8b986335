"""A benchmark asks, a script in the peers' interpreter runs: a line in for each run, a line of JSON out.

What the script's libraries print goes to standard error, so that only answers reach the benchmark.
"""

from __future__ import annotations

import json
import os
import sys


class Channel:
    """The script's end."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> None:
        """Returns when the next run is asked for; ends the script when nobody will ask any more."""
        if not sys.stdin.readline():
            raise SystemExit

    def answer(self, **measured: float) -> None:
        self._answers.write(json.dumps(measured) + "\n")
        self._answers.flush()
