//! Answers: from what a fork shows to what the kernel is told.

use std::cell::RefCell;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, Generation, INodeNo, ReplyEmpty, ReplyEntry, ReplyXattr};

use super::Mount;
use super::errno::{errno, report};
use crate::fork::error::FsError;
use crate::fs::Entry;
use crate::record::{Attr, Ino, Kind, Nanos};

/// A fork has one writer, its own mount, so the kernel may keep what it was told.
pub const FOREVER: Duration = Duration::from_secs(1 << 30);

/// Gives `fill` so many bytes of room, which the thread keeps: to be given fresh memory for each megabyte takes longer than to
/// fill it.
pub fn with_room(size: usize, fill: impl FnOnce(&mut [u8])) {
    thread_local! {
        static ROOM: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    ROOM.with_borrow_mut(|room| {
        if room.len() < size {
            room.resize(size, 0);
        }
        fill(&mut room[..size]);
    });
}

fn system_time(time: Nanos) -> SystemTime {
    if time >= 0 {
        UNIX_EPOCH + Duration::from_nanos(time as u64)
    } else {
        UNIX_EPOCH - Duration::from_nanos(time.unsigned_abs())
    }
}

/// Returns the time that a SETATTR carried, or the nearest that can be kept: fuser takes the fraction of one before 1970 away
/// instead of adding it.
pub fn sent(time: SystemTime) -> Nanos {
    let (seconds, fraction) = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => (i128::from(after.as_secs()), after.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            (-i128::from(before.as_secs()), before.subsec_nanos())
        }
    };
    let nanos = seconds * 1_000_000_000 + i128::from(fraction);
    nanos.clamp(Nanos::MIN.into(), Nanos::MAX.into()) as Nanos
}

pub fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Fifo => FileType::NamedPipe,
        Kind::CharDevice => FileType::CharDevice,
        Kind::Directory => FileType::Directory,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::File => FileType::RegularFile,
        Kind::Symlink => FileType::Symlink,
        Kind::Socket => FileType::Socket,
    }
}

pub fn file_attr(ino: Ino, attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino.0),
        size: attr.size,
        blocks: attr.blocks,
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: system_time(attr.btime),
        kind: file_type(attr.kind),
        perm: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: 4096,
        flags: 0,
    }
}

/// An entry without inode: the kernel remembers that there is nothing of that name.
pub fn nothing() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

impl Mount {
    /// How long the kernel may trust attributes: never those that grant rights, for a write by another may have taken them, nor
    /// those of a file that another session changes.
    pub fn ttl(&self, ino: Ino, attr: &Attr) -> Duration {
        // Where it cannot be told, it is shared.
        if attr.is_privileged() || self.fs.is_shared(ino, attr).unwrap_or(true) {
            Duration::ZERO
        } else {
            FOREVER
        }
    }

    pub fn fail(&self, what: &str, error: &FsError) -> Errno {
        report(what, error);
        if let FsError::Store(damage) = error {
            self.fs.fork.note_damage(damage);
        }
        errno(error)
    }

    pub fn answer_entry(&self, what: &str, reply: ReplyEntry, result: Result<Entry, FsError>) {
        match result {
            Ok(entry) => {
                let attr = file_attr(self.node(entry.ino), &entry.attr);
                reply.entry_with_ttls(
                    &self.ttl(entry.ino, &entry.attr),
                    &FOREVER,
                    &attr,
                    Generation(0),
                );
            }
            Err(error) => reply.error(self.fail(what, &error)),
        }
    }

    pub fn answer_empty(&self, what: &str, reply: ReplyEmpty, result: Result<(), FsError>) {
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(self.fail(what, &error)),
        }
    }
}

/// Answers with what was asked for of extended attributes, or with how long that is.
pub fn answer_xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>, Errno>) {
    match value {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_taken_to_the_nanosecond_or_to_the_nearest_that_can_be_kept() {
        const SECOND: Nanos = 1_000_000_000;
        for (seconds, fraction, expected) in [
            (2, 500_000_000, -3 * SECOND / 2),
            (
                9_223_372_037,
                500_000_000,
                -9_223_372_036 * SECOND - SECOND / 2,
            ),
            (9_223_372_037, 3, Nanos::MIN),
            (9_300_000_000, 3, Nanos::MIN),
            (1 << 62, 0, Nanos::MIN),
        ] {
            let time = UNIX_EPOCH - Duration::new(seconds, fraction);
            assert_eq!(sent(time), expected, "{seconds} {fraction}");
        }
        assert_eq!(sent(UNIX_EPOCH + Duration::new(7, 5)), 7 * SECOND + 5);
        assert_eq!(sent(UNIX_EPOCH + Duration::new(1 << 62, 5)), Nanos::MAX);
    }
}
