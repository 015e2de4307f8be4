"""What is measured: forkvol and its peers, each with the same few verbs.

A subject lives in a folder of its own and starts empty. `fork` makes a writable folder with the content of the last commit,
`commit` makes a fork's content that of the next forks and ends the fork, `abandon` throws a fork away.
"""
import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from .machine import has_filesystem, is_mounted, run, sh, unmount_if_mounted

TARGET = Path(os.environ.get("CARGO_TARGET_DIR", Path.home() / ".cache/forkvol/target"))
BIN = TARGET / "release/forkvol"
FLOOR = TARGET / "release/examples/floor"


def serve(arguments, **pipes):
    """Starts a filesystem's server, in a session of its own: it ends with its mount, and not by a Ctrl-C on the terminal."""
    return subprocess.Popen(arguments, start_new_session=True, **pipes)


class Subject:
    """What all have. `needs` are programs, `filesystem` is the kernel's; a subject without them is left out."""

    needs: list = []
    filesystem = None
    # Makes forks and commits, so that their times mean something.
    forks = True
    # So slow that it takes part in the first rounds alone.
    slow = False
    # What it takes part in.
    parts = {"tree", "large"}
    # The archive that a folder comes from again after it was discarded, where there is no fork to do that.
    origin = None

    def __init__(self, home):
        self.home = home
        self.count = 0

    @classmethod
    def lacking(cls):
        """Names what it needs and this machine lacks."""
        missing = [tool for tool in cls.needs if not shutil.which(tool)]
        if cls.filesystem and not has_filesystem(cls.filesystem):
            missing.append(f"{cls.filesystem} in the kernel")
        return ", ".join(missing)

    def next(self, kind):
        self.count += 1
        return self.home / f"{kind}{self.count}"

    def start(self):
        pass

    def discard(self, path):
        """Throws away a fork that was changed."""
        self.abandon(path)

    def cool(self):
        """Forgets what it keeps in memory by itself; no fork is there."""

    def close(self):
        pass


class Forkvol(Subject):
    name = "forkvol"
    filesystem = "fuse"
    parts = {"tree", "large", "programs", "load", "sizes"}

    def start(self):
        self.env = dict(os.environ, FORKVOL_STORE=str(self.home / "store"))

    def call(self, *arguments):
        return run([BIN, *map(str, arguments)], env=self.env).strip()

    def fork(self, volume="bench", *options):
        path = self.next("fork")
        self.call("fork", *options, volume, path)
        return path

    def fork_read_only(self):
        return self.fork("bench", "--read-only")

    def commit(self, path):
        self.call("commit", path)

    def abandon(self, path):
        self.call("abandon", path)

    def cool(self):
        self.call("daemon", "stop")

    def stored(self):
        """Bytes of chunks, and bytes on disk: of a daemon that has ended, for it has flushed tables and logs."""
        self.cool()
        stats = json.loads(self.call("stats", "--json"))["stats"]
        return stats["stored_bytes"], stats["disk_bytes"]

    def memory(self):
        pid = json.loads(self.call("daemon", "status", "--json"))["pid"]
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    def close(self):
        if (self.home / "store").exists():
            self.call("abandon", "--all")
            self.call("daemon", "stop", "--force")


class Overlay(Subject):
    name = "overlayfs"
    needs = ["mount"]
    filesystem = "overlay"
    parts = {"tree", "large", "programs", "load"}

    def start(self):
        self.layers = [self.home / "empty"]
        self.layers[0].mkdir()
        self.uppers = {}

    def lower(self):
        return ":".join(str(layer) for layer in reversed(self.layers))

    def fork(self):
        path = self.next("fork")
        upper, inner = self.home / f"upper{self.count}", self.home / f"work{self.count}"
        for folder in (upper, inner, path):
            folder.mkdir()
        self.uppers[path] = upper
        self.mount(path, upper, inner)
        return path

    def mount(self, path, upper, inner):
        run(["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={self.lower()},upperdir={upper},workdir={inner}", path])

    def unmount(self, path):
        run(["umount", path])

    def fork_read_only(self):
        path = self.next("fork")
        path.mkdir()
        self.uppers[path] = None
        run(["mount", "-t", "overlay", "overlay", "-o", f"ro,lowerdir={self.lower()}", path])
        return path

    def commit(self, path):
        os.sync()
        self.unmount(path)
        self.layers.append(self.uppers.pop(path))

    def abandon(self, path):
        self.unmount(path)
        upper = self.uppers.pop(path)
        if upper:
            shutil.rmtree(upper)

    def close(self):
        for path in self.uppers:
            unmount_if_mounted(path)


