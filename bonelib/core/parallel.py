"""Processes that leave nothing behind, and worker processes that do not fight for the cores."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context, parent_process

THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PRELOADED = ("torch", "scipy.ndimage", "scipy.stats", "nibabel")  # no code of our own, which may change under a kernel


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, also by `kill -9` (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def peak_memory() -> float:
    """The most memory this process has held so far, in MB (2^20 bytes).

    On Linux read from /proc: what `getrusage` says there is carried over from the process that started this one.
    """
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def _context():
    """How workers are started: from a process that has imported once what all of them need, or anew."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
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
def workers(count: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` worker processes (one a core by default) of one thread each.

    What is still waiting when the block is left by an error is given up.
    """
    before = {name: os.environ.get(name) for name in THREAD_SETTINGS}
    os.environ.update(dict.fromkeys(THREAD_SETTINGS, "1"))  # inherited by what workers start from, at the first task
    pool = ProcessPoolExecutor(count or os.cpu_count(), _context(), _begin)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def map_large_blocks() -> None:
    """Have glibc map every block of a megabyte on its own, so that it goes back to the system as soon as it is freed.

    Else glibc learns to keep such blocks between smaller ones, and a kernel grows by hundreds of megabytes.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system has another way
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # -3 = M_MMAP_THRESHOLD
