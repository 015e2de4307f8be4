//! The spool: one file a fork that holds the bytes written to it, in rooms of whole pages.
//!
//! Room belongs to the extents that name it, those of frozen tables included, and is free when the last of them goes. A reader
//! holds the lock of the inode, or a reference, for as long as it reads, so that room is never reused under it. The free list is
//! in memory alone: after a restart it is what no live extent names.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::extent::{Extent, Origin, PAGE, pages};
use crate::chunk::Place;

/// Freed room is given back to the disk in runs of at least this many pages (1 MiB).
const PUNCH_PAGES: u64 = 256;
/// Free runs that are listed to be punched.
const LISTED: usize = 1000;
/// How many free runs an allocation looks at before it takes new room.
const FREE_SCAN: usize = 32;

#[derive(Debug)]
pub struct Spool {
    file: File,
    rooms: Mutex<Rooms>,
    /// A store has it, or may have: no byte that it has is taken away.
    kept: AtomicBool,
    /// It could not be brought to the disk. The system says so only once.
    failed: AtomicBool,
}

#[derive(Debug, Default)]
struct Rooms {
    /// The first page that was never given out.
    end: u64,
    /// Free runs: first page, pages.
    free: BTreeMap<u64, u64>,
    /// Runs with more than one owner: first page, (pages, owners).
    shared: BTreeMap<u64, (u64, u32)>,
    /// Pages that some extent names.
    live: u64,
    /// Pages of reserved holes.
    reserved: u64,
    /// Free runs that still hold blocks of the disk.
    unpunched: Vec<(u64, u64)>,
    /// The free runs from this page on may do so, too: there were more of them than are listed.
    unlisted: Option<u64>,
}

