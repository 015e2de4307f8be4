//! POSIX operations on a fork, with plain values and errors: what any kernel transport calls, and what tests call without one.
//!
//! Rights were checked by the kernel (`default_permissions`); what is left to a filesystem is done here: suid and sgid
//! clearing, sticky-free name rules, link counts, times, holes, extended attributes and their limits.

mod acl;
mod attr;
mod copy;
mod io;
mod name;
mod node;
mod rename;
mod xattr;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::fork::error::FsError;
use crate::fork::extent::PAGE;
use crate::fork::log::Request;
use crate::fork::view::{InodeView, Listed};
use crate::fork::{Fork, Inside, Layers, Tx};
use crate::record::{Attr, Ino, Kind, NAME_MAX, ROOT, hash56};
use crate::sys::now;

pub use attr::{CAPABILITY, SetAttr};
pub use io::{Allocate, Seek};
pub use node::NewNode;
pub use rename::RenameMode;
pub use xattr::XattrMode;

/// The largest file: what the kernel's page cache can address.
pub const SIZE_MAX: u64 = i64::MAX as u64 & !(PAGE - 1);
/// The most links of an inode.
pub const LINK_MAX: u32 = 1 << 20;

/// Who asks for what.
#[derive(Clone, Copy, Debug, Default)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    pub request: Request,
}

/// How owners are shown and stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ownership {
    /// Plain POSIX.
    Keep,
    /// Everything is shown as this user's, and stored as such once it is written or its attributes are set; nobody changes it.
    As { uid: u32, gid: u32 },
}

/// What a filesystem is besides its fork.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub read_only: bool,
    pub ownership: Ownership,
    /// POSIX ACLs are kept and inherited, and the umask is ours to apply.
    pub acl: bool,
}

/// An inode and its attributes, as a reply carries them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub ino: Ino,
    pub attr: Attr,
}

/// The numbers of statfs, in 4 KiB blocks and inodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Statfs {
    pub blocks: u64,
    pub free: u64,
    pub files: u64,
    pub files_free: u64,
}

/// A fork as a filesystem, or a folder of it.
#[derive(Clone)]
pub struct Fs {
    pub fork: Arc<Fork>,
    pub options: Options,
    /// Whose lookups are counted: the epoch of the session, 0 without one.
    session: u64,
    /// A newer session serves what this one did.
    ended: Arc<AtomicBool>,
    /// The folder at the top.
    root: Ino,
    /// A file may have names outside the folder, which another kernel caches.
    shares_links: bool,
    /// Files with several names, all of which are known to lie in the folder: no other session can give them one elsewhere.
    insiders: Arc<Mutex<HashSet<Ino>>>,
}

/// Checks a name as every operation that takes one must.
fn check_name(name: &[u8]) -> Result<(), FsError> {
    if name.len() > NAME_MAX {
        return Err(FsError::NameTooLong);
    }
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0)
    {
        return Err(FsError::Invalid);
    }
    Ok(())
}

impl Fs {
    /// Serves a fork with these options.
    pub fn new(fork: Arc<Fork>, options: Options) -> Fs {
        Fs {
            fork,
            options,
            session: 0,
            ended: Arc::default(),
            root: ROOT,
            shares_links: false,
            insiders: Arc::default(),
        }
    }

    /// The same for one session, which serves the folder `root` until it is said to have ended.
    ///
    /// # Errors
    /// `NotDirectory`; what the store answered.
    pub fn for_session(
        mut self,
        session: u64,
        root: Ino,
        ended: Arc<AtomicBool>,
    ) -> Result<Fs, FsError> {
        let attr = self.getattr(root)?;
        if attr.kind != Kind::Directory {
            return Err(FsError::NotDirectory);
        }
        (self.session, self.root, self.ended) = (session, root, ended);
        self.fork.begin_session(session);
        self.shares_links = root != ROOT && self.fork.may_have_links();
        Ok(self)
    }

    /// The folder at the top.
    pub fn root(&self) -> Ino {
        self.root
    }

