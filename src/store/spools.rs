//! Kept spools: what a fork wrote in bulk, and compression makes no smaller, stays in the file that it was written to.
//!
//! A commit gives the spool of its fork a second name, brings it to the disk, and names the places of chunks in it in the batch
//! that publishes them. Nothing is written to it afterwards. What no chunk names is punched out behind the commit, and by each gc;
//! a spool of which no chunk names anything any more goes.

use std::collections::HashMap;
#[cfg(test)]
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rocksdb::WriteBatch;

use super::{ForkId, Step, Store, StoreError, Target, keys};
use crate::chunk::{ChunkId, Place};
use crate::sys;

/// So many are kept open.
const OPEN: usize = 32;
/// Room is given back to the disk in blocks of this size, in bytes.
const BLOCK: u64 = 4096;

/// Parts of a spool: offset, bytes.
pub type Parts = Vec<(u64, u64)>;

#[derive(Default)]
pub(super) struct Spools {
    open: Mutex<HashMap<u64, Arc<File>>>,
    /// Those that may be read as their fork's; when that is published, what chunks name of them, if it is known to be all.
    busy: Mutex<HashMap<u64, Option<Parts>>>,
}

impl Store {
    /// Gives the spool of a fork a second name, under which it stays when the fork is over.
    ///
    /// # Errors
    /// What the disk answered, also where there are no second names; nothing has changed then.
    pub fn keep_spool(&self, id: ForkId, spool: &Path) -> Result<(), StoreError> {
        // What is in doubt comes to light first.
        self.heal()?;
        let is_known = self.meta(&keys::one(keys::SPOOL, id.0))?.is_some();
        let kept = self.kept_spool(id.0);
        let link = || {
            let inode = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
            match inode(&kept) {
                // A commit of this fork was cut off, or has failed.
                Ok(same) if same == inode(spool)? => {}
                Ok(_) if is_known => return Err(ErrorKind::AlreadyExists.into()),
                Ok(_) => {
                    fs::remove_file(&kept)?;
                    fs::hard_link(spool, &kept)?;
                }
                Err(_) => fs::hard_link(spool, &kept)?,
            }
            sync_dir(&self.spools_dir())?;
            sync_dir(&self.dir)
        };
        link().map_err(|source| StoreError::Io {
            what: kept.display().to_string(),
            source,
        })?;
        self.spools.busy.lock().entry(id.0).or_default();
        self.reach(Step::SpoolKept)
    }

    /// Takes the second name of a spool back: no batch that names anything of it was ever tried.
    pub fn unkeep_spool(&self, id: ForkId) -> io::Result<()> {
        self.spools.busy.lock().remove(&id.0);
        fs::remove_file(self.kept_spool(id.0))
    }

