"""What a server keeps per task: adapters in memory, and texts that wait for an answer. Both have limits.

`serve_many.py` serves with it; it knows nothing of HTTP beyond the status of a refusal.
"""

import hashlib
import itertools
import logging
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from peft_lntune import AdapterBank
from peft_lntune.errors import ConfigError, PeftLNTuneError

FILES = ("adapter_config.json", "adapter_model.safetensors")
TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SETTLED = 2.0  # seconds; a file system may give two writes within so short a time the same timestamp
Heads = dict[str, dict[str, torch.Tensor]]
Stamp = tuple[tuple[int, int, int, int], ...]

log = logging.getLogger("ray.serve")


class RefusedError(Exception):
    """A request that gets no answer.

    Args:
        status: the HTTP status.
        reason: what was wrong, and what to do.
        retry_after: seconds after which the same request may succeed; None: it will not.
    """

    def __init__(self, status: int, reason: str, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.retry_after = status, reason, retry_after


@dataclass(eq=False)
class Loaded:
    """One version of a task's adapter in the bank.

    Attributes:
        task: name of the folder.
        name: name in the bank, which no other version has.
        version: first digits of the SHA-256 of its files.
        stamp: of its files, when they were read.
        seen: time at which the stamp was taken.
        users: number of requests that were promised this version.
    """

    task: str
    name: str
    version: str
    stamp: Stamp
    seen: float
    users: int = 0


class AdapterStore:
    """The adapters of a folder, loaded on demand into a bank that never outgrows its memory.

    A request leases one version of its adapter, so all its texts get answers of the same version. `refresh` loads an
    adapter anew if its files have changed, and lets one go if its folder is gone. Where a replacement cannot be used,
    the version in memory stays in use until the files change again. When memory is full, the adapter that was used
    least recently is dropped. Safe for several threads; `lease` and `release` do not wait for files.

    Args:
        bank: a bank without adapters.
        folder: has a directory for each task, as `save_pretrained` writes it.
        max_bytes: memory for adapters with their heads.
        misfit: what is wrong with the heads of an adapter, empty if nothing is.

    Raises:
        ConfigError: there is not memory for two adapters, of which a replacement needs one.
    """

    def __init__(
        self, bank: AdapterBank, folder: Path, max_bytes: int, misfit: Callable[[Heads], str] = lambda heads: ""
    ) -> None:
        self._bank, self._folder, self._max_bytes, self._misfit = bank, folder.resolve(), max_bytes, misfit
        self._lock, self._files = threading.Lock(), threading.Lock()  # the second is held while files are read
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()  # least recently used first
        self._retired: list[Loaded] = []
        self._bad: dict[str, tuple[Stamp, float, str]] = {}  # stamp and time of the reading, and why
        self._head_bytes, self._serial = 0, itertools.count()
        if self.capacity < 2:
            raise ConfigError(f"{max_bytes:,} bytes are not memory for two adapters of {bank.row_bytes:,} bytes.")

    @property
    def capacity(self) -> int:
        """Number of adapters that fit: each is counted with the largest head, as heads are stacked."""
        return self._max_bytes // (self._bank.row_bytes + self._head_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters in memory."""
        return len(self._bank) * (self._bank.row_bytes + self._head_bytes)

    @property
    def tasks(self) -> list[str]:
        """Tasks in memory, the least recently used first."""
        with self._lock:
            return list(self._loaded)

    @property
    def bad(self) -> list[str]:
        """Tasks whose files cannot be used as they are."""
        with self._lock:
            return list(self._bad)

    def lease(self, task: str) -> Loaded | None:
        """Take a task's adapter into use until `release`.

        Args:
            task: name of the task.

        Returns:
            Its current version; None: it is not in memory, so `load` it and ask again.

        Raises:
            RefusedError: the adapter is known to be bad.
        """
        with self._lock:
            if (found := self._loaded.get(task)) is not None:
                self._loaded.move_to_end(task)
                found.users += 1
                return found
            if task in self._bad:
                raise RefusedError(500, self._bad[task][2])
            return None

    def release(self, adapter: Loaded) -> None:
        """Give a lease back."""
        with self._lock:
            adapter.users -= 1

    @contextmanager
    def held(self, adapters: Sequence[Loaded]) -> Iterator[None]:
        """Leases of these versions once more, as long as the context is open; the caller has some already."""
        with self._lock:
            for adapter in adapters:
                adapter.users += 1
        try:
            yield
        finally:
            for adapter in adapters:
                self.release(adapter)

    def load(self, task: str) -> None:
        """Read a task's adapter, unless it is in memory.

        Args:
            task: name of the task.

        Raises:
            RefusedError: 400 the name is invalid or leads out of the folder, 404 there is no such adapter, 500 it is
                damaged or does not fit, 503 memory is full of adapters in use, or the files are being replaced.
        """
        if not TASK.fullmatch(task) or not self._is_inside(task):
            raise RefusedError(400, f"{task[:100]!r} is no task: up to 100 letters, digits and . _ - inside, no path.")
        with self._files:
            if task not in self._loaded and task not in self._bad:
                self._read(task)

    def refresh(self) -> None:
        """Compare what is in memory with the files: load what has changed, let go what has been deleted."""
        with self._lock:
            loaded, bad = list(self._loaded.values()), [task for task in self._bad if task not in self._loaded]
        for adapter in loaded:
            self._recheck(adapter)
        for task in bad:
            self._forgive(task)
        with self._files:
            self._sweep()

    # Files and what was read from them.

    def _is_inside(self, task: str) -> bool:
        return (self._folder / task).resolve().parent == self._folder  # a link may lead out

    def _stamp(self, task: str) -> Stamp | None:
        """What changes when the files of an adapter do; None if there is no config."""
        found = []
        for name in FILES:
            try:
                of = (self._folder / task / name).stat()
            except OSError:
                if name == FILES[0]:
                    return None
                continue  # an adapter without a weight file is bad, not absent
            found.append((of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns))
        return tuple(found)

    def _version(self, task: str) -> str:
        digest = hashlib.sha256()
        for file in (self._folder / task / name for name in FILES):
            digest.update(file.read_bytes() if file.is_file() else b"")
        return digest.hexdigest()[:12]

    def _forgive(self, task: str) -> None:
        bad = self._bad.get(task)
        if bad and not _unchanged(self._stamp(task), *bad[:2]):
            with self._lock:
                self._bad.pop(task, None)

    def _recheck(self, old: Loaded) -> None:
        task, stamp, now = old.task, self._stamp(old.task), time.time()
        bad = self._bad.get(task)
        if stamp is not None and _unchanged(stamp, *(bad[:2] if bad else (old.stamp, old.seen))):
            return  # nearly always, so that this takes no lock
        gone = stamp is None or not self._is_inside(task)
        try:
            same = not gone and self._version(task) == old.version  # written again with the same contents
            with self._files:
                if self._loaded.get(task) is not old:
                    return
                if stamp is None or gone:
                    self._retire(old)
                elif same:
                    with self._lock:
                        old.stamp, old.seen = stamp, now
                        self._bad.pop(task, None)
                else:
                    self._read(task)
        except (RefusedError, OSError) as error:  # what is bad has been logged; for all else the next turn tries again
            log.debug("adapter not replaced: %s", error, extra={"task": task})

    # The caller of all below holds `_files`.

    def _read(self, task: str) -> None:
        stamp, now = self._stamp(task), time.time()
        if stamp is None:
            raise RefusedError(404, f"there is no adapter for the task {task!r}.")
        self._make_room(task)
        name = f"{task}@{next(self._serial)}"
        heads: Heads = {}
        reason, wrong = "", None
        try:
            version = self._version(task)
            self._bank.add(name, self._folder / task)
            heads = self._bank.heads(name)
            if other := self._misfit(heads):
                reason = f"the head of {task!r} is not that of this server: {other}. See --num-labels."
        except (PeftLNTuneError, OSError) as error:
            reason, wrong = f"the adapter of {task!r} cannot be used; the server's log says why.", error
        changing = self._stamp(task) != stamp
        if (reason or changing) and name in self._bank:
            self._bank.remove(name)
        if changing:
            raise RefusedError(503, f"the adapter of {task!r} is being replaced.", retry_after=1)
        if reason:
            self._condemn(task, (stamp, now, reason), wrong)
        head_bytes = sum(tensor.nbytes for tensors in heads.values() for tensor in tensors.values())
        self._head_bytes = max(self._head_bytes, head_bytes)
        with self._lock:
            self._bad.pop(task, None)
            if task in self._loaded:
                self._retired.append(self._loaded.pop(task))
            self._loaded[task] = Loaded(task, name, version, stamp, now)
        log.info("adapter loaded", extra={"task": task, "version": version, "adapters_bytes": self.nbytes})

    def _condemn(self, task: str, why: tuple[Stamp, float, str], error: Exception | None) -> None:
        with self._lock:
            self._bad[task] = why
            kept = task in self._loaded
        log.error("adapter refused: %s", error or why[-1], extra={"task": task, "old_version_kept": kept})
        raise RefusedError(500, why[-1])

    def _make_room(self, task: str) -> None:
        """Drop adapters until one more fits; never the version that is about to be replaced."""
        self._sweep()
        while len(self._bank) >= self.capacity:
            with self._lock:
                idle = (each for each in self._loaded.values() if not each.users and each.task != task)
                oldest = next(idle, None)
                if oldest is None:
                    raise RefusedError(503, "the memory for adapters is full of adapters in use.", retry_after=1)
                self._retired.append(self._loaded.pop(oldest.task))
            self._sweep()

    def _retire(self, adapter: Loaded) -> None:
        with self._lock:
            self._retired.append(self._loaded.pop(adapter.task))
            self._bad.pop(adapter.task, None)
        log.info("adapter deleted", extra={"task": adapter.task, "version": adapter.version})

    def _sweep(self) -> None:
        """Remove from the bank what no request uses any more."""
        with self._lock:
            unused = [each for each in self._retired if not each.users]
            self._retired = [each for each in self._retired if each.users]
        for each in unused:
            self._bank.remove(each.name)


class Requests:
    """Counts texts that wait or are being answered, and refuses those beyond the limits. For one thread.

    Attributes:
        open: number of requests in `entered`.
        texts: number of texts in `admitted`.
        closed: refuse new requests.

    Args:
        max_texts: in all.
        max_texts_per_task: of one task, so that no task takes all places.
    """

    def __init__(self, max_texts: int, max_texts_per_task: int) -> None:
        self._max_texts, self._max_per_task = max_texts, max_texts_per_task
        self._per_task: Counter[str] = Counter()
        self.open = self.texts = 0
        self.closed = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A request from its first byte to its answer.

        Raises:
            RefusedError: 503 the server is stopping.
        """
        if self.closed:
            raise RefusedError(503, "the server is stopping.", retry_after=1)
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    @contextmanager
    def admitted(self, task: str, texts: int) -> Iterator[None]:
        """Texts of a request until they are answered.

        Raises:
            RefusedError: 503 too many texts wait, 429 too many of this task.
        """
        if self.texts + texts > self._max_texts:
            raise RefusedError(503, f"{self.texts} texts wait; there is room for {self._max_texts}.", retry_after=1)
        if self._per_task[task] + texts > self._max_per_task:
            reason = f"{self._per_task[task]} texts of {task!r} wait; {self._max_per_task} of one task may."
            raise RefusedError(429, reason, retry_after=1)
        self.texts += texts
        self._per_task[task] += texts
        try:
            yield
        finally:
            self.texts -= texts
            self._per_task[task] -= texts
            if not self._per_task[task]:
                del self._per_task[task]


def _unchanged(stamp: Stamp | None, before: Stamp, read: float) -> bool:
    """Whether files are what they were when they were read, and were old enough then for a change to show."""
    return stamp == before and all(read - changed / 1e9 > SETTLED for *_, changed in before)
