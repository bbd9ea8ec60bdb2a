"""Whole or absent: what stands at a file's final place while it is written, and after each way to fail."""

from __future__ import annotations

import errno
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import forked
from train_clip import files
from train_clip.errors import UserError
from train_clip.files import LOCK, held, replacing, write_text
from train_clip.training.checkpoints import AtomicCheckpointIO


class Failure(Exception):
    """Stands for whatever goes wrong."""


def names(folder: Path) -> list[str]:
    """Everything in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_the_target_appears_at_the_end(tmp_path: Path) -> None:
    """Within the block there is only the file beside it, in the same folder; after it only the target."""
    target = tmp_path / "a.ckpt"
    with replacing(target) as beside:
        beside.write_bytes(b"new")
        assert beside.parent == target.parent
        assert not target.exists()
        assert names(tmp_path) == [beside.name]
    assert names(tmp_path) == ["a.ckpt"]
    assert target.read_bytes() == b"new"


def test_the_old_file_stands_until_the_end(tmp_path: Path) -> None:
    """Within the block the old content, after it the new one."""
    target = tmp_path / "a.ckpt"
    target.write_bytes(b"old")
    with replacing(target) as beside:
        beside.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [Failure(), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path: Path, old: bytes | None, error: BaseException) -> None:
    """Half written, then an error, a full disk or Ctrl-C: the old file or none, nothing beside it, the error itself."""
    target = tmp_path / "a.ckpt"
    if old is not None:
        target.write_bytes(old)
    with pytest.raises(type(error)) as caught, replacing(target) as beside:
        beside.write_bytes(b"ha")
        raise error
    assert caught.value is error
    assert (target.read_bytes() if target.exists() else None) == old
    assert names(tmp_path) == (["a.ckpt"] if old is not None else [])


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_at_the_end_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The disk refuses to sync, or the rename fails: the old file, nothing beside it."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    target = tmp_path / "a.ckpt"
    target.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail) if step == "fsync" else patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="Input/output error"), replacing(target) as beside:
            beside.write_bytes(b"new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.ckpt"]


def test_a_block_that_writes_nothing_leaves_what_was_there(tmp_path: Path) -> None:
    """No file beside the target: an error, and the old file."""
    target = tmp_path / "a.ckpt"
    target.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), replacing(target):
        pass
    assert target.read_bytes() == b"old"


@pytest.mark.skipif(os.name == "nt", reason="Windows syncs no folders")
def test_the_content_is_on_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the calls: sync the file, rename it, sync the folder (RELIABILITY 1)."""
    calls: list[str] = []
    sync, replace = os.fsync, Path.replace

    def recorded_sync(handle: int) -> None:
        calls.append("sync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "sync file")  # noqa: PTH112
        sync(handle)

    def recorded_replace(path: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    write_text(tmp_path / "a.txt", "text")
    assert calls == ["sync file", "rename", "sync folder"]


def test_folders_are_made(tmp_path: Path) -> None:
    """A target in folders that do not exist yet."""
    write_text(tmp_path / "run" / "logs" / "a.txt", "text")
    assert (tmp_path / "run" / "logs" / "a.txt").read_text(encoding="utf-8") == "text"


def test_text_is_utf8(tmp_path: Path) -> None:
    """Byte for byte, whatever the system's own encoding; line breaks as they are given on systems with LF."""
    write_text(tmp_path / "a.txt", "ein Bär, 猫\n")
    assert (tmp_path / "a.txt").read_bytes() == "ein Bär, 猫\n".replace("\n", os.linesep).encode()


@pytest.mark.skipif(not hasattr(os, "kill") or os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("moment", ["within the block", "before the rename"])
def test_a_killed_process_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    """Signal 9 in another process while it writes, or once all is written: the old file is whole at its place."""
    target = tmp_path / "a.ckpt"
    target.write_bytes(b"old")
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from train_clip.files import replacing\n"
        "die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if sys.argv[2] == 'before the rename': Path.replace = die\n"
        "with replacing(Path(sys.argv[1])) as beside:\n"
        "    beside.write_bytes(b'new' * 1000)\n"
        "    if sys.argv[2] == 'within the block': die()\n"
    )
    assert forked.run(["-c", program, str(target), moment]).returncode == -9
    assert target.read_bytes() == b"old"


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_files_have_the_modes_of_the_umask(tmp_path: Path, umask: int) -> None:
    """A file, and one in a folder, that a library made for the user alone; the umask itself is as before."""
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "file") as beside:
            beside.touch(0o600)
        with replacing(tmp_path / "folder") as beside:
            beside.mkdir()
            (beside / "file").touch(0o600)
    finally:
        assert os.umask(before) == umask
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "file", tmp_path / "folder", tmp_path / "folder/file")]
    assert modes == [0o666 & ~umask, 0o777 & ~umask, 0o666 & ~umask]


