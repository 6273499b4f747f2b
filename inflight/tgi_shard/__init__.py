"""One rank of a language model as a server of its own: `generate.v3` on a unix socket, for routers like TGI's."""

from inflight.tgi_shard.batches import Batches
from inflight.tgi_shard.service import RankServer, serve_rank

__all__ = ["Batches", "RankServer", "serve_rank"]
