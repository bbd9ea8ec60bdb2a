"""What a batch holds → embeddings of both sides, by the towers of a model, and everyone's around them.

B  pairs on this process      D  embedding width

BatchNorms of a batch that comes in chunks: normalised chunk by chunk, one update of the running statistics a batch.

C  channels      n_k  elements a channel in chunk k      n  Σ n_k

What stands in the places of a model's weights while it encodes, so that gradients of many chunks add up well.

Of weights that are kept in bfloat16 the gradients are added in float32, and the sum is rounded once. Of a table of
tokens each chunk's gradient is that of the rows which it looked up; the whole table's is made once a step.

Encode a batch in chunks: captions without their padding, and a batch that is too large without its activations.

Captions are taken in the order of their lengths, each chunk cut at its longest. Chunks of a size that is asked for are
activation checkpointing over micro-batches: one ordinary backward pass recomputes chunk by chunk, so the gradient is
the full batch's while the memory is a chunk's (the idea of GradCache, Gao et al. 2021, arXiv 2101.06983). Towers with
BatchNorm normalise with each chunk's own statistics.

B  rows of the batch      D  embedding width      L  tokens of the longest caption

Embeddings of captions by a text tower that does not change: each caption is encoded once, not at every step.

B  captions of a batch      N  different captions so far      D  embedding width
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from train_clip.evaluation.embed import unit_norm
from train_clip.gather import gather_with_gradient, world
from train_clip.losses.softmax import Pairs
from train_clip.models.blocks import SelfAttention, get_statistics, momentum, set_statistics, still, training_norms
from train_clip.models.clip import CLIP, DualEncoder, Texts
from train_clip.options import StepOptions
from train_clip.tensors import seed_of, sent
from train_clip.training.batch import BatchReader, Inputs


class PooledNorms:
    """The BatchNorms of a module, with one update of their running statistics for a batch that comes in chunks.

        mean = Σ n_k mean_k / n        var = Σ n_k (var_k + (mean_k - mean)²) / n        unbiased: var · n / (n - 1)

    As a context: the update is made at its end; after an error the statistics are what they were.

    Args:
        module: searched for BatchNorms that are training and keep running statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = training_norms(module)
        self.before = [get_statistics(norm) for norm in self.norms]
        # Of each norm, a (n_k, mean_k, var_k) for each chunk that went through it.
        self.chunks: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in self.norms]

    def __enter__(self) -> Self:
        return self

    @torch.no_grad()
    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for norm, before, chunks in zip(self.norms, self.before, self.chunks, strict=True):
            set_statistics(norm, before)
            if error is None and chunks:
                _update(norm, chunks)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What a chunk's forward pass runs in: with momentum 1 the running statistics are the chunk's own."""
        counts = [0] * len(self.norms)

        def count_elements(place: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            """Make the hook that notes how many elements a channel of the norm at a place sees."""

            def hook(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                counts[place] = inputs[0].numel() // inputs[0].shape[1] * _processes(norm)

            return hook

        with ExitStack() as stack:
            for place, norm in enumerate(self.norms):
                stack.enter_context(momentum(norm, 1.0))
                handle = norm.register_forward_pre_hook(count_elements(place))
                stack.callback(handle.remove)
            yield
        for norm, count, chunks in zip(self.norms, counts, self.chunks, strict=True):
            if count:
                mean, variance, _ = get_statistics(norm)
                chunks.append((count, mean, variance))

    def still(self) -> AbstractContextManager[None]:
        """What a chunk's recomputation runs in: it leaves the running statistics as they are."""
        return still(self.norms)


