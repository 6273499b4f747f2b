"""Prompts that are kept in files: the same tokens and log-probabilities as without, and no answer from a file that is
not whole."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, cast

import numpy as np
import pytest

from inflight.contract import (
    Array,
    CacheSize,
    GenerationRequest,
    ModelFacts,
    Page,
    Sampling,
    ShardOffer,
    Transfer,
    Transferred,
    whole,
)
from inflight.engine import Executor
from inflight.engine.adapters import Adapters
from inflight.engine.prompt_cache import PromptCache, _Load
from inflight.errors import InvalidRequest, StartError
from inflight.kernels import NativeProgram, checksum, native_reason
from inflight.llm import LLM, Generation
from inflight.metrics import PromptCacheCounts
from inflight.models import KeptForms
from inflight.pages import HEADER, PageFiles, look, tail, whole_pages
from inflight.sched import Capacity, Scheduler, Sequence
from inflight.shard.page_desk import PageDesk
from tests.e2e.running import eventually
from tests.gemma4 import save_gemma4
from tests.lm import POCKET, save_tiny
from tests.recurrent import save_recurrent
from tests.unit.test_lora import save_adapter

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

LOGGED = Sampling(logprobs=True)
MARK = "ab" * 16
SIZE = {"vocab_size": 2048, "max_position_embeddings": 2048}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 90, count)]


@contextmanager
def opened(folder: Path, cache: Path | None, **settings: Any) -> Iterator[LLM]:
    told = {"threads": 1, "kv_cache_memory": 32 << 20, "prompt_cache": cache, "max_batch_size": 4, **settings}
    with LLM(folder, **told) as llm:
        yield llm


def counts(llm: LLM) -> PromptCacheCounts:
    found = llm.engine.prompts[0].counts
    assert found is not None
    return found


def answer(llm: LLM, prompt: list[int], count: int = 12) -> Generation:
    return llm.generate([prompt], LOGGED, max_new_tokens=count, ignore_eos=True)[0]


def same(one: Generation, other: Generation) -> bool:
    return [(each.id, each.logprob) for each in one.tokens] == [(each.id, each.logprob) for each in other.tokens]


def files_of(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("*/*") if not path.name.startswith("."))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("kept")
    save_recurrent("Qwen3_5", base / "recurrent", **SIZE)
    save_tiny("Llama", base / "plain", **SIZE)
    save_tiny("Gemma2", base / "window", sliding_window=64, head_dim=18, **SIZE)
    save_gemma4("odd", base / "shared")
    return {name: with_tokenizer(base / name) for name in ("recurrent", "plain", "window", "shared")}


def with_tokenizer(folder: Path) -> Path:
    shutil.copy(POCKET / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("plain", {}),
        ("plain", {"kv_cache_dtype": "int8", "dtype": "bfloat16", "quantize": "int8"}),
        ("window", {"block_size": 6}),
        ("shared", {"block_size": 32}),
        ("plain", {"cpu_engine": "torch"}),
        ("recurrent", {}),
        ("recurrent", {"kv_cache_dtype": "int8", "dtype": "bfloat16"}),
    ],
)
def test_the_same_bits_after_a_start(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat of two turns, the second one after a start; what an answer added is found too."""
    folder, first, settings = checkpoints[name], tokens(600), dict(settings)
    engine = settings.pop("cpu_engine", "")
    monkeypatch.setenv("INFLIGHT_CPU_ENGINE", engine)
    with opened(folder, None, **settings) as llm:
        wanted = [answer(llm, first, 300)]
        second = [*first, *wanted[0].token_ids, *tokens(20, 1)]
        wanted.append(answer(llm, second))
    with opened(folder, tmp_path / "kept", **settings) as llm:
        assert same(answer(llm, first, 300), wanted[0])
        eventually(lambda: bool(counts(llm).written))
    with opened(folder, tmp_path / "kept", **settings) as llm:
        again = answer(llm, second)
        assert same(again, wanted[1]) or engine == "torch"  # whose sums depend on the shape of a step
        assert again.token_ids == wanted[1].token_ids
        assert again.cached >= 768 - 31, again.cached
        assert same(answer(llm, first, 300), wanted[0])
        assert counts(llm).hits >= 1


