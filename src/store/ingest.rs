//! Putting content into the store, and publishing versions that name it.
//!
//! Whoever ingests holds each id that it writes or finds present in hand, so that gc leaves it alone. Little content travels in
//! the one synced batch that publishes it; much is written ahead without WAL and flushed before that batch.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};
use rocksdb::{WriteBatch, WriteOptions};

use super::meta::json;
use super::settle::kept_sizes;
use super::{
    Fork, ForkId, Prefixes, Step, Store, StoreError, Target, Version, family, keys, open, prefix_of,
};
use crate::chunk::{self, ChunkId, Place, varint};
use crate::tree::{self, Node, NodeId};

/// Content up to this many stored bytes goes into the batch that publishes it.
const SMALL: usize = 8 << 20;
/// More is written in batches of about this size.
const SPILL: usize = 4 << 20;
/// The zstd level of fresh content.
const LEVEL: i32 = 3;
const SHARDS: usize = 64;

/// Ids that somebody is about to publish, by prefix.
pub struct Hands {
    shards: Vec<Mutex<HashMap<u64, u32>>>,
    /// While gc runs: what was let go since it began, which it must not delete either.
    gc: Mutex<Option<Vec<u64>>>,
}

impl Default for Hands {
    fn default() -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Hands {
            shards,
            gc: Mutex::new(None),
        }
    }
}

impl Hands {
    /// Locks the ids that share a shard with this prefix: between taking in hand and looking, and between testing and deleting.
    pub fn lock(&self, prefix: u64) -> MutexGuard<'_, HashMap<u64, u32>> {
        self.shards[prefix as usize % SHARDS].lock()
    }

    fn release(&self, prefixes: Vec<u64>) {
        let mut gc = self.gc.lock();
        match gc.as_mut() {
            Some(held) => held.extend(prefixes),
            None => self.drop_all(prefixes),
        }
    }

    fn drop_all(&self, prefixes: Vec<u64>) {
        for prefix in prefixes {
            let mut shard = self.lock(prefix);
            if let Some(count) = shard.get_mut(&prefix) {
                *count -= 1;
                if *count == 0 {
                    shard.remove(&prefix);
                }
            }
        }
    }

    /// Begins a gc: nothing that is in hand from now on is let go before [`Hands::end_gc`]. False if one runs already.
    pub fn begin_gc(&self) -> bool {
        let mut gc = self.gc.lock();
        let first = gc.is_none();
        gc.get_or_insert_default();
        first
    }

    pub fn end_gc(&self) {
        if let Some(held) = self.gc.lock().take() {
            self.drop_all(held);
        }
    }
}

/// Ids written without WAL and not flushed yet: present, but not for somebody else to rely on.
#[derive(Default)]
pub struct Unflushed {
    epoch: u64,
    written: HashMap<u64, u64>,
}

/// The epoch of what is about to be written: no flush that began before it is known to be written covers it.
const ON_ITS_WAY: u64 = u64::MAX;

impl Unflushed {
    /// Forgets what was written; what is on its way is written to the database that is open then.
    pub fn clear(&mut self) {
        self.written.retain(|_, epoch| *epoch == ON_ITS_WAY);
    }

    /// Returns the number of the epoch that a flush beginning now covers.
    pub fn begin_flush(&mut self) -> u64 {
        self.epoch += 1;
        self.epoch
    }

    pub fn end_flush(&mut self, epoch: u64, done: bool) {
        if done {
            self.written.retain(|_, written| *written >= epoch);
        }
    }

    /// Notes what is about to be written.
    fn begin_write(&mut self, prefixes: impl Iterator<Item = u64>) {
        let on_its_way = prefixes.map(|prefix| (prefix, ON_ITS_WAY));
        self.written.extend(on_its_way);
    }

    /// Notes that it is written: a flush that begins from now on covers it.
    fn end_write(&mut self, prefixes: impl Iterator<Item = u64>) {
        let epoch = self.epoch;
        self.written.extend(prefixes.map(|prefix| (prefix, epoch)));
    }

    fn contains(&self, prefix: u64) -> bool {
        self.written.contains_key(&prefix)
    }
}

/// Content on its way into the store; used by many threads at once.
pub struct Ingest {
    store: Arc<Store>,
    pending: Mutex<Pending>,
    held: Mutex<Vec<u64>>,
    kept: Mutex<Kept>,
    new_bytes: AtomicU64,
    /// How often the database had been opened again when content was first written to it without WAL.
    written_after: AtomicU64,
}

