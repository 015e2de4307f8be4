//! The keys and values of the tree: attributes, directory entries, extended attributes, back references, content.
//!
//! Pure: every record is turned into bytes and back here and nowhere else, and each has exactly one encoding, so that equal
//! states give equal trees. `docs/format.md` describes the bytes.
//!
//! ```text
//! 0 ‖ ino ‖ 0                         attributes
//! 0 ‖ ino ‖ 1 ‖ hash56(name) ‖ name   directory entry
//! 0 ‖ ino ‖ 2 ‖ name                  extended attribute
//! 0 ‖ ino ‖ 3 ‖ parent ino ‖ name     back reference, one per link of a non-directory
//! 1 ‖ ino ‖ offset                    content
//! ```

use std::fmt;

use crate::chunk::{self, ChunkId, varint};
use crate::tree::TreeError;

/// The number of an inode: unique in its store, never 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ino(pub u64);

impl Ino {
    /// The inode of a number that was read; `None` if none has it. The highest numbers are left out, so that there is always a
    /// next one.
    pub fn of(number: u64) -> Option<Ino> {
        (1..=i64::MAX as u64)
            .contains(&number)
            .then_some(Ino(number))
    }
}

/// The root directory of every volume.
pub const ROOT: Ino = Ino(1);

impl fmt::Display for Ino {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The largest length of a name, in bytes.
pub const NAME_MAX: usize = 255;

/// The largest size of a file and the largest offset of content: what the kernel can ask for.
pub const SIZE_MAX: u64 = i64::MAX as u64;

/// Whether bytes may be a name in a directory: nothing else is one, for a name leads to one place everywhere.
pub fn is_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..")
        && name.len() <= NAME_MAX
        && !name.iter().any(|b| matches!(b, b'/' | 0))
}

/// Whether bytes may be the name of an extended attribute.
pub fn is_xattr_name(name: &[u8]) -> bool {
    !name.is_empty() && name.len() <= NAME_MAX && !name.contains(&0)
}

/// Nanoseconds since 1970, UTC; may lie before.
pub type Nanos = i64;

/// 2020-01-01T00:00:00Z: stored times count from here, so that most are short.
const EPOCH_2020: Nanos = 1_577_836_800 * 1_000_000_000;

/// What an inode is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Kind {
    Fifo = 1,
    CharDevice = 2,
    Directory = 4,
    BlockDevice = 6,
    File = 8,
    Symlink = 10,
    Socket = 12,
}

impl Kind {
    /// Returns the kind of a `d_type` number, which is also what is stored.
    pub fn from_u8(kind: u8) -> Option<Kind> {
        Some(match kind {
            1 => Kind::Fifo,
            2 => Kind::CharDevice,
            4 => Kind::Directory,
            6 => Kind::BlockDevice,
            8 => Kind::File,
            10 => Kind::Symlink,
            12 => Kind::Socket,
            _ => return None,
        })
    }

    /// Returns the kind that the type bits of a `st_mode` name.
    pub fn from_mode(mode: u32) -> Option<Kind> {
        Kind::from_u8(((mode & 0o170_000) >> 12) as u8)
    }

    /// Returns the type bits of `st_mode`.
    pub fn mode(self) -> u32 {
        (self as u32) << 12
    }

    /// Whether inodes of this kind have content in the tree.
    pub fn has_content(self) -> bool {
        matches!(self, Kind::File | Kind::Symlink)
    }
}

/// The attributes of an inode.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attr {
    pub kind: Kind,
    /// Permission, suid, sgid and sticky bits (12 bits).
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub nlink: u32,
    /// Bytes; 0 for a directory.
    pub size: u64,
    /// 512-byte blocks: pages touched by data × 8.
    pub blocks: u64,
    pub atime: Nanos,
    pub mtime: Nanos,
    pub ctime: Nanos,
    pub btime: Nanos,
    /// The parent of a directory (the root's is itself); 0 for everything else.
    pub parent: Ino,
}

