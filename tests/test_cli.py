"""The command line: what reaches a verb's function."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import pytest

import train_clip
from tests.conftest import write_pairs
from train_clip import cli
from train_clip.encoders.finetune import StartOptions
from train_clip.errors import UsageError
from train_clip.options import (
    AugmentationOptions,
    DataOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    RunOptions,
    StepOptions,
    TowerOptions,
    TrainingOptions,
)
from train_clip.prompts.prompt_tune import PromptOptions

GROUPS = (ModelOptions, DataOptions, *TrainingOptions.groups().values(), RunOptions)
OWN_OPTIONS = {field.name for group in GROUPS for field in dataclasses.fields(group)}


def parsed(*words: str) -> dict:
    return cli.parse("train", ["--folder", "data_dir", *words])[1].arguments


def test_every_option_reaches_its_dataclass():
    """Each documented option, set to something else than its default, arrives typed in the right group."""
    values = parsed(
        *"--model_name RN50 --image_size 64 --minibatch_size 8 --kept_minibatches 2 --compile".split(),
        *"--gradient_checkpointing 3 --batch_size 32 --num_workers 3".split(),
        *"--resize_ratio 0.75 --shuffle false --val_share 0.2 --learning_rate 1e-3 --weight_decay 0.1".split(),
        *"--eps 1e-7 --warmup_steps 5 --epochs 7 --seed 3 --output out --max_bad 0.1 --val_pairs val.csv".split(),
        *"--pairs train.csv --image_column file --caption_column title --equal_captions mask --pair_by number".split(),
        *"--adam_statistics bfloat16 --half_weights image --ema 0.999".split(),
        *"--optimizer muon --momentum 0.8 --muon_learning_rate 2e-3".split(),
        *"--color_jitter 0.5 --grayscale 0.2 --horizontal_flip 0.4 --vertical_flip 0.1".split(),
        *"--mask_ratio 0.5 --unmasked_share 0.1 --stochastic_depth 0.2".split(),
        *"--loss sigmoid --lock_text --layer_decay 0.7 --distillation softmax --kl_coeff 2".split(),
        *("--betas", "[0.8, 0.9]", "--context_length", "20", "--activation", "gelu", "--pretrained", "FILE"),
    )
    assert values["model"] == ModelOptions("RN50", 64, 20, "gelu", "FILE")
    table = {"pairs": Path("train.csv"), "image_column": "file", "caption_column": "title", "pair_by": "number"}
    assert values["data"] == DataOptions(
        Path("data_dir"), 32, 3, 0.75, False, val_share=0.2, max_bad=0.1, val_pairs=Path("val.csv"), **table
    )
    rates = {"mask_ratio": 0.5, "unmasked_share": 0.1, "stochastic_depth": 0.2}
    assert values["training"] == TrainingOptions(
        OptimizerOptions("muon", 0.8, 2e-3, 1e-3, 0.1, (0.8, 0.9), 1e-7, 5, "bfloat16", "image", ema=0.999),
        ObjectiveOptions(equal_captions="mask", loss="sigmoid", **rates),
        TowerOptions(lock_text=True, layer_decay=0.7, distillation="softmax", kl_coeff=2.0),
        AugmentationOptions(color_jitter=0.5, grayscale=0.2, horizontal_flip=0.4, vertical_flip=0.1),
        StepOptions(8, 2, 3, True, 3),
    )
    assert values["run"] == RunOptions(7, Path("out"))


def test_the_list_of_options_is_the_documented_one():
    """No option comes or goes unnoticed: the fields of the groups, against the table in docs/training.md."""
    table = Path(__file__).parents[1].joinpath("docs/training.md").read_text(encoding="utf-8")
    assert OWN_OPTIONS | {"config"} == set(re.findall(r"^\| `--(\w+)`", table, re.MULTILINE))


def test_the_options_of_finetune_are_the_documented_ones():
    """Those beside the options of train, against the table in docs/finetuning.md."""
    document = Path(__file__).parents[1].joinpath("docs/finetuning.md").read_text(encoding="utf-8")
    table = document.split("## Options")[1].split("\n## ")[0]
    own = {field.name for group in (StartOptions, TowerOptions) for field in dataclasses.fields(group)}
    shared = {field.name for field in dataclasses.fields(ModelOptions)} - {"pretrained"}
    assert own - shared == set(re.findall(r"^\| `--(\w+)`", table, re.MULTILINE))


def test_the_options_of_prompt_tune_are_the_documented_ones():
    """Its own, against the table in docs/prompts.md."""
    document = Path(__file__).parents[1].joinpath("docs/prompts.md").read_text(encoding="utf-8")
    table = document.split("## Options")[1].split("\n## ")[0]
    own = {field.name for field in dataclasses.fields(PromptOptions)}
    assert own == set(re.findall(r"^\| `--(\w+)`", table, re.MULTILINE))


@pytest.mark.parametrize("option", ["--half_weights", "--muon_learning_rate"])
def test_prompt_tune_takes_the_options_that_act(option, capsys):
    """A backbone that stays and an optimizer that it does not have: no options, and not in its help."""
    with pytest.raises(SystemExit):
        cli.parse("prompt-tune", ["--help"])
    assert option not in capsys.readouterr().out
    with pytest.raises(UsageError, match=f"unknown option {option}"):
        cli.parse("prompt-tune", [option, "none"])


@pytest.mark.parametrize("words", [["--lock_image"], ["--lock_image", "--lock_text", "false"], ["--lock_image=true"]])
def test_a_bare_flag_is_true(words):
    """A yes or no whose default is no needs no value, wherever it stands; others do."""
    towers = cli.parse("finetune", ["--folder", "data_dir", *words])[1].arguments["training"].towers
    assert (towers.lock_image, towers.lock_text) == (True, False)
    with pytest.raises(UsageError, match="--folder: its value is missing; expected a path"):
        cli.parse("finetune", ["--folder", "--lock_image"])


def test_every_option_has_help():
    """Each option's sentence of help is printed, from the field of its dataclass; the Trainer's are named in a line."""
    printed = subprocess.run(
        [sys.executable, "-m", "train_clip", "train", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for name in OWN_OPTIONS:
        after = printed.split(f"\n  --{name} ")[1].split("\n  --")[0].split(maxsplit=1)[1]
        assert len(after) > 15, name
    assert "--max_time" not in printed
    assert "`train-clip train --help_trainer` lists them" in printed
    assert not re.search(r"null|None|Optional|Literal|Union|type:|<class", printed)


def test_the_help_on_the_trainer_says_what_holds_here(capsys):
    """All of Lightning's options but those with another name here, with this package's defaults, without types."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["finetune", "--help_trainer"])
    out = capsys.readouterr().out
    printed = " ".join(out.split())
    assert not stop.value.code
    names = set(re.findall(r"^  --(\w+)", out, re.MULTILINE))
    assert names == set(inspect.signature(L.Trainer).parameters) - {"max_epochs", "default_root_dir"}
    for said in (
        "--log_every_n_steps N optimizer steps between logged values; default: 10, or fewer",
        "--precision NAME such as 32-true; default: bf16-mixed on a GPU with bfloat16",
        "--logger VALUE a logger besides metrics.csv, such as WandbLogger; default: TensorBoardLogger",
        "the format DD:HH:MM:SS (days, hours, minutes seconds), as a timedelta, or",
    ):
        assert said in printed
    assert not re.search(r"``|:class:|:paramref:|\(type:", printed)


