//! What a fork shows: its live table over the frozen one over the root.

use std::iter::Peekable;
use std::ops::Bound;
use std::sync::Arc;

use super::error::FsError;
use super::extent::{Content, Origin, PAGE, Piece, pages};
use super::table::{Cell, EntryKey, Inode, Table};
use super::{Fork, Layers, Root};
use crate::chunk;
use crate::record::{self, Attr, Ino, Key, Kind, Value};
use crate::store::{Loaded, Store};
use crate::tree::{self, NodeId};

/// An entry of a directory as it is listed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    /// Where a listing goes on behind this entry.
    pub cookie: u64,
    pub name: Box<[u8]>,
    pub ino: Ino,
    pub kind: Kind,
}

/// Names with equal hashes that one directory may hold: the rank has seven bits.
const RANKS: u64 = 128;

fn corrupt(what: &'static str, ino: Ino) -> FsError {
    crate::store::StoreError::Corrupt {
        what: format!("{what} of inode {ino}"),
    }
    .into()
}

/// Returns the attributes of an inode in a version.
pub fn base_attr(store: &Store, root: NodeId, ino: Ino) -> Result<Option<Attr>, FsError> {
    let Some(value) = tree::get(store, root, &record::attr_key(ino))? else {
        return Ok(None);
    };
    Attr::decode(&value)
        .map(Some)
        .ok_or_else(|| corrupt("the attributes", ino))
}

/// Returns the entry of a directory in a version.
pub fn base_entry(
    store: &Store,
    root: NodeId,
    dir: Ino,
    hash: u64,
    name: &[u8],
) -> Result<Option<(Ino, Kind)>, FsError> {
    let Some(value) = tree::get(store, root, &record::entry_key(dir, hash, name))? else {
        return Ok(None);
    };
    record::decode_entry(&value)
        .map(Some)
        .ok_or_else(|| corrupt("an entry", dir))
}

/// Returns the bytes that a value of the tree stands for.
pub fn load(store: &Store, value: &Value) -> Result<Vec<u8>, FsError> {
    Ok(match value {
        Value::Inline(bytes) => bytes.clone(),
        Value::Chunk { id, .. } => store.chunk(*id)?.to_vec(),
    })
}

/// Returns the content values of `[from, to)` of an inode in a version, with their offsets; what lies between them is a hole.
pub fn base_content(
    store: &Store,
    root: NodeId,
    ino: Ino,
    from: u64,
    to: u64,
) -> Result<Vec<(u64, Value)>, FsError> {
    let longest = chunk::MAX as u64;
    let start = record::content_key(ino, from.saturating_sub(longest - 1));
    let end = record::content_key(ino, to);
    let mut out = Vec::new();
    for item in tree::range(store, root, Bound::Included(&start), Bound::Excluded(&end)) {
        let (key, value) = item?;
        let (Some(Key::Content { offset, .. }), Some(value)) =
            (Key::parse(&key), Value::decode(&value))
        else {
            return Err(corrupt("the content", ino));
        };
        if offset + value.len() > from {
            out.push((offset, value));
        }
    }
    Ok(out)
}

/// Fills `buffer` with what an inode has at `offset` in a version; holes and what lies behind its end read as zeros.
pub fn read_base(
    store: &Store,
    root: NodeId,
    ino: Ino,
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), FsError> {
    let end = offset + buffer.len() as u64;
    let mut filled = 0;
    for (at, value) in base_content(store, root, ino, offset, end)? {
        let (from, to) = (at.max(offset), (at + value.len()).min(end));
        let skip = (from - at) as usize;
        let is_whole = to - from == value.len();
        let (from, to) = ((from - offset) as usize, (to - offset) as usize);
        if from < filled {
            return Err(corrupt("the content", ino));
        }
        buffer[filled..from].fill(0);
        let is_part = to - from < buffer.len();
        let room = &mut buffer[from..to];
        filled = to;
        let loaded;
        let bytes: &[u8] = match &value {
            Value::Inline(bytes) => bytes,
            Value::Chunk { id, .. } => {
                let direct: &mut [u8] = match is_whole && is_part {
                    true => &mut *room,
                    false => &mut [],
                };
                match store.chunk_to(*id, direct)? {
                    Loaded::Filled => continue,
                    Loaded::Chunk(chunk) => loaded = chunk,
                }
                &loaded
            }
        };
        if bytes.len() as u64 != value.len() {
            return Err(corrupt("the content", ino));
        }
        room.copy_from_slice(&bytes[skip..skip + room.len()]);
    }
    buffer[filled..].fill(0);
    Ok(())
}

