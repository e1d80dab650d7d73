"""A page to look at: one picture at a time, what a model says of it, and views of it that are made when asked for.

The page is for the person at this machine. It listens where it is asked to, by default on the loopback; there it
only answers to the loopback's names, so that no other page can read it under a name of its own, and not to what other
pages let a browser ask for. Uploads are bounded in
bytes, pixels and kinds before they are decoded, and the last `KEPT` pictures are kept in memory.
"""

from __future__ import annotations

import io
import socket
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from PIL import Image, UnidentifiedImageError

from visionzoo.engine.errors import UserError, printable, require
from visionzoo.engine.images import UNREADABLE, to_mode
from visionzoo.engine.options import given_flags
from visionzoo.engine.trained_flags import PageConfig

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
MAX_BYTES = 20 * 2**20  # of an upload
MAX_PIXELS = 50 * 10**6  # of a picture
TOO_MANY = f"more than {MAX_PIXELS // 10**6} million pixels; choose a smaller one."
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
KEPT = 16  # pictures
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-ancestors 'none'"
)


def check_no_page(page: PageConfig) -> None:
    """Refuse flags of the page where pictures are written instead.

    Raises:
        UserError: there are some.
    """
    if flags := given_flags(page):
        raise UserError(
            f"{', '.join(flags)}: of the page, which --save writes pictures instead of; leave one of them out"
        )


class Viewer(Protocol):
    """What the page shows pictures to: a classifier, a detector, a segmentor."""

    title: str
    mode: str  # PIL's, of the pictures
    upright: bool
    methods: Mapping[str, str]  # name -> what it shows

    def look(self, picture: Image.Image) -> dict[str, Any]:
        """Return what the model says of a picture: `classes` with name and probability, and other words."""

    def seen(self, picture: Image.Image) -> bytes:
        """Return a PNG of the picture as the model sees it."""

    def draw(self, picture: Image.Image, method: str, place: tuple[float, float] | None) -> tuple[bytes, str]:
        """Return a PNG of a view, and words on it; raises ValueError where the model has not what it needs."""


