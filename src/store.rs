//! The store: nodes and chunks by id, and the records of volumes, versions and forks, in RocksDB, of which this is the only user.
//!
//! Content is verified against its BLAKE3 whenever it comes from the disk. A write that fails poisons the store: nothing is
//! written until the database has been opened again, inside the process, which is tried when there is room.

mod check;
mod gc;
mod ingest;
mod keys;
mod meta;
mod settle;
mod steps;
#[cfg(test)]
mod tests;
mod wal;
mod write;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, IteratorMode, Options,
    WriteBatch, WriteBufferManager,
};
use serde::de::DeserializeOwned;

use crate::chunk::{self, ChunkId, Dictionary};
use crate::tree::{self, Node, NodeId, TreeError};
pub use check::{CheckReport, Problem};
pub use gc::{GcReport, Stats, VolumeStats};
pub use ingest::{ForkChange, Ingest, Publish};
pub use meta::{
    Fork, ForkId, ForkOptions, Hit, LeftOut, MountPoint, Moved, Totals, Verdict, Version,
    VersionRef, Volume,
};
use meta::{Target, corrupt};
pub use settle::Settled;
pub use steps::Step;
#[cfg(test)]
pub use steps::copy_folder;

/// The newest format that this program writes; a store of a newer one is refused.
const FORMAT: u32 = 2;
/// The format of a store that has no dictionary.
const FIRST_FORMAT: u32 = 1;
/// What may lie in the folder of a store that has no database yet.
const OURS: [&str; 8] = [
    "lock",
    "log",
    "db",
    "forks",
    "state",
    "mnt",
    "forkvol.sock",
    "daemon.lock",
];
const FAMILIES: [&str; 4] = ["meta", "nodes", "chunks", "sizes"];
/// The longest value that is believed to be a chunk.
const CHUNK_MAX: usize = chunk::MAX;

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{what} is missing from the store")]
    Missing { what: String },
    #[error("{what} is damaged")]
    Corrupt { what: String },
    #[error(
        "the store {dir} has format {found}, this program knows up to {FORMAT}: use a newer forkvol"
    )]
    Newer { dir: PathBuf, found: u32 },
    #[error("the store {dir} is in use by another process")]
    Locked { dir: PathBuf },
    #[error("{dir} is not a store: {why}")]
    NotAStore { dir: PathBuf, why: String },
    #[error("the store {dir} is damaged and cannot be opened: {why}")]
    Unreadable { dir: PathBuf, why: String },
    #[error("the disk of the store is full")]
    NoSpace,
    #[error("content was lost with a write to the store that failed: run the command again")]
    Lost,
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("the database of the store: {0}")]
    Database(rocksdb::Error),
}

impl StoreError {
    /// Damage that keeps the store in `dir` from being opened: it is of no use to anybody until that is put back.
    pub fn at_open(self, dir: &Path) -> StoreError {
        match self {
            StoreError::Corrupt { what: why } => StoreError::Unreadable {
                dir: dir.into(),
                why,
            },
            other => other,
        }
    }
}

impl From<TreeError> for StoreError {
    fn from(error: TreeError) -> StoreError {
        StoreError::Corrupt {
            what: format!("the tree ({error})"),
        }
    }
}

impl From<rocksdb::Error> for StoreError {
    fn from(error: rocksdb::Error) -> StoreError {
        let text = error.to_string();
        if text.contains("No space left") || text.contains("NoSpace") {
            StoreError::NoSpace
        // A file that the database knows of and that is not there is as bad as one that is wrong.
        } else if error.kind() == rocksdb::ErrorKind::Corruption || text.contains("No such file") {
            StoreError::Corrupt {
                what: format!("the database ({text})"),
            }
        } else {
            StoreError::Database(error)
        }
    }
}

