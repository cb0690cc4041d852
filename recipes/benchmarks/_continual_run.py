"""One run of the benchmark of continual learning, in a process of its own: `python _continual_run.py JOB`, as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import _share_run
import numpy as np
from _answers import encoded
from _baselines import BaselineSettings, train
from _grid import Results, Run
from _plan import SHARE_METHODS
from _report import ROOT, machine, versions
from _streams import STREAMS, write_data
from routing import packaged_model
from transformers import AutoTokenizer


sys.path.insert(0, str(ROOT / "recipes"))
from text_tasks import load_text_task  # noqa: E402
