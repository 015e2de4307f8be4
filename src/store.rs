//! The store: nodes and chunks by id, and the records of volumes, versions and forks, in RocksDB, of which this is the only user.
//!
//! Content is verified against its BLAKE3 whenever it comes from the disk. A write that fails poisons the store: nothing is
//! written until the database has been opened again, inside the process, which is tried when there is room.

mod ahead;
mod check;
mod error;
mod gc;
mod ingest;
mod keys;
mod meta;
mod open;
mod settle;
mod spools;
mod steps;
#[cfg(test)]
mod tests;
mod wal;
mod write;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, DirEntry, File, Metadata};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use rocksdb::{ColumnFamily, DB, IteratorMode};
use serde::de::DeserializeOwned;

use crate::chunk::{self, ChunkId, Dictionary, Place};
use crate::tree::{self, Node, NodeId};
pub use ahead::ReadAhead;
pub use check::{CheckReport, Paths, Problem};
pub use error::StoreError;
pub use gc::{GcReport, Stats, VolumeStats};
pub use ingest::{ForkChange, Ingest, Publish};
pub use meta::{
    Fork, ForkId, ForkOptions, Hit, LeftOut, MountPoint, Moved, Totals, Verdict, Version,
    VersionRef, Volume,
};
use meta::{Target, corrupt};
use open::{Opening, open_db, write_buffer};
pub use settle::Settled;
pub use spools::Rest;
pub use steps::Step;
#[cfg(test)]
pub use steps::copy_folder;

const FAMILIES: [&str; 4] = ["meta", "nodes", "chunks", "sizes"];
/// The longest value that is believed to be a chunk.
const CHUNK_MAX: usize = chunk::MAX;

/// How a store is opened.
#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// Bytes of decoded nodes kept in memory.
    pub node_cache: u64,
    /// Bytes of chunks kept in memory.
    pub chunk_cache: u64,
    /// Bytes of the disk that forks may not fill; None: 2 %, at least 1 GiB.
    pub reserve: Option<u64>,
    /// Bytes from which on it is worth to keep a spool for what lies in it.
    pub bulk: u64,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions {
            node_cache: 96 << 20,
            chunk_cache: 64 << 20,
            reserve: None,
            // Less goes into the batch of its commit.
            bulk: 8 << 20,
        }
    }
}

#[derive(Clone)]
struct NodeWeight;

impl quick_cache::Weighter<NodeId, Arc<Node>> for NodeWeight {
    fn weight(&self, _: &NodeId, node: &Arc<Node>) -> u64 {
        node.weight() as u64
    }
}

#[derive(Clone)]
struct ChunkWeight;

impl quick_cache::Weighter<ChunkId, Arc<Vec<u8>>> for ChunkWeight {
    fn weight(&self, _: &ChunkId, bytes: &Arc<Vec<u8>>) -> u64 {
        bytes.len() as u64 + 64
    }
}

/// What a stored value comes to.
enum Found {
    /// The raw bytes.
    Here(Vec<u8>),
    There(Place),
}

/// How a chunk was read.
#[derive(Debug)]
pub enum Loaded {
    Chunk(Arc<Vec<u8>>),
    /// Into the bytes that were given.
    Filled,
}

/// A key and its value.
type Pair = (Box<[u8]>, Box<[u8]>);

/// An open store.
pub struct Store {
    dir: PathBuf,
    options: StoreOptions,
    /// The database; taken out only to be opened again.
    db: RwLock<Option<DB>>,
    poisoned: Mutex<bool>,
    /// The database was opened with small buffers, for there was little room.
    frugal: AtomicBool,
    course: Mutex<Course>,
    /// How often the database was opened again: what had been written without WAL and not flushed went each time.
    reopened: AtomicU64,
    nodes: quick_cache::sync::Cache<NodeId, Arc<Node>, NodeWeight>,
    chunks: quick_cache::sync::Cache<ChunkId, Arc<Vec<u8>>, ChunkWeight>,
    /// Heads change under this lock and nowhere else.
    publishing: Mutex<()>,
    numbering: Mutex<()>,
    leases: Arc<Mutex<HashMap<NodeId, usize>>>,
    hands: ingest::Hands,
    unflushed: Mutex<ingest::Unflushed>,
    space: Mutex<Option<(Instant, u64)>>,
    /// Those that were needed so far.
    dictionaries: Mutex<BTreeMap<u64, Arc<Dictionary>>>,
    /// The record of settling changes under this lock.
    settling: Mutex<()>,
    compacting: Mutex<()>,
    misses: ahead::Misses,
    spools: spools::Spools,
    #[cfg(test)]
    pub(crate) steps: steps::Steps,
    _lock: File,
}

/// How far what takes long has come, and whether it may go on.
#[derive(Default)]
struct Course {
    /// The process is to end.
    ending: bool,
    /// A gc compacts at this moment.
    compacting: bool,
    /// It was told not to: the database writes no more tables.
    cancelled: bool,
}

/// Keeps everything below a root from gc as long as it lives.
pub struct Lease {
    root: NodeId,
    leases: Arc<Mutex<HashMap<NodeId, usize>>>,
}