@pytest.mark.parametrize(
    "words",
    [["--batchsize", "7"], ["--batchsize=7"], ["--batch-size", "7"], ["--batch_size=7"]],
)
def test_known_spellings_mean_one_option(words):
    """What people type for the batch size, one and the same."""
    assert parsed(*words)["data"].batch_size == 7


def test_verbs_of_two_words(capsys):
    """``data check`` is a verb, ``data`` alone asks for the list, and what begins like one and is none is refused."""
    assert cli.split_verb(["data", "check", "folder"]) == ("data check", ["folder"])
    assert cli.split_verb(["train", "data"]) == ("train", ["data"])
    for words in ([], ["--help"], ["help"], ["data"], ["data", "--help"], ["help", "data"]):
        cli.main(words)
        printed = capsys.readouterr().out
        assert "data check" in printed
        assert ("  demo " in printed) == ("data" not in words)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "unknown command 'trian'. Did you mean train? `train-clip --help` lists all."),
        ("nonsense --help", "unknown command 'nonsense'. `train-clip --help` lists all."),
        ("data chek folder", "unknown command 'data chek'. Did you mean data check or data show?"),
        ("train --fold x", "unknown option --fold. Did you mean --folder?"),
        ("train --loger.project x", "unknown option --loger.project. Did you mean --logger or --lora?"),
        ("train --config cpuu", "--config cpuu: neither a file nor a recipe. Did you mean cpu? Recipes: cpu, demo, "),
        ("train --config", "--config: its value is missing. Recipes: cpu, demo, finetune"),
        ("train --config typo.yaml", "--config typo.yaml: unknown option epoch. Did you mean epochs"),
        ("train --config wrong.yaml", "--config wrong.yaml: epochs abc: expected a whole number."),
        ("train --model_name ViT-B32 --folder pairs", "Unknown model 'ViT-B32'. Did you mean ViT-B/32"),
        ("models --show RN-50", "Unknown model 'RN-50'. Did you mean RN50"),
        ("train --lock_image maybe", "--lock_image maybe: expected true or false."),
        ("train --optimizer adam", "--optimizer adam: expected adamw, sgd or muon. Did you mean adamw?"),
        ("train --learning-rate high", "--learning_rate high: expected a number."),
        ("train --betas 3", '--betas 3: expected numbers in brackets and quotes, such as "[0.9, 0.98]".'),
        ("train --val_share 2", "val_share is 2.0; expected from 0 to below 1."),
        ("--verison", "unknown command '--verison'. Did you mean --version?"),
        ("train --logger Nope", "--logger Nope: expected the name of a Logger, true or false."),
        ("train --callbacks Nope", "--callbacks Nope: expected the name of a Callback."),
        ("train --logger true --logger.project x", "--logger.project: is for a class; expected --logger to name one"),
        ("train --precision 17", "--precision 17: expected 64, 32, 16, "),
        ("train --folder", "--folder: its value is missing; expected a path."),
        ("train data_dir", "data_dir: not expected here; a value follows the name of its option."),
        ("inspect", "FILE is missing. `train-clip inspect --help` lists the options."),
        ("completion fish", "SHELL fish: expected bash, zsh or tcsh."),
        ("train", "Expected one of --folder, --pairs, --shards, --dataset."),
        ("train --folder pairs --save_every often", "--save_every often: expected optimizer steps"),
        ("train --folder pairs --strategy ddpp", "Lightning's Trainer does not accept these options: "),
    ],
)
def test_a_wrong_command_ends_with_2_and_says_what_is_meant(command, message, tmp_path, monkeypatch, capsys):
    """One exit code for verbs, options, values and names that do not exist, and one line in plain words."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typo.yaml").write_text("epoch: 3\n")
    (tmp_path / "wrong.yaml").write_text("epochs: abc\n")
    write_pairs(tmp_path / "pairs", 4)
    with pytest.raises(SystemExit) as stop:
        cli.main(command.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"train-clip: {message}" in error if message[0] != "E" else message in error
    assert error.count("\n") == 1
    assert not re.search("Traceback|<class|typing|subtypes", error)


def test_a_mistyped_name_of_weights_names_the_nearest(capsys):
    """As those of presets: a model of OpenAI's, by any command that reads weights."""
    for command in ("evaluate ViT-B32 --folder .", "inspect ViT-B32", "train --pretrained ViT-B32 --folder ."):
        with pytest.raises(SystemExit, match=r"ViT-B32: no such file.* Did you mean ViT-B/32"):
            cli.main(command.split())