impl Attr {
    /// Whether executing the inode grants rights, so that the kernel must never trust cached attributes of it.
    pub fn is_privileged(&self) -> bool {
        self.kind == Kind::File && (self.mode & 0o4000 != 0 || self.mode & 0o2010 == 0o2010)
    }

    /// Clears suid, and sgid where the group may execute: what a write by an unprivileged caller does.
    pub fn kill_suidgid(&mut self) {
        self.mode &= !0o4000;
        if self.mode & 0o0010 != 0 {
            self.mode &= !0o2000;
        }
    }

    /// Returns the one encoding of these attributes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(40);
        self.encode_to(&mut out);
        out
    }

    /// Appends the encoding to `out`.
    pub fn encode_to(&self, out: &mut Vec<u8>) {
        out.push(self.kind as u8);
        for number in [
            u64::from(self.mode),
            u64::from(self.uid),
            u64::from(self.gid),
            u64::from(self.rdev),
            u64::from(self.nlink),
            self.size,
            self.blocks,
        ] {
            varint::put(out, number);
        }
        let times = [
            self.mtime.wrapping_sub(EPOCH_2020),
            self.ctime.wrapping_sub(self.mtime),
            self.btime.wrapping_sub(self.ctime),
            self.atime.wrapping_sub(self.btime),
        ];
        for time in times {
            varint::put(out, zigzag(time));
        }
        if self.kind == Kind::Directory {
            varint::put(out, self.parent.0);
        }
    }

    /// Reads attributes; `None` if the bytes are not their one encoding.
    pub fn decode(mut bytes: &[u8]) -> Option<Attr> {
        let attr = Attr::take(&mut bytes)?;
        bytes.is_empty().then_some(attr)
    }

    /// Takes attributes from the front of `bytes`.
    pub fn take(bytes: &mut &[u8]) -> Option<Attr> {
        let (&kind, rest) = bytes.split_first()?;
        *bytes = rest;
        let kind = Kind::from_u8(kind)?;
        let mode = u16::try_from(varint::take(bytes)?)
            .ok()
            .filter(|m| *m <= 0o7777)?;
        let uid = u32::try_from(varint::take(bytes)?).ok()?;
        let gid = u32::try_from(varint::take(bytes)?).ok()?;
        let rdev = u32::try_from(varint::take(bytes)?).ok()?;
        let nlink = u32::try_from(varint::take(bytes)?).ok()?;
        let size = varint::take(bytes).filter(|size| *size <= SIZE_MAX)?;
        let blocks = varint::take(bytes)?;
        let mtime = unzigzag(varint::take(bytes)?).wrapping_add(EPOCH_2020);
        let ctime = unzigzag(varint::take(bytes)?).wrapping_add(mtime);
        let btime = unzigzag(varint::take(bytes)?).wrapping_add(ctime);
        let atime = unzigzag(varint::take(bytes)?).wrapping_add(btime);
        let parent = match kind {
            Kind::Directory => Ino::of(varint::take(bytes)?)?,
            _ => Ino(0),
        };
        Some(Attr {
            kind,
            mode,
            uid,
            gid,
            rdev,
            nlink,
            size,
            blocks,
            atime,
            mtime,
            ctime,
            btime,
            parent,
        })
    }
}

fn zigzag(n: i64) -> u64 {
    ((n << 1) ^ (n >> 63)) as u64
}

fn unzigzag(n: u64) -> i64 {
    ((n >> 1) as i64) ^ -((n & 1) as i64)
}

/// Returns the first 56 bits of BLAKE3(name), at least 1: the place of a name in its directory.
pub fn hash56(name: &[u8]) -> u64 {
    let hash = blake3::hash(name);
    let mut first = [0; 8];
    first[1..].copy_from_slice(&hash.as_bytes()[..7]);
    u64::from_be_bytes(first).max(1)
}

const META: u8 = 0;
const CONTENT: u8 = 1;
const ATTR: u8 = 0;
const ENTRY: u8 = 1;
const XATTR: u8 = 2;
const BACKREF: u8 = 3;

