"""What is measured in every round: one subject after the other does the same to the same material."""
import os
import time

from .machine import drop_caches, settle, sh, timed, warm
from .subjects import Floor, Forkvol

FORK = "fork of a full volume"
UNPACK = "unpack"
COMMIT_FULL = "commit of it"
WALK = "walk first"
READ = "read all first"
READ_AGAIN = "read all again"
READ_ONLY = "read all first, read-only fork"
READ_COLD = "read all cold"
REMOVE = "rm -rf"
COMMIT_EDITS = "commit of 200 edits, 1,000 new, 500 removed"
ABANDON = "abandon a whole new tree"
COMMIT_SMALL = "commit of 30 small files"
WRITE_LARGE = "write the large file + fsync"
COMMIT_LARGE = "commit of it (large)"
READ_LARGE = "read the large file first"
CHANGE_LARGE = "4 KiB into it + fsync"
COMMIT_CHANGE = "commit of that"

WALK_IT = "find . -printf '%s' >/dev/null"
# Through a pipe: tar opens no file when it sees that /dev/null takes everything.
READ_IT = "tar c . | cat >/dev/null"
READ_LARGE_IT = "dd if=large of=/dev/null bs=1M status=none"
EDIT_IT = """
find . -type f -name '*.js' | sort | sed -n 1,200p | while read -r f; do echo x >>"$f"; done
mkdir new; for i in $(seq 1000); do echo $i >new/$i; done
find . -type f -name '*.d.ts' | sort | sed -n 1,500p | xargs -d '\\n' rm
"""


def measure(record, subject, phase, action):
    settle()
    record(phase, subject.name, timed(action))


def fork_usable(subject):
    path = subject.fork()
    os.listdir(path)
    return path


def tree(subject, material, record):
    """The tree: unpacked, committed, forked, read, changed, removed."""
    material.warm()
    if isinstance(subject, Floor):
        tree_on_floor(subject, material, record)
        return
    path = subject.fork()
    measure(record, subject, UNPACK, lambda: sh(f"tar x -f '{material.tree}'", path))
    # Not settled before: what the job left to write is the commit's to pay for.
    record(COMMIT_FULL, subject.name, timed(lambda: subject.commit(path)))
    subject.origin = material.tree
    if subject.forks:
        def fork():
            nonlocal path
            path = fork_usable(subject)

        # The first follows a large commit, whose end may take its cores; the others do not.
        for again in range(5):
            if again:
                subject.abandon(path)
            measure(record, subject, FORK, fork)
    measure(record, subject, WALK, lambda: sh(WALK_IT, path))
    subject.abandon(path)
    path = fork_usable(subject)
    measure(record, subject, READ, lambda: sh(READ_IT, path))
    measure(record, subject, READ_AGAIN, lambda: sh(READ_IT, path))
    measure(record, subject, REMOVE, lambda: sh("rm -rf ./*", path))
    subject.discard(path)
    if getattr(subject, "fork_read_only", None):
        path = subject.fork_read_only()
        measure(record, subject, READ_ONLY, lambda: sh(READ_IT, path))
        subject.abandon(path)
    if isinstance(subject, Forkvol):
        chunks, disk = subject.stored()
        record("stored: chunks", subject.name, chunks, "B")
        record("stored: on disk", subject.name, disk, "B")
        record("stored: on disk ÷ tar|zstd -3", subject.name, disk / material.packed_bytes, "×")
    path = subject.fork()
    sh(EDIT_IT, path)
    record(COMMIT_EDITS, subject.name, timed(lambda: subject.commit(path)))
    # The kernel knows nothing of what a daemon keeps in memory: for a cold store it ends as well.
    subject.cool()
    path = fork_usable(subject)
    drop_caches()
    measure(record, subject, READ_COLD, lambda: sh(READ_IT, path))
    if isinstance(subject, Forkvol):
        # Long enough for what the daemon does when nothing is asked of it.
        time.sleep(5)
        record("memory of the daemon after reading all", subject.name, subject.memory(), "B")
    subject.abandon(path)
    if not subject.forks:
        return
    small_commits(subject, record)
    if not subject.slow:
        abandon_new(subject, material, record)


def tree_on_floor(subject, material, record):
    path = subject.fork()
    measure(record, subject, UNPACK, lambda: sh(f"tar x -f '{material.tree}'", path))
    subject.again()
    measure(record, subject, WALK, lambda: sh(WALK_IT, path))
    subject.again()
    measure(record, subject, READ, lambda: sh(READ_IT, path))
    measure(record, subject, READ_AGAIN, lambda: sh(READ_IT, path))
    measure(record, subject, REMOVE, lambda: sh("rm -rf ./*", path))


def small_commits(subject, record):
    for number in range(3):
        path = subject.fork()
        for file in range(30):
            (path / f"small-{number}-{file}").write_text(f"{number} {file}\n" * 200)
        record(COMMIT_SMALL, subject.name, timed(lambda: subject.commit(path)))


def abandon_new(subject, material, record):
    material.warm()
    path = subject.fork()
    (path / "all-new").mkdir()
    sh(f"tar x -f '{material.tree}'", path / "all-new")
    record(ABANDON, subject.name, timed(lambda: subject.abandon(path)))


def large(subject, material, record):
    """A file of 1 GiB: written, committed, read, a block of it changed, committed."""
    warm(material.large)
    path = subject.fork()
    write = f"dd if='{material.large}' of=large bs=1M conv=fsync status=none"
    measure(record, subject, WRITE_LARGE, lambda: sh(write, path))
    if isinstance(subject, Floor):
        subject.again()
        measure(record, subject, READ_LARGE, lambda: sh(READ_LARGE_IT, path))
        return
    record(COMMIT_LARGE, subject.name, timed(lambda: subject.commit(path)))
    path = fork_usable(subject)
    measure(record, subject, READ_LARGE, lambda: sh(READ_LARGE_IT, path))
    subject.abandon(path)
    path = fork_usable(subject)
    middle = material.large_bytes // 4096 // 2
    change = f"dd if=/dev/urandom of=large bs=4k seek={middle} count=1 conv=notrunc,fsync status=none"
    measure(record, subject, CHANGE_LARGE, lambda: sh(change, path))
    record(COMMIT_CHANGE, subject.name, timed(lambda: subject.commit(path)))
