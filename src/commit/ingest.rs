//! A frozen table becomes content and a new root.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam::channel;

use super::content::Source;
use crate::chunk::INLINE_MAX;
use crate::fork::error::FsError;
use crate::fork::extent::{PAGE, pages};
use crate::fork::table::{Cell, Ingested as Hint, Inode, Table};
use crate::fork::{Fork, Sealed, excluded_inodes, view};
use crate::record::{self, Ino, Kind, Value};
use crate::store::{Ingest, Store, StoreError, Totals};
use crate::sys;
use crate::tree::{self, Edit, Node, NodeId};

/// Inodes that a thread takes at a time.
const BATCH: usize = 64;
/// A file is ingested ahead of its commit when it has not been written for this long, in seconds.
const QUIET: u32 = 1;
/// A file that grows is when it has grown by this many bytes, and nothing else of it has changed.
const GROWN: u64 = 32 << 20;
/// Where a fork writes more than this between two looks, its cores and its disk have enough to do.
const FAST: u64 = 64 << 20;

type Edits = Vec<(Vec<u8>, Edit)>;

/// Ingests everything of a sealed table; returns the new root and what changes in the version's numbers.
pub fn run(
    fork: &Arc<Fork>,
    sealed: &Sealed,
    ingest: &Arc<Ingest>,
    threads: usize,
) -> Result<(NodeId, Totals), FsError> {
    let table = &*sealed.table;
    let mut cells: Vec<&Arc<Cell>> = table.inodes.values().collect();
    cells.sort_by_key(|cell| cell.ino);
    // Where there are many files the threads have those, and a long one has a few of its own.
    let (threads, each) = if cells.len() > BATCH {
        (threads.max(1), threads.min(2))
    } else {
        (1, threads)
    };
    let source = Source {
        fork,
        root: sealed.root.id,
        ingest,
        threads: each,
        wanted: None,
    };
    let next = AtomicUsize::new(0);
    let work = || -> Result<(Edits, Totals), FsError> {
        let (mut edits, mut totals) = (Edits::new(), Totals::default());
        loop {
            let from = next.fetch_add(BATCH, Ordering::Relaxed);
            let Some(batch) = cells
                .get(from..(from + BATCH).min(cells.len()))
                .filter(|b| !b.is_empty())
            else {
                return Ok((edits, totals));
            };
            for cell in batch {
                inode_edits(&source, cell, &mut edits, &mut totals)?;
            }
        }
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let beside = || {
            sys::step_back();
            work()
        };
        if threads < 2 {
            return vec![work()];
        }
        // Not one of them at full priority: whoever asks something of a fork comes first.
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(beside)).collect();
        let joined = all.into_iter().map(|thread| thread.join());
        joined
            .map(|result| result.expect("a panic ends the process"))
            .collect()
    });
    let mut all: Edits = Vec::new();
    let mut totals = Totals::default();
    for result in results {
        let (edits, part) = result?;
        all.extend(edits);
        totals.add(part);
    }
    name_edits(&source, table, &mut all, &mut totals)?;
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let root = apply(&fork.store, sealed.root.id, all, ingest, threads)?;
    Ok((root, totals))
}

/// The attributes and content of one inode.
fn inode_edits(
    source: &Source<'_>,
    cell: &Cell,
    edits: &mut Edits,
    totals: &mut Totals,
) -> Result<(), FsError> {
    let inode = cell.state.read();
    if inode.orphan {
        return Ok(());
    }
    let ino = cell.ino;
    let store = &source.fork.store;
    let before = if inode.created && inode.base.is_none() {
        None
    } else {
        view::base_attr(store, source.root, ino)?
    };
    let (mut size, mut blocks) = (inode.attr.size as i64, inode.attr.blocks as i64);
    match &before {
        Some(before) => {
            size -= before.size as i64;
            blocks -= before.blocks as i64;
        }
        None => totals.files += 1,
    }
    totals.logical_bytes += size;
    totals.blocks += blocks;
    totals.has_links |= inode.attr.kind != Kind::Directory && inode.attr.nlink > 1;
    edits.push((record::attr_key(ino), Edit::Put(inode.attr.encode())));
    let base_size = before.as_ref().map_or(0, |before| before.size);
    let content = &inode.content;
    let same = inode.base.is_none()
        && content.extents.is_empty()
        && inode.attr.size == base_size
        && content.base_pages == pages(base_size);
    if !inode.attr.kind.has_content() || (before.is_some() && same) {
        return Ok(());
    }
    let whole = inode.whole_ingested();
    let values = match whole.and_then(|whole| whole.values.clone()) {
        Some(values) => {
            let new = content.extents.iter().map(|extent| extent.pages * PAGE);
            source
                .fork
                .note_ingested(new.sum::<u64>().min(inode.attr.size));
            values
        }
        None => {
            let mut values = Vec::new();
            let begun = inode.begun_ingested();
            source.values(ino, &inode, base_size, begun, &mut values)?;
            values
        }
    };
    let mut old: BTreeMap<u64, Value> = BTreeMap::new();
    if before.is_some() {
        old.extend(view::base_content(store, source.root, ino, 0, base_size)?);
    }
    for (offset, value) in values {
        if old.remove(&offset).as_ref() != Some(&value) {
            edits.push((record::content_key(ino, offset), Edit::Put(value.encode())));
        }
    }
    edits.extend(
        old.into_keys()
            .map(|offset| (record::content_key(ino, offset), Edit::Delete)),
    );
    Ok(())
}