impl Lease {
    /// What is kept.
    pub fn root(&self) -> NodeId {
        self.root
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut leases = self.leases.lock();
        if let Some(count) = leases.get_mut(&self.root) {
            *count -= 1;
            if *count == 0 {
                leases.remove(&self.root);
            }
        }
    }
}

impl Store {
    /// The folder of the store.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes from which on it is worth to keep a spool for what lies in it.
    pub fn bulk(&self) -> u64 {
        self.options.bulk
    }

    /// Who reads ahead in this store; for a thread that does nothing else.
    pub fn read_ahead(&self) -> ReadAhead {
        self.misses.reader(self.dir.join("db"))
    }

    /// Keeps what lies below a root.
    pub fn lease(&self, root: NodeId) -> Lease {
        *self.leases.lock().entry(root).or_default() += 1;
        Lease {
            root,
            leases: self.leases.clone(),
        }
    }

    /// Returns a chunk, decompressed and verified.
    ///
    /// # Errors
    /// `Missing` or `Corrupt`, or what the disk answered.
    pub fn chunk(&self, id: ChunkId) -> Result<Arc<Vec<u8>>, StoreError> {
        if let Some(bytes) = self.chunks.get(&id) {
            return Ok(bytes);
        }
        let bytes = self.misses.count(|| self.load_chunk(id))?;
        Ok(self.remember(id, bytes))
    }

    /// Returns a chunk as `chunk` does, or fills `bytes` with it, verified, where it lies in a spool as it is and is that long. Then
    /// memory would save little, and what is part of something long would push out everything else.
    ///
    /// # Errors
    /// As `chunk`. Unless `bytes` are filled there may be anything in them.
    pub fn chunk_to(&self, id: ChunkId, bytes: &mut [u8]) -> Result<Loaded, StoreError> {
        if let Some(kept) = self.chunks.get(&id) {
            return Ok(Loaded::Chunk(kept));
        }
        let raw = self.misses.count(|| match self.find_chunk(id)? {
            Found::There(place)
                if place.len == bytes.len() as u64
                    && self.read_kept(id, place, bytes).is_ok()
                    && ChunkId::of(bytes) == id =>
            {
                Ok(None)
            }
            found => self.load_found(id, found).map(Some),
        })?;
        Ok(raw.map_or(Loaded::Filled, |raw| Loaded::Chunk(self.remember(id, raw))))
    }

    fn remember(&self, id: ChunkId, bytes: Vec<u8>) -> Arc<Vec<u8>> {
        let bytes = Arc::new(bytes);
        self.chunks.insert(id, bytes.clone());
        bytes
    }

    /// Reads a chunk from the disk.
    fn load_chunk(&self, id: ChunkId) -> Result<Vec<u8>, StoreError> {
        self.load_found(id, self.find_chunk(id)?)
    }

    /// Reads a chunk that was just found in the database.
    fn load_found(&self, id: ChunkId, found: Found) -> Result<Vec<u8>, StoreError> {
        let there = |place: Place| {
            let mut raw = vec![0; place.len as usize];
            self.read_kept(id, place, &mut raw).map(|()| raw)
        };
        let raw = match found {
            Found::Here(raw) => raw,
            Found::There(place) => match there(place) {
                Ok(raw) if ChunkId::of(&raw) == id => return Ok(raw),
                // Another commit may have stored it since, and a gc given its place back.
                read => match self.find_chunk(id)? {
                    Found::Here(raw) => raw,
                    Found::There(now) if now == place => read?,
                    Found::There(now) => there(now)?,
                },
            },
        };
        if ChunkId::of(&raw) == id {
            Ok(raw)
        } else {
            let what = format!("chunk {id}");
            Err(StoreError::Corrupt { what })
        }
    }

    fn find_chunk(&self, id: ChunkId) -> Result<Found, StoreError> {
        self.get_unpacked(Target::Chunks, &id.0, CHUNK_MAX, || format!("chunk {id}"))
    }

    /// Reads a node from the disk.
    fn load_node(&self, id: NodeId) -> Result<Node, StoreError> {
        let what = || format!("node {id}");
        let Found::Here(raw) = self.get_unpacked(Target::Nodes, &id.0, 1 << 20, what)? else {
            return Err(StoreError::Corrupt { what: what() });
        };
        if NodeId::of(&raw) != id {
            return Err(StoreError::Corrupt { what: what() });
        }
        Node::decode(&raw).map_err(|e| StoreError::Corrupt {
            what: format!("{} ({e})", what()),
        })
    }

    fn get_unpacked(
        &self,
        target: Target,
        key: &[u8],
        max: usize,
        what: impl Fn() -> String,
    ) -> Result<Found, StoreError> {
        self.with(|db| {
            let stored = db.get_pinned_cf(family(db, target)?, key)?;
            let stored = stored.ok_or_else(|| StoreError::Missing { what: what() })?;
            let damaged = |error| StoreError::Corrupt {
                what: format!("{} ({error})", what()),
            };
            if let Some(place) = Place::of(&stored, max).map_err(damaged)? {
                return Ok(Found::There(place));
            }
            let mut failed = None;
            let raw = chunk::unpack_with(&stored, max, |id| {
                let found = self.dictionary(db, id).map_err(|e| failed = Some(e));
                found.ok().flatten()
            });
            match failed {
                Some(error) => Err(error),
                None => raw.map(Found::Here).map_err(damaged),
            }
        })
    }