class FuseOverlay(Overlay):
    """What rootless containers use where the kernel's overlayfs is not theirs to mount."""

    name = "fuse-overlayfs"
    needs = ["fuse-overlayfs", "umount"]
    filesystem = "fuse"
    slow = True
    parts = {"tree", "large"}
    fork_read_only = None

    def start(self):
        super().start()
        self.servers = {}

    def mount(self, path, upper, inner):
        options = f"lowerdir={self.lower()},upperdir={upper},workdir={inner}"
        server = serve(["fuse-overlayfs", "-f", "-o", options, path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.servers[path] = server
        while not is_mounted(path):
            if server.poll() is not None:
                raise RuntimeError(f"fuse-overlayfs ended with status {server.returncode}")
            time.sleep(0.0005)

    def unmount(self, path):
        run(["umount", path])
        self.servers.pop(path).wait()

    def close(self):
        super().close()
        for server in self.servers.values():
            server.terminate()
            server.wait()


class Image(Subject):
    """A filesystem of its own in a file, on a loop device that goes with its mount."""

    make: list = []

    def start(self):
        image, self.mount = self.home / "image", self.home / "mount"
        with open(image, "wb") as file:
            file.truncate(32 << 30)
        run([*self.make, image])
        self.mount.mkdir()
        run(["mount", "-o", "loop", image, self.mount])
        self.head = self.mount / "head"

    def next(self, kind):
        self.count += 1
        return self.mount / f"{kind}{self.count}"

    def close(self):
        unmount_if_mounted(self.home / "mount")


class Btrfs(Image):
    name = "btrfs snapshot"
    needs = ["mkfs.btrfs", "btrfs", "mount"]
    filesystem = "btrfs"
    make = ["mkfs.btrfs", "-q"]

    def start(self):
        super().start()
        run(["btrfs", "-q", "subvolume", "create", self.head])

    def fork(self):
        path = self.next("fork")
        run(["btrfs", "-q", "subvolume", "snapshot", self.head, path])
        return path

    def commit(self, path):
        run(["btrfs", "filesystem", "sync", self.mount])
        self.head = path

    def abandon(self, path):
        run(["btrfs", "-q", "subvolume", "delete", path])


class Xfs(Image):
    name = "xfs reflink"
    needs = ["mkfs.xfs", "mount"]
    filesystem = "xfs"
    make = ["mkfs.xfs", "-q", "-m", "reflink=1"]

    def start(self):
        super().start()
        self.head.mkdir()

    def fork(self):
        path = self.next("fork")
        run(["cp", "-a", "--reflink=always", self.head, path])
        return path

    def commit(self, path):
        run(["sync", "-f", path])
        self.head = path

    def abandon(self, path):
        run(["rm", "-rf", path])


class Archive(Subject):
    """What actions/cache does: a zstd tar, unpacked for every job and packed again by those that change something."""

    name = "tar+zstd"
    needs = ["zstd", "tar"]

    def start(self):
        self.archive = self.home / "cache.tar.zst"

    def fork(self):
        path = self.next("unpacked")
        path.mkdir()
        if self.archive.exists():
            sh(f"zstd -dcq '{self.archive}' | tar x -C '{path}'")
        return path

    def commit(self, path):
        sh(f"tar c -C '{path}' . | zstd -3 -T0 -q -f -o '{self.archive}.new' && sync '{self.archive}.new'")
        os.rename(f"{self.archive}.new", self.archive)

    def abandon(self, path):
        run(["rm", "-rf", path])


class Plain(Subject):
    """One folder of the disk itself (ext4 on most machines), which has no forks: what the same costs without any."""

    name = "plain folder"
    forks = False
    parts = {"tree", "large", "programs"}

    def start(self):
        self.path = self.home / "tree"

    def fork(self):
        if not self.path.exists():
            self.path.mkdir()
            if self.origin:
                run(["tar", "x", "-C", self.path, "-f", self.origin])
        return self.path

    def commit(self, path):
        run(["sync", "-f", path])

    def abandon(self, path):
        pass

    def discard(self, path):
        run(["rm", "-rf", path])


class Floor(Subject):
    """A FUSE filesystem that does nothing but answer (benches/floor): what the requests of a phase cost at least."""

    name = "floor"
    filesystem = "fuse"
    forks = False
    parts = {"tree", "large"}
    options: list = []

    def start(self):
        self.path = self.home / "mount"
        self.path.mkdir()
        self.server = serve([FLOOR, *self.options, self.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.wait()

    def wait(self):
        if self.server.stdout.readline().strip() != "mounted":
            raise RuntimeError("the floor did not mount")
        device = os.stat(self.path).st_dev
        # As forkvol's mounts by root.
        Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").write_text("1024")

    def fork(self):
        return self.path

    def again(self):
        """The same tree on a new mount, of which the kernel knows nothing."""
        run(["umount", self.path])
        self.server.stdin.write("again\n")
        self.server.stdin.flush()
        self.wait()

    def close(self):
        unmount_if_mounted(self.path)
        self.server.stdin.close()
        self.server.wait()


class AwakeFloor(Floor):
    """The floor while it keeps idle cores awake, as forkvol's daemon does under load where it may."""

    name = "floor, awake"
    options = ["--awake"]


ALL = [Forkvol, Floor, AwakeFloor, Overlay, FuseOverlay, Btrfs, Xfs, Plain, Archive]


@contextlib.contextmanager
def fresh(kind, work):
    """A subject with nothing in it, which leaves nothing behind."""
    home = work / kind.name.replace(" ", "-").replace(",", "")
    home.mkdir()
    subject = kind(home)
    try:
        subject.start()
        yield subject
    finally:
        try:
            subject.close()
        finally:
            # Slow, and never measured; a mount that goes in the background may hold a folder for a moment.
            for attempt in range(50):
                left = subprocess.run(["rm", "-rf", "--one-file-system", home], capture_output=True, text=True)
                if left.returncode == 0:
                    break
                time.sleep(0.2)
            else:
                raise RuntimeError(f"left behind: {home}: {left.stderr.strip()}")
