//! The table: what a fork changed, in memory, on top of a root; and the edits that change it.
//!
//! Every mutation is a list of [`Edit`]s, written to the log first and applied to the table then, by the same code that replays
//! the log after a restart: so a table is always what its log says.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use parking_lot::RwLock;

use super::extent::{Content, Extent, Origin};
use crate::chunk::varint;
use crate::record::{self, Attr, Ino, Kind, Value};
use crate::tree::NodeId;

/// An inode that the fork changed or made.
#[derive(Clone, Debug)]
pub struct Inode {
    pub attr: Attr,
    pub content: Content,
    /// The base does not have it.
    pub created: bool,
    /// Gone from every directory; lives on while the kernel knows it, and is never committed.
    pub orphan: bool,
    /// Carried over a seal: the root that the gaps of its content show.
    pub base: Option<NodeId>,
    /// Room behind the last page, for a file that grows: first page of the spool, pages.
    pub ahead: Option<(u64, u64)>,
    /// What background ingest made of the content when it was marked.
    pub ingested: Option<Arc<Ingested>>,
    /// When its content last changed, in seconds since the fork was opened.
    pub written: u32,
}

/// The content of a file as the tree will hold it, or its beginning.
#[derive(Debug)]
pub struct Ingested {
    /// The whole content of then, which had this sequence number; `None` if it is but the beginning.
    pub whole: Option<u64>,
    /// By offset, without data left out in between; none if the file was excluded then.
    pub values: Option<Vec<(u64, Value)>>,
}

impl Ingested {
    /// The byte up to which there are values.
    pub fn end(&self) -> u64 {
        let last = self.values.as_ref().and_then(|values| values.last());
        last.map_or(0, |(offset, value)| offset + value.len())
    }
}

impl Inode {
    /// A new inode that nothing below knows.
    pub fn created(attr: Attr) -> Inode {
        Inode::with(attr, Content::default(), true)
    }

    /// An inode as the base has it.
    pub fn of_base(attr: Attr) -> Inode {
        let content = Content::of_base(if attr.kind.has_content() {
            attr.size
        } else {
            0
        });
        Inode::with(attr, content, false)
    }

    /// What was ingested ahead, if that is the whole content as it is now.
    pub fn whole_ingested(&self) -> Option<&Ingested> {
        let ingested = self.ingested.as_deref();
        ingested.filter(|ingested| ingested.whole == Some(self.content.sequence))
    }

    /// What was ingested ahead, and the byte up to which it still is the content.
    pub fn begun_ingested(&self) -> Option<(&Ingested, u64)> {
        let ingested = self.ingested.as_deref()?;
        Some((ingested, ingested.end().min(self.content.unchanged())))
    }

    /// Whether a root has it, or had before a seal.
    pub fn is_of_base(&self) -> bool {
        !self.created || self.base.is_some()
    }

    fn with(attr: Attr, content: Content, created: bool) -> Inode {
        Inode {
            attr,
            content,
            created,
            orphan: false,
            base: None,
            ahead: None,
            ingested: None,
            written: 0,
        }
    }
}

/// An inode of the table under its lock. Held after the table's lock, never before it; several at once in order of number.
#[derive(Debug)]
pub struct Cell {
    pub ino: Ino,
    pub state: Arc<RwLock<Inode>>,
}

impl Cell {
    pub fn new(ino: Ino, inode: Inode) -> Arc<Cell> {
        Arc::new(Cell {
            ino,
            state: Arc::new(RwLock::new(inode)),
        })
    }
}

/// A name: 1 to 255 bytes without `/` and NUL.
pub type Name = Box<[u8]>;

/// Where an entry stands: directory, hash of the name, name.
pub type EntryKey = (Ino, u64, Name);

/// Bytes of memory that an inode, a removed inode and a name take in a table.
const INODE_WEIGHT: usize = 512;
const REMOVED_WEIGHT: usize = 16;
const NAME_WEIGHT: usize = 96;

/// The changes of a fork.
#[derive(Clone, Debug, Default)]
pub struct Table {
    pub inodes: HashMap<Ino, Arc<Cell>>,
    /// Inodes of the base that are gone.
    pub removed: HashSet<Ino>,
    /// Entries put (Some) and taken away (None).
    pub entries: BTreeMap<EntryKey, Option<(Ino, Kind)>>,
    pub xattrs: BTreeMap<(Ino, Name), Option<Arc<[u8]>>>,
    /// Names that inodes of the base lost while they lived on.
    pub unlinked: BTreeSet<(Ino, Ino, Name)>,
}

