"""Words → one typed function a verb. Parsing ends at the function's signature.

Nothing heavy is imported before a verb is known: ``train-clip --help`` takes a moment, not seconds.
"""

import dataclasses
import errno
import inspect
import itertools
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

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
OF_FILES = (
    *(errno.ENOENT, errno.EACCES, errno.EEXIST, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EROFS),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the verb that the arguments, or the process's, name; without one, or with ``--help``, list the verbs."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Arrows and × stand in messages; a terminal or log that cannot write them must not end a run.
            stream.reconfigure(errors="replace")
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
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
        verbs = "\n".join(f"  {verb:11} {text}" for verb, (_, text) in VERBS.items())
        print(
            f"Train CLIP on your own images and captions.\n\n{verbs}\n\n"
            "`train-clip VERB --help` lists a verb's options. Start with `train-clip demo`."
        )
    else:
        sys.exit(f"train-clip: unknown verb {' '.join(rest[:2])!r}; expected one of {', '.join(VERBS)}.")


def split_verb(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take the verb, of one word or two, off the arguments; None where they begin with none."""
    for number in (2, 1):
        if " ".join(words[:number]) in VERBS:
            return " ".join(words[:number]), list(words[number:])
    groups = {verb.partition(" ")[0] for verb in VERBS if " " in verb}
    # A group alone, or with --help, asks for the list of all verbs.
    asks = "".join(words[:1]) in groups and "".join(words[1:2]) in ("", "-h", "--help")
    return None, list(words[1:] if asks else words)


def parse(verb: str, words: Sequence[str]) -> tuple[Callable[..., Any], inspect.BoundArguments]:
    """Read the words that follow a verb; return its function, and what to call it with."""
    function = pkgutil.resolve_name(VERBS[verb][0])
    hints, call = get_type_hints(function), inspect.signature(function).bind_partial()
    parser, fields = _parser(verb, function, hints)
    words = normalise(words, verb)
    _require_one_word(words, [f"--{name}" for name, one in fields.items() if "[" in str(one.type)])
    # Let --lock_image stand for --lock_image true.
    flags = {f"--{name}" for name, one in fields.items() if one.default is False}
    pairs = itertools.pairwise([*words, "--"])
    words = [f"{word}=true" if word in flags and after.startswith("--") else word for word, after in pairs]
    parsed = parser.parse_args(words).as_dict()
    own = {"config", *call.signature.parameters, *fields}
    for name in call.signature.parameters:
        kind = hints[name]
        if kind is TrainerOptions:
            call.arguments[name] = TrainerOptions({other: value for other, value in parsed.items() if other not in own})
        else:
            call.arguments[name] = kind.pick(parsed) if hasattr(kind, "pick") else parsed.get(name)
    return function, call


def normalise(words: Sequence[str], verb: str = "") -> list[str]:
    """Give every option its one name, and move ``--config`` to the front, so that the command line wins over it.

    ``--batch-size`` and ``--batchsize=8`` become ``--batch_size`` and ``--batch_size=8``, in a file of options too,
    which is passed on by its content. A run that is resumed (``--resume``) brings the options that it began with; one
    that another verb began is refused.
    """
    queue, rest, configs, values = list(words), list[str](), list[str](), dict[str, Any]()
    while queue:
        word = queue.pop(0)
        option, equals, value = word.partition("=")
        if option == "--config" and (equals or queue):
            configs += _config(value if equals else queue.pop(0), values)
        elif option.startswith("--"):
            name = _one_name(option[2:])
            values[name] = value if equals or not queue else queue[0]
            rest.append(f"--{name}{equals}{value}")
        else:
            rest.append(word)
    if values.get("resume") is not None:
        configs = _options_of_run(verb, str(values["resume"]), values.get("output")) + configs
    return configs + rest


def _one_name(option: str) -> str:
    option = option.replace("-", "_")
    return ALIASES.get(option, option)


def _config(name: str, values: dict[str, Any]) -> list[str]:
    # What the file says is noted in ``values``, over which the command line wins.
    import yaml

    folder = resources.files("train_clip") / "recipes"
    shipped = {Path(file.name).stem: str(file) for file in folder.iterdir() if file.name.endswith(".yaml")}
    if name not in shipped and not Path(name).is_file():
        raise UserError(f"--config {name}: neither a file nor a recipe. Recipes: {', '.join(sorted(shipped))}.")
    path = shipped.get(name, name)
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError:
        content = None
    if not isinstance(content, dict):
        return ["--config", path]  # the parser says what it is instead
    content = {_one_name(str(option)): value for option, value in content.items()}
    values |= content | values
    return ["--config", yaml.safe_dump(content, sort_keys=False)]


def _options_of_run(verb: str, resume: str, output: str | None) -> list[str]:
    from train_clip.commands.run_folder import require_verb, run_to_resume

    run = run_to_resume(resume, None if output is None else Path(output))
    if run is None or not (run / "config.yaml").is_file():
        return []
    require_verb(run, verb)
    # The run's own copy of its model, wherever the run lies by now.
    model = ["--model_name", str(run / "model.yaml")] if (run / "model.yaml").is_file() else []
    return ["--config", str(run / "config.yaml"), *model]


def _require_one_word(words: list[str], lists: list[str]) -> None:
    number = r"[\d.e+-]*\d[\d.e+-]*"
    for option, given in re.findall(rf"(--\w+)[ =]({number}(?:[ ,]{number})+)(?!\S)", " ".join(words)):
        if option in lists:
            numbers = ", ".join(re.split("[ ,]", given))
            raise UserError(f'{option} {given}: several values are one word: {option} "[{numbers}]".')


def _parser(
    verb: str, function: Callable[..., Any], hints: dict[str, Any]
) -> tuple[Any, dict[str, dataclasses.Field[Any]]]:
    # Options are added flat, a group each; a positional-only parameter is a positional argument.
    from docstring_parser import parse as parse_docstring
    from jsonargparse import ArgumentParser

    docstring = parse_docstring(function.__doc__ or "")
    help_texts = {parameter.arg_name: parameter.description for parameter in docstring.params}
    parameters = inspect.signature(function).parameters
    positional = {name: one for name, one in parameters.items() if one.kind is one.POSITIONAL_ONLY}
    shown = [name.upper() if one.default is one.empty else f"[{name.upper()}]" for name, one in positional.items()]
    parser = ArgumentParser(
        prog=f"train-clip {verb}",
        # The list of all options, which would bury an error below it, is what --help prints.
        usage=" ".join(["%(prog)s", *shown, "[options]"]),
        description=docstring.short_description,
        allow_abbrev=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of options, or the name of a recipe")
    fields: dict[str, dataclasses.Field[Any]] = {}
    for name, parameter in parameters.items():
        hint = hints[name]
        if hint is TrainerOptions:
            import lightning as L

            # As plain values: the verb makes what they describe.
            parser.add_class_arguments(L.Trainer, None, skip=OWN_TRAINER_OPTIONS, instantiate=False)
        elif hasattr(hint, "pick"):
            for kind in hint.groups().values():
                group = parser.add_argument_group((inspect.getdoc(kind) or "").splitlines()[0].rstrip("."))
                for one in dataclasses.fields(kind):
                    hint, text = kind.hints()[one.name], one.metadata["help"]
                    group.add_argument(f"--{one.name}", type=hint, default=one.default, help=text)
                    fields[one.name] = one
        else:
            how = {"type": hint, "help": help_texts.get(name)}
            if parameter.default is not parameter.empty:
                how |= {"default": parameter.default} | ({"nargs": "?"} if name in positional else {})
            parser.add_argument(name if name in positional else f"--{name}", **how)
    return parser, fields


if __name__ == "__main__":
    main()
