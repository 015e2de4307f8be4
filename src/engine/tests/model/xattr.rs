//! What the model knows of extended attributes, and of ACLs in the kernel's form.

use super::tree::{ACCESS, DEFAULT, Said, Tree};
use crate::fork::error::FsError;
use crate::fs::XattrMode;
use crate::record::Ino;

impl Tree {
    fn is_known_xattr(&self, name: &[u8]) -> Said {
        let plain = ["user.", "trusted.", "security."];
        let bare = plain.iter().any(|p| name == p.as_bytes());
        let plain = plain.iter().any(|p| name.starts_with(p.as_bytes()));
        match name {
            _ if name.len() > 255 => Err(FsError::Range),
            _ if bare => Err(FsError::Invalid),
            _ if plain => Ok(()),
            ACCESS | DEFAULT if self.acl => Ok(()),
            _ => Err(FsError::NotSupported),
        }
    }

    pub fn setxattr(&mut self, ino: Ino, name: &[u8], value: &[u8], how: XattrMode) -> Said {
        self.is_known_xattr(name)?;
        if value.len() > 65_536 {
            return Err(FsError::AttributeTooLarge);
        }
        let there = self
            .nodes
            .get(&ino)
            .map(|node| node.xattrs.contains_key(name));
        match how {
            XattrMode::Create | XattrMode::CreateReplace if there == Some(true) => {
                return Err(FsError::Exists);
            }
            XattrMode::Replace | XattrMode::CreateReplace if there != Some(true) => {
                return Err(FsError::NoAttribute);
            }
            _ => {}
        }
        self.get(ino)?;
        let node = self.node(ino);
        if name == DEFAULT && !node.is_dir() {
            return Err(FsError::Invalid);
        }
        let is_acl = name == ACCESS || name == DEFAULT;
        if is_acl && !is_valid(value) {
            return Err(FsError::Invalid);
        }
        if name == ACCESS && value.len() > 4 {
            node.mode = node.mode & 0o7000 | stands_for(value);
        }
        node.touch(false);
        if name == ACCESS && is_minimal(value) || name == DEFAULT && value.len() == 4 {
            node.xattrs.remove(name);
        } else {
            node.xattrs.insert(name.into(), value.into());
        }
        Ok(())
    }

    pub fn removexattr(&mut self, ino: Ino, name: &[u8]) -> Said {
        self.is_known_xattr(name)?;
        let there = self
            .nodes
            .get(&ino)
            .is_some_and(|node| node.xattrs.contains_key(name));
        if !there {
            let is_acl = name == ACCESS || name == DEFAULT;
            return if is_acl {
                Ok(())
            } else {
                Err(FsError::NoAttribute)
            };
        }
        let node = self.node(ino);
        node.xattrs.remove(name);
        node.touch(false);
        Ok(())
    }
}

/// The entries of an ACL: tag and permissions.
fn entries(acl: &[u8]) -> impl Iterator<Item = (u8, u16)> + '_ {
    acl[4..]
        .chunks(8)
        .map(|entry| (entry[0], u16::from(entry[2])))
}

fn is_valid(acl: &[u8]) -> bool {
    acl.starts_with(&[2, 0, 0, 0])
}

/// Whether there is nothing in it but owner (1), group (4) and others (32).
pub fn is_minimal(acl: &[u8]) -> bool {
    entries(acl).all(|(tag, _)| matches!(tag, 1 | 4 | 32))
}

/// The mode that an ACL stands for: of the group, what its mask (16) says.
pub fn stands_for(acl: &[u8]) -> u16 {
    let find = |tag| {
        entries(acl)
            .find(|entry| entry.0 == tag)
            .map(|entry| entry.1)
    };
    let group = find(16).or(find(4));
    find(1).unwrap() << 6 | group.unwrap() << 3 | find(32).unwrap()
}

/// Changes the entries that a mode speaks of.
pub fn grant(acl: &mut [u8], change: impl Fn(u16, u16) -> u16, mode: u16) {
    let group = if entries(acl).any(|entry| entry.0 == 16) {
        16
    } else {
        4
    };
    for entry in acl[4..].chunks_mut(8) {
        let bits = match entry[0] {
            1 => mode >> 6 & 7,
            tag if tag == group => mode >> 3 & 7,
            32 => mode & 7,
            _ => continue,
        };
        entry[2] = change(u16::from(entry[2]), bits) as u8;
    }
}
