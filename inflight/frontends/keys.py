"""API keys: who calls, what the caller may do, and how often.

The file of keys is looked at when a request comes, at most once a second, so a change needs no restart. A file that is
broken changes nothing but the log.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path

from inflight.config import KeyConfig, read_keys
from inflight.errors import ConfigError, Forbidden, RateLimited, Unauthorized
from inflight.log import LOGGER
from inflight.metrics import KeyMetrics

UNKNOWN = "unknown"
"""The name in metrics of callers without a key that is known."""
SINGLE = "api-key"
"""The name of the holder of `--api-key`."""
NO_KEY = "this server needs an API key: send it as Authorization: Bearer <key>, or as x-api-key"
_LOOKED = 1.0
"""Seconds between two looks at the file."""
_MINUTE = 60.0


class _Bucket:
    """An amount that fills at `limit` a minute, up to `limit`."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level, self._at = float(limit), now

    def wait(self, wanted: float, now: float) -> float:
        """Seconds until it holds `wanted`; 0: it does now."""
        rate = self.limit / _MINUTE
        self._level = min(float(self.limit), self._level + (now - self._at) * rate)
        self._at = now
        return max(0.0, (wanted - self._level) / rate)

    def take(self, amount: float) -> None:
        """Takes an amount, also more than there is: it then has to fill up again first."""
        self._level -= amount


class Ticket:
    """A request of a holder while it is answered."""

    __slots__ = ("_key",)

    def __init__(self, key: Key) -> None:
        self._key: Key | None = key
        key.running += 1

    def leave(self) -> None:
        """Ends it; a second call does nothing."""
        if self._key is not None:
            self._key.running -= 1
            self._key = None


class Key:
    """One key and what its holder has used of its limits.

    Attributes:
        running: requests now.
    """

    def __init__(self, config: KeyConfig, metrics: KeyMetrics, clock: Callable[[], float]) -> None:
        self._clock, self._metrics = clock, metrics
        self._requests: _Bucket | None = None
        self._tokens: _Bucket | None = None
        self.running = 0
        self.set(config)

    def set(self, config: KeyConfig) -> None:
        """Takes over a changed configuration; a limit that stays the same keeps what was used of it."""
        self.config = config
        self._requests = _kept(self._requests, config.requests_per_minute, self._clock())
        self._tokens = _kept(self._tokens, config.tokens_per_minute, self._clock())

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def tenant(self) -> str:
        return self.config.name if self.config.tenant is None else self.config.tenant

    @property
    def priority(self) -> int:
        return self.config.priority

    @property
    def admin(self) -> bool:
        return self.config.admin

    @property
    def limited(self) -> bool:
        """Whether a request has to be watched until its end."""
        config = self.config
        return bool(config.requests_per_minute or config.tokens_per_minute or config.concurrent)

    def allows(self, *names: str | None) -> bool:
        """Whether it may call what has these names."""
        models = self.config.models
        return models is None or any(name in models for name in names)

    def enter(self) -> Ticket:
        """Lets a request in.

        Raises:
            RateLimited: a limit is reached.
        """
        config, now = self.config, self._clock()
        if config.concurrent is not None and self.running >= config.concurrent:
            raise self._limited("concurrent", f"{config.concurrent} requests at a time", 1.0)
        if self._tokens is not None and (wait := self._tokens.wait(1.0, now)):
            raise self._limited("tokens", f"{config.tokens_per_minute} tokens a minute", wait)
        if self._requests is not None:
            if wait := self._requests.wait(1.0, now):
                raise self._limited("requests", f"{config.requests_per_minute} requests a minute", wait)
            self._requests.take(1.0)
        self.count()
        return Ticket(self)

    def count(self) -> None:
        """Counts a request of a holder without limits that was let in."""
        self._metrics.entered(self.name)

    def spent(self, tokens: int) -> None:
        """Counts the tokens of a request to a language model: prompt and answer."""
        self._metrics.spent(self.name, tokens)
        if self._tokens is not None:
            self._tokens.take(tokens)

    def _limited(self, limit: str, text: str, wait: float) -> RateLimited:
        self._metrics.refused(self.name, limit)
        return RateLimited(f"the limit of this API key is reached: {text}", max(1, ceil(wait)))


def _kept(bucket: _Bucket | None, limit: int | None, now: float) -> _Bucket | None:
    if limit is None:
        return None
    return bucket if bucket is not None and bucket.limit == limit else _Bucket(limit, now)


class Keys:
    """All keys of a server.

    Args:
        single: the key of a holder without limits; None: there is none.
        file: the file of keys; None: there is none.

    Raises:
        ConfigError: the file cannot be read.
    """

    def __init__(
        self,
        single: str | None,
        file: Path | None,
        metrics: KeyMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._single = None if single is None else KeyConfig(name=SINGLE, key=single, tenant="", admin=True)
        self._file, self._metrics, self._clock = file, metrics, clock
        self._secret = os.urandom(32)
        self._by_digest: dict[bytes, Key] = {}
        self._by_name: dict[str, Key] = {}
        self._state: tuple[int, int, int] | None = None
        self._looked = clock()
        if file is not None:
            self._state = _state(file)
        self._set(() if file is None else read_keys(file))

    def find(self, shown: Sequence[bytes]) -> Key:
        """The holder of the first of these keys that is known.

        Neither time nor result tell how much of a wrong key is right: a key is looked for by a digest that is made with
        a secret of this process.

        Raises:
            Unauthorized: none is.
            Forbidden: the key is disabled.
        """
        self._look()
        for each in shown:
            digest = self._digest(each)
            key = self._by_digest.get(digest)
            if key is not None and hmac.compare_digest(digest, self._digest(key.config.key.encode())):
                if not key.config.enabled:
                    self._metrics.refused(key.name, "disabled")
                    raise Forbidden("this API key is disabled")
                return key
        self._metrics.refused(UNKNOWN, "unknown")
        raise Unauthorized(NO_KEY)

    def _digest(self, shown: bytes) -> bytes:
        return hashlib.blake2b(shown, key=self._secret, digest_size=32).digest()

    def _look(self) -> None:
        """Reads the file again if it has changed."""
        now = self._clock()
        if self._file is None or now - self._looked < _LOOKED:
            return
        self._looked = now
        state = _state(self._file)
        if state == self._state:
            return
        self._state = state
        try:
            self._set(read_keys(self._file))
        except ConfigError as error:
            LOGGER.error("%s; the keys stay as they were", error)
        else:
            LOGGER.info("the API keys were read again: %d", len(self._by_name))

    def _set(self, configs: Sequence[KeyConfig]) -> None:
        configs = configs if self._single is None else (self._single, *configs)
        known, self._by_name, self._by_digest = self._by_name, {}, {}
        for config in configs:
            key = known.get(config.name)
            if key is None:
                key = Key(config, self._metrics, self._clock)
            else:
                key.set(config)
            self._by_name[config.name] = self._by_digest[self._digest(config.key.encode())] = key


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
