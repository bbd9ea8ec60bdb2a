"""Files of OpenAI's models, written by a restatement of openai/CLIP's model.py, against what ``load`` makes of them.

The restatement is of PyTorch's own parts: ``nn.MultiheadAttention``, ``nn.Sequential``, a mask in each block. Every
tensor is random, gains, biases and running statistics too, and in the precision that ``convert_weights`` leaves it in.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import sys
from collections import Counter, OrderedDict, defaultdict
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from train_clip import cli, load
from train_clip.errors import UserError

CONTEXT, VOCAB, EMBED = 11, 53, 20
TEXT_WIDTH, TEXT_LAYERS = 128, 3
SIZES = {"ViT": 24, "ResNet": 64}
PATCH, VIT_WIDTH, VIT_LAYERS = 8, 192, 2
BLOCKS, RESNET_WIDTH = (1, 2, 1, 1), 8
NUMBERS = ("input_resolution", "context_length", "vocab_size")
TOWERS = tuple(SIZES)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class WideLayerNorm(nn.LayerNorm):
    """In float32 whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        wide = F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)
        return wide.to(x.dtype)


class Block(nn.Module):
    """Of positions first, (L, B, W), with OpenAI's plain attribute for the mask."""

    def __init__(self, width: int, activation: type[nn.Module], mask: Tensor) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64)
        self.ln_1 = WideLayerNorm(width)
        layers = (
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", activation()),
            ("c_proj", nn.Linear(4 * width, width)),
        )
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = WideLayerNorm(width)
        self.attn_mask = mask

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask.to(x.dtype))[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width: int, layers: int, activation: type[nn.Module], mask: Tensor) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*[Block(width, activation, mask) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class ViT(nn.Module):
    def __init__(self, activation: type[nn.Module], size: int, patch: int, width: int, layers: int, embed: int) -> None:
        super().__init__()
        positions = (size // patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(positions, width))
        self.ln_pre = WideLayerNorm(width)
        self.transformer = Blocks(width, layers, activation, torch.zeros(positions, positions))
        self.ln_post = WideLayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, embed))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
        first = self.class_embedding.to(x.dtype) + torch.zeros_like(x[:, :1])
        x = torch.cat([first, x], dim=1) + self.positional_embedding.to(x.dtype)
        x = self.transformer(self.ln_pre(x).permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x[:, 0, :]) @ self.proj


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * channels
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)
            parts = [("-1", nn.AvgPool2d(stride)), ("0", shortcut), ("1", nn.BatchNorm2d(outputs))]
            self.downsample = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.avgpool(y)))
        if self.downsample is not None:
            x = self.downsample(x)
        return self.relu(y + x)


