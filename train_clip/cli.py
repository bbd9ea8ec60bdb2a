"""Words → one typed function a verb. Parsing ends at the function's signature.

Nothing heavy is imported before a verb is known: ``train-clip --help`` takes a moment, not seconds.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import inspect
import itertools
import os
import re
import sys
import typing
from collections import OrderedDict
from collections.abc import Callable, Sequence, Set
from importlib import resources
from pathlib import Path
from typing import Any

from train_clip.errors import UserError

# verb, of one word or two → the module whose function of that name it calls, and what it does.
VERBS = {
    "demo": ("train_clip.commands.demo", "train a small CLIP on generated pictures, in minutes on a CPU"),
    "train": (
        "train_clip.commands.train",
        "train a CLIP on a folder of images and captions, from scratch or from weights",
    ),
    "finetune": ("train_clip.encoders.finetune", "join two pretrained encoders, or train a trained CLIP on your pairs"),
    "prompt-tune": ("train_clip.prompts.prompt_tune", "tune visual prompts beside a pretrained CLIP"),
    "merge": ("train_clip.commands.merge", "mix a fine-tuned model with the one it began as, and score the mixtures"),
    "inspect": ("train_clip.commands.inspect", "tell what lies in a file of weights, in a moment"),
    "convert": ("train_clip.commands.convert", "write a model for open_clip, Hugging Face or readers of .safetensors"),
    "evaluate": ("train_clip.commands.evaluate", "score a checkpoint: retrieval, and zero-shot classification"),
    "data check": ("train_clip.data_tools.check", "look at every pair before training: what is bad, cut, repeated"),
    "data show": ("train_clip.data_tools.show", "write a contact sheet: pairs as the model will see them"),
    "data split": ("train_clip.data_tools.split", "divide pairs into tables for training, validation and test"),
    "data npz": ("train_clip.data_tools.npz", "decode every image once, into arrays that training reads faster"),
    "models": ("train_clip.commands.models", "list the models, their sizes and their optimizer numbers"),
}

# Spellings that people know → the option's one name.
ALIASES = {
    "--batchsize": "--batch_size",
    "--minibatchsize": "--minibatch_size",
    "--max_epochs": "--epochs",
    "--lr": "--learning_rate",
}

# System errors whose cause is a path that a user gave, or its disk.
OF_FILES = (
    errno.ENOENT,
    errno.EACCES,
    errno.EEXIST,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EROFS,
)
OF_FULL_DISKS = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the verb that the arguments name; without one, or with ``--help``, list the verbs.

    Args:
        arguments: those of the process where None.
    """
    _print_anything()
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
        # What is left to print goes out here: at the interpreter's end a closed pipe would be a traceback.
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"train-clip: {_message(error)}")
    except BrokenPipeError:
        # `| head` has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, as shells report it
    except OSError as error:
        if error.errno in OF_FULL_DISKS:
            expected = "room for what is written; free some. A run goes on from its newest checkpoint by --resume"
        elif error.errno in OF_FILES:
            expected = "a path that can be read or written"
        else:
            raise
        sys.exit(f"train-clip: {error.filename or 'a file'}: {error.strerror}. Expected {expected}.")
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns a Ctrl-C that comes before the first batch into an exit of 1.
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        sys.exit(130)  # 128 + SIGINT, as shells report it


def _run(words: list[str]) -> None:
    verb, rest = split_verb(words)
    if verb is not None:
        function, call = parse(verb, rest)
        function(*call.args, **call.kwargs)
    elif not rest or rest[0] in ("-h", "--help"):
        print(_overview())
    else:
        sys.exit(f"train-clip: unknown verb {' '.join(rest[:2])!r}; expected one of {', '.join(VERBS)}.")