def test_the_version_is_the_package_s_own(capsys):
    """On the command line, in Python, and in the installed package's metadata."""
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith(
        f"train-clip {train_clip.__version__} (torch {metadata.version('torch')}, "
    )
    assert metadata.version("train-clip") == train_clip.__version__


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_completes_verbs_and_options(shell, capsys, tmp_path):
    """The script names every verb; bash runs it and completes a verb, a group's verb, an option and a choice."""
    pytest.importorskip("shtab")
    cli.main(["completion", shell])
    script = capsys.readouterr().out
    assert all(word in script for verb in cli.VERBS for word in verb.split())
    if shell != "bash":
        return
    (tmp_path / "script").write_text(script)
    for line, expected in {
        "train-clip prompt": "prompt-tune",
        "train-clip data n": "npz",
        "train-clip train --minib": "--minibatch_size",
        "train-clip finetune --gradient_cl": "--gradient_clip_val",
        "train-clip train --half_weights te": "text",
    }.items():
        words = line.split()
        ask = (
            f"source {tmp_path / 'script'}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
            f"_shtab_train_clip {words[0]} {words[-1]} {words[-2]}; echo ${{COMPREPLY[@]}}"
        )
        ended = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert expected in ended.stdout.split(), (line, ended)


def test_a_closed_pipe_is_no_traceback(tmp_path):
    """A report into a pipe that nobody reads: no message, and the exit code that shells give to SIGPIPE."""
    write_pairs(tmp_path / "pairs", 3)
    command = [sys.executable, "-m", "train_clip.cli", "data", "check", "pairs", "--cache", "false"]
    reader, writer = os.pipe()
    os.close(reader)
    # As a shell has it: the report waits in a buffer until it is flushed.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize(
    "order", [["--config", "FILE", "--batch_size", "9"], ["--batch_size", "9", "--config", "FILE"]]
)
def test_the_command_line_wins_over_the_config_wherever_it_stands(tmp_path, order):
    """A recipe before or after an option: the option's value holds, the recipe's others too."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch_size: 4\nmodel_name: RN50\nprecision: bf16-mixed\n")
    values = parsed(*[str(recipe) if word == "FILE" else word for word in order])
    assert values["data"].batch_size == 9
    assert values["model"].model_name == "RN50"
    assert values["trainer"]["precision"] == "bf16-mixed"


def test_trainer_options_pass_through():
    """Options of Lightning's Trainer, a class among them, arrive as plain values."""
    trainer = parsed(
        "--max_steps", "5", "--gradient_clip_val", "1.0", "--logger", "CSVLogger", "--logger.save_dir", "x"
    )["trainer"]
    assert trainer["max_steps"] == 5
    assert trainer["gradient_clip_val"] == 1.0
    assert trainer["logger"]["class_path"] == "lightning.pytorch.loggers.CSVLogger"
    assert trainer["logger"]["init_args"]["save_dir"] == "x"


