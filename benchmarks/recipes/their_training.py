"""open_clip's own training, with a model that it does not know by name. Runs in an environment that has it.

PEER/bin/python benchmarks/recipes/their_training.py MODEL.json [options of open_clip_train]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    import open_clip
    from open_clip_train.main import main

    open_clip.add_model_config(Path(sys.argv[1]))
    main(sys.argv[2:])
