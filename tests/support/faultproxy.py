"""An HTTP proxy in front of an S3 server that fails on command: connections reset, requests hung, answers lost.

Requests are passed on byte by byte, so that signatures stay valid; nothing but the name of the port in front differs.
What fails is said by rules::

    with FaultProxy(server.endpoint) as proxy:
        rule = proxy.add(Rule(lose_answer, method="PUT", path=r"/masks/", first=3))
        ...
        assert rule.reached(1, seconds=30)

A fault is one function that takes an ``Exchange``.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

T = TypeVar("T")

_ANSWER_S = 30.0  # for what the proxy's own thread is asked to do
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset
_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as it came.

    Attributes:
        path: with its query, percent-encoding taken back.
        raw: all its bytes.
        port: that the client connected from, which tells its process.
    """

    method: str
    path: str
    raw: bytes
    port: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer of the server; ``body`` is as it travelled, chunked or not."""

    head: bytes
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A request and the ways to deal with it."""

    request: Request
    rule: Rule
    forward: Callable[[], Awaitable[Answer]]
    reply: Callable[[bytes], Awaitable[None]]


Fault = Callable[[Exchange], Coroutine[Any, Any, None]]


async def reset(exchange: Exchange) -> None:
    """The connection ends before the server hears of the request."""
    raise ConnectionResetError


def refusal(status: int, code: str) -> Fault:
    """The storage's own words for why not."""

    async def refuse(exchange: Exchange) -> None:
        body = f"<Error><Code>{code}</Code><Message>Said so.</Message></Error>"
        head = f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        await exchange.reply((head + body).encode())

    return refuse


async def slow_down(exchange: Exchange) -> None:
    """503 SlowDown, in the proxy's own words."""
    head = f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(_SLOW_DOWN)}\r\n\r\n"
    await exchange.reply(head.encode() + (b"" if exchange.request.method == "HEAD" else _SLOW_DOWN))


def answer(status: int, body: bytes = b"") -> Fault:
    """Another answer than the server's, which does not hear of the request."""

    async def fault(exchange: Exchange) -> None:
        await exchange.reply(b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body)

    return fault


forbid = answer(403)
"""403, without a word."""


