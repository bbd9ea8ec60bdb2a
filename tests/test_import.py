"""Importing any module of the package changes nothing of the process; what the libraries do is theirs."""

from __future__ import annotations

import ast
import csv
import decimal
import importlib
import json
import locale
import logging
import multiprocessing
import os
import pkgutil
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import train_clip

ROOT = Path(__file__).parents[1]


def modules() -> list[str]:
    """Every module of the package, the extensions among them."""
    return sorted(found.name for found in pkgutil.walk_packages(train_clip.__path__, "train_clip."))


def libraries() -> list[str]:
    """What the modules import from elsewhere when they are imported, each as it is named there."""
    found = {"torch._dynamo", "torch._inductor.config", "torch.fx.experimental._config", "PIL.ImageFile", "matplotlib"}
    for path in (ROOT / "train_clip").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return sorted(name for name in found if not name.startswith(("train_clip", "__future__")))


def state() -> dict[str, Any]:
    """What a library could change for everyone in the process, as text."""
    import matplotlib
    import numpy
    import torch
    from PIL import Image, ImageFile

    loggers = {"root": logging.getLogger()} | logging.root.manager.loggerDict
    switches = {
        name: importlib.import_module(name).get_config_copy()
        for name in ("torch._dynamo.config", "torch._inductor.config", "torch.fx.experimental._config")
    }
    return {
        "warnings.filters": [repr(one) for one in warnings.filters],
        "csv.field_size_limit": csv.field_size_limit(),
        "signal handlers": {str(number): repr(signal.getsignal(number)) for number in signal.valid_signals()},
        "loggers": {
            name: (one.level, one.propagate, one.disabled, list(map(repr, one.handlers + one.filters)))
            for name, one in loggers.items()
            if isinstance(one, logging.Logger) and (one.level or one.handlers or one.filters or one.disabled)
        },
        "logging": (logging.root.manager.disable, logging.raiseExceptions, repr(logging.getLoggerClass())),
        "os.environ": dict(os.environ),
        "hooks": [repr(hook) for hook in (sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook)],
        "sys.path and folder": (sys.path[:], str(Path.cwd()), sys.getrecursionlimit()),
        "Pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK),
        "matplotlib": repr(dict(matplotlib.rcParams)),
        "torch": (
            repr(torch.get_default_dtype()),
            torch.get_num_threads(),
            torch.get_num_interop_threads(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_grad_enabled(),
            torch.multiprocessing.get_sharing_strategy(),
            repr(torch.serialization.get_safe_globals()),
        ),
        "random numbers": (repr(random.getstate()), repr(numpy.random.get_state()), torch.get_rng_state().tolist()),
        "numpy": (repr(numpy.geterr()), repr(numpy.get_printoptions())),
        "others": (
            multiprocessing.get_start_method(allow_none=True),
            locale.setlocale(locale.LC_ALL),
            repr(decimal.getcontext()),
        ),
    } | {name: {key: repr(value) for key, value in values.items()} for name, values in switches.items()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """What of each kind was not there before."""

    def parts(value: Any) -> list[str]:
        return [repr(part) for part in value.items()] if isinstance(value, dict) else list(map(repr, value))

    changed = [name for name in before if before[name] != after[name]]
    return {
        name: " ".join(part for part in parts(after[name]) if part not in parts(before[name]))[:1000]
        if isinstance(after[name], dict | list | tuple)
        else f"{before[name]} → {after[name]}"[:1000]
        for name in changed
    }


def main() -> None:
    """Import the libraries, then each module, and print what each module changed as JSON."""
    for name in libraries():
        try:
            importlib.import_module(name)
        except ImportError:  # a class or a function
            continue
    found: dict[str, dict[str, str]] = {}
    before = state()
    for name in modules():
        importlib.import_module(name)
        after = state()
        if changed := differences(before, after):
            found[name] = changed
        before = after
    print(json.dumps(found))


def test_nothing_of_the_process_changes():
    """Warnings, limits, switches of the compiler, signals, loggers, environment, hooks, defaults and random numbers."""
    code = "from tests.test_import import main; main()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert not found, json.dumps(found, indent=1)


CHANGES = {
    "warnings.filters": "warnings.filterwarnings('ignore', message='x')",
    "csv.field_size_limit": "csv.field_size_limit(7)",
    "torch._dynamo.config": "torch._dynamo.config.recompile_limit = 3",
    "torch.fx.experimental._config": "torch.fx.experimental._config.use_duck_shape = False",
    "signal handlers": "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "loggers": "logging.getLogger('lightning').setLevel(10)",
    "os.environ": "os.environ['X_Y_Z'] = '1'",
    "hooks": "sys.excepthook = print",
    "Pillow": "PIL.Image.MAX_IMAGE_PIXELS = None",
    "torch": "torch.set_default_dtype(torch.float64)",
    "random numbers": "torch.rand(1)",
}


def test_what_would_be_seen():
    """Each kind of change is seen, and as that kind."""
    code = """
import csv, json, logging, os, signal, sys, warnings
import PIL.Image, torch, torch._dynamo, torch.fx.experimental._config
from tests.test_import import CHANGES, differences, state
seen = {}
for name, change in CHANGES.items():
    before = state()
    exec(change)
    seen[name] = list(differences(before, state()))
print(json.dumps(seen))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {name: [name] for name in CHANGES}
