//! Mountpoints: what may become one, mounting a fork there, and taking it away again.

mod explain;
mod source;

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::client::Client;
use super::exit;
use super::holders;
use super::output::warn;
use super::place::{Place, real_path};
use super::values::Busy;
use crate::protocol::{Bytes, Code, Failure, Mount, Request, Serve};
use crate::sys::mount::{self as kernel, HelperError, MountPoint, Options};
use crate::sys::{namespace, process};
use explain::Guards;
pub use explain::{device as explain_device, hidden_from_engine};
pub use source::is_of;

const ENOTCONN: i32 = 107;
const ENODEV: i32 = 19;
const EBUSY: i32 = 16;
const EINVAL: i32 = 22;

/// Folders that the system or its users cannot do without: nothing is put over them.
const SACRED: [&str; 30] = [
    "/",
    "/dev/shm",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/home",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/media",
    "/mnt",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/usr/bin",
    "/usr/lib",
    "/usr/sbin",
    "/usr/share",
    "/var",
    "/var/lib",
    "/var/log",
    "/var/tmp",
];
/// Nothing at all is put below these.
const SACRED_TREES: [&str; 3] = ["/proc", "/sys", "/dev"];

/// A folder that a fork can be mounted on.
#[derive(Debug)]
pub struct Mountpoint {
    pub path: PathBuf,
    /// It was made for this fork.
    pub created: bool,
}

/// Refuses a path that would take something vital away. `path` has no links.
pub fn refuse_dangerous(path: &Path, place: &Place) -> Result<(), Failure> {
    let refuse = |why: &str, hint: &str| {
        Err(Failure::new(
            Code::Policy,
            format!("{} may not be covered: {why}", path.display()),
        )
        .hint(hint))
    };
    let below = "choose a folder below it";
    if SACRED_TREES.iter().any(|s| path.starts_with(s)) && !path.starts_with("/dev/shm/") {
        let hint = match path == Path::new("/dev/shm") {
            true => below,
            false => "choose a folder elsewhere, as below your home",
        };
        return refuse("it belongs to the kernel", hint);
    }
    if SACRED.iter().any(|s| path == Path::new(s)) {
        return refuse("the system needs it", below);
    }
    let home = process::home().and_then(|home| fs::canonicalize(home).ok());
    if home.is_some_and(|home| home.starts_with(path)) {
        return refuse("your home lies in it", below);
    }
    if let Place::Embedded { store, .. } = place
        && (store.starts_with(path) || path.starts_with(store))
    {
        return Err(Failure::new(
            Code::Policy,
            format!(
                "{} may not be covered: the store {} lies there",
                path.display(),
                store.display()
            ),
        ));
    }
    Ok(())
}

