"""``train-clip embed``: against ``encode``, one image at a time; killed, in two processes, after changes."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import forked
from tests.conftest import TINY, said, write_pairs
from tests.docs.test_documents import ROOT, blocks
from tests.faults.command import Command, run
from train_clip import cli, estimates, files, load
from train_clip.checkpoints.found import fingerprint
from train_clip.checkpoints.own import write_safetensors
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict
from train_clip.search import embed, vectors

PAIRS, BATCH, PART = 90, 3, 48  # a part is a window of batches
# The command with small parts, each of which takes a moment, as torchrun starts it; what DIE names is the last it does.
SLOWLY = f"""
import os, shutil, signal, time
from pathlib import Path
from train_clip import cli
from train_clip.search import embed

os.environ.setdefault("RANK", os.environ.get("LOCAL_RANK", "0"))
embed.LEAST_ROWS = {PART}
slow, savez = float(os.environ.get("SLOW", 0)), embed.np.savez

def save(*given, **arrays):
    time.sleep(slow)
    savez(*given, **arrays)
    while os.environ.get("HOLD") and Path(os.environ["HOLD"]).exists():
        time.sleep(0.01)

def die(*given, **how):
    os.kill(os.getpid(), signal.SIGKILL)

embed.np.savez = save
if os.environ.get("DIE") == "at the end":
    shutil.rmtree = die
if os.environ.get("DIE") == "before the move":
    embed.vectors.files_of = lambda output, known=embed.vectors.files_of: known(output)
    Path.replace = lambda file, target, known=Path.replace: known(file, target) if "tmp" in file.name else die()
cli.main()
"""
PROGRAM = ("-c", SLOWLY)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model.safetensors")


def save_model(file: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = config_from_dict(TINY)
    write_safetensors(config, CLIP(config).state_dict(), file)
    return file


def command(*words: object) -> list[str]:
    return ["embed", *map(str, words), "--batch_size", str(BATCH), "--num_workers", "1", "--device", "cpu"]


def matrix(file: Path) -> np.ndarray:
    return np.concatenate(list(vectors.open_vectors(file).blocks()))


def digests(output: Path) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in vectors.files_of(output)]


@pytest.mark.parametrize("ending", [".parquet", ".npz", ".npy"])
def test_rows_are_those_of_encode(ending: str, model: Path, tmp_path: Path) -> None:
    """Every image of a folder by the order of names, one without a caption too; each alone by ``encode``."""
    folder = write_pairs(tmp_path / "data", 7)
    (folder / "003.txt").unlink()
    (folder / "sub").mkdir()
    for name in ("005.png", "005.txt"):
        (folder / name).rename(folder / "sub" / f"é {name}")
    output = tmp_path / "out" / f"x{ending}"
    cli.main(command(model, "--folder", folder, "--output", output))
    opened, loaded = vectors.open_vectors(output), load(model)
    names = ["000.png", "001.png", "002.png", "003.png", "004.png", "006.png", "sub/é 005.png"]
    assert list(opened.keys) == list(opened.paths) == names
    assert list(opened.captions) == [f"picture {n}" if n != 3 else "" for n in (0, 1, 2, 3, 4, 6, 5)]
    alone = np.concatenate([loaded.encode(folder / name) for name in names])
    np.testing.assert_allclose(matrix(output), alone, atol=1e-6)
    together = loaded.encode([folder / name for name in names], batch_size=BATCH)
    np.testing.assert_array_equal(matrix(output), together)
    about = opened.about
    assert (about["kind"], about["normalized"], about["model"], about["dim"]) == ("image", True, "tiny", 16)
    assert (about["root"], about["source"]) == (str(folder), str(folder))
    again = load(about["checkpoint"], **about["weights"]).model
    assert fingerprint(again) == fingerprint(loaded.model) == about["fingerprint"]
    assert sorted(file.name for file in output.parent.iterdir()) == sorted(f.name for f in vectors.files_of(output))


def test_every_caption(model: Path, tmp_path: Path) -> None:
    """A row for each line, in order, whatever the lengths within a window; what cannot be read is named."""
    folder, texts = write_pairs(tmp_path / "data", 60), {}
    for number in range(60):
        texts[f"{number:03}.png"] = [
            " ".join(["word"] * (number * 7 % 12)) + f" {line}" for line in range(number % 3 + 1)
        ]
        (folder / f"{number:03}.txt").write_text("\n".join(texts[f"{number:03}.png"]))
    (folder / "007.txt").write_bytes(b"\xff\xfe")
    del texts["007.png"]
    words = command(model, "--folder", folder, "--what", "captions", "--output", tmp_path / "x.npz")
    text = run(words, PROGRAM).require(0).text
    assert "Captions that cannot be read: 1." in text and "007.txt: caption is UTF-16" in text
    opened = vectors.open_vectors(tmp_path / "x.npz")
    rows = [(name, caption.strip()) for name, captions in texts.items() for caption in captions]
    assert list(zip(opened.keys, opened.captions, strict=True)) == rows and opened.about["kind"] == "caption"
    alone = np.concatenate([load(model).encode(caption) for _, caption in rows])
    np.testing.assert_allclose(matrix(tmp_path / "x.npz"), alone, atol=1e-6)


def test_a_table_and_half_precision(model: Path, tmp_path: Path) -> None:
    """Paths below the table's folder and from elsewhere; float16 is float32, rounded."""
    top = tmp_path / "top"
    (write_pairs(top / "data", 4) / "003.png").rename(tmp_path / "far.png")
    far = str(tmp_path / "far.png")
    (top / "t.csv").write_text(f'image,caption\ndata/001.png,"a, b"\n{far},far\ndata/001.png,second\n')
    for dtype in ("float32", "float16"):
        output = tmp_path / f"{dtype}.npy"
        cli.main(command(model, "--pairs", top / "t.csv", "--output", output, "--dtype", dtype))
        opened = vectors.open_vectors(output)
        assert (list(opened.paths), list(opened.captions)) == ([far, "data/001.png"], ["far", "a, b"])
        assert (opened.about["source"], opened.about["root"]) == (str(top / "t.csv"), str(top))
    single, half = (np.load(tmp_path / f"{dtype}.npy") for dtype in ("float32", "float16"))
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, single.astype(np.float16))