def test_a_user_error_ends_without_a_traceback(tmp_path):
    """What a user can mend is told in words, with exit code 1."""
    command = [sys.executable, "-m", "train_clip.cli", "train", "--folder", str(tmp_path / "absent")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert f"{tmp_path / 'absent'}: there is no such folder" in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_help_imports_nothing_heavy():
    """The list of verbs comes without torch, Lightning or NumPy."""
    code = "import sys; from train_clip.cli import main; main(['--help']); print(sorted(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    verbs, modules = printed.rsplit("\n", 2)[0], printed.rsplit("\n", 2)[1]
    assert all(verb in verbs for verb in cli.VERBS)
    assert not {"'torch'", "'lightning'", "'numpy'"} & set(modules.strip("[]").split(", "))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "Expected room for what is written; free some"),
        (errno.EISDIR, "a path"),
        (errno.EMFILE, "fewer loader processes"),
    ],
)
def test_a_file_that_fails_is_told_in_a_line(monkeypatch, number, expected):
    """Where the system does not name the file too, as with a full disk; other errors of the system are raised."""

    def fail(_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(SystemExit, match=f"train-clip: a file: {os.strerror(number)}. .*{expected}"):
        cli.main([])
    number = errno.ECONNRESET
    with pytest.raises(OSError, match=os.strerror(number)):
        cli.main([])
