"""What is measured beside something else: many forks at once, requests beside a commit, jobs, volumes of many sizes, and what a store
takes that rests."""
import io
import os
import statistics
import subprocess
import sys
import tarfile
import threading
import time

from .machine import settle, sh, timed
from .subjects import BIN

TEN_FORKS = "ten forks at once: throughput ÷ that of one"
P99_RATIO = "p99 of a request beside a commit ÷ alone"
P99_LIFE_RATIO = "p99 of a small file's life beside a commit ÷ alone"
ATTACH = "attach of 3 volumes at 6 paths"
FINISH = "finish of an unchanged job"
SETTLED = "stored once and settled: on disk ÷ tar|zstd -3"


def ten_forks(subject, material, record):
    """Ten jobs, each unpacks a part of the tree into its own fork, reads it and removes it, at the same time; and one alone."""
    work = f"mkdir in; tar x -C in -f '{material.portion}'; tar c in | cat >/dev/null; rm -rf in"
    path = subject.fork()
    (path / "something").write_text("x\n")
    subject.commit(path)
    paths = [subject.fork() for _ in range(10)]
    failures = []

    def job(path):
        try:
            sh(work, path)
        except Exception as failure:
            failures.append(failure)

    def together():
        threads = [threading.Thread(target=job, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    sh(work, paths[0])
    settle()
    alone = statistics.median(timed(lambda: sh(work, paths[0])) for _ in range(3))
    settle()
    beside = timed(together)
    if failures:
        raise failures[0]
    record(TEN_FORKS, subject.name, 10 * alone / beside, "×")
    for path in paths:
        subject.abandon(path)


def latencies(folder, seconds, until=None):
    """Sorted times of single requests: a file is created, written and removed, until the process has ended or the seconds have passed.
    Sorted times of the whole of it as well."""
    requests, lives = [], []
    now, probe = time.perf_counter, folder / "probe"
    end = now() + seconds
    while now() < end and (until is None or until.poll() is None):
        start = now()
        handle = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o644)
        created = now()
        os.write(handle, b"x" * 4096)
        written = now()
        os.close(handle)
        closed = now()
        os.unlink(probe)
        removed = now()
        requests += [created - start, written - created, removed - closed]
        lives.append(removed - start)
    return sorted(requests), sorted(lives)


def beside_a_commit(own, megabytes, record):
    """The 99th percentile of a request of one fork, and of a small file's life there, alone and while another fork commits what it has
    just written, which compression makes an eighth smaller: so it is copied, as what nothing makes smaller is not."""
    probe, busy = own.fork(), own.fork()
    settle()
    alone = latencies(probe, 3)
    codes = r"head -c 1048576 /dev/urandom | LC_ALL=C tr '\200-\377' '\000-\177'"
    sh(f"for i in $(seq {megabytes}); do {codes} > big$i; done; sync", busy)
    committing = subprocess.Popen([BIN, "commit", busy], env=own.env, stdout=subprocess.DEVNULL)
    try:
        beside = latencies(probe, 120, committing)
    finally:
        status = committing.wait()
    if status:
        raise RuntimeError("the commit beside the probe failed")
    fewest = min(len(alone[0]), len(beside[0]))
    if fewest < 300:
        print(f"p99 beside a commit: left out: only {fewest} requests", file=sys.stderr)
    else:
        for what, ratio, times in (("a request", P99_RATIO, 0), ("a small file's life", P99_LIFE_RATIO, 1)):
            p99 = [sample[times][len(sample[times]) * 99 // 100] for sample in (alone, beside)]
            record(f"p99 of {what}, alone", own.name, p99[0])
            record(f"p99 of {what}, beside a commit", own.name, p99[1])
            record(ratio, own.name, p99[1] / p99[0], "×")
    own.abandon(probe)


def jobs(own, record):
    """Start and end of a job that changes nothing, from the start of each command to its end."""
    checkout = own.home / "checkout"
    checkout.mkdir()
    paths = [checkout / f"path{number}" for number in range(6)]
    wanted = []
    for volume in range(3):
        wanted += ["-v", f"job{volume}", "-p", paths[2 * volume], "-p", paths[2 * volume + 1]]
    for number in range(11):
        job = f"bench-{number}"
        settle()
        attached = timed(lambda: own.call("attach", "--strict", "--job", job, *wanted))
        for path in paths:
            # The first job fills its volumes; each later one finds there what it left.
            if number == 0:
                (path / "content").write_text("x\n" * 1000)
            elif not (path / "content").exists():
                raise RuntimeError(f"{path} is not the job's")
        finished = timed(lambda: own.call("finish", "--strict", "--job", job, "--status", 0))
        if number:
            record(ATTACH, own.name, attached)
            record(FINISH, own.name, finished)


def files_as_tar(count, out):
    """Writes a tar of so many small files: by hand, for tarfile alone would take minutes to write ten millions."""
    header = tarfile.TarInfo("0" * 20)
    header.mode = 0o644
    pattern = bytearray(header.tobuf(tarfile.USTAR_FORMAT))
    buffered = io.BufferedWriter(out, 1 << 20)
    for number in range(count):
        data = b"%d\n" % number
        pattern[0:100] = (b"%d/%d" % (number // 1000, number)).ljust(100, b"\0")
        pattern[124:136] = b"%011o\0" % len(data)
        pattern[148:156] = b" " * 8
        pattern[148:156] = b"%06o\0 " % sum(pattern)
        buffered.write(pattern)
        buffered.write(data.ljust(512, b"\0"))
    buffered.write(bytes(1024))
    buffered.flush()


def volume_of(own, count):
    """The name of a new volume with so many files."""
    volume = f"of-{count}"
    importing = subprocess.Popen([BIN, "import", volume, "-"], env=own.env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0)
    try:
        files_as_tar(count, importing.stdin)
    finally:
        importing.stdin.close()
        status = importing.wait()
    if status:
        raise RuntimeError(f"import of {count} files failed")
    settle()
    return volume


def memory(own, record, count):
    """What the daemon takes while ten forks are known to the kernel from end to end, and while one has made as many files anew."""
    volume = volume_of(own, count)
    paths = [own.fork(volume) for _ in range(10)]
    for path in paths:
        sh("find . -printf %s >/dev/null", path)
    time.sleep(5)
    record(f"memory of the daemon, ten forks of {count:,} files walked", own.name, own.memory(), "B")
    for path in paths:
        own.abandon(path)
    path = own.fork(volume)
    for folder in range(count // 1000):
        made = path / f"new-{folder}"
        made.mkdir()
        for file in range(1000):
            os.close(os.open(made / str(file), os.O_CREAT | os.O_WRONLY, 0o644))
    record(f"memory of the daemon, {count:,} files made in a fork", own.name, own.memory(), "B")
    own.abandon(path)


def sizes(own, record, counts):
    """Forks, from the start of the command to a usable mount, and commits of ten new files, of volumes from small to large."""
    for count in counts:
        volume = volume_of(own, count)
        for attempt in range(11):
            path = None

            def fork():
                nonlocal path
                path = own.fork(volume)
                os.listdir(path)

            record(f"fork of {count:,} files", own.name, timed(fork))
            for file in range(10):
                (path / f"new-{attempt}-{file}").write_text(f"{attempt} {file}\n")
            record(f"commit of 10 new in {count:,} files", own.name, timed(lambda: own.commit(path)))


def space(own, material, record):
    """The packages, once, as they come and when all of them are settled."""
    packages = f"tar c -C '{material.modules}' ."
    packed = int(sh(f"{packages} | zstd -3 -q -c | wc -c"))
    sh(f"{packages} | FORKVOL_STORE='{own.env['FORKVOL_STORE']}' '{BIN}' import packages - >/dev/null")
    record("stored once: on disk ÷ tar|zstd -3", own.name, own.stored()[1] / packed, "×")
    record("settling of that", own.name, timed(lambda: own.call("gc", "--settle")))
    record(SETTLED, own.name, own.stored()[1] / packed, "×")
