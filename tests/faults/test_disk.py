"""Disks that are full or read-only, and checkpoints that are damaged: nothing good is lost, and nothing bad is used."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import callback, consumed, differences, last, leftovers, require_same_state, run, write_inputs

from train_clip.checkpoints.own import read_checkpoint
from train_clip.errors import UserError
from train_clip.training.checkpoints import AtomicCheckpointIO

PAIRS, BATCHES = 40, 10  # batches of 4 to one epoch
EVERY = 4  # optimizer steps between saves
ENTRY = 46  # bytes of an entry in a zip archive's directory, before the name


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """What all runs have in common."""
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"), PAIRS)
    return [*inputs, *f"--val_share 0 --epochs 2 --save_every {EVERY}".split()]


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk with room for two checkpoints, but not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=25m", "tmpfs", folder)
    yield folder
    # Lazily: in a test that has failed something may still be open.
    subprocess.run(["umount", "--lazy", "--recursive", folder], check=True)


@pytest.fixture
def read_only(tmp_path, request) -> Path:
    """A folder that cannot be written. Permissions do not hold for root, who needs a read-only disk."""
    if os.geteuid() == 0:
        folder = request.getfixturevalue("disk")
        mount("-o", "remount,ro", folder)
    else:
        folder = tmp_path / "read_only"
        folder.mkdir(mode=0o500)
    return folder


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory) -> Path:
    """A run that is over, with all checkpoints of its intervals and epochs: the last is of step 20, before it 16."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run([*words, "--keep", "99", "--output", str(folder)]).require(0)
    return folder


@pytest.fixture
def damaged(finished, tmp_path) -> Path:
    """A copy to damage, links and times as they are in the original."""
    subprocess.run(["cp", "-a", finished, tmp_path / "run"], check=True)
    return tmp_path / "run"


def test_a_full_disk_ends_the_run_and_leaves_the_older_checkpoints(words, disk):
    """The third checkpoint does not fit: one line says which file and why, both earlier ones load, no part is left."""
    result = run([*words, "--output", str(disk / "run")]).require(1)
    (line,) = result.complaints
    assert f"{disk}/run/checkpoints/" in line
    assert "No space left on device" in line
    require_intact(disk / "run", EVERY, 2 * EVERY)


def test_a_disk_that_others_fill_ends_the_run_in_a_line(words, disk):
    """Not a byte is left, for the logs neither: one line that names what could not be written; the checkpoint loads.

    A writer thread of TensorBoard's tells of it in its own way.
    """
    fill = callback("ShellAt", line=f"cat /dev/zero > {disk}/others 2>/dev/null || true", batch=EVERY + 2)
    result = run([*words, "--output", str(disk / "run"), *fill]).require(1)
    (line,) = result.messages
    assert "No space left on device" in line
    assert str(disk) in line
    require_intact(disk / "run", EVERY)


def test_a_full_disk_ends_both_processes(words, disk):
    """Only the first writes; the second does not wait for it for ever. Each says which file it was."""
    result = run([*words, "--output", str(disk / "run"), "--devices", "2"], processes=2).require(1)
    assert "No space left on device" in result.text
    assert len(result.complaints) == 2
    assert all(f"{disk}/run/checkpoints/" in line for line in result.complaints)
    require_intact(disk / "run", EVERY, 2 * EVERY)


def test_a_checkpoint_that_cannot_be_named_ends_both_processes(words, tmp_path):
    """The state is written, one of its names is not: a message from each, no traceback, and whatever is there loads."""
    folder = tmp_path / "run"
    fail = callback("FailAtChange", path=f"step-{2 * EVERY:08}.ckpt", step=2 * EVERY)
    result = run([*words, "--output", str(folder), "--devices", "2", *fail], processes=2).require(1)
    assert "No space left on device" in result.text
    assert len(result.complaints) == 2
    assert all(f"{folder}/checkpoints" in line for line in result.complaints)
    assert {consumed(read_checkpoint(file)) for file in (folder / "checkpoints").iterdir()} <= {EVERY, 2 * EVERY}
    assert (folder / "checkpoints" / "last.ckpt").exists()


def test_a_read_only_folder_is_told_before_training(words, read_only):
    """One line that names the folder, before the first step."""
    result = run([*words, "--output", str(read_only / "run")]).require(1)
    (line,) = result.complaints
    assert str(read_only) in line
    assert "step  1/" not in result.text


def test_a_folder_that_turns_read_only_ends_the_run_in_a_line(words, disk):
    """As a disk does on an error: one line that names the file and why; the checkpoint that there was loads."""
    folder = disk / "run"
    turn = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}"
    result = run([*words, "--output", str(folder), *callback("ShellAt", line=turn, batch=EVERY + 2)]).require(1)
    (line,) = result.complaints
    assert str(folder) in line
    assert "Read-only file system" in line
    require_intact(folder, EVERY)


