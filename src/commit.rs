//! Promotion of a delta: seal, ingest, publish, detach.
//!
//! A seal freezes the table of a fork; ingest turns the frozen table into content and a new root, in parallel; publish makes
//! the roots of all forks of one commit the heads of their volumes in one synced batch. Before it the heads are the old ones,
//! after it the new ones.

mod ahead;
mod content;
mod cut;
mod ingest;

use std::sync::Arc;

use crate::fork::INODE_CHARGE;
use crate::fork::error::FsError;
use crate::fork::extent::{PAGE, pages};
use crate::fork::{Fork, Sealed};
use crate::record::Value;
use crate::record::{Attr, Key, Kind};
use crate::store::{Ingest, Step, StoreError, Totals};
use crate::tree::{self, NodeId};

pub use ahead::ahead;

/// A delta turned into a root, its content in the store's hands and not yet named by any version.
pub struct Ingested {
    pub fork: Arc<Fork>,
    pub sealed: Sealed,
    pub root: NodeId,
    pub ingest: Arc<Ingest>,
    /// What the table adds to the numbers of the root below it.
    pub change: Totals,
}

impl Ingested {
    /// Lets the fork go on as before, for it was not published, as far as anybody knows.
    pub fn thaw(&self) {
        match self.ingest.kept() {
            Some((places, true)) => self.fork.spool.pin(places),
            Some((_, false)) => self.fork.unkeep_spool(),
            None => {}
        }
        self.fork.thaw();
    }
}

/// How two roots differ, for whoever asks whether there is anything to commit.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Changed {
    No,
    /// Nothing but times.
    Times,
    Yes,
}

/// Seals a fork and ingests what it changed.
///
/// # Errors
/// What the disk or the store answered; the fork goes on as before.
pub fn prepare(fork: &Arc<Fork>, keep: bool, threads: usize) -> Result<Ingested, FsError> {
    fork.begin_ingest();
    let sealed = fork.seal(keep)?;
    let ingest = Arc::new(fork.store.ingest());
    let ingested = fork.store.reach(Step::Sealed).map_err(FsError::from);
    let ingested = ingested.and_then(|()| {
        let done = std::thread::scope(|scope| {
            if !keep && fork.is_bulk(fork.hashed()) {
                // What stays there goes to the disk while the rest is looked at. What fails now fails again when it must be there.
                scope.spawn(|| fork.spool.write_back());
            }
            ingest::run(fork, &sealed, &ingest, threads)
        })?;
        ingest::keep_or_store(fork, &ingest, !keep, threads)?;
        fork.store.reach(Step::Ingested)?;
        Ok(done)
    });
    match ingested {
        Ok((root, change)) => Ok(Ingested {
            fork: fork.clone(),
            sealed,
            root,
            ingest,
            change,
        }),
        Err(error) => {
            fork.thaw();
            // Whatever it ran into then is no damage.
            match ingest.is_lost() {
                true => Err(StoreError::Lost.into()),
                false => Err(error),
            }
        }
    }
}

/// Compares two roots, looking no further than the first real difference. Times of a directory whose entries are the same
/// never count.
///
/// # Errors
/// What the store answered.
pub fn changed(ingest: &Ingest, old: NodeId, new: NodeId) -> Result<Changed, FsError> {
    let mut most = Changed::No;
    for difference in tree::diff(ingest, old, new) {
        let difference = difference?;
        let (Some(Key::Attr(_)), Some(a), Some(b)) =
            (Key::parse(&difference.key), difference.old, difference.new)
        else {
            return Ok(Changed::Yes);
        };
        let (Some(a), Some(b)) = (Attr::decode(&a), Attr::decode(&b)) else {
            return Ok(Changed::Yes);
        };
        let with_times = Attr {
            atime: b.atime,
            mtime: b.mtime,
            ctime: b.ctime,
            ..a.clone()
        };
        if with_times != b {
            return Ok(Changed::Yes);
        }
        if a.kind != Kind::Directory {
            most = Changed::Times;
        }
    }
    Ok(most)
}

/// What a fork is charged for a private root, in bytes: the data and the inodes that its version does not have.
///
/// # Errors
/// What the store answered.
pub fn charge(ingest: &Ingest, version: NodeId, private: NodeId) -> Result<u64, FsError> {
    let mut bytes = 0;
    for difference in tree::diff(ingest, version, private) {
        let difference = difference?;
        match (Key::parse(&difference.key), difference.new) {
            (Some(Key::Attr(_)), Some(_)) if difference.old.is_none() => bytes += INODE_CHARGE,
            (Some(Key::Content { offset, .. }), Some(value)) => {
                let len = Value::decode(&value).map_or(0, |value| value.len());
                // A page that two pieces share is counted with the first.
                bytes += (pages(offset + len) - pages(offset)) * PAGE;
            }
            _ => {}
        }
    }
    Ok(bytes)
}

/// Does some work in so many threads, or here; returns what each came to.
fn in_threads<T: Send>(threads: usize, work: impl Fn() -> T + Sync) -> Vec<T> {
    if threads < 2 {
        return vec![work()];
    }
    std::thread::scope(|scope| {
        let beside = || {
            crate::sys::step_back();
            work()
        };
        // Not one of them at full priority: whoever asks something of a fork comes first.
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(beside)).collect();
        let joined = all.into_iter().map(|thread| thread.join());
        joined
            .map(|result| result.expect("a panic ends the process"))
            .collect()
    })
}
