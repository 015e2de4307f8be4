//! Garbage: mark what the roots reach, sweep the rest, and give the disk its room back. And the numbers of the store.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::Metadata;
use std::sync::atomic::Ordering;

use rocksdb::{ColumnFamily, DB, IteratorMode, ReadOptions, properties};
use serde::Serialize;

use super::settle::{is_settled, place};
use super::spools::Parts;
use super::write::LEAST_ROOM;
use super::{
    NodeId, Prefixes, Step, Store, StoreError, Target, Version, family, files_of, free_space, keys,
    prefix_of, stored_len,
};
use crate::chunk::ChunkId;
use crate::record;
use crate::tree;

/// What a gc did, or would do.
#[derive(Clone, Debug, Default, Serialize)]
pub struct GcReport {
    pub dry_run: bool,
    pub kept_nodes: u64,
    pub kept_chunks: u64,
    pub removed_nodes: u64,
    pub removed_chunks: u64,
    /// Stored bytes of the removed chunks.
    pub removed_bytes: u64,
    /// What the folder of the store shrank by on disk.
    pub freed_bytes: u64,
}

/// What the store holds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stats {
    pub volumes: Vec<VolumeStats>,
    pub versions: u64,
    /// What all versions show together.
    pub logical_bytes: u64,
    /// Raw bytes of the chunks, each once.
    pub unique_bytes: u64,
    /// The same as stored.
    pub stored_bytes: u64,
    pub chunks: u64,
    /// Chunks that were compressed a second time, after a day, and the bytes that this saved since the store was made.
    pub settled_chunks: u64,
    pub saved_bytes: u64,
    /// What the database takes on disk.
    pub disk_bytes: u64,
}

/// What one volume holds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct VolumeStats {
    pub volume: String,
    pub versions: u64,
    pub logical_bytes: u64,
    /// Stored bytes of chunks that no other volume has.
    pub exclusive_bytes: u64,
}

/// How many of the first of these files fit into some room.
fn fitting(files: &[(u64, u64)], room: u64) -> usize {
    let mut taken = 0_u64;
    let fits = |(_, len): &&(u64, u64)| {
        taken += len;
        taken <= room
    };
    files.iter().take_while(fits).count()
}

/// How many deletions the description of some tables counts.
fn deletions(tables: &str) -> u64 {
    let fields = tables.split(';').filter_map(|field| field.split_once('='));
    let mut counts = fields.filter(|(name, _)| name.trim() == "# deletions");
    counts
        .next()
        .and_then(|(_, count)| count.trim().parse().ok())
        .unwrap_or(0)
}

/// What the tables of a family take.
fn table_bytes(db: &DB, family: &ColumnFamily) -> Result<u64, StoreError> {
    let bytes = db.property_int_value_cf(family, properties::TOTAL_SST_FILES_SIZE)?;
    Ok(bytes.unwrap_or(0))
}

/// An id and what the index says of it.
type Indexed = ([u8; 32], Vec<u8>);

impl Store {
    /// Removes everything that no version, fork or lease reaches. `roots` says those that only the caller knows of, and keeps versions
    /// from being removed while what it returned beside them lives: what goes from a version to a fork, and from there to another
    /// version, is seen in one of them.
    ///
    /// # Errors
    /// `Locked` if one runs already; `Ending` if the process is to end; damage met while marking, before anything was removed.
    pub fn gc<G>(
        &self,
        dry_run: bool,
        roots: impl FnOnce() -> (Vec<NodeId>, G),
    ) -> Result<GcReport, StoreError> {
        if !self.hands.begin_gc() {
            return Err(StoreError::Locked {
                dir: self.dir.join("db (a gc is running)"),
            });
        }
        let result = self.mark_and_sweep(dry_run, roots);
        self.hands.end_gc();
        result
    }

