"""What a user names → files: OpenAI's cache and downloads, the hub, paths; what is said without a network."""

from __future__ import annotations

import hashlib
import http.client
import inspect
import sys
import urllib.error
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import pytest
import torch

from tests.checkpoints.by_hand import tiny_clip
from train_clip import load
from train_clip.checkpoints import sources
from train_clip.checkpoints.huggingface import write_huggingface
from train_clip.checkpoints.sources import OPENAI, URL, fetch_openai, find_contents, openai_name
from train_clip.commands.convert import write_model
from train_clip.errors import UserError

MODEL = "ViT-B/32"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of OpenAI's files, elsewhere and empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "clip").mkdir(parents=True)
    return tmp_path / "cache" / "clip"


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bytes:
    """A file that stands for OpenAI's, a TorchScript archive's kin, with its true checksum in the table."""
    held = tiny_clip().state_dict()
    held |= {name: torch.tensor(16) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(held, tmp_path / "published.pt")
    content = (tmp_path / "published.pt").read_bytes()
    monkeypatch.setitem(OPENAI, MODEL, hashlib.sha256(content).hexdigest())
    return content


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the next downloads give, bytes or an error; and after them the addresses that were asked for."""
    answers: list[Any] = []

    def download(address: str, target: str, *_: Any, **__: Any) -> None:
        answer = answers.pop(0)
        answers.append(address)
        if isinstance(answer, BaseException):
            Path(target).write_bytes(b"PK half of it")
            raise answer
        Path(target).write_bytes(answer)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return answers


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(source: Any, **choices: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(source, **choices)
    return str(caught.value)


def test_the_table_is_openais() -> None:
    """Each checksum is 32 bytes and its own; each name that the package has a preset for."""
    assert all(len(bytes.fromhex(checksum)) == 32 for checksum in OPENAI.values())
    assert len(set(OPENAI.values())) == len(OPENAI) == 9


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("ViT-B/32", "ViT-B/32"),
        ("ViT-B-32", "ViT-B/32"),
        ("ViT-L/14@336px", "ViT-L/14-336px"),
        ("ViT-L-14@336px", "ViT-L/14-336px"),
        ("ViT-L-14-336px", "ViT-L/14-336px"),
        ("RN50x64", "RN50x64"),
        ("vit-b/32", None),
        ("ViT-B/32.pt", None),
        ("", None),
    ],
)
def test_names_in_their_spellings(name: str, found: str | None) -> None:
    """OpenAI's own, and as file names have them; by hand."""
    assert openai_name(name) == found


def test_a_download_is_checked_and_kept(cache: Path, published: bytes, downloads: list[Any]) -> None:
    """Fetched once from the address that holds the checksum, and read from the cache afterwards."""
    downloads.append(published)
    assert fetch_openai(MODEL).read_bytes() == published
    assert downloads == [f"{URL}/{hashlib.sha256(published).hexdigest()}/ViT-B-32.pt"]
    assert fetch_openai(MODEL) == cache / "ViT-B-32.pt"
    assert set(find_contents("ViT-B-32").tensors) == set(find_contents(cache / "ViT-B-32.pt").tensors)
    assert names(cache) == ["ViT-B-32.pt"]


def test_a_file_with_another_checksum(cache: Path, published: bytes, downloads: list[Any]) -> None:
    """In the cache, or as it was downloaded: the message has both checksums, the file, the address and what to do."""
    (cache / "ViT-B-32.pt").write_bytes(published + b"\0")
    downloads.append(published[:-1])
    for content in (published + b"\0", published[:-1]):
        message = refused(MODEL)
        for expected in (
            str(cache / "ViT-B-32.pt"),
            hashlib.sha256(content).hexdigest(),
            hashlib.sha256(published).hexdigest(),
            f"{URL}/{OPENAI[MODEL]}/ViT-B-32.pt",
            "Remove the file",
        ):
            assert expected in message
        (cache / "ViT-B-32.pt").unlink()
    assert names(cache) == []


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("Name or service not known"),
        urllib.error.HTTPError("https://x", 503, "Service Unavailable", None, None),  # type: ignore[arg-type]
        TimeoutError("timed out"),
        ConnectionResetError(104, "Connection reset by peer"),
        http.client.IncompleteRead(b"half"),
        http.client.RemoteDisconnected("Remote end closed connection"),
        OSError(28, "No space left on device"),
        TimeoutError(),
    ],
)
def test_no_network(cache: Path, published: bytes, downloads: list[Any], error: BaseException) -> None:
    """Whatever the network does: the address, where to put the file, the cause; and nothing is left in the cache."""
    downloads.append(error)
    message = refused(MODEL)
    assert f"{URL}/{OPENAI[MODEL]}/ViT-B-32.pt" in message
    assert str(cache / "ViT-B-32.pt") in message
    cause = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    assert str(cause) in message
    assert names(cache) == []


