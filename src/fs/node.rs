//! Making inodes: mknod, create, mkdir, symlink.

use super::acl::Inherited;
use super::{Caller, Entry, Fs, LINK_MAX, Ownership, check_name, now};
use crate::fork::Tx;
use crate::fork::error::FsError;
use crate::fork::extent::{Extent, Origin, PAGE, pages};
use crate::fork::table::Edit;
use crate::record::{Attr, Ino, Kind, Nanos, hash56};

/// The longest target of a symbolic link.
const TARGET_MAX: usize = 4095;
/// Entries of one directory whose names have the same hash.
const SAME_HASH_MAX: u64 = 128;

/// What is to be made.
#[derive(Clone, Copy, Debug)]
pub struct NewNode<'a> {
    pub kind: Kind,
    /// Permission bits as the caller gave them; without ACLs the kernel has applied the umask.
    pub mode: u16,
    pub umask: u16,
    pub rdev: u32,
    /// The target of a symbolic link.
    pub target: &'a [u8],
}

impl NewNode<'_> {
    /// A node of this kind and mode, with nothing else to say.
    pub fn new(kind: Kind, mode: u16) -> NewNode<'static> {
        NewNode {
            kind,
            mode,
            umask: 0,
            rdev: 0,
            target: b"",
        }
    }
}

impl Fs {
    /// Makes an inode under a name that must be free.
    pub fn make(
        &self,
        caller: Caller,
        dir: Ino,
        name: &[u8],
        node: NewNode<'_>,
    ) -> Result<Entry, FsError> {
        self.writable()?;
        check_name(name)?;
        if node.kind == Kind::Symlink && node.target.len() > TARGET_MAX {
            return Err(FsError::NameTooLong);
        }
        let room = self.write_target(node.target)?;
        let result = self.make_with(caller, dir, name, node, room);
        if result.is_err()
            && let Some(extent) = room
        {
            self.fork.spool.release([extent]);
        }
        result
    }

    fn make_with(
        &self,
        caller: Caller,
        dir: Ino,
        name: &[u8],
        node: NewNode<'_>,
        room: Option<Extent>,
    ) -> Result<Entry, FsError> {
        let hash = hash56(name);
        let mut tx = self.begin()?;
        self.check_free(&tx, dir, hash, name)?;
        let inherited = self.inherit(&tx, dir, &node)?;
        tx.lock(&[dir])?;
        if node.kind == Kind::Directory && tx.attr(dir).nlink >= LINK_MAX {
            return Err(FsError::TooManyLinks);
        }
        let time = now();
        let (ino, attr) = self.create(&mut tx, caller, dir, &node, inherited, time)?;
        if let Some(extent) = room {
            tx.push(Edit::Extent { ino, extent });
        }
        touch_parent(&mut tx, dir, time);
        if node.kind == Kind::Directory {
            tx.attr_mut(dir).nlink += 1;
        }
        tx.set_entry(dir, hash, name, Some((ino, node.kind)));
        self.fork.looked_up(self.session, ino);
        match tx.finish(caller.request) {
            Ok(()) => Ok(Entry {
                ino,
                attr: self.shown(attr),
            }),
            Err(error) => {
                self.forget(ino, 1);
                Err(error)
            }
        }
    }

    /// Fails if a directory is gone, is none, has the name already, or cannot take one more name of that hash.
    pub(super) fn check_free(
        &self,
        tx: &Tx<'_>,
        dir: Ino,
        hash: u64,
        name: &[u8],
    ) -> Result<(), FsError> {
        let store = &self.fork.store;
        let parent = tx.layers.attr(store, dir)?.ok_or(FsError::Stale)?;
        if parent.kind != Kind::Directory {
            return Err(FsError::NotDirectory);
        }
        if parent.nlink == 0 {
            return Err(FsError::NotFound);
        }
        if tx.layers.entry(store, dir, hash, name)?.is_some() {
            return Err(FsError::Exists);
        }
        if tx.layers.same_hash(store, dir, hash)? >= SAME_HASH_MAX {
            return Err(FsError::NoSpace);
        }
        Ok(())
    }