class Refused(Exception):
    """What a reader of the page can fix: a sentence, and the status of HTTP that goes with it."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.text, self.status = text, status


def read_upload(content: bytes, mode: str, *, upright: bool = False) -> Image.Image:
    """Return the picture in an upload.

    Raises:
        Refused: it is empty, too large in bytes or pixels, or no picture of `FORMATS`.
    """
    if not content:
        raise Refused("The file is empty; choose a picture.")
    if len(content) > MAX_BYTES:
        raise Refused(f"The file has more than {MAX_BYTES // 2**20} MB; choose a smaller one.", 413)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise Refused(f"The picture has {width} x {height}, {TOO_MANY}", 413)
            return to_mode(opened, mode, upright=upright)
    except Image.DecompressionBombError as error:  # Pillow's own limit, before its size can be asked for
        raise Refused(f"The picture has {TOO_MANY}", 413) from error
    except UNREADABLE as error:
        unknown = isinstance(error, UnidentifiedImageError)  # which names the object in memory
        why = "" if unknown else f": {printable(str(error)).rstrip('.')}"
        raise Refused(f"The file is no picture that can be read ({', '.join(FORMATS)} are known){why}.") from error


class Shelf:
    """The last pictures, by a number that is never given again."""

    def __init__(self) -> None:
        self._pictures: OrderedDict[int, Image.Image] = OrderedDict()
        self._next = 0

    def add(self, picture: Image.Image) -> int:
        """Keep a picture and return its number."""
        number, self._next = self._next, self._next + 1
        self._pictures[number] = picture
        while len(self._pictures) > KEPT:
            self._pictures.popitem(last=False)
        return number

    def get(self, number: int) -> Image.Image:
        """Return a picture; raises Refused where it is not kept."""
        if number not in self._pictures:
            raise Refused(f"This picture is no longer kept, the last {KEPT} are; open it again.", 404)
        return self._pictures[number]


def make_app(viewer: Viewer, files: Sequence[Path] = (), *, hosts: Sequence[str] = LOOPBACK) -> Any:
    """Return the page as an ASGI application.

    Args:
        viewer: what pictures are shown to.
        files: pictures that the page offers beside uploads.
        hosts: names under which it answers; "*" for any.

    Raises:
        UserError: if starlette is not installed.
    """
    require("starlette", "view")
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    shelf, turn = Shelf(), threading.Lock()  # models run for one at a time
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}

    def refusal(text: str, status: int) -> Response:
        return JSONResponse({"error": text}, status, headers=headers)

    def opened(picture: Image.Image) -> Response:
        with turn:
            try:
                said = viewer.look(picture)
            except ValueError as error:
                raise Refused(str(error)) from error
            return JSONResponse({"number": shelf.add(picture), **said}, headers=headers)

    def for_own_pages(app: Any) -> Any:
        """Refuse what a page from elsewhere lets a browser ask for; a link to this page is no such thing."""

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and _from_elsewhere(scope["method"], Request(scope).headers):
                refused = refusal("Another page asked for this; only the page of `visionzoo view` itself may.", 403)
                await refused(scope, receive, send)
            else:
                await app(scope, receive, send)

        return answer

    async def about(_request: Request) -> Response:
        names = [printable(path.name) for path in files]
        content = {"title": viewer.title, "methods": dict(viewer.methods), "files": names}
        return JSONResponse(content, headers=headers)

    async def upload(request: Request) -> Response:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > MAX_BYTES:
                break
        return await run_in_threadpool(lambda: opened(read_upload(bytes(content), viewer.mode, upright=viewer.upright)))

    def open_file(request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(files):
            raise Refused("There is no such file on the list; reload the page.", 404)
        try:
            content = files[number].read_bytes() if files[number].stat().st_size <= MAX_BYTES else bytes(MAX_BYTES + 1)
        except OSError as error:
            raise Refused(f"The file cannot be read: {error.strerror}.") from error
        return opened(read_upload(content, viewer.mode, upright=viewer.upright))

    def seen(request: Request) -> Response:
        with turn:
            content = viewer.seen(shelf.get(request.path_params["number"]))
        return Response(content, media_type="image/png", headers=headers)

    def view(request: Request) -> Response:
        method = request.path_params["method"]
        if method not in viewer.methods:
            raise Refused(f"There is no view {method!r}; there are {', '.join(viewer.methods)}.", 404)
        place = _place(request.query_params)
        with turn:
            picture = shelf.get(request.path_params["number"])
            try:
                content, words = viewer.draw(picture, method, place)
            except (ValueError, ModuleNotFoundError) as error:
                raise Refused(str(error)) from error
        shown = {**headers, "X-Words": words.encode("ascii", "replace").decode()}
        return Response(content, media_type="image/png", headers=shown)

    def static(name: str, kind: str) -> Any:
        content = Path(__file__).with_name(name).read_bytes()

        async def send(_request: Request) -> Response:
            return Response(content, media_type=kind, headers=headers)

        return send

    def refused(_request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return refusal(error.text, error.status)

    def failed(_request: Request, _error: Exception) -> Response:  # uvicorn prints the error
        return refusal("The model stopped with an error; the terminal that started the page shows it.", 500)

    return Starlette(
        routes=[
            Route("/", static("page.html", "text/html")),
            Route("/page.css", static("page.css", "text/css")),
            Route("/page.js", static("page.js", "text/javascript")),
            Route("/about", about),
            Route("/pictures", upload, methods=["POST"]),
            Route("/files/{number:int}", open_file, methods=["POST"]),
            Route("/pictures/{number:int}", seen),
            Route("/pictures/{number:int}/{method}", view),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)), Middleware(for_own_pages)],
        exception_handlers={Refused: refused, Exception: failed},
    )


def serve(viewer: Viewer, files: Sequence[Path], host: str, port: int) -> None:
    """Serve the page until it is stopped (Ctrl-C), and print its address.

    Raises:
        UserError: if uvicorn is not installed, or the address cannot be listened on.
    """
    uvicorn = require("uvicorn", "view")
    app = make_app(viewer, files, hosts=LOOPBACK if host in LOOPBACK else ("*",))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; another --port may do, 0 takes any that "
            "is free"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    print(f"look at http://{shown}:{listener.getsockname()[1]}, stop with Ctrl-C", flush=True)
    if host not in LOOPBACK:
        print(f"--host {host}: whoever reaches this machine can use the page; it asks for no password", flush=True)
    with listener:
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def _from_elsewhere(method: str, headers: Mapping[str, str]) -> bool:
    """Whether a browser says that a page of another origin makes a request, and does not just lead here."""
    if site := headers.get("sec-fetch-site"):
        leads = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        return site not in ("same-origin", "none") and not leads
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")


def _place(query: Mapping[str, str]) -> tuple[float, float] | None:
    if "y" not in query and "x" not in query:
        return None
    try:
        y, x = float(query["y"]), float(query["x"])
    except (KeyError, ValueError):
        y = x = -1.0
    if not (0 <= y <= 1 and 0 <= x <= 1):
        raise Refused("A place is y and x, each from 0 to 1; click into the picture.")
    return y, x
