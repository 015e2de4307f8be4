//! Safe wrappers around the system calls that the standard library does not offer. The only user of `libc` and of `unsafe`.
//!
//! Every wrapper takes and returns owned or borrowed descriptors, bytes and numbers, never raw pointers, and turns errno into
//! [`std::io::Error`].

#![allow(unsafe_code)]

pub mod lent;
pub mod mount;
pub mod namespace;
pub mod process;
pub mod socket;

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

/// Turns the -1 of a system call into the error it stands for.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Reads at `offset` until the buffer is full or the file ends; returns how many bytes were read.
pub fn read_full_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Gives the blocks under `[offset, offset + length)` back to the disk; they read as zeros, the file keeps its length.
pub fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_PUNCH_HOLE, offset, length)
}

/// Takes room of the disk for `[offset, offset + length)`, whatever the length of the file, which stays as it is.
pub fn take_room(file: &File, offset: u64, length: u64) -> io::Result<()> {
    fallocate(file, 0, offset, length)
}

fn fallocate(file: &File, mode: libc::c_int, offset: u64, length: u64) -> io::Result<()> {
    let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
    let (offset, length) = (to_off(offset)?, to_off(length)?);
    // SAFETY: the descriptor is open for the length of the call; no memory is passed.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) }).map(drop)
}

/// A file is cut down in steps of this size before it is unlinked, so that the disk is never held for long.
const STEP: u64 = 64 << 20;

/// Removes a file bit by bit, or only this name of it if it has others.
pub fn remove_slowly(path: &Path) -> io::Result<()> {
    let file = File::options().write(true).open(path)?;
    let metadata = file.metadata()?;
    let mut len = metadata.len();
    while metadata.nlink() < 2 && len > STEP {
        len -= STEP;
        file.set_len(len)?;
    }
    fs::remove_file(path)
}

/// What was done to a file, if it was there.
pub fn unless_gone(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Begins to write back all that is dirty of a file, without waiting for it.
pub fn begin_writeback(file: &File) -> io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WRITE;
    // SAFETY: the descriptor is open for the length of the call; no memory is passed.
    check(unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) }).map(drop)
}

fn to_off(n: u64) -> io::Result<libc::off_t> {
    n.try_into()
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Writes back what the filesystem under `file` holds dirty, and waits for it.
pub fn syncfs(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the call.
    check(unsafe { libc::syncfs(file.as_raw_fd()) }).map(drop)
}

/// The room of a filesystem, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    pub total: u64,
    /// What is left for a user without privileges.
    pub available: u64,
}

/// Returns the room of the filesystem that holds `path`.
pub fn room(path: &Path) -> io::Result<Room> {
    let path = c_path(path)?;
    // SAFETY: all-zero bytes are a valid statvfs.
    let mut out: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends in NUL and `out` is writable for the length of the call.
    check(unsafe { libc::statvfs(path.as_ptr(), &raw mut out) })?;
    Ok(Room {
        total: out.f_blocks * out.f_frsize,
        available: out.f_bavail * out.f_frsize,
    })
}

/// Has a part of a file read into the page cache, without waiting for it.
pub fn will_need(file: &File, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: it takes numbers alone.
    let error = unsafe {
        libc::posix_fadvise(
            file.as_raw_fd(),
            offset as libc::off_t,
            len as libc::off_t,
            libc::POSIX_FADV_WILLNEED,
        )
    };
    match error {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Returns how many pages of a file are in the page cache.
///
/// # Errors
/// `Unsupported` before Linux 6.5.
pub fn cached_pages(file: &File) -> io::Result<u64> {
    /// The number of cachestat, which is the same wherever numbers are given to all architectures alike; the structures are those
    /// of linux/mman.h.
    const CACHESTAT: libc::c_long = 451;
    let all = [0_u64; 2];
    let mut counts = [0_u64; 5];
    // SAFETY: both arrays have the layout of the structures that the call takes, of u64 alone, and live through it.
    let done = unsafe {
        libc::syscall(
            CACHESTAT,
            file.as_raw_fd(),
            all.as_ptr(),
            counts.as_mut_ptr(),
            0,
        )
    };
    check(done as libc::c_int)?;
    Ok(counts[0])
}

/// What kind of filesystem a folder lies on, as far as a store cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FsKind {
    Nfs,
    Smb,
    Fuse,
    Overlay,
    Tmpfs,
    Other,
}

impl std::fmt::Display for FsKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            FsKind::Nfs => "NFS",
            FsKind::Smb => "SMB",
            FsKind::Fuse => "FUSE",
            FsKind::Overlay => "an overlay",
            FsKind::Tmpfs => "tmpfs",
            FsKind::Other => "a disk",
        })
    }
}