def test_a_folder_in_place_of_the_file(cache: Path, published: bytes, downloads: list[Any]) -> None:
    """A folder of that name in the cache: refused by name."""
    (cache / "ViT-B-32.pt").mkdir()
    assert str(cache / "ViT-B-32.pt") in refused(MODEL)


def test_without_a_cache_of_ones_own(
    published: bytes, downloads: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XDG_CACHE_HOME unset, or empty, which its specification takes for unset: ~/.cache/clip, as OpenAI has it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for value in (None, ""):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if value is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        downloads[:] = [published]
        assert fetch_openai(MODEL) == tmp_path / "home" / ".cache" / "clip" / "ViT-B-32.pt"


def test_a_path_of_a_models_name_is_the_path(
    cache: Path, published: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file called ViT-B-32 in the working directory is that file; nothing is asked of a network."""
    (tmp_path / "ViT-B-32").write_bytes(published)
    monkeypatch.chdir(tmp_path)
    assert find_contents("ViT-B-32").path == Path("ViT-B-32")


def test_a_path_from_home(tmp_path: Path, published: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """``~`` is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_contents("~/published.pt").path == tmp_path / "published.pt"


@pytest.mark.parametrize(
    "name", ["", ".", "nothing", "nothing.pt", "ViT-B/33", "hf-hubb:a/b", "https://a/b.pt", "a\0b"]
)
def test_what_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Says that there is nothing, and everything that a source may be."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    message = refused(name)
    assert "ViT-B/32" in message
    assert "hf-hub:NAME" in message


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A hub of one model, in a folder; ``error`` is raised in place of an answer."""
    folder = tmp_path / "model"
    folder.mkdir()
    model = tiny_clip()
    write_huggingface(model.config, model.state_dict(), folder)
    answers: dict[str, Any] = {"folder": folder, "error": None}

    def download(name: str, file: str, **_: Any) -> str:
        if answers["error"] is not None:
            raise answers["error"]
        if not (folder / file).is_file():
            raise huggingface_hub.errors.EntryNotFoundError("404")
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    return answers


def test_a_model_of_the_hub(hub: dict[str, Any]) -> None:
    """File by file, those that are not there passed over: the tensors of the same folder on disk."""
    found, local = load("hf-hub:someone/tiny").model, load(hub["folder"]).model
    assert all(torch.equal(value, local.state_dict()[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalEntryNotFoundError("Cannot find the file in the cache, and no connection."),
        huggingface_hub.errors.OfflineModeIsEnabled("Offline mode is enabled."),
        huggingface_hub.errors.HFValidationError("Repo id must be in the form"),
        ConnectionError("nothing there"),
        TimeoutError(),
        OSError(),
        OSError("\n"),
    ],
)
def test_the_hub_is_not_reachable(hub: dict[str, Any], error: BaseException) -> None:
    """Whatever is raised, with a message or without one: the name, the cause, and the command that gets it."""
    hub["error"] = error
    message = refused("hf-hub:someone/tiny")
    assert message.startswith("hf-hub:someone/tiny: ")
    assert "hf download someone/tiny --local-dir FOLDER" in message
    assert str(error).strip().rstrip(".") in message


def test_a_model_of_the_hub_that_is_damaged(hub: dict[str, Any]) -> None:
    """What lies there is told as if it lay here, the source being named."""
    (hub["folder"] / "model.safetensors").write_bytes(b"version https://git-lfs")
    assert refused("hf-hub:someone/tiny").startswith("hf-hub:")
    (hub["folder"] / "model.safetensors").unlink()
    message = refused("hf-hub:someone/tiny")
    assert "someone/tiny" in message
    assert "a folder without weights" in message


def test_without_the_hubs_package(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how to install it."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused("hf-hub:someone/tiny")


def test_a_name_of_nothing_on_the_hub(hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``hf-hub:`` alone is no folder, though the working directory holds a model."""
    monkeypatch.chdir(hub["folder"])
    hub["error"] = huggingface_hub.errors.HFValidationError("Repo id must be in the form")
    assert "hf-hub:" in refused("hf-hub:")
    assert sources.HUB == "hf-hub:"


# ``load`` from Python


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of this package's."""
    write_model(tiny_clip(), tmp_path / "clip.safetensors", "safetensors")
    return tmp_path / "clip.safetensors"


@pytest.mark.parametrize("name", ["gone.pt", "gone/clip.pt", "gone"])
def test_a_path_that_does_not_exist(tmp_path: Path, name: str) -> None:
    """Ours, and Python's own; a folder that is there is another fault."""
    for path in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(FileNotFoundError, match="no such file") as caught:
            load(path)
        assert isinstance(caught.value, UserError)
    with pytest.raises(UserError, match="folder without weights") as caught:
        load(tmp_path)
    assert not isinstance(caught.value, OSError)


@pytest.mark.parametrize("source", [["a.pt", "b.pt"], None, 3, b"a.pt", {"a": 1}, torch.zeros(2)])
def test_a_source_that_is_no_path(source: Any) -> None:
    """A list of paths, numbers, weights themselves: a TypeError of ours, which names what was found."""
    with pytest.raises(TypeError, match=f"given as a {type(source).__name__}; expected a path or a name") as caught:
        load(source)
    assert isinstance(caught.value, UserError)


def test_a_value_that_cannot_work_is_a_value_error(weights: Path) -> None:
    """Of an option; an option that does not exist is Python's TypeError."""
    with pytest.raises(ValueError, match="activation is 'relu'"):
        load(weights, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="modelname"):
        load(weights, modelname="a")  # type: ignore[call-arg]


def test_what_can_be_chosen_is_in_the_signature() -> None:
    """Each by its name, without a place for others."""
    parameters = inspect.signature(load).parameters.values()
    names = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    assert {"model_name", "activation", "image_size", "context_length", "backbone", "device", "dtype"} == set(names)
    assert all(one.kind is not one.VAR_KEYWORD for one in parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_of_ones_own(weights: Path, dtype: torch.dtype) -> None:
    """All weights have it, and embeddings are those of float32 within its precision."""
    whole = load(weights)
    other = load(weights, dtype=dtype, device="cpu")
    assert {value.dtype for value in other.model.state_dict().values() if value.is_floating_point()} == {dtype}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, whole.model.image_size, whole.model.image_size, generator=generator)
    tokens = other.tokenizer(["a dog", "two cats"])
    with torch.no_grad():
        for name, inputs in (("encode_image", images), ("encode_text", tokens)):
            expected, found = (getattr(one.model, name)(inputs) for one in (whole, other))
            assert found.dtype == dtype
            assert torch.allclose(torch.cosine_similarity(found.float(), expected), torch.ones(2), atol=1e-3), name


def test_a_device_of_ones_own(weights: Path) -> None:
    """Every weight lies there."""
    model = load(weights, device="meta").model
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}
