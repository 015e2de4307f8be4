//! The tree of the floor: inodes and names in memory.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use fuser::{Errno, FileAttr, FileType, INodeNo};
use parking_lot::{Mutex, RwLock};

/// The inode of the topmost folder.
pub const ROOT: u64 = 1;

/// What an inode holds. A folder keeps its names by cookie too: a listing goes on where it was, whatever is unlinked meanwhile.
pub enum Body {
    File(Vec<u8>),
    Folder {
        parent: u64,
        names: HashMap<OsString, (u64, u64)>,
        listed: BTreeMap<u64, (OsString, u64, FileType)>,
    },
    Symlink(Vec<u8>),
    Special,
}

pub struct Node {
    pub attr: FileAttr,
    pub body: Body,
    /// So often the kernel was told of it.
    pub lookups: u64,
}

pub type Cell = Arc<Mutex<Node>>;

pub struct Tree {
    nodes: RwLock<HashMap<u64, Cell>>,
    next: AtomicU64,
}

pub fn folder(parent: u64) -> Body {
    Body::Folder {
        parent,
        names: HashMap::new(),
        listed: BTreeMap::new(),
    }
}

pub fn blocks(size: u64) -> u64 {
    size.div_ceil(512)
}

impl Tree {
    pub fn new() -> Tree {
        let tree = Tree {
            nodes: RwLock::default(),
            next: AtomicU64::new(ROOT),
        };
        tree.add(FileType::Directory, 0o755, (0, 0), 0, folder(ROOT));
        tree
    }

    pub fn add(&self, kind: FileType, perm: u16, owner: (u32, u32), rdev: u32, body: Body) -> Cell {
        let ino = self.next.fetch_add(1, Ordering::Relaxed);
        let now = SystemTime::now();
        let size = match &body {
            Body::Symlink(target) => target.len() as u64,
            _ => 0,
        };
        let attr = FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: 0,
            atime: now,
            mtime: now,
            ctime: now,
            crtime: now,
            kind,
            perm,
            nlink: if kind == FileType::Directory { 2 } else { 1 },
            uid: owner.0,
            gid: owner.1,
            rdev,
            blksize: 4096,
            flags: 0,
        };
        let cell = Arc::new(Mutex::new(Node {
            attr,
            body,
            lookups: 0,
        }));
        self.nodes.write().insert(ino, cell.clone());
        cell
    }

    pub fn get(&self, ino: u64) -> Result<Cell, Errno> {
        self.nodes.read().get(&ino).cloned().ok_or(Errno::ENOENT)
    }

    pub fn find(&self, parent: u64, name: &OsStr) -> Result<Option<u64>, Errno> {
        match &self.get(parent)?.lock().body {
            Body::Folder { names, .. } => Ok(names.get(name).map(|(_, ino)| *ino)),
            _ => Err(Errno::ENOTDIR),
        }
    }

    /// Puts a name into a folder.
    pub fn enter(&self, parent: u64, name: &OsStr, ino: u64, kind: FileType) -> Result<(), Errno> {
        let cell = self.get(parent)?;
        let mut node = cell.lock();
        let Node { attr, body, .. } = &mut *node;
        let Body::Folder { names, listed, .. } = body else {
            return Err(Errno::ENOTDIR);
        };
        // 1 and 2 are the cookies of "." and "..".
        let cookie = listed.last_key_value().map_or(3, |(last, _)| last + 1);
        names.insert(name.to_owned(), (cookie, ino));
        listed.insert(cookie, (name.to_owned(), ino, kind));
        if kind == FileType::Directory {
            attr.nlink += 1;
        }
        attr.mtime = SystemTime::now();
        attr.ctime = attr.mtime;
        Ok(())
    }

    /// Takes a name out of a folder and returns the inode that had it.
    pub fn leave(&self, parent: u64, name: &OsStr) -> Result<u64, Errno> {
        let cell = self.get(parent)?;
        let mut node = cell.lock();
        let Node { attr, body, .. } = &mut *node;
        let Body::Folder { names, listed, .. } = body else {
            return Err(Errno::ENOTDIR);
        };
        let (cookie, ino) = names.remove(name).ok_or(Errno::ENOENT)?;
        let entry = listed.remove(&cookie);
        if entry.is_some_and(|(_, _, kind)| kind == FileType::Directory) {
            attr.nlink -= 1;
        }
        attr.mtime = SystemTime::now();
        attr.ctime = attr.mtime;
        Ok(ino)
    }

    /// Takes one link from an inode, all of them from a folder; it goes once the kernel has forgotten it.
    pub fn unlink(&self, ino: u64) -> Result<(), Errno> {
        let cell = self.get(ino)?;
        let mut node = cell.lock();
        node.attr.nlink = match node.body {
            Body::Folder { .. } => 0,
            _ => node.attr.nlink - 1,
        };
        node.attr.ctime = SystemTime::now();
        let is_gone = node.attr.nlink == 0 && node.lookups == 0;
        drop(node);
        if is_gone {
            self.nodes.write().remove(&ino);
        }
        Ok(())
    }

    pub fn is_full(&self, ino: u64) -> Result<bool, Errno> {
        match &self.get(ino)?.lock().body {
            Body::Folder { names, .. } => Ok(!names.is_empty()),
            _ => Ok(false),
        }
    }

    /// The listing of a folder after `offset`, as far as `add` takes it.
    pub fn list(
        &self,
        ino: u64,
        offset: u64,
        mut add: impl FnMut(u64, &OsStr, u64, FileType) -> bool,
    ) -> Result<(), Errno> {
        let cell = self.get(ino)?;
        let node = cell.lock();
        let Body::Folder { parent, listed, .. } = &node.body else {
            return Err(Errno::ENOTDIR);
        };
        for (cookie, name, ino) in [(1, ".", ino), (2, "..", *parent)] {
            if offset < cookie && !add(cookie, OsStr::new(name), ino, FileType::Directory) {
                return Ok(());
            }
        }
        for (cookie, (name, ino, kind)) in listed.range(offset + 1..) {
            if !add(*cookie, name, *ino, *kind) {
                break;
            }
        }
        Ok(())
    }

    /// The kernel has dropped what it was told so many times.
    pub fn forget(&self, ino: u64, times: u64) {
        if ino == ROOT {
            return;
        }
        let Ok(cell) = self.get(ino) else { return };
        let mut node = cell.lock();
        node.lookups = node.lookups.saturating_sub(times);
        if node.lookups == 0 && node.attr.nlink == 0 {
            drop(node);
            self.nodes.write().remove(&ino);
        }
    }

    /// The kernel has dropped everything that it knew: a session has ended.
    pub fn forget_all(&self) {
        self.nodes.write().retain(|_, cell| {
            let mut node = cell.lock();
            node.lookups = 0;
            node.attr.nlink > 0
        });
    }
}

/// Counts one more answer that tells the kernel of an inode.
pub fn told(cell: &Cell) -> FileAttr {
    let mut node = cell.lock();
    node.lookups += 1;
    node.attr
}