def _print_anything() -> None:
    """Arrows and × stand in messages; a terminal or log that cannot write them must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def split_verb(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take the verb, of one word or two, off the arguments; None where they begin with none."""
    for number in (2, 1):
        if " ".join(words[:number]) in VERBS:
            return " ".join(words[:number]), list(words[number:])
    groups = {verb.partition(" ")[0] for verb in VERBS if " " in verb}
    # A group alone, or with --help, asks for the list of all verbs.
    asks = bool(words) and words[0] in groups and (len(words) == 1 or words[1] in ("-h", "--help"))
    return None, list(words[1:] if asks else words)


def parse(verb: str, words: Sequence[str]) -> tuple[Callable[..., Any], inspect.BoundArguments]:
    """Read a verb's arguments.

    Args:
        verb: a key of ``VERBS``.
        words: what follows it.

    Returns:
        The verb's function, and what to call it with.
    """
    function = getattr(importlib.import_module(VERBS[verb][0]), verb.replace(" ", "_").replace("-", "_"))
    parser, groups = _parser(verb, function)
    kinds = [kind for kind, _ in groups.values() if dataclasses.is_dataclass(kind)]
    fields_of_all = [field for kind in kinds for field in dataclasses.fields(kind)]
    flags = {f"--{field.name}" for field in fields_of_all if field.default is False}
    words = _bare_flags(normalise(words, verb), flags)
    _require_one_word(words, {f"--{field.name}" for field in fields_of_all if "[" in str(field.type)})
    parsed = parser.parse_args(words).as_dict()
    values = OrderedDict()
    for name, (kind, fields) in groups.items():
        values[name] = kind(**{field: parsed[field] for field in fields}) if kind else parsed[name]
    return function, inspect.BoundArguments(inspect.signature(function), values)


def normalise(words: Sequence[str], verb: str = "") -> list[str]:
    """Give every option its one name, and move ``--config`` to the front, so that the command line wins over it.

    ``--batch-size`` and ``--batchsize=8`` become ``--batch_size`` and ``--batch_size=8``; a recipe's name becomes its
    path. A run that is resumed (``--resume``) brings the options that it began with.

    Args:
        words: what follows the verb.
        verb: a run that was begun by another is refused.
    """
    rest: list[str] = []
    configs: list[str] = []
    values: dict[str, str] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        option, equals, value = word.partition("=")
        if option == "--config" and (equals or queue):
            configs += ["--config", _recipe(value if equals else queue.pop(0))]
        elif option.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
            values[option] = value if equals or not queue else queue[0]
            rest.append(ALIASES.get(option, option) + equals + value)
        else:
            rest.append(word)
    if "--resume" in values:
        configs = _options_of_run(verb, values["--resume"], values.get("--output")) + configs
    return configs + rest


def _bare_flags(words: list[str], flags: Set[str]) -> list[str]:
    """Let ``--lock_image`` stand for ``--lock_image true``."""
    pairs = itertools.pairwise([*words, "--"])
    return [word + "=true" if word in flags and after.startswith("--") else word for word, after in pairs]


def _require_one_word(words: list[str], lists: Set[str]) -> None:
    """Show the form of several numbers, which the parser would call something else.

    Args:
        words: of the command line.
        lists: options that take several values.

    Raises:
        UserError: there are several words, or one without brackets.
    """
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option not in lists:
            continue
        given = [value] * bool(equals) + list(itertools.takewhile(_is_number, words[place + 1 :]))
        numbers = [number for some in given for number in some.split(",")]
        if len(numbers) > 1 and all(map(_is_number, numbers)):
            raise UserError(
                f'{option} {" ".join(given)}: several values are one word: {option} "[{", ".join(numbers)}]".'
            )


def _is_number(word: str) -> bool:
    return re.fullmatch(r"[\d.,e+-]*\d[\d.,e+-]*", word) is not None


def _options_of_run(verb: str, resume: str, output: str | None) -> list[str]:
    """A run that is resumed brings its own options, before all others."""
    from train_clip.commands.run_folder import require_verb, run_to_resume

    run = run_to_resume(resume, None if output is None else Path(output))
    if run is None or not (run / "config.yaml").is_file():
        return []
    require_verb(run, verb)
    # The run's own copy of its model, wherever the run lies by now.
    model = ["--model_name", str(run / "model.yaml")] if (run / "model.yaml").is_file() else []
    return ["--config", str(run / "config.yaml"), *model]


