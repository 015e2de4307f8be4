//! Mounting and unmounting FUSE filesystems, and the kernel's table of mounts.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{c_path, check, process, socket};

/// The device through which a FUSE filesystem is served.
pub const FUSE_DEVICE: &str = "/dev/fuse";
/// Major and minor number of [`FUSE_DEVICE`].
pub const FUSE_NUMBERS: (u32, u32) = (10, 229);

/// How a fork is mounted.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// What the table of mounts names as its source.
    pub source: String,
    pub read_only: bool,
    pub suid: bool,
    pub dev: bool,
    /// Other users than the one who mounts may enter.
    pub allow_other: bool,
}

/// The type that the table of mounts shows.
pub const FS_TYPE: &str = "fuse.forkvol";

/// Opens the FUSE device.
pub fn open_fuse() -> io::Result<File> {
    File::options().read(true).write(true).open(FUSE_DEVICE)
}

/// Mounts with mount(2); the filesystem is usable once somebody serves `fuse`.
pub fn mount_fuse(fuse: &File, at: &Path, options: &Options) -> io::Result<()> {
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        fuse.as_raw_fd(),
        process::euid(),
        process::egid()
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let mut flags = 0;
    for (set, flag) in [
        (options.read_only, libc::MS_RDONLY),
        (!options.suid, libc::MS_NOSUID),
        (!options.dev, libc::MS_NODEV),
    ] {
        if set {
            flags |= flag;
        }
    }
    mount(Some(&options.source), at, Some(FS_TYPE), flags, Some(&data))
}

/// Binds the folder `from` over the folder `to`.
pub fn bind(from: &Path, to: &Path) -> io::Result<()> {
    mount(Some(from.as_os_str()), to, None, libc::MS_BIND, None)
}

/// Makes a bind read-only; the mount that it is of stays as it is.
pub fn make_bind_read_only(at: &Path) -> io::Result<()> {
    let flags =
        libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV;
    mount(None::<&str>, at, None, flags, None)
}

/// Lets mounts from outside come into this mount namespace, and none of this one go out.
pub(super) fn make_slave() -> io::Result<()> {
    mount(
        None::<&str>,
        Path::new("/"),
        None,
        libc::MS_REC | libc::MS_SLAVE,
        None,
    )
}

fn mount(
    source: Option<impl AsRef<OsStr>>,
    at: &Path,
    kind: Option<&str>,
    flags: libc::c_ulong,
    data: Option<&str>,
) -> io::Result<()> {
    let source = source
        .map(|s| CString::new(s.as_ref().as_bytes()))
        .transpose()?;
    let kind = kind.map(CString::new).transpose()?;
    let data = data.map(CString::new).transpose()?;
    let at = c_path(at)?;
    let pointer = |s: &Option<CString>| s.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
    // SAFETY: every pointer is null or a NUL-terminated string that outlives the call.
    check(unsafe {
        libc::mount(
            pointer(&source),
            at.as_ptr(),
            pointer(&kind),
            flags,
            pointer(&data).cast(),
        )
    })
    .map(drop)
}

/// What fusermount3 answered.
#[derive(Debug)]
pub enum HelperError {
    /// It is not installed.
    Missing,
    /// It refused, with these words.
    Refused(String),
    Io(io::Error),
}

impl From<io::Error> for HelperError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => HelperError::Missing,
            _ => HelperError::Io(error),
        }
    }
}

/// Mounts through fusermount3, which gives the rights that an ordinary user lacks; returns the open device.
pub fn mount_with_helper(at: &Path, options: &Options) -> Result<OwnedFd, HelperError> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut list = format!(
        "fsname={},subtype=forkvol,default_permissions,{},{}",
        options.source,
        if options.suid { "suid" } else { "nosuid" },
        if options.dev { "dev" } else { "nodev" },
    );
    if options.read_only {
        list.push_str(",ro");
    }
    if options.allow_other {
        list.push_str(",allow_other");
    }
    let number = theirs.as_raw_fd();
    let mut command = Command::new("fusermount3");
    command.arg("-o").arg(list).arg("--").arg(at);
    command.env("_FUSE_COMMFD", number.to_string());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // SAFETY: fcntl is async-signal-safe and the descriptor is open in the child, which shares the parent's table by copy.
    unsafe {
        command.pre_exec(move || check(libc::fcntl(number, libc::F_SETFD, 0)).map(drop));
    }
    let output = process::with_clean_mask(&mut command).output()?;
    drop(theirs);
    if !output.status.success() {
        return Err(HelperError::Refused(words(&output.stderr)));
    }
    let mut fds = Vec::new();
    socket::receive_with_fds(&ours, &mut [0], &mut fds)?;
    fds.pop()
        .ok_or_else(|| HelperError::Refused("it sent no descriptor".into()))
}