/// One change, as the log holds it.
#[derive(Clone, PartialEq, Debug)]
pub enum Edit {
    /// The attributes of an inode from now on; makes the inode if nothing has it.
    Attr { ino: Ino, attr: Attr },
    Entry {
        dir: Ino,
        hash: u64,
        name: Name,
        child: Option<(Ino, Kind)>,
    },
    Xattr {
        ino: Ino,
        name: Name,
        value: Option<Arc<[u8]>>,
    },
    /// An inode lost this name and lives on.
    Unlinked { ino: Ino, parent: Ino, name: Name },
    /// A run of pages of the content from now on.
    Extent { ino: Ino, extent: Extent },
    /// Content ends at this page; later growth shows holes.
    Truncate { ino: Ino, page: u64 },
    /// The inode lost its last name; the kernel may still use it.
    Orphan { ino: Ino },
    /// An inode carried over a seal, an orphan if it has no links: its gaps show `base`.
    Carry {
        ino: Ino,
        attr: Attr,
        base: NodeId,
        base_pages: u64,
    },
    /// The inode is no more.
    Remove { ino: Ino },
}

impl Edit {
    /// Appends the encoding of the edit.
    pub fn encode_to(&self, out: &mut Vec<u8>) {
        match self {
            Edit::Attr { ino, attr } => {
                head(out, 1, *ino);
                attr.encode_to(out);
            }
            Edit::Entry {
                dir,
                hash,
                name,
                child,
            } => {
                head(out, 2, *dir);
                varint::put(out, *hash);
                put_bytes(out, name);
                match child {
                    Some((ino, kind)) => {
                        varint::put(out, ino.0);
                        out.push(*kind as u8);
                    }
                    None => varint::put(out, 0),
                }
            }
            Edit::Xattr { ino, name, value } => {
                head(out, 3, *ino);
                put_bytes(out, name);
                out.push(u8::from(value.is_some()));
                if let Some(value) = value {
                    put_bytes(out, value);
                }
            }
            Edit::Unlinked { ino, parent, name } => {
                head(out, 4, *ino);
                varint::put(out, parent.0);
                put_bytes(out, name);
            }
            Edit::Extent { ino, extent } => {
                head(out, 5, *ino);
                varint::put(out, extent.page);
                varint::put(out, extent.pages);
                match extent.origin {
                    Origin::Spool { at, owned } => {
                        out.push(if owned { 1 } else { 0 });
                        varint::put(out, at);
                    }
                    Origin::Base { ino, page } => {
                        out.push(2);
                        varint::put(out, ino.0);
                        varint::put(out, page);
                    }
                    Origin::Hole { reserved } => out.push(if reserved { 4 } else { 3 }),
                }
            }
            Edit::Truncate { ino, page } => {
                head(out, 6, *ino);
                varint::put(out, *page);
            }
            Edit::Orphan { ino } => head(out, 7, *ino),
            Edit::Carry {
                ino,
                attr,
                base,
                base_pages,
            } => {
                head(out, 8, *ino);
                attr.encode_to(out);
                out.extend_from_slice(&base.0);
                varint::put(out, *base_pages);
            }
            Edit::Remove { ino } => head(out, 9, *ino),
        }
    }

    /// Takes one edit from the front of `bytes`; `None` if there is no valid one.
    pub fn take(bytes: &mut &[u8]) -> Option<Edit> {
        let tag = take_byte(bytes)?;
        let ino = take_ino(bytes)?;
        Some(match tag {
            1 => Edit::Attr {
                ino,
                attr: Attr::take(bytes)?,
            },
            2 => {
                let hash = varint::take(bytes).filter(|hash| (1..1 << 56).contains(hash))?;
                let name = take_name(bytes)?;
                let child = match varint::take(bytes)? {
                    0 => None,
                    child => Some((Ino::of(child)?, Kind::from_u8(take_byte(bytes)?)?)),
                };
                Edit::Entry {
                    dir: ino,
                    hash,
                    name,
                    child,
                }
            }
            3 => {
                let name = take_bytes(bytes).filter(|name| record::is_xattr_name(name))?;
                let name = name.into();
                let value = match take_byte(bytes)? {
                    0 => None,
                    1 => Some(take_bytes(bytes)?.into()),
                    _ => return None,
                };
                Edit::Xattr { ino, name, value }
            }
            4 => Edit::Unlinked {
                ino,
                parent: take_ino(bytes)?,
                name: take_name(bytes)?,
            },
            5 => {
                let page = take_page(bytes)?;
                let pages = take_page(bytes).filter(|pages| *pages > 0)?;
                let origin = match take_byte(bytes)? {
                    owned @ (0 | 1) => Origin::Spool {
                        at: take_page(bytes)?,
                        owned: owned == 1,
                    },
                    2 => Origin::Base {
                        ino: take_ino(bytes)?,
                        page: take_page(bytes)?,
                    },
                    3 => Origin::Hole { reserved: false },
                    4 => Origin::Hole { reserved: true },
                    _ => return None,
                };
                let extent = Extent {
                    page,
                    pages,
                    origin,
                };
                Edit::Extent { ino, extent }
            }
            6 => Edit::Truncate {
                ino,
                page: take_page(bytes)?,
            },
            7 => Edit::Orphan { ino },
            8 => {
                let attr = Attr::take(bytes)?;
                let (base, rest) = bytes.split_first_chunk::<32>()?;
                *bytes = rest;
                Edit::Carry {
                    ino,
                    attr,
                    base: NodeId(*base),
                    base_pages: take_page(bytes)?,
                }
            }
            9 => Edit::Remove { ino },
            _ => return None,
        })
    }
}

