//! setattr: chmod, chown, truncate, utimens.

use super::{Caller, Fs, Ownership, SIZE_MAX, acl, now};
use crate::fork::error::FsError;
use crate::fork::table::Edit;
use crate::record::{Attr, Ino, Kind, Nanos};

/// What setattr changes; None leaves it as it is. Where it is nothing, suid and sgid go: a kernel asks so for that alone, as for a
/// chown that names neither user nor group.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SetAttr {
    pub mode: Option<u16>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<Nanos>,
    pub mtime: Option<Nanos>,
    pub ctime: Option<Nanos>,
}

impl SetAttr {
    /// Whether a file does not keep what it granted under its owner.
    fn takes_rights(&self) -> bool {
        self.uid.is_some() || self.gid.is_some() || *self == SetAttr::default()
    }
}

/// The attribute that lets a file grant capabilities.
pub const CAPABILITY: &[u8] = b"security.capability";

impl Fs {
    /// Changes attributes; returns them as they are then.
    pub fn setattr(&self, caller: Caller, ino: Ino, set: SetAttr) -> Result<Attr, FsError> {
        self.writable()?;
        if let Ownership::As { uid, gid } = self.options.ownership
            && (set.uid.is_some_and(|u| u != uid) || set.gid.is_some_and(|g| g != gid))
        {
            return Err(FsError::NotPermitted);
        }
        if let Some(size) = set.size {
            if size > SIZE_MAX {
                return Err(FsError::TooLarge);
            }
            self.truncate(caller, ino, size)?;
        }
        let drops_capability = set.takes_rights() || set.size.is_some();
        let sets_acl = set.mode.is_some() && self.options.acl;
        let store = &self.fork.store;
        let mut tx = self.begin()?;
        let mut edits = Vec::new();
        if drops_capability && tx.layers.xattr(store, ino, CAPABILITY)?.is_some() {
            edits.push(Edit::Xattr {
                ino,
                name: CAPABILITY.into(),
                value: None,
            });
        }
        if sets_acl && let Some(value) = tx.layers.xattr(store, ino, acl::ACCESS)? {
            let value = acl::with_mode(&value, set.mode.unwrap_or_default())?;
            edits.push(Edit::Xattr {
                ino,
                name: acl::ACCESS.into(),
                value: Some(value.into()),
            });
        }
        tx.lock(&[ino])?;
        edits.into_iter().for_each(|edit| tx.push(edit));
        let attr = tx.attr_mut(ino);
        change(attr, set, now());
        // Stored as it is shown: nobody gives rights to a file that is another's.
        *attr = self.shown(attr.clone());
        let attr = attr.clone();
        tx.finish(caller.request)?;
        Ok(attr)
    }

    /// Drops the file capability of an inode that is written to; almost always there is none to drop.
    pub(super) fn drop_capability(&self, caller: Caller, ino: Ino) -> Result<(), FsError> {
        let store = &self.fork.store;
        if self.fork.layers().xattr(store, ino, CAPABILITY)?.is_none() {
            return Ok(());
        }
        let mut tx = self.begin()?;
        tx.push(Edit::Xattr {
            ino,
            name: CAPABILITY.into(),
            value: None,
        });
        tx.finish(caller.request)
    }
}

fn change(attr: &mut Attr, set: SetAttr, time: Nanos) {
    if let Some(mode) = set.mode {
        attr.mode = mode & 0o7777;
    }
    attr.uid = set.uid.unwrap_or(attr.uid);
    attr.gid = set.gid.unwrap_or(attr.gid);
    if set.takes_rights() && attr.kind != Kind::Directory && set.mode.is_none() {
        attr.kill_suidgid();
    }
    attr.atime = set.atime.unwrap_or(attr.atime);
    attr.mtime = set.mtime.unwrap_or(attr.mtime);
    attr.ctime = set.ctime.unwrap_or(time);
}