impl Mountpoint {
    /// Checks that a fork can be mounted at `path`, and makes its last component if it is missing.
    pub fn prepare(path: &Path, place: &Place) -> Result<Mountpoint, Failure> {
        let failed = |code, why: &str| {
            Failure::new(code, format!("cannot mount on {}: {why}", path.display()))
        };
        match fs::metadata(path) {
            Ok(metadata) if !metadata.is_dir() => Err(failed(Code::Failed, "it is not a folder")),
            Ok(_) => {
                let path =
                    fs::canonicalize(path).map_err(|e| failed(Code::Failed, &e.to_string()))?;
                refuse_dangerous(&path, place)?;
                if let Some(on_top) = topmost(&path)?.filter(|m| m.kind == kernel::FS_TYPE) {
                    let source = on_top.source.to_string_lossy();
                    let why = format!("{source} is mounted there already");
                    return Err(failed(Code::Busy, &why).hint("commit or abandon that fork first"));
                }
                let mut entries =
                    fs::read_dir(&path).map_err(|e| failed(Code::Failed, &e.to_string()))?;
                if entries.next().is_some() {
                    return Err(failed(Code::Failed, "it is not empty").hint(
                        "choose an empty folder, or use forkvol run -p, which hides what is there",
                    ));
                }
                Ok(Mountpoint {
                    path,
                    created: false,
                })
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if fs::symlink_metadata(path).is_ok() {
                    return Err(failed(Code::Failed, "it is a link that leads nowhere"));
                }
                let path = real_path(path).map_err(|e| failed(Code::Failed, &e.to_string()))?;
                refuse_dangerous(&path, place)?;
                match DirBuilder::new().mode(0o755).create(&path) {
                    Ok(()) => Ok(Mountpoint {
                        path,
                        created: true,
                    }),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {
                        Err(failed(Code::Failed, "the folder above it does not exist")
                            .hint("only the last component is created"))
                    }
                    Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                        Err(failed(Code::Failed, &e.to_string())
                            .hint("choose a folder of your own"))
                    }
                    Err(e) => Err(failed(Code::Failed, &e.to_string())),
                }
            }
            Err(e) if e.raw_os_error() == Some(ENOTCONN) => {
                Err(failed(Code::Busy, "a mount there has lost its daemon")
                    .hint(format!("umount -l {}", path.display())))
            }
            Err(e) => Err(failed(Code::Failed, &e.to_string())),
        }
    }

    /// Removes the folder if it was made for the fork.
    pub fn remove_if_created(&self) {
        if self.created
            && let Err(error) = fs::remove_dir(&self.path)
        {
            warn(&format!("cannot remove {}: {error}", self.path.display()));
        }
    }
}

/// Returns what is mounted on top at exactly this path.
fn topmost(path: &Path) -> Result<Option<MountPoint>, Failure> {
    let mounts = kernel::mounts().map_err(|e| {
        Failure::new(
            Code::Failed,
            format!("cannot read the table of mounts: {e}"),
        )
    })?;
    Ok(mounts.into_iter().rfind(|m| m.path == path))
}

/// How a fork is to be mounted.
#[derive(Clone, Debug)]
pub struct Manner {
    pub volume: String,
    pub read_only: bool,
    pub suid: bool,
    pub dev: bool,
    /// What still serves the same, out of sight, is to end.
    pub instead: bool,
    pub by: By,
}

/// Whose rights a mount takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The caller's own: root, or a user in a user namespace of its own.
    Caller,
    /// Those of fusermount3.
    Helper,
}

impl By {
    pub fn default_for_caller() -> By {
        if process::euid() == 0 {
            By::Caller
        } else {
            By::Helper
        }
    }
}

/// Mounts `fork`, or a folder of it, and lets the daemon serve it. When this returns it can be used, and the daemon alone holds its device.
pub fn mount(
    client: &mut Client,
    fork: &str,
    folder: &Bytes,
    at: &Mountpoint,
    manner: &Manner,
) -> Result<Mount, Failure> {
    let fuse = attach(&at.path, fork, manner)?;
    let served = serve(client, fork, folder, at, manner.instead, &fuse);
    if served.is_err() {
        // The device goes first: an unmount asks nobody then.
        drop(fuse);
        if let Err(failure) = take_away(&at.path, manner.by) {
            warn(&failure.message);
        }
    }
    let mount = served?;
    read_ahead(mount.device);
    Ok(mount)
}

fn serve(
    client: &mut Client,
    fork: &str,
    folder: &Bytes,
    at: &Mountpoint,
    instead: bool,
    fuse: &OwnedFd,
) -> Result<Mount, Failure> {
    let device = kernel::device_at(&at.path).map_err(|e| {
        Failure::new(
            Code::Failed,
            format!("cannot look at the mount {}: {e}", at.path.display()),
        )
    })?;
    let mount = Mount {
        path: Bytes(at.path.as_os_str().as_bytes().to_vec()),
        folder: folder.clone(),
        device: kernel::device_number(device),
        created: at.created,
        uid: Some(process::euid()),
        namespace: namespace::of_mounts(None),
        fork: Some(fork.into()),
    };
    let serve = Serve {
        fork: fork.into(),
        folder: folder.clone(),
        mountpoint: mount.path.clone(),
        device: mount.device,
        created: mount.created,
        namespace: mount.namespace,
        instead,
    };
    client.call_with_fd(&Request::Serve(serve), Some(fuse.as_fd()))?;
    Ok(mount)
}

