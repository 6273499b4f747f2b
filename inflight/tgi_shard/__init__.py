"""Serves one rank of a language model to TGI's router: `generate.v3` on a unix socket."""

from inflight.tgi_shard.batches import Batches
from inflight.tgi_shard.images import ChunkReader
from inflight.tgi_shard.service import RankServer, serve_rank

__all__ = ["Batches", "ChunkReader", "RankServer", "serve_rank"]