class AttentionPool(nn.Module):
    def __init__(self, side: int, width: int, embed: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(side**2 + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed)
        self.num_heads = width // 64

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x]) + self.positional_embedding[:, None].to(x.dtype)
        pooled, _ = F.multi_head_attention_forward(
            query=x,
            key=x,
            value=x,
            embed_dim_to_check=x.shape[-1],
            num_heads=self.num_heads,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            training=self.training,
            need_weights=False,
        )
        return pooled[0]


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = RESNET_WIDTH
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        self.relu = nn.ReLU(inplace=True)
        stages, inputs = [], width
        for stage, blocks in enumerate(BLOCKS):
            channels = width * 2**stage
            first = Bottleneck(inputs, channels, 2 if stage else 1)
            stages.append(nn.Sequential(first, *[Bottleneck(4 * channels, channels, 1) for _ in range(1, blocks)]))
            inputs = 4 * channels
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.attnpool = AttentionPool(SIZES["ResNet"] // 32, inputs, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.conv1.weight.dtype)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.avgpool(self.relu(self.bn3(self.conv3(x))))
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


class OpenAIModel(nn.Module):
    """``numbers``: whether, and as what, the three whole numbers are kept: "buffers", "attributes" or None."""

    def __init__(self, visual: nn.Module, activation: type[nn.Module], size: int, numbers: str | None) -> None:
        super().__init__()
        self.visual = visual
        mask = torch.full((CONTEXT, CONTEXT), float("-inf")).triu_(1)
        self.transformer = Blocks(TEXT_WIDTH, TEXT_LAYERS, activation, mask)
        self.token_embedding = nn.Embedding(VOCAB, TEXT_WIDTH)
        self.positional_embedding = nn.Parameter(torch.zeros(CONTEXT, TEXT_WIDTH))
        self.ln_final = WideLayerNorm(TEXT_WIDTH)
        self.text_projection = nn.Parameter(torch.zeros(TEXT_WIDTH, EMBED))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        for name, number in zip(NUMBERS, (size, CONTEXT, VOCAB), strict=True):
            if numbers == "buffers":
                self.register_buffer(name, torch.tensor(number))
            elif numbers == "attributes":
                setattr(self, name, torch.tensor(number))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image.to(self.text_projection.dtype))

    def encode_text(self, text: Tensor) -> Tensor:
        x = self.token_embedding(text).to(self.text_projection.dtype)
        x = x + self.positional_embedding.to(x.dtype)
        x = self.ln_final(self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
        return x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        images, texts = self.encode_image(image), self.encode_text(text)
        images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
        scores = self.logit_scale.exp() * images @ texts.t()
        return scores, scores.t()


def convert_weights(model: nn.Module) -> None:
    """As OpenAI's of that name: convolutions, matrices and projections in float16, the rest stays float32."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.half()
        elif isinstance(module, nn.MultiheadAttention):
            module.in_proj_weight.data = module.in_proj_weight.data.half()
            module.in_proj_bias.data = module.in_proj_bias.data.half()
        for name in ("text_projection", "proj"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                getattr(module, name).data = getattr(module, name).data.half()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif name == "logit_scale":
            tensor.fill_(3.3)
        elif tensor.is_floating_point() and tensor.ndim > 1 and "embedding" not in name:
            tensor.copy_(noise(tensor) * (tensor[0].numel() ** -0.5))
        elif tensor.is_floating_point():
            gain = 1.0 if name.endswith("weight") and tensor.ndim == 1 else 0.0
            tensor.copy_(gain + 0.3 * noise(tensor))


def build(tower: str, activation: type[nn.Module] = QuickGELU, numbers: str | None = None) -> OpenAIModel:
    """A model in eval mode, its weights as ``convert_weights`` leaves them."""
    image = ResNet() if tower == "ResNet" else ViT(activation, SIZES["ViT"], PATCH, VIT_WIDTH, VIT_LAYERS, EMBED)
    model = OpenAIModel(image, activation, SIZES[tower], numbers)
    randomize(model)
    convert_weights(model)
    return model.eval()


def inputs(tower: str) -> tuple[Tensor, Tensor]:
    """Three pictures, three captions that end at different places with the largest id."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, SIZES[tower], SIZES[tower], generator=generator)
    tokens = torch.randint(1, VOCAB - 2, (3, CONTEXT), generator=generator)
    for row, end in zip(tokens, (2, 6, CONTEXT - 1), strict=True):
        row[0], row[end], row[end + 1 :] = VOCAB - 2, VOCAB - 1, 0
    return images, tokens


def weights_of(model: OpenAIModel) -> dict[str, Tensor]:
    """What a loaded model must hold: the float32 of what was saved, without the three numbers."""
    state = model.state_dict()
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


@torch.no_grad()
def check(found: object, saved: OpenAIModel, tower: str, activation: str = "quick_gelu") -> None:
    """Tensors equal, sizes right, embeddings those of the restatement in float32."""
    model, preprocess, tokenizer = found
    expected = {name: tensor for name, tensor in weights_of(saved).items() if name not in NUMBERS}
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    assert not model.training
    assert (model.image_size, model.context_length, model.vocab_size, model.embed_dim) == (
        SIZES[tower],
        CONTEXT,
        VOCAB,
        EMBED,
    )
    assert (preprocess.size, tokenizer.context_length) == (SIZES[tower], CONTEXT)
    assert model.config.activation == activation
    images, tokens = inputs(tower)
    reference = copy.deepcopy(saved).float()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(model.encode_image(images), reference.encode_image(images), **close)
    torch.testing.assert_close(model.encode_text(tokens), reference.encode_text(tokens), **close)
    torch.testing.assert_close(model(images, tokens)[0], reference(images, tokens)[0], rtol=1e-4, atol=1e-4)


def as_script(model: OpenAIModel, path, tower) -> None:
    torch.jit.script(model).save(path)


def as_trace(model: OpenAIModel, path, tower) -> None:
    torch.jit.trace(model, inputs(tower), check_trace=False).save(path)


ARCHIVES = {"script": as_script, "trace": as_trace}


class Way(NamedTuple):
    """A way to save a state dict: a suffix, what stands before each name, and how it is wrapped."""

    suffix: str = ".pt"
    before: str = ""
    checkpoint: bool = False


WAYS = {
    "pt": Way(),
    "bin": Way(".bin"),
    "safetensors": Way(".safetensors"),
    "module": Way(before="module."),
    "module in safetensors": Way(".safetensors", before="module."),
    "compiled, then wrapped": Way(before="module._orig_mod."),
    "open_clip's training": Way(checkpoint=True),
    "open_clip's training on several GPUs": Way(before="module.", checkpoint=True),
}


def save_state(model: OpenAIModel, folder, way: Way):
    """Write the state dict; a training checkpoint has a real optimizer's state beside it."""
    path = folder / f"weights{way.suffix}"
    state = {way.before + name: tensor for name, tensor in model.state_dict().items()}
    if way.suffix == ".safetensors":
        save_file(state, path)
    elif way.checkpoint:
        torch.save({"epoch": 3, "name": "a run", "state_dict": state, "optimizer": stepped(model)}, path)
    else:
        torch.save(state, path)
    return path


def stepped(model: OpenAIModel) -> dict[str, object]:
    """The state of AdamW after a step."""
    parameters = [nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def sizes_file(folder, tower: str) -> str:
    """The sizes in a YAML file, as the message about heads asks for."""
    image = {
        "ViT": f"{{size: {SIZES['ViT']}, patch: {PATCH}, layers: {VIT_LAYERS}, width: {VIT_WIDTH}, heads: 3}}",
        "ResNet": f"{{size: {SIZES['ResNet']}, blocks: {list(BLOCKS)}, width: {RESNET_WIDTH}}}",
    }[tower]
    text = f"{{context: {CONTEXT}, vocab: {VOCAB}, layers: {TEXT_LAYERS}, width: {TEXT_WIDTH}, heads: 2}}"
    path = folder / "sizes.yaml"
    path.write_text(f"embed_dim: {EMBED}\nimage: {image}\ntext: {text}\n")
    return str(path)


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_the_restatement_tells_the_activations_apart(tower):
    """QuickGELU's weights under GELU give other embeddings, by 100 times what the tests below let pass."""
    model = build(tower)
    state = model.state_dict()
    other = build(tower, nn.GELU)
    other.load_state_dict(state)
    _, tokens = inputs(tower)
    difference = model.float().encode_text(tokens) - other.float().encode_text(tokens)
    assert difference.abs().max() > 1e-3


# A trace keeps no attribute that is not a buffer or a parameter.
@pytest.mark.parametrize(
    ("archive", "numbers"), [("script", "buffers"), ("script", "attributes"), ("trace", "buffers")]
)
@pytest.mark.parametrize("tower", TOWERS)
def test_torchscript_with_the_three_numbers(tower, archive, numbers, tmp_path):
    """A scripted and a traced archive in float16, the numbers as buffers or attributes: OpenAI's, so QuickGELU."""
    model = build(tower, numbers=numbers)
    ARCHIVES[archive](model, tmp_path / "model.pt", tower)
    check(load(tmp_path / "model.pt"), model, tower)


@pytest.mark.parametrize(("activation", "name"), [(QuickGELU, "quick_gelu"), (nn.GELU, "gelu")])
@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("tower", TOWERS)
def test_torchscript_without_the_numbers(tower, archive, activation, name, tmp_path):
    """The class of the blocks' activation says which it is; the heads are asked for, in words that name the choice."""
    model = build(tower, activation)
    path = tmp_path / "model.pt"
    ARCHIVES[archive](model, path, tower)
    with pytest.raises(UserError, match="--model_name") as error:
        load(path)
    assert "heads" in str(error.value)
    check(load(path, model_name=sizes_file(tmp_path, tower)), model, tower, name)


@pytest.mark.parametrize("archive", ARCHIVES)
def test_torchscript_of_gelu_with_the_three_numbers(archive, tmp_path):
    """OpenAI's code with GELU in place of QuickGELU: the archive names the class, and that is what was trained."""
    model = build("ViT", nn.GELU, numbers="buffers")
    ARCHIVES[archive](model, tmp_path / "model.pt", "ViT")
    check(load(tmp_path / "model.pt"), model, "ViT", "gelu")


@pytest.mark.parametrize("archive", ARCHIVES)
def test_torchscript_of_blocks_that_share_a_part(archive, tmp_path):
    """One activation module in all blocks, as a model of one's own may have it: no weights in it, all is clear."""
    model = build("ViT", numbers="buffers")
    for tower in (model.transformer, model.visual.transformer):
        for block in tower.resblocks:
            block.mlp.gelu = model.transformer.resblocks[0].mlp.gelu
    ARCHIVES[archive](model, tmp_path / "model.pt", "ViT")
    check(load(tmp_path / "model.pt"), model, "ViT")


@pytest.mark.parametrize(
    "way", ["pt", "bin", "safetensors", "module", "module in safetensors", "compiled, then wrapped"]
)
@pytest.mark.parametrize("tower", TOWERS)
def test_state_dict_with_the_three_numbers(tower, way, tmp_path):
    """The three numbers mark OpenAI's own: sizes from the shapes, heads of 64 channels, QuickGELU; nothing is asked."""
    model = build(tower, numbers="buffers")
    check(load(save_state(model, tmp_path, WAYS[way])), model, tower)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tower", TOWERS)
def test_state_dict_without_the_numbers(tower, way, tmp_path):
    """What no tensor tells is asked for, heads first, then the activation; each answer gives that restatement."""
    path = save_state(build(tower), tmp_path, WAYS[way])
    sizes = sizes_file(tmp_path, tower)
    with pytest.raises(UserError, match="--model_name"):
        load(path, activation="gelu")
    with pytest.raises(UserError, match="--activation quick_gelu or --activation gelu"):
        load(path, model_name=sizes)
    for name, kind in (("quick_gelu", QuickGELU), ("gelu", nn.GELU)):
        check(load(path, model_name=sizes, activation=name), build(tower, kind), tower, name)


def test_other_heads_than_64_channels(tmp_path):
    """Six heads of 32 in the image tower, by the YAML file: the restatement with as many, not that with three."""
    model = build("ViT")
    path = save_state(model, tmp_path, WAYS["pt"])
    sizes = pathlib.Path(sizes_file(tmp_path, "ViT"))
    sizes.write_text(sizes.read_text().replace("heads: 3", "heads: 6"))
    loaded = load(path, model_name=str(sizes), activation="quick_gelu").model
    three = model.float()
    six = copy.deepcopy(three)
    for block in six.visual.transformer.resblocks:
        other = nn.MultiheadAttention(VIT_WIDTH, 6)
        other.load_state_dict(block.attn.state_dict())
        block.attn = other
    images, _ = inputs("ViT")
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_image(images), six.encode_image(images), rtol=1e-5, atol=1e-5)
        assert (loaded.encode_image(images) - three.encode_image(images)).abs().max() > 1e-3


def test_another_activation_than_the_file_says_is_refused(tmp_path):
    """Of OpenAI's own weights the activation is known: a wrong choice stops, the right one is let pass."""
    model = build("ViT", numbers="buffers")
    path = save_state(model, tmp_path, WAYS["pt"])
    with pytest.raises(UserError, match="quick_gelu"):
        load(path, activation="gelu")
    check(load(path, activation="quick_gelu"), model, "ViT")


def test_float32_and_bfloat16(tmp_path):
    """Whole models in other precisions: the float32 of each, to the bit."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = build("ViT", numbers="buffers").to(dtype)
        check(load(save_state(model, tmp_path, WAYS["pt"])), model, "ViT")


CALLBACKS = "pytorch_lightning.callbacks"
ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": f"{CALLBACKS}.model_checkpoint"})
EarlyStopping = type("EarlyStopping", (), {"__module__": f"{CALLBACKS}.early_stopping"})


@pytest.fixture(autouse=True)
def as_lightning_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes by the names of Lightning 1.2. The package itself would take over the log of the one in use here."""
    for name in ("pytorch_lightning", CALLBACKS):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for one in (ModelCheckpoint, EarlyStopping):
        module = ModuleType(one.__module__)
        setattr(module, one.__name__, one)
        monkeypatch.setitem(sys.modules, one.__module__, module)


def lightning_checkpoint(model: OpenAIModel, **more: object) -> dict[str, object]:
    """As Lightning 1.2 wrote train-CLIP's: callbacks by their classes, tensors and paths among their state."""
    best = {"monitor": "val_loss", "best_model_score": torch.tensor(1.5), "best_model_path": "runs/epoch=1.ckpt"}
    return {
        "epoch": 2,
        "global_step": 400,
        "pytorch-lightning_version": "1.2.2",
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "callbacks": {ModelCheckpoint: best, EarlyStopping: {"wait_count": 1, "best_score": torch.tensor(0.5)}},
        "optimizer_states": [stepped(model)],
        "lr_schedulers": [{"base_lrs": [5e-4], "last_epoch": 2, "cycle": 1.0}],
        "hparams_name": "args",
        **more,
    }


HYPER_PARAMETERS = {
    "none": {},
    "empty": {"hyper_parameters": {}},
    "a namespace": {"hyper_parameters": argparse.Namespace(model_name="ViT-B/32", folder="data", gpus=[0, 1])},
    "a namespace in a dict": {"hyper_parameters": {"args": argparse.Namespace(lr=5e-4, folder=None), "minibatch": 64}},
    "a class": {"hyper_parameters": {"minibatch_size": 64}, "hparams_type": argparse.Namespace},
}


@pytest.mark.parametrize("arguments", HYPER_PARAMETERS)
@pytest.mark.parametrize("tower", TOWERS)
def test_train_clip_checkpoint(tower, arguments, tmp_path):
    """Lightning's checkpoint of train-CLIP's wrapper, whose model is OpenAI's code: QuickGELU and heads of 64."""
    model = build(tower)
    path = tmp_path / "last.ckpt"
    torch.save(lightning_checkpoint(model, **HYPER_PARAMETERS[arguments]), path)
    check(load(path), model, tower)


LEFT_BEHIND = {
    "set": {"a", "b"},
    "complex": 1j,
    "bytes": b"\x00\xff",
    "path": pathlib.PurePosixPath("runs/1"),
    "number of NumPy": np.float64(0.5),
    "array of NumPy": np.arange(3),
    "counter": Counter("aab"),
    "defaultdict of lists": defaultdict(list, {"losses": [1.0]}),
    "big number": 2**70,
    "type": torch.float16,
    "device": torch.device("cpu"),
    "size": torch.Size([2, 3]),
    "nothing": torch.zeros(0),
    "generator's state": torch.get_rng_state(),
}


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_what_a_run_leaves_in_its_checkpoint(name, tmp_path):
    """Plain things beside the weights, in the pickle of torch.save, which has some by their names of Python 2."""
    model = build("ViT")
    path = tmp_path / "last.ckpt"
    torch.save(lightning_checkpoint(model, hyper_parameters={"left": LEFT_BEHIND[name]}), path)
    check(load(path), model, "ViT")


FLAT = {
    "embed_dim": EMBED,
    "image_resolution": SIZES["ViT"],
    "vision_layers": VIT_LAYERS,
    "vision_width": VIT_WIDTH,
    "vision_patch_size": PATCH,
    "context_length": CONTEXT,
    "vocab_size": VOCAB,
    "transformer_width": TEXT_WIDTH,
    "transformer_heads": TEXT_WIDTH // 64,
    "transformer_layers": TEXT_LAYERS,
}


@pytest.mark.parametrize("kind", [dict, lambda values: argparse.Namespace(**values)], ids=["dict", "Namespace"])
def test_train_clip_checkpoint_with_its_configuration(kind, tmp_path):
    """A fork of train-CLIP that saves its wrapper's arguments: the flat configuration, in either of two forms."""
    model = build("ViT")
    path = tmp_path / "last.ckpt"
    arguments = {"model_name": "ViT", "config": kind(FLAT), "minibatch_size": 64}
    torch.save(lightning_checkpoint(model, hyper_parameters=arguments), path)
    check(load(path), model, "ViT")


def test_the_sizes_of_a_preset(tmp_path):
    """A plain state dict of a preset's sizes has known heads: the activation alone is asked for, the name is known."""
    from train_clip.models.config import read_config

    preset = read_config("demo-8-48px")
    image, text = preset.image, preset.text
    shape = {"embed": preset.embed_dim, "size": image.size, "patch": image.patch}
    visual = ViT(nn.GELU, width=image.width, layers=image.layers, **shape)
    model = nn.Module()
    model.visual = visual
    model.transformer = Blocks(text.width, text.layers, nn.GELU, torch.zeros(text.context, text.context))
    model.token_embedding = nn.Embedding(text.vocab, text.width)
    model.positional_embedding = nn.Parameter(torch.zeros(text.context, text.width))
    model.ln_final = WideLayerNorm(text.width)
    model.text_projection = nn.Parameter(torch.zeros(text.width, preset.embed_dim))
    model.logit_scale = nn.Parameter(torch.zeros(()))
    randomize(model)
    path = tmp_path / "demo.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(UserError, match="--activation") as error:
        load(path)
    assert "--model_name" not in str(error.value)
    loaded = load(path, activation="gelu").model
    assert (loaded.name, loaded.config.image, loaded.config.text) == (preset.name, image, text)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    images = torch.randn(2, 3, image.size, image.size)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_image(images), visual(images), rtol=1e-5, atol=1e-5)


