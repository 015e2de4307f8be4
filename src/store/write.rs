//! Writing to the database: the only way to it, so that a failed write poisons the store and a test can count the steps.

use std::sync::atomic::Ordering;

use rocksdb::{ColumnFamily, WriteBatch, WriteOptions};

use super::{Step, Store, StoreError, Target, family, free_space, open_db};

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
        self.poison_on_error(result)?;
        self.reach(Step::Written)
    }

    pub(super) fn poison_on_error<T>(
        &self,
        result: Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        if matches!(result, Err(StoreError::NoSpace | StoreError::Database(_))) {
            *self.poisoned.lock() = true;
        }
        result
    }

    /// Opens the database again after a failed write, if there is room to write again.
    pub(super) fn heal(&self) -> Result<(), StoreError> {
        let mut poisoned = self.poisoned.lock();
        if !*poisoned {
            return Ok(());
        }
        let free = free_space(&self.dir);
        if free < (80 << 20) {
            return Err(StoreError::NoSpace);
        }
        let mut db = self.db.write();
        drop(db.take());
        #[cfg(test)]
        self.take_what_was_left();
        *db = Some(open_db(&self.dir)?);
        drop(db);
        // What was written without the WAL and not flushed is gone.
        self.reopened.fetch_add(1, Ordering::AcqRel);
        self.unflushed.lock().clear();
        *poisoned = false;
        log::warn!(
            "{}: opened the database again after a failed write",
            self.dir.display()
        );
        Ok(())
    }

    /// Flushes everything to disk; for an idle moment and a clean end.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.reach(Step::Flushing)?;
        let flushing = self.unflushed.lock().begin_flush();
        let result = self.with(|db| {
            let families = [Target::Meta, Target::Nodes, Target::Chunks, Target::Sizes];
            let families: Result<Vec<&ColumnFamily>, StoreError> = families
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
