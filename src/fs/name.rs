//! Taking names away: unlink and rmdir.

use super::node::touch_parent;
use super::{Caller, Fs, check_name, now};
use crate::fork::Tx;
use crate::fork::error::FsError;
use crate::record::{Ino, Kind, Nanos, hash56};

impl Fs {
    /// Takes a name of a non-directory away.
    pub fn unlink(&self, caller: Caller, dir: Ino, name: &[u8]) -> Result<(), FsError> {
        self.remove(caller, dir, name, false)
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, caller: Caller, dir: Ino, name: &[u8]) -> Result<(), FsError> {
        self.remove(caller, dir, name, true)
    }

    fn remove(
        &self,
        caller: Caller,
        dir: Ino,
        name: &[u8],
        directory: bool,
    ) -> Result<(), FsError> {
        self.writable()?;
        check_name(name)?;
        let hash = hash56(name);
        let mut tx = self.begin()?;
        let store = &self.fork.store;
        let (ino, kind) = tx
            .layers
            .entry(store, dir, hash, name)?
            .ok_or(FsError::NotFound)?;
        match (kind == Kind::Directory, directory) {
            (true, false) => return Err(FsError::IsDirectory),
            (false, true) => return Err(FsError::NotDirectory),
            _ => {}
        }
        if directory && !tx.layers.is_empty_dir(store, ino)? {
            return Err(FsError::NotEmpty);
        }
        tx.lock(&[dir, ino])?;
        let time = now();
        tx.set_entry(dir, hash, name, None);
        touch_parent(&mut tx, dir, time);
        lose_name(&mut tx, ino, dir, name, time);
        tx.finish(caller.request)
    }
}

/// Takes the name `name` in `dir` from a locked inode: what unlink, rmdir and a replacing rename do to it.
pub(super) fn lose_name(tx: &mut Tx<'_>, ino: Ino, dir: Ino, name: &[u8], time: Nanos) {
    let attr = tx.attr_mut(ino);
    attr.ctime = time;
    if attr.kind == Kind::Directory {
        attr.nlink = 0;
        tx.attr_mut(dir).nlink -= 1;
        tx.set_nameless(ino);
    } else {
        attr.nlink -= 1;
        if attr.nlink == 0 {
            tx.set_nameless(ino);
        } else {
            tx.set_unlinked(ino, dir, name);
        }
    }
}
