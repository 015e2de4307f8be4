//! Which files a reader will want next. Pure: told of listings and reads, it answers what to push.
//!
//! Reads of what was pushed are never seen. So one sign is worth one window, and only a read just behind its end makes the next
//! one larger.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};

use crate::record::Ino;

/// The largest file that is pushed.
pub const SMALL: u64 = 128 << 10;
/// What is pushed of a folder on the first sign that it is read.
pub const FIRST: u64 = 256 << 10;
/// What is pushed on one sign at most.
pub const MOST: u64 = 4 << 20;
/// So many folders are taken to be read in full as soon as they have been listed, after one that was.
pub const TRUST: u32 = 32;
/// Files of listings that are remembered, of each session: some 1 MiB.
pub const KEPT: usize = 16_384;

/// A file that may be pushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct File {
    pub ino: Ino,
    pub size: u32,
}

/// A folder that was listed.
#[derive(Default)]
struct Folder {
    /// In the order of the listing, and whether each was neither read nor pushed.
    files: Vec<(File, bool)>,
    was_read: bool,
    /// The size of the last window.
    window: u64,
    /// Where it ended.
    end: usize,
}

impl Folder {
    /// The first file at or behind `at` that was neither read nor pushed; behind the last comes the first.
    fn left(&self, at: usize) -> Option<usize> {
        let (before, behind) = self.files.split_at(at);
        let is_left = |(_, is_left): &(File, bool)| *is_left;
        let found = behind.iter().position(is_left).map(|n| at + n);
        found.or_else(|| before.iter().position(is_left))
    }

    /// The files of the next window, `room` bytes at most.
    fn push(&mut self, room: u64) -> Vec<File> {
        self.window = (self.window * 2).clamp(FIRST, MOST);
        let mut left = self.window.min(room);
        let mut pushed = Vec::new();
        while let Some(at) = self.left(self.end) {
            let (file, is_left) = &mut self.files[at];
            let Some(rest) = left.checked_sub(u64::from(file.size)) else {
                break;
            };
            left = rest;
            *is_left = false;
            pushed.push(*file);
            self.end = at + 1;
        }
        pushed
    }
}

/// What the readers of one session have listed and read.
#[derive(Default)]
pub struct Plan {
    folders: HashMap<Ino, Folder>,
    /// The same folders, in the order in which they were listed.
    order: VecDeque<Ino>,
    /// Where each file is; one of several names that are remembered has only the first.
    places: HashMap<Ino, (Ino, usize)>,
    trust: u32,
}

impl Plan {
    /// Notes what a reply told of a folder: the start of a listing, or what follows.
    pub fn listed(&mut self, dir: Ino, starts: bool, files: Vec<File>) {
        if starts && let Some(folder) = self.folders.get_mut(&dir) {
            for (file, _) in std::mem::take(folder).files {
                self.places.remove(&file.ino);
            }
        }
        for file in files {
            if self.places.len() >= KEPT && !self.drop_oldest(dir) {
                return;
            }
            let Entry::Vacant(place) = self.places.entry(file.ino) else {
                continue;
            };
            let folder = self.folders.entry(dir).or_insert_with(|| {
                self.order.push_back(dir);
                Folder::default()
            });
            place.insert((dir, folder.files.len()));
            folder.files.push((file, true));
        }
    }

    /// Forgets the folder that was listed first, but not this one. Whether there was another.
    fn drop_oldest(&mut self, keep: Ino) -> bool {
        let at = usize::from(self.order.front() == Some(&keep));
        let Some(folder) = self.order.remove(at).and_then(|d| self.folders.remove(&d)) else {
            return false;
        };
        for (file, _) in folder.files {
            self.places.remove(&file.ino);
        }
        true
    }

    /// Notes that all of a folder was listed, and returns what to push: `room` bytes at most.
    pub fn listed_all(&mut self, dir: Ino, room: u64) -> Vec<File> {
        match self.folders.get_mut(&dir) {
            Some(folder) if self.trust > 0 && !folder.was_read => {
                self.trust -= 1;
                folder.was_read = true;
                folder.push(room)
            }
            _ => Vec::new(),
        }
    }

    /// Notes that a file is read from its start, and returns what to push: `room` bytes at most.
    pub fn read(&mut self, ino: Ino, room: u64) -> Vec<File> {
        let place = self.places.get(&ino);
        let Some((folder, at)) = place.and_then(|(d, at)| Some((self.folders.get_mut(d)?, *at)))
        else {
            return Vec::new();
        };
        let goes_on = folder.window == 0 || folder.left(folder.end) == Some(at);
        let was_left = std::mem::take(&mut folder.files[at].1);
        if !was_left {
            return Vec::new();
        }
        let is_first = !std::mem::replace(&mut folder.was_read, true);
        if is_first {
            if self.trust == 0 {
                return Vec::new();
            }
            self.trust -= 1;
        } else if goes_on {
            self.trust = TRUST;
        } else {
            return Vec::new();
        }
        folder.end = at;
        folder.push(room)
    }

    #[cfg(test)]
    pub fn remembered(&self) -> usize {
        let files: usize = self.folders.values().map(|f| f.files.len()).sum();
        assert_eq!(files, self.places.len());
        assert_eq!(self.folders.len(), self.order.len());
        files
    }
}
