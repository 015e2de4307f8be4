//! A frozen table becomes content and a new root.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam::channel;

use super::content::{Dense, Source};
use super::in_threads;
use crate::chunk::INLINE_MAX;
use crate::fork::error::FsError;
use crate::fork::extent::{PAGE, pages};
use crate::fork::table::{Cell, Table};
use crate::fork::{Fork, Sealed, view};
use crate::record::{self, Kind, Value};
use crate::store::{Ingest, Store, StoreError, Totals};
use crate::tree::{self, Edit, Node, NodeId};

/// Inodes that a thread takes at a time.
const BATCH: usize = 64;

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
        dense: Dense::Note,
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
                if let Err(error) = inode_edits(&source, cell, &mut edits, &mut totals) {
                    // What the others would do is for nothing.
                    next.store(cells.len(), Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    };
    let mut all: Edits = Vec::new();
    let mut totals = Totals::default();
    for result in in_threads(threads, work) {
        let (edits, part) = result?;
        all.extend(edits);
        totals.add(part);
    }
    name_edits(&source, table, &mut all, &mut totals)?;
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let root = apply(&fork.store, sealed.root.id, all, ingest, threads)?;
    Ok((root, totals))
}

/// Lets what was only noted of a sealed fork's spool stay there, if that is much and most of the spool, or stores it. `ends`: the
/// fork does not go on.
pub fn keep_or_store(
    fork: &Arc<Fork>,
    ingest: &Ingest,
    ends: bool,
    threads: usize,
) -> Result<(), FsError> {
    let bytes = ingest.lying_bytes();
    if ends && fork.is_bulk(bytes) {
        match fork.keep_spool() {
            Ok(is_first) => {
                ingest.keep(is_first);
                return Ok(());
            }
            Err(error) => log::warn!("{}: content is copied from its spool: {error}", fork.id),
        }
    }
    let lying = ingest.take_lying();
    if lying.is_empty() {
        return Ok(());
    }
    let next = AtomicUsize::new(0);
    let work = || -> Result<(), FsError> {
        while let Some((id, place)) = lying.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut bytes = vec![0; place.len as usize];
            fork.spool.read(&mut bytes, place.offset)?;
            ingest.store(*id, &bytes)?;
        }
        Ok(())
    };
    in_threads(threads, work).into_iter().collect()
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
            for (at, value) in &values {
                source.again(ino, &inode, *at, value)?;
            }
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