/// Makes the mount; returns the device through which it is to be served.
fn attach(at: &Path, fork: &str, manner: &Manner) -> Result<OwnedFd, Failure> {
    let options = Options {
        source: source::name(&manner.volume, fork),
        read_only: manner.read_only,
        suid: manner.suid,
        dev: manner.dev,
        allow_other: manner.by == By::Caller || user_allow_other(),
    };
    let cannot = |why: String| {
        Failure::new(
            Code::Failed,
            format!("cannot mount on {}: {why}", at.display()),
        )
    };
    match manner.by {
        By::Caller => {
            let fuse = kernel::open_fuse().map_err(|e| explain::device(&e))?;
            match kernel::mount_fuse(&fuse, at, &options) {
                Ok(()) => Ok(fuse.into()),
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                    let (why, hint) = explain::forbidden(&e, &Guards::of_this_process());
                    Err(cannot(why).hint(hint))
                }
                Err(e) if e.raw_os_error() == Some(ENODEV) => {
                    Err(cannot("this kernel has no FUSE".into()).hint("modprobe fuse"))
                }
                Err(e) => Err(cannot(e.to_string())),
            }
        }
        By::Helper => kernel::mount_with_helper(at, &options).map_err(|error| match error {
            HelperError::Missing => cannot("fusermount3 is not installed".into())
                .hint("install the package fuse3, or run as root"),
            HelperError::Refused(words) => explain::refusal(at, &words),
            HelperError::Io(e) => cannot(format!("fusermount3: {e}")),
        }),
    }
}

/// Whether ordinary users may open their mounts to others.
pub fn user_allow_other() -> bool {
    fs::read_to_string("/etc/fuse.conf")
        .is_ok_and(|text| text.lines().any(|line| line.trim() == "user_allow_other"))
}

/// The kernel reads 128 KiB ahead unless told; only root may tell, and nothing is lost where it may not.
fn read_ahead(device: u64) {
    if process::euid() == 0 {
        let (major, minor) = crate::sys::device_numbers(device);
        fs::write(
            format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"),
            "1024",
        )
        .ok();
    }
}

