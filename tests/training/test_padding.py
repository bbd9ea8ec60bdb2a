"""Captions without their padding: the same embeddings and gradients, in the order of the batch, for fewer tokens.

B  captions      L  tokens of the longest
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from tiny_encoders import bert, image_tower
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from train_clip import CLIP, CLIPWrapper, CustomCLIPWrapper
from train_clip.data.samples import Batch
from train_clip.models.config import config_from_dict
from train_clip.training import encode as module_of_chunks
from train_clip.training.batch import BatchReader
from train_clip.training.encode import Chunks, encode_in_chunks

CONFIG = {
    "embed_dim": 8,
    "image": {"size": 16, "patch": 8, "layers": 1, "width": 16, "heads": 2},
    "text": {"context": 12, "vocab": 30, "layers": 2, "width": 12, "heads": 2},
}
END = 29
LENGTHS = (3, 12, 5, 7, 4, 12, 6, 8, 3, 3, 9, 4)


def build() -> CLIP:
    torch.manual_seed(0)
    return CLIP(config_from_dict(CONFIG)).double()


def captions() -> Tensor:
    """(12, 12) tokens, of ``LENGTHS`` up to the end token, then zeros."""
    tokens = torch.randint(1, END, (len(LENGTHS), 12), generator=torch.Generator().manual_seed(1))
    for row, used in zip(tokens, LENGTHS, strict=True):
        row[used - 1], row[used:] = END, 0
    return tokens


@pytest.fixture
def few_rows(monkeypatch):
    """Pieces of two rows and more, where there would be 64."""
    monkeypatch.setattr(module_of_chunks, "LEAST_ROWS", 2)


class Shapes:
    """Wraps an encoder and keeps the shapes that it met."""

    def __init__(self, encode) -> None:
        self.encode, self.met = encode, []

    def __call__(self, rows):
        self.met.append(tuple(rows.shape))
        return self.encode(rows)


def head(embeddings: Tensor) -> Tensor:
    """A scalar that tells rows apart, and in which every row meets every other."""
    places = torch.arange(1, len(embeddings) + 1, dtype=embeddings.dtype)
    return (embeddings @ embeddings.T).logsumexp(dim=1).sum() + (places[:, None] * embeddings.sin()).sum()


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    """Each parameter's gradient, to 1e-12 of its largest number."""
    for (name, parameter), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        if other.grad is not None:
            largest = max(1.0, other.grad.abs().max().item())
            torch.testing.assert_close(
                parameter.grad, other.grad, rtol=0, atol=1e-12 * largest, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("size", [0, 1, 2, 5, 11, 12, 99])
@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.usefixtures("few_rows")
def test_gradient_is_that_with_padding(size, kept):
    """Embeddings in their order, and every gradient, against one plain pass over padded rows, in float64: 1e-12."""
    model, plain = build(), build()
    found = encode_in_chunks(
        model.encode_text, captions(), Chunks(size, kept), model.transformer, torch.tensor(LENGTHS)
    )
    expected = plain.encode_text(captions())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    head(found).backward()
    head(expected).backward()
    assert_equal(model, plain)


@pytest.mark.parametrize(("least", "size", "expected"), [
    # in one piece, cut at the longest of all
    (64, 0, [(12, 12)]),
    # sorted: 3 3 3 4 4 5 6 7 8 9 12 12, in four pieces at most
    (2, 0, [(3, 3), (3, 5), (3, 8), (3, 12)]),
    (4, 0, [(4, 4), (4, 7), (4, 12)]),
    # micro-batches that are smaller than the pieces would be
    (4, 2, [(2, 3), (2, 4), (2, 5), (2, 7), (2, 9), (2, 12)]),
])  # fmt: skip
def test_tokens_that_are_encoded(least, size, expected, monkeypatch):
    """The shapes that the tower meets, told by hand from the sorted lengths."""
    monkeypatch.setattr(module_of_chunks, "LEAST_ROWS", least)
    model = build()
    encode = Shapes(model.encode_text)
    with torch.no_grad():
        encode_in_chunks(encode, captions(), Chunks(size), model.transformer, torch.tensor(LENGTHS))
    assert encode.met == expected


@pytest.mark.parametrize(
    ("size", "kept", "recomputed"), [(3, 0, 4), (3, 1, 3), (3, 3, 1), (3, 4, 0), (3, 9, 0), (0, 0, 0)]
)
def test_kept_chunks_are_not_encoded_again(size, kept, recomputed):
    """Of four chunks all but those that are kept, the last ones, are encoded a second time; the gradient stays."""
    model, plain = build(), build()
    encode = Shapes(model.encode_text)
    head(encode_in_chunks(encode, captions(), Chunks(size, kept), model.transformer)).backward()
    head(plain.encode_text(captions())).backward()
    number = 4 if size else 1
    assert len(encode.met) == number + recomputed
    assert_equal(model, plain)


def test_of_two_encoders():
    """A BERT with an attention mask, a mapping of three tensors: gradients against one padded pass, float64: 1e-12."""
    found, plain = bert().double(), bert().double()
    ids = torch.randint(1, 60, (12, 12), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).long()
    texts = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}

    def mean(model, some):
        states, mask = model(**some).last_hidden_state, some["attention_mask"][..., None]
        return (states * mask).sum(dim=1) / mask.sum(dim=1)

    cut = encode_in_chunks(lambda some: mean(found, some), texts, Chunks(4), found, torch.tensor(LENGTHS))
    head(cut).backward()
    head(mean(plain, texts)).backward()
    assert_equal(found, plain)


