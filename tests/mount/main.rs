//! Forks on real mounts: what programs see through the kernel. Needs root and /dev/fuse.

mod common;
mod differential;
mod posix;
