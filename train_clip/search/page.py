"""A page for searching, served to this machine alone: a query, thumbnails, and more like one of them.

It works without a network. Addresses hold numbers of rows, never paths. Other hosts' pages can neither read it (no
CORS) nor reach it under a name of theirs (the Host header is checked).
"""

import re
import socket
import threading
from collections.abc import Callable
from functools import lru_cache
from html import escape
from typing import Any

from train_clip.errors import UserError, first_line
from train_clip.optional import optional
from train_clip.search import gallery
from train_clip.search.gallery import Answer

ADDRESS = "127.0.0.1"
HOSTS = [ADDRESS, "localhost"]
HEADERS = {
    "Content-Security-Policy": f"{gallery.POLICY}; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",  # the same address shows other pictures once other embeddings are searched
}
THUMBNAILS = 1000  # kept in memory, of some 10 kB each
DECODED = 2  # pictures at a time: one may take hundreds of megabytes
REQUESTS = 64  # at a time
LONGEST = 1000  # characters of a query
FORM = (
    '<form action="/" role="search"><label for="q">Search for</label>'
    '<input id="q" name="q" type="search" value="{}" maxlength="{}" autocomplete="off" autofocus>'
    "<button>Search</button></form>"
)

# What is most similar to a text, or to the embedding of a row.
Search = Callable[[str | int], Answer]


def application(title: str, search: Search, draw: Callable[[int], bytes | None], number: int) -> Any:
    """The page of some rows as an ASGI application.

    Args:
        title: of the page.
        search: for a text, of which the empty one gives the first rows, or for a row.
        draw: gives the thumbnail of a row.
        number: of rows.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route

    drawn, places, turn = lru_cache(THUMBNAILS)(draw), threading.Semaphore(DECODED), threading.Lock()

    def row(text: str) -> int:
        if not re.fullmatch("[0-9]{1,15}", text) or int(text) >= number:
            raise HTTPException(404)
        return int(text)

    def home(request: Request) -> Response:
        text, like = request.query_params.get("q", "").strip()[:LONGEST], request.query_params.get("like", "")
        query = row(like) if like else text
        with turn:
            answer = search(query)
        section = gallery.section(answer, lambda hit: gallery.card(hit, f"/thumbnail/{hit.row}", f"/?like={hit.row}"))
        status = f"{len(answer.results):,} of {number:,}" + ", the most similar first" * bool(like or text)
        form = FORM.format(escape(text), LONGEST)
        return HTMLResponse(gallery.page(title, status, [section], form), headers=HEADERS)

    def thumbnail(request: Request) -> Response:
        wanted = row(request.path_params["row"])
        with places:
            content = drawn(wanted)
        if content is None:
            raise HTTPException(404)
        return Response(content, media_type="image/jpeg", headers=HEADERS)

    routes = [Route("/", home), Route("/thumbnail/{row}", thumbnail)]
    only_here = Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)
    return Starlette(routes=routes, middleware=[only_here])


def serve(build: Callable[[], Any], port: int) -> None:
    """Serve what ``build`` gives to this machine, until Ctrl-C; port 0 takes any that is free."""
    uvicorn, _ = optional("uvicorn", "--page"), optional("starlette", "--page")
    try:
        listening = socket.create_server((ADDRESS, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: cannot be used ({first_line(error)}). Give another, or 0 for any.") from error
    with listening:
        how: Any = {"http": "h11", "ws": "none", "lifespan": "off", "proxy_headers": False, "log_level": "warning"}
        how |= {"access_log": False, "limit_concurrency": REQUESTS, "timeout_graceful_shutdown": 1}
        server = uvicorn.Server(uvicorn.Config(build(), **how))
        print(f"Search page: http://{ADDRESS}:{listening.getsockname()[1]}/ (until Ctrl-C)", flush=True)
        server.run(sockets=[listening])
