"""What a user names → the files on this disk: a path, a name of OpenAI's, a name on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import importlib
import os
from http.client import HTTPException
from pathlib import Path

from train_clip.checkpoints.read import Contents, gather_contents, read_contents
from train_clip.errors import UserError, first_line
from train_clip.files import replacing

HUB = "hf-hub:"
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
# OpenAI's own word for it.
SPELLINGS = {"ViT-L/14@336px": "ViT-L/14-336px"}
CHUNK = 2**20  # bytes read at a time


def find_contents(source: str | Path) -> Contents:
    """Look into what a user names.

    Args:
        source: a file, a folder, a name of OpenAI's (``ViT-B/32``), or ``hf-hub:NAME``.

    Raises:
        UserError: it is nowhere, cannot be fetched, or holds no weights.
    """
    name = str(source)
    if name == HUB:
        raise UserError(f"{HUB} without a name; expected {HUB}ORGANISATION/MODEL.")
    if name.startswith(HUB):
        return _from_hub(name.removeprefix(HUB))
    if (known := openai_name(name)) is not None and not Path(name).exists():
        return read_contents(fetch_openai(known))
    return read_contents(Path(source).expanduser())


def openai_name(name: str) -> str | None:
    """OpenAI's model of a name, in either of its spellings (``ViT-B-32``); None where there is none."""
    by_name = {key.replace("/", "-"): key for key in OPENAI} | {key.replace("/", "-"): key for key in SPELLINGS}
    found = by_name.get(name.replace("/", "-"))
    return SPELLINGS.get(found, found) if found is not None else None


def fetch_openai(name: str) -> Path:
    """OpenAI's file of a model, out of the cache (``~/.cache/clip``, as OpenAI's own package has it) or downloaded.

    Args:
        name: a key of ``OPENAI``.

    Raises:
        UserError: it cannot be downloaded, or is not the file that OpenAI published.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip"
    target, published = folder / f"{name.replace('/', '-')}.pt", OPENAI[name]
    address = f"{URL}/{published}/{target.name}"
    if target.exists() and not target.is_file():
        raise UserError(f"{target}: is no regular file; expected OpenAI's {name}. Move it away.")
    if not target.exists():
        _download(address, target, name)
    if (found := _sha256(target)) != published:
        raise UserError(
            f"{target}: its SHA-256 is {found}, that of OpenAI's {name} is {published}. Remove the file to have it "
            f"downloaded again, or put {address} there."
        )
    return target


def _download(address: str, target: Path, name: str) -> None:
    from torch.hub import download_url_to_file

    try:
        with replacing(target) as beside:
            print(f"OpenAI's {name}: {address} → {target}")
            download_url_to_file(address, str(beside))
    except (OSError, HTTPException) as error:
        raise UserError(
            f"OpenAI's {name} is not in {target.parent}, and cannot be downloaded from here "
            f"({getattr(error, 'reason', None) or first_line(error)}). Where there is a network fetch {address} and "
            f"put it at {target}; or give a file of your own."
        ) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _from_hub(name: str) -> Contents:
    try:
        return gather_contents(Path(name), lambda file: find_file(name, file))
    except UserError as error:
        raise UserError(f"{HUB}{error}") from error
    except ImportError as error:
        raise UserError(
            f"{HUB}{name}: names of the hub need huggingface_hub ({error}). Install it: pip install 'train-clip[hf]'."
        ) from error
    except Exception as error:
        raise UserError(
            f"{HUB}{name}: not in this machine's cache and not reachable ({first_line(error)}). Where there is a "
            f"network run `hf download {name} --local-dir FOLDER`, and give the folder."
        ) from error


def find_file(name: str, file: str) -> Path | None:
    """Find one of a model's files: in the folder, in the cache, on the hub. None where the model has none."""
    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    hub = importlib.import_module("huggingface_hub")
    errors = importlib.import_module("huggingface_hub.errors")
    cached = hub.try_to_load_from_cache(name, file)
    if cached is not None:
        return Path(cached) if isinstance(cached, str) else None  # the cache also remembers that there is none
    try:
        return Path(hub.hf_hub_download(name, file))
    except errors.LocalEntryNotFoundError:
        raise
    except errors.EntryNotFoundError:
        return None
