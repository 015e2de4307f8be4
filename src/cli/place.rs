//! Which store a command means, and where its daemon listens.

use std::env;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::config::Config;
use crate::protocol::{Code, Failure};
use crate::sys::process;
use crate::sys::socket::MAX_PATH;

/// Where the service listens.
pub const SERVICE_SOCKET: &str = "/run/forkvol/forkvol.sock";
/// Where the service keeps its store unless it is told otherwise; root's own store too, so that there is one of them.
const SERVICE_STORE: &str = "/var/lib/forkvol";
/// What names a store that the configuration names.
pub const CONFIGURED: &str = "the configuration";
/// What names a store that nobody named.
const DEFAULT: &str = "default";
const SOCKET_NAME: &str = "forkvol.sock";

/// A store, or the service, which knows its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Service,
    Embedded {
        store: PathBuf,
        /// What named the store.
        named_by: &'static str,
    },
}

impl Place {
    /// Finds out which store is meant: by the option, the variable, the service, or the caller's own.
    pub fn find(option: Option<&Path>, config: &Config) -> Result<Place, Failure> {
        let variable = env::var_os("FORKVOL_STORE")
            .filter(|v| !v.is_empty())
            .map(PathBuf::from);
        let (store, named_by) = match (option, variable) {
            (Some(dir), _) => (dir.to_owned(), "--store"),
            (None, Some(dir)) => (dir, "FORKVOL_STORE"),
            (None, None) if fs::symlink_metadata(SERVICE_SOCKET).is_ok() => {
                return Ok(Place::Service);
            }
            (None, None) => match config.store() {
                Some(dir) => (dir.to_owned(), CONFIGURED),
                None => (own_store()?, DEFAULT),
            },
        };
        let store = real_path(&store).map_err(|e| {
            Failure::new(
                Code::Usage,
                format!("the store {:?} ({named_by}): {e}", store.display()),
            )
        })?;
        Ok(Place::Embedded { store, named_by })
    }

    /// The store that a service of this place serves; the caller's own is none of its business.
    pub fn store_of_service(&self, config: &Config) -> PathBuf {
        match self {
            Place::Embedded { store, named_by } if *named_by != DEFAULT => store.clone(),
            _ => config
                .store()
                .map_or_else(|| SERVICE_STORE.into(), PathBuf::from),
        }
    }

    /// The sockets at which a daemon of this store may listen, the best one first.
    pub fn sockets(&self) -> Vec<PathBuf> {
        let store = match self {
            Place::Service => return vec![SERVICE_SOCKET.into()],
            Place::Embedded { store, .. } => store,
        };
        let inside = store.join(SOCKET_NAME);
        if inside.as_os_str().len() <= MAX_PATH {
            return vec![inside];
        }
        let hash = blake3::hash(store.as_os_str().as_bytes()).to_hex();
        let name = format!("forkvol-{}.sock", &hash[..16]);
        // The store's owner, not the caller: root must find the daemon of a user's store.
        let uid = fs::metadata(store).map_or_else(|_| process::euid(), |m| m.uid());
        let mut folders: Vec<PathBuf> = user_folders(uid).collect();
        folders.dedup();
        folders.push(temporary_folder(uid));
        let mut sockets: Vec<PathBuf> = folders.into_iter().map(|f| f.join(&name)).collect();
        sockets.retain(|s| s.as_os_str().len() <= MAX_PATH);
        sockets
    }

    /// The folder below which forks are mounted where nobody names one.
    ///
    /// # Errors
    /// This user has no folder for it.
    pub fn mount_root(&self) -> Result<PathBuf, Failure> {
        let uid = process::euid();
        if uid == 0 {
            return Ok("/cache/forkvol".into());
        }
        if let Some(folder) = runtime_folder() {
            return Ok(folder.join("mnt"));
        }
        match self {
            Place::Embedded { store, .. } if fs::metadata(store).is_ok_and(|m| m.uid() == uid) => {
                Ok(store.join("mnt"))
            }
            place => {
                let message = format!(
                    "there is no folder for the fork's mount: no XDG_RUNTIME_DIR, no /run/user/{uid}, and the store is not yours: {place}"
                );
                let failure = Failure::new(Code::Failed, message);
                Err(failure.hint("name a folder of your own: --mount-root DIR"))
            }
        }
    }

