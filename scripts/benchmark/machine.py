"""The machine: commands, clocks, caches, and whether idle cores poll."""
import contextlib
import os
import platform
import signal
import subprocess
import time
from pathlib import Path

HALT_POLL = Path("/sys/module/haltpoll/parameters/guest_halt_poll_ns")
POLLING_NS = 200_000


def run(arguments, cwd=None, env=None):
    """Runs a program to its end and returns what it printed. However this ends, nothing that it started goes on."""
    process = subprocess.Popen(
        arguments, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))}: status {process.returncode}\n{err.strip()}")
    return out


def sh(script, cwd=None, env=None):
    return run(["bash", "-euo", "pipefail", "-c", script], cwd, env)


def timed(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def settle():
    """What was done before is not to be paid by what is measured next: written back, and mounts that go in the background are gone."""
    os.sync()
    time.sleep(0.3)


def drop_caches():
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def warm(path):
    """Brings a file into the page cache: what is read from it later costs no disk."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def state():
    """The state in which idle cores are, in words."""
    if not HALT_POLL.exists():
        return "no halt polling driver in this kernel"
    nanoseconds = int(HALT_POLL.read_text())
    if nanoseconds == 0:
        return "idle cores sleep at once (guest_halt_poll_ns = 0)"
    return f"idle cores poll before they sleep (guest_halt_poll_ns = {nanoseconds})"


def is_polling():
    return HALT_POLL.exists() and int(HALT_POLL.read_text()) > 0


@contextlib.contextmanager
def idle_cores_polling():
    """Idle cores poll meanwhile; afterwards the machine is as it was, also after an error or a signal that can be caught."""
    before = HALT_POLL.read_text()
    try:
        HALT_POLL.write_text(str(POLLING_NS))
        yield
    finally:
        HALT_POLL.write_text(before)


def is_mounted(path):
    """Asks the table of mounts, for a mount whose server is dead answers nothing."""
    return any(line.split()[4] == str(path) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def unmount_if_mounted(path):
    if is_mounted(path):
        run(["umount", "-l", path])


def has_filesystem(name):
    """Whether the kernel has a filesystem, also as a module that is not loaded yet."""

    def known():
        return name in Path("/proc/filesystems").read_text().split()

    return known() or (subprocess.run(["modprobe", "-q", name], check=False).returncode == 0 and known())


def describe():
    memory = Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]
    model = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "processor": model[0] if model else platform.machine(),
        "memory_bytes": int(memory) * 1024,
    }