/// Unmounts through fusermount3, lazily: users of the mount keep what they have open.
pub fn unmount_with_helper(at: &Path) -> Result<(), HelperError> {
    let mut command = Command::new("fusermount3");
    command.args(["-u", "-z", "--"]).arg(at);
    let output = process::with_clean_mask(command.stdin(Stdio::null())).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(HelperError::Refused(words(&output.stderr)))
}

fn words(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let line = text.lines().next().unwrap_or("it gave no reason").trim();
    line.strip_prefix("fusermount3: ")
        .unwrap_or(line)
        .to_owned()
}

/// Unmounts and ends the connection, so that whoever still has it open gets errors; EBUSY while somebody has.
pub fn unmount_abort(at: &Path) -> io::Result<()> {
    unmount(at, libc::MNT_FORCE)
}

/// Takes a bind away; EBUSY while somebody uses it.
pub fn unbind(at: &Path) -> io::Result<()> {
    unmount(at, 0)
}

/// Takes a bind out of sight at once; it goes when nobody uses it.
pub fn unbind_lazily(at: &Path) -> io::Result<()> {
    unmount(at, libc::MNT_DETACH)
}

/// As [`unmount_abort`], and takes the mount out of sight at once however busy it is.
pub fn detach_abort(at: &Path) -> io::Result<()> {
    unmount(at, libc::MNT_FORCE | libc::MNT_DETACH)
}

fn unmount(at: &Path, flags: libc::c_int) -> io::Result<()> {
    let at = c_path(at)?;
    // SAFETY: the path ends in NUL and outlives the call.
    check(unsafe { libc::umount2(at.as_ptr(), flags | libc::UMOUNT_NOFOLLOW) }).map(drop)
}

/// Returns a descriptor that keeps the filesystem mounted at `at` alive when it is unmounted, without making that mount busy.
///
/// # Errors
/// EPERM for whoever may not mount.
pub fn hold_filesystem(at: &Path) -> io::Result<OwnedFd> {
    let at = c_path(at)?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_SYMLINK_NOFOLLOW as u32;
    // SAFETY: the path ends in NUL and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, at.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and numbers of descriptors are small.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// As [`hold_filesystem`], for a mount that will be taken away lazily.
pub fn hold_mount(at: &Path) -> io::Result<OwnedFd> {
    let path_only = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let mut options = File::options();
    Ok(options.read(true).custom_flags(path_only).open(at)?.into())
}

/// Returns the device mounted at `path` without asking the filesystem, which may not be served yet, or not any more.
pub fn device_at(path: &Path) -> io::Result<(u32, u32)> {
    let path = c_path(path)?;
    let flags = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT | libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: all-zero bytes are a valid statx.
    let mut out: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends in NUL and `out` is writable for the length of the call.
    check(unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, 0, &raw mut out) })?;
    Ok((out.stx_dev_major, out.stx_dev_minor))
}

/// Joins a device's numbers as stat(2) does.
pub fn device_number((major, minor): (u32, u32)) -> u64 {
    libc::makedev(major, minor)
}

/// One line of a table of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPoint {
    pub device: (u32, u32),
    pub path: PathBuf,
    pub kind: String,
    pub source: OsString,
    pub super_options: String,
    /// The group of mounts that are made and taken away together, if it is in one.
    pub peers: Option<u64>,
    /// The group that it follows, if it follows one.
    pub master: Option<u64>,
}

/// Returns the mounts that this process sees, a mount later in the list lying on top of earlier ones at the same path.
pub fn mounts() -> io::Result<Vec<MountPoint>> {
    Ok(parse_mountinfo(&fs::read("/proc/self/mountinfo")?))
}

/// Returns the mounts that the process `pid` sees.
pub fn mounts_of(pid: u32) -> io::Result<Vec<MountPoint>> {
    Ok(parse_mountinfo(&fs::read(format!(
        "/proc/{pid}/mountinfo"
    ))?))
}

