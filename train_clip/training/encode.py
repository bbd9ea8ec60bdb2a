"""Encode a batch by both towers: in minibatches (chunks), with the gradient and statistics of the whole batch.

Captions are sorted by length, and each chunk is padded to its longest only. One ordinary backward pass recomputes
chunk by chunk: the gradient is the full batch's, the memory a chunk's (GradCache, Gao et al. 2021, arXiv 2101.06983).

B  rows of the batch on this process      D  embedding width      n_k  elements a channel in chunk k      n  Σ n_k
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from train_clip.gather import gather_with_gradient, world
from train_clip.losses import Pairs
from train_clip.models.blocks import SelfAttention, recomputing, scratch_statistics, training_norms
from train_clip.models.clip import CLIP, DualEncoder, unit_norm
from train_clip.options import TrainingOptions
from train_clip.tensors import seed_of, sent
from train_clip.training.batch import Inputs

# Captions in the order of their lengths are cut into so many pieces at most, of so many rows at least. Few lengths save
# nearly all the padding, and each piece reads the weights once more (benchmarks/padding.py).
MOST_PIECES = 4
LEAST_ROWS = 64
# Modules all of whose matrices go into products alone, which autocast computes in half precision.
PRODUCTS = (nn.Linear, nn.Conv2d, SelfAttention)
MOST_FIXED = 2 * 10**9  # bytes of memory for embeddings of a locked text tower
OF_ROW = 800  # bytes that a row of them takes besides its elements
LARGE = 10_000  # rows of a table from which on it is worth gathering those that were looked up

Rows = Tensor | Mapping[str, Tensor]
"""(B, …), or several tensors of B rows by their names."""


class Towers:
    """Embeds batches by both towers of the model that is trained, or of its teacher or EMA, as the options ask."""

    def __init__(self, model: DualEncoder, options: TrainingOptions) -> None:
        self.model = model
        self.step = options.step
        self.has_half_weights = options.optimizer.has_half_weights
        self.fixed_texts: dict[int, Tensor] = {}  # (D,) on the host by the caption's number, of a locked text tower

    def embed(self, model: DualEncoder, inputs: Inputs, batch: int) -> tuple[Tensor, Tensor]:
        """Embed both sides, by the model that is trained or one of its form: two (B, D), unit norm, float32 or wider.

        ``batch`` is the number of global batches before it; with the seed it decides the random state of each chunk.
        """
        # A compiled look-up gives no gradient by rows; of CLIP's own towers only the blocks are compiled.
        tables = isinstance(model, CLIP) or not self.step.compile
        substitutes = WeightSubstitutes(model, self.has_half_weights, tables)
        size, kept, key = self.step.minibatch_size, self.step.kept_minibatches, (self.step.seed, batch, world()[0])
        of_images, of_texts = (Chunks(size, kept, (*key, tower)) for tower in (0, 1))
        encode_image, encode_text = map(substitutes.around, (model.encode_image, model.encode_text))
        embed_texts = partial(encode_in_chunks, encode_text, chunks=of_texts, encoder=model.transformer)
        if model.text_is_fixed and model is self.model:
            texts = self._look_up(inputs, embed_texts)
        else:
            texts = embed_texts(inputs.texts, lengths=inputs.lengths)
        images = encode_in_chunks(encode_image, inputs.images, of_images, model.visual)
        return unit_norm(images), unit_norm(texts)

    @torch.no_grad()
    def _look_up(self, inputs: Inputs, embed: Callable) -> Tensor:
        # A caption is encoded once, as long as there is room. Among others it differs by rounding: what a run computes
        # after it was resumed equals what it would have computed to within that.
        keys = inputs.captions.tolist()
        rows = {key: self.fixed_texts[key] for key in keys if key in self.fixed_texts}
        if new := {key: place for place, key in enumerate(keys) if key not in rows}:
            texts, places = inputs.texts, list(new.values())
            some = {name: t[places] for name, t in texts.items()} if isinstance(texts, Mapping) else texts[places]
            encoded = embed(some, lengths=inputs.lengths[places]).cpu()
            rows |= zip(new, encoded, strict=True)
            room = max(0, MOST_FIXED // (encoded[0].nbytes + OF_ROW) - len(self.fixed_texts))
            self.fixed_texts |= zip(new, encoded[:room], strict=False)
        return torch.stack([rows[key] for key in keys]).to(inputs.captions.device)


def share(images: Tensor, texts: Tensor, captions: Tensor) -> Pairs:
    """Gather everyone's (B, D) embeddings, with gradient, and (B,) numbers of captions around this process's."""
    all_captions, all_images, all_texts = map(gather_with_gradient, (captions, images, texts))
    return Pairs(images, texts, all_images, all_texts, world()[0] * len(images), all_captions)


class Chunks(NamedTuple):
    """How a batch is cut on one process."""

    size: int = 0  # rows of a chunk at most, which is recomputed in the backward pass; 0, or B and more, for no chunks
    kept: int = 0  # the last so many chunks keep their activations, and are not recomputed
    seed: tuple[int, ...] = ()  # with the chunk's number it decides its random state (dropout), both times


def encode_in_chunks(
    encode: Callable, batch: Rows, chunks: Chunks, encoder: nn.Module, lengths: Tensor | None = None
) -> Tensor:
    """Encode B rows to (B, D), in their order, holding the activations of few chunks at a time.

    ``encode`` maps b rows to (b, D) by ``encoder``, whose BatchNorms normalize chunk by chunk, with one update of their
    running statistics a batch; where nothing of it is trained, nothing is recomputed. What comes after ``lengths``,
    (B,) int64 tokens of each row, on the host, makes no difference; None where all are looked at.
    """
    norms = training_norms(encoder)
    # With a BatchNorm among the words the captions that meet in a chunk, and their padding, would make a difference.
    lengths = None if norms else lengths
    num_rows = len(_first(batch))
    number = asked = -(-num_rows // chunks.size) if chunks.size else 1
    if lengths is not None and lengths.min() < lengths.max():
        number = max(asked, min(MOST_PIECES, num_rows // LEAST_ROWS))
    # Of the chunks that were asked for: pieces are smaller.
    trained = any(parameter.requires_grad for parameter in encoder.parameters())
    recomputed = -(-max(0, asked - chunks.kept) * number // asked) if trained and asked > 1 else 0
    parts, order = _cut(batch, number, lengths)
    if number == 1:
        return _seeded(encode, parts[0], seed_of(*chunks.seed, 0))

    # The random state is set within: checkpoint saves CUDA's only when an argument lies there.
    how: Any = {"use_reentrant": False, "preserve_rng_state": False}
    how |= {"context_fn": partial(recomputing, norms)} if norms else {}
    embeddings: list[Any] = []
    statistics: Statistics = {norm: [] for norm in norms}
    for place, part in enumerate(parts):
        run = partial(torch.utils.checkpoint.checkpoint, _seeded, **how) if place < recomputed else _seeded
        with _recording(statistics) if norms else nullcontext():
            embeddings.append(run(encode, part, seed_of(*chunks.seed, place)))
    for norm, seen in statistics.items():
        if seen:
            _update(norm, seen)
    joined = torch.cat(embeddings)
    return joined if order is None else joined[order.argsort()]


def _first(rows: Rows) -> Tensor:
    return rows if isinstance(rows, Tensor) else next(iter(rows.values()))


def _cut(batch: Rows, number: int, lengths: Tensor | None) -> tuple[list[Any], Tensor | None]:
    # Chunks of nearly equal numbers of rows (one row alone is more than some BatchNorms can bear), and their order:
    # with lengths the rows are sorted by them, and a chunk ends with its longest.
    order = None
    if lengths is not None and number > 1:
        lengths, places = lengths.sort(stable=True)
        order = sent(places, _first(batch).device)
    ends = [None] * number if lengths is None else [int(some.max()) for some in lengths.tensor_split(number)]

    def cut(rows: Tensor) -> list[Tensor]:
        parts = (rows if order is None else rows[order]).tensor_split(number)
        return [part[:, :end] if part.ndim > 1 else part for part, end in zip(parts, ends, strict=True)]

    if isinstance(batch, Tensor):
        return cut(batch), order
    columns = zip(*map(cut, batch.values()), strict=True)
    return [dict(zip(batch, parts, strict=True)) for parts in columns], order


def _seeded(encode: Callable, chunk: Any, seed: int) -> Tensor:
    rows = _first(chunk)
    with torch.random.fork_rng([rows.device] if rows.is_cuda else []):
        torch.manual_seed(seed)
        return encode(chunk)


Statistics = dict[Any, list[tuple[int, Tensor, Tensor]]]
"""Of each BatchNorm (n_k, mean_k, var_k) of the chunks that went through it."""


@contextmanager
def _recording(statistics: Statistics) -> Iterator[None]:
    """What a chunk's forward pass runs in: adds what it was like to the lists."""
    counts = dict.fromkeys(statistics, 0)

    def count_elements(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        counts[norm] = inputs[0].numel() // inputs[0].shape[1]
        if isinstance(norm, nn.SyncBatchNorm) and world()[1] > 1:
            counts[norm] *= distributed.get_world_size(norm.process_group)

    with ExitStack() as stack:
        for norm in statistics:
            stack.enter_context(norm.register_forward_pre_hook(count_elements))
        # Not the momentum of a recomputation: the compiler tells its form, without these hooks, by that alone.
        stack.enter_context(scratch_statistics(statistics, momentum=1.0))
        yield
        for norm, count in counts.items():
            if count:
                statistics[norm].append((count, norm.running_mean, norm.running_var))


@torch.no_grad()
def _update(norm: Any, chunks: list[tuple[int, Tensor, Tensor]]) -> None:
    # mean = Σ n_k mean_k / n      var = Σ n_k (var_k + (mean_k - mean)²) / n      unbiased: var · n / (n - 1)
    counts, means, variances = zip(*chunks, strict=True)
    wide = torch.promote_types(norm.running_mean.dtype, torch.float32)
    n = sent(torch.tensor(counts, dtype=wide), norm.running_mean.device)[:, None]
    mean_k, var_k = torch.stack(means).to(wide), torch.stack(variances).to(wide)
    mean = (n * mean_k).sum(dim=0) / n.sum()
    # Squares of differences, not differences of squares, which cancel where the mean is large.
    var = (n * (var_k * (n - 1) / n + (mean_k - mean) ** 2)).sum(dim=0) / (n.sum() - 1)
    # momentum None is a cumulative average (torch.nn.BatchNorm2d).
    share = 1 / (int(norm.num_batches_tracked) + 1) if norm.momentum is None else norm.momentum
    for running, pooled in ((norm.running_mean, mean), (norm.running_var, var)):
        running.copy_(running.to(wide).lerp(pooled, share))
    norm.num_batches_tracked.add_(1)


class WeightSubstitutes:
    """Tensors in the places of a model's weights while it encodes, so that gradients of many chunks add up well.

    With ``halves``, a bfloat16 weight is replaced by a float32 copy, or where autocast would cast that back for a
    product by itself with a float32 sum of gradients, which is rounded once. With ``tables``, which compiled look-ups
    do not bear, a chunk's gradient of a table of tokens is that of the rows it looked up; the whole's is made once.
    """

    def __init__(self, model: nn.Module, halves: bool, tables: bool = False) -> None:
        # Where something is replaced: a module's dictionary, the key, and what makes the substitute.
        self.places: list[tuple[dict, str, Callable]] = []
        copies: dict[Tensor, Tensor] = {}
        found = [
            (module, name, weight)
            for module in (model.modules() if halves else ())
            for name, weight in module._parameters.items()
            if weight is not None and weight.dtype == torch.bfloat16
        ]
        uses = Counter(weight for _, _, weight in found)
        for module, name, weight in found:
            device = weight.device.type
            in_half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
            if in_half and type(module) in PRODUCTS and uses[weight] == 1:
                substitute: Any = partial(_Carried.apply, _Carrier.apply(weight), weight.detach())
            else:
                # One copy of a weight that several modules share.
                substitute = _always(copies.setdefault(weight, weight.float()))
            self.places.append((module._parameters, name, substitute))
        for module in model.modules() if tables and torch.is_grad_enabled() else ():
            plain = isinstance(module, nn.Embedding) and not module.scale_grad_by_freq and module.max_norm is None
            table = module._parameters.get("weight") if plain else None  # not there where it is pruned
            if table is not None and table.requires_grad and len(table) >= LARGE:
                rows = _RowsToTable.apply(copies.get(table, table))
                self.places += [(module._parameters, "weight", _always(rows)), (vars(module), "sparse", _always(True))]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let them stand there within the block."""
        before = [(place, key, place[key]) for place, key, _ in self.places]
        for place, key, substitute in self.places:
            place[key] = substitute()
        try:
            yield
        finally:
            for place, key, value in before:
                place[key] = value

    def around(self, encode: Callable) -> Callable:
        """Wrap what encodes (b, …) rows of a chunk, so that chunks meet in the substitutes.

        In the recomputation of a chunk too, within the backward pass. Autocast goes without its cache of weights: with
        it all chunks share one half-precision copy of a weight, at which their gradients are added in half precision.
        Over 128 chunks of a small model in bfloat16 that is off by 2 to 4% (tests/training/test_half_weights.py).
        """

        def encode_in_place(rows: Any) -> Tensor:
            device = _first(rows).device.type
            uncached = torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False)
            with self.in_place(), uncached:
                return encode(rows)

        return encode_in_place


def _always(value: Any) -> Callable[[], Any]:
    return lambda: value


class _Carrier(torch.autograd.Function):
    # A weight → float32 of its shape and of no memory, at which gradients of the chunks are added in float32.

    @staticmethod
    def forward(_: Any, weight: Tensor) -> Tensor:
        return torch.zeros((), device=weight.device).expand(weight.shape)

    @staticmethod
    def backward(_: Any, *sums: Tensor) -> Tensor:
        return sums[0].bfloat16()  # rounded once


class _Carried(torch.autograd.Function):
    # The weight itself, for one chunk, whose gradient goes to the carrier.

    @staticmethod
    def forward(_: Any, _carrier: Tensor, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].float(), None


class _RowsToTable(torch.autograd.Function):
    # A table, at which the rows of all chunks' gradients are gathered, and added into one gradient of the whole.

    @staticmethod
    def forward(_: Any, table: Tensor) -> Tensor:
        return table.view_as(table)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].to_dense()