def test_arrays_in_place_of_images(model: Path, tmp_path: Path) -> None:
    """A cached array gives its image's row; float arrays, already normalized, stand among images; names are images'."""
    folder = write_pairs(tmp_path / "data", 5)
    cli.main(command(model, "--folder", folder, "--output", tmp_path / "a.npz"))
    cli.main(["data", "npz", str(folder), "--image_size", "16", "--num_workers", "0"])
    (folder / "002.png").write_bytes(b"is not looked at")
    cli.main(command(model, "--folder", folder, "--output", tmp_path / "b.npz"))
    np.testing.assert_array_equal(matrix(tmp_path / "a.npz"), matrix(tmp_path / "b.npz"))
    assert list(vectors.open_vectors(tmp_path / "b.npz").keys) == [f"{number:03}.png" for number in range(5)]
    shutil.rmtree(folder / "npz")
    pixels = load(model).preprocess(folder / "001.png").numpy()
    (folder / "001.png").unlink()
    np.savez(folder / "001.npz", data=pixels)
    cli.main(command(model, "--folder", folder, "--output", tmp_path / "c.npz"))
    expected = matrix(tmp_path / "a.npz")[[0, 1, 3, 4]]
    np.testing.assert_allclose(matrix(tmp_path / "c.npz"), expected, atol=1e-6)


def test_a_run_of_visual_prompts(model: Path, tmp_path: Path) -> None:
    """Its folder stands for its checkpoint; what loads it again stands in the file, its backbone, moved, too."""
    folder, moved = write_pairs(tmp_path / "data", 8), tmp_path / "moved.safetensors"
    shutil.copyfile(model, tmp_path / "m.safetensors")
    words = [
        "prompt-tune",
        "--pretrained",
        tmp_path / "m.safetensors",
        "--folder",
        folder,
        "--output",
        tmp_path / "run",
    ]
    cli.main([str(word) for word in [*words, "--max_steps", 1, "--batch_size", 4, "--accelerator", "cpu"]])
    (tmp_path / "m.safetensors").rename(moved)
    cli.main(command(tmp_path / "run", "--folder", folder, "--output", tmp_path / "x.npz", "--backbone", moved))
    about = vectors.open_vectors(tmp_path / "x.npz").about
    assert about["checkpoint"].startswith(str(tmp_path / "run")) and about["weights"] == {"backbone": str(moved)}
    again = load(about["checkpoint"], **about["weights"])
    assert fingerprint(again.model) == about["fingerprint"] != fingerprint(load(model).model)
    alone = again.encode(sorted(folder.glob("*.png")))
    np.testing.assert_allclose(matrix(tmp_path / "x.npz"), alone, atol=1e-6)


