# What a daemon takes while it serves many forks, and what it keeps when they are gone: threads, open files, memory, folders.

run_resources() {
  local rounds=1000 forks=100
  if [[ -n $short ]]; then
    rounds=80
    forks=30
  fi
  check "resources: $rounds rounds" rounds_leave_nothing "$rounds"
  check "resources: $forks forks at once with 1024 descriptors" many_at_once "$forks"
  check "resources: too few descriptors" too_few_descriptors
}

# What the daemon has of something: of /proc/PID/status, or its open files.
daemon_has() {
  local pid
  pid=$(daemon_pid)
  case "$1" in
    files) daemon_files ;;
    *) awk -v what="$1:" '$1 == what { print $2 }' "/proc/$pid/status" ;;
  esac
}

# Waits until the daemon has no more of something than so much; what is over goes in the background.
falls_to() {
  local what=$1 most=$2 tries
  for ((tries = 0; tries < 200; tries++)); do
    (($(daemon_has "$what") > most)) || return 0
    sleep 0.1
  done
  echo "the daemon has $(daemon_has "$what") of $what, and had $most" >&2
  return 1
}

no_folder_is_left() {
  local tries
  for ((tries = 0; tries < 200; tries++)); do
    [[ -n $(ls "$FORKVOL_STORE/forks") ]] || return 0
    sleep 0.1
  done
  ls "$FORKVOL_STORE/forks" >&2
  return 1
}

# Forks that are written, read and dropped: after a tenth of them, which fills what is filled once, nothing grows.
rounds_leave_nothing() {
  local rounds=$1 round mount="$work/round" before_threads before_files before_memory
  give_base resources
  for ((round = 0; round < rounds; round++)); do
    mounted "$mount" resources
    cat "$mount/src/lib.rs" >/dev/null
    mkdir "$mount/new"
    head -c 2000000 /dev/zero >"$mount/new/file"
    forkvol abandon "$mount" >/dev/null
    if ((round == rounds / 10)); then
      no_folder_is_left
      sleep 1
      before_threads=$(daemon_has Threads)
      before_files=$(daemon_has files)
      before_memory=$(daemon_has VmRSS)
    fi
  done
  no_folder_is_left
  falls_to Threads "$before_threads"
  falls_to files "$before_files"
  # In KiB: what an allocator keeps is not told from what is lost, but 1000 rounds that lose 16 KiB each are.
  falls_to VmRSS $((before_memory + 16384))
  echo "summary: $(daemon_has Threads) threads, $(daemon_has files) open files, $((($(daemon_has VmRSS) - before_memory))) KiB more"
}

# A store of its own whose daemon may open so many files; it ends with the check.
with_descriptors() {
  ulimit -n "$1"
  export FORKVOL_STORE="$work/descriptors-$1"
  trap 'forkvol abandon --all >/dev/null; forkvol daemon stop --force >/dev/null' EXIT
}

# Many live forks, each with its own content; half are committed at once, half abandoned.
many_at_once() {
  local forks=$1 n pids=()
  with_descriptors 1024
  give_base many
  local before_threads before_files
  before_threads=$(daemon_has Threads)
  before_files=$(daemon_has files)
  for ((n = 0; n < forks; n++)); do
    mounted "$work/many-$n" "many/$((n % 7))" --from many
    echo "$n" >"$work/many-$n/own"
  done
  [[ $(forkvol forks --json | grep -o '"state":"live"' | wc -l) == "$forks" ]]
  for ((n = 0; n < forks; n++)); do
    [[ $(<"$work/many-$n/own") == "$n" ]]
    cmp "$work/many-$n/src/lib.rs" src/lib.rs
  done
  for ((n = 0; n < forks; n += 2)); do
    forkvol commit "$work/many-$n" >/dev/null &
    pids+=($!)
  done
  for n in "${pids[@]}"; do
    wait "$n"
  done
  local files
  files=$(daemon_has files)
  for ((n = 1; n < forks; n += 2)); do
    [[ $(<"$work/many-$n/own") == "$n" ]]
    forkvol abandon "$work/many-$n" >/dev/null
  done
  no_folder_is_left
  falls_to Threads "$before_threads"
  falls_to files "$before_files"
  forkvol check
  echo "summary: $files open files with half of them"
}

# Where no more files can be opened the next fork is refused in one line, and all others go on.
too_few_descriptors() {
  local n made=0 line
  with_descriptors 200
  give_base few
  for ((n = 0; n < 200; n++)); do
    if ! line=$(forkvol fork few "$work/few-$n" 2>&1); then
      break
    fi
    made=$((made + 1))
    echo "$n" >"$work/few-$n/own"
  done
  ((made > 10 && made < 200))
  [[ $line == "forkvol: "* && $(wc -l <<<"$line") -le 2 ]]
  for ((n = 0; n < made; n++)); do
    [[ $(<"$work/few-$n/own") == "$n" ]]
    echo more >>"$work/few-$n/own"
  done
  # What ends gives its own back, so that commits go on, and forks behind them.
  forkvol abandon "$work/few-0" >/dev/null
  forkvol abandon "$work/few-1" >/dev/null
  for ((n = 2; n < made; n++)); do
    forkvol commit "$work/few-$n" >/dev/null
  done
  no_folder_is_left
  mounted "$work/few-again" few
  diff <(printf '%s\nmore\n' "$((made - 1))") "$work/few-again/own"
  forkvol abandon "$work/few-again" >/dev/null
  forkvol check
  echo "summary: $made forks with 200 descriptors, then: $line"
}