/// Entries, back references, extended attributes, and inodes that are gone.
fn name_edits(
    source: &Source<'_>,
    table: &Table,
    edits: &mut Edits,
    totals: &mut Totals,
) -> Result<(), FsError> {
    let store = &source.fork.store;
    let mut backrefs: BTreeMap<Vec<u8>, Edit> = BTreeMap::new();
    for (ino, parent, name) in &table.unlinked {
        if !table.removed.contains(ino) {
            backrefs.insert(record::backref_key(*ino, *parent, name), Edit::Delete);
        }
    }
    for ((dir, hash, name), child) in &table.entries {
        let edit = match child {
            Some((ino, kind)) => {
                if *kind != Kind::Directory {
                    backrefs.insert(record::backref_key(*ino, *dir, name), Edit::Put(Vec::new()));
                }
                Edit::Put(record::encode_entry(*ino, *kind))
            }
            None => Edit::Delete,
        };
        edits.push((record::entry_key(*dir, *hash, name), edit));
    }
    edits.extend(backrefs);
    for ((ino, name), value) in &table.xattrs {
        let orphan = table
            .inodes
            .get(ino)
            .is_some_and(|cell| cell.state.read().orphan);
        if orphan || table.removed.contains(ino) {
            continue;
        }
        let edit = match value {
            Some(value) if value.len() <= INLINE_MAX => {
                Edit::Put(Value::Inline(value.to_vec()).encode())
            }
            Some(value) => {
                let id = source.ingest.chunk(value)?;
                Edit::Put(
                    Value::Chunk {
                        len: value.len() as u64,
                        id,
                    }
                    .encode(),
                )
            }
            None => Edit::Delete,
        };
        totals.has_acl |= value.is_some() && name.starts_with(b"system.posix_acl_");
        edits.push((record::xattr_key(*ino, name), edit));
    }
    for ino in &table.removed {
        let Some(before) = view::base_attr(store, source.root, *ino)? else {
            continue;
        };
        totals.files -= 1;
        totals.logical_bytes -= before.size as i64;
        totals.blocks -= before.blocks as i64;
        edits.push((record::inode_prefix(*ino), Edit::DeletePrefix));
        edits.push((record::content_prefix(*ino), Edit::DeletePrefix));
    }
    Ok(())
}

/// Applies edits to the tree; other threads, if there may be some, compress and store the new nodes meanwhile.
fn apply(
    store: &Arc<Store>,
    root: NodeId,
    edits: Edits,
    ingest: &Arc<Ingest>,
    threads: usize,
) -> Result<NodeId, FsError> {
    if threads < 2 {
        let mut stored = Ok(());
        let root = tree::apply(&**store, root, edits, &mut |id, bytes, node| {
            if stored.is_ok() {
                stored = ingest.node(id, &bytes, node);
            }
        })?;
        stored?;
        return Ok(root);
    }
    let (to, from) = channel::bounded::<(NodeId, Vec<u8>, Arc<Node>)>(256);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let from = from.clone();
                scope.spawn(move || -> Result<(), StoreError> {
                    let mut result = Ok(());
                    // Read to the end even after an error, so that the other side is never blocked.
                    for (id, bytes, node) in from {
                        if result.is_ok() {
                            result = ingest.node(id, &bytes, node);
                        }
                    }
                    result
                })
            })
            .collect();
        drop(from);
        let root = tree::apply(&**store, root, edits, &mut |id, bytes, node| {
            to.send((id, bytes, node))
                .expect("the workers read until this side is dropped");
        });
        drop(to);
        for worker in workers {
            worker.join().expect("a panic ends the process")?;
        }
        Ok(root?)
    })
}

/// Ingests files that have not been written for a while, so that little is left for the commit. The results are hints: a commit
/// takes them only if the file has not changed since. Returns how many files it looked into. Gives up as soon as `wanted` is not 0.
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
                    && (inode.written + QUIET < age || (!is_fast && has_grown(&inode)))
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
    let source = Source {
        fork,
        root: root.id,
        ingest,
        threads: 1,
        wanted: Some(wanted),
    };
    for cell in &cells {
        if give_up() {
            break;
        }
        if excluded.contains(&cell.ino) {
            let mut inode = cell.state.write();
            let whole = Some(inode.content.sequence);
            inode.ingested = Some(Arc::new(Hint {
                whole,
                values: None,
            }));
            continue;
        }
        let (copy, begun) = {
            let mut inode = cell.state.write();
            let begun = inode.begun_ingested().map(|(_, unchanged)| unchanged);
            let begun = inode.ingested.take().zip(begun);
            inode.content.mark();
            // Held by these references while it is read without the lock.
            fork.spool.retain(inode.content.extents.iter());
            (inode.clone(), begun)
        };
        let mut values = Vec::new();
        let begun = begun.as_ref().map(|(begun, to)| (&**begun, *to));
        let done = ahead_of(&source, cell.ino, &copy, begun, &mut values);
        fork.spool.release(copy.content.extents.iter());
        let interrupted = match done {
            Err(FsError::Io(e)) if e.kind() == io::ErrorKind::Interrupted => true,
            done => done.map(|()| false)?,
        };
        let hint = Hint {
            whole: (!interrupted).then_some(copy.content.sequence),
            values: Some(values),
        };
        cell.state.write().ingested = Some(Arc::new(hint));
    }
    Ok(cells.len())
}

/// The content of one file, or of its beginning where that is given up.
fn ahead_of(
    source: &Source<'_>,
    ino: Ino,
    copy: &Inode,
    begun: Option<(&Hint, u64)>,
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
