"""Steps of the adapted models against a loop written out with transformers alone, in chunks and on two processes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.adapters.tiny_families import CONTEXT, HERE, PIXELS, SIZE, save
from tests.distributed.two_processes import bare_trainer, run
from train_clip.adapters.families import FAMILIES
from train_clip.adapters.find import TOWERS
from train_clip.adapters.wrapper import AdapterWrapper
from train_clip.checkpoints.found import find_weights
from train_clip.gather import world

NUM_PAIRS, RATE = 8, 1e-2
SGD = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": RATE, "weight_decay": 0.0, "warmup_steps": 0}
CHUNKED = [param for param in HERE if param.values != ("align",)]  # whose BatchNorms see chunks


def batch() -> tuple[Tensor, list[str]]:
    """Bytes, and captions of different lengths."""
    made_up = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_PAIRS, 3, SIZE, SIZE), dtype=torch.uint8, generator=made_up)
    return images, [f"picture {place}" + " of the dog" * (place % 3) for place in range(NUM_PAIRS)]


def begun(folder: Path, **how: Any) -> AdapterWrapper:
    """The module that trains a folder's weights on."""
    weights = find_weights(folder)
    names = {name: weights.arguments[name] for name in AdapterWrapper.names_of_model}
    module = AdapterWrapper(**names, **how)
    module.begin_with(weights.read(), weights.source)
    return module


