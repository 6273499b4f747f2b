"""Reranking, scores and classes, as the clients of Cohere, Jina and vLLM call them."""

from inflight.frontends.ranking.app import RankingRest
from inflight.frontends.ranking.rerank import RerankBody, RerankedAnswer, reranked

__all__ = ["RankingRest", "RerankBody", "RerankedAnswer", "reranked"]
