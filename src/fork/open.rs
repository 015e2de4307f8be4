//! The beginning of a fork: its delta is made, or made again from its log.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::{Mutex, RwLock};

use super::error::FsError;
use super::extent::Extent;
use super::log::{self, Log, LogError, Request};
use super::spool::Spool;
use super::table::{Cell, Edit, Inode, Table};
use super::{Fork, Gate, LEASE, Layers, Numbers, Origin, root, view};
use crate::record::{Attr, Kind, Nanos, ROOT};
use crate::store::{Store, StoreError};

impl Fork {
    /// Makes the delta of a new fork in `dir`. The root directory of a volume without versions belongs to `owner` (uid, gid).
    ///
    /// # Errors
    /// What the disk or the store answered.
    pub fn create(
        store: Arc<Store>,
        dir: &Path,
        origin: Origin,
        owner: (u32, u32),
        now: Nanos,
    ) -> Result<Fork, FsError> {
        fs::create_dir(dir)?;
        let first = origin.first_segment;
        let made = Fork::furnish(store, dir, origin, owner, now);
        if made.is_err() {
            // Without opening anything: there may be no descriptor left to do it with.
            let begun = [log::segment(dir, first), dir.join("spool")];
            let removed = begun.iter().map(fs::remove_file).find_map(|result| {
                result
                    .err()
                    .filter(|error| error.kind() != std::io::ErrorKind::NotFound)
            });
            if let Err(error) = removed.map_or_else(|| fs::remove_dir(dir), Err) {
                ::log::warn!("{} is left over: {error}", dir.display());
            }
        }
        made
    }

    /// Fills the folder of a new delta.
    fn furnish(
        store: Arc<Store>,
        dir: &Path,
        origin: Origin,
        owner: (u32, u32),
        now: Nanos,
    ) -> Result<Fork, FsError> {
        let log = Log::create(dir, origin.id.0, origin.first_segment)?;
        let fork = Fork::with(store, dir, origin, log)?;
        if view::base_attr(&fork.store, fork.root().id, ROOT)?.is_none() {
            let attr = Attr {
                kind: Kind::Directory,
                mode: 0o755,
                uid: owner.0,
                gid: owner.1,
                rdev: 0,
                nlink: 2,
                size: 0,
                blocks: 0,
                atime: now,
                mtime: now,
                ctime: now,
                btime: now,
                parent: ROOT,
            };
            let edit = Edit::Attr {
                ino: ROOT,
                attr: attr.clone(),
            };
            fork.log.lock().append(Request::default(), [&edit])?;
            let cell = Cell::new(ROOT, Inode::created(attr));
            fork.layers.write().live.inodes.insert(ROOT, cell);
            fork.created.store(1, Ordering::Relaxed);
            fork.count(0, 1);
        }
        Ok(fork)
    }

