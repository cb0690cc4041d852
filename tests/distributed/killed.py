"""The stream that tests kill, under a launcher.

python killed.py '{"folder": "out", "clock": "steps", "moment": 9, "rank": 1, …}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.continual.kill_server import run_stream


if __name__ == "__main__":
    options = json.loads(sys.argv[-1])  # deepspeed adds arguments of its own before it
    print(json.dumps(run_stream(Path(options.pop("folder")), **options)))
