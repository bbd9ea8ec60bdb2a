"""What a user names → files: OpenAI's cache and downloads, the hub, paths; what is said without a network."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import inspect
import os
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import pytest
import torch
import yaml

from tests import forked
from tests.checkpoints.by_hand import tiny_clip
from tests.conftest import write_pairs
from train_clip import cli, load
from train_clip.checkpoints import sources
from train_clip.checkpoints.huggingface import write_huggingface
from train_clip.checkpoints.sources import OPENAI, URL, fetch_openai, find_contents, openai_name
from train_clip.commands.convert import write_model
from train_clip.errors import UserError
from train_clip.probes.calibration import beside
from train_clip.search.vectors import open_vectors

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


@dataclass
class Answer:
    """What the server does with a request.

    Args:
        content: of the file.
        cut: bytes after which it breaks off; None: never.
        ranges: whether it sends a part where one is asked for.
        tells: whether it tells the length.
        waits: seconds before it breaks off.
    """

    content: bytes
    cut: int | None = None
    ranges: bool = True
    tells: bool = True
    waits: float = 0.0


@dataclass
class Site:
    """A server: its next answers, the last of which it repeats, and what it was asked for, with the first byte."""

    answers: list[Answer]
    asked: list[tuple[str, int]]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """OpenAI's server, on this machine."""
    told = Site([], [])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = told.answers.pop(0) if len(told.answers) > 1 else told.answers[0]
            first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            told.asked.append((self.path, first))
            content = answer.content[first:] if answer.ranges else answer.content
            self.send_response(206 if answer.ranges else 200)
            if answer.tells:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: answer.cut])
            time.sleep(answer.waits)
            self.close_connection = True

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(sources, "URL", f"http://127.0.0.1:{server.server_port}")
    yield told
    server.shutdown()
    server.server_close()
    thread.join()


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


def test_a_download_is_checked_and_kept(cache: Path, published: bytes, site: Site) -> None:
    """Fetched once from the address that holds the checksum, and read from the cache afterwards."""
    site.answers = [Answer(published)]
    assert fetch_openai(MODEL).read_bytes() == published
    assert site.asked == [(f"/{hashlib.sha256(published).hexdigest()}/ViT-B-32.pt", 0)]
    assert fetch_openai(MODEL) == cache / "ViT-B-32.pt"
    assert len(site.asked) == 1
    assert set(find_contents("ViT-B-32").tensors) == set(find_contents(cache / "ViT-B-32.pt").tensors)
    assert names(cache) == ["ViT-B-32.pt"]


def test_another_file_in_the_cache_is_replaced(cache: Path, published: bytes, site: Site, capsys: Any) -> None:
    """As a download by OpenAI's package leaves it that was cut short: said with both checksums, and downloaded."""
    (cache / "ViT-B-32.pt").write_bytes(published[:-1])
    site.answers = [Answer(published)]
    assert fetch_openai(MODEL).read_bytes() == published
    told = capsys.readouterr().out
    assert all(hashlib.sha256(content).hexdigest() in told for content in (published, published[:-1]))
    assert names(cache) == ["ViT-B-32.pt"]


@pytest.mark.parametrize("here", [None, b"another"])
@pytest.mark.parametrize("tells", [True, False])
def test_another_file_on_the_server_is_not_kept(
    cache: Path, published: bytes, site: Site, here: bytes | None, tells: bool
) -> None:
    """A proxy's page, or an end too early: refused with both checksums, what was there stays, the next try works."""
    if here is not None:
        (cache / "ViT-B-32.pt").write_bytes(here)
    site.answers = [Answer(published[:-1], tells=tells)]
    message = refused(MODEL)
    for content in (published, published[:-1], here):
        assert content is None or hashlib.sha256(content).hexdigest() in message
    assert f"{sources.URL}/{OPENAI[MODEL]}/ViT-B-32.pt" in message
    assert str(cache / "ViT-B-32.pt") in message
    assert [path.read_bytes() for path in cache.iterdir()] == ([] if here is None else [here])
    site.answers = [Answer(published)]
    assert fetch_openai(MODEL).read_bytes() == published