/// Returns the runs of pages within `[from, to)` that hold data in a version, as (page, pages).
pub fn base_runs(
    store: &Store,
    root: NodeId,
    ino: Ino,
    from: u64,
    to: u64,
) -> Result<Vec<(u64, u64)>, FsError> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (at, value) in base_content(store, root, ino, from * PAGE, to * PAGE)? {
        let start = (at / PAGE).max(from);
        let end = pages(at + value.len()).min(to);
        match runs.last_mut() {
            Some((run, len)) if *run + *len >= start => *len = (*len).max(end - *run),
            _ if start < end => runs.push((start, end - start)),
            _ => {}
        }
    }
    Ok(runs)
}

impl Layers {
    /// The live table, and the frozen one below it.
    pub(super) fn tables(&self) -> impl Iterator<Item = &Table> {
        std::iter::once(&self.live).chain(self.frozen.as_deref())
    }

    /// Returns the cell of a changed inode, from whichever table has it.
    pub fn cell(&self, ino: Ino) -> Option<&Arc<Cell>> {
        for table in self.tables() {
            if let Some(cell) = table.inodes.get(&ino) {
                return Some(cell);
            }
            if table.removed.contains(&ino) {
                return None;
            }
        }
        None
    }

    fn is_removed(&self, ino: Ino) -> bool {
        for table in self.tables() {
            if table.removed.contains(&ino) {
                return true;
            }
            if table.inodes.contains_key(&ino) {
                return false;
            }
        }
        false
    }

    /// Returns the attributes of an inode.
    pub fn attr(&self, store: &Store, ino: Ino) -> Result<Option<Attr>, FsError> {
        if let Some(cell) = self.cell(ino) {
            return Ok(Some(cell.state.read().attr.clone()));
        }
        if self.is_removed(ino) {
            return Ok(None);
        }
        base_attr(store, self.root.id, ino)
    }

    /// Returns what a name in a directory stands for.
    pub fn entry(
        &self,
        store: &Store,
        dir: Ino,
        hash: u64,
        name: &[u8],
    ) -> Result<Option<(Ino, Kind)>, FsError> {
        let key: EntryKey = (dir, hash, name.into());
        for table in self.tables() {
            if let Some(child) = table.entries.get(&key) {
                return Ok(*child);
            }
            if table.removed.contains(&dir) {
                return Ok(None);
            }
            if table
                .inodes
                .get(&dir)
                .is_some_and(|cell| cell.state.read().created)
            {
                return Ok(None);
            }
        }
        base_entry(store, self.root.id, dir, hash, name)
    }

    /// Returns an extended attribute.
    pub fn xattr(
        &self,
        store: &Store,
        ino: Ino,
        name: &[u8],
    ) -> Result<Option<Arc<[u8]>>, FsError> {
        let key = (ino, Box::from(name));
        let mut root = self.root.id;
        for table in self.tables() {
            if let Some(value) = table.xattrs.get(&key) {
                return Ok(value.clone());
            }
            match table.inodes.get(&ino).map(|cell| cell.state.read()) {
                Some(inode) if !inode.is_of_base() => return Ok(None),
                Some(inode) => root = inode.base.unwrap_or(root),
                None if table.removed.contains(&ino) => return Ok(None),
                None => {}
            }
        }
        let Some(value) = tree::get(store, root, &record::xattr_key(ino, name))? else {
            return Ok(None);
        };
        let value = Value::decode(&value).ok_or_else(|| corrupt("an extended attribute", ino))?;
        Ok(Some(load(store, &value)?.into()))
    }

    /// Returns the names of an inode's extended attributes, in order of bytes.
    pub fn xattr_names(&self, store: &Store, ino: Ino) -> Result<Vec<Box<[u8]>>, FsError> {
        let mut names = std::collections::BTreeMap::new();
        let mut root = Some(self.root.id);
        for table in self.tables() {
            let range = (ino, Box::default())..(Ino(ino.0 + 1), Box::default());
            for ((_, name), value) in table.xattrs.range(range) {
                names.entry(name.clone()).or_insert(value.is_some());
            }
            match table.inodes.get(&ino).map(|cell| cell.state.read()) {
                Some(inode) if !inode.is_of_base() => root = None,
                Some(inode) => root = inode.base.or(root),
                None if table.removed.contains(&ino) => root = None,
                None => {}
            }
            if root.is_none() {
                break;
            }
        }
        if let Some(root) = root {
            let prefix = record::xattrs_prefix(ino);
            for item in tree::prefix(store, root, &prefix) {
                let (key, _) = item?;
                if let Some(Key::Xattr { name, .. }) = Key::parse(&key) {
                    names.entry(name.into()).or_insert(true);
                }
            }
        }
        Ok(names
            .into_iter()
            .filter(|(_, there)| *there)
            .map(|(name, _)| name)
            .collect())
    }