/// Waits, or fails, where the caller wants no busy mount to be taken away. Called before a commit.
pub fn respect_busy(mount: &Mount, busy: Busy) -> Result<(), Failure> {
    let begun = Instant::now();
    let patience = match busy {
        Busy::Detach => return Ok(()),
        Busy::Fail => Duration::ZERO,
        Busy::Wait(time) => time,
    };
    loop {
        let holders = holders::of(mount);
        if holders.is_empty() {
            return Ok(());
        }
        if begun.elapsed() >= patience {
            let message = format!(
                "{} is in use by {}",
                mount_path(mount).display(),
                holders::list(&holders)
            );
            return Err(Failure::new(Code::Busy, message).hint("end them, or use --busy detach"));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

pub fn mount_path(mount: &Mount) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(&mount.path.0))
}

/// Takes a bind of a fork's mount away; who still uses it is named in a warning.
pub fn unbind(at: &Path, mount: &Mount) {
    match kernel::unbind(at) {
        Err(e) if e.raw_os_error() == Some(EBUSY) => warn_of_holders(mount),
        // Whoever it was put there for has taken it away.
        Err(e) if e.raw_os_error() == Some(EINVAL) => {}
        Err(e) => warn(&format!("cannot unbind {}: {e}", at.display())),
        Ok(()) => {}
    }
}

/// As [`unbind`], and out of sight at once however busy it is.
pub fn unbind_at_once(at: &Path, mount: &Mount) {
    if let Err(e) = kernel::unbind(at) {
        if e.raw_os_error() == Some(EBUSY) {
            warn_of_holders(mount);
        }
        if let Err(e) = kernel::unbind_lazily(at) {
            warn(&format!("cannot unbind {}: {e}", at.display()));
        }
    }
}

/// Whether this mount, or a bind of it, is on top at a path.
pub fn is_on_top(path: &Path, mount: &Mount) -> bool {
    topmost(path).is_ok_and(|found| found.is_some_and(|found| is_of(&found, mount)))
}

/// Unmounts a fork that has been committed or abandoned. It never fails: what it could not do, or whom it took the mount from, is
/// a warning.
pub fn detach(client: &mut Client, mount: &Mount) {
    detach_by(Some(client), mount, By::default_for_caller());
}

/// As [`detach`]. Without a client this process itself waits until the kernel has dropped all it remembers of the mount.
pub fn detach_by(client: Option<&mut Client>, mount: &Mount, by: By) {
    let path = mount_path(mount);
    match topmost(path) {
        Ok(Some(on_top)) if is_of(&on_top, mount) => {}
        Ok(Some(other)) => {
            let what = other.source.to_string_lossy();
            return warn(&format!(
                "{} is not unmounted: {what} is mounted there now",
                path.display()
            ));
        }
        // Unmounted by somebody else, or mounted in a namespace that is not ours.
        Ok(None) => return remove_folder(mount),
        Err(failure) => return warn(&failure.message),
    }
    match by {
        By::Caller => unbind_all(mount),
        By::Helper => warn_of_holders(mount),
    }
    // Where nothing can be held the unmount takes a moment longer.
    let held = match by {
        By::Caller => kernel::hold_filesystem(path).ok(),
        By::Helper => kernel::hold_mount(path).ok(),
    };
    let result = match by {
        By::Caller => match kernel::unmount_abort(path) {
            Err(e) if e.raw_os_error() == Some(EBUSY) => {
                warn_of_holders(mount);
                take_away(path, by)
            }
            Err(e) => Err(cannot_unmount(path, &e.to_string())),
            // A mount that another namespace has of its own, as a container's, stays there.
            Ok(()) => {
                warn_of_holders(mount);
                Ok(())
            }
        },
        By::Helper => take_away(path, by),
    };
    if let (Some(client), Some(held)) = (client, held)
        && let Err(failure) = client.call_with_fd(&Request::Detached, Some(held.as_fd()))
    {
        warn(&failure.message);
    }
    match result {
        Ok(()) => remove_folder(mount),
        Err(failure) => warn(&exit::line(&failure)),
    }
}

/// Removes the folder that was made for a mount: of who mounted it alone, for he may have said so of somebody else's. Where users
/// have other numbers than for the daemon nobody is more than himself.
fn remove_folder(mount: &Mount) {
    let at = Mountpoint {
        path: mount_path(mount).into(),
        created: mount.created,
    };
    let is_his = |folder: fs::Metadata| {
        let is_of = |uid| folder.uid() == uid || namespace::uid_map().is_some();
        folder.is_dir() && mount.uid.is_none_or(is_of)
    };
    if at.created && fs::symlink_metadata(&at.path).is_ok_and(is_his) {
        at.remove_if_created();
    }
}

/// Takes away what is bound of a mount whose fork is over: nothing can be done there but get errors. Called while that mount is
/// still there: as soon as it is gone, the kernel gives the number of its device to the next one, whosever that is.
fn unbind_all(mount: &Mount) {
    let mounts = kernel::mounts().unwrap_or_default();
    for bind in binds_of(&mounts, mount) {
        if is_on_top(&bind.path, mount)
            && let Err(e) = kernel::unbind_lazily(&bind.path)
        {
            warn(&format!("cannot unbind {}: {e}", bind.path.display()));
        }
    }
}

/// What is bound of a mount; nothing if the mount itself is not there any more.
fn binds_of<'a>(mounts: &'a [MountPoint], mount: &Mount) -> Vec<&'a MountPoint> {
    let path = mount_path(mount);
    let on_top = mounts.iter().rfind(|found| found.path == path);
    if on_top.is_none_or(|found| !is_of(found, mount)) {
        return Vec::new();
    }
    let bound = |found: &&MountPoint| is_of(found, mount) && found.path != path;
    mounts.iter().filter(bound).collect()
}

