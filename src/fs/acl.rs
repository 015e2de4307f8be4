//! POSIX ACLs in the kernel's xattr form: a little-endian version 2, then tag, permissions and id of each entry.

use super::{Fs, NewNode};
use crate::fork::Tx;
use crate::fork::error::FsError;
use crate::record::{Ino, Kind};

pub const ACCESS: &[u8] = b"system.posix_acl_access";
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const USER_OBJ: u16 = 1;
const GROUP_OBJ: u16 = 4;
const MASK: u16 = 16;
const OTHER: u16 = 32;

/// One entry of an ACL.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AclEntry {
    tag: u16,
    perm: u16,
    id: u32,
}

/// What a new inode gets from its directory.
pub struct Inherited {
    pub mode: u16,
    pub xattrs: Vec<(&'static [u8], Vec<u8>)>,
}

/// Reads an ACL.
///
/// # Errors
/// `Invalid` if the bytes are none.
pub fn parse(value: &[u8]) -> Result<Vec<AclEntry>, FsError> {
    let (version, rest) = value.split_first_chunk::<4>().ok_or(FsError::Invalid)?;
    if u32::from_le_bytes(*version) != VERSION || rest.len() % 8 != 0 {
        return Err(FsError::Invalid);
    }
    let entry = |e: &[u8]| AclEntry {
        tag: u16::from_le_bytes([e[0], e[1]]),
        perm: u16::from_le_bytes([e[2], e[3]]),
        id: u32::from_le_bytes([e[4], e[5], e[6], e[7]]),
    };
    Ok(rest.chunks_exact(8).map(entry).collect())
}

fn encode(entries: &[AclEntry]) -> Vec<u8> {
    let mut out = VERSION.to_le_bytes().to_vec();
    for entry in entries {
        out.extend_from_slice(&entry.tag.to_le_bytes());
        out.extend_from_slice(&entry.perm.to_le_bytes());
        out.extend_from_slice(&entry.id.to_le_bytes());
    }
    out
}

/// Whether an ACL says no more than a mode does.
pub fn is_minimal(entries: &[AclEntry]) -> bool {
    entries
        .iter()
        .all(|e| matches!(e.tag, USER_OBJ | GROUP_OBJ | OTHER))
}

/// Returns `mode` with the permissions that an access ACL stands for.
pub fn mode_of(entries: &[AclEntry], mode: u16) -> u16 {
    let find = |tag| entries.iter().find(|e| e.tag == tag).map(|e| e.perm & 7);
    let owner = find(USER_OBJ).unwrap_or(mode >> 6 & 7);
    let group = find(MASK)
        .or_else(|| find(GROUP_OBJ))
        .unwrap_or(mode >> 3 & 7);
    let other = find(OTHER).unwrap_or(mode & 7);
    (mode & !0o777) | owner << 6 | group << 3 | other
}

/// Returns an access ACL that grants what `mode` says: what chmod does to it.
pub fn with_mode(value: &[u8], mode: u16) -> Result<Vec<u8>, FsError> {
    let mut entries = parse(value)?;
    let has_mask = entries.iter().any(|e| e.tag == MASK);
    for entry in &mut entries {
        match entry.tag {
            USER_OBJ => entry.perm = mode >> 6 & 7,
            MASK => entry.perm = mode >> 3 & 7,
            GROUP_OBJ if !has_mask => entry.perm = mode >> 3 & 7,
            OTHER => entry.perm = mode & 7,
            _ => {}
        }
    }
    Ok(encode(&entries))
}

impl Fs {
    /// Returns mode and ACLs of a new inode: by the directory's default ACL where it has one, else by the umask.
    pub(super) fn inherit(
        &self,
        tx: &Tx<'_>,
        dir: Ino,
        node: &NewNode<'_>,
    ) -> Result<Inherited, FsError> {
        let plain = Inherited {
            mode: node.mode & !node.umask & 0o7777,
            xattrs: Vec::new(),
        };
        if node.kind == Kind::Symlink {
            return Ok(Inherited {
                mode: 0o777,
                ..plain
            });
        }
        if !self.options.acl {
            return Ok(plain);
        }
        let Some(default) = tx.layers.xattr(&self.fork.store, dir, DEFAULT)? else {
            return Ok(plain);
        };
        let mut entries = parse(&default)?;
        let mut xattrs = Vec::new();
        if node.kind == Kind::Directory {
            xattrs.push((DEFAULT, default.to_vec()));
        }
        let has_mask = entries.iter().any(|e| e.tag == MASK);
        for entry in &mut entries {
            match entry.tag {
                USER_OBJ => entry.perm &= node.mode >> 6 & 7,
                MASK => entry.perm &= node.mode >> 3 & 7,
                GROUP_OBJ if !has_mask => entry.perm &= node.mode >> 3 & 7,
                OTHER => entry.perm &= node.mode & 7,
                _ => {}
            }
        }
        let mode = mode_of(&entries, node.mode & 0o7000);
        if !is_minimal(&entries) {
            xattrs.push((ACCESS, encode(&entries)));
        }
        Ok(Inherited { mode, xattrs })
    }
}
