//! Transactions on names: what one operation changes in several inodes and directories, logged and applied as one.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::{ArcRwLockWriteGuard, RawRwLock, RwLockWriteGuard};

use super::error::FsError;
use super::extent::{Content, Extent, ExtentMap, Origin};
use super::log::Request;
use super::table::{Cell, Edit, Inode, Table};
use super::{Fork, INODE_CHARGE, Inside, Layers, view};
use crate::record::{Attr, Ino, Kind};

/// One namespace operation: it has the names of the fork to itself, and the inodes it asked for.
pub struct Tx<'a> {
    pub layers: RwLockWriteGuard<'a, Layers>,
    fork: &'a Fork,
    _gate: Inside,
    locked: Vec<Locked>,
    edits: Vec<Edit>,
    created: u64,
}

struct Locked {
    ino: Ino,
    /// None for an inode that this transaction makes.
    state: Option<ArcRwLockWriteGuard<RawRwLock, Inode>>,
    attr: Attr,
    changed: bool,
}

impl Fork {
    /// Begins a transaction on names.
    pub fn begin(&self) -> Result<Tx<'_>, FsError> {
        let gate = self.enter()?;
        Ok(Tx {
            layers: self.layers.write(),
            fork: self,
            _gate: gate,
            locked: Vec::new(),
            edits: Vec::new(),
            created: 0,
        })
    }

    /// Returns the cell of an inode in the live table, brought there if it was not; `None` if there is no such inode.
    /// The caller has entered the gate.
    pub fn cell(&self, ino: Ino) -> Result<Option<Arc<Cell>>, FsError> {
        if let Some(cell) = self.layers.read().live.inodes.get(&ino) {
            return Ok(Some(cell.clone()));
        }
        let mut layers = self.layers.write();
        if !self.load(&mut layers, ino)? {
            return Ok(None);
        }
        Ok(layers.live.inodes.get(&ino).cloned())
    }

    /// Logs edits of one inode, whose lock the caller holds, and applies them.
    pub fn edit(&self, request: Request, inode: &mut Inode, edits: &[Edit]) -> Result<(), FsError> {
        self.log.lock().append(request, edits)?;
        let mut gone = Vec::new();
        for edit in edits {
            gone.extend(self.apply_inode(inode, edit));
        }
        if !gone.is_empty() {
            self.spool.release(gone);
        }
        Ok(())
    }
}

impl Tx<'_> {
    /// Locks inodes, in order of number, for the rest of the transaction. Called once.
    ///
    /// # Errors
    /// `Stale` if one of them is no more.
    pub fn lock(&mut self, inos: &[Ino]) -> Result<(), FsError> {
        let mut inos = inos.to_vec();
        inos.sort_unstable();
        inos.dedup();
        for ino in inos {
            if !self.fork.load(&mut self.layers, ino)? {
                return Err(FsError::Stale);
            }
            let cell = self.layers.live.inodes.get(&ino).ok_or(FsError::Stale)?;
            let state = cell.state.write_arc();
            let attr = state.attr.clone();
            self.locked.push(Locked {
                ino,
                state: Some(state),
                attr,
                changed: false,
            });
        }
        Ok(())
    }

    /// The attributes of a locked inode, as changed so far.
    pub fn attr(&self, ino: Ino) -> &Attr {
        let found = self.locked.iter().find(|l| l.ino == ino);
        &found
            .expect("an operation reads only the inodes it locked")
            .attr
    }

    /// The attributes of a locked inode, to be changed.
    pub fn attr_mut(&mut self, ino: Ino) -> &mut Attr {
        let found = self.locked.iter_mut().find(|l| l.ino == ino);
        let locked = found.expect("an operation changes only the inodes it locked");
        locked.changed = true;
        &mut locked.attr
    }

    /// Makes an inode.
    ///
    /// # Errors
    /// `NoSpace` if the fork has no room for one.
    pub fn create(&mut self, attr: Attr) -> Result<Ino, FsError> {
        self.fork.want_pages(1)?;
        let ino = self.fork.next_ino()?;
        self.created += 1;
        self.locked.push(Locked {
            ino,
            state: None,
            attr,
            changed: true,
        });
        Ok(ino)
    }

    /// Adds an edit.
    pub fn push(&mut self, edit: Edit) {
        self.edits.push(edit);
    }

    /// Puts or takes away a directory entry.
    pub fn set_entry(&mut self, dir: Ino, hash: u64, name: &[u8], child: Option<(Ino, Kind)>) {
        self.edits.push(Edit::Entry {
            dir,
            hash,
            name: name.into(),
            child,
        });
    }

    /// Notes that a non-directory lost a name and lives on.
    pub fn set_unlinked(&mut self, ino: Ino, parent: Ino, name: &[u8]) {
        self.edits.push(Edit::Unlinked {
            ino,
            parent,
            name: name.into(),
        });
    }

    /// Notes that an inode lost its last name.
    pub fn set_nameless(&mut self, ino: Ino) {
        let edit = if self.fork.is_known(ino) {
            Edit::Orphan { ino }
        } else {
            Edit::Remove { ino }
        };
        self.edits.push(edit);
    }

    /// Logs everything as one record, then applies it.
    ///
    /// # Errors
    /// `Io` if the log did not take the record; nothing has changed then.
    pub fn finish(mut self, request: Request) -> Result<(), FsError> {
        let mut edits: Vec<Edit> = Vec::with_capacity(self.locked.len() + self.edits.len());
        let changed = self.locked.iter().filter(|l| l.changed);
        edits.extend(changed.map(|l| Edit::Attr {
            ino: l.ino,
            attr: l.attr.clone(),
        }));
        edits.append(&mut self.edits);
        self.fork.log.lock().append(request, &edits)?;

        for mut locked in self.locked.drain(..) {
            match locked.state.as_mut() {
                Some(state) if locked.changed => {
                    let blocks = locked.attr.blocks as i64 - state.attr.blocks as i64;
                    self.fork.count(blocks, 0);
                    state.attr = locked.attr;
                }
                Some(_) => {}
                None => {
                    self.fork.count(locked.attr.blocks as i64, 1);
                    let cell = Cell::new(locked.ino, Inode::created(locked.attr));
                    self.layers.live.inodes.insert(locked.ino, cell);
                }
            }
        }
        self.fork.created.fetch_add(self.created, Ordering::Relaxed);
        let mut gone = Vec::new();
        for edit in edits
            .iter()
            .filter(|edit| !matches!(edit, Edit::Attr { .. }))
        {
            if let Edit::Remove { ino } = edit {
                self.fork.drop_room_ahead(&self.layers, *ino);
            }
            gone.extend(self.fork.apply(&mut self.layers, edit));
        }
        if !gone.is_empty() {
            self.fork.spool.release(gone);
        }
        Ok(())
    }
}

