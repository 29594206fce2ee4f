"""What does a slow network cost? A proxy that delays requests, between two unix
sockets.

    proxy.py LISTEN TARGET SECONDS

Each piece that a client sends is passed on SECONDS later, and up to 1 ms after that,
since the clock of asyncio has no finer grain. Replies are passed on at once. So a round
trip takes SECONDS more, and so does a whole pipeline.
"""

from __future__ import annotations

import asyncio
import sys


async def carry(reader, writer, seconds):
    loop = asyncio.get_running_loop()
    while data := await reader.read(1 << 16):
        if seconds:
            loop.call_later(seconds, writer.write, data)
        else:
            writer.write(data)
    writer.close()


async def main(listen, target, seconds):
    async def accept(reader, writer):
        replies, requests = await asyncio.open_unix_connection(target)
        await asyncio.gather(
            carry(reader, requests, float(seconds)),
            carry(replies, writer, 0),
            return_exceptions=True,
        )

    server = await asyncio.start_unix_server(accept, listen)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
