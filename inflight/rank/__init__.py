"""One rank of a language model as a server of its own: `generate.v3` on a unix socket, for routers like TGI's."""

from inflight.rank.batches import Batches
from inflight.rank.service import RankServer, serve_rank

__all__ = ["Batches", "RankServer", "serve_rank"]