@pytest.mark.usefixtures("few_rows")
def test_a_batch_norm_among_the_words():
    """Which captions meet in a chunk would tell: rows stay in their order, in one piece, statistics bit for bit."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm = nn.BatchNorm1d(12)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.norm(tokens.float())

    found, plain = Normed(), Normed()
    embeddings = encode_in_chunks(found, captions(), Chunks(), found, torch.tensor(LENGTHS))
    assert torch.equal(embeddings, plain(captions()))
    assert torch.equal(found.norm.running_var, plain.norm.running_var)


def reader() -> BatchReader:
    return CLIPWrapper("small", CONFIG)._reader


IMAGES = torch.zeros(12, 3, 16, 16, dtype=torch.uint8)


@pytest.mark.parametrize("texts", [captions(), {"input_ids": captions(), "attention_mask": captions()}])
@pytest.mark.parametrize("kind", [tuple, list, Batch])
def test_lengths_of_clips_captions(texts, kind):
    """Up to the end token, of tokens and of a mapping, measured before a transfer or not; used once."""
    batch = Batch(IMAGES, texts) if kind is Batch else kind([IMAGES, texts])
    reads = reader()
    for measured in (True, False):
        if measured:
            reads.measure(batch)
        assert tuple(reads.read(batch, torch.device("cpu")).lengths) == LENGTHS
        assert reads._lengths is None


def test_what_was_measured_is_not_looked_for_again(monkeypatch):
    """On a GPU it would wait for the device: with the batch measured, ``read`` asks for no caption's length."""
    reads = reader()
    batch = (IMAGES, captions())
    reads.measure(batch)
    monkeypatch.setattr(reads, "lengths", lambda _: pytest.fail("asked again"))
    assert tuple(reads.read(batch, torch.device("cpu")).lengths) == LENGTHS


COMPLAINTS = {
    "nothing": None,
    "a number": 3,
    "empty": (),
    "images alone": (IMAGES,),
    "strings": (IMAGES, ["a", "b"]),
    "no ids": (IMAGES, {"ids": 3}),
    "a mapping": {"images": IMAGES},
    "rows without end": (IMAGES, torch.zeros(12, dtype=torch.int64)),
    "a third dimension": (IMAGES, torch.zeros(12, 3, 2, dtype=torch.int64)),
    "no tokens": (IMAGES, torch.zeros(12, 0, dtype=torch.int64)),
    "ids that are a list": (IMAGES, {"input_ids": [[1, 2]]}),
    "a mask that is a list": (IMAGES, {"input_ids": captions(), "attention_mask": [[1]]}),
}


@pytest.mark.parametrize("batch", COMPLAINTS.values(), ids=COMPLAINTS)
def test_measuring_leaves_complaints_to_reading(batch):
    """Whatever a loader brings: nothing is raised before the batch is read, which says what is wrong."""
    for reads in (reader(), CustomCLIPWrapper(image_tower(), bert(), image_size=8)._reader):
        reads.measure((IMAGES, captions()))
        reads.measure(batch)
        assert reads._lengths is None or isinstance(batch[1], dict)