fn meta_key(ino: Ino, family: u8, tail: usize) -> Vec<u8> {
    let mut key = Vec::with_capacity(10 + tail);
    key.push(META);
    key.extend_from_slice(&ino.0.to_be_bytes());
    key.push(family);
    key
}

/// Returns the key of an inode's attributes.
pub fn attr_key(ino: Ino) -> Vec<u8> {
    meta_key(ino, ATTR, 0)
}

/// Returns the prefix of everything an inode has but its content.
pub fn inode_prefix(ino: Ino) -> Vec<u8> {
    let mut key = meta_key(ino, 0, 0);
    key.pop();
    key
}

/// Returns the key of the entry `name` in the directory `dir`.
pub fn entry_key(dir: Ino, hash: u64, name: &[u8]) -> Vec<u8> {
    let mut key = entry_prefix_at(dir, hash);
    key.extend_from_slice(name);
    key
}

/// Returns the smallest possible key of an entry of `dir` whose name has this hash.
pub fn entry_prefix_at(dir: Ino, hash: u64) -> Vec<u8> {
    let mut key = meta_key(dir, ENTRY, 7 + 32);
    key.extend_from_slice(&hash.to_be_bytes()[1..]);
    key
}

/// Returns the prefix of all entries of a directory.
pub fn entries_prefix(dir: Ino) -> Vec<u8> {
    meta_key(dir, ENTRY, 0)
}

/// Returns the key of an extended attribute.
pub fn xattr_key(ino: Ino, name: &[u8]) -> Vec<u8> {
    let mut key = meta_key(ino, XATTR, name.len());
    key.extend_from_slice(name);
    key
}

/// Returns the prefix of all extended attributes of an inode.
pub fn xattrs_prefix(ino: Ino) -> Vec<u8> {
    meta_key(ino, XATTR, 0)
}

/// Returns the key of the back reference of `ino` to its entry `name` in `parent`.
pub fn backref_key(ino: Ino, parent: Ino, name: &[u8]) -> Vec<u8> {
    let mut key = meta_key(ino, BACKREF, 8 + name.len());
    key.extend_from_slice(&parent.0.to_be_bytes());
    key.extend_from_slice(name);
    key
}

/// Returns the prefix of all back references of an inode.
pub fn backrefs_prefix(ino: Ino) -> Vec<u8> {
    meta_key(ino, BACKREF, 0)
}

/// Returns the key of the content of `ino` that begins at `offset`.
pub fn content_key(ino: Ino, offset: u64) -> Vec<u8> {
    let mut key = content_prefix(ino);
    key.extend_from_slice(&offset.to_be_bytes());
    key
}

/// Returns the prefix of all content of an inode.
pub fn content_prefix(ino: Ino) -> Vec<u8> {
    let mut key = Vec::with_capacity(17);
    key.push(CONTENT);
    key.extend_from_slice(&ino.0.to_be_bytes());
    key
}

/// A key of the tree, read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Key<'a> {
    Attr(Ino),
    Entry {
        dir: Ino,
        hash: u64,
        name: &'a [u8],
    },
    Xattr {
        ino: Ino,
        name: &'a [u8],
    },
    Backref {
        ino: Ino,
        parent: Ino,
        name: &'a [u8],
    },
    Content {
        ino: Ino,
        offset: u64,
    },
}

