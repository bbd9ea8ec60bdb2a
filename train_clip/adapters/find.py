"""Dual encoders of transformers in a folder or a checkpoint: which one it is, or why it is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from typing_extensions import override

from train_clip.adapters.families import FAMILIES, REFUSED, Family
from train_clip.checkpoints import found, own, read, sources
from train_clip.checkpoints.huggingface import JOIN
from train_clip.errors import UserError
from train_clip.options import WeightOptions

TOWERS = {"visual.": ("vision_model.", "visual_projection."), "transformer.": ("text_model.", "text_projection.")}
COUNTS = ("position_ids", "token_type_ids")  # which older versions kept as tensors
SHOWN = "hidden_size num_hidden_layers num_attention_heads image_size patch_size vocab_size".split()
KEPT = {"family": str, "name": str, "config": Mapping, "processor": Mapping}  # what a checkpoint tells of a model
KNOWN = ", ".join(family.title for family in FAMILIES.values())


@dataclass(frozen=True, kw_only=True)
class FoundAdapted(found.Found):
    """A dual encoder of transformers. Its ``arguments`` are those of ``AdapterWrapper``."""

    writer: ClassVar[str] = "train_clip.adapters.write:write"

    @override
    def settled(self, choices: WeightOptions, backbone: str | Path | None) -> Self:
        super().settled(choices, backbone)
        # Before memory is taken for what a configuration claims.
        import torch

        with torch.device("meta"):
            told = {name: torch.empty(one.shape, dtype=getattr(torch, one.dtype)) for name, one in self.records.items()}
            found.require_forms(self._model(), self.as_kept(told), self.source)
        return self

    @override
    def as_kept(self, tensors: found.Tensors) -> found.Tensors:
        from train_clip.adapters.model import named_as_here

        return named_as_here(super().as_kept(tensors), self.arguments["adapter"])

    @override
    def empty(self) -> tuple[Any, Any]:
        from train_clip.adapters.model import parameters_on_meta
        from train_clip.adapters.tokenizer import tokenizer_for

        with parameters_on_meta():
            model = self._model()
        return model, tokenizer_for(model, self.arguments["tokenizer"])

    def _model(self) -> Any:
        from train_clip.adapters.model import AdaptedModel

        model = AdaptedModel(self.arguments["adapter"])
        if "logit_bias" in self.records:
            model.add_bias()
        return model

    @override
    def describe(self) -> dict[str, str]:
        adapter = self.arguments["adapter"]
        told = {"model": f"{adapter['name']}, {FAMILIES[adapter['family']].model}"}
        for kind in ("vision", "text"):
            settings = adapter["config"].get(f"{kind}_config") or {}
            told[f"{kind} tower"] = (
                ", ".join(f"{name} {settings[name]}" for name in SHOWN if name in settings) or "default"
            )
        return told | {"loss": "sigmoid" if "logit_bias" in self.records else "softmax"} | super().describe()


def find_adapted(contents: read.Contents) -> FoundAdapted | None:
    """Find a checkpoint of an adapted model, or a family's own files."""
    told = own.of_lightning(contents)
    adapter = told["arguments"].get("adapter")
    if isinstance(adapter, Mapping) and KEPT.keys() <= set(adapter):
        if not all(isinstance(adapter[name], kind) for name, kind in KEPT.items()):
            raise UserError(f"{contents.path}: its adapter is not as this package writes it. Use another checkpoint.")
        family_of(adapter)
        _require_sound(adapter["config"], contents)
        told["arguments"] |= {"tokenizer": told["arguments"].get("tokenizer")}
        return FoundAdapted(format="train-clip checkpoint", **told)
    # Weights of open_clip, and files that say what they hold, may lie beside a configuration for transformers.
    says_it = {own.LIGHTNING, own.METADATA} & set(contents.data)
    if says_it or sources.HF_CONFIG not in contents.configs or sources.OPEN_CLIP_CONFIG in contents.configs:
        return None
    config, source = contents.settings(sources.HF_CONFIG), str(contents.path)
    kind = str(config.get("model_type"))
    if kind == "clip" or (kind not in FAMILIES | REFUSED and not {"text_config", "vision_config"} <= set(config)):
        return None
    _require_known(config, kind, source)
    _require_sound(config, contents)
    pixels = contents.settings(sources.HF_PIXELS) or contents.settings(sources.HF_PROCESSOR).get("image_processor")
    family = FAMILIES[kind]
    if not isinstance(pixels, dict) or not pixels:
        raise UserError(
            f"{source}: no {sources.HF_PIXELS} next to the weights, which says how images are prepared. Copy it from "
            "the model that they were trained from."
        )
    processor = str(pixels.get("image_processor_type", pixels.get("feature_extractor_type", family.processor)))
    if processor.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor") != family.processor:
        raise UserError(
            f"{source}: its image processor is {processor}, of another family; expected {family.processor}. Copy "
            f"{sources.HF_PIXELS} from the model that the weights were trained from."
        )
    folder = contents.path.parent if contents.path.is_file() else contents.path
    adapter = {"family": kind, "name": folder.resolve().name, "config": config, "processor": pixels}
    records = {name: record for name, record in contents.tensors.items() if not name.endswith(COUNTS)}
    return FoundAdapted(
        format=f"Hugging Face {family.model}",
        source=source,
        records={renamed(name): record for name, record in records.items()},
        rename=lambda tensors: _scaled(tensors, family),
        arguments={"adapter": adapter, "tokenizer": str(folder)},
    )


