//! Which fork a mount is of, as the table of mounts says.

use std::ffi::OsStr;

use crate::protocol::Mount;
use crate::sys::device_numbers;
use crate::sys::mount::{FS_TYPE, MountPoint};

/// What a mount is given as its source. No name of a volume has a colon.
pub fn name(volume: &str, fork: &str) -> String {
    format!("forkvol:{volume}:{fork}")
}

/// The fork that a mount's source names; None for a mount of an older version.
pub fn fork_of(found: &MountPoint) -> Option<&str> {
    let source: &OsStr = &found.source;
    let (_, fork) = source.to_str()?.strip_prefix("forkvol:")?.split_once(':')?;
    Some(fork)
}

/// Whether what is mounted somewhere is this mount, or bound of it. The number alone does not say it: the kernel gives it to the next
/// mount as soon as this one is gone. Where the fork is not known it has to do.
pub fn is_of(found: &MountPoint, mount: &Mount) -> bool {
    let other = |(named, known)| named != known;
    found.kind == FS_TYPE
        && found.device == device_numbers(mount.device)
        && !fork_of(found).zip(mount.fork.as_deref()).is_some_and(other)
}
