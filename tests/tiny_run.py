"""Config file for subprocess tests: `tiny_run.py:FOLDER`, the folder of the tiny frozen networks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from training_support import tiny_config


def get_config(frozen: str):
    return tiny_config(frozen, total_steps=28, batch_size=4, checkpoint__every_steps=4)