def _update(norm: _BatchNorm, chunks: list[tuple[int, Tensor, Tensor]]) -> None:
    """Give a norm one update from the pooled statistics of its chunks."""
    mean_before, variance_before, tracked = get_statistics(norm)
    wide = torch.promote_types(mean_before.dtype, torch.float32)
    counts = sent(torch.tensor([count for count, _, _ in chunks], dtype=wide), mean_before.device)[:, None]
    means = torch.stack([mean for _, mean, _ in chunks]).to(wide)
    variances = torch.stack([variance for _, _, variance in chunks]).to(wide)
    total = counts.sum()
    mean = (counts * means).sum(dim=0) / total
    biased = variances * (counts - 1) / counts
    # Squares of differences, not differences of squares, which cancel where the mean is large.
    variance = (counts * (biased + (means - mean) ** 2)).sum(dim=0) / (total - 1)
    # momentum None is a cumulative average (torch.nn.BatchNorm2d).
    share = 1 / (int(tracked) + 1) if norm.momentum is None else norm.momentum
    new_mean = mean_before.to(wide).lerp(mean, share).to(mean_before.dtype)
    new_variance = variance_before.to(wide).lerp(variance, share).to(variance_before.dtype)
    set_statistics(norm, (new_mean, new_variance, tracked + 1))


def _processes(norm: nn.Module) -> int:
    """How many processes a norm's statistics span."""
    if not isinstance(norm, nn.SyncBatchNorm):
        return 1
    return world()[1] if norm.process_group is None else distributed.get_world_size(norm.process_group)


# Modules all of whose matrices go into products alone, which autocast computes in half precision.
PRODUCTS = (nn.Linear, nn.Conv2d, SelfAttention)
LARGE = 10_000  # rows of a table from which on it is worth gathering those that were looked up


class StandIns:
    """Stand-ins of a model's bfloat16 weights and of its tables.

    Of a weight that is a float32 copy; where autocast would cast that back to bfloat16, for a product, it is the weight
    as it is.

    Args:
        model: its parameters have to be what they are for as long as this is used.
        halves: whether weights in bfloat16 are kept so on purpose; those of bf16-true precision are not.
        tables: whether the gradients of tables are to come by their rows, which compiled look-ups cannot give.
    """

    def __init__(self, model: nn.Module, halves: bool, tables: bool = False) -> None:
        self._places: list[tuple[dict[str, Any], str, Callable[[], Tensor]]] = []
        self._tables: list[nn.Embedding] = []
        copies: dict[nn.Parameter, Tensor] = {}
        found = _half_weights(model) if halves else []
        uses = Counter(parameter for _, _, parameter in found)
        for module, name, parameter in found:
            if type(module) in PRODUCTS and uses[parameter] == 1 and autocast_type(parameter) == torch.bfloat16:
                stand_in = partial(_Carried.apply, _Carrier.apply(parameter), parameter.detach())
            else:
                # One copy of a weight that several modules share.
                if parameter not in copies:
                    copies[parameter] = parameter.float()
                stand_in = partial(_itself, copies[parameter])
            self._places.append((module._parameters, name, stand_in))
        for module in model.modules() if tables and torch.is_grad_enabled() else ():
            if not isinstance(module, nn.Embedding) or module.scale_grad_by_freq or module.max_norm is not None:
                continue
            table = module._parameters["weight"]
            if table is not None and table.requires_grad and len(table) >= LARGE:
                rows = _RowsToTable.apply(copies.get(table, table))
                self._places.append((module._parameters, "weight", partial(_itself, rows)))
                self._tables.append(module)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let them stand there."""
        weights = [parameters[name] for parameters, name, _ in self._places]
        sparse = [table.sparse for table in self._tables]
        for parameters, name, stand_in in self._places:
            parameters[name] = stand_in()
        for table in self._tables:
            table.sparse = True
        try:
            yield
        finally:
            for (parameters, name, _), weight in reversed(list(zip(self._places, weights, strict=True))):
                parameters[name] = weight
            for table, before in zip(self._tables, sparse, strict=True):
                table.sparse = before

    def around(self, encode: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        """Wrap what encodes a chunk, so that chunks meet in the stand-ins.

        That has to hold in the recomputation of a chunk too, which runs within the backward pass; hence no block around
        the step.

        Args:
            encode: maps (b, …) rows to (b, D).
        """

        def encode_in_place(rows: Any) -> Tensor:
            """Map (b, …) rows to (b, D)."""
            first = rows if isinstance(rows, Tensor) else next(iter(rows.values()))
            with self.in_place(), uncached_autocast(first.device.type):
                return encode(rows)

        return encode_in_place


def _half_weights(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dtype == torch.bfloat16
    ]


class _Carrier(Function):
    """A weight → float32 of its shape and of no memory, at which gradients of the chunks are added in float32."""

    @staticmethod
    def forward(_: Any, weight: Tensor) -> Tensor:
        """Make zeros that are all the same one."""
        return torch.zeros((), device=weight.device).expand(weight.shape)

    @staticmethod
    def backward(_: Any, *sums: Tensor) -> Tensor:
        """Round the sum, once."""
        return sums[0].bfloat16()


class _Carried(Function):
    """The weight itself, for one chunk, whose gradient goes to the carrier."""

    @staticmethod
    def forward(_: Any, _carrier: Tensor, weight: Tensor) -> Tensor:
        """Give the weight."""
        return weight.view_as(weight)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Widen the chunk's gradient."""
        return gradients[0].float(), None


