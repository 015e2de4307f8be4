//! POSIX ACLs in the kernel's xattr form: a little-endian version 2, then tag, permissions and id of each entry.

use super::{Fs, NewNode};
use crate::fork::Tx;
use crate::fork::error::FsError;
use crate::record::{Ino, Kind};

pub const ACCESS: &[u8] = b"system.posix_acl_access";
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const USER_OBJ: u16 = 1;
const USER: u16 = 2;
const GROUP_OBJ: u16 = 4;
const GROUP: u16 = 8;
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
/// `Invalid` if the bytes are none that the kernel would take: one that it refuses makes its file unusable.
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
    let entries: Vec<AclEntry> = rest.chunks_exact(8).map(entry).collect();
    if is_valid(&entries) {
        Ok(entries)
    } else {
        Err(FsError::Invalid)
    }
}

/// Whether entries are as the kernel wants them: in order of their tags, each tag once but those with an id, and a mask where
/// there are such. Without any entry there is no ACL.
fn is_valid(entries: &[AclEntry]) -> bool {
    let count = |tag| entries.iter().filter(|e| e.tag == tag).count();
    let known = [USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER];
    let fits = |e: &AclEntry| {
        let named = matches!(e.tag, USER | GROUP);
        known.contains(&e.tag) && e.perm <= 7 && (!named || e.id != u32::MAX)
    };
    let wants_mask = count(USER) + count(GROUP) > 0;
    entries.is_empty()
        || entries.iter().all(fits)
            && entries.is_sorted_by_key(|e| e.tag)
            && [USER_OBJ, GROUP_OBJ, OTHER].map(count) == [1; 3]
            && count(MASK) <= 1
            && (!wants_mask || count(MASK) == 1)
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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::hostile::{self, assert_format, hex};

    fn entry(tag: u16, perm: u16, id: u32) -> AclEntry {
        AclEntry { tag, perm, id }
    }

    fn lists() -> impl Strategy<Value = Vec<AclEntry>> + Clone {
        let named = vec((0_u16..8, 0..u32::MAX), 0..3);
        (named.clone(), named, any::<[u8; 4]>()).prop_map(|(users, groups, perms)| {
            let [user, group, mask, other] = perms.map(|perm| u16::from(perm % 8));
            let of = |tag| move |(perm, id)| entry(tag, perm, id);
            let mut entries = vec![entry(USER_OBJ, user, u32::MAX)];
            entries.extend(users.into_iter().map(of(USER)));
            entries.push(entry(GROUP_OBJ, group, u32::MAX));
            entries.extend(groups.into_iter().map(of(GROUP)));
            entries.push(entry(MASK, mask, u32::MAX));
            entries.push(entry(OTHER, other, u32::MAX));
            entries
        })
    }

    proptest! {
        #[test]
        fn every_list_comes_back_as_it_was(entries in lists(), mode in 0_u16..=0o777) {
            let bytes = encode(&entries);
            prop_assert_eq!(parse(&bytes).unwrap(), entries);
            let changed = parse(&with_mode(&bytes, mode).unwrap()).unwrap();
            prop_assert_eq!(mode_of(&changed, 0), mode);
        }

        #[test]
        fn hostile_lists_are_refused_or_are_such_as_the_kernel_takes(bytes in hostile::bytes(lists().prop_map(|l| encode(&l)))) {
            if let Ok(entries) = parse(&bytes) {
                prop_assert!(mode_of(&entries, 0) <= 0o777);
                prop_assert_eq!(encode(&entries), bytes);
            }
        }
    }

    #[test]
    fn the_form_of_the_kernel_is_kept() {
        let digits = "02000000 01000700ffffffff 02000500e8030000 04000500ffffffff 10000500ffffffff 20000000ffffffff";
        let entries = parse(&hex(digits)).unwrap();
        assert_eq!(entries[1], entry(USER, 5, 1000));
        assert_format("an ACL", &encode(&entries), digits);
        for (what, wrong) in [
            (
                "no mask",
                "02000000 01000700ffffffff 02000500e8030000 04000500ffffffff 20000000ffffffff",
            ),
            (
                "out of order",
                "02000000 04000500ffffffff 01000700ffffffff 20000000ffffffff",
            ),
            (
                "an unknown tag",
                "02000000 01000700ffffffff 04000500ffffffff 20000000ffffffff 40000000ffffffff",
            ),
            ("no owner", "02000000 04000500ffffffff 20000000ffffffff"),
            (
                "too many rights",
                "02000000 01000f00ffffffff 04000500ffffffff 20000000ffffffff",
            ),
            ("another version", "01000000"),
            ("a piece", "02000000 0100"),
        ] {
            assert!(parse(&hex(wrong)).is_err(), "{what}");
        }
        assert_eq!(parse(&hex("02000000")).unwrap(), []);
    }
}