    /// Runs `f` on the database.
    fn with<T>(&self, f: impl FnOnce(&DB) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let db = self.db.read();
        match db.as_ref() {
            Some(db) => f(db),
            None => Err(self.full()),
        }
    }

    fn meta(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.with(|db| Ok(db.get_cf(family(db, Target::Meta)?, key)?))
    }

    fn record<T: DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, StoreError> {
        let Some(bytes) = self.meta(key)? else {
            return Ok(None);
        };
        let what = || corrupt(&format!("the record {}", key.escape_ascii()));
        serde_json::from_slice(&bytes).map(Some).map_err(|_| what())
    }

    fn records<T: DeserializeOwned>(&self, prefix: &[u8]) -> Result<Vec<T>, StoreError> {
        let mut out = Vec::new();
        for (key, value) in self.entries(Target::Meta, prefix)? {
            let what = || corrupt(&format!("the record {}", key.escape_ascii()));
            out.push(serde_json::from_slice(&value).map_err(|_| what())?);
        }
        Ok(out)
    }

    /// All entries of a family whose keys begin with `prefix`; for the records alone, which are few.
    fn entries(&self, target: Target, prefix: &[u8]) -> Result<Vec<Pair>, StoreError> {
        self.with(|db| {
            let mode = IteratorMode::From(prefix, rocksdb::Direction::Forward);
            let mut out = Vec::new();
            for item in db.iterator_cf(family(db, target)?, mode) {
                let (key, value) = item?;
                if !key.starts_with(prefix) {
                    break;
                }
                out.push((key, value));
            }
            Ok(out)
        })
    }

    fn first(&self, prefix: &[u8]) -> Result<Option<Pair>, StoreError> {
        self.with(|db| {
            let mode = IteratorMode::From(prefix, rocksdb::Direction::Forward);
            let first = db
                .iterator_cf(family(db, Target::Meta)?, mode)
                .next()
                .transpose()?;
            Ok(first.filter(|(key, _)| key.starts_with(prefix)))
        })
    }

    /// Bytes of the store's disk that are free, and all there are; none of either if the disk does not say.
    pub fn disk(&self) -> (u64, u64) {
        disk_space(&self.dir)
    }

    /// Bytes that forks may still write before the disk's reserve begins.
    pub fn room(&self) -> u64 {
        let mut space = self.space.lock();
        // Far less than the reserve can be written within this time.
        if let Some((when, room)) = *space
            && when.elapsed() < Duration::from_millis(50)
        {
            return room;
        }
        let (free, total) = disk_space(&self.dir);
        let reserve = self
            .options
            .reserve
            .unwrap_or_else(|| (total / 50).max(1 << 30));
        let room = free.saturating_sub(reserve);
        *space = Some((Instant::now(), room));
        room
    }
}

impl Store {
    /// Whether nothing should be written that can wait.
    pub fn is_short(&self) -> bool {
        self.room() < write::PLENTY
    }
}

impl tree::Source for Store {
    type Error = StoreError;

    fn node(&self, id: NodeId) -> Result<Arc<Node>, StoreError> {
        if let Some(node) = self.nodes.get(&id) {
            return Ok(node);
        }
        let node = Arc::new(self.misses.count(|| self.load_node(id))?);
        self.nodes.insert(id, node.clone());
        Ok(node)
    }
}

fn disk_space(dir: &Path) -> (u64, u64) {
    crate::sys::room(dir)
        .map(|room| (room.available, room.total))
        .unwrap_or((0, 0))
}

/// The files of a folder; none if there is no such folder.
fn files_of(dir: &Path) -> Vec<(OsString, Metadata)> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let file = |entry: DirEntry| Some((entry.file_name(), entry.metadata().ok()?));
    entries.filter_map(Result::ok).filter_map(file).collect()
}

fn free_space(dir: &Path) -> u64 {
    disk_space(dir).0
}

fn family(db: &DB, target: Target) -> Result<&ColumnFamily, StoreError> {
    let name = FAMILIES[target as usize];
    db.cf_handle(name)
        .ok_or_else(|| corrupt(&format!("the database (no family {name})")))
}

/// The prefix of an id that stands for it where a false hit does no harm.
fn prefix_of(id: &[u8; 32]) -> u64 {
    let (first, _) = id.split_first_chunk::<8>().expect("an id has 32 bytes");
    u64::from_be_bytes(*first)
}

type Prefixes = HashSet<u64>;

fn stored_len(value: &[u8]) -> Option<(u64, u64)> {
    let mut rest = value;
    let raw = chunk::varint::take(&mut rest)?;
    Some((raw, chunk::varint::take(&mut rest)?))
}
