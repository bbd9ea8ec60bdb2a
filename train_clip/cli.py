"""Words → one typed function a verb. Parsing ends at the function's signature.

Nothing heavy is imported before a verb is known: ``train-clip --help`` takes a moment, not seconds.
"""

import argparse
import dataclasses
import errno
import inspect
import math
import os
import pkgutil
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml

from train_clip import cores, printing
from train_clip.errors import UsageError, UserError, did_you_mean, of_process, with_notes
from train_clip.files import read_yaml
from train_clip.options import PLACES, TrainerOptions

# verb, of one word or two → the function that it calls, and what it does.
VERBS = {
    "demo": ("train_clip.commands.demo:demo", "train a small CLIP on generated pictures, in minutes on a CPU"),
    "train": ("train_clip.commands.train:train", "train a CLIP on images and captions, from scratch or from weights"),
    "finetune": (
        "train_clip.encoders.finetune:finetune",
        "fine-tune two pretrained encoders, or a whole CLIP, on pairs",
    ),
    "prompt-tune": ("train_clip.prompts.prompt_tune:prompt_tune", "tune visual prompts for a pretrained CLIP"),
    "merge": ("train_clip.commands.merge:merge", "interpolate between a model before and after fine-tuning"),
    "inspect": ("train_clip.commands.inspect:inspect", "show what a file of weights contains, in a moment"),
    "convert": ("train_clip.commands.convert:convert", "write a model for open_clip, Hugging Face or safetensors"),
    "evaluate": ("train_clip.commands.evaluate:evaluate", "evaluate a checkpoint: retrieval, zero-shot classification"),
    "embed": ("train_clip.search.embed:embed", "embed the images or captions of a folder into a file"),
    "search": ("train_clip.search.search:search", "find images by a text or an image, on a page too"),
    "probe": ("train_clip.probes.probe:probe", "fit a linear probe and few-shot heads on images of classes"),
    "classify": ("train_clip.probes.classify:classify", "write the class of every image of a folder"),
    "data check": (
        "train_clip.data_tools.check:data_check",
        "check every pair before training: bad, truncated, repeated",
    ),
    "data show": ("train_clip.data_tools.show:data_show", "write a contact sheet: pairs as the model will see them"),
    "data split": ("train_clip.data_tools.split:data_split", "split pairs into tables: training, validation, test"),
    "data npz": ("train_clip.data_tools.npz:data_npz", "decode every image once, into arrays that load faster"),
    "models": ("train_clip.commands.models:models", "list the models, their sizes and hyperparameters"),
    "completion": ("train_clip.cli:completion", "print a script that completes commands and options in your shell"),
}
GROUPS = {verb.partition(" ")[0] for verb in VERBS if " " in verb}
HELP = {"-h", "--help"}
# Spellings that people know → the option's one name.
ALIASES = {"batchsize": "batch_size", "minibatchsize": "minibatch_size", "max_epochs": "epochs", "lr": "learning_rate"}
# Errors of the system that a user can put right, by their names, and what is expected.
OF_SYSTEM = {
    "ENOSPC EDQUOT": "room for what is written; free some. A run goes on from its newest checkpoint by --resume",
    "ENOENT EACCES EEXIST EPERM EISDIR ENOTDIR ENAMETOOLONG EROFS": "a path that can be read or written",
    "EMFILE ENFILE EAGAIN": "fewer loader processes (--num_workers), or higher limits (ulimit -n, -u)",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the verb that the arguments, or the process's, name; without one, or with ``--help``, list the verbs.

    Exits with 0, with 1 where files or a run stop it, with 2 where the command is wrong, with 128 + N at signal N.
    """
    _open_streams()
    printing.escape_streams()
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
        # What is left to print goes out here: at the interpreter's end a closed pipe would be a traceback.
        sys.stdout.flush()
    except UserError as error:
        sys.exit(_exit_code(error))
    except BrokenPipeError:
        # `| head` has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, as shells report it
    except (OSError, EOFError, RuntimeError) as error:
        sys.exit(_line(error))
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns a Ctrl-C that comes before the first batch into an exit of 1.
        if KeyboardInterrupt not in (type(stop), type(stop.__context__)):
            raise
        sys.exit(130)  # 128 + SIGINT, as shells report it


def _line(error: OSError | EOFError | RuntimeError) -> str:
    """What to say of an error of the system or a library; one of which nothing is known is raised."""
    line, name = of_process(error), errno.errorcode.get(getattr(error, "errno", None) or 0)
    expected = next((text for names, text in OF_SYSTEM.items() if name in names.split()), None)
    if isinstance(error, OSError) and expected is not None:
        what = error.filename or ("a process" if name == "EAGAIN" else "a file")
        line = f"{what}: {error.strerror}. Expected {expected}."
    if not line:
        raise error
    return with_notes(f"train-clip: {line}", error)


def _open_streams() -> None:
    # Where one of the three is closed, the next file that is opened would have its number, and get what is printed.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    sys.stdout, sys.stderr = (one or os.fdopen(os.dup(number), "w") for one in (sys.stdout, sys.stderr))
    os.close(number)


def _exit_code(error: UserError) -> int | str:
    # A loader's worker sends its traceback, with the message at the end.
    message = "train-clip: " + re.split(r"train_clip\.errors\.\w+: ", str(error))[-1].rstrip()
    message = with_notes(message, error)
    if not isinstance(error, UsageError):
        return message  # which Python prints, and exits with 1
    print(message, file=sys.stderr)
    return 2


def _run(words: list[str]) -> None:
    for name in (*PLACES, "SLURM_NTASKS"):
        if not (value := os.environ.get(name, "0")).isdecimal():
            # Lightning reads some of them when it is imported.
            raise UsageError(f"{name}={value!r}: in the environment, where launchers set a number: unset {name}.")
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    verb, rest = split_verb(words)
    if verb is not None:
        with cores.fitting_threads():
            function, call = parse(verb, rest)
        function(*call.args, **call.kwargs)
    elif rest in (["--version"], ["-V"]):
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning"))
        own = pkgutil.resolve_name("train_clip:__version__")
        print(f"train-clip {own} ({versions}, Python {platform.python_version()})")
    # A group of verbs alone, or with --help, asks for its list too.
    elif all(word in HELP or word in GROUPS for word in rest):
        group = "".join(f"{word} " for word in rest if word in GROUPS)
        verbs = "\n".join(f"  {verb:11} {text}" for verb, (_, text) in VERBS.items() if verb.startswith(group))
        print(
            f"Train CLIP on your own images and captions.\n\n{verbs}\n\n"
            "`train-clip COMMAND --help` lists a command's options. Start with `train-clip demo`."
        )
    else:
        word = " ".join(rest[: 1 + (rest[0] in GROUPS)])
        meant = did_you_mean(word, [*VERBS, "--version", "--help"])
        raise UsageError(f"unknown command {word!r}.{meant} `train-clip --help` lists all.")


def split_verb(words: list[str]) -> tuple[str | None, list[str]]:
    """Take the verb, of one word or two, off the arguments; None where they begin with none."""
    for number in (2, 1):
        if (verb := " ".join(words[:number])) in VERBS:
            return verb, words[number:]
    return None, words


def parse(verb: str, words: list[str]) -> tuple[Any, inspect.BoundArguments]:
    """Read the words that follow a verb; return its function, and what to call it with."""
    from train_clip import usage

    function = pkgutil.resolve_name(VERBS[verb][0])
    signature, prog = inspect.signature(function), f"train-clip {verb}"
    has_trainer = any(parameter.annotation is TrainerOptions for parameter in signature.parameters.values())
    if HELP.intersection(words):
        print(build_parser(verb, function)[0].format_help(), end="")
        sys.exit()
    if has_trainer and "--help_trainer" in words:
        print(usage.help_on_trainer(prog, pkgutil.resolve_name("train_clip.commands.run:TRAINER_HELP")), end="")
        sys.exit()
    parser, kinds = build_parser(verb, function)
    own = set(kinds)
    if has_trainer:
        import lightning as L

        pkgutil.resolve_name("train_clip.commands.run:add_trainer_options")(parser)
        kinds |= {name: one.annotation for name, one in inspect.signature(L.Trainer).parameters.items()}
    words, configs = normalise(words, verb)
    _require_known(words, configs, kinds, prog)
    _require_one_word(words, [name for name in own if "[" in str(kinds[name])])
    texts = [f"--config={yaml.safe_dump(config, sort_keys=False)}" for config in configs.values()]
    try:
        parsed = parser.parse_args(texts + _joined(words, [name for name in own if "list[str]" in str(kinds[name])]))
    except argparse.ArgumentError as error:
        names = {
            (option, str(value)): f"--config {file}: {option}"
            for file, config in configs.items()
            for option, value in config.items()
        }
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.POSITIONAL_ONLY:
                names |= {(name, word): name.upper() for word in words}
        raise UsageError(f"{usage.explain(str(error), kinds, names)} `{prog} --help` lists the options.") from None
    values = parsed.as_dict()
    if has_trainer:
        # As plain values, of classes too: the verb makes what they describe, and a run's folder keeps them.
        plain = yaml.safe_load(parser.dump(parsed, skip_validation=True, skip_unset=False))
        values["trainer"] = TrainerOptions({name: plain[name] for name in set(plain) - own})
    call = signature.bind_partial()
    for name, parameter in signature.parameters.items():
        kind = parameter.annotation
        call.arguments[name] = kind.pick(values) if hasattr(kind, "pick") else values[name]
    return function, call


def build_parser(verb: str, function: Any) -> tuple[Any, dict[str, Any]]:
    """The parser of a verb's own options, and their types by name."""
    import docstring_parser
    import jsonargparse

    from train_clip import usage

    docstring = docstring_parser.parse(function.__doc__)
    parser: Any = jsonargparse.ArgumentParser(
        prog=f"train-clip {verb}",
        # The list of all options, which would bury an error below it, is what --help prints.
        usage="%(prog)s",
        description=docstring.short_description,
        formatter_class=usage.HelpFormatter,
        allow_abbrev=False,
        default_env=False,
        exit_on_error=False,
        print_config="--print_config",
    )
    parser.add_argument("--config", action="config", metavar="NAME", help="a recipe, or a YAML file of options")
    print_config = parser._option_string_actions["--print_config"]
    print_config.help, print_config.metavar = "print all options as YAML, for --config, and exit", ""
    help_texts = {parameter.arg_name: parameter.description for parameter in docstring.params}
    kinds: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        kind = parameter.annotation
        if kind is TrainerOptions:
            parser.epilog = (
                "Every option of lightning.Trainer works too (--devices, --precision, --max_steps, --logger, ...): "
                f"`train-clip {verb} --help_trainer` lists them."
            )
        elif hasattr(kind, "pick"):
            kinds |= _add_groups(parser, kind)
        else:
            kinds[parameter.name] = kind
            _add_parameter(parser, parameter, help_texts[parameter.name])
    parser.usage += " [options]"
    return parser, kinds


def _add_groups(parser: Any, kind: Any) -> dict[str, Any]:
    """Add a group of options, or several, flat; return their types by name."""
    from train_clip import usage

    kinds = {}
    for options in kind.groups().values() if hasattr(kind, "groups") else [kind]:
        group = parser.add_argument_group(options.__doc__.partition("\n")[0].rstrip("."))
        # In the order of the constructor: a group's own fields before those that it shares.
        for one in sorted(dataclasses.fields(options), key=lambda one: bool(one.kw_only)):
            how = {"default": one.default, "help": one.metadata["help"], "metavar": usage.in_words(one.type).metavar}
            # --lock_image stands for --lock_image true.
            flag = {"nargs": "?", "const": True} if one.default is False else {}
            names = [f"-{one.name}"] * (len(one.name) == 1) + [f"--{one.name}"]
            group.add_argument(*names, type=one.type, **how, **flag)
            kinds[one.name] = one.type
    return kinds


def _add_parameter(parser: Any, parameter: inspect.Parameter, text: str | None) -> None:
    from train_clip import usage

    name, how = parameter.name, {"type": parameter.annotation, "help": text}
    if parameter.kind is parameter.VAR_POSITIONAL:
        parser.usage += f" [{name.upper()} ...]"
        parser.add_argument(name, metavar=name.upper(), nargs="*", **how)
        return
    is_optional = parameter.default is not parameter.empty
    if is_optional:
        how["default"] = parameter.default
    if parameter.kind is parameter.POSITIONAL_ONLY:
        parser.usage += f" [{name.upper()}]" if is_optional else f" {name.upper()}"
        parser.add_argument(name, metavar=name.upper(), **how, **({"nargs": "?"} if is_optional else {}))
    elif parameter.kind is parameter.VAR_POSITIONAL:
        parser.usage += f" [{name.upper()} ...]"
        parser.add_argument(name, metavar=name.upper(), nargs="*", **how)
    else:
        parser.add_argument(f"--{name}", metavar=usage.in_words(parameter.annotation).metavar, **how)


def normalise(words: list[str], verb: str) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Give every option its one name, and take the files of ``--config`` out of the words, over which those win.

    ``--batch-size`` and ``--batchsize=8`` become ``--batch_size`` and ``--batch_size=8``, in a file of options too.
    A run that is resumed (``--resume``) brings the options that it began with; one that another verb began is refused.
    """
    words = [re.sub("(?<=^--)[^=]+", lambda option: _one_name(option[0]), word) for word in words]
    ahead = argparse.ArgumentParser(f"train-clip {verb}", add_help=False, allow_abbrev=False, exit_on_error=False)
    ahead.add_argument("--config", action="append", default=[])
    try:
        files, words = ahead.parse_known_args(words)
    except argparse.ArgumentError:
        raise UsageError(f"--config: its value is missing. Recipes: {', '.join(_recipes())}.") from None
    configs = {name: _options_in(name) for name in files.config}
    ahead.add_argument("--resume", nargs="?")
    ahead.add_argument("--output", nargs="?")
    for config in configs.values():
        ahead.set_defaults(**config)
    given = ahead.parse_known_args(words)[0]
    if given.resume is not None:
        from train_clip.commands.run_folder import options_of_run

        configs = options_of_run(verb, str(given.resume), given.output) | configs
    return words, configs


def _one_name(option: str) -> str:
    option = option.replace("-", "_")
    return ALIASES.get(option, option)


def _recipes() -> dict[str, Path]:
    return {file.stem: file for file in sorted(Path(__file__).with_name("recipes").glob("*.yaml"))}


def _options_in(name: str) -> dict[str, Any]:
    recipes = _recipes()
    path = recipes.get(name, Path(name))
    if not path.is_file():
        raise UsageError(
            f"--config {name}: neither a file nor a recipe.{did_you_mean(name, recipes)} Recipes: {', '.join(recipes)}."
        )
    content = read_yaml(path, "options, a line NAME: VALUE for each")
    return {_one_name(str(option)): value for option, value in content.items()}


def _require_known(words: list[str], configs: dict[str, dict[str, Any]], kinds: dict[str, Any], prog: str) -> None:
    """Refuse an option that does not exist, of the command line or of a file, and name the nearest that do."""
    given = {"": [word[2:].partition("=")[0] for word in words if word.startswith("--")]} | configs
    for file, names in given.items():
        for name in names:
            # --logger.project is an argument of the logger's class.
            if name.partition(".")[0] not in {*kinds, "print_config"}:
                where, before = (f"--config {file}: unknown option ", "") if file else ("unknown option --", "--")
                meant = did_you_mean(name.partition(".")[0], kinds, before)
                raise UsageError(f"{where}{name}.{meant} `{prog} --help` lists the options.")


def _joined(words: list[str], names: list[str]) -> list[str]:
    """The words with each of those options once, with all the texts that it was given."""
    for name in names:
        ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        ahead.add_argument(f"--{name}", action="append", default=[], dest="texts")
        given, rest = ahead.parse_known_args(words)
        if len(given.texts) > 1:
            words = [*rest, f"--{name}={yaml.safe_dump(given.texts, default_flow_style=True, width=math.inf)}"]
    return words


def _require_one_word(words: list[str], lists: list[str]) -> None:
    number = r"[\d.e+-]*\d[\d.e+-]*"
    several = rf"--({'|'.join(lists)})[ =]({number}(?:[ ,]{number})+)(?!\S)"
    for option, given in re.findall(several, " ".join(words)):
        numbers = re.sub("[ ,]", ", ", given)
        raise UsageError(f'--{option} {given}: several values are one word: --{option} "[{numbers}]".')


def completion(shell: Literal["bash", "zsh", "tcsh"], /) -> None:
    """Print a script that completes commands and options in your shell.

    Args:
        shell: bash, zsh or tcsh; save the script where that shell looks for completions
    """
    import jsonargparse
    import lightning as L

    parser = jsonargparse.ArgumentParser("train-clip")
    groups = {"": parser.add_subcommands(required=False)}
    own_names = pkgutil.resolve_name("train_clip.commands.run:OWN_TRAINER_OPTIONS")
    for verb, (function, text) in VERBS.items():
        one = build_parser(verb, pkgutil.resolve_name(function))[0]
        if one.epilog:
            for name in set(inspect.signature(L.Trainer).parameters) - own_names:
                one.add_argument(f"--{name}")
        group, _, name = verb.rpartition(" ")
        if group not in groups:
            of_group = jsonargparse.ArgumentParser(description=group)
            groups[""].add_subcommand(group, of_group, help=group)
            groups[group] = of_group.add_subcommands(required=False)
        groups[group].add_subcommand(name, one, help=text)
    print(parser.get_completion_script(f"shtab-{shell}"))


if __name__ == "__main__":
    main()
