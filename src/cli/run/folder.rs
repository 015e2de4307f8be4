//! The folder in which a run mounts its forks.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cli::holders::{self, RUN_FOLDER};
use crate::cli::paths;
use crate::protocol::{Code, Failure};
use crate::sys;
use crate::sys::{mount, process};

/// A folder of a run that was killed goes when nothing has happened to it for so long.
const LEFT_FOR: Duration = Duration::from_secs(24 * 3600);

/// A folder of its own, locked while its run lives.
pub struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    pub fn make() -> Result<Folder, Failure> {
        let name = sys::random()
            .map_err(|e| Failure::new(Code::Failed, format!("no random numbers: {e}")))?;
        let name = format!("{RUN_FOLDER}{:016x}", u64::from_ne_bytes(name));
        let path = std::env::temp_dir().join(name);
        paths::make_folder(&path)?;
        let lock = || -> io::Result<File> {
            let folder = File::open(&path)?;
            folder.lock()?;
            Ok(folder)
        };
        let _lock = lock().map_err(|e| {
            fs::remove_dir(&path).ok();
            Failure::new(Code::Failed, format!("{}: {e}", path.display()))
        })?;
        Ok(Folder { path, _lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Removes the folders of this user's runs that were killed. A mount in another namespace would go with its folder, so whatever
/// may be in use stays.
pub fn sweep() {
    let entries = fs::read_dir(std::env::temp_dir()).into_iter().flatten();
    let left = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| is_left(path));
    let left: Vec<PathBuf> = left.collect();
    if left.is_empty() {
        return;
    }
    let mounted = mounted_anywhere();
    for path in left {
        // Who holds it may be where its process cannot be seen from here.
        let lock = File::open(&path).ok().filter(|it| it.try_lock().is_ok());
        if lock.is_none() || mounted.iter().any(|at| at.starts_with(&path)) {
            continue;
        }
        for inner in fs::read_dir(&path).into_iter().flatten().flatten() {
            fs::remove_dir(inner.path()).ok();
        }
        // What is not empty stays.
        fs::remove_dir(&path).ok();
    }
}

fn is_left(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    let is_old = |metadata: fs::Metadata| {
        let since = metadata.modified().ok().and_then(|at| at.elapsed().ok());
        metadata.is_dir()
            && metadata.uid() == process::euid()
            && since.is_some_and(|since| since > LEFT_FOR)
    };
    name.as_bytes().starts_with(RUN_FOLDER.as_bytes())
        && fs::symlink_metadata(path).is_ok_and(is_old)
}

/// Where anything is mounted in the namespaces of all processes, as far as the caller may look.
fn mounted_anywhere() -> HashSet<PathBuf> {
    let mut namespaces = HashSet::new();
    let others = holders::processes().filter(|pid| {
        let namespace = fs::read_link(format!("/proc/{pid}/ns/mnt"));
        namespace.is_ok_and(|namespace| namespaces.insert(namespace))
    });
    let mounts = others.flat_map(|pid| mount::mounts_of(pid).unwrap_or_default());
    let own = mount::mounts().unwrap_or_default();
    mounts.chain(own).map(|mount| mount.path).collect()
}
