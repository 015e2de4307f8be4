//! Extended attributes: user, trusted and security ones, and the ACLs among the system ones.

use super::{Caller, Fs, acl, now};
use crate::fork::error::FsError;
use crate::fork::table::Edit;
use crate::record::{self, Ino, Kind};

const NAME_MAX: usize = 255;
/// The largest value, as the kernel has it.
const SIZE_MAX: usize = 65_536;
/// The most bytes that the names of one inode may take, as the kernel has it.
const LIST_MAX: usize = 65_536;

/// What setxattr may find.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum XattrMode {
    Any,
    /// XATTR_CREATE
    Create,
    /// XATTR_REPLACE
    Replace,
    /// XATTR_CREATE | XATTR_REPLACE: nothing is both there and not.
    CreateReplace,
}

impl Fs {
    /// Returns an extended attribute.
    pub fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>, FsError> {
        self.check_alive()?;
        self.check_xattr_name(name)?;
        let layers = self.fork.layers();
        let value = layers.xattr(&self.fork.store, ino, name)?;
        value
            .map(|value| value.to_vec())
            .ok_or(FsError::NoAttribute)
    }

    /// Returns the names, each ended by NUL. Those of `trusted` are shown to root alone.
    pub fn listxattr(&self, caller: Caller, ino: Ino) -> Result<Vec<u8>, FsError> {
        self.check_alive()?;
        let names = self.fork.layers().xattr_names(&self.fork.store, ino)?;
        let mut out = Vec::new();
        for name in names {
            if caller.uid == 0 || !name.starts_with(b"trusted.") {
                out.extend_from_slice(&name);
                out.push(0);
            }
        }
        Ok(out)
    }

    /// Sets an extended attribute.
    pub fn setxattr(
        &self,
        caller: Caller,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
    ) -> Result<(), FsError> {
        self.writable()?;
        self.check_xattr_name(name)?;
        if value.len() > SIZE_MAX {
            return Err(FsError::AttributeTooLarge);
        }
        let mut tx = self.begin()?;
        let store = &self.fork.store;
        let before = tx.layers.xattr(store, ino, name)?;
        match mode {
            XattrMode::Create | XattrMode::CreateReplace if before.is_some() => {
                return Err(FsError::Exists);
            }
            XattrMode::Replace | XattrMode::CreateReplace if before.is_none() => {
                return Err(FsError::NoAttribute);
            }
            _ => {}
        }
        if before.is_none() {
            let names = tx.layers.xattr_names(store, ino)?;
            let bytes: usize = names.iter().map(|name| name.len() + 1).sum();
            if bytes + name.len() + 1 > LIST_MAX {
                return Err(FsError::NoSpace);
            }
        }
        self.fork.want_pages((value.len() as u64).div_ceil(4096))?;
        tx.lock(&[ino])?;
        let attr = tx.attr_mut(ino);
        let mut stored = Some(value);
        if name == acl::ACCESS {
            let entries = acl::parse(value)?;
            attr.mode = acl::mode_of(&entries, attr.mode);
            if acl::is_minimal(&entries) {
                // An ACL that says no more than the mode is the mode.
                stored = None;
            }
        } else if name == acl::DEFAULT {
            if attr.kind != Kind::Directory {
                return Err(FsError::Invalid);
            }
            if acl::parse(value)?.is_empty() {
                stored = None;
            }
        }
        attr.ctime = now();
        tx.push(Edit::Xattr {
            ino,
            name: name.into(),
            value: stored.map(Into::into),
        });
        tx.finish(caller.request)
    }

    /// Removes an extended attribute. An ACL may be removed where there is none: the mode is all it says then.
    pub fn removexattr(&self, caller: Caller, ino: Ino, name: &[u8]) -> Result<(), FsError> {
        self.writable()?;
        self.check_xattr_name(name)?;
        let mut tx = self.begin()?;
        if tx.layers.xattr(&self.fork.store, ino, name)?.is_none() {
            return if is_acl(name) {
                Ok(())
            } else {
                Err(FsError::NoAttribute)
            };
        }
        tx.lock(&[ino])?;
        tx.attr_mut(ino).ctime = now();
        tx.push(Edit::Xattr {
            ino,
            name: name.into(),
            value: None,
        });
        tx.finish(caller.request)
    }

    fn check_xattr_name(&self, name: &[u8]) -> Result<(), FsError> {
        if name.len() > NAME_MAX {
            return Err(FsError::Range);
        }
        let known = [&b"user."[..], b"trusted.", b"security."];
        if !record::is_xattr_name(name) || known.contains(&name) {
            return Err(FsError::Invalid);
        }
        let plain = known.iter().any(|prefix| name.starts_with(prefix));
        if plain || (is_acl(name) && self.options.acl) {
            Ok(())
        } else {
            Err(FsError::NotSupported)
        }
    }
}

fn is_acl(name: &[u8]) -> bool {
    name == acl::ACCESS || name == acl::DEFAULT
}
