"""What the towers see of a training batch that is augmented, and what is said of captions that would not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.conftest import TINY, write_pairs
from tests.training.tiny_encoders import SIDE, bare_trainer, bert, image_tower, loader, pixels
from train_clip import CLIPWrapper
from train_clip.data.augment import augment, draw_batch
from train_clip.encoders.wrapper import CustomCLIPWrapper
from train_clip.errors import UserError
from train_clip.options import AugmentationOptions
from train_clip.training.data_module import TextImageDataModule

HOW = {"color_jitter": 1.0, "grayscale": 0.2, "horizontal_flip": 0.5, "vertical_flip": 0.5}
PAIRS, BATCH = 8, 4


class Seen(L.Callback):
    """Notes the images that a model encodes from the start of training on, in train and in eval mode."""

    def __init__(self, model: Any) -> None:
        self.training: list[Tensor] = []
        self.eval: list[Tensor] = []
        self._encode, self._model = model.encode_image, model

    def on_train_start(self, *_: Any) -> None:
        self._model.encode_image = self._note

    def _note(self, images: Tensor) -> Tensor:
        (self.training if self._model.training else self.eval).append(images.clone())
        return self._encode(images)


def expected(images: Tensor, seed: int) -> list[Tensor]:
    """Two epochs of batches in order, the batches counted on."""
    how = AugmentationOptions(**HOW)
    batches = [*images.split(BATCH), *images.split(BATCH)]
    return [
        augment(batch, how, draw_batch(how, (seed, place), slice(None), BATCH)) for place, batch in enumerate(batches)
    ]


@pytest.mark.parametrize("minibatch_size", [0, 3])
def test_student_and_teacher_see_one_augmented_batch_and_validation_none(minibatch_size: int) -> None:
    """Two epochs of two batches, one step each: drawn by (seed, batch) in any chunks; held-out images as they are."""
    module = CustomCLIPWrapper(
        image_tower(), bert(), minibatch_size, avg_word_embs=True, image_size=SIDE, seed=3, kept_minibatches=9, **HOW
    )
    student, teacher = Seen(module.model), Seen(module.distillation.teacher.model)
    trainer = bare_trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[student, teacher])
    trainer.fit(module, loader(PAIRS, BATCH), loader(PAIRS, PAIRS, seed=1))
    images = expected(pixels(PAIRS), seed=3)
    assert torch.equal(torch.cat(student.training), torch.cat(images))
    assert torch.equal(torch.cat(teacher.eval), torch.cat(images))
    assert torch.equal(torch.cat(student.eval), torch.cat([pixels(PAIRS, 5)] * 2))
    assert not torch.equal(images[0], images[2])
    assert not torch.equal(torch.cat(images[:2]), pixels(PAIRS))


def test_a_batch_that_comes_again_is_not_augmented_twice() -> None:
    """A loader that holds its one batch: each time it is drawn from the same images."""
    images = pixels(BATCH).repeat_interleave(2, 2).repeat_interleave(2, 3)
    batch = (images.clone(), [f"picture {index}" for index in range(BATCH)])
    module = CLIPWrapper("tiny", TINY, **HOW)
    seen = Seen(module.model)
    bare_trainer(max_epochs=2, callbacks=[seen]).fit(module, DataLoader([batch], batch_size=None))
    assert torch.equal(batch[0], images)
    assert torch.equal(seen.training[1], expected(images, 0)[1])


def test_normalised_images_stop_a_run_that_would_recolour_them() -> None:
    """Floats from a loader: refused at the first step, in words; flips alone train."""
    batch = (torch.randn(BATCH, 3, 16, 16), [f"picture {index}" for index in range(BATCH)])
    with pytest.raises(UserError, match=r"color_jitter is 0\.5 .*already normalized"):
        bare_trainer().fit(CLIPWrapper("tiny", TINY, color_jitter=0.5), DataLoader([batch], batch_size=None))
    bare_trainer().fit(CLIPWrapper("tiny", TINY, horizontal_flip=0.5), DataLoader([batch], batch_size=None))


def warnings_of(folder: Path, recwarn: pytest.WarningsRecorder, **how: float) -> list[str]:
    """What a run warns of captions."""
    recwarn.clear()
    data = TextImageDataModule(folder, BATCH, image_size=16, context_length=16, val_share=0.0)
    L.seed_everything(0, verbose=False)
    bare_trainer(max_steps=1).fit(CLIPWrapper("tiny", TINY, **how), data)
    return [str(one.message) for one in recwarn if "checked captions" in str(one.message)]


def test_flips_warn_of_captions_that_they_make_wrong(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """One of sixteen lines names a side: said once, with share and example, for the flip that turns it round alone."""
    folder = write_pairs(tmp_path / "pairs", 8)
    (folder / "005.txt").write_text("picture 5\na dot at the left\n")
    found = warnings_of(folder, recwarn, horizontal_flip=0.5, vertical_flip=0.5, color_jitter=0.5)
    assert len(found) == 1
    assert "horizontal_flip is 0.5, and 1 of 16 checked captions (6.2%) name" in found[0]
    assert "such as 'left' in “a dot at the left”" in found[0]
    assert warnings_of(folder, recwarn, vertical_flip=0.5, color_jitter=0.5) == []