class _RowsToTable(Function):
    """A table, at which the rows of all chunks' gradients are gathered, and added into one gradient of the whole."""

    @staticmethod
    def forward(_: Any, table: Tensor) -> Tensor:
        """Give the table."""
        return table.view_as(table)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        """Add the rows up, once."""
        return gradients[0].to_dense() if gradients[0].is_sparse else gradients[0]


def _itself(weight: Tensor) -> Tensor:
    return weight


def autocast_type(tensor: Tensor) -> torch.dtype | None:
    """What autocast casts to on a tensor's device; None where it is off."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def uncached_autocast(device: str) -> AbstractContextManager[Any]:
    """Whatever autocast is on, without its cache of weights.

    With it all chunks share one half-precision copy of a weight, at which their gradients are added in half precision:
    over 128 chunks of a small model in bfloat16 that is off by 2 to 4% (tests/training/test_half_weights.py).
    """
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


# Captions in the order of their lengths are cut into so many pieces at most, of so many rows at least. Few lengths save
# nearly all the padding, and each piece reads the weights once more (benchmarks/padding.py).
MOST_PIECES = 4
LEAST_ROWS = 64


Rows = Tensor | Mapping[str, Tensor]
"""(B, …), or several tensors of B rows by their names."""

Encode = Callable[[Any, int], Tensor]
"""Maps the rows of a chunk, and its number, to (b, D)."""


@dataclass(frozen=True)
class Chunks:
    """How a batch is cut on one process.

    Args:
        size: rows of a chunk at most, whose activations are computed again in the backward pass; 0, or B and more, for
            a batch that fits as it is.
        kept: the last so many chunks keep their activations, and are not computed again.
        seed: with the chunk's number it decides the random state (dropout) that it is encoded in, both times.
    """

    size: int = 0
    kept: int = 0
    seed: tuple[int, ...] = ()


def encode_in_chunks(
    encode: Callable[[Any], Tensor],
    batch: Rows,
    chunks: Chunks,
    encoder: nn.Module,
    lengths: NDArray[np.int64] | None = None,
) -> Tensor:
    """Encode a batch, holding the activations of few chunks at a time.

    Args:
        encode: maps (b, …) rows to (b, D) embeddings.
        batch: B rows.
        chunks: how it is cut.
        encoder: the module that ``encode`` runs; its BatchNorms are looked after. Where nothing of it is trained there
            is nothing to hold, so that nothing is recomputed.
        lengths: (B,) tokens of each row, the rest of which makes no difference; None where all are looked at.

    Returns:
        (B, D), in the order of the batch.
    """
    # With a BatchNorm among the words the captions that meet in a chunk, and their padding, would make a difference.
    lengths = None if training_norms(encoder) else lengths
    first = batch if isinstance(batch, Tensor) else next(iter(batch.values()))
    asked = 1 if chunks.size <= 0 else -(-len(first) // chunks.size)
    number = asked
    if lengths is not None and lengths.min() < lengths.max():
        number = max(number, min(MOST_PIECES, len(first) // LEAST_ROWS))
    # Of the chunks that were asked for: pieces are smaller.
    trained = any(parameter.requires_grad for parameter in encoder.parameters())
    recomputed = -(-max(0, asked - chunks.kept) * number // asked) if trained and asked > 1 else 0
    parts, order = _cut(batch, number, lengths)
    seeded = _in_its_random_state(encode, chunks.seed, first)
    if number == 1:
        return seeded(parts[0], 0)
    with PooledNorms(encoder) as norms:
        embeddings = []
        for place, part in enumerate(parts):
            with norms.recording():
                if place < recomputed:
                    embeddings.append(_recomputed(seeded, part, place, norms))
                else:
                    embeddings.append(seeded(part, place))
    joined = torch.cat(embeddings)
    return joined if order is None else joined[order.argsort()]


def _cut(batch: Rows, number: int, lengths: NDArray[np.int64] | None) -> tuple[list[Any], Tensor | None]:
    """Chunks of nearly equal numbers of rows (one row alone is more than some BatchNorms can bear), and their order.

    With lengths the rows are sorted by them, and a chunk ends with its longest; the order is (B,) places in the batch.
    """
    if isinstance(batch, Mapping):
        orders = None
        parts: list[dict[str, Tensor]] = [{} for _ in range(number)]
        for name, rows in batch.items():
            cut, orders = _cut(rows, number, lengths)
            for part, chunk in zip(parts, cut, strict=True):
                part[name] = chunk
        return parts, orders
    if lengths is None:
        return list(batch.tensor_split(number)), None
    if number == 1:
        return [batch[:, : int(lengths.max())] if batch.ndim > 1 else batch], None
    places = np.argsort(lengths, kind="stable")
    longest = [int(lengths[some[-1]]) for some in np.array_split(places, number)]
    order = sent(torch.from_numpy(places), batch.device)
    chunks = zip(batch[order].tensor_split(number), longest, strict=True)
    return [rows[:, :end] if rows.ndim > 1 else rows for rows, end in chunks], order


def _in_its_random_state(encode: Callable[[Any], Tensor], seed: tuple[int, ...], rows: Tensor) -> Encode:
    """Make of ``encode`` what encodes a chunk in the random state of its number; ``rows`` tell the device."""
    devices = [rows.device] if rows.is_cuda else []

    def seeded(chunk: Any, number: int) -> Tensor:
        """Map (b, …) rows to (b, D)."""
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed_of(*seed, number))
            return encode(chunk)

    return seeded


def _recomputed(seeded: Encode, chunk: Any, number: int, norms: PooledNorms) -> Tensor:
    """Encode a chunk, keeping nothing but the embeddings."""
    # ``seeded`` sets the random state itself: checkpoint saves CUDA's only when an argument lies there.
    embeddings = checkpoint(
        seeded,
        chunk,
        number,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), norms.still()),
    )
    return cast(Tensor, embeddings)


class FixedTexts:
    """A table of embeddings in the machine's memory, 4 D bytes a caption, that fills as captions come by.

    A caption that is encoded among others differs by rounding: what a run computes after it was resumed equals what it
    would have computed to within that.
    """

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._table = torch.empty(0, 0)

    def __len__(self) -> int:
        return len(self._rows)

    @torch.no_grad()
    def embed(self, ids: Tensor, texts: Texts, encode: Callable[[Texts], Tensor]) -> Tensor:
        """Look captions up; encode those that were not met before.

        Args:
            ids: (B,) int64, equal for equal captions.
            texts: their tokens.
            encode: maps tokens of b captions to (b, D) float32.

        Returns:
            (B, D) float32, on the device of the ids.
        """
        keys = ids.tolist()
        unknown = {key: place for place, key in enumerate(keys) if key not in self._rows}
        if unknown:
            self._add(list(unknown), encode(_take(texts, torch.tensor(list(unknown.values()), device=ids.device))))
        return self._table[[self._rows[key] for key in keys]].to(ids.device)

    def _add(self, keys: list[int], embeddings: Tensor) -> None:
        """Append rows; the table doubles where it is full, so that none is copied often."""
        used, needed = len(self._rows), len(self._rows) + len(keys)
        if needed > len(self._table):
            larger = torch.empty(max(needed, 2 * len(self._table)), embeddings.shape[1])
            larger[:used] = self._table[:used] if used else larger[:0]
            self._table = larger
        self._table[used:needed] = embeddings.cpu()
        self._rows |= {key: used + place for place, key in enumerate(keys)}


def _take(texts: Texts, places: Tensor) -> Texts:
    if isinstance(texts, Mapping):
        return {name: tensor[places] for name, tensor in texts.items()}
    return texts[places]


IMAGE_TOWER, TEXT_TOWER = 0, 1  # tell the towers' random states apart


class TowerRuns:
    """Encodes batches, in the way that a run asks for.

    Args:
        reader: of the batches.
        economy: how a step is computed.
        halves: whether some weights are kept in bfloat16.
        seed: with the count of batches it decides the random state of each chunk.
    """

    def __init__(self, reader: BatchReader, economy: StepOptions, halves: bool, seed: int) -> None:
        self.reader = reader
        self.economy = economy
        self.halves = halves
        self.seed = seed
        self.fixed_texts = FixedTexts()

    def embed(self, model: DualEncoder, inputs: Inputs, batch: int) -> tuple[Tensor, Tensor]:
        """Embed both sides.

        Args:
            model: whose towers; the one that is trained, or its teacher.
            inputs: what the batch holds.
            batch: global batches before it.

        Returns:
            Two (B, D), unit norm, float32 or wider.
        """
        # A compiled look-up gives no gradient by rows; of CLIP's own towers only the blocks are compiled.
        stand_ins = StandIns(model, self.halves, tables=isinstance(model, CLIP) or not self.economy.compile)
        encode_image, encode_text = stand_ins.around(model.encode_image), stand_ins.around(model.encode_text)

        def embed_texts(texts: Texts, lengths: NDArray[np.int64]) -> Tensor:
            """Map the tokens of b captions to (b, D)."""
            chunks = self._chunks(batch, TEXT_TOWER)
            return unit_norm(encode_in_chunks(encode_text, texts, chunks, model.transformer, lengths))

        if model.text_is_fixed and model is self.reader.model:
            texts = self.fixed_texts.embed(
                inputs.captions, inputs.texts, lambda some: embed_texts(some, self.reader.lengths(some))
            )
        else:
            texts = embed_texts(inputs.texts, inputs.lengths)
        images = encode_in_chunks(encode_image, inputs.images, self._chunks(batch, IMAGE_TOWER), model.visual)
        return unit_norm(images), texts

    def forget(self) -> None:
        """Encode captions of a locked text tower anew: it has other weights."""
        self.fixed_texts = FixedTexts()

    def _chunks(self, batch: int, tower: int) -> Chunks:
        economy = self.economy
        return Chunks(economy.minibatch_size, economy.kept_minibatches, (self.seed, batch, world()[0], tower))


def share(images: Tensor, texts: Tensor, captions: Tensor | None = None) -> Pairs:
    """Gather everyone's embeddings, with gradient, around this process's.

    Args:
        images: (B, D) float, unit norm.
        texts: (B, D) float, unit norm.
        captions: (B,) int64, equal for equal captions.
    """
    all_captions = None if captions is None else gather_with_gradient(captions)
    offset = world()[0] * len(images)
    return Pairs(images, texts, gather_with_gradient(images), gather_with_gradient(texts), offset, all_captions)