/// Nothing was written without WAL.
const NOTHING: u64 = u64::MAX;

/// A stored value by id; of a chunk also its raw length.
type Item = (Target, [u8; 32], Vec<u8>, u64);

#[derive(Default)]
struct Pending {
    items: Vec<Item>,
    seen: HashSet<[u8; 32]>,
    bytes: usize,
    spilled: bool,
    /// Chunks that are not in the store, and lie in the spool of the fork.
    lying: Vec<(ChunkId, Place)>,
}

/// Chunks that stay in the spool of the fork.
#[derive(Default)]
struct Kept {
    chunks: Vec<(ChunkId, Place)>,
    /// No other commit may have named anything of that spool.
    is_first: bool,
    /// A batch that names them was written, or may have been.
    is_tried: bool,
}

impl Kept {
    /// The spool in which they stay, if there are any.
    fn spool(&self) -> Option<u64> {
        self.chunks.first().map(|(_, place)| place.spool)
    }
}

impl Store {
    /// Begins to put content into the store.
    pub fn ingest(self: &Arc<Self>) -> Ingest {
        Ingest {
            store: self.clone(),
            pending: Mutex::default(),
            held: Mutex::default(),
            kept: Mutex::default(),
            new_bytes: AtomicU64::new(0),
            written_after: AtomicU64::new(NOTHING),
        }
    }
}

impl Ingest {
    /// Stores a chunk, unless it is there; returns its id. Compresses in the calling thread.
    pub fn chunk(&self, raw: &[u8]) -> Result<ChunkId, StoreError> {
        let id = ChunkId::of(raw);
        if self.take(Target::Sizes, &id.0)? {
            self.add_chunk(id, raw)?;
        }
        Ok(id)
    }

    /// Notes a chunk that lies in a spool, unless the store has it: it is then up to [`Ingest::keep`] or [`Ingest::store`].
    pub fn lies(&self, id: ChunkId, place: Place) -> Result<(), StoreError> {
        if self.take(Target::Sizes, &id.0)? {
            self.pending.lock().lying.push((id, place));
        }
        Ok(())
    }

    /// Bytes of the chunks that lie in a spool.
    pub fn lying_bytes(&self) -> u64 {
        let pending = self.pending.lock();
        pending.lying.iter().map(|(_, place)| place.len).sum()
    }

    /// Takes the chunks that lie in a spool, for [`Ingest::store`].
    pub fn take_lying(&self) -> Vec<(ChunkId, Place)> {
        std::mem::take(&mut self.pending.lock().lying)
    }

    /// Stores one of [`Ingest::take_lying`].
    ///
    /// # Errors
    /// `Corrupt` if these are not its bytes; what the disk answered.
    pub fn store(&self, id: ChunkId, raw: &[u8]) -> Result<(), StoreError> {
        if ChunkId::of(raw) != id {
            return Err(StoreError::Corrupt {
                what: "the spool of the fork".into(),
            });
        }
        self.add_chunk(id, raw)
    }

    fn add_chunk(&self, id: ChunkId, raw: &[u8]) -> Result<(), StoreError> {
        let stored = chunk::pack(raw, LEVEL);
        self.add(Target::Chunks, id.0, stored, raw.len() as u64)
    }

    /// Lets the chunks that lie in a spool stay there: it is on the disk, and has the name under which it is kept. `is_first`: no
    /// other commit may have named anything of it.
    pub fn keep(&self, is_first: bool) {
        let chunks = self.take_lying();
        let bytes = chunks.iter().map(|(_, place)| place.len).sum();
        self.new_bytes.fetch_add(bytes, Ordering::Relaxed);
        *self.kept.lock() = Kept {
            chunks,
            is_first,
            is_tried: false,
        };
    }

    /// Where chunks were to stay in the spool of the fork, and whether some version may have them there, if not this commit's then
    /// an earlier one's; none if they were to stay nowhere.
    pub fn kept(&self) -> Option<(Vec<Place>, bool)> {
        let kept = self.kept.lock();
        let places = kept.chunks.iter().map(|(_, place)| *place).collect();
        let may_be_named = kept.is_tried || !kept.is_first;
        kept.spool().map(|_| (places, may_be_named))
    }