/// How a store is opened.
#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// Bytes of decoded nodes kept in memory.
    pub node_cache: u64,
    /// Bytes of chunks kept in memory.
    pub chunk_cache: u64,
    /// Bytes of the disk that forks may not fill; None: 2 %, at least 1 GiB.
    pub reserve: Option<u64>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions {
            node_cache: 96 << 20,
            chunk_cache: 64 << 20,
            reserve: None,
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

impl quick_cache::Weighter<ChunkId, Arc<[u8]>> for ChunkWeight {
    fn weight(&self, _: &ChunkId, bytes: &Arc<[u8]>) -> u64 {
        bytes.len() as u64 + 64
    }
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
    /// How often the database was opened again: what had been written without WAL and not flushed went each time.
    reopened: AtomicU64,
    nodes: quick_cache::sync::Cache<NodeId, Arc<Node>, NodeWeight>,
    chunks: quick_cache::sync::Cache<ChunkId, Arc<[u8]>, ChunkWeight>,
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
    #[cfg(test)]
    pub(crate) steps: steps::Steps,
    _lock: File,
}

/// Keeps everything below a root from gc as long as it lives.
pub struct Lease {
    root: NodeId,
    leases: Arc<Mutex<HashMap<NodeId, usize>>>,
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
    /// Opens the store in `dir`, making it if the folder is empty or not there.
    ///
    /// # Errors
    /// `Locked`, `Newer`, `NotAStore` or `Unreadable`: a store that cannot be read is never replaced by an empty one.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Arc<Store>, StoreError> {
        let io = |what: &Path| {
            let what = what.display().to_string();
            move |source| StoreError::Io { what, source }
        };
        fs::create_dir_all(dir).map_err(io(dir))?;
        Store::recognise(dir)?;
        let has_db = dir.join("db/CURRENT").exists();
        let lock_path = dir.join("lock");
        let lock = lock_file(&lock_path)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(StoreError::Locked { dir: dir.into() });
            }
            Err(fs::TryLockError::Error(error)) => return Err(io(&lock_path)(error)),
        }
        for folder in ["forks", "log"] {
            let folder = dir.join(folder);
            fs::create_dir_all(&folder).map_err(io(&folder))?;
        }
        let db = open_db(dir).map_err(|error| error.at_open(dir))?;
        let store = Store {
            dir: dir.into(),
            options,
            db: RwLock::new(Some(db)),
            poisoned: Mutex::new(false),
            reopened: AtomicU64::new(0),
            nodes: quick_cache::sync::Cache::with_weighter(20_000, options.node_cache, NodeWeight),
            chunks: quick_cache::sync::Cache::with_weighter(2000, options.chunk_cache, ChunkWeight),
            publishing: Mutex::default(),
            numbering: Mutex::default(),
            leases: Arc::default(),
            hands: ingest::Hands::default(),
            unflushed: Mutex::default(),
            space: Mutex::default(),
            dictionaries: Mutex::default(),
            settling: Mutex::default(),
            compacting: Mutex::default(),
            #[cfg(test)]
            steps: steps::Steps::default(),
            _lock: lock,
        };
        store
            .check_format(has_db)
            .map_err(|error| error.at_open(dir))?;
        Ok(Arc::new(store))
    }

    /// Looks whether a folder is a store of this format or can become one, and can be written to. Nothing is made but its lock.
    ///
    /// # Errors
    /// `NotAStore`, `Newer`, `Unreadable`; what the disk answered.
    pub fn recognise(dir: &Path) -> Result<(), StoreError> {
        let state = dir.join("state");
        match fs::read_to_string(&state) {
            Ok(text) => {
                let format = text.strip_prefix("format ");
                let format = format.and_then(|number| number.trim().parse::<u32>().ok());
                if let Some(found) = format.filter(|found| *found > FORMAT) {
                    let dir = dir.into();
                    return Err(StoreError::Newer { dir, found });
                }
                if !dir.join("db/CURRENT").exists() {
                    return Err(StoreError::Unreadable {
                        dir: dir.into(),
                        why: "its database is not there".into(),
                    });
                }
            }
            Err(_) if dir.join("db/CURRENT").exists() => {}
            Err(_) => {
                let strange = fs::read_dir(dir)
                    .map_err(|source| StoreError::Io {
                        what: dir.display().to_string(),
                        source,
                    })?
                    .filter_map(Result::ok)
                    .find(|entry| !OURS.iter().any(|name| entry.file_name() == *name));
                if let Some(entry) = strange {
                    return Err(StoreError::NotAStore {
                        dir: dir.into(),
                        why: format!("it has a {:?} and no database", entry.file_name()),
                    });
                }
            }
        }
        lock_file(&dir.join("lock")).map(drop)
    }

    fn check_format(&self, had_db: bool) -> Result<(), StoreError> {
        let format = match self.meta(keys::FORMAT)? {
            Some(bytes) => {
                let found = bytes.as_slice().try_into().map(u32::from_be_bytes);
                let found = found.map_err(|_| corrupt("the format version"))?;
                if found > FORMAT {
                    return Err(StoreError::Newer {
                        dir: self.dir.clone(),
                        found,
                    });
                }
                found
            }
            None if had_db && self.first(&[])?.is_some() => {
                return Err(corrupt("the format version"));
            }
            None => {
                let mut batch = WriteBatch::default();
                self.put(
                    &mut batch,
                    Target::Meta,
                    keys::FORMAT,
                    &FIRST_FORMAT.to_be_bytes(),
                )?;
                let (id, bytes) = tree::empty();
                self.put(&mut batch, Target::Nodes, &id.0, &chunk::pack(&bytes, 0))?;
                self.write_synced(batch)?;
                FIRST_FORMAT
            }
        };
        self.say_format(format)
    }

    /// Says beside the database that there is one, and of which format: after it is so, and again at the next start if the process
    /// ended before it came to that.
    fn say_format(&self, format: u32) -> Result<(), StoreError> {
        let state = self.dir.join("state");
        let line = format!("format {format}\n");
        if fs::read_to_string(&state).is_ok_and(|said| said == line) {
            return Ok(());
        }
        let io = |source| StoreError::Io {
            what: state.display().to_string(),
            source,
        };
        fs::write(&state, line).map_err(io)
    }

    /// The folder of the store.
    pub fn dir(&self) -> &Path {
        &self.dir
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
    pub fn chunk(&self, id: ChunkId) -> Result<Arc<[u8]>, StoreError> {
        if let Some(bytes) = self.chunks.get(&id) {
            return Ok(bytes);
        }
        let bytes: Arc<[u8]> = self.load_chunk(id)?.into();
        self.chunks.insert(id, bytes.clone());
        Ok(bytes)
    }

    /// Reads a chunk from the disk.
    fn load_chunk(&self, id: ChunkId) -> Result<Vec<u8>, StoreError> {
        let what = || format!("chunk {id}");
        let raw = self.get_unpacked(Target::Chunks, &id.0, CHUNK_MAX, what)?;
        if ChunkId::of(&raw) == id {
            Ok(raw)
        } else {
            Err(StoreError::Corrupt { what: what() })
        }
    }

    /// Reads a node from the disk.
    fn load_node(&self, id: NodeId) -> Result<Node, StoreError> {
        let what = || format!("node {id}");
        let raw = self.get_unpacked(Target::Nodes, &id.0, 1 << 20, what)?;
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
    ) -> Result<Vec<u8>, StoreError> {
        self.with(|db| {
            let stored = db.get_pinned_cf(family(db, target)?, key)?;
            let stored = stored.ok_or_else(|| StoreError::Missing { what: what() })?;
            let mut failed = None;
            let raw = chunk::unpack_with(&stored, max, |id| {
                let found = self.dictionary(db, id).map_err(|e| failed = Some(e));
                found.ok().flatten()
            });
            match failed {
                Some(error) => Err(error),
                None => raw.map_err(|e| StoreError::Corrupt {
                    what: format!("{} ({e})", what()),
                }),
            }
        })
    }

    /// Runs `f` on the database.
    fn with<T>(&self, f: impl FnOnce(&DB) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let db = self.db.read();
        match db.as_ref() {
            Some(db) => f(db),
            None => Err(StoreError::NoSpace),
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

impl tree::Source for Store {
    type Error = StoreError;

    fn node(&self, id: NodeId) -> Result<Arc<Node>, StoreError> {
        if let Some(node) = self.nodes.get(&id) {
            return Ok(node);
        }
        let node = Arc::new(self.load_node(id)?);
        self.nodes.insert(id, node.clone());
        Ok(node)
    }
}

fn disk_space(dir: &Path) -> (u64, u64) {
    crate::sys::room(dir)
        .map(|room| (room.available, room.total))
        .unwrap_or((0, 0))
}

fn free_space(dir: &Path) -> u64 {
    disk_space(dir).0
}

fn family(db: &DB, target: Target) -> Result<&ColumnFamily, StoreError> {
    let name = FAMILIES[target as usize];
    db.cf_handle(name)
        .ok_or_else(|| corrupt(&format!("the database (no family {name})")))
}

fn lock_file(path: &Path) -> Result<File, StoreError> {
    let mut options = File::options();
    let file = options.create(true).truncate(false).write(true).open(path);
    file.map_err(|source| StoreError::Io {
        what: path.display().to_string(),
        source,
    })
}

/// Opens the database with the settings found good: small buffers, little WAL, blobs for chunks, no compression of its own.
fn open_db(dir: &Path) -> Result<DB, StoreError> {
    let db = dir.join("db");
    wal::trim(&db).map_err(|source| StoreError::Io {
        what: db.display().to_string(),
        source,
    })?;
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_max_total_wal_size(64 << 20);
    options.set_max_open_files(256);
    options.set_keep_log_file_num(5);
    options.set_max_log_file_size(2 << 20);
    options.set_log_level(rocksdb::LogLevel::Warn);
    options.set_bytes_per_sync(1 << 20);
    options.set_max_background_jobs(2);
    options.set_atomic_flush(true);
    options.set_write_buffer_manager(&WriteBufferManager::new_write_buffer_manager(
        64 << 20,
        false,
    ));
    let cache = Cache::new_lru_cache(16 << 20);
    let tuned = |name: &str| {
        let mut options = Options::default();
        let mut blocks = BlockBasedOptions::default();
        blocks.set_bloom_filter(10.0, false);
        blocks.set_block_cache(&cache);
        options.set_block_based_table_factory(&blocks);
        options.set_compression_type(rocksdb::DBCompressionType::None);
        options.set_write_buffer_size(16 << 20);
        options.set_max_write_buffer_number(4);
        if name == "chunks" {
            options.set_enable_blob_files(true);
            options.set_min_blob_size(0);
            options.set_blob_file_size(64 << 20);
            options.set_enable_blob_gc(true);
            options.set_write_buffer_size(32 << 20);
        }
        ColumnFamilyDescriptor::new(name, options)
    };
    let mut families: Vec<_> = FAMILIES.iter().map(|name| tuned(name)).collect();
    families.push(tuned("default"));
    Ok(DB::open_cf_descriptors(&options, dir.join("db"), families)?)
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
