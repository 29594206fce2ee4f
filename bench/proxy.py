"""A network that is slow: proxy.py LISTEN TARGET SECONDS, two unix sockets.

What a client sends is passed on as it came, each piece SECONDS later (and up to 1 ms more, the
grain of asyncio's clock); what the server answers is passed on at once.  So a round trip takes that
much longer, and a pipeline does just once.
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
        answers, requests = await asyncio.open_unix_connection(target)
        ways = carry(reader, requests, float(seconds)), carry(answers, writer, 0)
        await asyncio.gather(*ways, return_exceptions=True)

    server = await asyncio.start_unix_server(accept, listen)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