    /// Stores a node, unless it is there.
    pub fn node(&self, id: NodeId, bytes: &[u8], node: Arc<Node>) -> Result<(), StoreError> {
        if self.take(Target::Nodes, &id.0)? {
            self.add(
                Target::Nodes,
                id.0,
                chunk::pack(bytes, LEVEL),
                bytes.len() as u64,
            )?;
        }
        self.store.nodes.insert(id, node);
        Ok(())
    }

    /// Stored bytes that were not there before.
    pub fn new_bytes(&self) -> u64 {
        self.new_bytes.load(Ordering::Relaxed)
    }

    /// Whether content that it wrote went with a database that had to be opened again.
    pub fn is_lost(&self) -> bool {
        let written_after = self.written_after.load(Ordering::Acquire);
        written_after != NOTHING && written_after != self.store.reopened.load(Ordering::Acquire)
    }

    /// Takes an id in hand; returns whether its bytes have to be written.
    fn take(&self, family_of: Target, id: &[u8; 32]) -> Result<bool, StoreError> {
        if !self.pending.lock().seen.insert(*id) {
            return Ok(false);
        }
        let prefix = prefix_of(id);
        self.held.lock().push(prefix);
        let reopened = self.store.reopened.load(Ordering::Acquire);
        let mut shard = self.store.hands.lock(prefix);
        *shard.entry(prefix).or_default() += 1;
        let there = self
            .store
            .with(|db| Ok(db.get_pinned_cf(family(db, family_of)?, id)?.is_some()))?;
        drop(shard);
        self.store.reach(Step::Taken)?;
        // What was there may have gone with a database that was opened again since, with all that was noted as unflushed: so it is
        // looked at last whether one was.
        let is_flushed = there && !self.store.unflushed.lock().contains(prefix);
        Ok(!is_flushed || reopened != self.store.reopened.load(Ordering::Acquire))
    }

    fn add(
        &self,
        target: Target,
        id: [u8; 32],
        stored: Vec<u8>,
        raw: u64,
    ) -> Result<(), StoreError> {
        self.new_bytes
            .fetch_add(stored.len() as u64, Ordering::Relaxed);
        let full = {
            let mut pending = self.pending.lock();
            pending.bytes += stored.len();
            pending.items.push((target, id, stored, raw));
            let limit = if pending.spilled { SPILL } else { SMALL };
            if pending.bytes < limit {
                return Ok(());
            }
            pending.spilled = true;
            pending.bytes = 0;
            std::mem::take(&mut pending.items)
        };
        self.spill(full)
    }

    /// Writes content ahead, without WAL.
    fn spill(&self, items: Vec<Item>) -> Result<(), StoreError> {
        // Before the count is read, so that a database that is opened again for this write is the one it goes to.
        self.store.heal()?;
        let reopened = self.store.reopened.load(Ordering::Acquire);
        self.written_after.fetch_min(reopened, Ordering::AcqRel);
        let prefixes = || items.iter().map(|(_, id, ..)| prefix_of(id));
        self.store.unflushed.lock().begin_write(prefixes());
        let written = self.store.reach(Step::Spilling).and_then(|()| {
            let mut batch = WriteBatch::default();
            self.store.put_items(&mut batch, &items)?;
            let mut options = WriteOptions::default();
            options.disable_wal(true);
            self.store.write(batch, &options)
        });
        // However it ended: what it brought is found in the database, and the rest is not.
        self.store.unflushed.lock().end_write(prefixes());
        written
    }
}

/// The store with what this ingest adds to it, published or not.
impl tree::Source for Ingest {
    type Error = StoreError;

    fn node(&self, id: NodeId) -> Result<Arc<Node>, StoreError> {
        match self.store.node(id) {
            Err(StoreError::Missing { what }) => {
                let pending = self.pending.lock();
                let found = pending
                    .items
                    .iter()
                    .find(|(target, at, ..)| *target == Target::Nodes && *at == id.0);
                let Some((.., stored, _)) = found else {
                    return Err(StoreError::Missing { what });
                };
                let bytes =
                    chunk::unpack(stored, 1 << 20).map_err(|_| StoreError::Corrupt { what })?;
                Ok(Arc::new(Node::decode(&bytes)?))
            }
            other => other,
        }
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        self.store
            .hands
            .release(std::mem::take(&mut self.held.lock()));
    }
}