    /// Whether files may have names outside of what this session serves.
    pub fn shares_links(&self) -> bool {
        self.shares_links
    }

    /// Counts that the kernel forgot an inode so many times.
    pub fn forget(&self, ino: Ino, times: u64) {
        self.fork.forget(self.session, ino, times);
    }

    /// Notes that the kernel may hold pages of a file from now on; returns whether it may have had some before.
    pub fn note_cached(&self, ino: Ino) -> bool {
        self.fork.note_cached(self.session, ino)
    }

    /// Whether the kernel may hold pages of a file, as it may of one that it does not know.
    pub fn may_be_cached(&self, ino: Ino) -> bool {
        self.fork.may_be_cached(self.session, ino)
    }

    /// Whether another kernel may cache a file too: it may have a name outside the folder that this session serves, or another
    /// session's kernel knows it, by a name that it had.
    ///
    /// # Errors
    /// What the store answered.
    pub fn is_shared(&self, ino: Ino, attr: &Attr) -> Result<bool, FsError> {
        if !self.shares_links || attr.kind == Kind::Directory {
            return Ok(false);
        }
        let by_names = self.has_names_outside(ino, attr)?;
        Ok(self.fork.is_shared(self.session, ino, by_names))
    }

    /// Whether a file may have a name outside the folder at the top. Names that the base knows and that are still there count as
    /// inside, and all of a file that once had no others: what is not known to be inside is outside. A file with one name was found
    /// by it, or is known to be shared.
    fn has_names_outside(&self, ino: Ino, attr: &Attr) -> Result<bool, FsError> {
        if attr.nlink < 2 || self.insiders.lock().contains(&ino) {
            return Ok(false);
        }
        let store = &self.fork.store;
        let layers = self.fork.layers();
        let mut inside = 0;
        for (dir, name) in layers.base_names(store, ino)? {
            let entry = layers.entry(store, dir, hash56(&name), &name)?;
            if entry.is_some_and(|(at, _)| at == ino) && self.is_inside(&layers, dir)? {
                inside += 1;
            }
        }
        if inside == attr.nlink {
            self.insiders.lock().insert(ino);
        }
        Ok(inside < attr.nlink)
    }

    /// Notes that a file of so many names gets one more in this session.
    fn note_link(&self, ino: Ino, names: u32) {
        self.fork.note_link();
        if self.shares_links && names == 1 && !self.fork.is_shared(self.session, ino, false) {
            self.insiders.lock().insert(ino);
        }
    }

    /// Whether a folder lies below the one at the top.
    fn is_inside(&self, layers: &Layers, mut dir: Ino) -> Result<bool, FsError> {
        while dir != self.root {
            if dir == ROOT {
                return Ok(false);
            }
            dir = match layers.attr(&self.fork.store, dir)? {
                Some(attr) => attr.parent,
                None => return Ok(false),
            };
        }
        Ok(true)
    }

    /// Takes part in the fork's gate for one reading.
    fn look(&self) -> Result<Inside, FsError> {
        let inside = self.fork.look()?;
        self.in_charge().map(|()| inside)
    }

    /// Fails where nothing is answered any more.
    fn check_alive(&self) -> Result<(), FsError> {
        self.look().map(drop)
    }

    /// Takes part in the fork's gate for one mutation.
    fn enter(&self) -> Result<Inside, FsError> {
        let inside = self.fork.enter()?;
        self.in_charge().map(|()| inside)
    }

