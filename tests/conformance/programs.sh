# Programs that people run, on forks with a base, against the same on the host's filesystem.

run_programs() {
  give_base programs
  check "programs: dpkg" program_dpkg
  check "programs: rsync and tar" program_archives
  check "programs: git" program_git
  local mode
  for mode in wal delete truncate persist; do
    check "programs: sqlite, journal mode $mode" program_sqlite "$mode"
  done
  check "programs: cargo" program_cargo
  check "programs: npm" program_npm
  check "programs: pip" program_pip
}

# Names, kinds, modes, owners, targets, link counts and content of a tree; with "times" also what a copy must keep to the bit.
listing() {
  (
    cd "$1"
    find . \( -type d -printf '%p %y %m %U %G\n' \) -o -printf '%p %y %m %U %G %n %s %l\n' | LC_ALL=C sort
    find . -type f -exec sha256sum {} + | LC_ALL=C sort -k 2
    if [[ ${2:-} == times ]]; then
      find . -printf '%p %T@\n' | LC_ALL=C sort
      find . \( -type c -o -type b \) -exec stat -c '%n %t %T' {} + | LC_ALL=C sort
      # Which names are one file: the first name of each stands for its number.
      find . -type f -links +1 -printf '%i %p\n' | LC_ALL=C sort -k 2 | awk '{ if (!($1 in first)) first[$1] = $2; print $2, first[$1] }'
      find . ! -type l -print0 | LC_ALL=C sort -z | xargs -0 getfacl -np
      find . -print0 | LC_ALL=C sort -z | xargs -0 getfattr -hd -e hex -m '^(user|trusted|security)'
    fi
  )
}

same() {
  diff <(listing "$1" "${3:-}") <(listing "$2" "${3:-}")
}

# Commits the fork at a path and mounts the next one there.
again() {
  forkvol commit "$1" >/dev/null
  mounted "$1" programs --acl
}

# > Inode numbers, change times and modification times survive a commit bit for bit, so git, make, cargo and rsync stay warm.
program_git() {
  local mount="$work/git" host="$work/git-host" origin="$work/origin" where
  export HOME="$work" GIT_CONFIG_NOSYSTEM=1
  git config --global user.name tester
  git config --global user.email tester@example.org
  git config --global init.defaultBranch main
  git config --global gc.auto 0
  git init -q "$origin"
  (
    cd "$origin"
    local round file
    for round in $(seq 20); do
      for file in $(seq 40); do
        mkdir -p "folder$((file % 7))"
        echo "$round $((file * round % 11))" >>"folder$((file % 7))/file$file"
      done
      ln -sf "folder$round" link
      git add -A
      git commit -qm "round $round"
    done
    git checkout -qb other HEAD~10
    seq 100000 >large
    chmod +x large
    git add -A
    git commit -qm other
    git checkout -q main
  )
  mounted "$mount" programs --acl
  mkdir "$host"
  for where in "$mount" "$host"; do
    git clone -q "$origin" "$where/clone"
    git -C "$where/clone" checkout -q other
  done
  again "$mount"
  for where in "$mount" "$host"; do
    (
      cd "$where/clone"
      git checkout -q main
      git merge -q --no-edit -X theirs origin/other
      git gc -q
      git fsck --full --strict
      git stash list
      git status --short
      git worktree add -q ../tree other
    )
  done
  diff -r --no-dereference -x .git "$mount/clone" "$host/clone"
  diff -r --no-dereference -x .git "$mount/tree" "$host/tree"
  # Files older than the index, so that only what stat says can tell git that they are unchanged.
  git -C "$mount/clone" ls-files -z | (cd "$mount/clone" && xargs -0 touch -hd 2001-02-03)
  git -C "$mount/clone" status --short
  again "$mount"
  (
    cd "$mount/clone"
    strace -f -e trace=open,openat,openat2 -o "$work/git-status" git status --short
    git ls-files | sort >"$work/git-files"
    sed -n 's/.*open[^"]*"\([^"]*\)".*/\1/p' "$work/git-status" | sort >"$work/git-opened"
    grep -q '\.git/index$' "$work/git-opened"
    diff <(comm -12 "$work/git-files" "$work/git-opened") /dev/null
    git fsck --full --strict
  )
  forkvol commit "$mount"
  echo "summary: $(wc -l <"$work/git-files") files, none re-read by status in the next fork"
}

