"""Find the images, or captions, that are most similar to a text or an image: as a table, JSON, pictures, or a page."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train_clip.checkpoints.found import find_weights
from train_clip.checkpoints.load import Pretrained
from train_clip.commands.evaluate import load_for_scoring, write_json
from train_clip.data.pairs import read_caption_lines
from train_clip.errors import BadSample, UsageError, UserError
from train_clip.estimates import size
from train_clip.files import require_new, write_text
from train_clip.options import Check, Options, WeightOptions, at_least, option
from train_clip.printing import printable
from train_clip.search import gallery, page
from train_clip.search.gallery import Hit
from train_clip.search.index import Index, counted
from train_clip.search.nearest import Nearest, nearest
from train_clip.search.vectors import BLOCK, Vectors, fingerprint, open_vectors, reading

EXACT = 1_000_000  # embeddings that are compared one by one
PROBES = 100  # captions by which an index is tried
SHOWN = 100  # characters of a caption in the table


@dataclass(frozen=True)
class SearchOptions(Options):
    """What to look for, and how to show what is found."""

    k: int = option(12, "results for each query", Check(lambda k: 1 <= k <= 1000, "from 1 to 1000"))
    image: Path | None = option(None, "an image to look for")
    queries: Path | None = option(None, "text file of further queries, one per line")
    checkpoint: str | None = option(None, "the model that made the embeddings; default: where it lay then")
    folder: Path | None = option(None, "folder that the paths are relative to; default: where it lay then")
    exact: bool = option(False, f"compare with each embedding, also of more than {EXACT:,}, without an index")
    device: str = option("auto", "cpu, cuda, or auto: cuda if available")
    json: Path | None = option(None, "file to write the results to")
    html: Path | None = option(None, "page of the pictures found to write")
    page: bool = option(False, "serve a page for typing queries, to this machine alone")
    port: int = option(8765, "of the page; 0: any that is free", at_least(0))


def search(embeddings: Path, /, *texts: str, options: SearchOptions) -> list[dict[str, Any]]:
    """Find what is most similar to texts or an image in a file of embeddings, or open a page for searching.

    Args:
        embeddings: file that `train-clip embed` wrote
        texts: what to look for, each in quotes
        options: what else to look for, and how to show what is found
    """
    opened = open_vectors(embeddings)
    if options.html is not None:
        require_new(options.html)
    titles = [*texts, *_read_queries(options.queries)]
    if not (titles or options.image or options.page):
        raise UsageError('nothing to look for. Expected a text ("a red hat"), --image, --queries or --page.')
    if options.page:
        page.serve(lambda: _application(opened, options), options.port)
        return []
    _announce(opened, options)
    model = load_model(opened, options)
    queries = [model.encode(titles)]
    if options.image is not None:
        titles.append(str(options.image))
        queries.append(_encode_image(model, options.image))
    index = _index(opened, model, options)
    together = np.concatenate(queries)
    found = index(together, options.k) if index else nearest(counted(opened), together, options.k)
    hits = [*map(_Columns(opened).hits, found)]
    results = [
        {"query": title, "results": [dataclasses.asdict(hit) for hit in several]}
        for title, several in zip(titles, hits, strict=True)
    ]
    if options.json is not None:
        write_json(
            options.json, {"embeddings": str(embeddings), "model": opened.about.get("model"), "queries": results}
        )
    if options.html is not None:
        write_text(options.html, _pictures(opened, titles, hits, root_of(opened, options)))
        print(f"Pictures: {options.html}. Open it in a browser.")
    for title, several in zip(titles, hits, strict=True):
        _print(title, several)
    return results


def load_model(opened: Vectors, options: SearchOptions) -> Pretrained:
    """Load the model that made the embeddings, and refuse another."""
    about = opened.about
    with reading(opened.path):
        given = dict(about.get("weights", {}))
        weights = WeightOptions.pick(given)
    checkpoint = options.checkpoint or str(about.get("checkpoint"))
    try:
        model = load_for_scoring(find_weights(checkpoint, weights, given.get("backbone")), options.device)
    except UserError as error:
        if options.checkpoint is None:
            error.add_note(f"{opened.path} was made with it. If it has moved, give --checkpoint.")
        raise
    if (other := fingerprint(model.model)) != about["fingerprint"]:
        raise UserError(
            f"{checkpoint}: another model (fingerprint {other[:12]}) than made {opened.path} "
            f"({about['fingerprint'][:12]}, {about.get('model')}, once at {about.get('checkpoint')}). Give that one by "
            "--checkpoint, or embed again."
        )
    return model


def root_of(opened: Vectors, options: SearchOptions) -> Path:
    """The folder that the paths of a file of embeddings are relative to."""
    return options.folder or Path(str(opened.about.get("root", opened.path.parent)))


class _Columns:
    """The texts of a file's rows, read once."""

    def __init__(self, opened: Vectors) -> None:
        self.keys, self.paths, self.captions = opened.keys, opened.paths, opened.captions

    def hits(self, found: Nearest) -> list[Hit]:
        return [self.hit(row, similarity) for row, similarity in zip(*map(np.ndarray.tolist, found), strict=True)]

    def hit(self, row: int, similarity: float | None) -> Hit:
        return Hit(row, similarity, self.keys[row], self.paths[row], self.captions[row])


