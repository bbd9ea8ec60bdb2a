"""Ten questions of a reader, each answered by opening one file, which alone has the line that does it.

A reader who had seen no code, README's "What is where" and the names of the files apart, guessed each of these files at
once (2026-11-30: ten of ten; fifteen of fifteen with the pooled BatchNorm statistics in training/encode.py, the allow
list of pickles in checkpoints/read.py, pairs by stem in data/folder.py, an option's default in options.py, best.ckpt in
training/checkpoints.py). An earlier one, before README's tree named the files of the step: seven of ten.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "train_clip"

# The question: the file, and the line in it that does it.
WHERE = {
    "Where is the temperature clamped?": ("models/clip.py", r"self\.logit_scale\.clamp_\("),
    "Where is a caption cut?": ("data/tokenizer.py", r"room = self\.context_length - 2"),
    "Where does a resumed run learn its position?": (
        "training/end_of_step.py",
        r'self\.consumed_batches.* = .*state_dict\["consumed_batches"\]',
    ),
    "Where are the loss's tiles?": ("losses/tiles.py", r"^TILE = "),
    "Where is a JPEG decoded at a reduced scale?": ("data/crops.py", r"simplejpeg\.decode_jpeg\("),
    "Where is a step held back that is not finite?": ("training/end_of_step.py", r"optimizer\.found_inf = "),
    "Where does weight decay leave out biases?": ("training/optimizer.py", r"key = .*parameter\.ndim >= 2"),
    "Where is the cosine schedule?": ("training/optimizer.py", r"math\.cos\(math\.pi"),
    "Where is a signal read?": ("training/signals.py", r"signal\.signal\(number, "),
    "Where is a file written beside and then renamed?": ("files.py", r"beside\.replace\(target\)"),
}


@pytest.mark.parametrize("question", WHERE)
def test_where(question):
    """One file of the package has the line."""
    file, code = WHERE[question]
    having = [
        path.relative_to(PACKAGE).as_posix()
        for path in sorted(PACKAGE.rglob("*.py"))
        if re.search(code, path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert having == [file]
