"""Real programs, each on a fork of its own of a volume that holds what it needs; nothing comes from a network."""
import os

from .machine import run, sh
from .phases import fork_usable, measure

CARGO = "cargo build"
NPM = "npm ci"
GIT = "git clone + git status"
MAKE = "make, gcc"

COMMANDS = {
    CARGO: 'export CARGO_HOME="$PWD/cargo" CARGO_TARGET_DIR="$PWD/app/target"; cd app; cargo build --offline --quiet',
    NPM: 'cache="$PWD/npm-cache"; cd npm-project; npm ci --offline --no-audit --no-fund --loglevel=error --cache "$cache"',
    GIT: "git clone -q --no-local repository.git checkout; git -C checkout status --porcelain",
    MAKE: 'make -s -C c -j"$(nproc)"; ./c/program >/dev/null',
}


def programs(subject, material, record):
    path = subject.fork()
    run(["tar", "x", "-C", path, "-f", material.programs])
    subject.commit(path)
    subject.origin = material.programs
    # What a compiler wrapper or a job of the caller's would add is not measured.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CARGO_", "RUSTC_", "npm_config_"))}
    for phase, command in COMMANDS.items():
        path = fork_usable(subject)
        measure(record, subject, phase, lambda: sh(command, path, environment))
        subject.discard(path)
