# Random calls on one file, checked byte by byte: fsx from outside, with mappings and sendfile, and the project's own
# exerciser, with O_DIRECT, zeroed ranges, copies between files and new forks that go on with the same files.

run_fsx() {
  crate fsx 0.3.2
  give_base fsx
  local seeds=(1 2) calls=10000
  if [[ -z $short ]]; then
    seeds=(1 2 3 4 5 6)
    calls=50000
  fi
  local kind seed
  for seed in "${seeds[@]}"; do
    for kind in small aligned; do
      check "fsx: $kind, seed $seed" fsx_on "$kind" "$seed" "$calls"
    done
  done
  if [[ -z $short ]]; then
    for seed in 11 12; do
      check "fsx: large, seed $seed" fsx_on large "$seed" 50000
      check "fsx: unsynced, seed $seed" fsx_on unsynced "$seed" 50000
    done
    check "fsx: a base of 1 GiB, seed 21" fsx_on_gibibyte 21 50000
    check "fsx: own exerciser" cargo test --profile "$PROFILE" --test mount -- --ignored --nocapture exerciser_long
  fi
}

# Settings by kind: sizes, alignment, and whether mapped stores are synced one by one. With an alignment fsx asks for
# reservations of no bytes, which are an error, so it makes none then.
fsx_config() {
  local reserve=3
  [[ $1 != aligned ]] || reserve=0
  case "$1" in
    small) ;;
    aligned) echo "opsize = { max = 65536, align = 4096 }" ;;
    large) echo "flen = 67108864"; echo "opsize = { max = 1048576 }" ;;
    unsynced) echo "nomsyncafterwrite = true" ;;
  esac
  cat <<CONFIG
[weights]
close_open = 1
invalidate = 1
mapread = 10
mapwrite = 10
read = 10
write = 10
truncate = 5
fsync = 1
fdatasync = 1
posix_fallocate = $reserve
punch_hole = 5
sendfile = 3
posix_fadvise = 2
copy_file_range = 5
CONFIG
}

# Runs fsx on a fork that is committed again and again meanwhile, and on the host's filesystem: the same seed makes the same
# file, also as the next fork has it.
fsx_on() {
  local kind=$1 seed=$2 calls=$3 mount="$work/fsx-$1-$2"
  fsx_config "$kind" >"$mount.toml"
  mounted "$mount" fsx
  "$TOOLS/bin/fsx" -f "$mount.toml" -S "$seed" -N "$calls" -P "$LOGS" "$mount/fsx-$kind" &
  local pid=$! commits
  commits=$(commits_during "$pid" "$mount")
  wait "$pid"
  "$TOOLS/bin/fsx" -f "$mount.toml" -S "$seed" -N "$calls" -P "$LOGS" "$mount.host"
  cmp "$mount/fsx-$kind" "$mount.host"
  forkvol commit "$mount"
  mounted "$mount" fsx
  cmp "$mount/fsx-$kind" "$mount.host"
  rm "$mount.host"
  forkvol abandon "$mount"
  echo "summary: $calls calls, $commits commits meanwhile"
}

# fsx in its mode for devices, on a file of 1 GiB that it finds: nearly all calls meet pages that a commit has made base.
fsx_on_gibibyte() {
  local seed=$1 calls=$2 mount="$work/fsx-gibibyte"
  {
    echo "blockmode = true"
    echo "opsize = { max = 262144 }"
    fsx_config - | sed '/^close_open/d; /^truncate/s/5/0/; /^posix_fallocate/s/3/0/'
  } >"$mount.toml"
  mounted "$mount" fsx
  dd if=/dev/urandom of="$mount/large" bs=1M count=1024 status=none
  forkvol commit "$mount"
  mounted "$mount" fsx
  "$TOOLS/bin/fsx" -f "$mount.toml" -S "$seed" -N "$calls" -P "$LOGS" "$mount/large" &
  local pid=$! commits
  commits=$(commits_during "$pid" "$mount")
  wait "$pid"
  sha256sum "$mount/large" | cut -d' ' -f1 >"$mount.sum"
  forkvol commit "$mount"
  mounted "$mount" fsx
  sha256sum "$mount/large" | cut -d' ' -f1 | cmp - "$mount.sum"
  forkvol abandon "$mount"
  echo "summary: $calls calls, $commits commits meanwhile"
}
