"""Words → one typed function a verb. Parsing ends at the function's signature.

Nothing heavy is imported before a verb is known: ``train-clip --help`` takes a moment, not seconds.
"""

import argparse
import dataclasses
import errno
import inspect
import os
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from train_clip.errors import UserError
from train_clip.options import TrainerOptions

# verb, of one word or two → the function that it calls, and what it does.
VERBS = {
    "demo": ("train_clip.commands.demo:demo", "train a small CLIP on generated pictures, in minutes on a CPU"),
    "train": ("train_clip.commands.train:train", "train a CLIP on images and captions, from scratch or from weights"),
    "finetune": ("train_clip.encoders.finetune:finetune", "train two joined encoders, or a trained CLIP, on pairs"),
    "prompt-tune": ("train_clip.prompts.prompt_tune:prompt_tune", "tune visual prompts beside a pretrained CLIP"),
    "merge": ("train_clip.commands.merge:merge", "mix a fine-tuned model with its start, and score the mixtures"),
    "inspect": ("train_clip.commands.inspect:inspect", "tell what lies in a file of weights, in a moment"),
    "convert": ("train_clip.commands.convert:convert", "write a model for open_clip, Hugging Face or safetensors"),
    "evaluate": ("train_clip.commands.evaluate:evaluate", "score a checkpoint: retrieval, zero-shot classification"),
    "data check": ("train_clip.data_tools.check:data_check", "look at every pair before training: bad, cut, repeated"),
    "data show": ("train_clip.data_tools.show:data_show", "write a contact sheet: pairs as the model will see them"),
    "data split": ("train_clip.data_tools.split:data_split", "divide pairs into tables: training, validation, test"),
    "data npz": ("train_clip.data_tools.npz:data_npz", "decode every image once, into arrays that load faster"),
    "models": ("train_clip.commands.models:models", "list the models, their sizes and their optimizer numbers"),
}
# Spellings that people know → the option's one name.
ALIASES = {"batchsize": "batch_size", "minibatchsize": "minibatch_size", "max_epochs": "epochs", "lr": "learning_rate"}
# Arguments of the Trainer that have another name here: --epochs and --output.
OWN_TRAINER_OPTIONS = {"max_epochs", "default_root_dir"}
# System errors whose cause is a path that a user gave, or its disk.
OF_FILES = ("ENOENT", "EACCES", "EEXIST", "EPERM", "EISDIR", "ENOTDIR", "ENAMETOOLONG", "EROFS")


