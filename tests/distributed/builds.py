"""Commands of share-hf that two processes run together. The second process is given other adapters at first.

python builds.py '{"folders": [of rank 0, of rank 1], "commands": [[in which folders, argv], …]}'
"""

from __future__ import annotations

import json
import os
import sys

from share_hf.cli import main


def run() -> None:
    options = json.loads(sys.argv[1])
    rank = int(os.environ["RANK"])
    codes = []
    for folders, argv in options["commands"]:
        os.chdir(folders[rank])
        codes.append(main(argv))
    os.chdir(options["report"])
    with open(f"codes{rank}.json", "w") as file:
        json.dump(codes, file)


if __name__ == "__main__":
    run()