# Prints the number of a volume's head.
head_of() {
  forkvol log "$1" --json >"$work/log"
  grep -o '"number":[0-9]*' "$work/log" | cut -d: -f2 | sort -n | tail -n 1
}

program_sqlite() {
  local mode=$1 mount="$work/sqlite-$1" load="tests/conformance/sqlite-load.py" pid commits transactions=1000 version first
  [[ -z $short ]] || transactions=100
  mounted "$mount" programs
  python3 "$load" "$mount/$mode.db" "$mode" 50
  again "$mount"
  first=$(head_of programs)
  python3 "$load" "$mount/$mode.db" "$mode" "$transactions" &
  pid=$!
  commits=$(commits_during "$pid" "$mount")
  wait "$pid"
  again "$mount"
  python3 "$load" "$mount/$mode.db"
  # Every version is a state that the database recovers from, however the commit hit its transactions.
  for version in $(seq "$first" 20 "$(head_of programs)"); do
    mounted "$mount-then" programs --from "programs@$version"
    python3 "$load" "$mount-then/$mode.db"
    forkvol abandon "$mount-then"
  done
  forkvol commit "$mount"
  echo "summary: 3 writers of $transactions transactions, 2 readers, $commits commits meanwhile, one version in 20 recovered"
}

# Everything that a tree can hold.
make_tree() {
  mkdir -p "$1/deep/$(printf 'd%.0s' {1..200})/er" "$1/empty" "$1/acl"
  (
    cd "$1"
    echo text >file
    : >nothing
    chmod 6755 file
    head -c 3000000 /dev/urandom >random
    ln random deep/random
    ln random again
    ln -s ../nowhere dangling
    ln -s "$(printf 'x%.0s' {1..3000})" long
    mkfifo pipe
    mknod null c 1 3
    mknod disk b 7 200
    python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'
    touch -- "$(printf 'n%.0s' {1..255})" $'new\nline' $'not\xffutf8' ' space ' '-dash' 'back\slash'
    truncate -s 50M sparse
    printf here | dd of=sparse bs=1 seek=20000001 conv=notrunc status=none
    printf end >>sparse
    setfattr -n user.text -v value file
    setfattr -n user.large -v "0x$(printf 'ab%.0s' {1..3000})" file
    setfattr -n trusted.folder -v x empty
    setfattr -hn trusted.link -v y dangling
    setfacl -m u:4242:rwx,g:4343:r,m:rx file
    setfacl -d -m u:4242:rwx acl
    setfacl -m u:1:x acl
    chown -h 11:12 dangling pipe
    chown 4000000000:4000000001 nothing
    local at=0
    find . -depth -print0 | while IFS= read -rd '' name; do
      at=$((at + 1))
      touch -hd "$((1950 + at % 90))-01-02 03:04:05.$((123456789 + at))" "$name"
    done
  )
}

# > Inode numbers, change times and modification times survive a commit bit for bit, so git, make, cargo and rsync stay warm.
program_archives() {
  local mount="$work/archives" host="$work/archives-host"
  make_tree "$host"
  mounted "$mount" programs --acl
  mkdir "$mount/tar" "$mount/rsync"
  rsync -aHAXS --numeric-ids "$host/" "$mount/rsync/"
  tar c --xattrs --xattrs-include='*' --acls --numeric-owner --sparse --format=posix -C "$host" . 2>"$work/tar-says" |
    tar x --xattrs --xattrs-include='*' --acls --numeric-owner -p -C "$mount/tar"
  # tar leaves sockets out, and says so.
  rm "$mount/rsync/socket" "$host/socket"
  touch -d 1965-02-03 "$host" "$mount/rsync" "$mount/tar"
  local round copy
  for round in before after; do
    same "$host" "$mount/rsync" times
    same "$host" "$mount/tar" times
    [[ $round == after ]] || again "$mount"
  done
  # Holes are holes still, and what rsync and tar read from a fork is the tree again.
  (($(stat -c %b "$mount/rsync/sparse") * 512 <= 16384))
  (($(stat -c %b "$mount/tar/sparse") * 512 <= 16384))
  diff <(rsync -aHAXni --checksum --delete --numeric-ids "$host/" "$mount/rsync/") /dev/null
  mkdir "$work/archives-back"
  tar c --xattrs --xattrs-include='*' --acls --numeric-owner --sparse --format=posix -C "$mount/rsync" . |
    tar x --xattrs --xattrs-include='*' --acls --numeric-owner -p -C "$work/archives-back"
  same "$host" "$work/archives-back" times
  forkvol commit "$mount"
  echo "summary: $(find "$host" | wc -l) nodes"
}