async def truncate(exchange: Exchange) -> None:
    """Half of the answer's body, then the end of the connection."""
    answer = await exchange.forward()
    await exchange.reply(answer.head + answer.body[: len(answer.body) // 2])
    raise EOFError


async def lose_answer(exchange: Exchange) -> None:
    """The server does as it is asked, and nobody hears of it."""
    await exchange.forward()
    raise ConnectionResetError


async def hang(exchange: Exchange) -> None:
    """Nothing, until the rule lets go. Then the request goes its way, late, even if its sender is gone."""
    await exchange.rule.let_go
    answer = await exchange.forward()
    await exchange.reply(answer.head + answer.body)


class Rule:
    """Which requests fail, and how.

    Args:
        fault: what happens to them.
        method, path: regular expressions; ``path`` is searched for in the request's path and query.
        first: number of the first matching request that fails, from 1; those before it pass.
        times: how many fail, at most.
        share: of those after the first failure, which part fails too.
        seed: draws that part.
        seconds: how long they fail, from the first failure on.
        clock: seconds that go by; for tests.

    Attributes:
        hits: the requests that failed so far.
    """

    def __init__(
        self,
        fault: Fault,
        *,
        method: str = "",
        path: str = "",
        first: int = 1,
        times: float = math.inf,
        share: float = 1.0,
        seed: int = 0,
        seconds: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.fault, self.share, self.times, self.seconds, self.clock = fault, share, times, seconds, clock
        self.hits: list[Request] = []
        self._method, self._path = re.compile(method or ".*"), re.compile(path)
        self._to_pass = first - 1
        self._end = math.inf
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        self._let_go: Future[None] = Future()

    @property
    def let_go(self) -> Awaitable[None]:
        """Done when the rule lets go of what it holds."""
        return asyncio.shield(asyncio.wrap_future(self._let_go))

    def takes(self, request: Request) -> bool:
        """Whether this request fails; to be asked once for each."""
        if not (self._method.fullmatch(request.method) and self._path.search(request.path)):
            return False
        with self._changed:
            if self._to_pass:
                self._to_pass -= 1
                return False
            if len(self.hits) >= self.times or self.clock() >= self._end:
                return False
            if self.hits and self._random.random() >= self.share:
                return False
            if not self.hits:
                self._end = self.clock() + self.seconds
            self.hits.append(request)
            self._changed.notify_all()
            return True

    def reached(self, hits: int, *, seconds: float) -> bool:
        """Wait until so many requests have failed; False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.hits) >= hits, seconds)

    def release(self) -> None:
        """Let what hangs go on, for good."""
        with self._changed:
            if not self._let_go.done():
                self._let_go.set_result(None)


class FaultProxy(contextlib.AbstractContextManager["FaultProxy"]):
    """A running proxy; what it does besides passing requests on is said by its rules, of which the first counts.

    Attributes:
        endpoint: ``http://127.0.0.1:PORT``, the same while the proxy lives.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        assert parts.hostname and parts.port
        self._target = (parts.hostname, parts.port)
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faultproxy")

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._server = self._do(self._listen(0))
        self._port: int = self._server.sockets[0].getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self._port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._shut())
        self._do(self._end_tasks())
        self.clear()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def add(self, rule: Rule) -> Rule:
        """Let a rule hold from now on."""
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """No rule holds any more; what hangs goes on."""
        with self._lock:
            rules, self._rules = self._rules, []
        for rule in rules:
            rule.release()

    @contextlib.contextmanager
    def unreachable(self) -> Iterator[None]:
        """Nobody listens, and what was connected is cut off."""
        self._do(self._shut())
        try:
            yield
        finally:
            self._server = self._do(self._listen(self._port))

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_ANSWER_S)

    async def _listen(self, port: int) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", port)

    async def _shut(self) -> None:
        self._server.close()
        for writer in list(self._open):
            _cut_off(writer)

    async def _end_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while (request := await _read_request(reader, writer)) is not None:
                await self._answer(request, writer)
        except OSError:
            _cut_off(writer)
        except EOFError:
            pass  # of the client, in the middle of a request, or on purpose
        finally:
            self._open.discard(writer)
            await _close(writer)

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        async def forward() -> Answer:
            return await self._forward(request)

        async def reply(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        with self._lock:
            rule = next((rule for rule in self._rules if rule.takes(request)), None)
        if rule is None:
            answer = await forward()
            await reply(answer.head + answer.body)
        else:
            await rule.fault(Exchange(request=request, rule=rule, forward=forward, reply=reply))

    async def _forward(self, request: Request) -> Answer:
        # A connection for each request: slower than to keep one, but no answer can be another one's.
        reader, writer = await asyncio.open_connection(*self._target)
        try:
            writer.write(request.raw)
            await writer.drain()
            return await _read_answer(reader, request.method)
        finally:
            await _close(writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):  # of the other end
        await writer.wait_closed()


def _cut_off(writer: asyncio.StreamWriter) -> None:
    if not writer.is_closing():
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    writer.transport.abort()


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    """The next request on a connection; None when there is no more."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    headers = _headers(head)
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    method, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    return Request(
        method=method,
        path=unquote(path),
        raw=head + await _read_body(reader, headers),
        port=writer.get_extra_info("peername")[1],
    )


async def _read_answer(reader: asyncio.StreamReader, method: str) -> Answer:
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if status >= 200:  # those below announce the answer; the client has been told to go on already
            break
    if method == "HEAD" or status in (204, 304):
        return Answer(head=head, body=b"")
    return Answer(head=head, body=await _read_body(reader, _headers(head)))


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return b"".join([part async for part in _chunks(reader)])
    return await reader.readexactly(int(headers.get("content-length", 0)))


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """A chunked body in parts, as it travels."""
    while True:
        line = await reader.readuntil(b"\r\n")
        yield line
        size = int(line.partition(b";")[0], 16)
        if not size:
            break
        yield await reader.readexactly(size + 2)
    while line != b"\r\n":  # trailing headers, then an empty line
        line = await reader.readuntil(b"\r\n")
        yield line


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