    fn mark_and_sweep<G>(
        &self,
        dry_run: bool,
        roots: impl FnOnce() -> (Vec<NodeId>, G),
    ) -> Result<GcReport, StoreError> {
        if !dry_run {
            // Before anything is marked: what a write that failed has done comes to light here.
            self.heal()?;
        }
        // Those that are published from now on may have parts that the sweep does not come across.
        let spools = self.known_spools()?;
        let (mut all, versions_stay) = roots();
        all.extend(self.leases.lock().keys());
        all.push(tree::empty().0);
        self.reach(Step::Marking)?;
        let versions: Vec<Version> = self.records(&[keys::VERSION])?;
        drop(versions_stay);
        let (mut whole, mut damaged) = (Vec::new(), HashSet::new());
        for version in versions {
            match self.damage(version.at())? {
                Some(_) => drop(damaged.insert(version.root)),
                None => whole.push(version.root),
            }
        }
        let (nodes, chunks) = self.mark_all(&all, &whole, damaged)?;
        self.reach(Step::Marked)?;
        let before = self.disk_bytes();
        let mut report = GcReport {
            dry_run,
            ..GcReport::default()
        };
        let mut parts = HashMap::new();
        let reopened = self.reopened.load(Ordering::Acquire);
        for (target, marked) in [(Target::Nodes, &nodes), (Target::Sizes, &chunks)] {
            self.sweep(target, marked, &mut report, &mut parts)?;
            self.reach(Step::Swept)?;
        }
        if !dry_run {
            if !spools.is_empty() {
                // What was deleted stays deleted: nobody finds it again and relies on it.
                self.flush()?;
            }
            // What the sweep came across may have gone with a database that was opened again.
            if reopened == self.reopened.load(Ordering::Acquire) {
                self.trim_spools(&spools, parts)?;
            }
            // An earlier one may have been cut off before it gave anything back.
            let removed = report.removed_nodes + report.removed_chunks > 0;
            if removed || self.has_deletions()? || self.has_much_replaced() {
                self.compact()?;
            }
            report.freed_bytes = before.saturating_sub(self.disk_bytes());
        }
        Ok(report)
    }

    fn mark(
        &self,
        root: NodeId,
        nodes: &mut Prefixes,
        chunks: &mut Prefixes,
    ) -> Result<(), StoreError> {
        tree::walk(
            self,
            root,
            &mut |id| nodes.insert(prefix_of(&id.0)),
            &mut |node| {
                self.go_on()?;
                if node.level() == 0 {
                    for at in 0..node.len() {
                        let named = record::chunk_refs(node.key(at), node.value(at))?;
                        chunks.extend(named.map(|id| prefix_of(&id.0)));
                    }
                }
                Ok(())
            },
        )
    }

