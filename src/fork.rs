//! A fork: a private, writable view of one version. Its delta is a table of edits on top of the version's root, the log that
//! can make the table again, and the spool that holds written bytes.
//!
//! A mutation holds the gate shared for its length, locks what it concerns, appends one record to the log and only then changes
//! the table. A seal holds the gate alone for a moment: that is the point in time of a commit.
//!
//! Lock order: gate, layers, cells (by number), then the log, the spool's rooms and the lookup counts as leaves.

pub mod error;
mod exclude;
pub mod extent;
mod known;
pub mod log;
mod open;
mod seal;
pub mod spool;
pub mod table;
pub mod view;
mod write;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::{ArcRwLockReadGuard, Mutex, RawRwLock, RwLock, RwLockReadGuard};

use crate::chunk::ChunkId;
use crate::record::Ino;
use crate::store::{ForkId, Lease, Store, StoreError};
use crate::tree::NodeId;
use error::FsError;
pub use exclude::{Excludes, default_patterns_at, excluded_inodes};
use extent::{Extent, PAGE};
use known::Known;
use log::Log;
pub use seal::Sealed;
use spool::Spool;
use table::{Cell, Edit, Inode, Table};
pub use write::Tx;

/// What a created inode is charged, beside its content.
pub const INODE_CHARGE: u64 = 512;
/// The first lease of inode numbers, and the largest: each is twice the one before.
const LEASE: Range<u64> = 64..1 << 20;

/// What a fork is made from.
#[derive(Clone, Debug)]
pub struct Origin {
    pub id: ForkId,
    /// The root below the table: that of the version it was forked from, or of its last commit, or a private one.
    pub root: NodeId,
    /// For a private root: the root of the version below it, and the bytes that the fork is charged for the difference.
    pub private: Option<Private>,
    /// 512-byte blocks and inodes of the root.
    pub holds: (u64, u64),
    /// The first segment of the log on top of that root.
    pub first_segment: u64,
    /// Some file of the root may have several names.
    pub has_links: bool,
    /// Room for new data, in bytes.
    pub size: u64,
    /// What is never committed.
    pub excludes: Excludes,
}

/// What lies below a root that is the fork's own.
#[derive(Clone, Copy, Debug)]
pub struct Private {
    pub version: NodeId,
    pub charged: u64,
}

/// A root that stays readable as long as somebody holds this.
pub struct Root {
    pub id: NodeId,
    _lease: Lease,
}

/// What a fork shows, from the top: edits, edits that a commit has frozen, a version.
pub struct Layers {
    pub root: Arc<Root>,
    pub live: Table,
    pub frozen: Option<Arc<Table>>,
    /// The root may be another one after a restart: what was frozen over this one is thawed, and perhaps in a version all the same.
    /// A page of the base is then known only by the inode that has it there, and not by one that once shared it.
    pub in_doubt: bool,
    /// What of the live table's weight the last seal carried over.
    carried: u64,
}

/// Whether a fork takes mutations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gate {
    Open,
    /// A commit without `keep` is under way or done: EROFS.
    Sealed,
    /// Nothing is answered any more: EIO.
    Ended,
}

/// A part in the gate.
pub type Inside = ArcRwLockReadGuard<RawRwLock, Gate>;

/// One fork and its delta.
pub struct Fork {
    pub id: ForkId,
    pub store: Arc<Store>,
    pub spool: Spool,
    dir: PathBuf,
    size: u64,
    excludes: Excludes,
    gate: Arc<RwLock<Gate>>,
    layers: RwLock<Layers>,
    log: Mutex<Log>,
    numbers: Mutex<Numbers>,
    /// For each session by its epoch: the inodes that its kernel was told of and has not forgotten.
    lookups: Mutex<Vec<(u64, HashMap<Ino, Known>)>>,
    created: AtomicU64,
    private: Mutex<Option<Private>>,
    /// 512-byte blocks and inodes of the view.
    holds: (AtomicI64, AtomicI64),
    /// Some file has, or had, several names.
    has_links: AtomicBool,
    /// Bytes of files that the commit under way has gone through.
    ingested: AtomicU64,
    /// What the fork was charged for content at the last look at how fast it writes.
    looked_at: AtomicU64,
    hashed: Mutex<Hashed>,
    damage: OnceLock<String>,
    started: Instant,
}

/// Chunks that were hashed ahead of a commit, and lie in the spool alone.
#[derive(Default)]
struct Hashed {
    ids: HashSet<ChunkId>,
    bytes: u64,
}

struct Numbers {
    left: Range<u64>,
    next_lease: u64,
}

/// What the delta of a fork amounts to.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct DeltaSize {
    /// Inodes that were changed, made or removed.
    pub changed: u64,
    /// Bytes charged against the fork's size.
    pub bytes: u64,
}

