//! Writing to the database: the only way to it, so that a failed write poisons the store and a test can count the steps.

use std::sync::atomic::Ordering;

use parking_lot::{Mutex, MutexGuard};
use rocksdb::{ColumnFamily, WriteBatch, WriteOptions};

use super::{
    FAMILIES, Opening, Step, Store, StoreError, Target, family, free_space, open_db, wal,
    write_buffer,
};

/// What the database takes to be opened beside what its WAL holds: new segments of it, a manifest, a few tables.
pub(super) const LEAST_ROOM: u64 = 16 << 20;
/// With less than this it gets small buffers, for it sets room aside for each.
pub(super) const PLENTY: u64 = 256 << 20;
/// As in [`FAMILIES`].
const TARGETS: [Target; 4] = [Target::Meta, Target::Nodes, Target::Chunks, Target::Sizes];

impl Store {
    pub(super) fn put(
        &self,
        batch: &mut WriteBatch,
        target: Target,
        key: &[u8],
        value: &[u8],
    ) -> Result<(), StoreError> {
        self.with(|db| {
            batch.put_cf(family(db, target)?, key, value);
            Ok(())
        })
    }

    pub(super) fn delete(
        &self,
        batch: &mut WriteBatch,
        target: Target,
        key: &[u8],
    ) -> Result<(), StoreError> {
        self.with(|db| {
            batch.delete_cf(family(db, target)?, key);
            Ok(())
        })
    }

    pub(super) fn write_unsynced(&self, batch: WriteBatch) -> Result<(), StoreError> {
        self.write(batch, &WriteOptions::default())
    }

    pub(super) fn write_synced(&self, batch: WriteBatch) -> Result<(), StoreError> {
        let mut options = WriteOptions::default();
        options.set_sync(true);
        self.write(batch, &options)?;
        self.reach(Step::Synced)
    }

    pub(super) fn write(
        &self,
        batch: WriteBatch,
        options: &WriteOptions,
    ) -> Result<(), StoreError> {
        self.heal()?;
        self.reach(Step::Writing)?;
        let result = self.with(|db| Ok(db.write_opt(batch, options)?));
        let result = result.and_then(|()| self.reach(Step::Written));
        self.poison_on_error(result)
    }

    /// Writes a batch durably, and goes by what is there if that fails: a log that could not be synced may hold the batch all the
    /// same, and the next opening would bring it to light. `is_there` tells it from the one before it.
    pub(super) fn write_certainly(
        &self,
        batch: WriteBatch,
        is_there: impl FnOnce() -> Result<bool, StoreError>,
    ) -> Result<(), StoreError> {
        let Err(error) = self.write_synced(batch) else {
            return Ok(());
        };
        let in_doubt = matches!(error, StoreError::NoSpace { .. } | StoreError::Database(_));
        match in_doubt && self.heal().is_ok() && is_there()? {
            true => Ok(()),
            false => Err(error),
        }
    }

    pub(super) fn poison_on_error<T>(
        &self,
        result: Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        result.map_err(|error| match error {
            StoreError::NoSpace { .. } => {
                *self.poisoned.lock() = true;
                self.full()
            }
            StoreError::Database(_) => {
                *self.poisoned.lock() = true;
                error
            }
            other => other,
        })
    }

    /// That there is no room, and how much there has to be. What the WAL holds is written to tables when it is opened.
    pub(super) fn full(&self) -> StoreError {
        let wants = LEAST_ROOM + wal::len(&self.dir.join("db"));
        StoreError::NoSpace { wants }
    }

    /// Takes the lock of who reads records to change them. What a write that failed has done comes to light first: a change of what
    /// was read before that would undo it.
    pub(super) fn changing<'a>(
        &self,
        lock: &'a Mutex<()>,
    ) -> Result<MutexGuard<'a, ()>, StoreError> {
        let guard = lock.lock();
        self.heal()?;
        Ok(guard)
    }

    /// Opens the database again after a failed write, if there is room to write again.
    pub(super) fn heal(&self) -> Result<(), StoreError> {
        let mut poisoned = self.poisoned.lock();
        if !*poisoned {
            return Ok(());
        }
        self.reach(Step::Writing)?;
        let (free, full) = (free_space(&self.dir), self.full());
        if matches!(full, StoreError::NoSpace { wants } if free < wants) {
            return Err(full);
        }
        let opening = Opening::for_room(free);
        // A compaction would hold it for long, and with it all who read.
        if let Some(db) = &*self.db.read() {
            db.cancel_all_background_work(false);
        }
        let mut db = self.db.write();
        drop(db.take());
        #[cfg(test)]
        self.take_what_was_left();
        // What was written without the WAL and not flushed is gone.
        self.reopened.fetch_add(1, Ordering::AcqRel);
        self.unflushed.lock().clear();
        match open_db(&self.dir, opening) {
            Ok(opened) => *db = Some(opened),
            Err(error) => {
                // Whoever only reads notices nothing.
                *db = open_db(&self.dir, Opening::ReadOnly).ok();
                return Err(error);
            }
        }
        drop(db);
        self.frugal
            .store(opening == Opening::Frugal, Ordering::Release);
        *poisoned = false;
        log::warn!(
            "{}: opened the database again after a failed write",
            self.dir.display()
        );
        Ok(())
    }

    /// Gives the database its usual buffers back when there is room for them.
    fn unfold(&self) -> Result<(), StoreError> {
        if !self.frugal.load(Ordering::Acquire) || free_space(&self.dir) < PLENTY {
            return Ok(());
        }
        self.with(|db| {
            for (target, name) in TARGETS.into_iter().zip(FAMILIES) {
                let bytes = write_buffer(name, Opening::Usual).to_string();
                db.set_options_cf(family(db, target)?, &[("write_buffer_size", &bytes)])?;
            }
            Ok(())
        })?;
        self.frugal.store(false, Ordering::Release);
        Ok(())
    }

    /// Ends what takes long, for the process is to end: what a gc has not done the next one does.
    pub fn end_soon(&self) {
        self.misses.end();
        let mut course = self.course.lock();
        course.ending = true;
        if !course.compacting || course.cancelled {
            return;
        }
        course.cancelled = true;
        drop(course);
        // Afterwards nothing is flushed any more.
        let flushed = self.flush();
        let cancelled = self.with(|db| {
            db.cancel_all_background_work(false);
            Ok(())
        });
        if let Err(error) = flushed.and(cancelled) {
            log::warn!("{}: {error}", self.dir.display());
        }
    }

    /// Fails if the process is to end.
    pub(super) fn go_on(&self) -> Result<(), StoreError> {
        match self.course.lock().ending {
            true => Err(StoreError::Ending),
            false => Ok(()),
        }
    }

    /// Writes to tables what the WAL holds, so that the next process opens the store at once.
    pub fn end(&self) -> Result<(), StoreError> {
        match self.course.lock().cancelled {
            true => Ok(()),
            false => self.flush(),
        }
    }

    /// Flushes everything to disk; for an idle moment and a clean end.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.unfold()?;
        self.reach(Step::Flushing)?;
        let flushing = self.unflushed.lock().begin_flush();
        let result = self.with(|db| {
            let families: Result<Vec<&ColumnFamily>, StoreError> = TARGETS
                .into_iter()
                .map(|target| family(db, target))
                .collect();
            Ok(db.flush_cfs_opt(&families?, &rocksdb::FlushOptions::default())?)
        });
        self.unflushed.lock().end_flush(flushing, result.is_ok());
        self.poison_on_error(result)?;
        self.reach(Step::Flushed)
    }
}
