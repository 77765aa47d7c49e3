"""Processes that leave nothing behind, and worker processes that do not fight for the cores."""

import contextlib
import ctypes
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_all_start_methods, get_context, parent_process
from pathlib import Path

BEGAN = time.monotonic()
THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
LANES = 4
PRELOADED = ("torch", "scipy.ndimage", "scipy.stats", "nibabel")  # no code of our own, which may change under a kernel


def cores() -> int:
    """The number of cores that this process may use, which a scheduler or a container may have set below all."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, also by `kill -9` (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def die_with_run() -> None:
    """`die_with_parent`, also where a shell stands between, as DVC starts every command by one (Linux).

    Such a shell outlives DVC, and this process ends when whoever started the shell does.
    """
    die_with_parent()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, IndexError):
            above = Path(f"/proc/{os.getppid()}")
            command = (above / "cmdline").read_bytes().split(b"\0")
            if command[1].startswith(b"-") and command[1].endswith(b"c"):  # sh -c
                starter = int((above / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
                threading.Thread(target=_end_with, args=(os.pidfd_open(starter),), daemon=True).start()


def _end_with(process: int) -> None:
    """Wait for a process, given by its file descriptor, and end with it."""
    select.select([process], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def elapsed() -> float:
    """Seconds since this module was imported, which a stage does first."""
    return time.monotonic() - BEGAN


def peak_memory() -> float:
    """The most memory this process has held so far, in MB (2^20 bytes).

    On Linux read from /proc: what `getrusage` says there is carried over from the process that started this one.
    """
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def _context(also: tuple[str, ...]):
    """How workers are started: from a process that has imported once what all of them need, or anew."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *also])
    return context


def _begin() -> None:
    """Of a worker: to have one thread, and to end with whoever owns the pool, which need not be its parent."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    threading.Thread(target=_end_with_owner, daemon=True).start()


def _end_with_owner() -> None:
    parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def workers(count: int | None = None, also: tuple[str, ...] = ()) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` worker processes (one for each of `cores` by default) of one thread each.

    `also` are modules that all of them need beside `PRELOADED`; the first pool of a process says so for all. What is
    still waiting when the block is left by an error is given up.
    """
    before = {name: os.environ.get(name) for name in THREAD_SETTINGS}
    os.environ.update(dict.fromkeys(THREAD_SETTINGS, "1"))  # inherited by what workers start from, at the first task
    pool = ProcessPoolExecutor(count or cores(), _context(also), _begin)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def side_by_side(count: int) -> Iterator[Callable]:
    """A `map` for work on `count` small inputs: up to `LANES` threads, which share out those of torch and hold an input
    in memory each."""
    import torch

    before = torch.get_num_threads()
    if (lanes := min(count, before, LANES)) < 2:
        yield lambda *given: list(map(*given))
        return
    try:
        with ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(before // lanes,)) as pool:
            yield lambda *given: list(pool.map(*given))
    finally:
        torch.set_num_threads(before)  # what new threads begin with


def map_large_blocks() -> None:
    """Have glibc give freed blocks of a megabyte back to the system at once, else a kernel grows by hundreds of them.

    It undoes `keep_freed_memory`, which a stage asks for by environment variables.
    """
    _set_malloc({-4: 1 << 16, -3: 1 << 20})  # M_MMAP_MAX, M_MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: giving back and fetching again what a feature map takes costs more than its use."""
    _set_malloc({-4: 0, -1: 2**31 - 1})  # M_MMAP_MAX, M_TRIM_THRESHOLD


def _set_malloc(settings: dict[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another system has another way
        for setting, value in settings.items():
            ctypes.CDLL(None).mallopt(setting, value)
