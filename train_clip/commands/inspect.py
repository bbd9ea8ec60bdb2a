"""Show what a file of weights contains, quickly: neither PyTorch nor the model is loaded."""

from train_clip.checkpoints import found, sources
from train_clip.options import MOMENTUM, TrainingOptions
from train_clip.printing import printable

# A module's arguments that say which model it is, and not how it was trained.
OF_MODEL = "model_name config image_encoder text_encoder tokenizer backbone prompts digest adapter".split()
MOST_ITEMS, LONGEST = 10, 200  # items of a list and letters of a value that are printed


def inspect(file: str, /) -> dict[str, str]:
    """Show what a file of weights contains: the model, the step, the hyperparameters of training.

    Args:
        file: a checkpoint, a run's folder, a file or a folder of weights, or hf-hub:NAME

    Returns:
        The printed values, by heading.
    """
    contents = sources.find_contents(file)
    weights = found.identify(contents)
    files = {record.file for record in contents.tensors.values()}
    size = f"{sum(file.stat().st_size for file in files) / 2**20:,.1f} MiB" + f" in {len(files)} files" * (
        len(files) > 1
    )
    report = {"file": str(contents.path), "format": f"{weights.format} ({contents.kind}, {size})"} | weights.describe()
    report |= {name: _shown(value) for name, value in weights.about.items() if value is not None}
    optimizer = str(weights.arguments.get("optimizer"))
    usual = TrainingOptions().flat() | {"distillation": "none", "loss": "softmax"}
    usual["momentum"] = MOMENTUM.get(optimizer, 0.9)
    trained = {
        name: value
        for name, value in weights.arguments.items()
        if name not in OF_MODEL and value not in (None, usual.get(name))
    }
    if trained:
        report["trained with"] = ", ".join(f"{_shown(name)} {_shown(value)}" for name, value in trained.items())
    report = {name: printable(value) for name, value in report.items()}
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name:{width}}  {value}")
    return report


def _shown(value: object, nested: bool = False) -> str:
    """A value out of a file, or what it is: it may be too large to be written out."""
    if isinstance(value, list | tuple) and len(value) <= MOST_ITEMS and not nested:
        return f"[{', '.join(_shown(item, nested=True) for item in value)}]"
    return str(value)[:LONGEST] if isinstance(value, bool | int | float | str | None) else f"({type(value).__name__})"