fn parse_mountinfo(text: &[u8]) -> Vec<MountPoint> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountPoint> {
    let mut fields = line.split(|b| *b == b' ').skip(2);
    let device = str::from_utf8(fields.next()?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let path = unescape(fields.nth(1)?);
    // Optional fields come after the mount's options and end with a lone dash.
    let optional: Vec<&[u8]> = fields.by_ref().skip(1).take_while(|f| *f != b"-").collect();
    let group = |name: &str| {
        let value = |f: &&[u8]| f.strip_prefix(name.as_bytes()).map(<[u8]>::to_vec);
        let digits = String::from_utf8(optional.iter().find_map(value)?).ok()?;
        digits.parse().ok()
    };
    let (peers, master) = (group("shared:"), group("master:"));
    Some(MountPoint {
        peers,
        master,
        device: (major.parse().ok()?, minor.parse().ok()?),
        path: PathBuf::from(OsString::from_vec(path)),
        kind: String::from_utf8_lossy(fields.next()?).into_owned(),
        source: OsString::from_vec(unescape(fields.next()?)),
        super_options: String::from_utf8_lossy(fields.next().unwrap_or_default()).into_owned(),
    })
}

/// The kernel writes space, tab, newline, backslash and hash as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let digits = tail
            .get(..3)
            .filter(|d| byte == b'\\' && d.iter().all(|b| (b'0'..b'8').contains(b)));
        match digits {
            Some(digits) => {
                out.push(
                    digits
                        .iter()
                        .fold(0_u8, |n, d| n.wrapping_mul(8).wrapping_add(d - b'0')),
                );
                rest = &tail[3..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

/// Checks that a descriptor that came from somebody else can be served: the FUSE device, and reads of it wait.
pub fn is_servable(fd: impl AsFd) -> io::Result<bool> {
    let fd = fd.as_fd();
    Ok(super::char_device(fd)? == Some(FUSE_NUMBERS) && !super::is_nonblocking(fd)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_are_read_with_their_escapes() {
        let text = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n\
            99 36 0:57 / /a\\040b\\134c rw - fuse.forkvol forkvol:x/y rw,user_id=0\n\
            short line\n";
        let mounts = parse_mountinfo(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].device, (98, 0));
        assert_eq!(mounts[0].path, Path::new("/mnt2"));
        assert_eq!(mounts[0].kind, "ext3");
        assert_eq!(mounts[1].path, Path::new("/a b\\c"));
        assert_eq!(mounts[1].source, "forkvol:x/y");
        assert_eq!(mounts[1].super_options, "rw,user_id=0");
    }

    proptest::proptest! {
        #[test]
        fn hostile_tables_are_passed_over_line_by_line(bytes in crate::hostile::bytes(proptest::prelude::Just(
            b"36 35 98:0 /mnt1 /a\\040b rw,noatime master:1 - ext3 /dev/root rw\n99 36 0:57 / /c rw - fuse.forkvol forkvol:x rw\n".to_vec()
        ))) {
            let last = b"\n7 1 0:9 / /last rw - tmpfs none rw\n";
            let mounts = parse_mountinfo(&[&bytes[..], last].concat());
            let found = mounts.last().map(|mount| mount.path.as_path());
            assert_eq!(found, Some(Path::new("/last")));
            let lines = bytes.split(|b| *b == b'\n').count();
            assert!(mounts.len() <= lines + 1);
        }
    }

    #[test]
    fn this_process_sees_its_root() {
        let mounts = mounts().unwrap();
        let proc = mounts
            .iter()
            .rfind(|m| m.path == Path::new("/proc"))
            .unwrap();
        assert_eq!(device_at(Path::new("/proc")).unwrap(), proc.device);
    }

    #[test]
    fn what_is_not_the_fuse_device_is_not_served() {
        assert!(!is_servable(File::open("/dev/null").unwrap()).unwrap());
        let (pipe, _writer) = io::pipe().unwrap();
        assert!(!is_servable(pipe).unwrap());
    }

    #[test]
    fn the_first_line_of_the_helper_is_its_answer() {
        let text = b"fusermount3: user has no write access to mountpoint /x\nmore\n";
        assert_eq!(words(text), "user has no write access to mountpoint /x");
        assert_eq!(words(b""), "it gave no reason");
    }
}
