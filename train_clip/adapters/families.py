"""The families of dual encoders that are known: what is said here of one, its own files do not say.

Sources: github.com/huggingface/transformers, models/NAME; those of single settings stand beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]
BICUBIC, BILINEAR = 3, 2  # as Pillow counts

# Defaults of image processors, for settings that their files leave out.
OF_EVERY = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
OF_CLIP = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "resample": BICUBIC}
OF_CLIP |= {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
OF_SIGLIP: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "resample": BICUBIC,
    "image_mean": HALF,
    "image_std": HALF,
}
OF_EFFICIENTNET = {"size": {"height": 346, "width": 346}, "crop_size": 289, "resample": BICUBIC, "include_top": True}
OF_EFFICIENTNET |= {"image_mean": HALF, "image_std": HALF}


@dataclass(frozen=True)
class Family:
    """A family, which is known by the ``model_type`` of its ``config.json``."""

    title: str
    model: str  # its class in transformers, whose get_image_features and get_text_features are the features
    processor: str  # the class of its image processor
    pixels: Mapping[str, Any]  # defaults of that
    any_size: bool = False  # whether it takes images of other sizes than its configuration's
    width: str = "projection_dim"  # the setting that is the embedding's width
    temperature: str = "logit_scale"  # whose exp multiplies; or "temperature", which divides
    loss: str = "softmax"
    # Whether captions are padded to the full length, and read at the last position, padding or not.
    padded: bool = False
    lower_case: bool = False  # whether it was trained on lower-case captions, whatever its tokenizer does
    # What layers are called below in some files and some versions of transformers, and in others.
    names_of_layers: tuple[str, ...] = ()


SIGLIP: dict[str, Any] = {"loss": "sigmoid", "padded": True, "lower_case": True, "width": "vision_config.hidden_size"}
LAYERS = (".layer.", ".layers.")
EFFICIENTNET = "EfficientNetImageProcessor"
FAMILIES = {
    # The SigLIP 2 of fixed sizes is of the same type, with another tokenizer, which leaves capitals as they are where
    # the model was trained without them (arXiv 2502.14786, section 2.1).
    "siglip": Family("SigLIP, SigLIP 2", "SiglipModel", "SiglipImageProcessor", OF_SIGLIP, **SIGLIP),
    "metaclip_2": Family("MetaCLIP 2", "MetaClip2Model", "CLIPImageProcessor", OF_CLIP),
    "chinese_clip": Family("Chinese-CLIP", "ChineseCLIPModel", "ChineseCLIPImageProcessor", OF_CLIP),
    "altclip": Family("AltCLIP", "AltCLIPModel", "CLIPImageProcessor", OF_CLIP, names_of_layers=LAYERS),
    "align": Family("ALIGN", "AlignModel", EFFICIENTNET, OF_EFFICIENTNET, any_size=True, temperature="temperature"),
}

# Models that embed images and captions likewise, and are more, or something else, than two towers and a temperature.
REFUSED = {
    "siglip2": "SigLIP 2 NaFlex, which takes images of any form; SigLIP 2 of a fixed size is known",
    "blip": "a captioner with a matching head",
    "blip-2": "a language model with several embeddings an image",
    "clipseg": "a segmentation model",
    "flava": "a model with a third, joint encoder",
    "groupvit": "a segmentation model",
    "owlvit": "a detector",
    "owlv2": "a detector",
}