impl<'a> Key<'a> {
    /// Reads a key; `None` if it is none of the five kinds.
    pub fn parse(key: &'a [u8]) -> Option<Key<'a>> {
        let (&range, rest) = key.split_first()?;
        let (ino, rest) = take_u64(rest)?;
        let ino = Ino::of(ino)?;
        if range == CONTENT {
            let (offset, rest) = take_u64(rest)?;
            let valid = rest.is_empty() && offset <= SIZE_MAX;
            return valid.then_some(Key::Content { ino, offset });
        }
        if range != META {
            return None;
        }
        let (&family, rest) = rest.split_first()?;
        match family {
            ATTR if rest.is_empty() => Some(Key::Attr(ino)),
            ENTRY if rest.len() > 7 => {
                let (hash, name) = rest.split_at(7);
                let mut first = [0; 8];
                first[1..].copy_from_slice(hash);
                let hash = u64::from_be_bytes(first);
                (hash != 0 && is_name(name)).then_some(Key::Entry {
                    dir: ino,
                    hash,
                    name,
                })
            }
            XATTR if is_xattr_name(rest) => Some(Key::Xattr { ino, name: rest }),
            BACKREF => {
                let (parent, name) = take_u64(rest)?;
                let parent = Ino::of(parent)?;
                is_name(name).then_some(Key::Backref { ino, parent, name })
            }
            _ => None,
        }
    }
}

fn take_u64(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (first, rest) = bytes.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*first), rest))
}

/// Returns the value of a directory entry.
pub fn encode_entry(child: Ino, kind: Kind) -> Vec<u8> {
    let mut out = vec![kind as u8];
    varint::put(&mut out, child.0);
    out
}

/// Reads the value of a directory entry.
pub fn decode_entry(value: &[u8]) -> Option<(Ino, Kind)> {
    let (&kind, mut rest) = value.split_first()?;
    let child = Ino::of(varint::take(&mut rest)?)?;
    rest.is_empty().then_some((child, Kind::from_u8(kind)?))
}

/// Bytes of a file, a link target or an extended attribute, as the tree holds them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Value {
    Inline(Vec<u8>),
    Chunk { len: u64, id: ChunkId },
}

const TAG_INLINE: u8 = 0;
const TAG_CHUNK: u8 = 1;

impl Value {
    /// Returns the one encoding of this value.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Value::Inline(bytes) => {
                let mut out = Vec::with_capacity(1 + bytes.len());
                out.push(TAG_INLINE);
                out.extend_from_slice(bytes);
                out
            }
            Value::Chunk { len, id } => {
                let mut out = Vec::with_capacity(36);
                out.push(TAG_CHUNK);
                varint::put(&mut out, *len);
                out.extend_from_slice(&id.0);
                out
            }
        }
    }

    /// Reads a value; `None` if the bytes are not the one encoding of any, or it is longer than any of its kind: whoever looks
    /// for the value that covers an offset relies on that.
    pub fn decode(bytes: &[u8]) -> Option<Value> {
        let (&tag, mut rest) = bytes.split_first()?;
        match tag {
            TAG_INLINE => (rest.len() <= chunk::INLINE_MAX).then(|| Value::Inline(rest.to_vec())),
            TAG_CHUNK => {
                let len =
                    varint::take(&mut rest).filter(|len| (1..=chunk::MAX as u64).contains(len))?;
                Some(Value::Chunk {
                    len,
                    id: ChunkId(rest.try_into().ok()?),
                })
            }
            _ => None,
        }
    }

    /// The number of bytes that the value stands for.
    pub fn len(&self) -> u64 {
        match self {
            Value::Inline(bytes) => bytes.len() as u64,
            Value::Chunk { len, .. } => *len,
        }
    }

    /// Whether the value stands for no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Returns the chunk that an entry of the tree names, if it names one: what gc must keep and check must find.
///
/// # Errors
/// The entry cannot be read: what it names is not known, and so nothing may be taken for unused.
pub fn chunk_refs(key: &[u8], value: &[u8]) -> Result<Option<ChunkId>, TreeError> {
    let unreadable = TreeError("an entry cannot be read");
    match Key::parse(key).ok_or(unreadable)? {
        Key::Xattr { .. } | Key::Content { .. } => match Value::decode(value).ok_or(unreadable)? {
            Value::Chunk { id, .. } => Ok(Some(id)),
            Value::Inline(_) => Ok(None),
        },
        Key::Attr(_) | Key::Entry { .. } | Key::Backref { .. } => Ok(None),
    }
}

#[cfg(test)]
pub(crate) mod tests;
