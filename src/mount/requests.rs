//! How many requests of each kind a session answered.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

const KINDS: [&str; 33] = [
    "lookup",
    "forget",
    "getattr",
    "setattr",
    "readlink",
    "mknod",
    "mkdir",
    "unlink",
    "rmdir",
    "symlink",
    "rename",
    "link",
    "open",
    "opendir",
    "read",
    "write",
    "flush",
    "fsync",
    "fsyncdir",
    "readdir",
    "readdirplus",
    "statfs",
    "setxattr",
    "getxattr",
    "listxattr",
    "removexattr",
    "access",
    "create",
    "ioctl",
    "fallocate",
    "lseek",
    "copy_file_range",
    // Asked by nobody: a file that was pushed.
    "store",
];

/// Counters by kind of request.
#[derive(Debug)]
pub struct Requests {
    kinds: [AtomicU64; KINDS.len()],
    read: AtomicU64,
}

impl Default for Requests {
    fn default() -> Self {
        Requests {
            kinds: [const { AtomicU64::new(0) }; KINDS.len()],
            read: AtomicU64::new(0),
        }
    }
}

impl Requests {
    /// Counts one request.
    pub fn count(&self, kind: &'static str) {
        // The names are literals of one binary: mostly the pointers are equal.
        if let Some(at) = KINDS
            .iter()
            .position(|k| k.len() == kind.len() && *k == kind)
        {
            self.kinds[at].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts bytes that were read.
    pub fn count_read(&self, bytes: usize) {
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// How many bytes were read.
    pub fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Returns the counts that are not zero.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        let counts = self.kinds.iter().map(|count| count.load(Ordering::Relaxed));
        KINDS
            .into_iter()
            .zip(counts)
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}
