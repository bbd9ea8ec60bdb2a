"""The module under a bare Trainer, with loaders of every accepted kind."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from train_clip import CLIPWrapper, Tokenizer
from train_clip.errors import UserError

PIXELS = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CAPTIONS = [f"picture {index} of eight" for index in range(8)]
EVERYTHING = {
    "optimizer": "muon", "adam_statistics": "bfloat16", "loss": "sigmoid", "color_jitter": 0.5, "horizontal_flip": 0.5,
    "ema": 0.9,
}  # fmt: skip


class Listed(Dataset[Any]):
    """Eight pairs, each with whatever stands beside the text."""

    def __init__(self, images: torch.Tensor, texts: Any, *rest: Any) -> None:
        self.columns = (images, texts, *rest)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return tuple(column[index] for column in self.columns)


def bare_trainer(**how: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", **({"max_epochs": 1} | quiet | how))


def first_loss(config: Any, loader: Any, **how: Any) -> float:
    """Train one step on a fresh model and return its loss."""
    torch.manual_seed(0)
    trainer = bare_trainer(max_steps=1)
    trainer.fit(CLIPWrapper("tiny", config, **how), loader)
    return trainer.callback_metrics["train/loss"].item()


def tokenizer_dict(samples: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """As a Hugging Face tokenizer gives it, padded by the end token."""
    tokens = Tokenizer(16)([text for _, text in samples])
    ends = torch.arange(16) > tokens.argmax(dim=1, keepdim=True)
    return torch.stack([image for image, _ in samples]), {
        "input_ids": tokens.masked_fill(ends, Tokenizer.end_token),
        "attention_mask": (~ends).long(),
    }


def test_tokens_strings_and_a_tokenizers_dict_train_alike(tiny_config):
    """Three kinds of text and further columns in the batch: the same first loss."""
    tokens = Tokenizer(16)(CAPTIONS)
    by_tokens = first_loss(tiny_config, DataLoader(Listed(PIXELS, tokens), batch_size=8))
    by_strings = first_loss(tiny_config, DataLoader(Listed(PIXELS, CAPTIONS, torch.arange(8)), batch_size=8))
    by_dict = first_loss(tiny_config, DataLoader(Listed(PIXELS, CAPTIONS), batch_size=8, collate_fn=tokenizer_dict))
    assert by_strings == pytest.approx(by_tokens, abs=1e-6)
    assert by_dict == pytest.approx(by_tokens, abs=1e-6)


def test_bytes_and_normalised_floats_train_alike(tiny_config):
    """uint8 against the same pixels normalised beforehand."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    floats = (PIXELS / 255 - mean) / std
    by_bytes = first_loss(tiny_config, DataLoader(Listed(PIXELS, CAPTIONS), batch_size=8))
    assert first_loss(tiny_config, DataLoader(Listed(floats, CAPTIONS), batch_size=8)) == pytest.approx(
        by_bytes, abs=1e-5
    )