@pytest.mark.parametrize("part", ["anywhere", "structure", "directory"])
def test_no_flipped_byte_goes_unnoticed(part, finished, tmp_path):
    """Sixty random bytes, one at a time: the file is refused by its name, or what it holds is what was written.

    The file starts with the pickled structure and ends with the directory of the archive; most of it is tensors.
    """
    file = Path(shutil.copy(finished / "checkpoints" / "last.ckpt", tmp_path))
    size = file.stat().st_size
    places = {"anywhere": range(size), "structure": range(25_000), "directory": range(directory(file), size)}[part]
    rng = random.Random(0)
    require_noticed(file, [(rng.choice(places), rng.randrange(1, 256)) for _ in range(60)])


def test_no_flipped_bit_of_an_entry_goes_unnoticed(tmp_path):
    """As before, in a small file, for every bit of the directory's entry of the largest tensor."""
    file = tmp_path / "small.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.arange(99.0)}, "epoch": 1}, file)
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    # The entry ends with the name; all fields before it have fixed places.
    name = largest.filename.encode()
    start = file.read_bytes().index(name, directory(file)) - ENTRY
    places = range(start, start + ENTRY + len(name))
    require_noticed(file, [(place, 1 << bit) for place in places for bit in range(8)])


@pytest.mark.parametrize(
    ("damage", "why"),
    [("flipped", "differs from what was written"), ("cut", "an incomplete one"), ("empty", "an incomplete one")],
)
def test_a_damaged_checkpoint_is_passed_over(damage, why, damaged, finished):
    """The newest is damaged: it is named with the reason, the one before it is taken, and the run ends as it did.

    What a crash while saving has left is gone by then.
    """
    newest = damaged / "checkpoints" / "last.ckpt"
    harm(newest, damage)
    for name in ("last.ckpt.tmp-123", "step-00000019.ckpt.tmp-123"):
        newest.with_name(name).write_bytes(b"PK")
    result = run(["train", "--resume", str(damaged)]).require(0)
    (line,) = (line for line in result.text.splitlines() if line.startswith("Skipped"))
    assert str(newest) in line
    assert why in line
    assert f"Resuming from {damaged}/checkpoints/step-{4 * EVERY:08}.ckpt" in result.text
    assert leftovers(damaged) == []
    require_same_state(last(damaged), last(finished))


def test_where_all_are_damaged_each_is_named(damaged):
    """No checkpoint loads: an error that lists them, and none of the files is changed."""
    files = sorted((damaged / "checkpoints").glob("*.ckpt"))
    for file in files:
        harm(file, "empty")
    result = run(["train", "--resume", "auto", "--output", str(damaged)]).require(1)
    assert all(str(file) in result.text for file in files if file.name != f"step-{2 * BATCHES:08}.ckpt")
    assert len(result.complaints) == 1
    assert "no checkpoint loads" in result.complaints[0]
    assert [file.stat().st_size for file in files] == [0] * len(files)


def test_nothing_to_resume_is_an_error(words, tmp_path):
    """``auto`` where no run is, and a name that is no file: told, and nothing is trained in its place."""
    for resume in (["auto", "--output", str(tmp_path / "run")], [str(tmp_path / "none.ckpt")]):
        result = run([*words, "--resume", *resume]).require(1)
        (line,) = result.complaints
        assert f"--resume {resume[0]}" in line
        assert "there is no" in line
    assert not (tmp_path / "run").exists()


def mount(*words: str | Path) -> None:
    """``mount``, or skip the test where that is not allowed."""
    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    done = subprocess.run(["mount", *words], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


def require_intact(folder: Path, *steps: int) -> None:
    """The checkpoints are those of these steps, all of them load, and nothing temporary is left."""
    checkpoints = folder / "checkpoints"
    names = {"last.ckpt", *(f"step-{step:08}.ckpt" for step in steps)}
    assert {file.name for file in checkpoints.iterdir()} == names
    assert {consumed(read_checkpoint(checkpoints / name)) for name in names} == set(steps)
    assert consumed(last(folder)) == max(steps)
    assert list(folder.rglob("*.tmp-*")) == []


def directory(file: Path) -> int:
    """The place in a file at which the archive's directory starts."""
    with zipfile.ZipFile(file) as archive:
        return archive.start_dir


def require_noticed(file: Path, flips: list[tuple[int, int]]) -> None:
    """Flip (position, mask) after (position, mask): each leaves what is read as it was, or the file refused."""
    original, refused, unnoticed = read_checkpoint(file), 0, []
    for position, mask in flips:
        flip(file, position, mask)
        try:
            unnoticed += [(position, mask, place) for place in differences(read_checkpoint(file), original)]
        except UserError as error:
            assert str(file) in str(error)
            refused += 1
        flip(file, position, mask)
    assert unnoticed == []
    assert refused > len(flips) / 2
    assert differences(read_checkpoint(file), original) == []


def flip(file: Path, position: int, mask: int) -> None:
    """Change the bits of a mask in one byte; a second time changes them back."""
    with file.open("r+b") as data:
        data.seek(position)
        (byte,) = data.read(1)
        data.seek(position)
        data.write(bytes([byte ^ mask]))


def harm(file: Path, how: str) -> None:
    """Damage a file in place, so that its other names are damaged too."""
    if how == "flipped":
        flip(file, file.stat().st_size // 2, 1)
    else:
        with file.open("r+b") as data:
            data.truncate(file.stat().st_size // 2 if how == "cut" else 0)