def convert(source, target, kind: str) -> None:
    cli.main(["convert", str(source), str(target), "--to", kind])


@pytest.mark.parametrize("tower", TOWERS)
def test_converted_by_the_command(tower, tmp_path):
    """An archive through ``train-clip convert`` to each format, read again: all that was read from the archive itself.

    The file of --to safetensors holds the float32 tensors under OpenAI's names and nothing else.
    """
    model = build(tower, numbers="buffers")
    as_script(model, tmp_path / "model.pt", tower)
    expected = {name: tensor for name, tensor in weights_of(model).items() if name not in NUMBERS}
    for kind in ("open_clip", "safetensors", "huggingface"):
        target = tmp_path / f"{kind}.safetensors"
        if (tower, kind) == ("ResNet", "huggingface"):
            with pytest.raises((UserError, SystemExit)):
                convert(tmp_path / "model.pt", target, kind)
            assert not target.exists()
            continue
        convert(tmp_path / "model.pt", target, kind)
        check(load(target), model, tower)
        if kind == "safetensors":
            found = load_file(target)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("size", "side"), [(96, 3), (32, 1)])
@torch.no_grad()
def test_a_resnet_for_another_size(size, side, tmp_path):
    """The pooling's grid of 2×2 positions interpolated channel by channel, in the restatement, at that size: 1e-5."""
    model = build("ResNet", numbers="buffers")
    path = save_state(model, tmp_path, WAYS["pt"])
    loaded, preprocess, _ = load(path, image_size=size)
    reference = copy.deepcopy(model).float().visual
    positions = reference.attnpool.positional_embedding
    how = {"size": (side, side), "mode": "bicubic", "antialias": True}
    channels = [F.interpolate(channel.reshape(1, 1, 2, 2), **how).flatten() for channel in positions[1:].T]
    resized = torch.cat([positions[:1], torch.stack(channels, dim=1)])
    reference.attnpool.positional_embedding = nn.Parameter(resized)
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(loaded.encode_image(images), reference(images), rtol=1e-5, atol=1e-5)
    assert preprocess.size == loaded.image_size == size


