"""The options as keyword arguments: ``help`` lists each, and type checkers and editors know them.

``python docs/api.py`` writes ``keywords.pyi``, by which those do.
"""

import inspect
from dataclasses import fields
from typing import Any, TypedDict

from train_clip.options import DataOptions, TrainingOptions


def _keywords(name: str, own: str, *groups: Any) -> Any:
    """The options of groups, but for those that a constructor has among its own arguments."""
    types = {one.name: one.type for group in groups for one in fields(group) if one.name not in own.split()}
    return TypedDict(name, types, total=False)


OF_TRAINING = TrainingOptions.groups().values()
TrainingKeywords = _keywords("TrainingKeywords", "minibatch_size learning_rate kl_coeff", *OF_TRAINING)
DataKeywords = _keywords("DataKeywords", "folder batch_size num_workers resize_ratio shuffle val_share", DataOptions)


class OptionsByName:
    """As ``__signature__`` of a class whose constructor takes ``**options``: its signature with each of them."""

    def __init__(self, *groups: Any) -> None:
        self.options = {
            one.name: inspect.Parameter(
                one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type
            )
            for group in groups
            for one in fields(group)
        }

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        """Give the class's; an instance has its ``forward``'s."""
        if instance is not None:
            raise AttributeError("__signature__")
        _, *own = inspect.signature(owner.__init__).parameters.values()
        if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
            names = {one.name for one in own}
            own[-1:] = [one for name, one in self.options.items() if name not in names]
        return inspect.Signature(own)