/// Takes a mount away that was not noted anywhere, if that is what is at a path: one of a fork that is over, though it may still be
/// served, or one that nobody serves.
pub fn clear(path: &Path, over: Option<&str>, by: By) {
    let is_left = |top: MountPoint| {
        top.kind == kernel::FS_TYPE
            && ((over.is_some() && source::fork_of(&top) == over)
                || fs::symlink_metadata(path).is_err_and(|e| e.raw_os_error() == Some(ENOTCONN)))
    };
    if topmost(path).is_ok_and(|top| top.is_some_and(is_left))
        && let Err(failure) = take_away(path, by)
    {
        warn(&exit::line(&failure));
    }
}

pub fn warn_of_holders(mount: &Mount) {
    let holders = holders::of(mount);
    if !holders.is_empty() {
        let (path, list) = (mount_path(mount).display(), holders::list(&holders));
        warn(&format!(
            "{path} was still in use by {list}; it is gone for them"
        ));
    }
}

fn take_away(path: &Path, by: By) -> Result<(), Failure> {
    match by {
        By::Caller => kernel::detach_abort(path).map_err(|e| cannot_unmount(path, &e.to_string())),
        By::Helper => kernel::unmount_with_helper(path).map_err(|error| match error {
            HelperError::Missing => {
                cannot_unmount(path, "fusermount3 is not installed").hint(format!(
                    "install the package fuse3, then fusermount3 -uz {}",
                    path.display()
                ))
            }
            HelperError::Refused(words) => cannot_unmount(path, &words),
            HelperError::Io(e) => cannot_unmount(path, &e.to_string()),
        }),
    }
}

fn cannot_unmount(path: &Path, why: &str) -> Failure {
    Failure::new(
        Code::Failed,
        format!("cannot unmount {}: {why}", path.display()),
    )
}