@pytest.mark.parametrize("waits", [0.0, 1.0])
def test_a_connection_that_breaks_off_is_taken_up(
    cache: Path, published: bytes, site: Site, waits: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed, or silent for too long: the next one begins where it ended."""
    monkeypatch.setattr(sources, "SILENCE", 0.3)
    whole = 2**17
    site.answers = [Answer(published, whole, waits=waits), Answer(published, whole, waits=waits), Answer(published)]
    assert fetch_openai(MODEL).read_bytes() == published
    assert [first for _, first in site.asked] == [0, whole, 2 * whole]


def test_a_server_without_ranges_begins_again(cache: Path, published: bytes, site: Site) -> None:
    """It sends all of it each time; what came of it before is not kept beside it."""
    site.answers = [Answer(published, 2**17, ranges=False), Answer(published, ranges=False)]
    assert fetch_openai(MODEL).read_bytes() == published
    assert [first for _, first in site.asked] == [0, 2**17]


@pytest.mark.parametrize("ranges", [True, False])
def test_connections_that_bring_nothing_end(cache: Path, published: bytes, site: Site, ranges: bool) -> None:
    """Broken off at the same place each time: how much is missing, and nothing is left; the next try works."""
    nothing = Answer(published, 0 if ranges else 2**17, ranges)
    site.answers = [Answer(published, 2**17, ranges), nothing]
    assert f"broke off {len(published) - 2**17:,} bytes before the end" in refused(MODEL)
    assert names(cache) == []
    site.answers = [Answer(published, ranges=ranges)]
    assert fetch_openai(MODEL).read_bytes() == published


def test_what_a_kill_has_left_is_removed_when_it_is_nobodys(cache: Path, published: bytes, site: Site) -> None:
    """Parts of an hour ago; what was written to just now may be another process's."""
    for number, age in ((1, 4000), (2, 10)):
        part = cache / f"ViT-B-32.pt.tmp-{number}"
        part.write_bytes(b"PK")
        os.utime(part, (time.time() - age,) * 2)
    site.answers = [Answer(published)]
    fetch_openai(MODEL)
    assert names(cache) == ["ViT-B-32.pt", "ViT-B-32.pt.tmp-2"]


def test_two_processes_download_at_once(cache: Path, published: bytes, site: Site) -> None:
    """Each into a file of its own: both end with the whole one."""
    site.answers = [Answer(published, 2**17, waits=1.0), Answer(published, 2**17, waits=1.0), Answer(published)]
    program = "from train_clip.checkpoints import sources\n"
    program += f"sources.URL, sources.OPENAI[{MODEL!r}] = {sources.URL!r}, {OPENAI[MODEL]!r}\n"
    program += f"sources.SILENCE = 0.3\nprint(len(sources.fetch_openai({MODEL!r}).read_bytes()))"
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda _: forked.run(["-c", program]), range(2)))
    assert [one.stdout.splitlines()[-1] for one in ended] == [str(len(published))] * 2, ended
    assert names(cache) == ["ViT-B-32.pt"]


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
def test_no_network(cache: Path, published: bytes, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the network does: the address, where to put the file, the cause; and nothing is left in the cache."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("urllib.request.urlopen", fail)
    message = refused(MODEL)
    assert f"{URL}/{OPENAI[MODEL]}/ViT-B-32.pt" in message
    assert str(cache / "ViT-B-32.pt") in message
    cause = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    assert str(cause) in message
    assert names(cache) == []


def test_a_folder_in_place_of_the_file(cache: Path, published: bytes) -> None:
    """A folder of that name in the cache: refused by name."""
    (cache / "ViT-B-32.pt").mkdir()
    assert str(cache / "ViT-B-32.pt") in refused(MODEL)


def test_without_a_cache_of_ones_own(
    published: bytes, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XDG_CACHE_HOME unset, or empty, which its specification takes for unset: ~/.cache/clip, as OpenAI has it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for value in (None, ""):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if value is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        site.answers = [Answer(published)]
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


def test_what_a_model_of_the_hub_leaves_finds_it_again(
    hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings are searched, and a run's configuration is run again: both keep the name with its ``hf-hub:``."""
    monkeypatch.chdir(tmp_path)
    folder, name = write_pairs(tmp_path / "pairs", 4), "hf-hub:someone/tiny"
    cli.main(["embed", name, "--folder", str(folder), "--output", "x.npz", "--device", "cpu"])
    assert open_vectors("x.npz").about["checkpoint"] == name
    cli.main(["search", "x.npz", "a red hat", "--device", "cpu"])
    words = ["--max_steps", "1", "--batch_size", "2", "--accelerator", "cpu", "--val_share", "0"]
    cli.main(["train", "--pretrained", name, "--folder", str(folder), "--output", "run", *words])
    assert yaml.safe_load(Path("run/config.yaml").read_text())["pretrained"] == name
    cli.main(["train", "--config", "run/config.yaml", "--output", "again", *words])
    assert beside(name, "head.safetensors") == Path("tiny.head.safetensors")


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
