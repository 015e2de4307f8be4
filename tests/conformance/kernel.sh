# A Linux kernel, unpacked on a fork, built small, and found built by the next fork. Takes long: by hand.

run_kernel() {
  scripts/setup kernel
  give_base kernel
  check "kernel: tinyconfig" kernel_tiny
}

# > Inode numbers, change times and modification times survive a commit bit for bit, so git, make, cargo and rsync stay warm.
kernel_tiny() {
  local mount="$work/kernel" again
  mounted "$mount" kernel --size 20g
  tar x -C "$mount" -f /usr/src/linux-source-*.tar.xz
  mv "$mount"/linux-source-* "$mount/linux"
  make -C "$mount/linux" -s tinyconfig
  forkvol commit "$mount"
  mounted "$mount" kernel --size 20g
  make -C "$mount/linux" -s -j"$(nproc)"
  sha256sum "$mount/linux/vmlinux"
  forkvol commit "$mount"
  mounted "$mount" kernel --size 20g
  again=$(make -C "$mount/linux" -j"$(nproc)")
  echo "$again"
  # A warm build compiles nothing and links nothing.
  if grep -E '^ +(CC|LD|AS|AR) ' <<<"$again"; then
    exit 1
  fi
  echo "summary: $(find "$mount/linux" -name '*.o' | wc -l) object files, none built again by the next fork"
  forkvol abandon "$mount"
}