fn head(out: &mut Vec<u8>, tag: u8, ino: Ino) {
    out.push(tag);
    varint::put(out, ino.0);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    varint::put(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn take_byte(bytes: &mut &[u8]) -> Option<u8> {
    let (&first, rest) = bytes.split_first()?;
    *bytes = rest;
    Some(first)
}

fn take_ino(bytes: &mut &[u8]) -> Option<Ino> {
    Ino::of(varint::take(bytes)?)
}

/// No file has so many pages, and the bytes of two of them can still be counted.
const PAGES_MAX: u64 = 1 << 51;

/// Takes the number of a page, or of pages.
fn take_page(bytes: &mut &[u8]) -> Option<u64> {
    varint::take(bytes).filter(|page| *page < PAGES_MAX)
}

fn take_name(bytes: &mut &[u8]) -> Option<Name> {
    let name = take_bytes(bytes).filter(|name| record::is_name(name))?;
    Some(name.into())
}

fn take_bytes<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = usize::try_from(varint::take(bytes)?).ok()?;
    let (first, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    Some(first)
}

impl Table {
    /// Whether nothing was changed.
    pub fn is_empty(&self) -> bool {
        self.inodes.is_empty()
            && self.removed.is_empty()
            && self.entries.is_empty()
            && self.xattrs.is_empty()
            && self.unlinked.is_empty()
    }

    /// How many inodes were changed, made or removed.
    pub fn changes(&self) -> u64 {
        (self.inodes.len() + self.removed.len()) as u64
    }

    /// Bytes of memory, about.
    pub fn weight(&self) -> u64 {
        let names = self.entries.len() + self.unlinked.len() + self.xattrs.len();
        (self.inodes.len() * INODE_WEIGHT
            + self.removed.len() * REMOVED_WEIGHT
            + names * NAME_WEIGHT) as u64
    }

    /// Applies an edit to the maps of names. Edits of one inode's state go through [`apply_inode`].
    pub fn apply(&mut self, edit: &Edit) {
        match edit {
            Edit::Entry {
                dir,
                hash,
                name,
                child,
            } => {
                self.entries.insert((*dir, *hash, name.clone()), *child);
            }
            Edit::Xattr { ino, name, value } => {
                self.xattrs.insert((*ino, name.clone()), value.clone());
            }
            Edit::Unlinked { ino, parent, name } => {
                self.unlinked.insert((*ino, *parent, name.clone()));
            }
            Edit::Carry {
                ino,
                attr,
                base,
                base_pages,
            } => {
                let mut inode = Inode::created(attr.clone());
                inode.orphan = attr.nlink == 0;
                inode.base = Some(*base);
                inode.content.base_pages = *base_pages;
                self.inodes.insert(*ino, Cell::new(*ino, inode));
            }
            Edit::Attr { .. }
            | Edit::Extent { .. }
            | Edit::Truncate { .. }
            | Edit::Orphan { .. }
            | Edit::Remove { .. } => {}
        }
    }

    /// Keeps an inode without names out of what is below; its own state and attributes stay readable.
    pub fn orphan(&mut self, ino: Ino, created: bool) {
        if !created {
            self.removed.insert(ino);
        }
        self.forget_names(ino);
    }

    /// Forgets an inode and what only it explained; returns it, so that its room can be freed.
    pub fn remove(&mut self, ino: Ino, created: bool) -> Option<Arc<Cell>> {
        if !created {
            self.removed.insert(ino);
        }
        self.forget_names(ino);
        self.take_out(ino)
    }

    /// Takes an inode out with its extended attributes, and leaves its names.
    pub fn take_out(&mut self, ino: Ino) -> Option<Arc<Cell>> {
        let xattrs = (ino, Name::default())..(Ino(ino.0 + 1), Name::default());
        let gone: Vec<_> = self.xattrs.range(xattrs).map(|(k, _)| k.clone()).collect();
        for key in gone {
            self.xattrs.remove(&key);
        }
        self.inodes.remove(&ino)
    }

    /// Drops the entries and lost names of an inode that is gone: removing it removes all it had.
    fn forget_names(&mut self, ino: Ino) {
        let empty = Name::default;
        let entries = (ino, 0, empty())..(Ino(ino.0 + 1), 0, empty());
        let gone: Vec<_> = self
            .entries
            .range(entries)
            .map(|(k, _)| k.clone())
            .collect();
        for key in gone {
            self.entries.remove(&key);
        }
        let names = (ino, Ino(0), empty())..(Ino(ino.0 + 1), Ino(0), empty());
        let gone: Vec<_> = self.unlinked.range(names).cloned().collect();
        for key in gone {
            self.unlinked.remove(&key);
        }
    }
}

/// Applies an edit to the state of its inode; returns the extents whose room went.
pub fn apply_inode(inode: &mut Inode, edit: &Edit) -> Vec<Extent> {
    match edit {
        Edit::Attr { attr, .. } => {
            inode.attr = attr.clone();
            Vec::new()
        }
        Edit::Extent { extent, .. } => inode.content.put(*extent),
        Edit::Truncate { page, .. } => inode.content.truncate(*page),
        Edit::Orphan { .. } => {
            inode.orphan = true;
            Vec::new()
        }
        Edit::Entry { .. }
        | Edit::Xattr { .. }
        | Edit::Unlinked { .. }
        | Edit::Carry { .. }
        | Edit::Remove { .. } => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Edit> {
        let attr = Attr {
            kind: Kind::File,
            mode: 0o644,
            uid: 1,
            gid: 2,
            rdev: 0,
            nlink: 1,
            size: 70_000,
            blocks: 144,
            atime: 1,
            mtime: 2,
            ctime: 3,
            btime: 4,
            parent: Ino(0),
        };
        let ino = Ino(300);
        let name: Name = b"x"[..].into();
        let extent = |origin| Edit::Extent {
            ino,
            extent: Extent {
                page: 3,
                pages: 400,
                origin,
            },
        };
        vec![
            Edit::Attr {
                ino,
                attr: attr.clone(),
            },
            Edit::Entry {
                dir: ino,
                hash: 1 << 55,
                name: name.clone(),
                child: Some((Ino(4), Kind::Fifo)),
            },
            Edit::Entry {
                dir: ino,
                hash: 1,
                name: name.clone(),
                child: None,
            },
            Edit::Xattr {
                ino,
                name: name.clone(),
                value: Some(Arc::from(&b""[..])),
            },
            Edit::Xattr {
                ino,
                name: name.clone(),
                value: None,
            },
            Edit::Unlinked {
                ino,
                parent: Ino(1),
                name,
            },
            extent(Origin::Spool {
                at: 1 << 40,
                owned: true,
            }),
            extent(Origin::Spool {
                at: 9,
                owned: false,
            }),
            extent(Origin::Base {
                ino: Ino(6),
                page: 2,
            }),
            extent(Origin::Hole { reserved: true }),
            extent(Origin::Hole { reserved: false }),
            Edit::Truncate { ino, page: 12 },
            Edit::Orphan { ino },
            Edit::Carry {
                ino,
                attr,
                base: NodeId([1; 32]),
                base_pages: 5,
            },
            Edit::Remove { ino },
        ]
    }

    #[test]
    fn edits_come_back_as_they_were() {
        let mut bytes = Vec::new();
        for edit in samples() {
            edit.encode_to(&mut bytes);
        }
        let mut rest = bytes.as_slice();
        for edit in samples() {
            assert_eq!(Edit::take(&mut rest), Some(edit));
        }
        assert!(rest.is_empty());
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_are_refused_or_read_and_never_panic(bytes: Vec<u8>) {
            let mut rest = bytes.as_slice();
            while Edit::take(&mut rest).is_some() {}
        }
    }
}
