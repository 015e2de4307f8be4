//! The point in time of a commit, and what comes of it: the table is frozen, and in the end part of the root or thawed again.
//!
//! What no version gets but the fork goes on with is carried over a seal: orphans that the kernel knows, and what is excluded. It
//! is written into the new segment as edits that make it again on top of any root.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::error::FsError;
use super::exclude::{self, Split};
use super::log::{self, Request};
use super::table::{Cell, Edit, Inode, Name, Table};
use super::{Fork, Gate, Hashed, Layers, Private, Root, view};
use crate::record::Ino;
use crate::store::{LeftOut, Step};
use crate::tree::NodeId;

/// The point in time of a commit.
pub struct Sealed {
    pub root: Arc<Root>,
    /// What goes into the version.
    pub table: Arc<Table>,
    pub left_out: LeftOut,
    /// With `keep`: the segment that goes on behind the seal.
    pub segment: Option<u64>,
}

/// What a seal asks of every inode of a table, in one go: whoever writes waits for it.
#[derive(Default)]
struct Cells {
    of_base: Vec<Arc<Cell>>,
    orphans: Vec<Arc<Cell>>,
}

impl Cells {
    fn of(table: &Table) -> Cells {
        let mut out = Cells::default();
        for cell in table.inodes.values() {
            let inode = cell.state.read();
            if inode.orphan {
                out.orphans.push(cell.clone());
            } else if inode.is_of_base() {
                out.of_base.push(cell.clone());
            }
        }
        out
    }
}

impl Fork {
    /// Freezes the table: the point in time of a commit. With `keep` a new table and a new segment go on top; without it every
    /// later mutation is refused until [`Fork::thaw`].
    ///
    /// # Errors
    /// `ReadOnly` or `Ended` if the fork is sealed or over; what the store or the disk answered. Nothing has changed then.
    pub fn seal(&self, keep: bool) -> Result<Sealed, FsError> {
        let mut gate = self.gate.write();
        match *gate {
            Gate::Open => {}
            Gate::Sealed => return Err(FsError::ReadOnly),
            Gate::Ended => return Err(FsError::Ended),
        }
        let mut layers = self.layers.write();
        let Cells { of_base, orphans } = match keep || !self.excludes.is_empty() {
            true => Cells::of(&layers.live),
            false => Cells::default(),
        };
        let split = exclude::split(&self.excludes, &layers, &of_base, &self.store)?;
        let mut segment = None;
        if keep {
            segment = Some(self.carry_over(&mut layers, orphans, split.as_ref())?);
        } else {
            *gate = Gate::Sealed;
            let table = std::mem::take(&mut layers.live);
            layers.frozen = Some(Arc::new(table));
        }
        let (table, left_out) = match split {
            Some(split) => (Some(Arc::new(split.committed)), split.left_out),
            None => (layers.frozen.clone(), LeftOut::default()),
        };
        Ok(Sealed {
            root: layers.root.clone(),
            table: table.unwrap_or_default(),
            left_out,
            segment,
        })
    }

    /// Freezes the live table but for what only the fork goes on with; returns the new segment.
    fn carry_over(
        &self,
        layers: &mut Layers,
        orphans: Vec<Arc<Cell>>,
        split: Option<&Split>,
    ) -> Result<u64, FsError> {
        let kept = split.map(|split| split.kept.as_slice()).unwrap_or_default();
        let carried = [&orphans, kept].concat();
        let names = split
            .map(|split| split.edits.as_slice())
            .unwrap_or_default();

        let mut live = Table::default();
        let segment = {
            let mut log = self.log.lock();
            let segment = log.next_segment()?;
            self.store.reach(Step::SegmentBegun)?;
            for cell in &carried {
                let edits = self.carry(layers, cell)?;
                log.append_in_parts(&edits)?;
                self.store.reach(Step::Carried)?;
                live.inodes.insert(cell.ino, cell.clone());
                for edit in edits.iter().filter(|e| matches!(e, Edit::Xattr { .. })) {
                    live.apply(edit);
                }
            }
            for edit in names {
                log.append(Request::default(), [edit])?;
                self.store.reach(Step::Carried)?;
                live.apply(edit);
            }
            segment
        };
        // What an edit says of an inode that stays is what it is, so nothing has to be looked up.
        let linked: Vec<(Ino, Inode)> = names
            .iter()
            .filter_map(|edit| match edit {
                Edit::Attr { ino, attr } => {
                    let inode = match layers.live.inodes.get(ino) {
                        Some(cell) => view::thawed(&cell.state.read()),
                        None => Inode::of_base(attr.clone()),
                    };
                    Some((*ino, inode))
                }
                _ => None,
            })
            .collect();
        let mut frozen = std::mem::replace(&mut layers.live, live);
        for cell in &carried {
            // With its attributes: they would be of no inode in the version.
            frozen.take_out(cell.ino);
            let mut inode = cell.state.write();
            if !inode.is_of_base() {
                self.created.fetch_sub(1, Ordering::Relaxed);
            }
            inode.base = inode.base.or(Some(layers.root.id));
        }
        layers.frozen = Some(Arc::new(frozen));
        for (ino, inode) in linked {
            self.spool.retain(inode.content.extents.iter());
            layers.live.inodes.insert(ino, Cell::new(ino, inode));
        }
        layers.carried = layers.live.weight();
        Ok(segment)
    }