impl FsKind {
    /// The field's width and sign differ between C libraries; the magic numbers are 32 bits wide.
    fn of_magic(magic: u32) -> FsKind {
        match magic {
            0x6969 => FsKind::Nfs,
            0x517b | 0xff53_4d42 | 0xfe53_4d42 => FsKind::Smb,
            0x6573_5546 => FsKind::Fuse,
            0x794c_7630 => FsKind::Overlay,
            0x0102_1994 => FsKind::Tmpfs,
            _ => FsKind::Other,
        }
    }

    /// Whether locks and syncs may not mean there what a database takes them for.
    pub fn is_unsafe(self) -> bool {
        matches!(self, FsKind::Nfs | FsKind::Smb | FsKind::Fuse)
    }
}

/// Returns the kind of filesystem that holds `path`.
pub fn fs_kind(path: &Path) -> io::Result<FsKind> {
    let path = c_path(path)?;
    // SAFETY: all-zero bytes are a valid statfs.
    let mut out: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends in NUL and `out` is writable for the length of the call.
    check(unsafe { libc::statfs(path.as_ptr(), &raw mut out) })?;
    Ok(FsKind::of_magic(out.f_type as u32))
}

/// Idle cores poll for work instead of sleeping, for as long as this lives: a request to the kernel's power management.
#[derive(Debug)]
pub struct AwakeCores(
    #[expect(dead_code, reason = "the request lasts as long as the file is open")] File,
);

impl AwakeCores {
    /// # Errors
    /// EACCES for whoever is not privileged; ENOENT on kernels and in containers without the device.
    pub fn hold() -> io::Result<AwakeCores> {
        let mut file = File::options().write(true).open("/dev/cpu_dma_latency")?;
        // The longest latency that is borne, in microseconds.
        file.write_all(&0_i32.to_ne_bytes())?;
        Ok(AwakeCores(file))
    }
}

/// Nanoseconds since 1970.
pub fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Returns the id of this boot of the machine, or of this container where it has one of its own.
pub fn boot_id() -> io::Result<&'static str> {
    static ID: OnceLock<String> = OnceLock::new();
    if let Some(id) = ID.get() {
        return Ok(id);
    }
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(ID.get_or_init(|| id.trim().to_owned()))
}

/// Bytes of the kernel's random number generator.
pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut buffer = [0; N];
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        // SAFETY: `rest` is writable for its length.
        let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(n) {
            Ok(n) => done += n,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(buffer)
}

/// Lets the calling thread give way to others that want its core: whoever waits for a request goes before a commit's work. Nothing is
/// lost where the kernel refuses.
pub fn step_back() {
    const STEP: libc::c_int = 10;
    // SAFETY: no memory is passed; 0 means the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, STEP) };
}

/// Lets the calling thread run, and use the disk, only when nobody else wants to.
pub fn idle_priority() -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_IDLE: libc::c_int = 3 << 13;
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: pid 0 is the calling thread; the parameters outlive the call.
    check(unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) })?;
    // SAFETY: plain numbers; 0 is the calling thread.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_IDLE) };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Runs `work` at normal priority in a thread of idle priority, as far as it may: for as long as it holds a lock that others wait
/// for, and no longer.
pub fn at_normal_priority<T>(work: impl FnOnce() -> T) -> T {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread; the parameters outlive the call.
    let set = |policy| unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } == 0;
    // SAFETY: a plain number; 0 is the calling thread.
    let is_idle = unsafe { libc::sched_getscheduler(0) } == libc::SCHED_IDLE;
    let raised = is_idle && set(libc::SCHED_OTHER);
    let result = work();
    if raised {
        set(libc::SCHED_IDLE);
    }
    result
}