# Checkpoints


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    """Written and read by the checkpoint IO, and by torch.load without running code: the same numbers."""
    content = {"state_dict": {"weight": torch.arange(6.0).reshape(2, 3)}, "consumed_batches": 7, "name": "ViT-B/32"}
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content, path)
    for loaded in (AtomicCheckpointIO().load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded["state_dict"]["weight"], content["state_dict"]["weight"])
        assert (loaded["consumed_batches"], loaded["name"]) == (7, "ViT-B/32")
    assert names(path.parent) == ["last.ckpt"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full half-way: the older checkpoint loads, and nothing lies beside it."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def full(_: Any, target: Any) -> None:
        target.write(b"PK")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"last\.ckpt: cannot be written \(OSError: No space left on device\)"):
            AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert names(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("address", ["s3://bucket/last.ckpt", "gs://bucket/run/last.ckpt", "file:///tmp/last.ckpt"])
def test_a_remote_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Word for word, and no folder called s3: in the working directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        AtomicCheckpointIO().save_checkpoint({"step": 1}, address)
    assert str(caught.value) == (
        f"{address}: checkpoints can only be written to local files. Give a local --output and copy it."
    )
    assert names(tmp_path) == []


def test_a_checkpoint_that_could_not_be_loaded_is_not_written(tmp_path: Path) -> None:
    """A path in a callback's state, which is no plain data: an error at the save, and the older file stays."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(UserError, match=r"last\.ckpt: not written, because it would hold more than plain data.*Path"):
        AtomicCheckpointIO().save_checkpoint({"callbacks": {"Mine": {"folder": tmp_path}}}, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}
    assert names(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    """A folder, a pipe, a link to a device: refused by name before anything is written, and there as before."""
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
    elif kind == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to("/dev/null")
    with pytest.raises(FileExistsError, match="is not a regular file"):
        write_text(target, "text")
    assert not target.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


# Whose a folder is


@pytest.mark.parametrize(
    ("left", "locks", "told"),
    [
        ("", True, ""),
        ("process {dead} on {here} since 2026-11-30 12:00:00", True, ""),
        ("process 1 on elsewhere since 2026-11-30 12:00:00", True, "has not given it back"),
        ("", False, "no locks"),
        ("process {dead} on {here} since 2026-11-30 12:00:00", False, "no locks"),
        ("process {alive} on {here} since 2026-11-30 12:00:00", False, None),
        ("process {dead} on elsewhere since 2026-11-30 12:00:00", False, None),
        ("process {alive} on {here}", False, None),
    ],
)
def test_a_folder_is_held_on_disks_whose_locks_do_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str, locks: bool, told: str | None
) -> None:
    """By what an earlier run has left: it is told which one may still live (a text), or the folder is refused (None).

    A process of this host that is gone holds nothing. The name that is written is this process's, gone at the end.
    """
    dead = int(forked.run(["-c", "import os; print(os.getpid())"]).stdout)
    (tmp_path / LOCK).write_text(left.format(dead=dead, alive=os.getppid(), here=platform.node()))

    def fail(_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if not locks:
        monkeypatch.setattr(files, "_lock", fail)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if told is None:
            with pytest.raises(UserError, match=rf"in use by another run \(process .* is dead.*, remove .*{LOCK}"):
                held(tmp_path).__enter__()
            return
        with held(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on {platform.node()} since 2")
    assert [told in str(one.message) for one in warned] == [True] * bool(told)
    assert not (tmp_path / LOCK).exists()