impl Fork {
    /// Gives back what an inode that goes held for its growth, and its charge.
    pub(super) fn drop_room_ahead(&self, layers: &Layers, ino: Ino) {
        let Some(cell) = layers.live.inodes.get(&ino) else {
            return;
        };
        let mut inode = cell.state.write();
        if let Some((at, pages)) = inode.ahead.take() {
            self.spool.give_back(at, pages);
        }
        if !inode.is_of_base() {
            self.created.fetch_sub(1, Ordering::Relaxed);
        } else if !inode.created {
            self.drop_private_charge(layers, ino);
        }
    }

    /// Gives back the charge for what only the private root has of an inode that goes.
    fn drop_private_charge(&self, layers: &Layers, ino: Ino) {
        let Some(version) = self.private.lock().map(|private| private.version) else {
            return;
        };
        // What cannot be read now is charged until the next move or commit.
        let of = |root| view::base_attr(&self.store, root, ino).ok().flatten();
        if let (None, Some(attr)) = (of(version), of(layers.root.id))
            && let Some(private) = self.private.lock().as_mut()
        {
            let charge = attr.blocks * 512 + INODE_CHARGE;
            private.charged = private.charged.saturating_sub(charge);
        }
    }
}

impl Content {
    /// Forgets what a version now holds: the extents that are still those which `below`, now part of the root, had at the same
    /// place. Returns them, so that their room can be freed.
    pub fn rebase(&mut self, below: &Content) -> Vec<Extent> {
        let mut gone = Vec::new();
        let mut kept = ExtentMap::default();
        for extent in self.extents.iter() {
            for (part, same) in compare(extent, &below.extents, self.inherited_pages) {
                if same {
                    gone.push(part);
                } else {
                    kept.insert(part);
                }
            }
        }
        self.extents = kept;
        self.base_pages = self.inherited_pages;
        gone
    }
}

/// Cuts an extent into parts that `below` has at the same place, and others.
fn compare(extent: Extent, below: &ExtentMap, limit: u64) -> Vec<(Extent, bool)> {
    let mut out = Vec::new();
    let mut at = extent.page;
    for other in below.within(extent.page, extent.end().min(limit)) {
        if other.page > at {
            out.push((extent.slice(at, other.page), false));
        }
        let part = extent.slice(other.page, other.end());
        let same = match (part.origin, other.origin) {
            (Origin::Spool { at: a, .. }, Origin::Spool { at: b, .. }) => a == b,
            (a, b) => a == b,
        };
        out.push((part, same));
        at = other.end();
    }
    if at < extent.end() {
        out.push((extent.slice(at, extent.end()), false));
    }
    out
}

impl Table {
    /// Puts this table, which lay on top of `lower`, and `lower` into one. Returns the extents of inodes that both had, and how many
    /// inodes are gone that only `lower` had made.
    ///
    /// A publish that failed may turn out to have been done: after a restart `lower` is then part of the root, and only what was
    /// logged since the seal comes on top. So nothing of its room may be written in place, which no edit says.
    pub fn absorb(&mut self, lower: Arc<Table>) -> (Vec<Extent>, u64) {
        let (mut gone, mut unmade) = (Vec::new(), 0);
        let dead = self.removed.clone();
        for (ino, cell) in &lower.inodes {
            if dead.contains(ino) {
                let inode = cell.state.read();
                gone.extend(inode.content.extents.iter());
                if inode.created {
                    self.removed.remove(ino);
                }
                match self.inodes.get(ino) {
                    // It has lost its names, and goes when it is forgotten.
                    Some(orphan) => orphan.state.write().created = inode.created,
                    None => unmade += u64::from(!inode.is_of_base()),
                }
            } else if let Some(upper) = self.inodes.get(ino) {
                let inode = cell.state.read();
                gone.extend(inode.content.extents.iter());
                upper.state.write().created = inode.created;
            } else {
                let content = &mut cell.state.write().content;
                content.extents.disown(0, u64::MAX);
                self.inodes.insert(*ino, cell.clone());
            }
        }
        self.removed.extend(&lower.removed);
        for (key, child) in &lower.entries {
            if !dead.contains(&key.0) && !self.entries.contains_key(key) {
                self.entries.insert(key.clone(), *child);
            }
        }
        for (key, value) in &lower.xattrs {
            let is_there = !dead.contains(&key.0) || self.inodes.contains_key(&key.0);
            if is_there && !self.xattrs.contains_key(key) {
                self.xattrs.insert(key.clone(), value.clone());
            }
        }
        for key in &lower.unlinked {
            if !dead.contains(&key.0) {
                self.unlinked.insert(key.clone());
            }
        }
        (gone, unmade)
    }
}
