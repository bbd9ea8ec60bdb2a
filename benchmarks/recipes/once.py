"""Runs a program that trains, once: what it leaves is read by whoever asks for the same words again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path


def run_once(run: Path, call: list[str]) -> float:
    """Run a program, unless it has been run to its end; one that was stopped begins anew, so that its time is whole.

    Args:
        run: the folder that it leaves.
        call: the program and its words.

    Returns:
        Its processor time in seconds.

    Raises:
        SystemExit: it failed, or the folder was left by other words.
    """
    ended, words = run / "ended.json", call[1:]
    if ended.exists():
        kept = json.loads(ended.read_text())
        if kept["words"] != words:
            sys.exit(f"{run} was trained by\n{' '.join(kept['words'])}\nin place of\n{' '.join(words)}\nMove it away.")
        return float(kept["seconds"])
    if run.exists():
        shutil.rmtree(run)
    run.parent.mkdir(parents=True, exist_ok=True)
    output = run.with_suffix(".txt")
    with output.open("w") as said:
        process = subprocess.Popen(call, stdout=said, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    if status or not run.exists():
        sys.exit(f"{' '.join(call)}\n{output.read_text()[-3000:]}")
    ended.write_text(json.dumps({"words": words, "seconds": used.ru_utime + used.ru_stime}))
    return float(used.ru_utime + used.ru_stime)
