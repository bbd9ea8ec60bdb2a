"""Writes ``docs/api.md``, the public names of the package from their signatures, docstrings and fields, and a stub.

``python docs/api.py`` rewrites both; ``tests/docs/test_api.py`` holds them against the code.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args

import docstring_parser

import train_clip
from train_clip import keywords, options

WIDTH = 110  # of a signature on one line
INTRO = f"""\
# Python API

`python docs/api.py` writes this page from signatures, docstrings and fields; a test compares the two.

**What is public.** The names on this page: what `import train_clip` gives, and what the documents import from a module
of the package. The [changelog](../CHANGELOG.md) says when one of them changes. Everything else may move or change in
any version. `train_clip.__version__` is {train_clip.__version__!r}. `import train_clip` loads nothing heavy: a name
comes with what it needs when it is first used.

**Errors.** What a user can put right is a [`UserError`](#train_cliperrorsusererror), whose message says what was found,
what was expected and what to do; also a `FileNotFoundError`, `TypeError` or `ValueError` where that says it. An unknown
argument is Python's `TypeError`.

**Shapes** are in round brackets; what their letters mean stands below each entry.
"""
# Heading → what it says, and the names below it by module: all of ``train_clip.__all__``, all that documents import.
SECTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "Load a model, and use it": (
        "",
        {
            "train_clip": "load Tokenizer CLIP",
            "train_clip.models.clip": "DualEncoder",
            "train_clip.checkpoints.load": "Pretrained",
            "train_clip.data.crops": "Preprocess",
        },
    ),
    "Configurations": (
        "An `ImageConfig` is a `ViTConfig` or a `ResNetConfig`. A preset's YAML file has the same keys.",
        {
            "train_clip": "read_config ModelConfig",
            "train_clip.models.config": "ViTConfig ResNetConfig TextConfig OptimizerConfig",
        },
    ),
    "Train": (
        "The three wrappers are `LightningModule`s. Each takes the [options](#options) of training by name, and has "
        "`embed_images` and `embed_texts`.",
        {
            "train_clip": "CLIPWrapper CLIPWrapper.embed_images CLIPWrapper.embed_texts CustomCLIPWrapper "
            "PromptCLIPWrapper LoRAWrapper TextImageDataModule",
            "train_clip.encoders.sources": "load_image_encoder load_text_encoder",
            "train_clip.encoders.encoder": "ImageEncoder TextEncoder",
            "train_clip.prompts.file": "PromptConfig",
            "train_clip.training.checkpoints": "AtomicCheckpointIO Checkpoints Interval",
        },
    ),
    "Evaluate": (
        "Plain tensors in, plain figures out.",
        {
            "train_clip.evaluation.embed": "embed_images embed_texts Collection",
            "train_clip.evaluation.retrieval": "retrieval Retrieval",
            "train_clip.evaluation.zero_shot": "zero_shot ZeroShot class_embeddings image_labels",
        },
    ),
    "Embeddings in a file": (
        "What `train-clip embed` writes, see [search.md](search.md).",
        {"train_clip.search.vectors": "open_vectors Vectors Vectors.blocks"},
    ),
    "Losses": (
        "Pure functions of tensors. Gathering is the caller's.",
        {
            "train_clip.losses": "Pairs Loss",
            "train_clip.losses.softmax": "clip_loss info_nce loss_floor accuracy ranks",
            "train_clip.losses.sigmoid": "sigmoid_loss sigmoid_floor",
            "train_clip.losses.distillation": "Targets transport_targets softmax_targets divergence",
            "train_clip.losses.tiles": "tiled_loss",
            "train_clip.gather": "world gather_with_gradient gather_all",
        },
    ),
    "Extend": (
        "What [extending.md](extending.md) builds on, beside the above. Names are added to the tables "
        "`train_clip.options.LOSSES`, `train_clip.options.OPTIMIZERS`, `train_clip.commands.evaluate.EVALUATORS`, "
        "`train_clip.models.config.TOWERS` and `train_clip.data.scan.SOURCES`. A source of data is given "
        "`train_clip.options.SourceOptions`, the first [options of the data module](#options-of-textimagedatamodule); "
        "`train_clip.data.pairs.IN_TABLE` begins captions that stand in a table, in place of their file's name.",
        {
            "train_clip.data.pairs": "Pair PairList plain_name",
            "train_clip.data.scan": "Scan",
            "train_clip.tensors": "seed_of",
            "train_clip.errors": "UserError BadSample",
        },
    ),
}
EXTENSIBLE = {"optimizer", "loss", "distillation"}  # options whose values are in a table
# Who takes options by name → an example, and where they are declared.
OPTIONS = {
    "the wrappers": ('CLIPWrapper("ViT-B/32", lock_image=True)', options.TrainingOptions),
    "`TextImageDataModule`": ('TextImageDataModule(pairs="pairs.csv")', options.DataOptions),
}


def page() -> str:
    """The whole page."""
    parts = [INTRO]
    for heading, (text, modules) in SECTIONS.items():
        parts += [f"## {heading}", text]
        parts += [entry(module, name) for module, names in modules.items() for name in names.split()]
    parts += [
        "## Options",
        "On the command line they have the same names, as `--lock_image`.",
    ]
    for whose, (example, declared) in OPTIONS.items():
        parts += [f"### Options of {whose}", f"Of `train_clip.options.{declared.__name__}`, as `{example}`."]
        parts += map(option_table, declared.groups().values() if hasattr(declared, "groups") else [declared])
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def entry(module: str, name: str) -> str:
    """What there is to say of a function or class."""
    thing = resolve_name(f"{module}:{name}")
    parts = [f"### `{module}.{name}`", signature(thing), description(thing)]
    if inspect.isclass(thing):
        parts.insert(2, bases(thing))
        parts += ["\n".join(field_lines(thing)) if is_record(thing) else ""]
        parts += [part for method in public_methods(thing) for part in (signature(method, "."), description(method))]
    text = "\n\n".join(part for part in parts if part)
    return text + letters_of(thing, text)


def signature(thing: Any, before: str = "") -> str:
    """Name, parameters with types and defaults, and what is returned, on a line each where they are many."""
    if is_record(thing) or (thing.__init__ is Exception.__init__ if inspect.isclass(thing) else False):
        return ""
    # Not a wrapper's own, which lists each option.
    how = inspect.signature(thing.__init__ if hasattr(thing, "__signature__") else thing)
    given = [one for one in how.parameters.values() if one.name != "self"]
    words = [word for one in given for word in (["*"] * (one is first_keyword(given)) + [parameter(one)])]
    returned = "" if inspect.isclass(thing) or how.return_annotation is None else how.return_annotation
    ending = f" -> {type_text(returned)}" if returned else ""
    text = f"{before}{thing.__name__}({', '.join(words)}){ending}"
    if len(text) > WIDTH:
        text = f"{before}{thing.__name__}(\n" + "".join(f"    {word},\n" for word in words) + f"){ending}"
    return f"```python\n{text}\n```"


def first_keyword(given: list[inspect.Parameter]) -> inspect.Parameter | None:
    """The first parameter that is given by name alone, where no ``*args`` stands before it."""
    named = [one for one in given if one.kind is one.KEYWORD_ONLY]
    return named[0] if named and all(one.kind is not one.VAR_POSITIONAL for one in given) else None


def parameter(one: inspect.Parameter) -> str:
    """A parameter as one writes it."""
    stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
    default = "" if one.default is one.empty else f" = {default_text(one.default)}"
    kind = re.sub(r"^\*<class '(.*)'>$", r"Unpack[\1]", inspect.formatannotation(one.annotation))
    return f"{stars}{one.name}: {type_text(kind)}{default}"


def type_text(kind: Any) -> str:
    """A type as one writes it, without the modules that it is from; a ``Literal`` as its values."""
    text = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    text = re.sub(r"(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text)
    text = re.sub(r"Optional\[(.*)\]", r"\1 | None", text)
    text = re.sub(r"ForwardRef\('(\w+)'\)", r"\1", text)
    if values := re.search(r"Literal\[(.*?)\]", text):
        return text.replace(values[0], values[1].replace(", ", " | "))
    return text.replace("'", "")


def default_text(value: Any) -> str:
    """A default as one writes it."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


def description(thing: Any) -> str:
    """Summary, text, arguments, what is returned and raised, in Markdown."""
    text = inspect.cleandoc(thing.__doc__ or "")
    parsed = docstring_parser.parse(text, docstring_parser.DocstringStyle.GOOGLE)
    # Not the parser's, which takes a formula's indent away.
    parts = [re.split(r"^(?:Args|Returns|Raises):$", text, maxsplit=1, flags=re.MULTILINE)[0].strip()]
    parts += ["\n".join(f"- `{one.arg_name}`: {one_line(one.description)}" for one in parsed.params)]
    if parsed.returns:
        parts.append(f"Returns {one_line(parsed.returns.description)}")
    parts += [f"Raises `{one.type_name}`: {one_line(one.description)}" for one in parsed.raises]
    return "\n\n".join(part for part in parts if part).replace("``", "`")


def one_line(text: str | None) -> str:
    """A text without its line breaks."""
    return " ".join((text or "").split())


def bases(kind: type) -> str:
    """Which classes of the page it is one of."""
    listed = " ".join(names for _, modules in SECTIONS.values() for names in modules.values()).split()
    return " ".join(f"Is a `{base.__name__}`." for base in kind.__bases__ if base.__name__ in listed)


def is_record(thing: Any) -> bool:
    """Whether a class is made of fields: a dataclass or a named tuple."""
    return inspect.isclass(thing) and (dataclasses.is_dataclass(thing) or hasattr(thing, "_fields"))


def field_lines(record: Any) -> Iterator[str]:
    """The fields of a class, as its source explains them: beside their line, or in comments above it."""
    defaults = getattr(record, "_field_defaults", {})
    if dataclasses.is_dataclass(record):
        defaults = {
            one.name: one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
            for one in dataclasses.fields(record)
            if (one.default, one.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        }
    names, said = inspect.get_annotations(record), []
    for line in inspect.getsource(record).splitlines():
        if comment := re.match(r"    # (.*)", line):
            said.append(comment[1])
        elif (found := re.match(r"    (\w+): [^#]+(?:# (.*))?$", line)) and found[1] in names:
            said += filter(None, [found[2]])
            default = f" = {default_text(defaults[found[1]])}" if found[1] in defaults else ""
            explained = f": {' '.join(said)}" if said else ""
            yield f"- `{found[1]}: {type_text(names[found[1]])}{default}`{explained}".replace("``", "`")
            said = []
        elif line.startswith(("    def ", "    @")):
            return


def public_methods(kind: type) -> Iterator[Any]:
    """Its own methods that are no overridden hooks, the call among them."""
    for name, member in vars(kind).items():
        method = getattr(member, "__func__", member)
        shown = name == "__call__" or not name.startswith("_")
        if shown and inspect.isfunction(method) and method.__doc__ and not hasattr(method, "__override__"):
            yield method


def letters_of(thing: Any, text: str) -> str:
    """What the letters of an entry's shapes mean, by the docstring of its module."""
    told = re.findall(r"(?<!\S)([A-Z])  (\S.*?)(?=\s{4,}|$)", inspect.getmodule(thing).__doc__ or "", re.MULTILINE)
    used = [f"{letter} {meaning}" for letter, meaning in told if re.search(rf"\([^)`]*\b{letter}\b[^)]*\)", text)]
    return f"\n\nLetters: {'; '.join(used)}." if used else ""


def option_table(group: type) -> str:
    """A group of options: name, type, default, help and check."""
    rows = []
    for one in dataclasses.fields(group):
        text, check = one.metadata["help"], one.metadata["check"]
        kind, default = type_text(one.type), default_text(one.default)
        row = (f"`{one.name}`", f"`{kind}`", f"`{default}`", f"{text}; {check.expected}" if check else text)
        rows.append(" | ".join(cell.replace("|", r"\|") for cell in row))
    heading = f"**{group.__name__}.** {description(group)}"
    return "\n".join([heading, "", "| name | type | default | |", "|---|---|---|---|", *(f"| {row} |" for row in rows)])


def stub() -> str:
    """``train_clip/keywords.pyi``: the options as keyword arguments, for type checkers and editors."""
    lines = [
        '"""Written by ``python docs/api.py``: the options of ``options.py`` as keyword arguments."""\n',
        "import inspect\nfrom pathlib import Path\nfrom typing import Any, Literal, TypedDict\n",
    ]
    for kind in (keywords.TrainingKeywords, keywords.DataKeywords):
        lines.append(f"class {kind.__name__}(TypedDict, total=False):")
        lines += [f"    {name}: {stub_type(name, one)}" for name, one in inspect.get_annotations(kind).items()]
        lines.append("")
    lines += ["class OptionsByName:", "    def __init__(self, *groups: Any) -> None: ..."]
    lines += ["    def __get__(self, instance: Any, owner: type) -> inspect.Signature: ...", ""]
    return "\n".join(lines)


def stub_type(name: str, kind: Any) -> str:
    """An option's type: what a table can be extended by is any text, and a path may be a text too."""
    kinds = [one for one in get_args(kind) or [kind] if one is not type(None)]
    text = inspect.formatannotation(kinds[0] if len(kinds) == 1 else kind).removeprefix("typing.").replace("'", '"')
    text = {"pathlib.Path": "str | Path", "pathlib._local.Path": "str | Path"}.get(text, text)
    return ("str" if name in EXTENSIBLE else text) + " | None" * (type(None) in get_args(kind))


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
    Path(keywords.__file__).with_suffix(".pyi").write_text(stub(), encoding="utf-8")
