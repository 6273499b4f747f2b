"""Language engines behind one small contract, each loaded in a child process in its own environment.

`python -m bench.contestants JOB` (a `Job` as JSON) runs one turn and prints the figures as one line of JSON. This file
imports nothing of an engine before that engine is asked for, so every environment can run it.
"""

from __future__ import annotations

import abc
import asyncio
import json
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from bench import procs
from bench.checkpoints import LONGEST, MODELS, ROOT, Files

LONG_OUTPUT = 64
PREFILLS = 3
SETTLING = 2.0  # seconds between its start and the first load


@dataclass(frozen=True)
class Job:
    """One turn of one contestant.

    Attributes:
        folder: the model's `Files`.
        concurrency: numbers of requests that are decoded together, one measurement each.
        prefill: tokens of the prompt whose prefill is measured; 0: none.
        long: tokens of context at which decoding of one request is measured; 0: none.
        check: instead of measuring, return the tokens that follow this many prompts; 0: measure.
        packed: a folder where Inflight keeps packed weights; then only the start is measured.
        gguf: the model's file in place of `folder`, for engines that read one; `vocabulary`: its number of tokens.
        spawned: `time.time()` just before the process was started.
    """

    contestant: str
    model: str
    folder: str
    precision: str
    threads: int
    concurrency: tuple[int, ...]
    prompt: int
    output: int
    prefill: int
    long: int
    seed: int
    check: int = 0
    packed: str = ""
    spawned: float = 0.0
    gguf: str = ""
    vocabulary: int = 0

    @property
    def files(self) -> Files:
        return Files(Path(self.folder))

    @property
    def tokens(self) -> int:
        return self.vocabulary or MODELS[self.model].vocabulary

    def prompts(self, count: int, length: int, use: str) -> list[list[int]]:
        """Random token ids: the same for every contestant, different for each use, so that no prefix is cached."""
        draw = random.Random(f"{self.seed} {use} {count} {length}")
        vocabulary = self.tokens
        return [[draw.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]


@dataclass
class Answer:
    """Tokens of one request and the `time.perf_counter` at which each arrived."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def add(self, tokens: Sequence[int]) -> None:
        now = time.perf_counter()
        self.tokens += tokens
        self.times += [now] * len(tokens)


class Contestant(abc.ABC):
    """One engine with one model, ready when the constructor returns.

    `run` submits all prompts at once and continues each, greedily and past any end-of-sequence token, until every one
    has `output` tokens; answers are in the order of the prompts, and each token's time is taken when the engine returns
    it to its caller. Nothing computed for one call may be reused in the next.

    Attributes:
        title: its name in reports.
        environment: its virtual environment, below the repository.
        precisions: the precisions that it has, with its own names for them.
        variables: environment variables that it needs from the start; `{threads}` and `{cores}` are filled in.
    """

    title: ClassVar[str]
    environment: ClassVar[str]
    precisions: ClassVar[dict[str, str]]
    variables: ClassVar[dict[str, str]] = {}

    @abc.abstractmethod
    def __init__(self, job: Job) -> None: ...

    @abc.abstractmethod
    def run(self, prompts: Sequence[Sequence[int]], output: int) -> list[Answer]: ...

    @abc.abstractmethod
    def weight_bytes(self) -> float:
        """Bytes of all weights that one step of decoding reads."""

    def memory_besides(self) -> dict[str, float]:
        """Bytes that it holds besides its weights and its cache; empty if they cannot be distinguished."""
        return {}


def size_of(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


class Inflight(Contestant):
    title = "Inflight"
    environment = ".venv"
    precisions = {"16bit": "bf16", "int8": "int8", "int4": "int4"}

    def __init__(self, job: Job) -> None:
        from inflight import LLM

        self.job = job
        self.llm = LLM(
            job.gguf or job.files.huggingface,
            threads=job.threads,
            kv_cache_memory=1 << 30,
            packed_cache=job.packed or None,
            quantize="none" if job.gguf or job.precision == "16bit" else job.precision,
        )

    def run(self, prompts: Sequence[Sequence[int]], output: int) -> list[Answer]:
        return self.llm._call(self._run(prompts, output))

    async def _run(self, prompts: Sequence[Sequence[int]], output: int) -> list[Answer]:
        return list(await asyncio.gather(*(self._one(prompt, output) for prompt in prompts)))

    async def _one(self, prompt: Sequence[int], output: int) -> Answer:
        from inflight.contract import GenerationRequest, Token

        answer = Answer()
        async for event in self.llm.engine.generate(GenerationRequest(prompt, max_new_tokens=output, ignore_eos=True)):
            if isinstance(event, Token):
                answer.add([event.info.id])
        return answer

    def weight_bytes(self) -> float:
        """Bytes that the engine holds: weights are quantized while they are loaded, so no file has that size."""
        return float(self.llm.engine._executors[0]._runner.offer.model.weight_bytes)  # type: ignore[attr-defined]  # it is the local one

    def memory_besides(self) -> dict[str, float]:
        """Weights and cache are the mappings for which it requests huge pages (`hg` in smaps)."""
        total = 0
        for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
            found = re.search(r"^Rss:\s*(\d+) kB", mapping, re.MULTILINE)
            flags = re.search(r"^VmFlags:(.*)", mapping, re.MULTILINE)
            if found and flags and "hg" not in flags[1].split():
                total += int(found[1]) * 1024
        return {"memory besides": float(total)}


class LlamaCpp(Contestant):
    """llama.cpp's own batches, driven as its `llama-batched-bench` does: whole prompts first, then all rows a step.

    Each sequence has its own cache, the faster of llama.cpp's two kinds; numpy finds the largest logits, which costs
    less than llama.cpp's greedy sampler.
    """

    title = "llama.cpp"
    environment = ".venv-llamacpp"
    precisions = {"16bit": "bf16", "int8": "Q8_0", "int4": "Q4_0"}
    # The folder to which bench/setup_cpu_peers.sh builds the libraries.
    variables = {"LLAMA_CPP_LIB_PATH": "{environment}/build/bin"}

    BATCH = 2048  # llama.cpp's default: tokens of one call

    def __init__(self, job: Job) -> None:
        import llama_cpp

        self.job, self.api = job, llama_cpp
        self.path = Path(job.gguf) if job.gguf else job.files.gguf(job.precision)
        _quiet_llama(llama_cpp)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        # Its products on AMX end with a signal where LFM2's convolutions have several sequences.
        params.use_extra_bufts = not self.path.name.startswith("lfm2")
        model = llama_cpp.llama_model_load_from_file(str(self.path).encode(), params)
        assert model, f"llama.cpp cannot load {self.path}"
        self.model = model

    def run(self, prompts: Sequence[Sequence[int]], output: int) -> list[Answer]:
        context = self._context(prompts, output)
        batch = self.api.llama_batch_init(self.BATCH, 0, 1)
        try:
            answers = [Answer() for _ in prompts]
            self._prefill(context, batch, prompts, answers)
            place = [len(prompt) for prompt in prompts]
            for _ in range(output - 1):
                batch.n_tokens = 0
                for row, answer in enumerate(answers):
                    self._put(batch, answer.tokens[-1], place[row], row, True)
                    place[row] += 1
                self._decode(context, batch, answers)
            return answers
        finally:
            self.api.llama_batch_free(batch)
            self.api.llama_free(context)

    def _context(self, prompts: Sequence[Sequence[int]], output: int) -> Any:
        params = self.api.llama_context_default_params()
        params.n_seq_max = len(prompts)
        params.n_ctx = len(prompts) * (max(len(prompt) for prompt in prompts) + output)
        params.n_batch = self.BATCH
        params.n_threads = params.n_threads_batch = self.job.threads
        params.kv_unified = False
        context = self.api.llama_init_from_model(self.model, params)
        assert context, "llama.cpp cannot make a context"
        return context

    def _prefill(self, context: Any, batch: Any, prompts: Sequence[Sequence[int]], answers: list[Answer]) -> None:
        batch.n_tokens = 0
        for row, prompt in enumerate(prompts):
            for place, token in enumerate(prompt):
                if batch.n_tokens == self.BATCH:
                    self._decode(context, batch, answers)
                    batch.n_tokens = 0
                self._put(batch, token, place, row, place == len(prompt) - 1)
        self._decode(context, batch, answers)

    def _put(self, batch: Any, token: int, place: int, row: int, wanted: bool) -> None:
        at = batch.n_tokens
        batch.token[at], batch.pos[at], batch.logits[at] = token, place, wanted
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
        batch.n_tokens = at + 1

    def _decode(self, context: Any, batch: Any, answers: list[Answer]) -> None:
        """One call; every row that wanted logits gets its next token."""
        import numpy as np

        status = self.api.llama_decode(context, batch)
        assert status == 0, f"llama_decode gave {status}"
        vocabulary = self.job.tokens
        for at in range(batch.n_tokens):
            if batch.logits[at]:
                logits = np.ctypeslib.as_array(self.api.llama_get_logits_ith(context, at), (vocabulary,))
                answers[batch.seq_id[at][0]].add([int(logits.argmax())])

    def weight_bytes(self) -> float:
        return self.path.stat().st_size


def _quiet_llama(api: Any) -> None:
    global _llama_log  # llama.cpp keeps the pointer
    _llama_log = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(_llama_log, None)


_llama_log: Any = None


class OpenVino(Contestant):
    """OpenVINO GenAI's continuous batching. With 16-bit weights, arithmetic and cache are in bfloat16; with int8 and
    int4 they are its defaults for those (activations quantized per group, cache in int8).
    """

    title = "OpenVINO GenAI"
    environment = ".venv-openvino"
    precisions = {"16bit": "bf16", "int8": "int8 per channel", "int4": "int4 in groups"}

    def __init__(self, job: Job) -> None:
        import openvino_genai

        self.job, self.api = job, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 512
        properties = {"INFERENCE_NUM_THREADS": job.threads, "INFERENCE_PRECISION_HINT": "bf16"}
        if job.precision == "16bit":
            properties["KV_CACHE_PRECISION"] = "bf16"
        self.folder = job.files.openvino(job.precision)
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(self.folder), scheduler, "CPU", properties)
        self.requests = 0

    def run(self, prompts: Sequence[Sequence[int]], output: int) -> list[Answer]:
        import numpy as np
        from openvino import Tensor

        config = self.api.GenerationConfig(max_new_tokens=output, ignore_eos=True, do_sample=False)
        answers = [Answer() for _ in prompts]
        handles = []
        for prompt in prompts:
            self.requests += 1
            handles.append(self.pipeline.add_request(self.requests, Tensor(np.array([prompt], np.int64)), config))
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for handle, answer in zip(handles, answers):
                if handle.can_read():
                    for part in handle.read().values():
                        answer.add(list(part.generated_ids))
        return answers

    def weight_bytes(self) -> float:
        return size_of(self.folder, "*.bin")


class Vllm(Contestant):
    title = "vLLM"
    environment = ".venv-vllm"
    precisions = {"16bit": "bf16", "int8": "W8A8"}
    variables = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "{cores}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }

    def __init__(self, job: Job) -> None:
        import vllm

        self.job, self.api = job, vllm
        self.folder = job.files.vllm(job.precision)
        self.llm = vllm.LLM(
            str(self.folder),
            dtype="bfloat16",
            max_model_len=LONGEST,
            max_num_seqs=64,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
        self.requests = 0

    def run(self, prompts: Sequence[Sequence[int]], output: int) -> list[Answer]:
        engine = self.llm.llm_engine
        params = self.api.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        answers = {}
        for prompt in prompts:
            self.requests += 1
            answers[str(self.requests)] = Answer()
            engine.add_request(str(self.requests), {"prompt_token_ids": list(prompt)}, params)
        while engine.has_unfinished_requests():
            for one in engine.step():
                answer = answers[one.request_id]
                answer.add(list(one.outputs[0].token_ids[len(answer.tokens) :]))
        return list(answers.values())

    def weight_bytes(self) -> float:
        return size_of(self.folder, "*.safetensors")


class Transformers(Contestant):
    """transformers' continuous batching, which records each token's time itself. One manager for all calls, with a
    cache of 16,384 tokens: by default it would take most of the machine's memory, for each call anew.
    """

    title = "transformers"
    environment = ".venv"
    precisions = {"16bit": "bf16"}

    def __init__(self, job: Job) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(job.threads)
        self.job = job
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            job.files.huggingface, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.manager = self.model.init_continuous_batching(
            transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            transformers.ContinuousBatchingConfig(page_size=256, num_blocks=LONGEST // 256, allow_block_sharing=False),
        )
        self.manager.start()

    def run(self, prompts: Sequence[Sequence[int]], output: int) -> list[Answer]:
        names = self.manager.add_requests(
            [list(prompt) for prompt in prompts], max_new_tokens=output, record_timestamps=True
        )
        found: dict[str, Answer] = {}
        while len(found) < len(names):
            one = self.manager.get_result(timeout=60)
            if one is None:
                assert self.manager.is_running(), "transformers' generation thread has ended"
            elif one.is_finished():
                found[one.request_id] = Answer(list(one.generated_tokens), list(one.timestamps))
        return [found[name] for name in names]

    def weight_bytes(self) -> float:
        return size_of(self.job.files.huggingface, "*.safetensors")


CONTESTANTS: dict[str, type[Contestant]] = {
    "inflight": Inflight,
    "llamacpp": LlamaCpp,
    "openvino": OpenVino,
    "vllm": Vllm,
    "transformers": Transformers,
}


def environment(name: str, threads: int) -> dict[str, str]:
    """This process's variables and those that a contestant needs and that hold it to its threads."""
    contestant = CONTESTANTS[name]
    filled = {"threads": threads, "cores": f"0-{threads - 1}", "environment": ROOT / contestant.environment}
    own = {key: value.format(**filled) for key, value in contestant.variables.items()}
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **own}


