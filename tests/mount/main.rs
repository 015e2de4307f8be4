//! Forks on real mounts: what programs see through the kernel. Needs root and /dev/fuse.

#![allow(clippy::unwrap_used)]

mod common;
mod differential;
mod exerciser;
mod folders;
mod gone;
mod inherited;
mod manual;
mod posix;
mod push;
mod writers;
