# Many programs that misuse a filesystem at once: stress-ng's stressors of the classes filesystem and io, side by side on one
# fork that is committed again and again meanwhile.

# Left out: bind-mount and binderfs mount on their own, fanotify watches the whole machine, procfs, eventfd and ioprio use no
# file of the fork, rawdev wants a disk; fiemap and verity ask for ioctls that FUSE does not have.
STRESSORS=(access aio aiol chattr chdir chmod chown copy-file dentry dir dirdeep dirmany dnotify dup fallocate fcntl
  file-ioctl filename flock fpunch fsize fstat getdent handle hdd inode-flags inotify io-uring iomix lease link locka lockf
  lockofd mknod open readahead rename revio seek symlink sync-file touch utime xattr)

run_stress() {
  local seconds=180
  [[ -z $short ]] || seconds=20
  give_base stress
  check "stress: ${#STRESSORS[@]} stressors" stress "$seconds"
}

stress() {
  local mount="$work/stress" stressors=() name before commits pid
  before=$(daemon_files)
  mounted "$mount" stress --acl
  for name in "${STRESSORS[@]}"; do
    stressors+=("--$name" 1)
  done
  # With an absolute path io-uring's stressor fails on every filesystem.
  (cd "$mount" && exec stress-ng --temp-path . --verify --timeout "$1" "${stressors[@]}") >"$work/stress.out" 2>&1 &
  pid=$!
  commits=$(commits_during "$pid" "$mount")
  wait "$pid" || { cat "$work/stress.out"; exit 1; }
  cat "$work/stress.out"
  # What leaves itself out has been left out above, with its reason.
  diff <(grep skipping "$work/stress.out") /dev/null
  forkvol commit "$mount"
  # Nothing is left of the fork, whose folder goes in the background, and nothing of its commits but what they hold.
  for _ in {1..100}; do
    [[ -z $(ls "$FORKVOL_STORE/forks") ]] && break
    sleep 0.1
  done
  diff <(ls "$FORKVOL_STORE/forks") /dev/null
  local after
  after=$(daemon_files)
  ((after <= before)) || { echo "the daemon has $after files open, $before before"; exit 1; }
  forkvol gc
  echo "summary: $1 seconds, $commits commits meanwhile"
}
