"""A user's source → its contents: a path, the name of an OpenAI model, a name on the Hugging Face hub."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import IO

from train_clip.checkpoints import state_dicts
from train_clip.checkpoints.read import EXPECTED, Contents, TensorRecord, read_file, read_json
from train_clip.errors import MissingFile, UserError, WrongType, did_you_mean, first_line
from train_clip.files import replacing, sweep

OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
HF_CONFIG, HF_WEIGHTS, HF_PIXELS = "config.json", "model.safetensors", "preprocessor_config.json"
HF_PROCESSOR = "processor_config.json"  # which transformers 5 writes in place of the one before
CONFIGS = (OPEN_CLIP_CONFIG, HF_CONFIG, HF_PIXELS, HF_PROCESSOR)
# In the order in which they are looked for; an index lists the files of a model in several.
WEIGHTS = (
    OPEN_CLIP_WEIGHTS, "open_clip_pytorch_model.bin", HF_WEIGHTS, "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # fmt: skip
SHARDED = ".metadata"  # in a folder that torch.distributed.checkpoint wrote

BEST, LAST = "best.ckpt", "last.ckpt"  # of a run's checkpoints

HUB = "hf-hub:"
SILENCE = 60.0  # seconds without a byte, after which a connection has broken off
STALE = 3600.0  # seconds after which a part of a download is nobody's: what goes on is written to all the time
URL = "https://openaipublic.azureedge.net/clip/models"
# SHA-256 of each file, which is a part of its address (openai/CLIP, clip.py, _MODELS).
OPENAI = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14-336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


def find_contents(source: str | Path) -> Contents:
    """Look into a source: a file, a folder, the name of an OpenAI model (``ViT-B/32``), or ``hf-hub:NAME``."""
    if not isinstance(source, str | os.PathLike):
        raise WrongType(f"The weights are given as a {type(source).__name__}; expected a path or a name.{EXPECTED}")
    name = str(source)
    if name.startswith(HUB):
        return _from_hub(name.removeprefix(HUB))
    if (known := openai_name(name)) is not None and not Path(name).exists():
        return read_contents(fetch_openai(known))
    return read_contents(Path(source).expanduser())


def read_contents(path: Path) -> Contents:
    """Look into a file, a folder written by Hugging Face or open_clip, or the best or last checkpoint of a run."""
    try:
        run = path if path.name == "checkpoints" else path / "checkpoints"
        path = next((run / name for name in (BEST, LAST) if (run / name).is_file()), path)
        if path.is_dir():
            return _gather(str(path), WEIGHTS)
        if path.is_file():
            return replace(_gather(str(path.parent), (path.name,)), path=path)
        kind = UserError if path.exists() else MissingFile
    except OSError as error:  # a name that is longer than names can be
        raise UserError(f"{path}: {error.strerror}.{EXPECTED}") from error
    meant = did_you_mean(str(path), [*OPENAI, "openai"])
    raise kind(f"{path}: no such file, or not a regular file.{meant}{EXPECTED}")


def _gather(folder: str, weights: tuple[str, ...]) -> Contents:
    """Look into a folder whose files are found by their names, here or on a hub: the first of the weights counts."""
    configs = {name: found for name in CONFIGS if (found := find_file(folder, name)) is not None}
    for name in weights:
        if (found := find_file(folder, name)) is None:
            continue
        tensors: dict[str, TensorRecord] = {}
        for part in _parts(found) if name.endswith(".index.json") else [name]:
            if (file := find_file(folder, part)) is None:
                raise UserError(f"{folder}: {name} lists {part}, which does not exist. Get the folder again.")
            contents = state_dicts.choose(read_file(file))
            tensors |= contents.tensors
        return replace(contents, path=Path(folder), tensors=tensors, configs=configs)
    if Path(folder, SHARDED).is_file():
        raise UserError(
            f"{folder}: a sharded checkpoint. Join its parts: python -m torch.distributed.checkpoint.format_utils "
            "dcp_to_torch FOLDER NEW.pt"
        )
    raise UserError(f"{folder}: a folder without weights; expected one of {', '.join(WEIGHTS)}.{EXPECTED}")


def _parts(index: Path) -> list[str]:
    """The files that an index lists; a path in place of a name would leave the folder."""
    listed = read_json(index).get("weight_map")
    parts = set(map(str, listed.values())) if isinstance(listed, dict) else set()
    if not parts or any(Path(part).name != part for part in parts):
        raise UserError(f"{index}: lists no files, or files outside its folder. Get the folder again.")
    return sorted(parts)


def openai_name(name: str) -> str | None:
    """OpenAI's model of a name, in any spelling (``ViT-B-32``, ``ViT-L/14@336px``); None where there is none."""
    by_name = {key.replace("/", "-"): key for key in OPENAI}
    return by_name.get(name.replace("/", "-").replace("@", "-"))