/// Returns the major and minor number of a device number as stat gives it.
pub fn device_numbers(dev: u64) -> (u32, u32) {
    (libc::major(dev), libc::minor(dev))
}

/// Returns the device numbers of a descriptor that is a character device.
pub fn char_device(fd: impl AsFd) -> io::Result<Option<(u32, u32)>> {
    // SAFETY: all-zero bytes are a valid stat.
    let mut out: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is borrowed for the call and `out` is writable.
    check(unsafe { libc::fstat(fd.as_fd().as_raw_fd(), &raw mut out) })?;
    let is_char = out.st_mode & libc::S_IFMT == libc::S_IFCHR;
    Ok(is_char.then(|| device_numbers(out.st_rdev)))
}

/// Returns whether reads of the descriptor's open file answer EAGAIN instead of waiting.
pub fn is_nonblocking(fd: impl AsFd) -> io::Result<bool> {
    // SAFETY: the descriptor is borrowed for the call.
    let flags = check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GETFL) })?;
    Ok(flags & libc::O_NONBLOCK != 0)
}

/// Raises the soft limit of open files to the hard one; returns it.
pub fn raise_open_files() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is writable for the length of the call.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is readable for the length of the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    Ok(limit.rlim_cur)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_punched_hole_reads_as_zeros_and_frees_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spool");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.write_all_at(&[7; 64 << 10], 0).unwrap();
        file.sync_all().unwrap();
        let before = file.metadata().unwrap().blocks();
        punch_hole(&file, 4096, 32 << 10).unwrap();
        let after = file.metadata().unwrap();
        assert_eq!(after.len(), 64 << 10);
        assert!(
            after.blocks() < before,
            "{} of {before} blocks left",
            after.blocks()
        );
        let mut buffer = [1; 8192];
        assert_eq!(read_full_at(&file, &mut buffer, 0).unwrap(), 8192);
        assert_eq!((buffer[4095], buffer[4096]), (7, 0));
        assert_eq!(
            read_full_at(&file, &mut buffer, (64 << 10) - 10).unwrap(),
            10
        );
    }

    #[test]
    fn facts_about_this_machine() {
        assert_eq!(boot_id().unwrap().len(), 36);
        assert!(room(Path::new("/")).unwrap().total > 0);
        assert_eq!(fs_kind(Path::new("/proc")).unwrap(), FsKind::Other);
        assert!(room(Path::new("/nowhere/at/all")).is_err());
        assert_ne!(random().unwrap(), [0; 32]);
    }

    #[test]
    fn what_is_no_place_for_a_store_is_known_by_its_number() {
        for (magic, kind, is_unsafe) in [
            (0x6969, FsKind::Nfs, true),
            (0xff53_4d42, FsKind::Smb, true),
            (0xfe53_4d42, FsKind::Smb, true),
            (0x6573_5546, FsKind::Fuse, true),
            (0x794c_7630, FsKind::Overlay, false),
            (0x0102_1994, FsKind::Tmpfs, false),
            (0xef53, FsKind::Other, false),
            (0x9123_683e, FsKind::Other, false),
        ] {
            let found = FsKind::of_magic(magic);
            assert_eq!((found, found.is_unsafe()), (kind, is_unsafe), "{magic:#x}");
        }
    }

    #[test]
    fn a_character_device_is_known_by_its_numbers() {
        let null = File::open("/dev/null").unwrap();
        assert_eq!(char_device(&null).unwrap(), Some((1, 3)));
        assert!(!is_nonblocking(&null).unwrap());
        let dir = File::open("/").unwrap();
        assert_eq!(char_device(&dir).unwrap(), None);
    }

    #[test]
    fn a_thread_may_step_back() {
        // SAFETY: a plain number; 0 is the calling thread.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        let test = move || {
            idle_priority().unwrap();
            let within = at_normal_priority(policy);
            (within, policy())
        };
        let (within, after) = std::thread::spawn(test).join().unwrap();
        assert_eq!(after, libc::SCHED_IDLE);
        // Only who may go back goes back.
        assert!(
            within == libc::SCHED_OTHER || (within == after && crate::sys::process::euid() != 0)
        );
    }
}