impl Fork {
    /// Applies an edit to an inode of the live table, whose cell nobody else has locked; returns the extents whose room went.
    fn apply(&self, layers: &mut Layers, edit: &Edit) -> Vec<Extent> {
        layers.live.apply(edit);
        match edit {
            Edit::Attr { ino, .. } | Edit::Extent { ino, .. } | Edit::Truncate { ino, .. } => {
                let Some(cell) = layers.live.inodes.get(ino) else {
                    return Vec::new();
                };
                self.apply_inode(&mut cell.state.write(), edit)
            }
            Edit::Orphan { ino } => {
                if let Some(cell) = layers.live.inodes.get(ino).cloned() {
                    let mut inode = cell.state.write();
                    inode.orphan = true;
                    layers.live.orphan(*ino, inode.created);
                }
                Vec::new()
            }
            Edit::Remove { ino } => {
                let created = layers
                    .live
                    .inodes
                    .get(ino)
                    .is_some_and(|c| c.state.read().created);
                let Some(cell) = layers.live.remove(*ino, created) else {
                    return Vec::new();
                };
                let inode = cell.state.read();
                self.count(-(inode.attr.blocks as i64), -1);
                inode.content.extents.iter().collect()
            }
            _ => Vec::new(),
        }
    }

    /// Applies an edit to a locked inode; returns the extents whose room went.
    fn apply_inode(&self, inode: &mut Inode, edit: &Edit) -> Vec<Extent> {
        let before = inode.attr.blocks as i64;
        let gone = table::apply_inode(inode, edit);
        self.count(inode.attr.blocks as i64 - before, 0);
        gone
    }

    /// Counts that the view has so many more blocks and inodes.
    fn count(&self, blocks: i64, inodes: i64) {
        self.holds.0.fetch_add(blocks, Ordering::Relaxed);
        self.holds.1.fetch_add(inodes, Ordering::Relaxed);
    }

    /// 512-byte blocks and inodes of the view.
    pub fn holds(&self) -> (u64, u64) {
        let count = |of: &AtomicI64| of.load(Ordering::Relaxed).max(0) as u64;
        (count(&self.holds.0), count(&self.holds.1))
    }

    /// Brings an inode into the live table; false if the fork has none of that number.
    fn load(&self, layers: &mut Layers, ino: Ino) -> Result<bool, FsError> {
        if layers.live.inodes.contains_key(&ino) {
            return Ok(true);
        }
        let Some(inode) = layers.below(&self.store, ino)? else {
            return Ok(false);
        };
        self.spool.retain(inode.content.extents.iter());
        layers.live.inodes.insert(ino, Cell::new(ino, inode));
        Ok(true)
    }