/// Finds the mount of a fork in which a path lies.
pub fn fork_mount_of(path: &Path) -> Result<MountPoint, Failure> {
    let none = || {
        Failure::new(
            Code::NotFound,
            format!("no fork is mounted at {}", path.display()),
        )
        .hint("see forkvol forks")
    };
    // Nothing inside a mount is looked at, for its daemon may be gone.
    let absolute = std::path::absolute(path).map_err(|_| none())?;
    let resolved = real_path(&absolute).unwrap_or(absolute);
    let mounts = kernel::mounts().map_err(|e| {
        Failure::new(
            Code::Failed,
            format!("cannot read the table of mounts: {e}"),
        )
    })?;
    mounts
        .into_iter()
        .enumerate()
        .filter(|(_, m)| resolved.starts_with(&m.path))
        .max_by_key(|(at, m)| (m.path.components().count(), *at))
        .map(|(_, m)| m)
        .filter(|m| m.kind == kernel::FS_TYPE)
        .ok_or_else(none)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_folder_of_who_said_that_he_made_it_goes_with_his_mount() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("m");
        let own = process::euid();
        for (created, uid, stays) in [
            (true, Some(own), false),
            (true, None, false),
            (true, Some(own + 1), true),
            (false, Some(own), true),
        ] {
            fs::create_dir_all(&folder).unwrap();
            remove_folder(&Mount {
                path: Bytes(folder.as_os_str().as_bytes().to_vec()),
                folder: Bytes(Vec::new()),
                device: 7,
                created,
                uid,
                namespace: None,
                fork: None,
            });
            assert_eq!(folder.exists(), stays, "{created} {uid:?}");
        }
    }

    #[test]
    fn what_has_the_number_of_a_mount_is_bound_of_it_while_that_is_there_and_else_another_s() {
        let named = |path: &str, minor, source: &str| MountPoint {
            path: path.into(),
            device: (0, minor),
            kind: kernel::FS_TYPE.into(),
            source: source.into(),
            super_options: String::new(),
            peers: None,
            master: None,
        };
        let at = |path: &str, minor| named(path, minor, "forkvol:v:f-1");
        let mount = Mount {
            path: Bytes(b"/m".to_vec()),
            folder: Bytes(Vec::new()),
            device: kernel::device_number((0, 50)),
            created: false,
            uid: None,
            namespace: None,
            fork: Some("f-1".into()),
        };
        let there = [at("/", 1), at("/m", 50), at("/b", 50), at("/c", 51)];
        let paths = |mounts: &[MountPoint]| -> Vec<PathBuf> {
            let bound = binds_of(mounts, &mount);
            bound.iter().map(|bind| bind.path.clone()).collect()
        };
        assert_eq!(paths(&there), [Path::new("/b")]);
        // Gone, and the next mount of anybody has its number.
        assert!(paths(&[at("/", 1), at("/other", 50)]).is_empty());
        assert!(paths(&[at("/m", 50), at("/m", 51), at("/other", 50)]).is_empty());
        // The next one came to the same path.
        let next = |path| named(path, 50, "forkvol:v:f-2");
        assert!(paths(&[at("/", 1), next("/m"), next("/b")]).is_empty());
        let other_kind = MountPoint {
            kind: "tmpfs".into(),
            ..at("/m", 50)
        };
        assert!(paths(&[other_kind, at("/b", 50)]).is_empty());
        // A mount of an older version, or one that an older version noted, names no fork.
        let old = |path| named(path, 50, "forkvol:v/w");
        assert_eq!(paths(&[old("/m"), old("/b")]), [Path::new("/b")]);
        let unnamed = Mount {
            fork: None,
            ..mount.clone()
        };
        assert!(is_of(&at("/m", 50), &unnamed));
    }

    fn place() -> Place {
        Place::Embedded {
            store: "/data/store".into(),
            named_by: "--store",
        }
    }

    #[test]
    fn nothing_vital_is_covered() {
        let home = fs::canonicalize(process::home().unwrap()).unwrap();
        for path in [
            "/",
            "/tmp",
            "/usr",
            "/proc/self",
            "/sys/fs",
            "/dev/x",
            "/data",
            "/data/store/forks",
            "/usr/sbin",
            "/var/tmp",
            "/dev/shm",
        ] {
            let failure = refuse_dangerous(Path::new(path), &place()).unwrap_err();
            assert_eq!(failure.code, Code::Policy, "{path}");
            let is_kernel_s =
                SACRED_TREES.iter().any(|tree| path.starts_with(tree)) && path != "/dev/shm";
            let elsewhere = failure.hint.is_some_and(|hint| hint.contains("elsewhere"));
            assert_eq!(elsewhere, is_kernel_s, "{path}");
        }
        assert!(refuse_dangerous(&home, &place()).is_err());
        for path in [
            "/var/tmp/x",
            "/usr/local",
            "/tmp/x",
            "/data/stores",
            "/dev/shm/x",
            "/home/ci/.npm",
        ] {
            refuse_dangerous(Path::new(path), &place()).unwrap();
        }
    }

    #[test]
    fn a_mountpoint_must_be_an_empty_folder() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| Mountpoint::prepare(&dir.path().join(name), &place());
        fs::write(dir.path().join("file"), "").unwrap();
        fs::create_dir_all(dir.path().join("full/entry")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("dangling")).unwrap();
        for (name, why) in [
            ("file", "not a folder"),
            ("full", "not empty"),
            ("dangling", "leads nowhere"),
            ("a/b", "above it does not exist"),
            ("file/x", "Not a directory"),
        ] {
            let failure = at(name).unwrap_err();
            assert!(failure.message.contains(why), "{name}: {failure}");
        }
        let made = at("new").unwrap();
        assert!(made.created && made.path.is_dir());
        assert!(!at("new").unwrap().created);
        made.remove_if_created();
        assert!(!made.path.exists());
    }

    #[test]
    fn a_path_outside_every_fork_is_not_found() {
        assert_eq!(
            fork_mount_of(Path::new("/")).unwrap_err().code,
            Code::NotFound
        );
    }
}