    /// Marks everything below the roots of forks and leases, of versions, and of versions that were set aside.
    fn mark_all(
        &self,
        held: &[NodeId],
        whole: &[NodeId],
        mut damaged: HashSet<NodeId>,
    ) -> Result<(Prefixes, Prefixes), StoreError> {
        'all: loop {
            let (mut nodes, mut chunks) = (Prefixes::new(), Prefixes::new());
            for root in held {
                if damaged.contains(root) {
                    continue;
                }
                match self.mark(*root, &mut nodes, &mut chunks) {
                    // It keeps what it has, and nobody else from room. Below what was marked of it something was not.
                    Err(error @ (StoreError::Missing { .. } | StoreError::Corrupt { .. })) => {
                        log::warn!("what a fork or a reader has is damaged: {error}");
                        damaged.insert(*root);
                        continue 'all;
                    }
                    result => result?,
                }
            }
            for root in whole {
                self.mark(*root, &mut nodes, &mut chunks)?;
            }
            // What a version that was set aside still has is kept. These come last: below a node that is marked all others take
            // everything for marked, and here something may be missing.
            for root in &damaged {
                self.mark_readable(*root, &mut nodes, &mut chunks)?;
            }
            return Ok((nodes, chunks));
        }
    }

    /// Marks all of a damaged version that can still be read.
    fn mark_readable(
        &self,
        root: NodeId,
        nodes: &mut Prefixes,
        chunks: &mut Prefixes,
    ) -> Result<(), StoreError> {
        let mut below = vec![root];
        while let Some(id) = below.pop() {
            if !nodes.insert(prefix_of(&id.0)) {
                continue;
            }
            self.go_on()?;
            let node = match self.load_node(id) {
                Ok(node) => node,
                Err(StoreError::Missing { .. } | StoreError::Corrupt { .. }) => continue,
                Err(error) => return Err(error),
            };
            for at in 0..node.len() {
                if node.level() > 0 {
                    below.extend(node.child(at));
                } else {
                    let named = record::chunk_refs(node.key(at), node.value(at));
                    chunks.extend(named.ok().flatten().map(|id| prefix_of(&id.0)));
                }
            }
        }
        Ok(())
    }

    /// Deletes what is not marked, a batch of keys at a time, so that memory stays bounded. Notes what the rest names of kept spools.
    fn sweep(
        &self,
        target: Target,
        marked: &Prefixes,
        report: &mut GcReport,
        parts: &mut HashMap<u64, Parts>,
    ) -> Result<(), StoreError> {
        let mut from: Vec<u8> = Vec::new();
        loop {
            self.go_on()?;
            let page = self.keys(target, &from, 10_000)?;
            let Some((last, _)) = page.last() else {
                return Ok(());
            };
            from = [&last[..], &[0]].concat();
            for (id, value) in page {
                let bytes = stored_len(&value).map_or(0, |(_, stored)| stored);
                let (kept, removed, family_of) = if target == Target::Nodes {
                    (
                        &mut report.kept_nodes,
                        &mut report.removed_nodes,
                        Target::Nodes,
                    )
                } else {
                    (
                        &mut report.kept_chunks,
                        &mut report.removed_chunks,
                        Target::Chunks,
                    )
                };
                let gone = if report.dry_run {
                    !marked.contains(&prefix_of(&id))
                } else {
                    self.delete_unless_held(family_of, &id, marked)?
                };
                if gone {
                    *removed += 1;
                    if family_of == Target::Chunks {
                        report.removed_bytes += bytes;
                    }
                } else {
                    *kept += 1;
                    if let Some(place) = place(&value) {
                        let part = (place.offset, place.len);
                        parts.entry(place.spool).or_default().push(part);
                    }
                }
            }
        }
    }

    /// Up to `count` ids of a family from `from` on; values only of `sizes`.
    pub(super) fn keys(
        &self,
        target: Target,
        from: &[u8],
        count: usize,
    ) -> Result<Vec<Indexed>, StoreError> {
        self.with(|db| {
            let mut options = ReadOptions::default();
            options.fill_cache(false);
            let mode = IteratorMode::From(from, rocksdb::Direction::Forward);
            let mut out = Vec::new();
            for item in db
                .iterator_cf_opt(family(db, target)?, options, mode)
                .take(count)
            {
                let (key, value) = item?;
                let id: [u8; 32] = (*key)
                    .try_into()
                    .map_err(|_| super::corrupt("the index of the store"))?;
                out.push((
                    id,
                    if target == Target::Sizes {
                        value.into_vec()
                    } else {
                        Vec::new()
                    },
                ));
            }
            Ok(out)
        })
    }

    /// Rewrites what deletions and replacements left, so that the disk gets its room back.
    pub(super) fn compact(&self) -> Result<(), StoreError> {
        let _alone = self.compacting.lock();
        self.flush()?;
        self.course.lock().compacting = true;
        let result = self.compact_all();
        self.course.lock().compacting = false;
        // A compaction that met a full disk says so nowhere else, and the next write fails of it.
        let failed = self.with(|db| Ok(db.property_int_value(properties::BACKGROUND_ERRORS)?));
        if failed?.is_some_and(|count| count > 0) {
            *self.poisoned.lock() = true;
        }
        self.poison_on_error(result)?;
        self.nothing_is_replaced()
    }

    /// Whether deletions wait for the compaction that gives their room back.
    fn has_deletions(&self) -> Result<bool, StoreError> {
        self.with(|db| {
            for target in [Target::Nodes, Target::Sizes] {
                let family = family(db, target)?;
                let fresh =
                    db.property_int_value_cf(family, properties::NUM_DELETES_ACTIVE_MEM_TABLE)?;
                let tables =
                    db.property_value_cf(family, properties::AGGREGATED_TABLE_PROPERTIES)?;
                if fresh.unwrap_or(0) > 0 || deletions(&tables.unwrap_or_default()) > 0 {
                    return Ok(true);
                }
            }
            Ok(false)
        })
    }

    fn compact_all(&self) -> Result<(), StoreError> {
        self.with(|db| {
            self.compact_chunks(db)?;
            for target in [Target::Nodes, Target::Sizes] {
                self.go_on()?;
                let family = family(db, target)?;
                if table_bytes(db, family)? > self.room_to_compact() {
                    log::warn!("gc: no room to give back what removed records took");
                    continue;
                }
                db.compact_range_cf(family, None::<&[u8]>, None::<&[u8]>);
                self.reach(Step::Compacted)?;
            }
            Ok(())
        })
    }

    /// Rewrites what stays of chunks, all at once or in as many rounds as there is room for: each takes the oldest files.
    fn compact_chunks(&self, db: &DB) -> Result<(), StoreError> {
        let chunks = family(db, Target::Chunks)?;
        let first = self.blob_files();
        let Some((last, _)) = first.last().copied() else {
            return Ok(());
        };
        let mut fits = fitting(&first, self.room_to_compact());
        if fits < first.len() {
            // Files in which nothing is left go without being rewritten.
            fits = 0;
        }
        let mut files = first;
        loop {
            self.go_on()?;
            // Rounded down there.
            let share = match fits {
                0 => 0.0,
                n => (n as f64 + 0.5) / files.len() as f64,
            };
            let rewrite = [
                (
                    "blob_garbage_collection_age_cutoff",
                    &*share.min(1.0).to_string(),
                ),
                ("blob_garbage_collection_force_threshold", "0.1"),
            ];
            db.set_options_cf(chunks, &rewrite)?;
            db.compact_range_cf(chunks, None::<&[u8]>, None::<&[u8]>);
            self.reach(Step::Compacted)?;
            self.go_on()?;
            let oldest = files.first().copied();
            files = self.blob_files();
            let old = files
                .iter()
                .take_while(|(number, _)| *number <= last)
                .count();
            if old == 0 || (fits > 0 && files.first().copied() == oldest) {
                break;
            }
            let room = self
                .room_to_compact()
                .saturating_sub(table_bytes(db, chunks)?);
            fits = fitting(&files, room).min(old);
            if fits == 0 {
                log::warn!("gc: no room to rewrite {old} files of chunks");
                break;
            }
        }
        let usual = [
            ("blob_garbage_collection_age_cutoff", "0.0"),
            ("blob_garbage_collection_force_threshold", "1.0"),
        ];
        Ok(db.set_options_cf(chunks, &usual)?)
    }

    /// Bytes that a compaction may write without the database meeting a full disk.
    fn room_to_compact(&self) -> u64 {
        free_space(&self.dir).saturating_sub(LEAST_ROOM / 2)
    }

    /// The numbers of the files that hold chunks, oldest first, and what they take.
    fn blob_files(&self) -> Vec<(u64, u64)> {
        let file = |(name, meta): (OsString, Metadata)| {
            let number = name.to_str()?.strip_suffix(".blob")?.parse().ok()?;
            Some((number, meta.len()))
        };
        let all = files_of(&self.dir.join("db")).into_iter();
        let mut files: Vec<(u64, u64)> = all.filter_map(file).collect();
        files.sort_unstable();
        files
    }

    /// What the database takes on disk, with the room that it took ahead for its WAL, and what lies beside it.
    pub fn disk_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let files = ["db", "spools"].map(|folder| files_of(&self.dir.join(folder)));
        let files = files.iter().flatten();
        files.map(|(_, meta)| meta.blocks() * 512).sum()
    }

    /// Bytes of the files in which stored chunks lie.
    pub(super) fn blob_bytes(&self) -> u64 {
        self.blob_files().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Counts what the store holds.
    pub fn stats(&self) -> Result<Stats, StoreError> {
        let mut stats = Stats {
            disk_bytes: self.disk_bytes(),
            saved_bytes: self.rounds()?.saved,
            ..Stats::default()
        };
        // The only volume that has a chunk; None once there are two.
        let mut owner: HashMap<ChunkId, Option<usize>> = HashMap::new();
        for (index, volume) in self.volumes()?.into_iter().enumerate() {
            let mut seen = Prefixes::new();
            let versions = self.versions(volume.id)?;
            let logical = versions.iter().map(|v| v.logical_bytes).sum();
            for version in &versions {
                let walked = tree::walk(
                    self,
                    version.root,
                    &mut |id| seen.insert(prefix_of(&id.0)),
                    &mut |node| {
                        for at in (0..node.len()).filter(|_| node.level() == 0) {
                            if let Some(id) = record::chunk_refs(node.key(at), node.value(at))? {
                                let owner = owner.entry(id).or_insert(Some(index));
                                *owner = owner.filter(|o| *o == index);
                            }
                        }
                        Ok(())
                    },
                );
                // A retention or a command may have removed it meanwhile.
                if walked.is_err() && self.version(version.at())?.is_some() {
                    walked?;
                }
            }
            stats.versions += versions.len() as u64;
            stats.logical_bytes += logical;
            let (volume, versions) = (volume.name, versions.len() as u64);
            stats.volumes.push(VolumeStats {
                volume,
                versions,
                logical_bytes: logical,
                exclusive_bytes: 0,
            });
        }
        let mut from = Vec::new();
        loop {
            let page = self.keys(Target::Sizes, &from, 10_000)?;
            let Some((last, _)) = page.last() else {
                return Ok(stats);
            };
            from = [&last[..], &[0]].concat();
            for (id, value) in page {
                let (raw, stored) = stored_len(&value).unwrap_or_default();
                stats.chunks += 1;
                stats.unique_bytes += raw;
                stats.stored_bytes += stored;
                stats.settled_chunks += u64::from(is_settled(&value));
                if let Some(Some(index)) = owner.get(&ChunkId(id)) {
                    stats.volumes[*index].exclusive_bytes += stored;
                }
            }
        }
    }
}