def step(module: AdapterWrapper, precision: str = "32-true") -> dict[str, Tensor]:
    """One optimizer step on the batch, of which each process has its share; the weights after it."""
    rank, processes = world()
    images, captions = batch()
    share = slice(rank * NUM_PAIRS // processes, (rank + 1) * NUM_PAIRS // processes)
    bare_trainer(max_steps=1, precision=precision).fit(
        module, DataLoader([(images[share], captions[share])], batch_size=None)
    )
    return {name: one.detach().clone() for name, one in module.model.state_dict().items()}


def by_hand(name: str, model: Any, folder: Path) -> dict[str, Tensor]:
    """The same step: the library's model, its tokenizer, the loss written out, plain SGD at the full rate."""
    import transformers as hf

    images, captions = batch()
    values, family = PIXELS[name], FAMILIES[name]
    mean, std = (torch.tensor(values.get(f"image_{key}", [0.5] * 3)).view(3, 1, 1) for key in ("mean", "std"))
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    padding = "max_length" if family.padded else True
    tokens = tokenizer(captions, padding=padding, max_length=CONTEXT, truncation=True, return_tensors="pt")
    model.train()
    output = model(pixel_values=(images / 255 - mean) / std, **tokens)
    rows, columns = (F.normalize(one, dim=-1) for one in (output.image_embeds, output.text_embeds))
    scale = torch.nn.Parameter(-model.temperature.detach().log()) if name == "align" else model.logit_scale
    logits = scale.exp() * rows @ columns.T
    if family.loss == "sigmoid":
        loss = -F.logsigmoid((2 * torch.eye(NUM_PAIRS) - 1) * (logits + model.logit_bias)).sum() / NUM_PAIRS
    else:
        labels = torch.arange(NUM_PAIRS)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    with torch.no_grad():
        for parameter in (*model.parameters(), scale):
            if parameter.grad is not None:
                parameter -= RATE * parameter.grad
                parameter.grad = None
    found = {part: one for part, one in model.state_dict().items() if part != "temperature"}
    tower = {theirs: ours for ours, parts in TOWERS.items() for theirs in parts}
    named = {next((tower[p] for p in tower if part.startswith(p)), "") + part: one for part, one in found.items()}
    return named | {
        part: found.get(part, scale.detach()).reshape(())
        for part in ("logit_scale", "logit_bias")
        if part in found or part == "logit_scale"
    }


@pytest.mark.parametrize("name", HERE)
def test_a_step_equals_a_loop_of_the_librarys_own(name, tmp_path):
    """The family's loss, every tensor, temperature and bias after a step of SGD: to 1e-5."""
    model = save(name, tmp_path)
    found = step(begun(tmp_path, **SGD))
    expected = by_hand(name, model, tmp_path)
    assert found.keys() == expected.keys()
    for part, tensor in expected.items():
        torch.testing.assert_close(
            found[part], tensor, atol=1e-5, rtol=1e-4, msg=lambda text, part=part: f"{part}: {text}"
        )


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("how", [{"minibatch_size": 3}, {"gradient_checkpointing": 1}], ids=["chunks", "recomputed"])
def test_memory_savers_give_the_same_step(name, how, tmp_path):
    """Chunks of 3 of a batch of 8, or blocks computed again, against the batch in one piece: 1e-6."""
    save(name, tmp_path)
    expected, found = (step(begun(tmp_path, **SGD, **one)) for one in ({}, how))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_recomputed_blocks_are_recomputed(tmp_path):
    """With gradient checkpointing each of the two blocks of a tower runs twice in a step."""
    save("siglip", tmp_path)
    calls = []
    for how in ({}, {"gradient_checkpointing": 1}):
        module, seen = begun(tmp_path, **SGD, **how), []
        for tower in (module.model.visual, module.model.transformer):
            for part in tower.modules():
                if type(part).__name__ == "SiglipMLP":
                    part.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        step(module)
        calls.append(len(seen))
    assert calls[1] == calls[0] + 4  # two blocks in each of two towers; a pooling head is none


@pytest.mark.parametrize("name", HERE)
def test_what_is_trained(name, tmp_path):
    """All that the loss reaches, pooling heads, projections and temperature among it, and nothing else."""
    save(name, tmp_path)
    module = begun(tmp_path, **SGD)
    before = {part: one.detach().clone() for part, one in module.model.named_parameters()}
    step(module)
    trained = {id(one) for group in module.trainer.optimizers[0].param_groups for one in group["params"]}
    names = {part for part, one in module.model.named_parameters() if id(one) in trained}
    still = {part for part, one in module.model.named_parameters() if torch.equal(one, before[part])}
    # Keys have a bias that softmax takes out again.
    assert {part for part in still & names if "k_proj.bias" not in part and "key.bias" not in part} == set()
    idle = {part for part in before if part not in names}
    assert idle == {part for part in before if name == "align" and "text_model.pooler" in part}
    for needed in ("projection", "logit_scale") if name != "siglip" else ("head.probe", "head.attention", "logit_bias"):
        assert any(needed in part for part in names)


def on_two(folder: str, name: str) -> dict[str, Tensor]:
    return step(begun(Path(folder), **SGD, minibatch_size=3))


@pytest.mark.parametrize("name", ["siglip", "chinese_clip", "align"])
def test_two_processes_equal_one(name, tmp_path):
    """DDP over gloo, half of the batch and in chunks on each, against one process: 1e-6. Running statistics apart."""
    save(name, tmp_path / "m")
    (tmp_path / "out").mkdir()
    if name == "align":  # BatchNorm sees a process's half; only that both end alike is asked for
        first, second = run(partial(on_two, str(tmp_path / "m"), name), tmp_path / "out")
        running = [part for part in first if "running" in part or "tracked" in part]
        torch.testing.assert_close(*({p: t for p, t in one.items() if p not in running} for one in (first, second)))
        return
    found = run(partial(on_two, str(tmp_path / "m"), name), tmp_path / "out")
    expected = step(begun(tmp_path / "m", **SGD))
    for one in found:
        torch.testing.assert_close(one, expected, atol=1e-6, rtol=1e-5)


def test_the_scale_of_siglip_may_be_above_100(tmp_path):
    """Its own files have 117, which training keeps; with the softmax loss CLIP's limit holds."""
    save("siglip", tmp_path)
    still = SGD | {"learning_rate": 1e-9}
    assert step(begun(tmp_path, **still))["logit_scale"].exp() > 110
    with_softmax = step(begun(tmp_path, **still, loss="softmax"))
    assert with_softmax["logit_scale"].exp() <= 100.001 and "logit_bias" not in with_softmax


def test_the_loss_is_the_models_own_unless_told(tmp_path):
    """Sigmoid for SigLIP, softmax for others; a bias begins where there was none."""
    save("siglip", tmp_path / "s"), save("chinese_clip", tmp_path / "c")
    assert begun(tmp_path / "s").options.objective.loss == "sigmoid"
    assert begun(tmp_path / "c").options.objective.loss == "softmax"
    assert begun(tmp_path / "c", loss="sigmoid").model.logit_bias.item() == -10