def _recipe(name: str) -> str:
    """The path of a recipe that ships with the package, or the path that was given."""
    folder = resources.files("train_clip") / "recipes"
    shipped = {Path(file.name).stem: str(file) for file in folder.iterdir() if file.name.endswith(".yaml")}
    if name in shipped or Path(name).is_file():
        return shipped.get(name, name)
    raise UserError(f"--config {name}: neither a file nor a recipe. Recipes: {', '.join(sorted(shipped))}.")


def _parser(verb: str, function: Callable[..., Any]) -> tuple[Any, dict[str, tuple[Any, list[str]]]]:
    """Build a verb's parser from its function's signature and docstring.

    A dataclass is added flat, field by field; a positional-only parameter is a positional argument; a mapping of
    Trainer options brings the Trainer's own arguments.
    """
    from docstring_parser import parse as parse_docstring
    from jsonargparse import ArgumentParser

    docstring = parse_docstring(function.__doc__ or "")
    help_texts = {parameter.arg_name: parameter.description for parameter in docstring.params}
    parameters = inspect.signature(function).parameters
    positional = [name for name, one in parameters.items() if one.kind is inspect.Parameter.POSITIONAL_ONLY]
    parser = ArgumentParser(
        prog=f"train-clip {verb}",
        # The list of all options, which would bury an error below it, is what --help prints.
        usage=" ".join(["%(prog)s", *(_in_usage(parameters[name]) for name in positional), "[options]"]),
        description=docstring.short_description,
        allow_abbrev=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of options, or the name of a recipe")
    groups: dict[str, tuple[Any, list[str]]] = {}
    hints = typing.get_type_hints(function)
    for name, parameter in parameters.items():
        hint, text = hints[name], help_texts.get(name)
        if dataclasses.is_dataclass(hint):
            groups[name] = (hint, parser.add_class_arguments(hint, None))
            for field in dataclasses.fields(hint):
                if "help" in field.metadata:
                    parser._option_string_actions[f"--{field.name}"].help = field.metadata["help"]
        elif isinstance(hint, type) and issubclass(hint, dict):
            groups[name] = (hint, _add_trainer(parser))
        elif name in positional:
            required = parameter.default is inspect.Parameter.empty
            optional = {} if required else {"nargs": "?", "default": parameter.default}
            parser.add_argument(name, type=hint, help=text, **optional)
            groups[name] = (None, [])
        else:
            parser.add_argument(f"--{name}", type=hint, default=parameter.default, help=text)
            groups[name] = (None, [])
    return parser, groups


def _in_usage(parameter: inspect.Parameter) -> str:
    """A positional argument in the line on usage."""
    name = parameter.name.upper()
    return name if parameter.default is inspect.Parameter.empty else f"[{name}]"


def _add_trainer(parser: Any) -> list[str]:
    """Add the Trainer's arguments as plain values; the verb makes what they describe."""
    import lightning as L

    from train_clip.commands.options import OWN_TRAINER_OPTIONS

    return parser.add_class_arguments(L.Trainer, None, skip=set(OWN_TRAINER_OPTIONS), instantiate=False)


def _message(error: UserError) -> str:
    """What an error says. A loader's worker sends its traceback, with the message at the end."""
    return str(error).rsplit("UserError: ", 1)[-1].rstrip()


def _overview() -> str:
    verbs = "\n".join(f"  {verb:11} {help_text}" for verb, (_, help_text) in VERBS.items())
    return (
        f"Train CLIP on your own images and captions.\n\n{verbs}\n\n"
        "`train-clip VERB --help` lists a verb's options. Start with `train-clip demo`."
    )


if __name__ == "__main__":
    main()