def fetch_openai(name: str) -> Path:
    """Find OpenAI's file of a model in the cache (``~/.cache/clip``, as their package has it), or download it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip"
    target, published = folder / f"{name.replace('/', '-')}.pt", OPENAI[name]
    address, other = f"{URL}/{published}/{target.name}", ""
    if target.is_file():
        if (found := _sha256(target)) == published:
            return target
        other = f" (the file there has SHA-256 {found}, not {published})"
    try:
        sweep(folder, STALE)
        with replacing(target) as beside:
            print(f"OpenAI's {name}: {address} → {target}{other}")
            _download(address, beside)
            if (found := _sha256(beside)) != published:
                raise ValueError(f"what came has SHA-256 {found}, not {published}")
    except Exception as error:  # whatever a network does, or a folder of that name
        raise UserError(
            f"OpenAI's {name} is not in {folder}{other}, and cannot be downloaded ({first_line(error)}). On a machine "
            f"with a network, download {address} and put it at {target}; or give another file."
        ) from error
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(address: str, target: Path) -> None:
    """Download into a file. Where a connection breaks off the next one goes on, as long as each brings something."""
    import urllib.request

    from rich.progress import wrap_file

    with target.open("wb") as file:
        left: int | None = 1
        while left:
            start = file.tell()
            request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"})
            with urllib.request.urlopen(request, timeout=SILENCE) as answer:
                if answer.status != HTTPStatus.PARTIAL_CONTENT:
                    file.seek(0)
                    file.truncate()
                with wrap_file(answer, answer.length or 0, description="Downloading") as body:
                    file.writelines(_blocks(body))
                left = answer.length  # None where the server does not tell
            if left and file.tell() <= start:
                raise ConnectionError(f"the connection broke off {left:,} bytes before the end")


def _blocks(body: IO[bytes]) -> Iterator[bytes]:
    # All that comes before a connection breaks off, in whatever way. What goes wrong on a disk is not raised here.
    with suppress(Exception):
        while block := body.read(2**16):
            yield block


def _from_hub(name: str) -> Contents:
    if not name:
        raise UserError(f"{HUB} without a name; expected {HUB}ORGANISATION/MODEL.")
    try:
        return _gather(name, WEIGHTS)
    except UserError as error:
        raise UserError(f"{HUB}{error}") from error
    except Exception as error:
        raise UserError(
            f"{HUB}{name}: not in this machine's cache, and cannot be downloaded ({first_line(error)}). On a machine "
            f"with a network run `pip install huggingface_hub` and `hf download {name} --local-dir FOLDER`, and give "
            "the folder."
        ) from error


def find_file(name: str, file: str) -> Path | None:
    """Find one of a model's files: in the folder, in the hub's cache, on the hub. None where the model has none."""
    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    if (cached := try_to_load_from_cache(name, file)) is not None:
        return Path(cached) if isinstance(cached, str) else None  # the cache also remembers that there is none
    try:
        return Path(hf_hub_download(name, file))
    except errors.LocalEntryNotFoundError:
        raise
    except errors.EntryNotFoundError:
        return None