class Changed(CLIPWrapper):
    """Turns each batch round on its way."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [part.flip(0) for part in batch]


@pytest.mark.parametrize("kind", [CLIPWrapper, Changed])
def test_a_batch_that_is_changed_on_its_way(kind, monkeypatch):
    """Lengths are those of the captions that the model meets."""
    module = kind("small", CONFIG)
    met: list[tuple[int, ...]] = []
    embed = module._towers.embed

    def look(model, inputs, batch):
        assert tuple(inputs.lengths) == tuple((inputs.texts.argmax(dim=1) + 1).tolist())
        met.append(tuple(inputs.lengths))
        return embed(model, inputs, batch)

    monkeypatch.setattr(module._towers, "embed", look)
    fit(module)
    assert met == [LENGTHS if kind is CLIPWrapper else LENGTHS[::-1]]


def fit(module: L.LightningModule, **how: Any) -> None:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **how,
    )  # fmt: skip
    size = module.model.image_size
    images = torch.randint(256, (12, 3, size, size), dtype=torch.uint8)
    trainer.fit(module, DataLoader(TensorDataset(images, captions()), batch_size=12))


RESNET = {"size": 64, "blocks": [1, 1, 1, 1], "width": 2}


@pytest.mark.parametrize("image", [CONFIG["image"], RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("kept", [0, 1, 3, 9])
def test_kept_chunks_under_a_trainer(image, kept):
    """Of four chunks of either tower the others are encoded twice; weights and running statistics end alike."""

    def trained(kept: int) -> tuple[CLIPWrapper, list[int]]:
        torch.manual_seed(0)
        module = CLIPWrapper("small", CONFIG | {"image": image}, 3, kept_minibatches=kept, warmup_steps=0)
        calls: list[int] = []
        for tower in (module.model.visual, module.model.transformer):
            tower.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(1)
        fit(module)
        return module, calls

    module, calls = trained(kept)
    plain, others = trained(0)
    assert (len(calls), len(others)) == (2 * (8 - min(kept, 4)), 16)
    for (name, own), its in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(own, its, rtol=0, atol=1e-6, msg=name)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(("size", "kept", "encoded"), [(6, 2, 4), (6, 1, 6), (6, 0, 8)])
def test_pieces_of_chunks_that_are_kept(size, kept, encoded):
    """Two chunks were asked for, and captions come in four pieces: half of the chunks kept is half of the pieces."""
    model = build()
    encode = Shapes(model.encode_text)
    lengths = torch.tensor(LENGTHS)
    head(encode_in_chunks(encode, captions(), Chunks(size, kept), model.transformer, lengths)).backward()
    assert len(encode.met) == encoded


@pytest.mark.usefixtures("few_rows")
def test_captions_of_one_length_stay_in_one_piece():
    """There is no padding to save."""
    model = build()
    encode = Shapes(model.encode_text)
    with torch.no_grad():
        encode_in_chunks(encode, captions(), Chunks(), model.transformer, torch.full((12,), 12))
    assert encode.met == [(12, 12)]


def test_what_else_a_tokenizer_gives():
    """A number for each caption travels with its rows; a mask of pairs of tokens keeps all of them."""
    model = bert().double()
    mask = (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).long()
    texts = {"input_ids": captions() * mask, "attention_mask": mask, "length": torch.tensor(LENGTHS)}

    def encode(some):
        assert (some["attention_mask"].sum(dim=1) == some["length"]).all()
        return model(some["input_ids"], some["attention_mask"]).pooler_output

    reads = CustomCLIPWrapper(image_tower(), bert(), image_size=8)._reader
    assert tuple(reads.lengths(texts)) == LENGTHS
    cut = encode_in_chunks(encode, texts, Chunks(4), model, reads.lengths(texts))
    torch.testing.assert_close(cut, encode(texts), rtol=0, atol=1e-12)
    assert set(reads.lengths(texts | {"pairs": torch.ones(12, 12, 12)}).tolist()) == {12}


class LastPosition(nn.Module):
    """A text encoder that reads its last position, padding or not."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = bert()
        self.config = self.bert.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        states = self.bert(input_ids, attention_mask).last_hidden_state
        return SimpleNamespace(last_hidden_state=states, pooler_output=states[:, -1])


class Padding:
    """A tokenizer of one word a token, padded to the longest."""

    def batch(self, texts: list[str]) -> tuple[dict[str, Tensor], int]:
        rows = [[len(word) % 50 + 1 for word in text.split()] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}, 0


@pytest.mark.parametrize(("encoder", "counts"), [(bert, False), (LastPosition, True)])
def test_an_encoder_that_looks_at_padding_keeps_it(encoder, counts):
    """Told by captions alone and beside longer ones; nothing is cut off then."""
    module = CustomCLIPWrapper(image_tower(), encoder(), image_size=8)
    module.tokenizer = Padding()
    module._reader.padding_counts = module._padding_counts()
    assert module._reader.padding_counts == counts
    texts = Padding().batch(["a b", "a b c d"])[0]
    assert list(module._reader.lengths(texts)) == ([4, 4] if counts else [2, 4])


def test_masks_of_other_encoders():
    """Right padding is cut, left padding and plain ids are not."""
    module = CustomCLIPWrapper(image_tower(), bert(), image_size=8)
    ids = torch.ones(2, 6, dtype=torch.int64)
    right = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    lengths = module._reader.lengths
    assert list(lengths({"input_ids": ids, "attention_mask": right})) == [2, 4]
    assert list(lengths({"input_ids": ids, "attention_mask": right.flip(1)})) == [6, 6]
    assert list(lengths({"input_ids": ids})) == [6, 6]
    assert list(lengths(ids)) == [6, 6]
    # Nothing is looked at: one token stays, for the tower to have something.
    assert list(lengths({"input_ids": ids, "attention_mask": 0 * right})) == [1, 1]


@pytest.mark.gpu
def test_a_step_waits_for_no_device():
    """With the batch measured on the host, embedding both sides synchronises nothing."""
    module = CLIPWrapper("small", CONFIG).cuda()
    batch = (IMAGES, captions())
    module._reader.read(tuple(part.cuda() for part in batch), module.device)  # looks at the first batch's values
    module.on_before_batch_transfer(batch, 0)
    on_device = tuple(part.cuda() for part in batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        module._towers.embed(module.model, module._reader.read(on_device, module.device), 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