    /// Fills `bytes` with what lies in a kept spool from a place on.
    pub(super) fn read_kept(
        &self,
        id: ChunkId,
        place: Place,
        bytes: &mut [u8],
    ) -> Result<(), StoreError> {
        let kept = || self.kept_spool(place.spool).display().to_string();
        let file = match self.open_spool(place.spool) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let what = format!("{}, where chunk {id} lies,", kept());
                return Err(StoreError::Missing { what });
            }
            Err(source) => {
                let what = kept();
                return Err(StoreError::Io { what, source });
            }
        };
        match sys::read_full_at(&file, bytes, place.offset) {
            Ok(done) if done == bytes.len() => Ok(()),
            Ok(_) => Err(StoreError::Corrupt {
                what: format!("{}, where chunk {id} lies,", kept()),
            }),
            Err(source) => Err(StoreError::Io {
                what: kept(),
                source,
            }),
        }
    }

    fn open_spool(&self, id: u64) -> io::Result<Arc<File>> {
        let mut open = self.spools.open.lock();
        if let Some(file) = open.get(&id) {
            return Ok(file.clone());
        }
        let file = Arc::new(File::open(self.kept_spool(id))?);
        if open.len() >= OPEN {
            open.clear();
        }
        open.insert(id, file.clone());
        Ok(file)
    }

    /// Notes what chunks name of a spool, now that it is published, if that is known to be all.
    pub(super) fn note_parts(&self, id: u64, parts: Option<Parts>) {
        self.spools.busy.lock().insert(id, parts);
    }

    /// Says that a spool is not read as its fork's any more; returns what is to be given back of it, beside the name that the fork
    /// had for it.
    ///
    /// # Errors
    /// What the database answered; a gc gives the same back.
    pub fn end_spool(&self, id: ForkId) -> Result<Rest, StoreError> {
        let kept = self.kept_spool(id.0);
        let parts = self.spools.busy.lock().remove(&id.0).flatten();
        if kept.exists() && !self.is_named(id.0)? {
            return Ok(Rest::All(kept));
        }
        Ok(parts.map_or(Rest::Nothing, |parts| Rest::Between(kept, parts)))
    }

    /// The spools that the database knows of, and no fork is read from: no chunk ever comes to lie in one of these.
    pub(super) fn known_spools(&self) -> Result<Vec<u64>, StoreError> {
        let records = self.entries(Target::Meta, &[keys::SPOOL])?;
        let damaged = || super::corrupt("the record of a spool");
        let mut known = Vec::new();
        for (key, _) in records {
            let id = keys::number(&key).ok_or_else(damaged)?;
            if !self.is_busy(id)? {
                known.push(id);
            }
        }
        Ok(known)
    }

    /// Gives back what no chunk names of these spools any more: `parts` is all that chunks name, and what is not among it is known
    /// on the disk to be gone. What cannot be given back is left for the next gc.
    pub(super) fn trim_spools(
        &self,
        known: &[u64],
        mut parts: HashMap<u64, Parts>,
    ) -> Result<(), StoreError> {
        for id in known {
            self.go_on()?;
            if self.is_busy(*id)? {
                continue;
            }
            let kept = self.kept_spool(*id);
            if let Some(parts) = parts.remove(id) {
                give_back(Rest::Between(kept, parts));
                continue;
            }
            self.spools.open.lock().remove(id);
            if give_back(Rest::All(kept)) {
                self.reach(Step::SpoolRemoved)?;
                let mut batch = WriteBatch::default();
                self.delete(&mut batch, Target::Meta, &keys::one(keys::SPOOL, *id))?;
                self.write_unsynced(batch)?;
            }
        }
        for (name, _) in super::files_of(&self.spools_dir()) {
            let id = name.to_str().and_then(|name| name.parse().ok());
            if let Some(ForkId(id)) = id
                && !self.is_busy(id)?
                && !self.is_named(id)?
            {
                give_back(Rest::All(self.kept_spool(id)));
            }
        }
        Ok(())
    }

    /// Whether a spool may be read as its fork's.
    fn is_busy(&self, id: u64) -> Result<bool, StoreError> {
        // A fork may live on though its commit has come to light.
        let is_live = self.meta(&keys::one(keys::FORK, id))?.is_some();
        Ok(is_live || self.spools.busy.lock().contains_key(&id))
    }

    /// Whether a fork or chunks have a spool; if not, its commit was cut off.
    fn is_named(&self, id: u64) -> Result<bool, StoreError> {
        // In this order: a publish puts the one in the place of the other.
        let is_live = self.meta(&keys::one(keys::FORK, id))?.is_some();
        Ok(is_live || self.meta(&keys::one(keys::SPOOL, id))?.is_some())
    }

    /// Spools that no fork and no chunk has.
    #[cfg(test)]
    pub fn stray_spools(&self) -> Vec<OsString> {
        let files = super::files_of(&self.spools_dir());
        let names = files.into_iter().map(|(name, _)| name);
        let is_stray = |name: &OsString| {
            let id = name.to_str().and_then(|name| name.parse().ok());
            id.is_none_or(|ForkId(id)| !self.is_named(id).unwrap())
        };
        names.filter(is_stray).collect()
    }

    /// Nothing of any spool that somebody has is given back, and none is published, as long as this is held.
    #[cfg(test)]
    pub fn hold_spools(&self) -> impl Drop + '_ {
        self.spools.busy.lock()
    }

    fn spools_dir(&self) -> PathBuf {
        self.dir.join("spools")
    }

    fn kept_spool(&self, id: u64) -> PathBuf {
        self.spools_dir().join(ForkId(id).to_string())
    }
}

fn give_back(rest: Rest) -> bool {
    let done = rest.give_back();
    if let Err(error) = &done {
        log::warn!("gc: a kept spool takes more of the disk than it need: {error}");
    }
    done.is_ok()
}

/// What is to be given back of a spool.
pub enum Rest {
    Nothing,
    /// What lies between these parts of it, before them and behind them.
    Between(PathBuf, Parts),
    All(PathBuf),
}

impl Rest {
    /// Gives it back to the disk.
    pub fn give_back(self) -> io::Result<()> {
        // If it is damage that it is gone, whoever reads it meets it.
        sys::unless_gone(match self {
            Rest::Nothing => Ok(()),
            Rest::Between(kept, parts) => punch_between(&kept, parts),
            Rest::All(kept) => sys::remove_slowly(&kept),
        })
    }
}

fn punch_between(kept: &Path, mut parts: Parts) -> io::Result<()> {
    let file = File::options().write(true).open(kept)?;
    parts.sort_unstable();
    parts.push((file.metadata()?.len().next_multiple_of(BLOCK), 0));
    let mut end = 0_u64;
    for (offset, len) in parts {
        let (from, to) = (end.next_multiple_of(BLOCK), offset / BLOCK * BLOCK);
        if from < to {
            sys::punch_hole(&file, from, to - from)?;
        }
        end = end.max(offset + len);
    }
    Ok(())
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
