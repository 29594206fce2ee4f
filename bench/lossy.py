"""What does a queue do on a network that loses data? A proxy between clients and a
server.

Both sides are unix sockets. A share of the requests gets one of these faults. A
generator with a seed chooses the fault for each connection and request.

    reply     the server runs the request, but its reply is lost: the connection is cut
    doubled   a copy of the request arrives up to COPY_AFTER seconds later over another
              connection; the replies to the copy are lost
    half      the first part of the request arrives, then the connection is cut
    hung      nothing passes in either direction for up to HANG seconds; then the
              request arrives, even if the client is gone, and in half of the cases the
              connection is cut

A request is the data of one read from the client: a command, or a pipeline.
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
ARRAY = re.compile(rb"\*(\d+)\r\n")
BULK_STRING = re.compile(rb"\$(\d+)\r\n")


def is_complete(data):
    """Return whether `data` consists of whole commands (RESP arrays)."""
    position = 0
    strings_left = 0  # bulk strings of the command that still follow
    while position < len(data):
        pattern = BULK_STRING if strings_left else ARRAY
        header = pattern.match(data, position)
        if header is None:
            return False
        number = int(header[1])
        position = header.end()
        if strings_left:
            position += number + 2  # the string and its line end
            strings_left -= 1
        else:
            strings_left = number
    return position == len(data) and strings_left == 0


class Connection:
    """A connection of a client, and the connection to the server that belongs to it."""

    def __init__(self, proxy, generator, reader, writer):
        self.proxy = proxy
        self.generator = generator
        self.reader = reader
        self.writer = writer
        self.lose_reply = False
        self.passing = asyncio.Event()
        self.passing.set()

    async def run(self):
        """Pass on requests and replies until a side closes, or a fault cuts."""
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
        if self.lose_reply:
            # The server answers, or closes the connection, when it has run the request.
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
        """Send a request to the server, with a fault or without.

        Return False if the connection must be cut.
        """
        fault = self.choose_fault()
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
        if fault == "hung":
            return self.generator.random() < 0.5
        return not self.lose_reply

    def choose_fault(self):
        """Return a fault for one share of the requests, None for the others."""
        if self.generator.random() >= self.proxy.share:
            return None
        fault = self.generator.choice(FAULTS)
        self.proxy.counts[fault] += 1
        return fault

    async def send_copy(self, data, seconds):
        await asyncio.sleep(seconds)
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            replies, requests = await asyncio.open_unix_connection(self.proxy.target)
            requests.write(data)
            # The server does not close the connection, so read for a second.
            await asyncio.wait_for(replies.read(), 1)
        requests.close()


class Proxy(threading.Thread):
    """Listens at the socket `path` for clients of the server at `target`."""

    def __init__(self, path, target, seed):
        super().__init__(daemon=True)
        self.path = path
        self.target = target
        self.seed = seed
        self.share = 0.0  # of the requests that get a fault
        self.counts = Counter()  # faults by name
        self.tasks = set()  # asyncio itself keeps weak references only
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
