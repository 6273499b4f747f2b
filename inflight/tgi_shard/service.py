"""The gRPC service `generate.v3.TextGenerationService` of one rank."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from inflight.contract import FinishReason, Grammar, MediaRows, Sampling
from inflight.errors import InflightError, InvalidRequest, StartError
from inflight.proto import generate_pb2 as pb
from inflight.shard import ModelRunner
from inflight.text import Tokenizer
from inflight.tgi_shard.batches import Asked, Batches, Generated, Outcome, Row
from inflight.tgi_shard.images import ChunkReader

log = logging.getLogger("inflight")

SERVICE = "generate.v3.TextGenerationService"
UNLIMITED = -1
CUT_SECONDS = 5.0
"""Seconds that calls have to end once they are cut."""
_REASONS = {
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.EOS: pb.FINISH_REASON_EOS_TOKEN,
    FinishReason.STOP: pb.FINISH_REASON_STOP_SEQUENCE,
}
_STATUS = {code.value[0]: code for code in grpc.StatusCode}


class Service:
    """The eight procedures. Those that touch the model run one after the other; Health and Info never wait for them.

    Args:
        urls: sockets of all ranks.
        adapters: names of the LoRA adapters, in the order of their numbers.
        images: reads images; None: the model, or this build of it, reads text only.
        sees: the checkpoint has a vision part, so that images without `images` are refused. A text model's router sends
            an image with its warm-up only, and TGI's text models drop such chunks.
        guesses: next tokens that a row guesses in a step at most.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        rank: int,
        urls: Sequence[str],
        adapters: Sequence[str] = (),
        images: ChunkReader | None = None,
        sees: bool = False,
        guesses: int = 0,
    ) -> None:
        self._images = images
        self._sees = sees
        self._runner = runner
        self._tokenizer = tokenizer
        self._rank = rank
        self._urls = list(urls)
        self._adapters = list(adapters)
        self._batches = Batches(runner, tokenizer, guesses)
        self._lock = threading.Lock()

    def handler(self) -> Any:
        """The procedures as grpcio takes them."""
        offered: dict[str, tuple[Any, Callable[[Any], Message]]] = {
            "Info": (pb.InfoRequest, self._info),
            "ServiceDiscovery": (pb.ServiceDiscoveryRequest, self._discover),
            "ClearCache": (pb.ClearCacheRequest, self._clear),
            "FilterBatch": (pb.FilterBatchRequest, self._filter),
            "Warmup": (pb.WarmupRequest, self._warmup),
            "Prefill": (pb.PrefillRequest, self._prefill),
            "Decode": (pb.DecodeRequest, self._decode),
            "Health": (pb.HealthRequest, lambda request: pb.HealthResponse()),
        }
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                name: grpc.unary_unary_rpc_method_handler(
                    self._guarded(name, work),
                    request_deserializer=form.FromString,
                    response_serializer=lambda reply: reply.SerializeToString(),
                )
                for name, (form, work) in offered.items()
            },
        )

    def _guarded(self, name: str, work: Callable[[Any], Message]) -> Callable[[Any, Any], Message]:
        """Errors become statuses, whose texts routers show to their users."""
        alone = name not in ("Info", "Health", "ServiceDiscovery")

        def handle(request: Any, context: Any) -> Message:
            try:
                if not alone:
                    return work(request)
                with self._lock:
                    return work(request)
            except InflightError as error:
                context.abort(_STATUS[error.grpc_code], str(error))
            except Exception as error:  # reported to the router, which goes on with other batches
                log.exception("%s failed on rank %d", name, self._rank)
                context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
            raise AssertionError("abort raises")

        return handle

    # Procedures

    def _info(self, request: pb.InfoRequest) -> pb.InfoResponse:
        offer = self._runner.offer
        return pb.InfoResponse(
            requires_padding=False,
            dtype=f"torch.{offer.model.dtype}",
            device_type=offer.device_type,
            speculate=self._batches.guesses,
            support_chunking=False,
            # Keys that depend on the length of a sequence cannot be shared by sequences with the same beginning. And
            # the router's own cache knows tokens only, which are the same for all images, and no recurrent states.
            use_prefix_caching=not (
                offer.model.switch or offer.model.stretched or offer.states.slots or self._images is not None
            ),
            attention_impl="inflight",
            block_size=offer.cache.block_size,
        )

    def _discover(self, request: pb.ServiceDiscoveryRequest) -> pb.ServiceDiscoveryResponse:
        return pb.ServiceDiscoveryResponse(urls=self._urls)

    def _clear(self, request: pb.ClearCacheRequest) -> pb.ClearCacheResponse:
        self._batches.drop(request.id if request.HasField("id") else None)
        return pb.ClearCacheResponse()

    def _filter(self, request: pb.FilterBatchRequest) -> pb.FilterBatchResponse:
        rows = self._batches.filter(request.batch_id, list(request.request_ids))
        return pb.FilterBatchResponse(batch=self._cached(request.batch_id, rows))

    def _warmup(self, request: pb.WarmupRequest) -> pb.WarmupResponse:
        """Reports the limits only: the rank warmed up when it was loaded."""
        offer = self._runner.offer
        room = offer.cache.num_blocks * offer.cache.block_size
        # The router keeps block 0 for itself.
        most = min(offer.max_model_len, room - offer.cache.block_size)
        total = request.max_total_tokens if request.HasField("max_total_tokens") else most
        if total > offer.max_model_len or total > room:
            raise InvalidRequest(
                f"max_total_tokens {total} is more than the model's {offer.max_model_len} or the cache's {room}"
            )
        inputs = request.max_input_tokens if request.HasField("max_input_tokens") else total - 1
        if not request.HasField("max_input_tokens") and request.max_prefill_tokens:
            inputs = min(inputs, request.max_prefill_tokens)
        return pb.WarmupResponse(max_supported_total_tokens=room, max_input_tokens=inputs, max_total_tokens=total)

    def _prefill(self, request: pb.PrefillRequest) -> pb.PrefillResponse:
        began = time.perf_counter_ns()
        if request.HasField("cached_batch"):
            raise InvalidRequest("prefill with a cached batch is for shards that compute prompts in chunks")
        asked = [self._asked(one) for one in request.batch.requests]
        outcome = self._batches.prefill(request.batch.id, asked)
        reply = pb.PrefillResponse(generations=self._generations(outcome))
        self._finish(reply, request.batch.id, outcome, began)
        return reply

    def _decode(self, request: pb.DecodeRequest) -> pb.DecodeResponse:
        began = time.perf_counter_ns()
        if not request.batches:
            raise InvalidRequest("Must provide at least one batch")
        ids = [batch.id for batch in request.batches]
        outcome = self._batches.decode(ids)
        reply = pb.DecodeResponse(generations=self._generations(outcome))
        if len(ids) > 1:
            reply.concat_ns = 0  # nothing is moved
        self._finish(reply, ids[0], outcome, began)
        return reply

    # Messages

    def _asked(self, request: pb.Request) -> Asked:
        tokens, media = self._prompt(request)
        given, stopping = request.parameters, request.stopping_parameters
        sampling = Sampling(
            do_sample=given.do_sample,
            temperature=given.temperature or 1.0,
            top_k=given.top_k,
            top_p=given.top_p or 1.0,
            typical_p=given.typical_p or 1.0,
            repetition_penalty=given.repetition_penalty or 1.0,
            frequency_penalty=given.frequency_penalty,
            seed=given.seed,
            logprobs=True,
            top_n_tokens=request.top_n_tokens,
            prompt_logprobs=request.prefill_logprobs,
            watermark=given.watermark,
        )
        grammar = None
        if given.grammar_type != pb.GRAMMAR_TYPE_NONE:
            grammar = Grammar("json" if given.grammar_type == pb.GRAMMAR_TYPE_JSON else "regex", given.grammar)
        return Asked(
            request.id,
            tokens,
            list(request.blocks),
            request.cache_len,
            sampling,
            max(1, stopping.max_new_tokens),
            tuple(stopping.stop_sequences),
            stopping.ignore_eos_token,
            grammar,
            self._adapter(request.adapter_id),
            media,
        )

    def _prompt(self, request: pb.Request) -> tuple[list[int], Sequence[MediaRows]]:
        """The request's tokens, and what stands in the places of its images.

        Raises:
            InvalidRequest: it has images that this model does not read.
        """
        text, chunks = request.inputs, request.input_chunks.chunks
        if any(chunk.HasField("image") for chunk in chunks):
            if self._images is not None:
                return self._images.read(request)
            if self._sees:
                raise InvalidRequest("this shard reads the model's text only; its log says why")
        text = "".join(chunk.text for chunk in chunks if chunk.HasField("text")) or text
        tokens = self._tokenizer.encode(text, request.add_special_tokens)
        return tokens[-request.truncate :] if request.truncate else tokens, ()

    def _adapter(self, name: str) -> int:
        """The adapter's number. As with TGI's own shards, an unknown name stands for the base model (0)."""
        return self._adapters.index(name) + 1 if name in self._adapters else 0

    def _cached(self, id: int, rows: Sequence[Row]) -> pb.CachedBatch:
        size = self._runner.offer.cache.block_size
        return pb.CachedBatch(
            id=id,
            request_ids=[row.asked.id for row in rows],
            size=len(rows),
            max_tokens=sum(len(row.asked.blocks) for row in rows) * size,
            current_tokens=len(rows),
        )

    def _finish(self, reply: Any, id: int, outcome: Outcome, began: int) -> None:
        if outcome.rows:
            reply.batch.CopyFrom(self._cached(id, outcome.rows))
        reply.forward_ns = int(outcome.forward_seconds * 1e9)
        reply.total_ns = time.perf_counter_ns() - began
        reply.decode_ns = max(0, reply.total_ns - reply.forward_ns)

    def _generations(self, outcome: Outcome) -> list[pb.Generation]:
        """The tokens of all rows on rank 0, which samples; other ranks report none, and routers join the replies."""
        return [self._generation(generated) for generated in outcome.generated] if self._rank == 0 else []

    def _generation(self, several: Sequence[Generated]) -> pb.Generation:
        """What one step has made of a row: a token, and those behind right guesses."""
        one = several[-1]
        asked = one.row.asked
        made = pb.Generation(request_id=asked.id)
        made.tokens.CopyFrom(
            pb.Tokens(
                ids=[each.token for each in several],
                logprobs=[_number(each.logprob) for each in several],
                texts=[each.text for each in several],
                is_special=[each.special for each in several],
            )
        )
        if one.prompt_logprobs is not None:
            made.prefill_tokens.CopyFrom(self._named(asked.tokens, [math.nan, *one.prompt_logprobs]))
        for each in several if asked.sampling.top_n_tokens else ():
            made.top_tokens.append(self._named([token for token, _ in each.top], [value for _, value in each.top]))
        if one.reason is not None:
            made.generated_text.text = one.whole or ""
            made.generated_text.generated_tokens = one.row.generated
            made.generated_text.finish_reason = _REASONS[one.reason]
            if asked.sampling.do_sample:
                made.generated_text.seed = asked.sampling.seed
        return made

    def _named(self, ids: Sequence[int], logprobs: Sequence[float]) -> pb.Tokens:
        return pb.Tokens(
            ids=ids,
            logprobs=logprobs,
            texts=[self._tokenizer.token_text(id) for id in ids],
            is_special=[self._tokenizer.is_special(id) for id in ids],
        )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class RankServer:
    """Serves a `Service` on a unix socket until `stop`.

    Attributes:
        path: path of the socket; the file exists once the rank can be called.
    """

    def __init__(self, service: Service, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)  # may be left by a rank that was killed
        self._server = grpc.server(
            ThreadPoolExecutor(4, "rank"),
            options=[
                ("grpc.max_receive_message_length", UNLIMITED),
                ("grpc.max_send_message_length", UNLIMITED),
                ("grpc.so_reuseport", 0),
            ],
        )
        self._server.add_generic_rpc_handlers((service.handler(),))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._server.add_insecure_port(f"unix:{path}")
        except (OSError, RuntimeError) as error:  # RuntimeError: grpcio cannot bind
            raise StartError(f"cannot listen on unix:{path}: {error}") from error
        self._server.start()

    def stop(self, grace: float) -> None:
        """Ends calls within `grace` seconds, after which they are cut, and removes the socket."""
        if not self._server.stop(grace).wait(grace + CUT_SECONDS):
            log.error("calls of unix:%s have not ended", self.path)
        self.path.unlink(missing_ok=True)


def serve_rank(
    runner: ModelRunner,
    tokenizer: Tokenizer,
    rank: int,
    size: int,
    uds_path: str,
    adapters: Sequence[str] = (),
    images: ChunkReader | None = None,
    sees: bool = False,
    guesses: int = 0,
) -> RankServer:
    """Serves one of `size` ranks on `<uds_path>-<rank>`. Args: images, sees, guesses: as for `Service`."""
    urls = [f"unix://{uds_path}-{number}" for number in range(size)]
    return RankServer(
        Service(runner, tokenizer, rank, urls, adapters, images, sees, guesses), Path(f"{uds_path}-{rank}")
    )