    /// Whether a text says which store it speaks of.
    pub fn is_named_in(&self, text: &str) -> bool {
        match self {
            Place::Service => text.contains("the service"),
            Place::Embedded { store, .. } => text.contains(&*store.to_string_lossy()),
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Service => write!(f, "the service's store ({SERVICE_SOCKET})"),
            Place::Embedded { store, named_by } => write!(f, "{} ({named_by})", store.display()),
        }
    }
}

/// Where this user's files of this boot lie, if there is such a folder.
pub fn runtime_folder() -> Option<PathBuf> {
    match process::euid() {
        0 => Some("/run/forkvol-jobs".into()),
        uid => Some(user_folders(uid).next()?.join("forkvol")),
    }
}

/// Where a user's files lie that has no other place for them; whether it is safe is to be looked at.
pub fn temporary_folder(uid: u32) -> PathBuf {
    env::temp_dir().join(format!("forkvol-{uid}"))
}

/// Where a user of the service has what must be found again by another process of this boot, the best place first: not in a
/// session's folder, which comes and goes with the user's logins, if another can be had.
pub fn state_folders() -> Vec<PathBuf> {
    match process::euid() {
        0 => runtime_folder().into_iter().collect(),
        uid => [temporary_folder(uid)]
            .into_iter()
            .chain(runtime_folder())
            .collect(),
    }
}

/// The folders that hosts make for a user's session: that of this process, and the usual one.
fn user_folders(uid: u32) -> impl Iterator<Item = PathBuf> {
    let named = env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    let usual = PathBuf::from(format!("/run/user/{uid}"));
    let folders = named.map(PathBuf::from).into_iter().chain([usual]);
    folders.filter(|dir| dir.is_dir())
}

fn own_store() -> Result<PathBuf, Failure> {
    if process::euid() == 0 {
        return Ok(SERVICE_STORE.into());
    }
    if let Some(dir) = env::var_os("XDG_DATA_HOME").filter(|v| !v.is_empty()) {
        return Ok(PathBuf::from(dir).join("forkvol"));
    }
    process::home()
        .map(|home| home.join(".local/share/forkvol"))
        .ok_or_else(|| {
            Failure::new(Code::Usage, "there is no home folder for a store")
                .hint("name one with --store or FORKVOL_STORE")
        })
}

/// Resolves links in the part of a path that exists; the rest is to be made.
pub fn real_path(path: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    let mut missing = Vec::new();
    let mut existing = absolute.as_path();
    loop {
        match fs::canonicalize(existing) {
            Ok(real) => {
                // Lexical: what does not exist has no links.
                let mut out = real;
                for part in missing.iter().rev() {
                    match part {
                        std::path::Component::ParentDir => drop(out.pop()),
                        part => out.push(part),
                    }
                }
                return Ok(out);
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let (Some(parent), Some(last)) =
                    (existing.parent(), existing.components().next_back())
                else {
                    return Err(e);
                };
                missing.push(last);
                existing = parent;
            }
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_resolved_as_far_as_the_path_exists() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir(root.join("real")).unwrap();
        std::os::unix::fs::symlink("real", root.join("link")).unwrap();
        assert_eq!(
            real_path(&root.join("link/new/deep")).unwrap(),
            root.join("real/new/deep")
        );
        assert_eq!(
            real_path(&root.join("link/new/../x")).unwrap(),
            root.join("real/x")
        );
        assert_eq!(real_path(Path::new("/")).unwrap(), Path::new("/"));
    }

    #[test]
    fn a_socket_lies_in_the_store_unless_the_path_is_too_long() {
        let short = Place::Embedded {
            store: "/s".into(),
            named_by: "--store",
        };
        assert_eq!(short.sockets(), [Path::new("/s/forkvol.sock")]);
        let store = PathBuf::from(format!("/{}", "x".repeat(100)));
        let long = Place::Embedded {
            store,
            named_by: "--store",
        }
        .sockets();
        assert!(!long.is_empty());
        assert!(
            long.iter().all(|s| s.as_os_str().len() <= MAX_PATH),
            "{long:?}"
        );
    }
}
