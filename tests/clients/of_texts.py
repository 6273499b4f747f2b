"""Asks models that only read texts through PyPI's clients, and prints what came back:
`of_texts.py CLIENT EMBEDDER RERANKER`.

Each function returns the client's version and vectors of `TEXTS`, or the texts' order by relevance to `QUERY`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

QUERY = "the quick fox"
TEXTS = ["the lazy dog", "one two three four", "quick quick fox"]
KEY = "-"


def hub(embedder: str, reranker: str) -> dict[str, Any]:
    from huggingface_hub import InferenceClient

    client = InferenceClient(embedder)
    return {
        "version": version("huggingface_hub"),
        "vectors": [client.feature_extraction(text)[0].tolist() for text in TEXTS],
        "cosines": client.sentence_similarity(QUERY, TEXTS),
    }


def langchain(embedder: str, reranker: str) -> dict[str, Any]:
    from huggingface_hub import InferenceClient
    from langchain_huggingface import HuggingFaceEndpointEmbeddings

    client = HuggingFaceEndpointEmbeddings(model="m")
    client.client = InferenceClient(embedder)  # this version takes no address itself
    return {
        "version": version("langchain-huggingface"),
        "vectors": client.embed_documents(TEXTS),
        "one": client.embed_query(TEXTS[0]),
    }


def llamaindex(embedder: str, reranker: str) -> dict[str, Any]:
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    client = TextEmbeddingsInference(model_name="m", base_url=embedder, embed_batch_size=2)
    ranker = TextEmbeddingInference(base_url=reranker, top_n=2)
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in TEXTS]
    ranked = ranker.postprocess_nodes(nodes, query_str=QUERY)
    names = ("llama-index-embeddings-text-embeddings-inference", "llama-index-postprocessor-tei-rerank")
    return {
        "version": ", ".join(map(version, names)),
        "vectors": client.get_text_embedding_batch(TEXTS),
        "one": client.get_text_embedding(TEXTS[0]),
        "ranked": [TEXTS.index(one.node.get_content()) for one in ranked],
        "scores": [one.score for one in ranked],
    }


def cohere(embedder: str, reranker: str) -> dict[str, Any]:
    import cohere as client  # type: ignore[import-not-found]

    asked: dict[str, Any] = {"model": "m", "query": QUERY, "documents": TEXTS, "top_n": 2}
    newer = client.ClientV2(api_key=KEY, base_url=reranker).rerank(**asked).results
    older = client.Client(api_key=KEY, base_url=reranker).rerank(**asked).results
    assert [one.index for one in newer] == [one.index for one in older]
    return {
        "version": version("cohere"),
        "ranked": [one.index for one in newer],
        "scores": [one.relevance_score for one in newer],
    }


def jina(embedder: str, reranker: str) -> dict[str, Any]:
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    ranker = JinaRerank(base_url=f"{reranker}/v1", api_key=KEY, model="m", top_n=2)
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in TEXTS]
    ranked = ranker.postprocess_nodes(nodes, query_str=QUERY)
    return {
        "version": version("llama-index-postprocessor-jinaai-rerank"),
        "ranked": [TEXTS.index(one.node.get_content()) for one in ranked],
        "scores": [one.score for one in ranked],
    }


CLIENTS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "huggingface_hub": hub,
    "langchain": langchain,
    "llamaindex": llamaindex,
    "cohere": cohere,
    "jina": jina,
}

if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]](f"http://{sys.argv[2]}", f"http://{sys.argv[3]}")))
