//! The listening socket and the folder it lies in.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::protocol::{Code, Failure};
use crate::sys::{FsKind, fs_kind, process, socket};

/// A socket that clients can connect to; its name goes when this does.
pub struct Listening {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the name, so that no other daemon's is taken away.
    identity: (u64, u64),
    keep_name: bool,
}

impl Listening {
    /// Binds the socket. Called by who holds the store's lock, so that a socket that is there already is dead.
    pub fn bind(path: &Path, group: Option<u32>) -> Result<Listening, Failure> {
        Self::try_bind(path, group).map_err(|error| {
            let message = format!("cannot listen on {}: {error}", path.display());
            Failure::new(Code::Failed, message).hint("remove what is there, or name another store")
        })
    }

    fn try_bind(path: &Path, group: Option<u32>) -> io::Result<Listening> {
        if let Some(folder) = path.parent() {
            let mode = if group.is_some() { 0o755 } else { 0o700 };
            DirBuilder::new()
                .recursive(true)
                .mode(mode)
                .create(folder)?;
        }
        match fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => fs::remove_file(path)?,
            Ok(_) => {
                return Err(io::Error::other(
                    "something that is no socket is in the way",
                ));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        let listener = socket::bind(path)?;
        listener.set_nonblocking(true)?;
        if let Some(group) = group {
            std::os::unix::fs::chown(path, None, Some(group))?;
        }
        let mode = if group.is_some() { 0o660 } else { 0o600 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        let identity = identity(path)?;
        Ok(Listening {
            listener,
            path: path.into(),
            identity,
            keep_name: false,
        })
    }

    /// Whether the name stays, for the next daemon to take its place.
    pub fn keep_name(mut self, keep_name: bool) -> Listening {
        self.keep_name = keep_name;
        self
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Returns the next client, or `None` if it has gone away again.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                Ok(Some(stream))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Whether a client would find this socket under its name.
    pub fn is_reachable(&self) -> bool {
        identity(&self.path).is_ok_and(|found| found == self.identity)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if !self.keep_name
            && self.is_reachable()
            && let Err(error) = fs::remove_file(&self.path)
        {
            ::log::warn!("cannot remove the socket {}: {error}", self.path.display());
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Makes the store's folder, and refuses to put one where it would not be safe; returns what it lies on.
pub fn make_store_folder(store: &Path) -> Result<FsKind, Failure> {
    let name = store.display();
    let failed =
        |e: io::Error| Failure::new(Code::Failed, format!("cannot use the store {name}: {e}"));
    // Looked at first, so that nothing is made where it is refused.
    let existing = store
        .ancestors()
        .find(|dir| dir.exists())
        .unwrap_or(Path::new("/"));
    if !existing.is_dir() {
        let message = format!("the store {name}: {} is not a folder", existing.display());
        return Err(Failure::new(Code::Failed, message));
    }
    let kind = fs_kind(existing).map_err(failed)?;
    if kind.is_unsafe() {
        let message = format!("the store {name} lies on {kind}, where it is not safe");
        return Err(Failure::new(Code::Policy, message)
            .hint("choose a folder on a local disk with --store or FORKVOL_STORE"));
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(store)
        .map_err(|e| match e.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                failed(e).hint(ANOTHER_STORE)
            }
            _ => failed(e),
        })?;
    refuse_shared(store).map(|()| kind)
}

/// A folder in which others could put a socket is no place for one, and a database that two users write to is soon open to neither.
fn refuse_shared(store: &Path) -> Result<(), Failure> {
    let name = store.display();
    let failed =
        |e: io::Error| Failure::new(Code::Failed, format!("cannot use the store {name}: {e}"));
    if fs::metadata(store).map_err(failed)?.mode() & 0o022 != 0 {
        let message = format!("the store {name} can be written to by others");
        return Err(Failure::new(Code::Policy, message).hint(format!("chmod go-w {name}")));
    }
    let owner = match fs::metadata(store.join("db")) {
        Ok(metadata) => metadata.uid(),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound) => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            return Err(failed(e).hint(ANOTHER_STORE));
        }
        Err(e) => return Err(failed(e)),
    };
    if owner != process::euid() {
        let message = format!("the store {name} belongs to user {owner}");
        return Err(Failure::new(Code::Policy, message).hint(format!(
            "run this as user {owner}, or name a store of your own with --store"
        )));
    }
    Ok(())
}

/// What helps where a store cannot be used by who wants it.
const ANOTHER_STORE: &str = "choose a folder that you may write to with --store or FORKVOL_STORE";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_gives_way_and_the_name_goes_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run").join("forkvol.sock");
        let first = Listening::bind(&path, None).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let second = Listening::bind(&path, None).unwrap();
        assert!(!first.is_reachable());
        drop(first);
        assert!(second.is_reachable());
        socket::connect(&path).unwrap();
        assert!(second.accept().unwrap().is_some());
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn only_a_socket_gives_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("forkvol.sock");
        fs::write(&path, "precious").unwrap();
        let error = Listening::bind(&path, None).err().unwrap();
        assert!(error.message.contains("no socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_store_gets_a_private_folder() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("a/b");
        make_store_folder(&store).unwrap();
        assert_eq!(
            fs::metadata(&store).unwrap().permissions().mode() & 0o777,
            0o700
        );
        fs::write(dir.path().join("file"), "").unwrap();
        let error = make_store_folder(&dir.path().join("file")).unwrap_err();
        assert!(error.message.ends_with("file is not a folder"), "{error}");
    }
}
