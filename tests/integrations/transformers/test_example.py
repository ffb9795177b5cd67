"""The example runs as its first lines say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="this machine lacks transformers, which needs Python 3.11")

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "transformers_replicas.py"


def test_replicas_balance_and_change_no_bit():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.search(
        r"ranks: ([\d.]+) at first, ([\d.]+) with one more slot a rank\nlogits differ by 0e\+00", done.stdout
    )
    assert said is not None, done.stdout
    assert float(said[2]) <= float(said[1])
