"""Shards in an object store: an S3 server on this machine (moto), read in ranges by fsspec, against the local files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from test_shards import cache  # noqa: F401

import train_clip
from tests.conftest import TINY
from train_clip.cli import main
from train_clip.data import crops
from train_clip.data.scan import scan_source
from train_clip.errors import UserError
from train_clip.options import SourceOptions
from train_clip.shards import members
from train_clip.shards.write import ShardOptions, data_shards, verify

s3fs = pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def address():
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def store(address, monkeypatch, pair_folder, tmp_path) -> tuple[str, Path]:
    """Twelve pairs in three shards, on the server and here."""
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "ENDPOINT_URL": address}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    here = tmp_path / "here"
    data_shards(pair_folder, options=ShardOptions(output=here, pairs_per_shard=5, num_workers=0))
    bucket = f"b{os.getpid()}-{abs(hash(str(tmp_path)))}"
    system = s3fs.S3FileSystem(skip_instance_cache=True)
    system.mkdir(bucket)
    system.put(f"{here}/", f"{bucket}/some/", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
    return f"s3://{bucket}/some", here


@pytest.mark.parametrize("form", ["{}", "{}/*.tar", "{}/{{00000..00002}}.tar"])
@pytest.mark.parametrize("indexed", [True, False])
def test_pairs_are_those_of_the_local_files(form, indexed, store):
    there, here = store
    if not indexed:
        s3fs.S3FileSystem().rm([f"{there}/{file.name}" for file in here.glob("*.json")])
    local = scan_source(None, SourceOptions(shards=str(here))).pairs
    remote = scan_source(None, SourceOptions(shards=form.format(there))).require_pairs().pairs
    assert list(remote.names) == list(local.names) and remote.root == f"{there}/"
    for own, other in zip(remote, local, strict=True):
        assert own.captions() == other.captions()
        assert (crops.read_square(own.pixels, 16) == crops.read_square(other.pixels, 16)).all()
        assert (crops.read_square(str(Path(own.pixels)), 16) == crops.read_square(other.pixels, 16)).all()
    assert verify(remote) == []


@pytest.mark.parametrize("workers", ["0", "2"])
def test_training_reads_it(workers, store, tmp_path):
    """In loader processes too, which are forked: the same checkpoint as from the local shards, bit for bit."""
    there, here = store
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    how = f"train --model_name {tmp_path}/tiny.yaml --batch_size 4 --epochs 1 --accelerator cpu --val_share 0.3"
    weights = []
    for name, spec in {"one": there, "two": str(here)}.items():
        main([*how.split(), "--num_workers", workers, "--shards", spec, "--output", str(tmp_path / name)])
        weights.append(train_clip.load(tmp_path / name / "checkpoints" / "last.ckpt").model.state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_what_is_gone_is_named(store):
    there, _ = store
    pairs = scan_source(None, SourceOptions(shards=there)).pairs
    s3fs.S3FileSystem().rm(f"{there}/00001.tar")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"s3://.*/some/00001\.tar: there is no such file"):
        crops.read_square(pairs[5].pixels, 16)
    members.index_of.cache_clear()
    with pytest.raises(UserError, match=r"00001\.tar: there is no such shard"):
        scan_source(None, SourceOptions(shards=there)).require_pairs()
