"""The train-clip command: a verb → its function, and how it ends.

Nothing heavy is imported before a verb is known: ``train-clip --help`` takes a moment, not seconds.
"""

import inspect
import os
import pkgutil
import platform
import re
import sys
from importlib import metadata
from typing import Any, Literal

from train_clip import cores, parser, printing
from train_clip.commands import launcher
from train_clip.errors import UsageError, UserError, did_you_mean, in_a_line, with_notes

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
    "data shards": ("train_clip.shards.write:data_shards", "write pairs into WebDataset shards for --shards"),
    "data npz": ("train_clip.data_tools.npz:data_npz", "decode every image once, into arrays that load faster"),
    "models": ("train_clip.commands.models:models", "list the models, their sizes and hyperparameters"),
    "completion": ("train_clip.cli:completion", "print a script that completes commands and options in your shell"),
}
GROUPS = {verb.partition(" ")[0] for verb in VERBS if " " in verb}


def main(arguments: list[str] | None = None) -> None:
    """Run the verb that the arguments, or the process's, name; without one, or with ``--help``, list the verbs.

    Exits with 0, with 1 where files or a run stop it, with 2 where the command is wrong, with 128 + N at signal N.
    """
    printing.open_streams()
    printing.escape_streams()
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
        # What is left to print goes out here: at the interpreter's end a closed pipe would be a traceback.
        sys.stdout.flush()
    except UserError as error:
        # A loader's worker sends its traceback, with the message at the end.
        message = re.split(r"train_clip\.errors\.\w+: ", str(error))[-1].rstrip()
        message = with_notes(f"train-clip: {message}", error)
        if not isinstance(error, UsageError):
            sys.exit(message)  # which Python prints, and exits with 1
        print(message, file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # `| head` has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, as shells report it
    except (OSError, EOFError, RuntimeError) as error:
        if not (line := in_a_line(error)):
            raise
        sys.exit(with_notes(f"train-clip: {line}", error))
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns a Ctrl-C that comes before the first batch into an exit of 1.
        if KeyboardInterrupt not in (type(stop), type(stop.__context__)):
            raise
        sys.exit(130)  # 128 + SIGINT, as shells report it


def _run(words: list[str]) -> None:
    launcher.require_numbers()
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
    elif all(word in parser.HELP or word in GROUPS for word in rest):
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
    """A verb's function, and what the words that follow the verb say that it is called with."""
    function = pkgutil.resolve_name(VERBS[verb][0])
    return function, parser.bind(verb, function, words)


def completion(shell: Literal["bash", "zsh", "tcsh"], /) -> None:
    """Print a script that completes commands and options in your shell.

    Args:
        shell: bash, zsh or tcsh; save the script where that shell looks for completions
    """
    import jsonargparse
    import lightning as L

    all_verbs = jsonargparse.ArgumentParser("train-clip")
    groups = {"": all_verbs.add_subcommands(required=False)}
    own_names = pkgutil.resolve_name("train_clip.commands.trainer:OWN_OPTIONS")
    for verb, (function, text) in VERBS.items():
        one = parser.build_parser(verb, pkgutil.resolve_name(function))[0]
        if one.epilog:
            for name in set(inspect.signature(L.Trainer).parameters) - own_names:
                one.add_argument(f"--{name}")
        group, _, name = verb.rpartition(" ")
        if group not in groups:
            of_group = jsonargparse.ArgumentParser(description=group)
            groups[""].add_subcommand(group, of_group, help=group)
            groups[group] = of_group.add_subcommands(required=False)
        groups[group].add_subcommand(name, one, help=text)
    print(all_verbs.get_completion_script(f"shtab-{shell}"))


if __name__ == "__main__":
    main()