/// What becomes of a fork's record when its commit is published.
#[derive(Clone, Debug)]
pub enum ForkChange {
    /// It is over; these inode numbers were never used.
    Remove(ForkId, Range<u64>),
    /// It goes on, on top of its new version, with these inode numbers left.
    Rebase(Box<Fork>, Range<u64>),
    /// It goes on, and its version is the one it had.
    Put(Box<Fork>),
}

/// What one publish makes true at once.
#[derive(Clone, Debug, Default)]
pub struct Publish {
    /// New heads; number, previous head are given when they are published.
    pub versions: Vec<Version>,
    /// Volumes of which the versions between this number and the new one are taken back.
    pub takes_back: Vec<(u64, u64)>,
    /// Volumes, and the heads that they must have still.
    pub heads: Vec<(u64, u64)>,
    pub forks: Vec<ForkChange>,
}

impl Store {
    /// Makes versions the heads of their volumes, all or none, durably; returns them with their numbers.
    ///
    /// # Errors
    /// What the disk answered, or `Lost`; the heads are the old ones then. Where the disk failed and the database cannot be opened
    /// again, that is known only when it can. `Moved` where a head is not what it must be: the same ingests can be published then.
    pub fn publish(
        &self,
        ingests: &[Arc<Ingest>],
        publish: Publish,
    ) -> Result<Vec<Version>, StoreError> {
        self.publish_with(ingests, publish, |_| Vec::new())
    }

    /// Like [`Store::publish`]; `more` is told the versions with their numbers and adds what becomes of forks.
    pub fn publish_with(
        &self,
        ingests: &[Arc<Ingest>],
        publish: Publish,
        more: impl FnOnce(&[Version]) -> Vec<ForkChange>,
    ) -> Result<Vec<Version>, StoreError> {
        let mut batch = WriteBatch::default();
        let mut spilled = false;
        let mut gathered = Vec::new();
        for ingest in ingests {
            let mut pending = ingest.pending.lock();
            let items = std::mem::take(&mut pending.items);
            pending.bytes = 0;
            let ahead = pending.spilled;
            drop(pending);
            if ahead {
                spilled = true;
                ingest.spill(items)?;
            } else {
                self.put_items(&mut batch, &items)?;
                gathered.push((ingest, items));
            }
        }
        self.reach(Step::Gathered)?;
        if spilled {
            self.flush()?;
        }
        // Behind the flush: what is there now is on the disk.
        if ingests.iter().any(|ingest| ingest.is_lost()) {
            return Err(StoreError::Lost);
        }
        let _serial = self.changing(&self.publishing)?;
        for (volume, head) in &publish.heads {
            if self
                .volume_by_id(*volume)?
                .is_none_or(|volume| volume.head != *head)
            {
                for (ingest, items) in gathered {
                    ingest.pending.lock().items.extend(items);
                }
                return Err(StoreError::Moved);
            }
        }
        let mut format = None;
        for ingest in ingests {
            let kept = ingest.kept.lock();
            if let Some(spool) = kept.spool() {
                format = Some(self.raise_format(&mut batch, open::SPOOLS)?);
                self.put_kept(&mut batch, spool, &kept.chunks)?;
            }
        }
        let mut versions = publish.versions;
        let mut heads: HashMap<u64, super::Volume> = HashMap::new();
        for version in &mut versions {
            let volume = match heads.remove(&version.volume) {
                Some(volume) => Some(volume),
                None => self.volume_by_id(version.volume)?,
            };
            let missing = || StoreError::Missing {
                what: format!("volume {}", version.volume),
            };
            let mut volume = volume.ok_or_else(missing)?;
            version.number = volume.next;
            version.previous = volume.head;
            for (_, kept) in publish.takes_back.iter().filter(|(id, _)| *id == volume.id) {
                if kept + 1 < volume.next {
                    volume.taken_back.push((kept + 1, volume.next - 1));
                }
            }
            volume.head = volume.next;
            volume.next += 1;
            volume.used = version.time;
            let key = keys::two(keys::VERSION, version.volume, version.number);
            self.put(&mut batch, Target::Meta, &key, &json(version))?;
            heads.insert(volume.id, volume);
        }
        for volume in heads.values() {
            self.put(
                &mut batch,
                Target::Meta,
                &keys::one(keys::VOLUME, volume.id),
                &json(volume),
            )?;
        }
        let more = more(&versions);
        for change in publish.forks.iter().chain(&more) {
            match change {
                ForkChange::Remove(id, unused) => {
                    self.delete(&mut batch, Target::Meta, &keys::one(keys::FORK, id.0))?;
                    self.end_leases(&mut batch, *id)?;
                    self.free_inodes(&mut batch, std::slice::from_ref(unused))?;
                }
                ForkChange::Put(fork) | ForkChange::Rebase(fork, _) => {
                    if let ForkChange::Rebase(_, left) = change {
                        self.end_leases(&mut batch, fork.id)?;
                        self.put_lease(&mut batch, fork.id, left)?;
                    }
                    self.put(
                        &mut batch,
                        Target::Meta,
                        &keys::one(keys::FORK, fork.id.0),
                        &json(fork),
                    )?;
                }
            }
        }
        self.reach(Step::Publishing)?;
        let is_done = || self.is_published(&versions, publish.forks.iter().chain(&more));
        for ingest in ingests {
            ingest.kept.lock().is_tried = true;
        }
        self.write_certainly(batch, is_done)?;
        for ingest in ingests {
            let kept = ingest.kept.lock();
            let part = |(_, place): &(ChunkId, Place)| (place.offset, place.len);
            if let Some(spool) = kept.spool() {
                let all = || kept.chunks.iter().map(part).collect();
                self.note_parts(spool, kept.is_first.then(all));
            }
        }
        if let Some(format) = format
            && let Err(error) = self.say_format(format)
        {
            // The database says it, and the next start says it again.
            log::warn!("the format of the store is not said beside it: {error}");
        }
        Ok(versions)
    }

