"""256 clients of the scoring endpoint, in a process of their own: `many_clients.py PORT SECONDS`."""

import asyncio
import json
import sys
import time
from collections import Counter

TOKEN = "only-for-this-test"
CLIENTS = 256


async def client(port: int, body: bytes, deadline: float, statuses: Counter[bytes]) -> None:
    """Asks again and again on one connection, at once after an answer, a second after a refusal."""
    head = (
        f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n\r\n"
    ).encode()
    reader = writer = None
    while time.time() < deadline:
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + body)
            given = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
            fields = dict(line.lower().split(b": ", 1) for line in given.split(b"\r\n")[1:-2])
            await asyncio.wait_for(reader.readexactly(int(fields[b"content-length"])), 60)
            statuses[given[9:12]] += 1
            await asyncio.sleep(float(fields.get(b"retry-after", b"0")))
        except (OSError, EOFError, TimeoutError) as error:
            statuses[type(error).__name__.encode()] += 1
            reader = writer = None
            await asyncio.sleep(0.5)


async def crowd(port: int, seconds: float) -> None:
    """256 clients: most ask for little, eight for as much as a body may hold."""
    small = json.dumps(
        {"prompt": "say cat: ", "responses": ["the cat sat on the mat and the dog lay"] * 32}
    ).encode()
    large = json.dumps({"prompt": "say cat: " * 50_000, "responses": ["sea shells " * 200] * 200}).encode()
    statuses: Counter[bytes] = Counter()
    print("asking", flush=True)
    deadline = time.time() + seconds
    bodies = [large if i < 8 else small for i in range(CLIENTS)]
    await asyncio.gather(*(client(port, body, deadline, statuses) for body in bodies))
    print(json.dumps({status.decode(): number for status, number in statuses.items()}))


if __name__ == "__main__":
    asyncio.run(crowd(int(sys.argv[1]), float(sys.argv[2])))