def test_floats_that_are_not_normalised_are_said_so(tiny_config):
    """Pixels in [0, 1], the usual mistake, give a warning that names their range; normalised ones give none."""
    with pytest.warns(UserWarning, match=r"floating point from 0 to 1\. .*do not look normalized"):
        first_loss(tiny_config, DataLoader(Listed(PIXELS / 255, CAPTIONS), batch_size=8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first_loss(tiny_config, DataLoader(Listed(PIXELS / 255 - 0.5, CAPTIONS), batch_size=8))
    assert not [warning for warning in caught if "do not look normalized" in str(warning.message)]


def test_a_validation_loader_is_scored(tiny_config):
    """A user's own validation loader: loss and recalls are logged; without one none are."""
    loader = DataLoader(Listed(PIXELS, CAPTIONS), batch_size=4)
    trainer = bare_trainer()
    trainer.fit(CLIPWrapper("tiny", tiny_config), loader, DataLoader(Listed(PIXELS, CAPTIONS), batch_size=3))
    assert {"val/loss", "val/R@1_image_to_text", "val/R@10_text_to_image"} <= set(trainer.callback_metrics)
    trainer = bare_trainer()
    trainer.fit(CLIPWrapper("tiny", tiny_config), loader)
    assert not [name for name in trainer.callback_metrics if name.startswith("val/")]


def test_chunks_give_the_same_step(tiny_config):
    """``minibatch_size`` 3 of a batch of 8 under the Trainer: the same weights after two steps, in float64."""
    weights = []
    for size in (0, 3):
        torch.manual_seed(0)
        module = CLIPWrapper("tiny", tiny_config, minibatch_size=size)
        bare_trainer(max_epochs=2, precision="64-true").fit(module, DataLoader(Listed(PIXELS, CAPTIONS), batch_size=8))
        weights.append(module.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-10)


def test_the_temperature_is_clamped_after_each_step(tiny_config):
    """A scale above 100 is 100 after one step."""
    module = CLIPWrapper("tiny", tiny_config)
    torch.nn.init.constant_(module.model.logit_scale, 7.0)
    bare_trainer(max_steps=1).fit(module, DataLoader(Listed(PIXELS, CAPTIONS), batch_size=8))
    assert module.model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config):
    """NaN pixels: an error that says what to try, before any weight is changed."""
    module = CLIPWrapper("tiny", tiny_config)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    poisoned = torch.full((8, 3, 16, 16), torch.nan)
    with pytest.raises(UserError, match=r"Batch 1: the loss is nan, .*changed any weights.*first step.*--precision"):
        bare_trainer().fit(module, DataLoader(Listed(poisoned, CAPTIONS), batch_size=8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (
            torch.zeros(8, 3, 20, 20, dtype=torch.uint8),
            CAPTIONS,
            r"shape \(8, 3, 20, 20\); tiny expects \(B, 3, 16, 16\)\..*TextImageDataModule\(…, image_size=16\)",
        ),
        (PIXELS, torch.zeros(8, 17, dtype=torch.long), r"tokens have shape \(8, 17\).*16 tokens at most"),
        (PIXELS, torch.full((8, 5), 50_000), r"run from 50000 to 50000; tiny has a vocabulary of 49,408"),
    ],
)
def test_a_batch_that_does_not_fit_says_how(tiny_config, images, texts, message):
    """Wrong size, too many tokens, another tokenizer's ids."""
    with pytest.raises(UserError, match=message):
        bare_trainer().fit(CLIPWrapper("tiny", tiny_config), DataLoader(Listed(images, texts), batch_size=8))


class Endless(IterableDataset[Any]):
    """Pairs without end and without length."""

    def __iter__(self) -> Any:
        while True:
            yield from zip(PIXELS, CAPTIONS, strict=True)


def test_a_loader_without_length_needs_max_steps(tiny_config):
    """The schedule needs the length of the run: an error without it, training with it."""
    with pytest.raises(UserError, match="length of the run, which is unknown"):
        bare_trainer().fit(CLIPWrapper("tiny", tiny_config), DataLoader(Endless(), batch_size=8))
    trainer = bare_trainer(max_steps=3)
    trainer.fit(CLIPWrapper("tiny", tiny_config), DataLoader(Endless(), batch_size=8))
    assert trainer.global_step == 3


def test_train_clips_own_configuration_builds_the_same_model(tiny_config):
    """``CLIPWrapper(model_name, config, minibatch_size)`` with the flat keys of train-CLIP's YAML files."""
    flat = {
        "embed_dim": 16, "image_resolution": 16, "vision_layers": 2, "vision_width": 128, "vision_patch_size": 8,
        "context_length": 16, "vocab_size": 49408,
        "transformer_width": 16, "transformer_heads": 2, "transformer_layers": 2,
    }  # fmt: skip
    module = CLIPWrapper("mine", flat, 4)
    assert module.model.config.image.heads == 2
    assert module.model.config.text == tiny_config.text
    assert module.hparams.minibatch_size == 4


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32-true"])
@pytest.mark.parametrize("how", [{}, EVERYTHING], ids=["the paper's", "everything"])
def test_a_gpu_steps_as_a_cpu(tiny_config, precision, how):
    """Chunks of 3 on a CUDA device, in each precision, against float32 on the CPU: the same first loss, to rounding.

    Augmentation is drawn on the host, so that it is the same too.
    """
    loader = DataLoader(Listed(PIXELS, CAPTIONS), batch_size=8)
    expected = first_loss(tiny_config, loader, **how)
    torch.manual_seed(0)
    trainer = L.Trainer(
        accelerator="gpu", devices=1, max_steps=3, precision=precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, log_every_n_steps=1, gradient_clip_val=1.0,
    )  # fmt: skip
    module = CLIPWrapper("tiny", tiny_config, minibatch_size=3, **how)
    losses: list[float] = []
    original = module.training_step

    def step(batch: Any, batch_idx: int) -> torch.Tensor:
        loss = original(batch, batch_idx)
        losses.append(loss.item())
        return loss

    module.training_step = step
    trainer.fit(module, loader)
    assert losses[0] == pytest.approx(expected, rel=1e-4 if precision == "32-true" else 2e-2)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_ids_of_another_tokenizer_are_refused(tiny_config):
    """Captions whose largest token differs have no common end token: the text feature would be read at random."""
    ids = torch.randint(1, 30_000, (8, 6), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="largest token differs between captions"):
        bare_trainer().fit(CLIPWrapper("tiny", tiny_config), DataLoader(Listed(PIXELS, ids), batch_size=8))


TOKENS = Tokenizer(16)(CAPTIONS)
ONE_ROW = [Tokenizer(16)([caption]) for caption in CAPTIONS]  # (1, L), as a tokenizer called for each returns it


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            (CAPTIONS, PIXELS),
            r"starts with a (list|tuple); tiny expects a tensor of images \(B, 3, 16, 16\), then the texts",
        ),
        ((TOKENS, PIXELS), r"starts with a Tensor \(4, \d+\); tiny expects a tensor of images"),
        (([{"a": 1}] * 8, CAPTIONS), "starts with a dict; tiny expects a tensor of images"),
        (
            (PIXELS, [[text, text] for text in CAPTIONS]),
            "texts of a batch hold a tuple; .*Of several captions choose one",
        ),
        ((PIXELS, [1] * 8), r"tokens have shape \(4,\)"),
        ((PIXELS, TOKENS.float()), r"torch\.float32, .*tokens\.long\(\)"),
        ((PIXELS, TOKENS.short()), r"torch\.int16, .*whole numbers"),
        ((PIXELS, TOKENS > 0), r"torch\.bool, .*whole numbers"),
        ((PIXELS, ONE_ROW), r"tokens have shape \(4, 1, \d+\), .*take its row"),
        (
            (PIXELS, [{"input_ids": row, "attention_mask": row > 0} for row in ONE_ROW]),
            r"\(4, 1, \d+\), .*its row",
        ),
        (
            (PIXELS, [{"ids": row[0]} for row in ONE_ROW]),
            r"hold ids \(Tensor\); expected tensors, input_ids among them",
        ),
    ],
)
@pytest.mark.parametrize("validates", [False, True])
def test_a_batch_of_another_form_says_which_is_expected(tiny_config, columns, message, validates):
    """Texts first, several captions, tokens of another type or with a dimension too many; in validation too."""
    module, loader = CLIPWrapper("tiny", tiny_config), DataLoader(Listed(*columns), batch_size=4)
    with pytest.raises(UserError, match=message):
        bare_trainer().validate(module, loader) if validates else bare_trainer().fit(module, loader)


