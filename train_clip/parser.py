"""The words after a verb → what its function is called with. Parsing ends at the function's signature."""

import argparse
import dataclasses
import inspect
import math
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from train_clip import usage
from train_clip.errors import UsageError, did_you_mean
from train_clip.files import read_yaml
from train_clip.options import TrainerOptions

HELP = {"-h", "--help"}
# Spellings that people know → the option's one name.
ALIASES = {"batchsize": "batch_size", "minibatchsize": "minibatch_size", "max_epochs": "epochs", "lr": "learning_rate"}


def bind(verb: str, function: Any, words: list[str]) -> inspect.BoundArguments:
    """What the words that follow a verb say that its function is called with."""
    signature, prog = inspect.signature(function), f"train-clip {verb}"
    has_trainer = any(parameter.annotation is TrainerOptions for parameter in signature.parameters.values())
    if HELP.intersection(words):
        print(build_parser(verb, function)[0].format_help(), end="")
        sys.exit()
    if has_trainer and "--help_trainer" in words:
        print(usage.help_on_trainer(prog, pkgutil.resolve_name("train_clip.commands.trainer:HELP")), end="")
        sys.exit()
    parser, kinds = build_parser(verb, function)
    own = set(kinds)
    if has_trainer:
        import lightning as L

        pkgutil.resolve_name("train_clip.commands.trainer:add_options")(parser)
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
    return call


def build_parser(verb: str, function: Any) -> tuple[Any, dict[str, Any]]:
    """The parser of a verb's own options, and their types by name."""
    import docstring_parser
    import jsonargparse

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
    name, how = parameter.name, {"type": parameter.annotation, "help": text}
    is_optional = parameter.default is not parameter.empty
    if is_optional:
        how["default"] = parameter.default
    if parameter.kind is parameter.VAR_POSITIONAL:
        parser.usage += f" [{name.upper()} ...]"
        parser.add_argument(name, metavar=name.upper(), nargs="*", **how)
    elif parameter.kind is not parameter.POSITIONAL_ONLY:
        parser.add_argument(f"--{name}", metavar=usage.in_words(parameter.annotation).metavar, **how)
    elif is_optional:
        parser.usage += f" [{name.upper()}]"
        parser.add_argument(name, metavar=name.upper(), nargs="?", **how)
    else:
        parser.usage += f" {name.upper()}"
        parser.add_argument(name, metavar=name.upper(), **how)


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
