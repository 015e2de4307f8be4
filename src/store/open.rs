//! How a store is opened, or made: whose folder it is, which format it has, how its database is set up.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use parking_lot::{Mutex, RwLock};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, Options, WriteBatch, WriteBufferManager,
};

use super::ahead::Misses;
use super::spools::Spools;
#[cfg(test)]
use super::steps;
use super::{
    ChunkWeight, FAMILIES, NodeWeight, Store, StoreError, StoreOptions, Target, corrupt,
    free_space, ingest, keys, wal, write,
};
use crate::{chunk, tree};

/// The newest format that this program writes; a store of a newer one is refused.
pub(super) const FORMAT: u32 = LARGE_DICTIONARIES;
/// The format of a store without anything of what follows.
const FIRST_FORMAT: u32 = 1;
/// The first one that has kept spools. One below it has dictionaries of up to 112 KiB.
pub(super) const SPOOLS: u32 = 3;
/// The first one that has dictionaries of up to 512 KiB.
pub(super) const LARGE_DICTIONARIES: u32 = 4;
/// What may lie in the folder of a store that has no database yet.
const OURS: [&str; 9] = [
    "lock",
    "log",
    "db",
    "forks",
    "spools",
    "state",
    "mnt",
    "forkvol.sock",
    "daemon.lock",
];

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
        for folder in ["forks", "log", "spools"] {
            let folder = dir.join(folder);
            fs::create_dir_all(&folder).map_err(io(&folder))?;
        }
        let opening = Opening::for_room(free_space(dir));
        let db = open_db(dir, opening).map_err(|error| error.at_open(dir))?;
        let store = Store {
            dir: dir.into(),
            options,
            db: RwLock::new(Some(db)),
            poisoned: Mutex::new(false),
            frugal: AtomicBool::new(opening == Opening::Frugal),
            course: Mutex::default(),
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
            misses: Misses::default(),
            spools: Spools::default(),
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

    fn format(&self) -> Result<Option<u32>, StoreError> {
        let Some(bytes) = self.meta(keys::FORMAT)? else {
            return Ok(None);
        };
        let found = bytes.as_slice().try_into().map(u32::from_be_bytes);
        found.map(Some).map_err(|_| corrupt("the format version"))
    }

    /// Raises the format in a batch that brings what it has and older ones have not, if it is not as high; returns what is to be
    /// said of it then.
    pub(super) fn raise_format(
        &self,
        batch: &mut WriteBatch,
        least: u32,
    ) -> Result<u32, StoreError> {
        let format = self.format()?.unwrap_or(FIRST_FORMAT).max(least);
        self.put(batch, Target::Meta, keys::FORMAT, &format.to_be_bytes())?;
        Ok(format)
    }

    fn check_format(&self, had_db: bool) -> Result<(), StoreError> {
        let format = match self.format()? {
            Some(found) => {
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
    pub(super) fn say_format(&self, format: u32) -> Result<(), StoreError> {
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
}

fn lock_file(path: &Path) -> Result<File, StoreError> {
    let mut options = File::options();
    let file = options.create(true).truncate(false).write(true).open(path);
    file.map_err(|source| StoreError::Io {
        what: path.display().to_string(),
        source,
    })
}

/// How the database is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Opening {
    Usual,
    /// With buffers, and room taken ahead for them, that fit where little is free.
    Frugal,
    /// For reading alone, which takes no room.
    ReadOnly,
}

impl Opening {
    pub(super) fn for_room(free: u64) -> Opening {
        match free < write::PLENTY {
            true => Opening::Frugal,
            false => Opening::Usual,
        }
    }
}

/// The write buffers of a family.
pub(super) fn write_buffer(family: &str, opening: Opening) -> usize {
    match family {
        _ if opening == Opening::Frugal => 4 << 20,
        "chunks" => 32 << 20,
        _ => 16 << 20,
    }
}

/// Opens the database with the settings found good: small buffers, little WAL, blobs for chunks, no compression of its own.
pub(super) fn open_db(dir: &Path, opening: Opening) -> Result<DB, StoreError> {
    crate::sys::process::initialize_database();
    let db = dir.join("db");
    wal::trim(&db)?;
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_max_total_wal_size(64 << 20);
    options.set_max_open_files(256);
    options.set_keep_log_file_num(5);
    options.set_max_log_file_size(2 << 20);
    options.set_manifest_preallocation_size(64 << 10);
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
        options.set_write_buffer_size(write_buffer(name, opening));
        options.set_max_write_buffer_number(4);
        if name == "chunks" {
            options.set_enable_blob_files(true);
            options.set_min_blob_size(0);
            options.set_blob_file_size(64 << 20);
            // Only a gc rewrites values: a compaction beside a large commit would copy what has just been written.
            options.set_enable_blob_gc(true);
            options.set_blob_gc_age_cutoff(0.0);
        }
        ColumnFamilyDescriptor::new(name, options)
    };
    let mut families: Vec<_> = FAMILIES.iter().map(|name| tuned(name)).collect();
    families.push(tuned("default"));
    Ok(match opening {
        Opening::ReadOnly => DB::open_cf_descriptors_read_only(&options, db, families, false)?,
        _ => DB::open_cf_descriptors(&options, db, families)?,
    })
}
