"""A network that loses: a proxy between clients and a server, both on unix sockets.

A share of the requests meets one of these faults, which a generator with a seed chooses for each
connection and request:

    reply     the server runs the request, but its reply is lost: the connection is cut instead
    doubled   a copy of the request arrives up to COPY_AFTER seconds later, by another connection;
              the replies to the copy are lost
    half      the first part of the request arrives, then the connection is cut
    hung      nothing passes in either direction for up to HANG seconds; then the request arrives,
              even if the client has gone, and in half of the cases the connection is cut

A request is what a client sends at once: a command, or a pipeline.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import threading
from collections import Counter

FAULTS = ["reply", "doubled", "half", "hung"]
COPY_AFTER = 0.2  # seconds
HANG = 0.5  # seconds
BUFFER = 1 << 20  # bytes


def is_complete(data):
    """Return whether `data` consists of whole commands, as clients send them (RESP arrays)."""
    at, left = 0, 0  # `left` bulk strings of the command still follow
    while at < len(data):
        header = re.compile(rb"\$(\d+)\r\n" if left else rb"\*(\d+)\r\n").match(
            data, at
        )
        if header is None:
            return False
        number = int(header[1])
        at = header.end() + (number + 2 if left else 0)
        left = left - 1 if left else number
    return at == len(data) and not left


class Connection:
    """A client's connection, and the one to the server that belongs to it."""

    def __init__(self, proxy, generator, reader, writer):
        self.proxy, self.generator = proxy, generator
        self.reader, self.writer = reader, writer
        self.lose_reply = False
        self.passing = asyncio.Event()
        self.passing.set()

    async def run(self):
        """Pass on requests and replies until one side closes, or a fault cuts the connection."""
        try:
            replies, self.requests = await asyncio.open_unix_connection(
                self.proxy.target
            )
        except OSError:
            self.writer.close()
            return
        carrier = asyncio.create_task(self.carry_replies(replies))
        with contextlib.suppress(OSError):
            while (data := await self.reader.read(BUFFER)) and await self.pass_on(data):
                await self.requests.drain()
        if (
            self.lose_reply
        ):  # the server closes, or answers, when it has run the request
            await asyncio.wait([carrier], timeout=5)
        carrier.cancel()
        self.requests.close()
        self.writer.close()

    async def carry_replies(self, replies):
        with contextlib.suppress(OSError):
            while data := await replies.read(BUFFER):
                await self.passing.wait()
                if self.lose_reply:
                    break
                self.writer.write(data)
                await self.writer.drain()
        self.writer.close()

    async def pass_on(self, data):
        """Send a request to the server, or what a fault leaves of it.  Return whether the
        connection goes on."""
        fault = None
        if self.generator.random() < self.proxy.share:
            fault = self.generator.choice(FAULTS)
            self.proxy.counts[fault] += 1
        if fault == "half":
            self.requests.write(data[: self.generator.randrange(len(data))])
            await self.requests.drain()
            return False
        if fault == "hung":
            self.passing.clear()
            await asyncio.sleep(self.generator.uniform(0, HANG))
            self.passing.set()
        if fault == "doubled" and is_complete(data):
            copy = self.send_copy(data, self.generator.uniform(0, COPY_AFTER))
            self.proxy.tasks.add(asyncio.create_task(copy))
        self.lose_reply = fault == "reply"
        self.requests.write(data)
        return not self.lose_reply and (
            fault != "hung" or self.generator.random() < 0.5
        )

    async def send_copy(self, data, seconds):
        await asyncio.sleep(seconds)
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            replies, requests = await asyncio.open_unix_connection(self.proxy.target)
            requests.write(data)
            await asyncio.wait_for(replies.read(), 1)  # as it does not end, so long
        requests.close()


class Proxy(threading.Thread):
    """Listens at the socket `path` for clients of the server at `target`."""

    def __init__(self, path, target, seed):
        super().__init__(daemon=True)
        self.path, self.target, self.seed = path, target, seed
        self.share = 0.0  # of the requests that meet a fault
        self.counts = Counter()  # of faults
        self.tasks = set()  # asyncio keeps weak references only
        self.listening = threading.Event()

    def run(self):
        asyncio.run(self.serve())

    async def serve(self):
        numbers = itertools.count()

        async def accept(reader, writer):
            generator = random.Random(f"{self.seed} {next(numbers)}")
            await Connection(self, generator, reader, writer).run()

        server = await asyncio.start_unix_server(accept, self.path, limit=BUFFER)
        self.listening.set()
        await server.serve_forever()