def _read_queries(path: Path | None) -> list[str]:
    try:
        return read_caption_lines(str(path))[0] if path else []
    except BadSample as bad:
        raise UserError(
            f"{path}: {bad.reason.removeprefix('caption ')}. Expected a query per line, in UTF-8."
        ) from None


def _encode_image(model: Pretrained, image: Path) -> np.ndarray:
    try:
        return np.asarray(model.encode([image]))
    except BadSample as bad:
        raise UserError(f"{bad}. Expected an image for --image.") from None


def _announce(opened: Vectors, options: SearchOptions) -> None:
    number, dim = len(opened), opened.about["dim"]
    of = f"{opened.path}: {number:,} embeddings of {dim:,} numbers"
    if number > EXACT and not options.exact:
        print(f"{of}, searched by an index, which finds most of the nearest.")
    elif options.page:
        print(f"{of}, held in memory: {size(number * dim * np.dtype(opened.about['dtype']).itemsize)}.")
    else:
        print(f"{of}, compared one by one, in blocks that take {size(8 * BLOCK * dim)} of memory.")


def _index(opened: Vectors, model: Pretrained, options: SearchOptions) -> Index | None:
    if len(opened) <= EXACT or options.exact:
        return None

    def probes() -> np.ndarray:
        captions = [caption for caption in opened.captions if caption]
        some = captions[:: len(captions) // PROBES + 1]
        return np.asarray(model.encode(some)) if some else next(opened.blocks(PROBES))

    return Index(opened, probes)


def _print(title: str, hits: Iterable[Hit]) -> None:
    rows = [(f"{hit.similarity:6.3f}", printable(hit.path), printable(hit.caption[:SHOWN])) for hit in hits]
    width = max((len(path) for _, path, _ in rows), default=0)
    print(f"\n{printable(title)}")
    for similarity, path, caption in rows:
        print(f"  {similarity}  {path:{width}}  {caption}".rstrip())


def _pictures(opened: Vectors, titles: list[str], hits: list[list[Hit]], root: Path) -> str:
    def cards(several: list[Hit]) -> Iterator[str]:
        return (gallery.card(hit, gallery.data_uri(gallery.thumbnail(root, hit.path))) for hit in several)

    sections = [gallery.section(title, cards(several)) for title, several in zip(titles, hits, strict=True)]
    return gallery.page(f"Search in {opened.path.name}", f"{len(opened):,} embeddings", sections)


def _application(opened: Vectors, options: SearchOptions) -> Any:
    """What the page shows and finds; embeddings that are compared one by one are held in memory."""
    _announce(opened, options)
    model, root = load_model(opened, options), root_of(opened, options)
    columns, index = _Columns(opened), _index(opened, model, options)
    rows = np.empty((0 if index else len(opened), opened.about["dim"]), opened.about["dtype"])
    first = 0
    for block in [] if index else opened.blocks():
        rows[first : (first := first + len(block))] = block

    def find(query: np.ndarray) -> list[Hit]:
        blocks = (rows[at : at + BLOCK].astype(np.float32, copy=False) for at in range(0, len(rows), BLOCK))
        return columns.hits((index(query, options.k) if index else nearest(blocks, query, options.k))[0])

    def look(query: str | int) -> tuple[str, list[Hit]]:
        if query == "":
            return "The first", [columns.hit(row, None) for row in range(min(options.k, len(opened)))]
        if isinstance(query, str):
            return query, find(model.encode([query]))
        alike = index.embedding(query) if index else rows[query].astype(np.float32)
        return f"More like {columns.keys[query]}", find(alike[None])

    print(f"Pictures from {root}, and from nowhere else.")
    title = f"Search in {opened.path.name}"
    return page.application(title, look, lambda row: gallery.thumbnail(root, columns.paths[row]), len(opened))