    /// The edits that make an inode again on top of any root, without its names.
    fn carry(&self, layers: &Layers, cell: &Cell) -> Result<Vec<Edit>, FsError> {
        let ino = cell.ino;
        let mut edits = {
            let inode = cell.state.read();
            let mut edits = vec![Edit::Carry {
                ino,
                attr: inode.attr.clone(),
                base: inode.base.unwrap_or(layers.root.id),
                base_pages: inode.content.base_pages,
            }];
            let extents = inode.content.extents.iter();
            edits.extend(extents.map(|extent| Edit::Extent { ino, extent }));
            edits
        };
        let mut names: HashSet<Name> = HashSet::new();
        let changed = (ino, Name::default())..(Ino(ino.0 + 1), Name::default());
        for ((_, name), value) in layers.live.xattrs.range(changed) {
            names.insert(name.clone());
            let (name, value) = (name.clone(), value.clone());
            edits.push(Edit::Xattr { ino, name, value });
        }
        for name in layers.xattr_names(&self.store, ino)? {
            if !names.contains(&name) {
                let value = layers.xattr(&self.store, ino, &name)?;
                edits.push(Edit::Xattr { ino, name, value });
            }
        }
        Ok(edits)
    }

    /// Opens the fork again, on the root that it has, after a seal that made no new root for it, as far as anybody knows.
    pub fn thaw(&self) {
        let mut gate = self.gate.write();
        let mut layers = self.layers.write();
        if let Some(frozen) = layers.frozen.take() {
            let (gone, unmade) = layers.live.absorb(frozen);
            layers.in_doubt = true;
            drop(layers);
            self.created.fetch_sub(unmade, Ordering::Relaxed);
            self.spool.release(gone);
        }
        if *gate == Gate::Sealed {
            // Should the commit turn out to have been done, it has given these back.
            self.numbers.lock().left = 0..0;
            *gate = Gate::Open;
        }
    }

    /// Forgets what was ingested ahead of the next commit, which has to do it again.
    pub fn forget_ingested(&self) {
        *self.hashed.lock() = Hashed::default();
        let layers = self.layers.read();
        for cell in layers.tables().flat_map(|table| table.inodes.values()) {
            cell.state.write().ingested = None;
        }
    }

    /// Bytes of memory that the table takes, about, but for what a seal carries over, and bytes of the log that explains it.
    pub fn weight(&self) -> (u64, u64) {
        let layers = self.layers.read();
        let weight = layers.live.weight().saturating_sub(layers.carried);
        (weight, self.log.lock().len())
    }

    /// Puts the fork on top of a root that holds its frozen table: a version's, at the end of a commit with `keep`, or a private
    /// one.
    pub fn rebase(&self, root: NodeId, first_segment: u64, private: Option<Private>) {
        // Whoever reads or writes content has chosen a root and a cell that go together.
        let _gate = self.gate.write();
        let mut layers = self.layers.write();
        let Some(frozen) = layers.frozen.take() else {
            return;
        };
        layers.root = super::root(&self.store, root);
        layers.in_doubt = false;
        *self.hashed.lock() = Hashed::default();
        *self.private.lock() = private;
        self.log.lock().begins_here();
        let mut gone = Vec::new();
        for cell in layers.live.inodes.values() {
            let mut inode = cell.state.write();
            // Its chunks are held from gc only until here.
            inode.ingested = None;
            if let Some(below) = frozen.inodes.get(&cell.ino) {
                gone.extend(inode.content.rebase(&below.state.read().content));
                inode.base = None;
            } else if inode.base.is_some() {
                // Carried over: the new root does not have it.
                inode.created = true;
            }
        }
        drop(layers);
        for cell in frozen.inodes.values() {
            let mut inode = cell.state.write();
            gone.extend(inode.content.extents.iter());
            if let Some((at, pages)) = inode.ahead.take() {
                self.spool.give_back(at, pages);
            }
            if !inode.is_of_base() {
                self.created.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.spool.release(gone);
        let trimmed = self.store.reach(Step::Rebased).map_err(FsError::from);
        let trimmed = trimmed.and_then(|()| Ok(log::remove_before(&self.dir, first_segment)?));
        let trimmed = trimmed.and_then(|()| Ok(self.store.reach(Step::Trimmed)?));
        if let Err(error) = trimmed {
            ::log::warn!(
                "{}: old segments of the log stay: {error}",
                self.dir.display()
            );
        }
    }
}