impl Spool {
    /// Opens the spool at `path`, making it if it is not there.
    pub fn open(path: &Path) -> io::Result<Spool> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        // A commit that was cut off may have given it a second name.
        let kept = file.metadata()?.nlink() > 1;
        Ok(Spool {
            file,
            rooms: Mutex::default(),
            kept: AtomicBool::new(kept),
            failed: AtomicBool::new(false),
        })
    }

    /// Whether a version may have some of it.
    pub fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Acquire)
    }

    /// Brings everything to the disk, and takes nothing away any more: some of it is to stay.
    pub fn keep(&self) -> io::Result<()> {
        self.kept.store(true, Ordering::Release);
        let done = match self.failed.load(Ordering::Acquire) {
            true => Err(io::Error::other("an earlier write to the disk failed")),
            false => self.file.sync_data(),
        };
        self.failed.fetch_or(done.is_err(), Ordering::AcqRel);
        done
    }

    /// Takes that back: no version has, or ever will have, any of it.
    pub fn unkeep(&self) {
        self.kept.store(false, Ordering::Release);
    }

    /// Begins to bring to the disk what is not there yet, without waiting for it.
    pub fn write_back(&self) -> io::Result<()> {
        crate::sys::begin_writeback(&self.file)
    }

    /// Writes at byte `offset` of the spool.
    pub fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Reads at byte `offset`; what was never written reads as zeros.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let done = crate::sys::read_full_at(&self.file, buffer, offset)?;
        buffer[done..].fill(0);
        Ok(())
    }

    /// Takes `pages` pages of room in a row, owned once, and `ahead` more behind them, which nobody owns yet and nobody is
    /// charged for; returns the first page.
    pub fn allocate(&self, pages: u64, ahead: u64) -> u64 {
        let mut rooms = self.rooms.lock();
        rooms.live += pages;
        let all = pages + ahead;
        let found = rooms
            .free
            .iter()
            .take(FREE_SCAN)
            .find(|(_, len)| **len >= all);
        if let Some((&start, &len)) = found {
            rooms.free.remove(&start);
            if len > all {
                rooms.free.insert(start + all, len - all);
            }
            return start;
        }
        let start = rooms.end;
        rooms.end += all;
        start
    }

    /// Begins to own pages that were taken ahead.
    pub fn claim(&self, pages: u64) {
        self.rooms.lock().live += pages;
    }

    /// Gives back pages that were taken ahead and never owned.
    pub fn give_back(&self, at: u64, pages: u64) {
        self.rooms.lock().add_free(at, pages);
    }

    /// Adds an owner to everything these extents name.
    pub fn retain(&self, extents: impl IntoIterator<Item = Extent>) {
        let mut rooms = self.rooms.lock();
        for extent in extents {
            match extent.origin {
                Origin::Spool { at, .. } => rooms.share(at, extent.pages),
                Origin::Hole { reserved: true } => rooms.reserved += extent.pages,
                Origin::Hole { reserved: false } | Origin::Base { .. } => {}
            }
        }
    }

    /// Never lets go what lies there: a version may have it.
    pub fn pin(&self, places: impl IntoIterator<Item = Place>) {
        let mut rooms = self.rooms.lock();
        for place in places {
            let (first, end) = (place.offset / PAGE, pages(place.offset + place.len));
            rooms.share(first, end - first);
        }
    }

    /// Takes an owner from everything these extents name; what has none left is free.
    pub fn release(&self, extents: impl IntoIterator<Item = Extent>) {
        let mut rooms = self.rooms.lock();
        for extent in extents {
            match extent.origin {
                Origin::Spool { at, .. } => rooms.unshare(at, extent.pages),
                Origin::Hole { reserved: true } => rooms.reserved -= extent.pages,
                Origin::Hole { reserved: false } | Origin::Base { .. } => {}
            }
        }
    }

    /// Gives everything back to the disk, unless a store keeps some of it. No fork may name any of it any more.
    pub fn clear(&self) -> io::Result<()> {
        if self.is_kept() {
            return Ok(());
        }
        *self.rooms.lock() = Rooms::default();
        self.file.set_len(0)
    }

    /// Bytes that this fork is charged for content.
    pub fn charged(&self) -> u64 {
        let rooms = self.rooms.lock();
        (rooms.live + rooms.reserved) * PAGE
    }

    /// Takes over the room that live extents name after a restart; all other room is free, unless a version may have some of it.
    pub fn adopt(&self, extents: impl IntoIterator<Item = Extent>) -> io::Result<()> {
        let mut owners: BTreeMap<u64, i64> = BTreeMap::new();
        let mut rooms = Rooms::default();
        for extent in extents {
            match extent.origin {
                Origin::Spool { at, .. } => {
                    *owners.entry(at).or_default() += 1;
                    *owners.entry(at + extent.pages).or_default() -= 1;
                }
                Origin::Hole { reserved: true } => rooms.reserved += extent.pages,
                Origin::Hole { reserved: false } | Origin::Base { .. } => {}
            }
        }
        // What a version may have is never let go.
        let pinned = i64::from(self.is_kept());
        let (mut count, mut from) = (0_i64, 0);
        for (at, change) in owners {
            if at > from {
                match count + pinned.min(count) {
                    0 if pinned == 0 => rooms.add_free(from, at - from),
                    0 => {}
                    1 => rooms.live += at - from,
                    owners => {
                        rooms.live += at - from;
                        rooms.shared.insert(from, (at - from, owners as u32));
                    }
                }
            }
            count += change;
            from = at;
        }
        rooms.end = match self.is_kept() {
            true => from.max(pages(self.file.metadata()?.len())),
            false => from,
        };
        *self.rooms.lock() = rooms;
        Ok(())
    }

    /// Gives the disk back the blocks of long free runs. Called from the background, never by a request.
    pub fn punch(&self) -> io::Result<()> {
        while !self.is_kept() {
            let mut rooms = self.rooms.lock();
            let Some((at, pages)) = rooms.next_unpunched() else {
                return Ok(());
            };
            // Only what is free now, and taken off the free list while it is punched.
            let (at, pages) = match rooms.free.range(..=at).next_back() {
                Some((&start, &len)) if start + len > at => {
                    (start.max(at), pages.min(start + len - at))
                }
                _ => continue,
            };
            if pages < PUNCH_PAGES {
                continue;
            }
            rooms.take(at, pages);
            drop(rooms);
            let result = crate::sys::punch_hole(&self.file, at * PAGE, pages * PAGE);
            self.rooms.lock().insert_free(at, pages);
            result?;
        }
        Ok(())
    }
}

impl Rooms {
    fn add_free(&mut self, at: u64, pages: u64) {
        let (start, len) = self.insert_free(at, pages);
        if len >= PUNCH_PAGES {
            match self.unpunched.len() < LISTED {
                true => self.unpunched.push((start, len)),
                false => self.unlisted = Some(0),
            }
        }
    }

    /// Takes a run that may still hold blocks of the disk off the list, or from those that it had no room for.
    fn next_unpunched(&mut self) -> Option<(u64, u64)> {
        if let Some(run) = self.unpunched.pop() {
            return Some(run);
        }
        let mut rest = self.free.range(self.unlisted?..);
        let found = rest.find(|(_, len)| **len >= PUNCH_PAGES);
        let found = found.map(|(at, len)| (*at, *len));
        self.unlisted = found.map(|(at, len)| at + len);
        found
    }

    /// Joins a run to the free ones beside it and returns the whole run.
    fn insert_free(&mut self, mut at: u64, mut pages: u64) -> (u64, u64) {
        if let Some(len) = self.free.remove(&(at + pages)) {
            pages += len;
        }
        if let Some((&start, &len)) = self.free.range(..at).next_back()
            && start + len == at
        {
            self.free.remove(&start);
            at = start;
            pages += len;
        }
        self.free.insert(at, pages);
        (at, pages)
    }