    /// What the fork shows, for reading.
    pub fn layers(&self) -> RwLockReadGuard<'_, Layers> {
        self.layers.read()
    }

    /// The root below the tables.
    pub fn root(&self) -> Arc<Root> {
        self.layers.read().root.clone()
    }

    /// Takes part in the gate for one mutation.
    ///
    /// # Errors
    /// `ReadOnly` behind a seal, `Ended` when the fork is over.
    pub fn enter(&self) -> Result<Inside, FsError> {
        let gate = self.gate.read_arc();
        match *gate {
            Gate::Open => Ok(gate),
            Gate::Sealed => Err(FsError::ReadOnly),
            Gate::Ended => Err(FsError::Ended),
        }
    }

    /// Takes part in the gate for one reading of content: no commit changes what lies below meanwhile.
    ///
    /// # Errors
    /// `Ended` if the fork answers nothing any more.
    pub fn look(&self) -> Result<Inside, FsError> {
        let gate = self.gate.read_arc();
        match *gate {
            Gate::Open | Gate::Sealed => Ok(gate),
            Gate::Ended => Err(FsError::Ended),
        }
    }

    /// Takes the next inode number.
    pub fn next_ino(&self) -> Result<Ino, FsError> {
        let mut numbers = self.numbers.lock();
        if numbers.left.is_empty() {
            let lease = self.store.lease_inodes(self.id, numbers.next_lease)?;
            numbers.next_lease = (numbers.next_lease * 2).min(LEASE.end);
            numbers.left = lease;
        }
        let ino = Ino(numbers.left.start);
        numbers.left.start += 1;
        Ok(ino)
    }

    /// The inode numbers that the fork has leased and not used.
    pub fn numbers_left(&self) -> Range<u64> {
        self.numbers.lock().left.clone()
    }

    /// Seconds since the fork was opened.
    pub fn age(&self) -> u32 {
        self.started.elapsed().as_secs() as u32
    }

    /// What is charged against the fork's size, in bytes.
    pub fn charged(&self) -> u64 {
        let private = self.private.lock().map_or(0, |private| private.charged);
        self.spool.charged() + self.created.load(Ordering::Relaxed) * INODE_CHARGE + private
    }

    /// Room that is left for new data, in bytes: the fork's own, or the disk's where that is less.
    pub fn room(&self) -> u64 {
        self.size
            .saturating_sub(self.charged())
            .min(self.store.room())
    }

    /// Fails if there is no room for so many new pages.
    pub fn want_pages(&self, pages: u64) -> Result<(), FsError> {
        if pages * PAGE <= self.room() {
            Ok(())
        } else {
            Err(FsError::NoSpace)
        }
    }

    /// Waits until whoever has entered the gate has left it.
    pub fn settle(&self) {
        drop(self.gate.write());
    }

    /// Notes that a commit begins, which has gone through nothing yet.
    pub fn begin_ingest(&self) {
        self.ingested.store(0, Ordering::Relaxed);
    }

    /// Bytes of content that came to it since this was last asked.
    pub fn grown(&self) -> u64 {
        let now = self.spool.charged();
        now.saturating_sub(self.looked_at.swap(now, Ordering::Relaxed))
    }

    /// Notes how much more of the files the commit has gone through.
    pub fn note_ingested(&self, bytes: u64) {
        self.ingested.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes of files that the commit under way has gone through, or the last one.
    pub fn ingested(&self) -> u64 {
        self.ingested.load(Ordering::Relaxed)
    }

    /// Notes a chunk that was hashed ahead of a commit and not stored.
    pub fn note_hashed(&self, id: ChunkId, len: u64) {
        let mut hashed = self.hashed.lock();
        if hashed.ids.insert(id) {
            hashed.bytes += len;
        }
    }

    /// Whether a chunk was only hashed.
    pub fn is_hashed(&self, id: ChunkId) -> bool {
        self.hashed.lock().ids.contains(&id)
    }

    /// Bytes of the chunks that were only hashed.
    pub fn hashed(&self) -> u64 {
        self.hashed.lock().bytes
    }

    /// Whether so many bytes are so much of the spool that they may as well stay there: to bring the rest to the disk with them
    /// costs no more than to copy them.
    pub fn is_bulk(&self, bytes: u64) -> bool {
        bytes >= self.store.bulk() && bytes >= self.spool.charged() / 2
    }

    /// Gives the spool the name under which it stays, and brings it to the disk; returns whether that was done for the first time.
    ///
    /// # Errors
    /// What the disk answered.
    pub fn keep_spool(&self) -> Result<bool, FsError> {
        let is_first = !self.spool.is_kept();
        self.store.keep_spool(self.id, &self.dir.join("spool"))?;
        if let Err(error) = self.spool.keep() {
            if is_first {
                self.unkeep_spool();
            }
            return Err(error.into());
        }
        Ok(is_first)
    }

    /// Takes that back, if it was the first time and no version can have come of it.
    pub fn unkeep_spool(&self) {
        match self.store.unkeep_spool(self.id) {
            Ok(()) => self.spool.unkeep(),
            Err(error) => ::log::warn!("{}: its spool stays whole: {error}", self.id),
        }
    }

    /// Notes that a file was given one more name.
    pub fn note_link(&self) {
        self.has_links.store(true, Ordering::Relaxed);
    }

    /// Whether any file may have several names.
    pub fn may_have_links(&self) -> bool {
        self.has_links.load(Ordering::Relaxed)
    }

    /// How much the fork changed.
    pub fn delta_size(&self) -> DeltaSize {
        let layers = self.layers.read();
        let changed = layers.tables().map(Table::changes).sum();
        drop(layers);
        DeltaSize {
            changed,
            bytes: self.charged(),
        }
    }

    /// Roots that gc must keep for this fork beside its own: what inodes show that were carried over a seal.
    pub fn roots(&self) -> Vec<NodeId> {
        let layers = self.layers.read();
        let carried = layers
            .tables()
            .flat_map(|table| table.inodes.values())
            .filter_map(|cell| cell.state.read().base);
        std::iter::once(layers.root.id).chain(carried).collect()
    }

    /// Notes that something of the store that the fork shows is missing or wrong; an error of the disk is neither.
    pub fn note_damage(&self, error: &StoreError) {
        if matches!(
            error,
            StoreError::Missing { .. } | StoreError::Corrupt { .. }
        ) {
            self.damage.get_or_init(|| error.to_string());
        }
    }

    /// The damage that was met first.
    pub fn damage(&self) -> Option<&str> {
        self.damage.get().map(String::as_str)
    }

    /// Answers nothing any more.
    pub fn end(&self) {
        *self.gate.write() = Gate::Ended;
    }
}

fn root(store: &Arc<Store>, id: NodeId) -> Arc<Root> {
    Arc::new(Root {
        id,
        _lease: store.lease(id),
    })
}
