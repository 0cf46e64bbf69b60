"""One agent that uploads every blob of a directory, with the agent's own client: started by bench.checkpoint.

Says "ready" when it is connected, begins at a line on standard input, says "done" at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from agent.blobs import UPLOADS_AT_ONCE, BlobCache, BlobClient
from protos import agent_pb2, agent_pb2_grpc, wire


async def run(identity: wire.Identity, root: Path, digests: list[str]) -> None:
    async with wire.aio_channel(identity) as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        await stub.FindBlobs(agent_pb2.FindBlobsRequest(digests=digests), timeout=30)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        client = BlobClient(lambda: stub, BlobCache(root))
        slots = asyncio.Semaphore(UPLOADS_AT_ONCE)

        async def upload(digest: str) -> None:
            async with slots:
                await client.upload(digest)

        await asyncio.gather(*(upload(digest) for digest in digests))
        print("done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--identity", type=Path, required=True)
    parser.add_argument("--blobs", type=Path, required=True)
    args = parser.parse_args()
    digests = sorted(path.name for path in args.blobs.iterdir())
    asyncio.run(run(wire.Identity.load(args.identity), args.blobs, digests))


if __name__ == "__main__":
    main()
