//! What is ingested ahead of a commit, at idle priority, so that little is left for it. The results are hints: a commit takes them
//! only if the file has not changed since.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::content::{Dense, Source};
use crate::chunk::{self, INLINE_MAX};
use crate::fork::error::FsError;
use crate::fork::extent::PAGE;
use crate::fork::table::{Cell, Ingested, Inode};
use crate::fork::{Fork, excluded_inodes, view};
use crate::record::{Ino, Kind, Value};
use crate::store::Ingest;
use crate::sys;

/// A file is ingested ahead of its commit when it has not been written for this long, in seconds.
const QUIET: u32 = 1;
/// A file that grows is when it has grown by this many bytes, and nothing else of it has changed.
const GROWN: u64 = 32 << 20;
/// Where a fork writes more than this between two looks, its cores and its disk have enough to do.
const FAST: u64 = 64 << 20;

/// Ingests files that have not been written for a while, or have grown. Returns how many it looked into. Gives up as soon as
/// `wanted` is not 0.
///
/// # Errors
/// What the disk or the store answered.
pub fn ahead(
    fork: &Arc<Fork>,
    ingest: &Ingest,
    most: usize,
    wanted: &AtomicUsize,
) -> Result<usize, FsError> {
    let age = fork.age();
    let is_fast = fork.grown() > FAST;
    let (root, cells) = sys::at_normal_priority(|| {
        let layers = fork.layers();
        let quiet = |cell: &&Arc<Cell>| {
            // A file that somebody works on right now is not quiet.
            cell.state.try_read().is_some_and(|inode| {
                inode.attr.kind == Kind::File
                    && !inode.orphan
                    && inode.attr.size > INLINE_MAX as u64
                    && !inode.content.extents.is_empty()
                    && inode.whole_ingested().is_none()
                    && (inode.written + QUIET < age || has_grown(&inode))
            })
        };
        let cells: Vec<Arc<Cell>> = match layers.frozen {
            Some(_) => Vec::new(),
            None => {
                let quiet = layers.live.inodes.values().filter(quiet);
                quiet.take(most).cloned().collect()
            }
        };
        (layers.root.clone(), cells)
    });
    if cells.is_empty() {
        return Ok(0);
    }
    let give_up = || wanted.load(Ordering::Relaxed) > 0;
    let Some(excluded) = excluded_inodes(fork, &cells, give_up)? else {
        return Ok(0);
    };
    let mut done = 0;
    for cell in &cells {
        if give_up() {
            break;
        }
        let source = Source {
            fork,
            root: root.id,
            ingest,
            threads: 1,
            wanted: Some(wanted),
            dense: match fork.is_bulk(fork.hashed() + cell.state.read().attr.size) {
                true => Dense::Hash,
                false => Dense::Store,
            },
        };
        if is_fast && !source.asks_nothing_of_the_disk(cell, age)? {
            continue;
        }
        done += 1;
        if excluded.contains(&cell.ino) {
            let mut inode = cell.state.write();
            let whole = Some(inode.content.sequence);
            inode.ingested = Some(Arc::new(Ingested {
                whole,
                values: None,
            }));
            continue;
        }
        source.look_into(cell)?;
    }
    Ok(done)
}

impl Source<'_> {
    /// Whether a file that was written a moment ago is only hashed, by a sample from its middle; true of one that is quiet.
    fn asks_nothing_of_the_disk(&self, cell: &Cell, age: u32) -> Result<bool, FsError> {
        let inode = cell.state.read();
        if inode.written + QUIET < age {
            return Ok(true);
        }
        if self.dense != Dense::Hash {
            return Ok(false);
        }
        let from = inode.attr.size / 2;
        let to = (from + chunk::AVG as u64).min(inode.attr.size);
        Ok(chunk::is_dense(&self.read(cell.ino, &inode, from, to)?))
    }

    /// Ingests what one file has now, or its beginning where that is given up, and leaves the result with it.
    fn look_into(&self, cell: &Cell) -> Result<(), FsError> {
        let (copy, begun) = {
            let mut inode = cell.state.write();
            let begun = inode.begun_ingested().map(|(_, unchanged)| unchanged);
            let begun = inode.ingested.take().zip(begun);
            inode.content.mark();
            // Held by these references while it is read without the lock.
            self.fork.spool.retain(inode.content.extents.iter());
            (inode.clone(), begun)
        };
        let mut values = Vec::new();
        let begun = begun.as_ref().map(|(begun, to)| (&**begun, *to));
        let done = ahead_of(self, cell.ino, &copy, begun, &mut values);
        self.fork.spool.release(copy.content.extents.iter());
        let interrupted = match done {
            Err(FsError::Io(e)) if e.kind() == io::ErrorKind::Interrupted => true,
            done => done.map(|()| false)?,
        };
        let hint = Ingested {
            whole: (!interrupted).then_some(copy.content.sequence),
            values: Some(values),
        };
        cell.state.write().ingested = Some(Arc::new(hint));
        Ok(())
    }
}

/// The content of one file, or of its beginning where that is given up.
fn ahead_of(
    source: &Source<'_>,
    ino: Ino,
    copy: &Inode,
    begun: Option<(&Ingested, u64)>,
    values: &mut Vec<(u64, Value)>,
) -> Result<(), FsError> {
    let before = if copy.created {
        None
    } else {
        view::base_attr(&source.fork.store, source.root, ino)?
    };
    let base_size = before.map_or(0, |before| before.size);
    source.values(ino, copy, base_size, begun, values)
}

/// Whether a large part of a new file was put behind what is ingested of it. Of one that the base has only whole results are taken.
fn has_grown(inode: &Inode) -> bool {
    if inode.is_of_base() {
        return false;
    }
    let begun = inode.begun_ingested();
    let (end, unchanged) = begun.map_or((0, 0), |(begun, unchanged)| (begun.end(), unchanged));
    // The page that it ended in is written again by what goes on behind it.
    end - unchanged < PAGE && inode.attr.size >= end + GROWN
}