def main(arguments: list[str] | None = None) -> None:
    """Run the verb that the arguments, or the process's, name; without one, or with ``--help``, list the verbs."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Arrows and × stand in messages; a terminal or log that cannot write them must not end a run.
            stream.reconfigure(errors="replace")
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
        # What is left to print goes out here: at the interpreter's end a closed pipe would be a traceback.
        sys.stdout.flush()
    except UserError as error:
        # A loader's worker sends its traceback, with the message at the end.
        sys.exit(f"train-clip: {str(error).rsplit('UserError: ', 1)[-1].rstrip()}")
    except BrokenPipeError:
        # `| head` has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, as shells report it
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0)
        if name in ("ENOSPC", "EDQUOT"):
            expected = "room for what is written; free some. A run goes on from its newest checkpoint by --resume"
        elif name in OF_FILES:
            expected = "a path that can be read or written"
        else:
            raise
        sys.exit(f"train-clip: {error.filename or 'a file'}: {error.strerror}. Expected {expected}.")
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns a Ctrl-C that comes before the first batch into an exit of 1.
        if KeyboardInterrupt not in (type(stop), type(stop.__context__)):
            raise
        sys.exit(130)  # 128 + SIGINT, as shells report it


def _run(words: list[str]) -> None:
    verb, rest = split_verb(words)
    if verb is not None:
        function, call = parse(verb, rest)
        function(*call.args, **call.kwargs)
    # A group of verbs alone, or with --help, asks for the list too.
    elif all(word in ("-h", "--help") or any(verb.startswith(f"{word} ") for verb in VERBS) for word in rest):
        verbs = "\n".join(f"  {verb:11} {text}" for verb, (_, text) in VERBS.items())
        print(
            f"Train CLIP on your own images and captions.\n\n{verbs}\n\n"
            "`train-clip VERB --help` lists a verb's options. Start with `train-clip demo`."
        )
    else:
        sys.exit(f"train-clip: unknown verb {' '.join(rest[:2])!r}; expected one of {', '.join(VERBS)}.")


def split_verb(words: list[str]) -> tuple[str | None, list[str]]:
    """Take the verb, of one word or two, off the arguments; None where they begin with none."""
    for number in (2, 1):
        if (verb := " ".join(words[:number])) in VERBS:
            return verb, words[number:]
    return None, words


def parse(verb: str, words: list[str]) -> tuple[Any, inspect.BoundArguments]:
    """Read the words that follow a verb; return its function, and what to call it with."""
    import docstring_parser
    import jsonargparse

    function = pkgutil.resolve_name(VERBS[verb][0])
    call, docstring = inspect.signature(function).bind_partial(), docstring_parser.parse(function.__doc__)
    parser: Any = jsonargparse.ArgumentParser(
        prog=f"train-clip {verb}",
        # The list of all options, which would bury an error below it, is what --help prints.
        usage="%(prog)s",
        description=docstring.short_description,
        allow_abbrev=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of options, or the name of a recipe")
    help_texts = {parameter.arg_name: parameter.description for parameter in docstring.params}
    lists, of_trainer = list[str](), list[str]()
    for name, parameter in call.signature.parameters.items():
        kind = parameter.annotation
        if kind is TrainerOptions:
            import lightning as L

            # As plain values: the verb makes what they describe.
            of_trainer = parser.add_class_arguments(L.Trainer, None, skip=OWN_TRAINER_OPTIONS, instantiate=False)
        elif hasattr(kind, "pick"):
            lists += _add_groups(parser, kind)
        else:
            _add_parameter(parser, parameter, help_texts[name])
    parser.usage += " [options]"
    words = normalise(words, verb)
    _require_one_word(words, lists)
    values = parser.parse_args(words).as_dict()
    values["trainer"] = TrainerOptions({name: values[name] for name in of_trainer})
    for name, parameter in call.signature.parameters.items():
        kind = parameter.annotation
        call.arguments[name] = kind.pick(values) if hasattr(kind, "pick") else values[name]
    return function, call


def _add_groups(parser: Any, kind: Any) -> list[str]:
    """Add a group of options, or several, flat; return the names of those that take a list."""
    lists = []
    for options in kind.groups().values() if hasattr(kind, "groups") else [kind]:
        group = parser.add_argument_group(options.__doc__.partition("\n")[0].rstrip("."))
        for one in dataclasses.fields(options):
            # --lock_image stands for --lock_image true.
            flag = {"nargs": "?", "const": True} if one.default is False else {}
            group.add_argument(f"--{one.name}", type=one.type, default=one.default, help=one.metadata["help"], **flag)
            lists += [one.name] if "[" in str(one.type) else []
    return lists


def _add_parameter(parser: Any, parameter: inspect.Parameter, text: str | None) -> None:
    name, how = parameter.name, {"type": parameter.annotation, "help": text}
    is_optional = parameter.default is not parameter.empty
    if is_optional:
        how["default"] = parameter.default
    if parameter.kind is parameter.POSITIONAL_ONLY:
        parser.usage += f" [{name.upper()}]" if is_optional else f" {name.upper()}"
        parser.add_argument(name, **how, **({"nargs": "?"} if is_optional else {}))
    else:
        parser.add_argument(f"--{name}", **how)


def normalise(words: list[str], verb: str) -> list[str]:
    """Give every option its one name, and move ``--config`` to the front, so that the command line wins over it.

    ``--batch-size`` and ``--batchsize=8`` become ``--batch_size`` and ``--batch_size=8``, in a file of options too,
    which is passed on by its content. A run that is resumed (``--resume``) brings the options that it began with; one
    that another verb began is refused.
    """
    words = [re.sub("(?<=^--)[^=]+", lambda option: _one_name(option[0]), word) for word in words]
    ahead = argparse.ArgumentParser(f"train-clip {verb}", add_help=False, allow_abbrev=False)
    ahead.add_argument("--config", action="append", default=[])
    files, words = ahead.parse_known_args(words)
    configs = [_options_in(name) for name in files.config]
    ahead.add_argument("--resume")
    ahead.add_argument("--output")
    for config in configs:
        ahead.set_defaults(**config)
    given = ahead.parse_known_args(words)[0]
    words = [f"--config={yaml.safe_dump(config, sort_keys=False)}" for config in configs] + words
    if given.resume is None:
        return words
    from train_clip.commands.run_folder import options_of_run

    return options_of_run(verb, str(given.resume), given.output) + words


def _one_name(option: str) -> str:
    option = option.replace("-", "_")
    return ALIASES.get(option, option)


def _options_in(name: str) -> dict[str, Any]:
    recipes = {file.stem: file for file in Path(__file__).with_name("recipes").glob("*.yaml")}
    path = recipes.get(name, Path(name))
    if not path.is_file():
        raise UserError(f"--config {name}: neither a file nor a recipe. Recipes: {', '.join(sorted(recipes))}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {_one_name(option): value for option, value in content.items()}
    except (yaml.YAMLError, AttributeError) as error:
        raise UserError(
            f"--config {name}: holds no options ({error}). Expected YAML, a line NAME: VALUE for each."
        ) from error


def _require_one_word(words: list[str], lists: list[str]) -> None:
    number = r"[\d.e+-]*\d[\d.e+-]*"
    several = rf"--({'|'.join(lists)})[ =]({number}(?:[ ,]{number})+)(?!\S)"
    for option, given in re.findall(several, " ".join(words)):
        numbers = re.sub("[ ,]", ", ", given)
        raise UserError(f'--{option} {given}: several values are one word: --{option} "[{numbers}]".')


if __name__ == "__main__":
    main()