def test_one_string_or_rows_of_tokens_in_a_list_are_no_captions(tiny_config):
    """What a collate_fn may return in place of a list: a single string, which is a sequence too, rows, and nothing."""
    for texts, found in (("a b c d", r"shape \(1, "), ([*TOKENS[:4]], "hold a Tensor"), (None, "hold a NoneType")):
        loader = DataLoader(
            Listed(PIXELS, CAPTIONS), batch_size=4, collate_fn=lambda _, texts=texts: (PIXELS[:4], texts)
        )
        with pytest.raises(UserError, match=found):
            bare_trainer().fit(CLIPWrapper("tiny", tiny_config), loader)


def test_int32_tokens_train(tiny_config):
    """They are whole numbers as good as int64."""
    losses = [first_loss(tiny_config, DataLoader(Listed(PIXELS, one), batch_size=8)) for one in (TOKENS, TOKENS.int())]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("how", [{}, {"loss": "sigmoid"}, {"minibatch_size": 1}])
def test_one_pair_is_refused(tiny_config, how):
    """Alone in its batch, from the first one on or left over by a loader; an incomplete batch of two trains."""
    for batch_size in (1, 7):
        loader = DataLoader(Listed(PIXELS, CAPTIONS), batch_size=batch_size)
        with pytest.raises(UserError, match=r"A batch holds one pair, .*batch_size.*drop_last=True"):
            bare_trainer().fit(CLIPWrapper("tiny", tiny_config, **how), loader)
    trainer = bare_trainer()
    trainer.fit(CLIPWrapper("tiny", tiny_config, **how), DataLoader(Listed(PIXELS, CAPTIONS), batch_size=6))
    assert trainer.global_step == 2


def test_a_compiled_module_is_refused(tiny_config):
    """``torch.compile`` of the module names the option that compiles its towers."""
    compiled: Any = torch.compile(CLIPWrapper("tiny", tiny_config))
    loader = DataLoader(Listed(PIXELS, CAPTIONS), batch_size=8)
    with pytest.raises(UserError, match=r"torch\.compile.*compile=True"):
        bare_trainer().fit(compiled, loader)


def test_several_validation_loaders_and_other_batches_say_what_is_expected(tiny_config):
    """What the module does not take ends with what it does."""
    loader = DataLoader(Listed(PIXELS, CAPTIONS), batch_size=4)
    with pytest.raises(UserError, match="several validation loaders, expected one"):
        bare_trainer().fit(CLIPWrapper("tiny", tiny_config), loader, [loader, loader])
    named = DataLoader([{"image": PIXELS[0], "text": "a"}] * 4, batch_size=4)
    with pytest.raises(UserError, match="A batch is a dict; expected a tuple or list"):
        bare_trainer().fit(CLIPWrapper("tiny", tiny_config), named)


def test_one_image_several_and_none_are_embedded(tiny_config, tmp_path):
    """A path and the opened picture, transparent ones on white either way; no image gives no rows."""
    pixels = torch.cat([PIXELS[0], torch.full((1, 16, 16), 100, dtype=torch.uint8)]).permute(1, 2, 0).numpy()
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    module = CLIPWrapper("tiny", tiny_config)
    by_path = module.embed_images(tmp_path / "a.png")
    assert by_path.shape == (1, 16)
    with Image.open(tmp_path / "a.png") as picture:
        assert torch.equal(module.embed_images(picture), by_path)
    assert module.embed_images([]).shape == (0, 16)
    assert module.embed_texts([]).shape == (0, 16)
    assert module(PIXELS, Tokenizer(16)(CAPTIONS))[0].shape == (8, 8)