    /// Makes an inode for a locked directory, with what it gets from there, and no name yet.
    pub(super) fn create(
        &self,
        tx: &mut Tx<'_>,
        caller: Caller,
        dir: Ino,
        node: &NewNode<'_>,
        inherited: Inherited,
        time: Nanos,
    ) -> Result<(Ino, Attr), FsError> {
        let attr = self.new_attr(caller, tx.attr(dir), dir, node, &inherited, time);
        let ino = tx.create(attr.clone())?;
        for (name, value) in inherited.xattrs {
            tx.push(Edit::Xattr {
                ino,
                name: name.into(),
                value: Some(value.into()),
            });
        }
        Ok((ino, attr))
    }

    fn new_attr(
        &self,
        caller: Caller,
        parent: &Attr,
        dir: Ino,
        node: &NewNode<'_>,
        inherited: &Inherited,
        time: Nanos,
    ) -> Attr {
        let mut mode = inherited.mode;
        let (uid, mut gid) = match self.options.ownership {
            Ownership::As { uid, gid } => (uid, gid),
            Ownership::Keep => (caller.uid, caller.gid),
        };
        if parent.mode & 0o2000 != 0 {
            if self.options.ownership == Ownership::Keep {
                gid = parent.gid;
            }
            if node.kind == Kind::Directory {
                mode |= 0o2000;
            }
        }
        let is_dir = node.kind == Kind::Directory;
        Attr {
            kind: node.kind,
            mode,
            uid,
            gid,
            rdev: if matches!(node.kind, Kind::CharDevice | Kind::BlockDevice) {
                node.rdev
            } else {
                0
            },
            nlink: if is_dir { 2 } else { 1 },
            size: node.target.len() as u64,
            blocks: pages(node.target.len() as u64) * 8,
            atime: time,
            mtime: time,
            ctime: time,
            btime: time,
            parent: if is_dir { dir } else { Ino(0) },
        }
    }

    /// Writes the target of a link, which is its content, to the spool.
    fn write_target(&self, target: &[u8]) -> Result<Option<Extent>, FsError> {
        if target.is_empty() {
            return Ok(None);
        }
        let _gate = self.enter()?;
        self.fork.want_pages(1)?;
        let at = self.fork.spool.allocate(1, 0);
        let extent = Extent {
            page: 0,
            pages: 1,
            origin: Origin::Spool { at, owned: true },
        };
        if let Err(error) = self.fork.spool.write(target, at * PAGE) {
            self.fork.spool.release([extent]);
            return Err(error.into());
        }
        Ok(Some(extent))
    }

    /// Gives an inode one more name.
    pub fn link(&self, caller: Caller, ino: Ino, dir: Ino, name: &[u8]) -> Result<Entry, FsError> {
        self.writable()?;
        check_name(name)?;
        let hash = hash56(name);
        let mut tx = self.begin()?;
        self.check_free(&tx, dir, hash, name)?;
        tx.lock(&[ino, dir])?;
        let attr = tx.attr(ino);
        if attr.kind == Kind::Directory {
            return Err(FsError::NotPermitted);
        }
        if attr.nlink == 0 {
            return Err(FsError::NotFound);
        }
        if attr.nlink >= LINK_MAX {
            return Err(FsError::TooManyLinks);
        }
        let (kind, names) = (attr.kind, attr.nlink);
        let time = now();
        touch_parent(&mut tx, dir, time);
        let attr = tx.attr_mut(ino);
        attr.nlink += 1;
        attr.ctime = time;
        let attr = attr.clone();
        tx.set_entry(dir, hash, name, Some((ino, kind)));
        self.note_link(ino, names);
        self.fork.looked_up(self.session, ino);
        if let Err(error) = tx.finish(caller.request) {
            self.forget(ino, 1);
            return Err(error);
        }
        Ok(Entry {
            ino,
            attr: self.shown(attr),
        })
    }
}

/// Notes that the entries of a directory changed.
pub(super) fn touch_parent(tx: &mut Tx<'_>, dir: Ino, time: Nanos) {
    let parent = tx.attr_mut(dir);
    parent.mtime = time;
    parent.ctime = time;
}
