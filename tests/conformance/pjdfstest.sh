# What POSIX says of each call: pjdfstest, on a fork of a version that is not empty.

run_pjdfstest() {
  crate pjdfstest 0.2.2
  give_base pjdfstest
  check "pjdfstest: plain fork" pjdfstest_on "$work/pjdfstest-plain"
  check "pjdfstest: fork with ACLs" pjdfstest_on "$work/pjdfstest-acl" --acl
}

# Runs all cases: pjdfstest_on PATH [FORK OPTION]... Every case not on the list of exclusions must pass, and none of those on it may.
pjdfstest_on() {
  local mount=$1 second="$work/second" tools="$work/tools"
  shift
  mounted "$mount" pjdfstest "$@"
  mkdir -p "$second" "$tools"
  mount -t tmpfs second "$second"
  # Else mount(8) leaves a remount to a helper of FUSE, which knows none.
  printf '#!/bin/sh\nexec /usr/bin/mount --internal-only "$@"\n' >"$tools/mount"
  chmod +x "$tools/mount"
  # Some cases keep files open for writing to the end, so those that remount read-only have a process of their own.
  pjdfstest_config false >"$work/pjdfstest.toml"
  pjdfstest_config true >"$work/erofs.toml"
  {
    PATH="$tools:$PATH" "$TOOLS/bin/pjdfstest" -c "$work/pjdfstest.toml" -p "$mount" -s "$second" &&
      PATH="$tools:$PATH" "$TOOLS/bin/pjdfstest" -c "$work/erofs.toml" -p "$mount" -s "$second" erofs
  } | tee "$work/pjdfstest.out"
  local all
  all=$(awk '$1 ~ /::/ && $2 ~ /^(ok|FAILED|skipped)$/ { if ($2 == "ok") ok[$1]; all[$1] }
    END { for (name in all) print (name in ok ? "ok" : "not-ok"), name }' "$work/pjdfstest.out")
  umount "$second"
  forkvol commit "$mount"
  echo "not passed (<: as the list says, >: as it was):"
  diff <(grep -v '^#' tests/conformance/pjdfstest-exclusions | cut -d' ' -f1 | sort) \
    <(sed -n 's/^not-ok //p' <<<"$all" | sort)
  echo "summary: $(grep -c '^ok' <<<"$all") cases passed, $(grep -c '^not-ok' <<<"$all") excluded"
}

pjdfstest_config() {
  cat <<CONFIG
[features]
posix_fallocate = {}
rename_ctime = {}
utimensat = {}
utime_now = {}
[settings]
naptime = 0.01
allow_remount = $1
[dummy_auth]
entries = [["nobody", "$(id -gn nobody)"], ["daemon", "$(id -gn daemon)"]]
CONFIG
}