def decode_rate(answers: Sequence[Answer]) -> float:
    """Tokens per second while every request decodes, and none is prefilled or has ended.

    Counts the tokens of all requests after the last request gets its first token, up to the moment when the first
    request gets its last.
    """
    begin = max(answer.times[0] for answer in answers)
    end = min(answer.times[-1] for answer in answers)
    assert end > begin, "some request ended before all had begun: ask for longer outputs"
    return sum(begin < moment <= end for answer in answers for moment in answer.times) / (end - begin)


def timed(contestant: Contestant, prompts: Sequence[Sequence[int]], output: int) -> tuple[list[Answer], float]:
    """The answers and the time at which the prompts were submitted."""
    began = time.perf_counter()
    answers = contestant.run(prompts, output)
    assert all(len(answer.times) == output for answer in answers), [len(answer.times) for answer in answers]
    return answers, began


def take_turn(job: Job) -> dict[str, float]:
    """Figures by name: rates in tokens/s, times in s, memory in bytes."""
    contestant = CONTESTANTS[job.contestant](job)
    contestant.run(job.prompts(1, 16, "start"), 1)
    figures = {"start": time.time() - job.spawned}
    if job.packed:
        return figures
    time.sleep(SETTLING)
    if job.prefill:
        figures |= _measure_prefill(contestant, job)
    for count in job.concurrency:
        figures |= _measure_decode(contestant, job, count)
    figures["peak memory"] = sum(procs.memory(pid, "VmHWM") for pid in procs.tree(os.getpid()))
    figures["weight bytes"] = contestant.weight_bytes()
    figures |= contestant.memory_besides()
    if job.long:
        answers, began = timed(contestant, job.prompts(1, job.long, "long"), LONG_OUTPUT)
        figures["long decode"] = decode_rate(answers)
        figures["long prefill"] = job.long / (answers[0].times[0] - began)
    return figures