    /// Begins a transaction on names.
    fn begin(&self) -> Result<Tx<'_>, FsError> {
        let tx = self.fork.begin()?;
        self.in_charge().map(|()| tx)
    }

    /// Asked within the gate, so that nothing of a session that was ended before the gate was free happens behind that.
    fn in_charge(&self) -> Result<(), FsError> {
        match self.ended.load(Ordering::Acquire) {
            true => Err(FsError::Ended),
            false => Ok(()),
        }
    }

    fn writable(&self) -> Result<(), FsError> {
        if self.options.read_only {
            Err(FsError::ReadOnly)
        } else {
            Ok(())
        }
    }

    /// The attributes as the caller is to see them.
    fn shown(&self, mut attr: Attr) -> Attr {
        if let Ownership::As { uid, gid } = self.options.ownership {
            (attr.uid, attr.gid) = (uid, gid);
        }
        attr
    }

    /// Looks a name up in a directory, `.` and `..` among them, and counts that the kernel was told of what it found.
    pub fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Option<Entry>, FsError> {
        if name.len() > NAME_MAX {
            return Err(FsError::NameTooLong);
        }
        self.check_alive()?;
        let store = &self.fork.store;
        let layers = self.fork.layers();
        let ino = match name {
            b"." => dir,
            b".." if dir == self.root => dir,
            b".." => layers.attr(store, dir)?.ok_or(FsError::Stale)?.parent,
            _ => match layers.entry(store, dir, hash56(name), name)? {
                Some((ino, _)) => ino,
                None => return Ok(None),
            },
        };
        self.known(&layers, ino).map(Some)
    }

    /// Returns an inode as readdirplus shows it, counted like a lookup; None if it has gone since it was listed.
    pub fn listed(&self, ino: Ino) -> Result<Option<Entry>, FsError> {
        match self.known(&self.fork.layers(), ino) {
            Ok(entry) => Ok(Some(entry)),
            Err(FsError::Stale) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Counted before the lock of the names is let go: an inode that the kernel knows is not removed under it.
    fn known(&self, layers: &Layers, ino: Ino) -> Result<Entry, FsError> {
        let attr = layers.attr(&self.fork.store, ino)?.ok_or(FsError::Stale)?;
        self.fork.looked_up(self.session, ino);
        Ok(Entry {
            ino,
            attr: self.shown(attr),
        })
    }

    /// Returns the attributes of an inode.
    pub fn getattr(&self, ino: Ino) -> Result<Attr, FsError> {
        self.check_alive()?;
        let attr = self
            .fork
            .layers()
            .attr(&self.fork.store, ino)?
            .ok_or(FsError::Stale)?;
        Ok(self.shown(attr))
    }

    /// Returns the target of a symbolic link.
    pub fn readlink(&self, ino: Ino) -> Result<Vec<u8>, FsError> {
        let attr = self.getattr(ino)?;
        if attr.kind != Kind::Symlink {
            return Err(FsError::Invalid);
        }
        self.read(ino, 0, attr.size as usize)
    }

    /// Lists a directory behind `cookie`, `.` and `..` first, until `each` has enough (by returning false).
    pub fn readdir(
        &self,
        dir: Ino,
        cookie: u64,
        mut each: impl FnMut(Listed) -> bool,
    ) -> Result<(), FsError> {
        self.check_alive()?;
        let layers = self.fork.layers();
        let attr = layers.attr(&self.fork.store, dir)?.ok_or(FsError::Stale)?;
        if attr.kind != Kind::Directory {
            return Err(FsError::NotDirectory);
        }
        let above = if dir == self.root { dir } else { attr.parent };
        let dots: [(u64, &[u8], Ino); 2] = [(1, b".", dir), (2, b"..", above)];
        for (at, name, ino) in dots {
            let entry = Listed {
                cookie: at,
                name: name.into(),
                ino,
                kind: Kind::Directory,
            };
            if at > cookie && !each(entry) {
                return Ok(());
            }
        }
        layers.list(&self.fork.store, dir, cookie.max(2), each)
    }

    /// Returns what df shows: the blocks in use, and the room that is left.
    pub fn statfs(&self) -> Statfs {
        let free = self.fork.room() / PAGE;
        let (blocks, files) = self.fork.holds();
        let blocks = blocks.div_ceil(8);
        Statfs {
            blocks: blocks + free,
            free,
            files: files + free,
            files_free: free,
        }
    }

    /// An inode as a reader sees it. The caller has looked into the fork and goes on looking until it has read.
    fn view(&self, ino: Ino) -> Result<InodeView, FsError> {
        self.fork
            .layers()
            .inode(&self.fork.store, ino)?
            .ok_or(FsError::Stale)
    }
}