def test_nobody_elses_files_are_found(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Other tenants, weights, precisions and block sizes begin anew."""
    folder, prompt = checkpoints["plain"], tokens(600)

    def cached(llm: LLM, tenant: str = "") -> int:
        request = GenerationRequest(prompt, LOGGED, 3, ignore_eos=True, tenant=tenant)
        return llm._call(whole(llm.engine, request)).start.cached

    with opened(folder, tmp_path / "kept") as llm:
        assert cached(llm, "one") == 0
        eventually(lambda: counts(llm).written > 0)
    with opened(folder, tmp_path / "kept") as llm:
        assert [cached(llm, tenant) for tenant in ("two", "", "one")] == [0, 0, 592]
    other = with_tokenizer(save_tiny("Llama", tmp_path / "other", seed=1, **SIZE))
    for path, settings in ((folder, {"dtype": "bfloat16"}), (folder, {"block_size": 32}), (other, {})):
        with opened(path, tmp_path / "kept", **settings) as llm:
            assert cached(llm, "one") == 0, (path, settings)


@pytest.mark.parametrize("loaded", [False, True])
def test_an_adapter_whose_files_change_finds_nothing_of_before(
    checkpoints: dict[str, Path], tmp_path: Path, loaded: bool
) -> None:
    """Where the ranks are started again, also if it was loaded while the model served; the old files find it again."""
    folder, prompt, worn = checkpoints["plain"], tokens(600), tmp_path / "adapter"
    for seed, name in enumerate(("one", "two")):
        save_adapter(folder, tmp_path / name, seed)

    def ask(llm: LLM) -> Generation:
        return llm.generate([prompt], LOGGED, max_new_tokens=8, ignore_eos=True, adapter="red")[0]

    def wear(llm: LLM | None, name: str) -> None:
        shutil.copytree(tmp_path / name, worn, dirs_exist_ok=True)
        if llm is not None:
            llm._call(llm.engine.restart_replicas())

    wear(None, "one")
    with opened(folder, tmp_path / "kept", lora_adapters={} if loaded else {"red": worn}) as llm:
        if loaded:
            llm.load_adapter("red", worn)
        wanted = ask(llm)
        assert wanted.cached == 0
        eventually(lambda: counts(llm).written > 0)
        wear(llm, "two")
        other = ask(llm)
        assert not same(other, wanted)
        assert (other.cached, counts(llm).tokens) == (0, 0)
        wear(llm, "one")
        again = ask(llm)
        assert same(again, wanted)
        assert again.cached == counts(llm).tokens == 592


def test_an_adapter_whose_files_change_while_it_is_loaded_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number is made of what they held, and files are found by it."""
    first, second = (save_adapter(checkpoints["plain"], tmp_path / name, seed) for seed, name in enumerate("ab"))
    given, worn = Adapters._give, tmp_path / "worn"
    shutil.copytree(first, worn)

    async def give(self: Adapters, *arguments: Any) -> None:
        await given(self, *arguments)
        shutil.copytree(second, worn, dirs_exist_ok=True)

    with opened(checkpoints["plain"], None) as llm:
        monkeypatch.setattr(Adapters, "_give", give)
        with pytest.raises(StartError, match="the adapter 'red' changed while it was loaded; load it again"):
            llm.load_adapter("red", worn)
        with pytest.raises(InvalidRequest, match="served here: none"):
            llm.generate([[3, 4]], max_new_tokens=1, adapter="red")
        llm.load_adapter("red", worn)
        assert llm.generate([[3, 4]], max_new_tokens=1, adapter="red")


def damaged(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "longer":
        file.write_bytes(data + b"x")
    else:
        data[{"first": HEADER, "last": -1, "middle": len(data) // 2, "header": 20, "checksum": 60}[how]] ^= 16
        file.write_bytes(data)


@pytest.mark.parametrize("name", ["plain", "recurrent"])
def test_damage_is_a_miss(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder, prompt, cache = checkpoints[name], tokens(600), tmp_path / "kept"
    with opened(folder, cache) as llm:
        wanted = answer(llm, prompt)
        eventually(lambda: counts(llm).written > 0)
    for file in files_of(cache):
        os.utime(file, (0, 0))
    with opened(folder, cache) as llm:
        assert same(answer(llm, prompt), wanted)
    written = {file: file.read_bytes() for file in files_of(cache) if file.stat().st_mtime}  # those that were read
    assert len(written) == 3 + (name == "recurrent")
    for number, how in enumerate(("cut", "empty", "longer", "first", "last", "middle", "header", "checksum")):
        file = list(written)[number % len(written)]
        damaged(file, how)
        with opened(folder, cache) as llm:
            again = answer(llm, prompt)
            assert same(again, wanted), how
            assert again.cached < 592, how
            eventually(lambda: counts(llm).written > 0)
        assert file.read_bytes() == written[file], how  # a whole one is in its place
    # A file under another's name
    first, second = [file for file in files_of(cache) if file.suffix == ".kv"][:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with opened(folder, cache) as llm:
        assert same(answer(llm, prompt), wanted)


def test_requests_of_one_prompt_read_it_once(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Also where the cache in memory is so small that it holds little more."""
    folder, system = checkpoints["plain"], tokens(800)
    prompts = [[*system, *tokens(30, seed)] for seed in range(1, 7)]
    with opened(folder, None) as llm:
        wanted = llm.generate(prompts, LOGGED, max_new_tokens=8, ignore_eos=True)
    with opened(folder, tmp_path, kv_cache_memory=1 << 20) as llm:
        found = llm.generate(prompts, LOGGED, max_new_tokens=8, ignore_eos=True)
        assert all(map(same, found, wanted))
        eventually(lambda: counts(llm).written > 0)
    with opened(folder, tmp_path, kv_cache_memory=1 << 20) as llm:
        found = llm.generate(prompts, LOGGED, max_new_tokens=8, ignore_eos=True)
        assert all(map(same, found, wanted))
        assert [one.cached >= 768 for one in found] == [True] * 6
        read = counts(llm).tokens
        assert 768 <= read < 2 * 832


def test_a_folder_that_is_deleted_comes_again(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with opened(checkpoints["plain"], tmp_path / "kept") as llm:
        llm.embed([tokens(600, 9)])  # a text that is only read is not kept
        answer(llm, tokens(600))
        eventually(lambda: len(files_of(tmp_path / "kept")) == 3)  # all of it: none may come behind the deletion
        assert not counts(llm).unwritten
        shutil.rmtree(tmp_path / "kept")
        answer(llm, tokens(700, 1))
        eventually(lambda: len(files_of(tmp_path / "kept")) == 3)


def test_a_folder_that_cannot_be_written(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk is one line in the log; requests go on."""

    def full(*given: Any) -> int:
        raise OSError(28, "No space left on device")

    folder, prompt = checkpoints["plain"], tokens(600)
    with opened(folder, tmp_path / "kept") as llm:
        monkeypatch.setattr("inflight.pages.files.os.write", full)
        first = answer(llm, prompt)
        eventually(lambda: counts(llm).unwritten > 0)
        assert same(answer(llm, [*prompt[:599], 7, *tokens(300, 3)]), answer(llm, [*prompt[:599], 7, *tokens(300, 3)]))
        assert same(answer(llm, prompt), first)
    assert files_of(tmp_path / "kept") == []
    assert len([line for line in caplog.records if "No space left" in line.getMessage()]) == 1


# The engine's side, without ranks


class NoRanks:
    """Takes orders and does not answer."""

    def __init__(self) -> None:
        self.orders: list[Transfer] = []
        self.lost = False
        self.on_transferred: Callable[[Transferred], None] = lambda answer: None

    def transfer(self, order: Transfer) -> None:
        self.orders.append(order)


def in_files(base: Path, count: int, blocks: int = 64) -> tuple[PromptCache, NoRanks, Scheduler, list[Sequence]]:
    """A prompt cache that has the prompts of `count` sequences."""
    scheduler, ranks = Scheduler(Capacity(blocks, 16, 8, 256, 256)), NoRanks()
    cache = PromptCache(base, scheduler, cast(Executor, ranks), PromptCacheCounts(), lambda: None)
    facts = ModelFacts("", "", 10, 0)
    cache.opened(ShardOffer(facts, CacheSize(blocks, 16, 1000), 8, 1000, "cpu", prompt_cache=MARK))
    rows, files = [Sequence(id, tokens(300, id), Sampling(), 4) for id in range(1, count + 1)], pages(base)
    for row in rows:
        for piece in whole_pages(row.chain(16), 16):
            files.write(piece.key, content(1), state=False)
    return cache, ranks, scheduler, rows


def test_after_a_loss_nothing_is_read_for_those_who_waited(tmp_path: Path) -> None:
    """The blocks would be taken in a cache whose ranks are gone, and never come back."""
    cache, ranks, scheduler, rows = in_files(tmp_path, 3)

    async def run() -> None:
        for row in rows:
            cache.add(row)
        tasks = [task for _, task in cache._waiting.values()]
        while not ranks.orders:
            await asyncio.sleep(0.001)
        ranks.lost = True
        cache.lost()
        scheduler.lost()
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert scheduler.waiting == 3
        assert scheduler.pool.free == 64
        assert len(ranks.orders) == 1

    asyncio.run(run())


def test_no_request_is_lost_when_its_replica_leaves(tmp_path: Path) -> None:
    """Neither one that waits for files nor one that comes while the ranks end: other replicas take them over."""
    cache, ranks, scheduler, rows = in_files(tmp_path, 3)

    async def run() -> None:
        cache.add(rows[0])
        cache.add(rows[1])
        while not ranks.orders:
            await asyncio.sleep(0.001)
        await asyncio.wait_for(cache.close(), 10)
        cache.add(rows[2])
        assert (cache.waiting, scheduler.waiting, len(ranks.orders)) == (0, 3, 1)

    asyncio.run(run())


@pytest.mark.parametrize(("done", "tokens"), [(1, 256), (0, 0)])
def test_a_state_that_was_read_counts_as_the_prompt_behind_it(tmp_path: Path, done: int, tokens: int) -> None:
    """Its blocks may all be in the cache."""
    scheduler = Scheduler(Capacity(64, 16, 8, 256, 256, states=4))
    cache = PromptCache(tmp_path, scheduler, cast(Executor, NoRanks()), PromptCacheCounts(), lambda: None)

    async def run() -> None:
        slot = scheduler.states.pool.take()
        assert slot is not None
        load = _Load([Page(key(1), state=slot, place=1)], [], (slot, key(1)), 256)
        cache._publish(load, done)
        assert (load.done.result(), key(1) in scheduler.states.pool) == (tokens, bool(done))

    asyncio.run(run())


def test_nobody_waits_behind_a_read_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflight.engine.prompt_cache.FIRST_WAIT", 0.0)
    monkeypatch.setattr("inflight.engine.prompt_cache.LEAST_WAIT", 0.05)
    cache, ranks, scheduler, rows = in_files(tmp_path, 3)

    async def run() -> None:
        for row in rows:
            cache.add(row)
        await asyncio.wait_for(asyncio.gather(*(task for _, task in cache._waiting.values())), 10)
        assert scheduler.waiting == 3
        assert (len(ranks.orders), cache._counts.late, cache._counts.passed) == (1, 1, 2)

    asyncio.run(run())


def test_nothing_is_read_into_the_last_blocks(tmp_path: Path) -> None:
    """Rows that run will need them."""

    async def orders(running: int, blocks: int) -> int:
        cache, ranks, scheduler, (row,) = in_files(tmp_path, 1, blocks)
        scheduler._running = [row] * running
        cache.add(row)
        while not ranks.orders and cache.waiting:
            await asyncio.sleep(0.001)
        cache.lost()
        return len(ranks.orders)

    assert [asyncio.run(orders(*given)) for given in ((0, 16), (1, 16), (1, 17))] == [1, 0, 1]


def test_what_others_have_deleted_is_written_again(tmp_path: Path) -> None:
    cache, ranks, scheduler, (row,) = in_files(tmp_path, 1)
    keeper = cache._keeper
    assert keeper is not None

    async def written(again: Sequence) -> int:
        cache.add(again)
        while cache.waiting:
            await asyncio.sleep(0.001)
        scheduler.plan()
        scheduler.plan()
        cache.planned()
        cache.planned()
        return len(ranks.orders)

    keeper.found(row.chain(16)[15])
    for file in files_of(tmp_path):
        file.unlink()
    assert asyncio.run(written(row)) == 1
    assert ranks.orders[0].pages[0].key == row.chain(16)[15]


def test_a_desk_answers_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the process is nicer than its threads are to be, and where the copy itself fails."""

    class Broken(KeptForms):
        block_bytes, state_bytes, bits = 8, 0, ()

        def read_block(self, block: int, to: Array) -> None:
            raise RuntimeError("out of memory")

        write_block = read_state = write_state = read_block  # type: ignore[assignment]

    def refused(*given: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "setpriority", refused)
    answers: SimpleQueue[Transferred] = SimpleQueue()
    desk = PageDesk(pages(tmp_path), Broken(), 4)
    desk.take(Transfer(1, False, [Page(key(1), [0])]), answers.put)
    assert answers.get(timeout=10).done == 0
    desk.close(10)


def test_a_file_that_cannot_be_read_does_not_stop_writing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Reads that fail are told once, and what is computed is written all the same."""

    class Half(KeptForms):
        block_bytes, state_bytes, bits = 8, 0, ()

        def read_block(self, block: int, to: Array) -> None:
            to[:] = 1

        def write_block(self, block: int, content: Array) -> None:
            raise RuntimeError("no such block")

        read_state = write_state = write_block  # type: ignore[assignment]

    answers: SimpleQueue[Transferred] = SimpleQueue()
    desk = PageDesk(pages(tmp_path), Half(), 4)
    orders = [
        Transfer(number, load, [Page(key(number // 3), [0])]) for number, load in enumerate([False, True, True] * 2)
    ]
    done = []
    for order in orders:
        desk.take(order, answers.put)
        done.append(answers.get(timeout=10).done)
    desk.close(10)
    assert done == [1, 0, 0, 1, 0, 0]
    assert [line.getMessage() for line in caplog.records] == ["the prompt cache cannot be used for now: no such block"]


# Files


def content(seed: int, size: int = 5000) -> Any:
    memory = np.random.default_rng(seed).integers(0, 256, HEADER + size, np.uint8)
    memory[:HEADER] = 0
    return memory


def pages(base: Path, mark: str = MARK, limit: int = 1 << 20) -> PageFiles:
    files = PageFiles(base, mark, limit, checksum)
    files.open()
    return files


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def test_files_are_this_users_alone(tmp_path: Path) -> None:
    files = pages(tmp_path / "new")
    files.write(key(1), content(1), state=False)
    kept = [tmp_path / "new", tmp_path / "new" / MARK, *files_of(tmp_path / "new")]
    assert [path.stat().st_mode & 0o777 for path in kept] == [0o700, 0o700, 0o600]
    (tmp_path / "new" / MARK).chmod(0o750)
    with pytest.raises(PermissionError, match="only this user"):
        pages(tmp_path / "new")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / MARK).symlink_to(tmp_path / "new")
    with pytest.raises(PermissionError, match="only this user"):
        pages(tmp_path / "link")


def test_the_least_recently_used_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all fingerprints; what is not ours stays; a prefix loses its end first."""
    now = [1e9]
    monkeypatch.setattr("inflight.pages.files.time.time", lambda: now[0])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / f"{'cd' * 16}.kv").write_bytes(bytes(1 << 20))
    other, files = pages(tmp_path, "cd" * 16), pages(tmp_path)
    (tmp_path / MARK / "mine.txt").write_text("kept")
    old = tmp_path / MARK / ".1-1.part"
    old.write_bytes(b"x")
    os.utime(old, (now[0] - 9999,) * 2)
    for number in range(4):
        other.write(key(number), content(number, 100_000), state=False, place=number)
    memory = content(0, 100_000)
    for number in range(10, 24):
        now[0] += 1
        assert files.write(key(number), content(number, 100_000), state=bool(number % 2)) == HEADER + 100_000
        assert other.read(key(0), memory, state=False)
        assert sum(file.stat().st_size for file in tmp_path.glob("*/*.[ks]*") if file.parent.name != "notes") < 1 << 20
    assert np.array_equal(memory[HEADER:], content(0, 100_000)[HEADER:])
    assert [other.exists(key(number), state=False) for number in range(4)] == [True, False, False, False]
    assert files.exists(key(23), state=True)
    assert not files.exists(key(10), state=False)
    assert (tmp_path / MARK / "mine.txt").exists()
    assert not old.exists()
    assert len(list((tmp_path / "notes").iterdir())) == 1
    monkeypatch.setattr("inflight.pages.files.shutil.disk_usage", lambda path: Usage(1 << 40, 0, 0))
    before = len(list(tmp_path.glob("*/*")))
    with pytest.raises(OSError, match="the disk has 0 MiB left"):
        files.write(key(98), content(1), state=False)
    assert len(list(tmp_path.glob("*/*"))) == before, "others have filled the disk"
    with pytest.raises(OSError, match="too large"):
        files.write(key(99), content(1, 1 << 19), state=False)


def test_many_writers_and_readers(tmp_path: Path) -> None:
    """Whoever reads finds nothing or what was written, while files come and go."""
    wrong: list[int] = []
    read = [0]

    def work(seed: int) -> None:
        draw, memory = np.random.default_rng(seed), content(0)
        files = pages(tmp_path, limit=200_000)  # as another process has it
        for _ in range(150):
            number = int(draw.integers(30))
            if draw.integers(2):
                files.write(key(number), content(number), state=False)
            elif files.read(key(number), memory, state=False):
                read[0] += 1
                if not np.array_equal(memory[HEADER:], content(number)[HEADER:]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert read[0] > 20


def test_foreign_files_are_no_hits(tmp_path: Path) -> None:
    files, memory = pages(tmp_path), content(0)
    other = pages(tmp_path, "cd" * 16)
    other.write(key(1), content(1), state=False)
    (tmp_path / ("cd" * 16) / f"{key(1).hex()}.kv").rename(tmp_path / MARK / f"{key(1).hex()}.kv")
    assert files.exists(key(1), state=False)
    assert not files.read(key(1), memory, state=False)
    assert not files.exists(key(1), state=False)  # it is gone
    files.write(key(1), content(1), state=False)
    (tmp_path / MARK / f"{key(1).hex()}.kv").rename(tmp_path / MARK / f"{key(1).hex()}.state")
    assert not files.read(key(1), memory, state=True)


def test_look(tmp_path: Path) -> None:
    """Whole pages, then the longest tail; with recurrent layers only as far as a state lies."""
    files, digests = pages(tmp_path), [key(number) for number in range(1, 24)]
    names: dict[str, Callable[[int], Any]] = {
        "page": lambda stop: files.write(digests[stop - 1], content(stop), state=False),
        "state": lambda stop: files.write(digests[stop - 1], content(stop), state=True),
    }
    assert look(files, digests, 4, False) == ([], 0, False)
    for stop in (4, 8, 16, 11, 10):
        names["page"](stop)
    assert look(files, digests, 4, False) == ([*whole_pages(digests[:8], 4), tail(digests, 11, 4)], 11, False)
    assert look(files, digests[:10], 4, False).blocks == 10
    assert look(files, digests, 4, True) == ([], 0, False)
    for stop in (3, 10, 12):
        names["state"](stop)
    assert look(files, digests, 4, True) == ([*whole_pages(digests[:8], 4), tail(digests, 11, 4)], 10, True)
    assert look(files, digests[:9], 4, True) == (whole_pages(digests[:4], 4), 3, True)


def test_checksum() -> None:
    data = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    found = {checksum(data[:size].copy()) for size in range(300)}
    assert len(found) == 300
    for place in (0, 7, 127, 128, 500, 999):
        for bit in (1, 128):
            changed = data.copy()
            changed[place] ^= bit
            assert checksum(changed) != checksum(data)
    swapped = np.concatenate([data[128:256], data[:128], data[256:]])
    assert checksum(swapped) != checksum(data)


def test_blocks_are_checked() -> None:
    program = NativeProgram(1)
    with pytest.raises(IndexError, match="no cache"):
        program.read_block(0, np.zeros(1, np.uint8))