def _measure_prefill(contestant: Contestant, job: Job) -> dict[str, float]:
    """The median of a few prompts, one after the other: a single one is shorter than the machine's fluctuations."""
    contestant.run(job.prompts(1, job.prefill, "warm-up of prefill"), 1)
    times: list[float] = []
    for number in range(PREFILLS):
        answers, began = timed(contestant, job.prompts(1, job.prefill, f"prefill {number}"), 1)
        times.append(answers[0].times[0] - began)
    first = statistics.median(times)
    return {"first token": first, "prefill": job.prefill / first}


def _measure_decode(contestant: Contestant, job: Job, count: int) -> dict[str, float]:
    contestant.run(job.prompts(count, 16, "warm-up"), 4)
    answers, began = timed(contestant, job.prompts(count, job.prompt, "decode"), job.output)
    ended = max(answer.times[-1] for answer in answers)
    return {f"decode {count}": decode_rate(answers), f"end to end {count}": count * job.output / (ended - began)}


def follow(job: Job) -> list[list[int]]:
    """The tokens that follow `job.check` prompts, each prompt run alone."""
    contestant = CONTESTANTS[job.contestant](job)
    return [contestant.run([prompt], job.output)[0].tokens for prompt in job.prompts(job.check, job.prompt, "check")]


def main() -> None:
    given = json.loads(sys.argv[1])
    job = Job(**{**given, "concurrency": tuple(given["concurrency"])})
    work: Callable[[Job], object] = follow if job.check else take_turn
    print(json.dumps(work(job)), flush=True)
    os._exit(0)  # engines' threads would keep the process running or end slowly


def to_json(job: Job) -> str:
    return json.dumps(asdict(job))


if __name__ == "__main__":
    main()
