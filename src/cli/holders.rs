//! Who still uses a mount: looked up in /proc alone, never inside the mount, whose daemon may be gone.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::mounting::is_of;
use crate::protocol::Mount;
use crate::sys::device_numbers;
use crate::sys::mount::{self, MountPoint, mounts_of};
use crate::sys::namespace;

/// A process that uses a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub pid: u32,
    pub name: String,
    /// What it has there.
    pub what: &'static str,
}

/// What the name of the folder begins with in which `run` mounts forks, in a mount namespace of its command.
pub const RUN_FOLDER: &str = "forkvol-run-";
/// How many are named; of the others only the number is said.
const NAMED: usize = 5;

/// Returns the processes that have something of this mount open, as far as the caller may look.
pub fn of(mount: &Mount) -> Vec<Holder> {
    let device = device_numbers(mount.device);
    let own = fs::read_link("/proc/self/ns/mnt").ok();
    let seen_here = mount::mounts().unwrap_or_default();
    let ours: Vec<&MountPoint> = seen_here.iter().filter(|m| is_of(m, mount)).collect();
    // The command of a `run` has copies of all mounts, and nobody there knows of them.
    let is_of_run = |found: &MountPoint| {
        let folder = found.path.parent().and_then(Path::file_name);
        found.kind == mount::FS_TYPE
            && folder.is_some_and(|name| name.as_bytes().starts_with(RUN_FOLDER.as_bytes()))
            && !seen_here.iter().any(|here| here.path == found.path)
    };
    // Where it goes with ours nobody holds it: the sandbox of a service has a copy of every mount of the machine.
    let goes_with_ours = |mount: &MountPoint| {
        let groups = || mount.peers.iter().chain(&mount.master);
        ours.iter()
            .any(|our| groups().any(|group| our.peers == Some(*group)))
    };
    let mut namespaces: HashMap<Option<PathBuf>, Vec<MountPoint>> = HashMap::new();
    let mut holders = Vec::new();
    for pid in processes() {
        let namespace = fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        let mut foreign = namespace.is_some() && namespace != own;
        let mounts = match namespaces.entry(namespace) {
            Entry::Occupied(known) => {
                foreign = false;
                known.into_mut()
            }
            Entry::Vacant(new) => {
                let mut mounts = mounts_of(pid).unwrap_or_default();
                foreign &= !mounts.iter().any(is_of_run);
                mounts.retain(|m| is_of(m, mount));
                new.insert(mounts)
            }
        };
        if mounts.is_empty() {
            continue;
        }
        let foreign = foreign && !mounts.iter().all(goes_with_ours);
        let places: Vec<&Path> = mounts.iter().map(|m| m.path.as_path()).collect();
        let what = uses(pid, &places, device).or(foreign.then_some("another mount namespace"));
        if let Some(what) = what {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            holders.push(Holder {
                pid,
                name: name.trim().into(),
                what,
            });
        }
    }
    holders
}

/// Whether a mount stands where it was made: in the caller's mount namespace, or in that of its making, as far as the caller may
/// look. Copies and binds elsewhere do not count.
pub fn stands(mount: &Mount) -> bool {
    let path = Path::new(OsStr::from_bytes(&mount.path.0));
    let is_it = |found: &MountPoint| is_of(found, mount) && found.path == path;
    // Where nothing can be seen nothing is taken away.
    if mount::mounts().map_or(true, |mounts| mounts.iter().any(is_it)) {
        return true;
    }
    let made_in = mount
        .namespace
        .filter(|_| mount.namespace != namespace::of_mounts(None));
    made_in.is_some_and(|made_in| {
        processes()
            .filter(|pid| namespace::of_mounts(Some(*pid)) == Some(made_in))
            .any(|pid| mounts_of(pid).unwrap_or_default().iter().any(is_it))
    })
}

/// All processes but this one.
pub fn processes() -> impl Iterator<Item = u32> {
    let own = std::process::id();
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(move |pid| *pid != own)
}

fn uses(pid: u32, places: &[&Path], device: (u32, u32)) -> Option<&'static str> {
    let inside = |link: PathBuf| {
        fs::read_link(link).is_ok_and(|target| places.iter().any(|p| target.starts_with(p)))
    };
    let folder = PathBuf::from(format!("/proc/{pid}"));
    for (link, what) in [
        ("cwd", "working directory"),
        ("root", "root directory"),
        ("exe", "program"),
    ] {
        if inside(folder.join(link)) {
            return Some(what);
        }
    }
    let mut files = fs::read_dir(folder.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    if files.any(|entry| inside(entry.path())) {
        return Some("open file");
    }
    let maps = fs::read(folder.join("maps")).unwrap_or_default();
    maps_device(&maps, device).then_some("mapped file")
}

/// Whether a table of mappings names the device.
fn maps_device(maps: &[u8], (major, minor): (u32, u32)) -> bool {
    let wanted = format!("{major:02x}:{minor:02x}");
    maps.split(|b| *b == b'\n').any(|line| {
        line.split(|b| *b == b' ')
            .nth(3)
            .is_some_and(|field| field == wanted.as_bytes())
    })
}

/// Names the holders in a line.
pub fn list(holders: &[Holder]) -> String {
    let mut names: Vec<String> = holders
        .iter()
        .take(NAMED)
        .map(|h| format!("{} (pid {}: {})", h.name, h.pid, h.what))
        .collect();
    if holders.len() > NAMED {
        names.push(format!("{} more", holders.len() - NAMED));
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_name_their_device() {
        let maps = b"7f00-7f01 r--p 00000000 00:2d 12 /m/lib.so\n7f02-7f03 rw-p 00000000 00:00 0\n";
        assert!(maps_device(maps, (0, 0x2d)));
        assert!(!maps_device(maps, (0, 0x2e)));
    }

    #[test]
    fn a_process_in_a_folder_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(dir.path()).unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .current_dir(&path)
            .spawn()
            .unwrap();
        let found = uses(child.id(), &[&path], (0, 0));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, Some("working directory"));
    }

    #[test]
    fn only_some_are_named() {
        let holder = |pid| Holder {
            pid,
            name: "sh".into(),
            what: "open file",
        };
        assert_eq!(list(&[holder(1)]), "sh (pid 1: open file)");
        let many: Vec<_> = (0..9).map(holder).collect();
        assert!(list(&many).ends_with("sh (pid 4: open file), 4 more"));
    }
}