# > Inode numbers, change times and modification times survive a commit bit for bit, so git, make, cargo and rsync stay warm.
program_cargo() {
  local mount="$work/cargo" compiled
  mounted "$mount" programs
  mkdir -p "$mount/project/src" "$mount/project/part/src"
  (
    cd "$mount/project"
    printf '[package]\nname = "project"\nversion = "0.1.0"\nedition = "2021"\n[dependencies]\npart = { path = "part" }\n[workspace]\n' >Cargo.toml
    printf '[package]\nname = "part"\nversion = "0.1.0"\nedition = "2021"\n' >part/Cargo.toml
    echo 'fn main() { println!("{}", part::answer()); }' >src/main.rs
    echo 'pub fn answer() -> u32 { include_str!(concat!(env!("OUT_DIR"), "/n")).parse().unwrap() }' >part/src/lib.rs
    printf 'fn main() {\n println!("cargo:rerun-if-changed=build.rs");\n std::fs::write(std::env::var("OUT_DIR").unwrap() + "/n", "42").unwrap();\n}\n' >part/build.rs
    CARGO_TARGET_DIR=target cargo build --offline
  )
  again "$mount"
  compiled=$(cd "$mount/project" && CARGO_TARGET_DIR=target cargo build --offline -v 2>&1)
  echo "$compiled"
  [[ $compiled == *"Fresh part"* && $compiled == *"Fresh project"* && $compiled != *Compiling* && $compiled != *Dirty* ]]
  [[ $("$mount/project/target/debug/project") == 42 ]]
  echo "// changed" >>"$mount/project/src/main.rs"
  compiled=$(cd "$mount/project" && CARGO_TARGET_DIR=target cargo build --offline -v 2>&1)
  [[ $compiled == *"Fresh part"* && $compiled == *"Compiling project"* ]]
  forkvol abandon "$mount"
}

program_npm() {
  local mount="$work/npm" host="$work/npm-host" where
  export HOME="$work/npm-home"
  mkdir -p "$HOME"
  cp -r scripts/quickstart-project "$host"
  mounted "$mount" programs
  cp -r scripts/quickstart-project "$mount/npm"
  for where in "$host" "$mount/npm"; do
    (cd "$where" && npm ci --no-audit --no-fund --loglevel=error)
  done
  again "$mount"
  same "$host/node_modules" "$mount/npm/node_modules"
  (cd "$mount/npm" && npm ls --all >/dev/null && npm run --silent build)
  (cd "$host" && npm run --silent build)
  same "$host/dist" "$mount/npm/dist"
  echo "summary: $(find "$host/node_modules" | wc -l) entries"
  forkvol abandon "$mount"
}

program_pip() {
  local mount="$work/pip" host="$work/pip-host" where
  mounted "$mount" programs
  mkdir "$host"
  for where in "$mount" "$host"; do
    python3 -m pip install --quiet --disable-pip-version-check --no-compile --target "$where/packages" requests==2.32.3 idna==3.10 certifi==2024.8.30 urllib3==2.2.3 charset-normalizer==3.4.0
  done
  again "$mount"
  same "$host/packages" "$mount/packages"
  (cd / && PYTHONPATH="$mount/packages" python3 -c 'import requests; print(requests.__version__)')
  echo "summary: $(find "$host/packages" | wc -l) entries"
  forkvol abandon "$mount"
}

program_dpkg() {
  local mount="$work/dpkg" host="$work/dpkg-host"
  (
    mkdir "$work/packages"
    chmod 777 "$work/packages"
    cd "$work/packages"
    apt-get download -qq coreutils tzdata sudo
  )
  mounted "$mount" programs
  mkdir "$host"
  local package
  for package in "$work"/packages/*.deb; do
    dpkg -x "$package" "$mount/dpkg"
    dpkg -x "$package" "$host/dpkg"
  done
  # dpkg gives links, and folders that two packages have, the time of its run.
  find "$host/dpkg" "$mount/dpkg" \( -type l -o -type d \) -exec touch -hd 2001-02-03 {} +
  again "$mount"
  same "$host/dpkg" "$mount/dpkg" times
  echo "summary: $(find "$host" | wc -l) entries"
  forkvol abandon "$mount"
}