def test_parts_of_the_next_command_stay(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes the folder as soon as it is given back loses nothing to the one that has ended."""
    part = tmp_path / "x.npz.parts" / "next.part"

    @contextmanager
    def held(folder: Path) -> Iterator[None]:
        with files.held(folder):
            yield
        folder.mkdir(exist_ok=True)
        part.touch()

    monkeypatch.setattr(embed, "held", held)
    cli.main(command(model, "--folder", write_pairs(tmp_path / "data", 2), "--output", tmp_path / "x.npz"))
    assert [*part.parent.iterdir()] == [part]


def test_processes_that_cannot_meet(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        cli.main(command(model, "--folder", write_pairs(tmp_path / "data", 2), "--output", tmp_path / "x.npz"))
    assert "WORLD_SIZE is 2; " in said(stop) and "by torchrun" in said(stop)


def test_images_that_cannot_be_read(model: Path, tmp_path: Path) -> None:
    """No rows; the others' are as without them; counted and named, after a kill too."""
    folder = write_pairs(tmp_path / "data", PAIRS)
    bad = [3, 4, 5, 50, 89]
    for number in bad:
        (folder / f"{number:03}.png").write_bytes(b"GIF89a \x1b[31m")
    (folder / "007.txt").write_bytes(b"\xff\xfe")
    words = command(model, "--folder", folder, "--output", tmp_path / "x.npz")
    run(words, PROGRAM, DIE="before the move").require(-signal.SIGKILL)
    text = run(words, PROGRAM).require(0).text
    assert "Images that cannot be read: 5." in text and "Captions that cannot be read: 1." in text
    assert text.count("image cannot be") + text.count("not an image") + text.count(".png: ") >= 5, text
    kept = [number for number in range(PAIRS) if number not in bad]
    opened, found = vectors.open_vectors(tmp_path / "x.npz"), matrix(tmp_path / "x.npz")
    assert list(opened.keys) == [f"{number:03}.png" for number in kept]
    assert list(opened.captions) == ["" if number == 7 else f"picture {number}" for number in kept]
    alone = load(model).encode([folder / f"{number:03}.png" for number in kept])
    np.testing.assert_allclose(found, alone, atol=1e-6)


def test_nothing_to_embed(model: Path, tmp_path: Path) -> None:
    """No image that can be read, none at all, no captions: said, and no file is written."""
    folder = write_pairs(tmp_path / "data", 2)
    for image in folder.glob("*.png"):
        image.write_bytes(b"")
    words = command(model, "--folder", folder, "--output", tmp_path / "x.npz")
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert "000.png: " in said(stop) and "none of the 2 images can be read" in said(stop)
    for text in folder.glob("*.txt"):
        text.write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--what", "captions"])
    assert "000.txt: caption is empty; none of the 2 files of captions" in said(stop)
    for text in folder.glob("*.txt"):
        text.unlink()
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--what", "captions"])
    assert "0 pairs among 2 files" in said(stop)
    for image in folder.glob("*.png"):
        image.unlink()
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert "0 pairs among 0 files" in said(stop)
    assert not (tmp_path / "x.npz").exists()


def test_it_refuses_before_it_embeds(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that exists, of several files any; another ending; no room; a folder that is the user's."""
    folder = write_pairs(tmp_path / "data", 2)
    monkeypatch.setattr(embed, "batches", None)

    def refused(output: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(command(model, "--folder", folder, "--output", tmp_path / output))
        return said(stop)

    (tmp_path / "x.npz").write_bytes(b"mine")
    assert "x.npz: already exists, and is not overwritten" in refused("x.npz")
    (tmp_path / "y.csv").write_bytes(b"mine")
    assert "y.csv: already exists" in refused("y.npy")
    assert "q.npz: lies in" in refused("data/q.npz")
    assert "z.pt: a file of embeddings ends in .parquet, .npz, .npy" in refused("z.pt")
    (tmp_path / "u.npz.parts").mkdir()
    (tmp_path / "u.npz.parts" / "holiday.jpg").touch()
    assert "holds 'holiday.jpg' already" in refused("u.npz")
    monkeypatch.setattr(estimates.shutil, "disk_usage", lambda _: SimpleNamespace(total=1e12, free=100))
    assert "Expected room for" in refused("z.npz")
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.csv").read_bytes() == b"mine"


@pytest.fixture(scope="module")
def inputs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The words that embed some images, the output's name to follow; and a folder of outputs of an undisturbed run."""
    top = tmp_path_factory.mktemp("alone")
    words = command(model, "--folder", write_pairs(top / "data", PAIRS * 5))
    for ending in (".npy", ".npz", ".parquet"):
        run([*words, "--output", str(top / f"alone{ending}")], PROGRAM).require(0)
    return words, top


@pytest.mark.parametrize("ending", [".npy", ".parquet", *[pytest.param(".npz", marks=pytest.mark.slow)] * 6])
def test_a_killed_command_resumes_to_the_bit(
    ending: str, inputs: tuple[list[str], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """SIGKILL at random moments, by the test's name, then at two in the end: the bytes of a run that was left alone."""
    (words, top), rng, there = inputs, random.Random(request.node.name), [0]
    output = tmp_path / f"x{ending}"
    words = [*words, "--output", str(output)]
    while there[-1] < 7:
        process, least = Command(words, PROGRAM, SLOW="0.1"), there[-1] + rng.randrange(3)
        process.wait_for(lambda least=least: len(parts(output)) > least, "further parts")
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.end()
        there.append(len(parts(output)))
        assert not output.exists()
    print(f"killed with {there[1:]} parts written")
    for moment in ("before the move", "at the end"):
        text = run(words, PROGRAM, DIE=moment).require(-signal.SIGKILL).text
        assert "Embedded already: " in text
        assert output.exists() == (moment == "at the end")
    text = run(words, PROGRAM).require(0).text
    assert f"Embedded already: {PAIRS * 5}." in text
    assert digests(output) == digests(top / f"alone{ending}")
    assert sorted(tmp_path.iterdir()) == sorted(vectors.files_of(output))
    assert "already exists" in run(words, PROGRAM).require(1).text


def parts(output: Path) -> list[Path]:
    return [*output.with_name(f"{output.name}.parts").glob("*.part")]


def test_two_processes_write_the_same_bytes(inputs: tuple[list[str], Path], tmp_path: Path) -> None:
    """After a kill of one of the two as well, which the other says, and on which one process may go on alone."""
    words, top = inputs
    both = [*words, "--output", str(tmp_path / "x.npz")]
    text = run(both, PROGRAM, processes=2).require(0).text
    assert text.count("450 images by tiny") == text.count("450 embeddings, 16 float32") == 1
    assert digests(tmp_path / "x.npz") == digests(top / "alone.npz")

    output = tmp_path / "y.npz"
    words = [*words, "--output", str(output)]
    process = Command(words, PROGRAM, processes=2, SLOW="0.2")
    process.wait_for(lambda: len(parts(output)) > 2, "parts")
    os.killpg(process.processes[1].pid, signal.SIGKILL)
    codes = [one.wait(240) for one in process.processes]
    assert codes == [1, -signal.SIGKILL] and not output.exists()
    os.close(process.printed)
    text = run(words, PROGRAM).require(0).text
    assert "Embedded already: " in text and digests(output) == digests(top / "alone.npz")


def test_two_commands_of_one_output(inputs: tuple[list[str], Path], tmp_path: Path) -> None:
    """The second is refused while the first is at work, which it does not disturb."""
    words = [*inputs[0], "--output", str(tmp_path / "x.npz")]
    hold = tmp_path / "hold"
    hold.touch()
    first = Command(words, PROGRAM, HOLD=str(hold))
    first.wait_for(lambda: list(tmp_path.glob("x.npz.parts/*.tmp-*")), "a part, which is held up")
    assert "in use by another run" in run(words, PROGRAM).require(1).text
    hold.unlink()
    first.end().require(0)
    assert digests(tmp_path / "x.npz") == digests(inputs[1] / "alone.npz")


def changed(what: str, words: Sequence[str], folder: Path, model: Path) -> list[str]:
    if what == "model":
        save_model(model, seed=1)
    if what == "image":
        shutil.copyfile(folder / "000.png", folder / "001.png")
    if what == "fewer":
        (folder / "088.png").unlink(), (folder / "088.txt").unlink()
    options = {"batch": ["--batch_size", "4"], "dtype": ["--dtype", "float16"], "what": ["--what", "captions"]}
    return [*words, *options.get(what, [])]


@pytest.mark.parametrize("what", ["model", "image", "fewer", "batch", "dtype", "what"])
def test_a_change_between_a_kill_and_the_next_command(what: str, tmp_path: Path) -> None:
    """Only parts that are as they would be are used, which is said; the result is that of a fresh run."""
    model, folder = save_model(tmp_path / "m.safetensors"), write_pairs(tmp_path / "data", PAIRS)
    words, output = command(model, "--folder", folder), tmp_path / "x.npz"
    run([*words, "--output", str(output)], PROGRAM, DIE="before the move").require(-signal.SIGKILL)
    words = changed(what, words, folder, model)
    text = run([*words, "--output", str(output)], PROGRAM).require(0).text
    kept = {"image": PAIRS - PART, "fewer": PART}.get(what, 0)
    unused = {"image": 1, "fewer": 1}.get(what, 2)
    line = f"Embedded already: {kept}. Parts of other images, another model or other options: {unused}."
    assert line in text
    run([*words, "--output", str(tmp_path / "fresh.npz")], PROGRAM).require(0)
    assert digests(output) == digests(tmp_path / "fresh.npz")


def test_documented_python_runs(model: Path, tmp_path: Path) -> None:
    """That of docs/search.md, below the file that its first command writes."""
    cli.main(command(model, "--folder", write_pairs(tmp_path / "data", 2), "--output", tmp_path / "embeddings.parquet"))
    for block in blocks(ROOT / "docs" / "search.md", "python"):
        ended = forked.run(["-c", block], cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout == "(2, 16)\n000.png tiny\n"