    /// The names (directory, name) that the root has for a non-directory.
    pub fn base_names(&self, store: &Store, ino: Ino) -> Result<Vec<Name>, FsError> {
        let mut names = Vec::new();
        let prefix = record::backrefs_prefix(ino);
        for item in tree::prefix(store, self.root.id, &prefix) {
            let (key, _) = item?;
            if let Some(Key::Backref { parent, name, .. }) = Key::parse(&key) {
                names.push((parent, name.into()));
            }
        }
        Ok(names)
    }

    /// Lists a directory behind `cookie`, in order of cookies, until `each` says that it has enough (by returning false).
    pub fn list(
        &self,
        store: &Store,
        dir: Ino,
        cookie: u64,
        mut each: impl FnMut(Listed) -> bool,
    ) -> Result<(), FsError> {
        let from = cookie / RANKS;
        let (mut hash, mut rank) = (0, 0);
        for item in self.merged(store, dir, from) {
            let ((entry_hash, name), (ino, kind)) = item?;
            rank = if entry_hash == hash { rank + 1 } else { 0 };
            hash = entry_hash;
            let at = entry_hash * RANKS + rank;
            if at > cookie
                && !each(Listed {
                    cookie: at,
                    name,
                    ino,
                    kind,
                })
            {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Returns how many entries of a directory share this hash.
    pub fn same_hash(&self, store: &Store, dir: Ino, hash: u64) -> Result<u64, FsError> {
        let mut count = 0;
        for item in self.merged(store, dir, hash) {
            if item?.0.0 != hash {
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    /// Whether a directory has no entry.
    pub fn is_empty_dir(&self, store: &Store, dir: Ino) -> Result<bool, FsError> {
        self.merged(store, dir, 0)
            .next()
            .transpose()
            .map(|first| first.is_none())
    }

    /// All entries of a directory whose hash is at least `from`, in order of hash and name.
    fn merged<'a>(&'a self, store: &'a Store, dir: Ino, from: u64) -> Merged<'a> {
        let mut tables = Vec::new();
        let mut with_base = true;
        for table in self.tables() {
            let range = (dir, from, Box::default())..(Ino(dir.0 + 1), 0, Box::default());
            tables.push(table.entries.range(range).peekable());
            let created = table
                .inodes
                .get(&dir)
                .is_some_and(|cell| cell.state.read().created);
            if created || table.removed.contains(&dir) {
                with_base = false;
                break;
            }
        }
        let base: Option<tree::Range<'a, Store>> = with_base.then(|| {
            let start = record::entry_prefix_at(dir, from);
            let end = record::xattrs_prefix(dir);
            tree::range(
                store,
                self.root.id,
                Bound::Included(&start),
                Bound::Excluded(&end),
            )
        });
        Merged {
            dir,
            tables,
            base: base.into_iter().flatten().peekable(),
        }
    }

    /// Returns the state of an inode for reading its content, with the root that its gaps show.
    pub fn inode(&self, store: &Store, ino: Ino) -> Result<Option<InodeView>, FsError> {
        if let Some(cell) = self.cell(ino) {
            return Ok(Some(InodeView::Changed(cell.clone(), self.root.clone())));
        }
        if self.is_removed(ino) {
            return Ok(None);
        }
        Ok(base_attr(store, self.root.id, ino)?
            .map(|attr| InodeView::Base(attr, self.root.clone())))
    }

    /// Returns the state that a new cell of the live table begins with: what is below it.
    pub fn below(&self, store: &Store, ino: Ino) -> Result<Option<Inode>, FsError> {
        if self.live.removed.contains(&ino) {
            return Ok(None);
        }
        if let Some(table) = self.frozen.as_deref() {
            if let Some(cell) = table.inodes.get(&ino) {
                return Ok(Some(thawed(&cell.state.read())));
            }
            if table.removed.contains(&ino) {
                return Ok(None);
            }
        }
        Ok(base_attr(store, self.root.id, ino)?.map(Inode::of_base))
    }
}

/// A copy of a frozen inode to be changed: nothing of its room may be written in place.
pub(super) fn thawed(frozen: &Inode) -> Inode {
    let mut inode = frozen.clone();
    inode.content.extents.disown(0, u64::MAX);
    inode.content.inherited_pages = pages(inode.attr.size);
    inode.created = false;
    inode.ahead = None;
    inode.ingested = None;
    inode
}

/// An inode as a reader sees it.
pub enum InodeView {
    Base(Attr, Arc<Root>),
    Changed(Arc<Cell>, Arc<Root>),
}

/// Where an entry stands in its directory: hash and name.
type Place = (u64, Box<[u8]>);

type Child = (Place, (Ino, Kind));

/// A name of an inode: the directory, and what it is called there.
pub type Name = (Ino, Box<[u8]>);

/// A name and what a table or the base says of it: taken away where there is no inode.
type Named = (Place, Option<(Ino, Kind)>);

type TableEntries<'a> =
    Peekable<std::collections::btree_map::Range<'a, EntryKey, Option<(Ino, Kind)>>>;

/// Merges the entries of one directory: the first table that knows a name decides.
struct Merged<'a> {
    dir: Ino,
    tables: Vec<TableEntries<'a>>,
    base: Peekable<std::iter::Flatten<std::option::IntoIter<tree::Range<'a, Store>>>>,
}

impl Merged<'_> {
    fn step(&mut self) -> Result<Option<Named>, FsError> {
        let mut least: Option<Place> = None;
        for entries in &mut self.tables {
            if let Some(((_, hash, name), _)) = entries.peek()
                && least
                    .as_ref()
                    .is_none_or(|(h, n)| (*hash, &**name) < (*h, &**n))
            {
                least = Some((*hash, name.clone()));
            }
        }
        let base = match self.base.peek() {
            None => None,
            Some(Ok((key, value))) => match (Key::parse(key), record::decode_entry(value)) {
                (Some(Key::Entry { hash, name, .. }), Some(child)) => {
                    Some((hash, Box::from(name), child))
                }
                _ => return Err(corrupt("an entry", self.dir)),
            },
            Some(Err(_)) => match self.base.next() {
                Some(Err(error)) => return Err(error.into()),
                _ => None,
            },
        };
        let mut child = None;
        if let Some((hash, name, at_base)) = base
            && least.as_ref().is_none_or(|(h, n)| (hash, &name) <= (*h, n))
        {
            child = Some(Some(at_base));
            least = Some((hash, name));
            self.base.next();
        }
        let Some(least) = least else { return Ok(None) };
        for entries in self.tables.iter_mut().rev() {
            if entries
                .peek()
                .is_some_and(|((_, h, n), _)| (*h, &**n) == (least.0, &*least.1))
            {
                child = entries.next().map(|(_, child)| *child);
            }
        }
        Ok(Some((least, child.flatten())))
    }
}

impl Iterator for Merged<'_> {
    type Item = Result<Child, FsError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.step() {
                Ok(Some((key, Some(child)))) => return Some(Ok((key, child))),
                Ok(Some((_, None))) => {}
                Ok(None) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

impl Fork {
    /// Fills `buffer` with what a locked inode has at `offset`. What lies behind its size is undefined.
    pub fn read_inode(
        &self,
        inode: &Inode,
        root: NodeId,
        ino: Ino,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), FsError> {
        if buffer.is_empty() {
            return Ok(());
        }
        let root = inode.base.unwrap_or(root);
        let end = offset + buffer.len() as u64;
        for piece in inode.content.pieces(offset / PAGE, pages(end)) {
            let (page, count) = match piece {
                Piece::Extent(extent) => (extent.page, extent.pages),
                Piece::Base { page, pages } | Piece::Hole { page, pages } => (page, pages),
            };
            let from = (page * PAGE).max(offset);
            let to = ((page + count) * PAGE).min(end);
            let part = &mut buffer[(from - offset) as usize..(to - offset) as usize];
            let skip = from - page * PAGE;
            let store = &self.store;
            match piece {
                Piece::Hole { .. } => part.fill(0),
                Piece::Base { .. } => read_base(store, root, ino, from, part)?,
                Piece::Extent(extent) => match extent.origin {
                    Origin::Spool { at, .. } => self.spool.read(part, at * PAGE + skip)?,
                    Origin::Base { ino, page } => {
                        read_base(store, root, ino, page * PAGE + skip, part)?;
                    }
                    Origin::Hole { .. } => part.fill(0),
                },
            }
        }
        Ok(())
    }
}

/// Returns the runs of pages within `[from, to)` of a changed inode that hold data, as (page, pages), joined.
pub fn content_runs(
    store: &Store,
    root: NodeId,
    ino: Ino,
    content: &Content,
    from: u64,
    to: u64,
) -> Result<Vec<(u64, u64)>, FsError> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut push = |page: u64, pages: u64| match runs.last_mut() {
        Some((run, len)) if *run + *len == page => *len += pages,
        _ => runs.push((page, pages)),
    };
    for piece in content.pieces(from, to) {
        match piece {
            Piece::Hole { .. } => {}
            Piece::Base { page, pages } => {
                for (page, pages) in base_runs(store, root, ino, page, page + pages)? {
                    push(page, pages);
                }
            }
            Piece::Extent(extent) => match extent.origin {
                Origin::Base { ino, page } => {
                    for (at, pages) in base_runs(store, root, ino, page, page + extent.pages)? {
                        push(extent.page + (at - page), pages);
                    }
                }
                _ => push(extent.page, extent.pages),
            },
        }
    }
    Ok(runs)
}