    /// Names chunks where they stay.
    fn put_kept(
        &self,
        batch: &mut WriteBatch,
        spool: u64,
        chunks: &[(ChunkId, Place)],
    ) -> Result<(), StoreError> {
        for (id, place) in chunks {
            self.put(batch, Target::Chunks, &id.0, &place.stored())?;
            self.put(batch, Target::Sizes, &id.0, &kept_sizes(*place))?;
        }
        self.put(batch, Target::Meta, &keys::one(keys::SPOOL, spool), &[])
    }

    /// Whether a batch that makes versions and changes forks is in the database, all of it as any of it.
    fn is_published<'a>(
        &self,
        versions: &[Version],
        mut forks: impl Iterator<Item = &'a ForkChange>,
    ) -> Result<bool, StoreError> {
        if let Some(version) = versions.first() {
            return Ok(self.version(version.at())?.as_ref() == Some(version));
        }
        match forks.next() {
            Some(ForkChange::Remove(id, _)) => Ok(self.fork(*id)?.is_none()),
            Some(ForkChange::Put(fork) | ForkChange::Rebase(fork, _)) => {
                Ok(self.fork(fork.id)?.as_ref() == Some(fork))
            }
            None => Ok(false),
        }
    }

    fn put_items(&self, batch: &mut WriteBatch, items: &[Item]) -> Result<(), StoreError> {
        for (target, id, stored, raw) in items {
            self.put(batch, *target, id, stored)?;
            if *target == Target::Chunks {
                let mut sizes = Vec::with_capacity(8);
                varint::put(&mut sizes, *raw);
                varint::put(&mut sizes, stored.len() as u64);
                self.put(batch, Target::Sizes, id, &sizes)?;
            }
        }
        Ok(())
    }

    /// Whether deleting an id is safe: called, and followed by the deletion, under the lock of its shard.
    pub(super) fn delete_unless_held(
        &self,
        target: Target,
        id: &[u8; 32],
        marked: &Prefixes,
    ) -> Result<bool, StoreError> {
        let prefix = prefix_of(id);
        if marked.contains(&prefix) {
            return Ok(false);
        }
        let shard = self.hands.lock(prefix);
        if shard.contains_key(&prefix) {
            return Ok(false);
        }
        let mut batch = WriteBatch::default();
        self.delete(&mut batch, target, id)?;
        if target == Target::Chunks {
            self.delete(&mut batch, Target::Sizes, id)?;
            self.chunks.remove(&ChunkId(*id));
        } else {
            self.nodes.remove(&NodeId(*id));
        }
        self.write_unsynced(batch)?;
        Ok(true)
    }
}
