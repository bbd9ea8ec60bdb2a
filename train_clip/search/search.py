"""Find the images, or captions, that are most similar to a text or an image: as a table, JSON, pictures, or a page."""

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train_clip.checkpoints.found import find_weights, fingerprint
from train_clip.checkpoints.load import Pretrained
from train_clip.commands.evaluate import load_for_scoring, write_json
from train_clip.data.pairs import read_caption_lines
from train_clip.errors import BadSample, UsageError, UserError
from train_clip.estimates import size
from train_clip.evaluation.encode import batches
from train_clip.files import require_new, require_place, write_text
from train_clip.models.clip import unit_norm
from train_clip.options import Check, Options, WeightOptions, at_least, option
from train_clip.printing import printable
from train_clip.probes.calibration import CAPTIONS, NOTHING, find_calibration
from train_clip.search import gallery, page
from train_clip.search.gallery import Answer, Hit
from train_clip.search.index import Index, counted
from train_clip.search.nearest import nearest
from train_clip.search.vectors import BLOCK, Vectors, open_vectors, reading

EXACT = 1_000_000  # embeddings that are compared one by one
PROBES = 100  # captions by which an index is tried


@dataclass(frozen=True)
class SearchOptions(Options):
    """What to look for, and how to show what is found."""

    k: int = option(12, "results for each query", Check(lambda k: 1 <= k <= 1000, "from 1 to 1000"))
    image: Path | None = option(None, "an image to look for")
    queries: Path | None = option(None, "text file of further queries, one per line")
    checkpoint: str | None = option(None, "the model that made the embeddings; default: where it lay then")
    calibration: Path | None = option(
        None, "what `evaluate --calibrate` wrote; default: that beside the checkpoint, if it is there"
    )
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

    Returns:
        For each query what was found, the most similar first.
    """
    opened = open_vectors(embeddings)
    if bool(texts or options.queries or options.image) == options.page:
        given = "--page and queries" if options.page else "nothing to look for"
        raise UsageError(
            f'{given}. Expected a text ("a red hat"), --image or --queries; or --page, to type them there.'
        )
    targets = [target for target in (options.json, options.html) if target is not None]
    if options.page and targets:
        raise UsageError(f"--page writes no file, found {targets[0]}. Leave out --json and --html, or --page.")
    if options.page:
        page.serve(lambda: _page(Searched(opened, options)), options.port)
        return []
    require_new(*[options.html] if options.html else [])
    for target in targets:
        require_place(target)
    searched = Searched(opened, options)
    try:
        captions = [*texts, *(read_caption_lines(str(options.queries))[0] if options.queries else [])]
        asked: dict[str, list[Any]] = {"caption": captions, "image": [options.image] if options.image else []}
        encoded = [(encode(searched.model, items), kind, items) for kind, items in asked.items() if items]
    except BadSample as bad:
        raise UserError(f"{bad}. Expected --image to be an image, --queries a query per line.") from None
    answers = [answer for rows, kind, items in encoded for answer in searched(rows, kind, [*map(str, items)])]
    results = [one._asdict() | {"results": [hit._asdict() for hit in one.results]} for one in answers]
    if options.json is not None:
        told = {"embeddings": str(embeddings), "model": opened.about.get("model"), "queries": results}
        write_json(options.json, told)
    if options.html is not None:
        write_text(options.html, _pictures(searched, answers))
        print(f"Pictures: {options.html}. Open it in a browser.")
    for answer in answers:
        print(f"\n{printable(answer.query)}" + f"\n  {answer.note}" * bool(answer.note))
        width = max((len(printable(hit.path)) for hit in answer.results), default=0)
        for hit in answer.results:
            match = "" if hit.match is None else f"{hit.match:5.0%}  "
            caption = printable(hit.caption[: gallery.LONGEST])
            print(f"  {hit.similarity:6.3f}  {match}{printable(hit.path):{width}}  {caption}".rstrip())
    return results


class Searched:
    """A file of embeddings that is searched: the model that made it, the texts of its rows, and their pictures."""

    def __init__(self, opened: Vectors, options: SearchOptions) -> None:
        self.opened, self.k, dim = opened, options.k, opened.about["dim"]
        is_exact, memory = options.exact or len(opened) <= EXACT, f"{size(8 * BLOCK * dim)} of memory at a time"
        if options.page:
            memory = f"{size(len(opened) * dim * np.dtype(opened.about['dtype']).itemsize)} of memory"
        how = f"compared one by one, which takes {memory}" if is_exact else "searched by an index, which finds most"
        print(f"{opened.path}: {len(opened):,} embeddings of {dim:,} numbers, {how}.", flush=True)
        self.model, source = load_model(opened, options)
        self._calibration = find_calibration(self.model.model, source, CAPTIONS, options.calibration)
        self.keys, self.paths, self.captions = opened.keys, opened.paths, opened.captions
        self.root = options.folder or Path(str(opened.about.get("root", opened.path.parent)))
        self._index = None if is_exact else Index(opened, self._probes)
        self._blocks: Callable[[], Iterator[np.ndarray]] = lambda: counted(opened)
        if is_exact and options.page:
            self._hold(np.empty((len(opened), dim), opened.about["dtype"]))

    def __call__(self, queries: np.ndarray, kind: str, titles: list[str]) -> list[Answer]:
        """Find what is most similar to each of (Q, D) queries, images or captions."""
        # It was fitted on similarities of images with captions.
        calibration = self._calibration if kind != self.opened.about["kind"] else None
        found = self._index(queries, self.k) if self._index else nearest(self._blocks(), queries, self.k)
        answers = list[Answer]()
        for title, (rows, similarities) in zip(titles, found, strict=True):
            note, matches = "", [None] * len(rows)
            if calibration is not None and len(rows):
                matches = calibration.probability(similarities).tolist()
                unfit = not calibration.fits(similarities).any()
                note = f"{NOTHING}, with a precision of {calibration.precision:.1%}" * unfit
            several = zip(rows.tolist(), similarities.tolist(), matches, strict=True)
            answers.append(Answer(title, note, [self.hit(*one) for one in several]))
        return answers

    def hit(self, row: int, similarity: float | None = None, match: float | None = None) -> Hit:
        """A row with its texts."""
        return Hit(row, similarity, match, self.keys[row], self.paths[row], self.captions[row])

    def embedding(self, row: int) -> np.ndarray:
        """The (D) float32 embedding of a row, where a page is served."""
        return self._index.embedding(row) if self._index else self._rows[row].astype(np.float32)

    def thumbnail(self, row: int) -> bytes | None:
        """A small picture of a row."""
        return gallery.thumbnail(self.root, self.paths[row])

    def _probes(self) -> np.ndarray:
        captions = [caption for caption in self.captions if caption]
        some = captions[:: len(captions) // PROBES + 1]
        return encode(self.model, some) if some else next(self.opened.blocks(PROBES))

    def _hold(self, rows: np.ndarray) -> None:
        first, self._rows = 0, rows
        for block in self._blocks():
            rows[first : (first := first + len(block))] = block
        places = range(0, len(rows), BLOCK)
        self._blocks = lambda: (rows[at : at + BLOCK].astype(np.float32, copy=False) for at in places)


def encode(model: Pretrained, items: list[Any]) -> np.ndarray:
    """Embed queries: (Q, D) float32 of unit norm, computed in float32, as rows are and what a calibration knows."""
    rows = list[np.ndarray]()
    for embeddings, bad in batches(model.model, model.tokens, items, in_half=False):
        if bad:
            raise bad[0]
        rows.append(unit_norm(embeddings).cpu().numpy())
    return np.concatenate(rows)


def load_model(opened: Vectors, options: SearchOptions) -> tuple[Pretrained, str]:
    """Load the model that made the embeddings, and refuse another; also the file that it is from."""
    about = opened.about
    with reading(opened.path):
        given = dict(about.get("weights", {}))
        weights = WeightOptions.pick(given)
    checkpoint = options.checkpoint or str(about.get("checkpoint"))
    try:
        found = find_weights(checkpoint, weights, given.get("backbone"))
        model = load_for_scoring(found, options.device)
    except UserError as error:
        if options.checkpoint is None:
            error.add_note(f"{opened.path} was made with it. If it has moved, give --checkpoint.")
        raise
    if (other := fingerprint(model.model)) != about["fingerprint"] or model.model.embed_dim != about["dim"]:
        raise UserError(
            f"{checkpoint}: another model (fingerprint {other[:12]}) than made {opened.path} "
            f"({about['fingerprint'][:12]}, {about.get('model')}, once at {about.get('checkpoint')}). Give that one by "
            "--checkpoint, or embed again."
        )
    return model, found.source


def _pictures(searched: Searched, answers: list[Answer]) -> str:
    def card(hit: Hit) -> str:
        picture = base64.b64encode(searched.thumbnail(hit.row) or b"").decode()
        return gallery.card(hit, f"data:image/jpeg;base64,{picture}")

    title, number = f"Search in {searched.opened.path.name}", len(searched.opened)
    return gallery.page(title, f"{number:,} embeddings", [gallery.section(one, card) for one in answers])


def _page(searched: Searched) -> Any:
    def look(query: str | int) -> Answer:
        if query == "":
            return Answer("The first", "", [*map(searched.hit, range(min(searched.k, len(searched.keys))))])
        if isinstance(query, str):
            return searched(encode(searched.model, [query]), "caption", [query])[0]
        own = searched.opened.about["kind"]
        return searched(searched.embedding(query)[None], own, [f"More like {searched.keys[query]}"])[0]

    print(f"Pictures from {searched.root}, and from nowhere else.")
    title = f"Search in {searched.opened.path.name}"
    return page.application(title, look, searched.thumbnail, len(searched.keys))
