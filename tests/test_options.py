"""Every option is declared once: its default is one from the dataclass to the run's configuration."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
from pathlib import Path
from typing import Any, Unpack, get_type_hints

import pytest
import yaml

from tests.conftest import TINY, write_pairs
from train_clip import CLIPWrapper, CustomCLIPWrapper, LoRAWrapper, PromptCLIPWrapper, TextImageDataModule, cli
from train_clip.encoders.finetune import StartOptions
from train_clip.errors import UserError
from train_clip.keywords import DataKeywords, TrainingKeywords
from train_clip.options import DataOptions, LoRAOptions, ModelOptions, Options, RunOptions, TrainingOptions
from train_clip.prompts.prompt_tune import PromptOptimizerOptions, PromptOptions

OF_TRAINING = TrainingOptions.groups()
GROUPS = {
    "train": (ModelOptions, DataOptions, *OF_TRAINING.values(), LoRAOptions, RunOptions),
    "finetune": (StartOptions, DataOptions, *OF_TRAINING.values(), RunOptions),
    "prompt-tune": (
        *(ModelOptions, DataOptions, PromptOptions, PromptOptimizerOptions, OF_TRAINING["step"], RunOptions),
    ),
}
# What the preset decides, and what else stands for None in a module made of it.
OF_PRESET = {"learning_rate": "lr", "weight_decay": "weight_decay", "betas": "betas", "eps": "eps"}
OF_MODULE = {"loss": "softmax", "optimizer": "adamw", "momentum": 0.9, "distillation": "none"}
# Values besides 3 for a number of things and 0.25 for other numbers.
OTHERS = {
    **{"optimizer": "sgd", "betas": [0.8, 0.9], "warmup_steps": 3, "adam_statistics": "bfloat16"},
    **{"half_weights": "text", "loss": "sigmoid", "equal_captions": "mask", "distillation": "softmax"},
    **{"lock_image": True, "lock_text": True, "compile": True},
}


def defaults(*groups: Any) -> dict[str, Any]:
    return {one.name: one.default for group in groups for one in dataclasses.fields(group)}


def settled(values: dict[str, Any]) -> dict[str, Any]:
    """Options with what a CLIP of ``TINY`` has for None."""
    preset = {name: TINY["optimizer"][of_preset] for name, of_preset in OF_PRESET.items()} | OF_MODULE
    return {name: preset.get(name) if value is None else value for name, value in values.items()}


def test_no_option_is_declared_twice() -> None:
    """Among the groups of a verb each name stands once; each has help, and a type."""
    for verb, groups in GROUPS.items():
        names = [one.name for group in groups for one in dataclasses.fields(group)]
        assert len(names) == len(set(names)), verb
        for group in groups:
            for one in dataclasses.fields(group):
                assert len(one.metadata["help"]) > 15, one.name
                assert not isinstance(one.type, str), one.name


@pytest.mark.parametrize("verb", GROUPS)
def test_help_has_the_dataclass_defaults(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``--help`` prints each option with its help and default, below its group's heading."""
    with pytest.raises(SystemExit):
        cli.parse(verb, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for group in GROUPS[verb]:
        assert f"{(group.__doc__ or '').splitlines()[0].rstrip('.')}:" in printed
        for one in dataclasses.fields(group):
            text = " ".join(one.metadata["help"].split())
            if one.default is None:
                assert "default: " in text or "instead of --" in text or one.name in ("folder", "resume"), one.name
            elif "default" not in text:
                text += f" (default: {one.default:g})" if type(one.default) is float else f" (default: {one.default})"
            shown = printed.split(f" --{one.name} ")[1]
            assert text.lower() in shown[: len(text) + 60].lower(), one.name


def test_the_command_line_brings_the_defaults() -> None:
    """Without an option, each group is the dataclass's own."""
    for verb, groups in GROUPS.items():
        arguments = cli.parse(verb, [])[1].arguments
        found: dict[str, Any] = {}
        for value in arguments.values():
            if isinstance(value, TrainingOptions):
                found |= {name: v for group in dataclasses.asdict(value).values() for name, v in group.items()}
            elif isinstance(value, Options):
                found |= dataclasses.asdict(value)
        assert found == defaults(*groups)


def test_signatures_have_the_dataclass_defaults() -> None:
    """Of the wrappers and the data module, but for a learning rate, which is that of the wrapper's own preset."""
    of_training, of_data = defaults(*OF_TRAINING.values()), defaults(DataOptions)
    for made, options in (
        (CLIPWrapper, of_training),
        (CustomCLIPWrapper, of_training),
        (PromptCLIPWrapper, of_training),
        (LoRAWrapper, of_training),
        (TextImageDataModule, of_data | {"seed": of_training["seed"]}),
    ):
        parameters = inspect.signature(made.__init__).parameters
        shared = {name: one.default for name, one in parameters.items() if name in options and name != "learning_rate"}
        assert shared
        assert shared == {name: options[name] for name in shared}


def test_keyword_arguments_are_the_options() -> None:
    """Their types by ``TrainingKeywords``; all of them in ``help``."""
    every = {one.name: one for group in OF_TRAINING.values() for one in dataclasses.fields(group)}
    types = {name: one.type for name, one in every.items()}
    for made in (CLIPWrapper, CustomCLIPWrapper, LoRAWrapper, PromptCLIPWrapper):
        own = list(inspect.signature(made.__init__).parameters.values())
        assert own[-1].annotation == Unpack[TrainingKeywords]
        beside = {one.name for one in own}
        assert get_type_hints(TrainingKeywords) == {name: kind for name, kind in types.items() if name not in beside}
        shown = inspect.signature(made).parameters
        assert set(every) < set(shown)
        assert {name: shown[name].default for name in set(every) - beside} == {
            name: every[name].default for name in set(every) - beside
        }
        assert "lock_image: bool = False" in pydoc.plain(pydoc.render_doc(made)).replace("\n", " ")[:10_000]
    assert "lock_image" not in inspect.signature(CLIPWrapper("tiny", TINY)).parameters  # what calls a module

    class Mine(CLIPWrapper):
        def __init__(self, name: str, **how: Any) -> None:
            super().__init__(name, TINY, **how)

    assert {"name", "lock_image", "minibatch_size"} < set(inspect.signature(Mine).parameters)
    assert Mine("a", lock_text=True).hparams["lock_text"]


def test_the_data_module_takes_every_option_of_data() -> None:
    """By name, and nothing else by chance."""
    parameters = inspect.signature(TextImageDataModule).parameters
    assert {one.name for one in dataclasses.fields(DataOptions)} < set(parameters)
    assert all(one.kind is not one.VAR_KEYWORD for one in parameters.values())
    own, given = inspect.signature(TextImageDataModule.__init__).parameters, get_type_hints(DataKeywords)
    assert own["options"].annotation == Unpack[DataKeywords]
    assert {one.name for one in dataclasses.fields(DataOptions)} - set(own) == set(given)
    assert given == {one.name: one.type for one in dataclasses.fields(DataOptions) if one.name in given}


def test_hparams_have_the_defaults() -> None:
    """All options, and the preset's value where a default is None; as plain data."""
    expected = settled(defaults(*OF_TRAINING.values()))
    hparams = dict(CLIPWrapper("tiny", TINY).hparams)
    assert {name: hparams[name] for name in expected} == expected
    assert set(hparams) - set(expected) == {"model_name", "config"}


def test_each_option_reaches_hparams_from_the_wrapper() -> None:
    """One at a time, another value than the default."""
    for name, default in defaults(*OF_TRAINING.values()).items():
        given = OTHERS.get(name, 3 if isinstance(default, int) else 0.25)
        beside = {"optimizer": "muon"} if name == "muon_learning_rate" else {}
        assert CLIPWrapper("tiny", TINY, **{name: given}, **beside).hparams[name] == given != default, name


def test_config_yaml_has_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with next to no option: each of the dataclasses' defaults, or the preset's; a momentum stays open."""
    monkeypatch.chdir(tmp_path)
    write_pairs(Path("data"), 6)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    given = {"model_name": "run/model.yaml", "folder": "data", "epochs": 1, "val_share": 0.5}
    cli.main(
        "train --model_name tiny.yaml --folder data --epochs 1 --val_share 0.5 --output run --accelerator cpu".split()
    )
    kept = yaml.safe_load(Path("run/config.yaml").read_text())
    expected = settled(defaults(*GROUPS["train"])) | {"momentum": None} | given
    assert {name: kept[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", 1, "batch_size is 1; expected 2 or above"),
        ("val_share", 1.0, r"val_share is 1\.0; expected from 0 to below 1"),
        ("loss", "hinge", "loss is 'hinge'; expected one of softmax, sigmoid"),
        ("betas", (0.9, 1.0), "betas is .*; expected two numbers from 0 to below 1"),
        ("distillation", "kl", "distillation is 'kl'; expected one of transport, softmax, none"),
    ],
)
def test_checks_name_option_value_and_what_is_expected(name: str, value: Any, message: str) -> None:
    group = next(group for group in GROUPS["train"] if name in group.__dataclass_fields__)
    with pytest.raises(UserError, match=message):
        group(**{name: value})


@pytest.mark.parametrize("line", ["batchsize: 7", "batch-size: 7", "batch_size: 7"])
def test_a_file_of_options_knows_what_the_command_line_knows(tmp_path: Path, line: str) -> None:
    """Aliases and dashes; the command line wins."""
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{line}\nlr: 1e-3\nmax-epochs: 3\nlogger: {{class_path: CSVLogger, init_args: {{save_dir: x}}}}\n")
    arguments = cli.parse("train", ["--config", str(file), "--lr", "2e-3"])[1].arguments
    assert arguments["data"].batch_size == 7
    assert arguments["training"].optimizer.learning_rate == 2e-3
    assert arguments["run"].epochs == 3


def test_a_file_of_options_can_resume(tmp_path: Path) -> None:
    """``resume`` in a file brings the run's own options, over which the file and the command line win."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "run" / "config.yaml").write_text("batch_size: 5\nseed: 4\nkeep: 7\n")
    file = tmp_path / "on.yaml"
    file.write_text(f"resume: {tmp_path / 'run'}\nseed: 6\n")
    arguments = cli.parse("train", ["--config", str(file), "--keep", "9"])[1].arguments
    found = arguments["data"].batch_size, arguments["training"].step.seed, arguments["run"].keep
    assert found == (5, 6, 9)


def test_of_two_files_the_later_says_what_to_resume(tmp_path: Path) -> None:
    """As it does of every other option: its run's options come, not those of the other's."""
    words = []
    for number, name in ((5, "one"), (6, "two")):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "last.ckpt").touch()
        (tmp_path / name / "config.yaml").write_text(f"batch_size: {number}\n")
        (tmp_path / f"{name}.yaml").write_text(f"resume: {tmp_path / name}\n")
        words += ["--config", str(tmp_path / f"{name}.yaml")]
    arguments = cli.parse("train", words)[1].arguments
    assert (arguments["data"].batch_size, arguments["run"].resume) == (6, str(tmp_path / "two"))