def family_of(adapter: Mapping[str, Any]) -> Family:
    """The family that a description tells of."""
    if (kind := adapter["family"]) not in FAMILIES:
        raise UserError(
            f"{adapter['name']}: of the family {kind!r}; known are {', '.join(FAMILIES)}. Update train-clip."
        )
    return FAMILIES[kind]


def _require_known(config: Mapping[str, Any], kind: str, source: str) -> None:
    classes = config.get("architectures")
    if "auto_map" in config:
        raise UserError(
            f"{source}: its config.json names a class of its own (auto_map), whose code comes with the weights and is "
            f"never run. Known without it: {KNOWN}."
        )
    found = f"{source}: config.json has model_type = {config.get('model_type')!r}"
    if kind in REFUSED:
        raise UserError(f"{found}, {REFUSED[kind]}. Expected CLIP, {KNOWN}.")
    if kind not in FAMILIES:
        raise UserError(f"{found}, which is not supported; expected CLIP, {KNOWN}. Its towers can be joined: {JOIN}")
    if classes and classes != [FAMILIES[kind].model]:
        raise UserError(
            f"{found} and architectures {classes}; expected {FAMILIES[kind].model}, both towers of it. Use the whole "
            "model's files."
        )


def _require_sound(config: Mapping[str, Any], contents: read.Contents) -> None:
    # Before a model is built of it: more layers than there are tensors for.
    for name in ("text_config", "vision_config"):
        settings = config.get(name) or {}
        if not isinstance(settings, Mapping):
            raise UserError(f"{contents.path}: its {name} is a {type(settings).__name__}; expected keys and values.")
        repeats = settings.get("num_block_repeats")
        counts = [settings.get(name) for name in ("num_hidden_layers", "depth_coefficient")]
        counts += repeats if isinstance(repeats, list) else []
        if most := [one for one in counts if isinstance(one, int | float) and one > len(contents.tensors)]:
            raise UserError(
                f"{contents.path}: {most[0]:,} layers, and {len(contents.tensors):,} tensors, too few for that."
            )


def renamed(name: str) -> str:
    """Their name → ours: a tower's own name is before it."""
    return next((ours + name for ours, theirs in TOWERS.items() if name.startswith(theirs)), name)


def _scaled(tensors: found.Tensors, family: Family) -> found.Tensors:
    """A temperature that divides, T, as the logarithm of a factor: -ln T."""
    return {
        "logit_scale" if name == family.temperature else name: -one.log() if name == "temperature" else one
        for name, one in tensors.items()
    }