    /// Opens the delta of a fork after a restart, with everything that had been acknowledged.
    ///
    /// # Errors
    /// A damaged log, or what the disk or the store answered.
    pub fn open(store: Arc<Store>, dir: &Path, origin: Origin) -> Result<Fork, FsError> {
        let (id, first) = (origin.id.0, origin.first_segment);
        // The log is replayed into the fork that goes on writing it, so it is opened twice: once to be read whole.
        let log = Log::replay(dir, id, first, |_, _| {}).map_err(log_error)?;
        let fork = Fork::with(store, dir, origin, log)?;
        let mut failed = None;
        let replayed = Log::replay(dir, id, first, |_, edits| {
            if failed.is_none() {
                failed = fork.replay(&edits).err();
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        *fork.log.lock() = replayed.map_err(log_error)?;
        let layers = fork.layers.read();
        if fork.spool.is_kept() {
            // A commit that was cut off, or was in doubt, may have made a version of what lies there.
            for cell in layers.live.inodes.values() {
                cell.state.write().content.extents.disown(0, u64::MAX);
            }
        }
        let extents = layers.live.inodes.values().flat_map(|cell| {
            cell.state
                .read()
                .content
                .extents
                .iter()
                .collect::<Vec<Extent>>()
        });
        fork.spool.adopt(extents)?;
        let mut created = 0;
        for cell in layers.live.inodes.values() {
            let inode = cell.state.read();
            created += u64::from(!inode.is_of_base());
            if inode.attr.kind != Kind::Directory && inode.attr.nlink > 1 {
                fork.note_link();
            }
        }
        fork.created.store(created, Ordering::Relaxed);
        drop(layers);
        Ok(fork)
    }

    fn with(store: Arc<Store>, dir: &Path, origin: Origin, log: Log) -> Result<Fork, FsError> {
        let root = root(&store, origin.root);
        let spool = Spool::open(&dir.join("spool"))?;
        let layers = Layers {
            root,
            live: Table::default(),
            frozen: None,
            in_doubt: false,
            carried: 0,
        };
        let numbers = Numbers {
            left: 0..0,
            next_lease: LEASE.start,
        };
        Ok(Fork {
            id: origin.id,
            store,
            spool,
            dir: dir.into(),
            size: origin.size,
            excludes: origin.excludes,
            gate: Arc::new(RwLock::new(Gate::Open)),
            layers: RwLock::new(layers),
            log: Mutex::new(log),
            numbers: Mutex::new(numbers),
            lookups: Mutex::default(),
            created: AtomicU64::new(0),
            private: Mutex::new(origin.private),
            holds: (
                AtomicI64::new(origin.holds.0 as i64),
                AtomicI64::new(origin.holds.1 as i64),
            ),
            has_links: AtomicBool::new(origin.has_links),
            ingested: AtomicU64::new(0),
            looked_at: AtomicU64::new(0),
            hashed: Mutex::default(),
            damage: OnceLock::new(),
            started: Instant::now(),
        })
    }

    /// Applies one record of the log to the table, as it was applied when it was written.
    fn replay(&self, edits: &[Edit]) -> Result<(), FsError> {
        let mut layers = self.layers.write();
        for edit in edits {
            match edit {
                Edit::Attr { ino, attr } => {
                    let known = self.load(&mut layers, *ino)?;
                    let made = || Cell::new(*ino, Inode::created(attr.clone()));
                    if !known {
                        layers.live.inodes.insert(*ino, made());
                        self.count(attr.blocks as i64, 1);
                    }
                }
                Edit::Extent { ino, .. }
                | Edit::Truncate { ino, .. }
                | Edit::Orphan { ino }
                | Edit::Remove { ino } => {
                    self.load(&mut layers, *ino)?;
                }
                // The segment before was replayed too: the inode is what was carried already, of which the log may have but a part.
                Edit::Carry { ino, .. } if layers.live.inodes.contains_key(ino) => continue,
                Edit::Carry { ino, attr, .. } => {
                    self.load(&mut layers, *ino)?;
                    let before = layers.live.inodes.get(ino).map(|cell| {
                        let inode = cell.state.read();
                        (inode.attr.blocks as i64, inode.created)
                    });
                    let inodes = i64::from(before.is_none());
                    let (blocks, created) = before.unwrap_or((0, true));
                    self.count(attr.blocks as i64 - blocks, inodes);
                    self.apply(&mut layers, edit);
                    if let Some(cell) = layers.live.inodes.get(ino) {
                        cell.state.write().created = created;
                    }
                    continue;
                }
                _ => {}
            }
            // The room that goes is found at the end, from what is live then.
            self.apply(&mut layers, edit);
        }
        Ok(())
    }
}

fn log_error(error: LogError) -> FsError {
    match error {
        LogError::Io(_, error) => FsError::Io(error),
        damaged @ LogError::Damaged { .. } => StoreError::Corrupt {
            what: damaged.to_string(),
        }
        .into(),
    }
}