    /// Takes `[at, at + pages)`, which is free, off the free list.
    fn take(&mut self, at: u64, pages: u64) {
        if let Some((&start, &len)) = self.free.range(..=at).next_back() {
            self.free.remove(&start);
            if start < at {
                self.free.insert(start, at - start);
            }
            if start + len > at + pages {
                self.free.insert(at + pages, start + len - at - pages);
            }
        }
    }

    /// Splits the shared runs at page `at`, so that one begins there.
    fn split(&mut self, at: u64) {
        if let Some((&start, &(len, owners))) = self.shared.range(..at).next_back()
            && start + len > at
        {
            self.shared.insert(start, (at - start, owners));
            self.shared.insert(at, (start + len - at, owners));
        }
    }

    fn share(&mut self, at: u64, pages: u64) {
        let end = at + pages;
        self.split(at);
        self.split(end);
        let inside: Vec<(u64, u64)> = self
            .shared
            .range(at..end)
            .map(|(s, (l, _))| (*s, *l))
            .collect();
        let mut from = at;
        for (start, len) in inside {
            if start > from {
                self.shared.insert(from, (start - from, 2));
            }
            if let Some((_, owners)) = self.shared.get_mut(&start) {
                *owners += 1;
            }
            from = start + len;
        }
        if from < end {
            self.shared.insert(from, (end - from, 2));
        }
    }

    fn unshare(&mut self, at: u64, pages: u64) {
        let end = at + pages;
        self.split(at);
        self.split(end);
        let inside: Vec<(u64, (u64, u32))> =
            self.shared.range(at..end).map(|(s, v)| (*s, *v)).collect();
        let mut from = at;
        for (start, (len, owners)) in inside {
            if start > from {
                self.live -= start - from;
                self.add_free(from, start - from);
            }
            if owners > 2 {
                self.shared.insert(start, (len, owners - 1));
            } else {
                self.shared.remove(&start);
            }
            from = start + len;
        }
        if from < end {
            self.live -= end - from;
            self.add_free(from, end - from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(at: u64, pages: u64) -> Extent {
        Extent {
            page: 0,
            pages,
            origin: Origin::Spool { at, owned: true },
        }
    }

    fn spool() -> (tempfile::TempDir, Spool) {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(&dir.path().join("spool")).unwrap();
        (dir, spool)
    }

    #[test]
    fn room_is_free_when_its_last_owner_goes_and_is_used_again_first() {
        let (_dir, spool) = spool();
        let at = spool.allocate(8, 0);
        spool.retain([extent(at + 2, 4)]);
        spool.release([extent(at, 8)]);
        assert_eq!(spool.charged(), 4 * PAGE);
        spool.release([extent(at + 2, 4)]);
        assert_eq!(spool.charged(), 0);
        assert_eq!(spool.allocate(8, 0), at);
    }

    #[test]
    fn after_a_restart_only_what_live_extents_name_is_taken() {
        let (_dir, spool) = spool();
        spool
            .adopt([extent(4, 4), extent(6, 4), extent(20, 1)])
            .unwrap();
        assert_eq!(spool.charged(), 7 * PAGE);
        assert_eq!(spool.allocate(10, 0), 10);
        assert_eq!(spool.allocate(4, 0), 0);
        assert_eq!(spool.allocate(1, 0), 21);
    }

    #[test]
    fn long_free_runs_are_punched_and_stay_usable() {
        use std::os::unix::fs::MetadataExt;
        let (dir, spool) = spool();
        let at = spool.allocate(1024, 0);
        spool
            .write(&vec![1; (1024 * PAGE) as usize], at * PAGE)
            .unwrap();
        spool.release([extent(at, 1024)]);
        spool.punch().unwrap();
        assert_eq!(
            std::fs::metadata(dir.path().join("spool"))
                .unwrap()
                .blocks(),
            0
        );
        assert_eq!(spool.allocate(1024, 0), at);
    }

    #[test]
    fn of_however_many_long_free_runs_each_is_punched() {
        use std::os::unix::fs::MetadataExt;
        let (dir, spool) = spool();
        let runs = LISTED as u64 + 500;
        for run in 0..runs {
            let at = spool.allocate(PUNCH_PAGES, 0);
            spool.write(&[1], at * PAGE).unwrap();
            let between = spool.allocate(1, 0);
            assert_eq!(between, (run + 1) * (PUNCH_PAGES + 1) - 1);
        }
        for run in 0..runs {
            spool.release([extent(run * (PUNCH_PAGES + 1), PUNCH_PAGES)]);
        }
        spool.punch().unwrap();
        let file = std::fs::metadata(dir.path().join("spool")).unwrap();
        assert_eq!(file.blocks(), 0);
        spool.punch().unwrap();
    }
}