@torch.no_grad()
def test_captions_of_another_length(tmp_path):
    """Shorter: the embeddings of captions that fit are those at full length. Longer: they take as many tokens."""
    model = build("ViT", numbers="buffers")
    path = save_state(model, tmp_path, WAYS["pt"])
    _, tokens = inputs("ViT")
    whole, short, long = (load(path, context_length=length) for length in (CONTEXT, 7, 2 * CONTEXT))
    expected = whole.model.encode_text(tokens[:2])
    torch.testing.assert_close(short.model.encode_text(tokens[:2, :7]), expected, rtol=1e-5, atol=1e-5)
    assert long.model.encode_text(torch.ones(1, 2 * CONTEXT, dtype=torch.long)).shape == (1, EMBED)
    assert (short.tokenizer.context_length, long.tokenizer.context_length) == (7, 2 * CONTEXT)


def test_tensors_that_are_views(tmp_path):
    """All float32 tensors in one storage, one after the other, and matrices saved transposed: each by its values."""
    model = build("ViT", numbers="buffers").float()
    state = model.state_dict()
    names = [name for name in state if state[name].is_floating_point()]
    room = torch.cat([state[name].flatten() for name in names])
    parts = room.split([state[name].numel() for name in names])
    views = {name: part.view(state[name].shape) for name, part in zip(names, parts, strict=True)}
    views["visual.proj"] = state["visual.proj"].T.contiguous().T
    views["text_projection"] = state["text_projection"].repeat(1, 2)[:, EMBED:]
    assert not any(views[name].is_contiguous() for name in ("visual.proj", "text_projection"))
    torch.save(state | views, tmp_path / "views.pt")
    check(load(tmp_path / "views.pt"), model, "ViT")
