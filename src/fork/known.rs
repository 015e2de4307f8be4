//! What kernels know of: an inode that one of them was told of stays, if only as an orphan, until all have forgotten it.

use std::collections::HashMap;

use super::Fork;
use super::log::Request;
use super::table::Edit;
use crate::record::Ino;

/// What the kernel of a session knows of an inode: how often it was told of it, and two flags below that. There is one for each
/// inode that any of them knows.
#[derive(Default)]
pub(super) struct Known(u64);

impl Known {
    /// Another kernel may have cached it too since.
    const SHARED: u64 = 1;
    /// It may hold pages of its content since.
    const CACHED: u64 = 2;
    const ONCE: u64 = 4;

    fn has(&self, flag: u64) -> bool {
        self.0 & flag != 0
    }

    fn set(&mut self, flag: u64) {
        self.0 |= flag;
    }

    fn told(&mut self) {
        self.0 += Known::ONCE;
    }

    /// Returns whether it was told of it more often than this.
    fn forget(&mut self, times: u64) -> bool {
        let left = (self.0 / Known::ONCE).saturating_sub(times);
        self.0 = (left * Known::ONCE) | (self.0 % Known::ONCE);
        left > 0
    }
}

/// What the kernel of a session knows of an inode, if it does.
fn known_here(
    lookups: &mut [(u64, HashMap<Ino, Known>)],
    session: u64,
    ino: Ino,
) -> Option<&mut Known> {
    let mut here = lookups.iter_mut().filter(|(of, _)| *of == session);
    here.find_map(|(_, known)| known.get_mut(&ino))
}

impl Fork {
    /// Counts that the kernel of a session was told of an inode once more.
    pub fn looked_up(&self, session: u64, ino: Ino) {
        let mut lookups = self.lookups.lock();
        if session == 0 && lookups.iter().all(|(of, _)| *of != 0) {
            lookups.push((0, HashMap::new()));
        }
        // One that a newer session has ended is not counted any more.
        if let Some((_, known)) = lookups.iter_mut().find(|(of, _)| *of == session) {
            known.entry(ino).or_default().told();
        }
    }

    /// Counts from now on what a session's kernel is told of.
    pub fn begin_session(&self, session: u64) {
        self.lookups.lock().push((session, HashMap::new()));
    }

    /// Counts that the kernel of a session forgot an inode so many times; an orphan that nobody knows any more is removed.
    pub fn forget(&self, session: u64, ino: Ino, times: u64) {
        {
            let mut lookups = self.lookups.lock();
            let Some((_, known)) = lookups.iter_mut().find(|(of, _)| *of == session) else {
                return;
            };
            if known.get_mut(&ino).is_none_or(|known| known.forget(times)) {
                return;
            }
            known.remove(&ino);
            if lookups.iter().any(|(_, known)| known.contains_key(&ino)) {
                return;
            }
        }
        let is_orphan = {
            let layers = self.layers.read();
            layers
                .live
                .inodes
                .get(&ino)
                .is_some_and(|cell| cell.state.read().orphan)
        };
        if is_orphan {
            self.drop_orphan(ino);
        }
    }

    /// Whether an inode is shared by the kernels of several sessions: it is so by its names, or another kernel has not forgotten it,
    /// as an open file outlives its name. Once it was, it stays so until the kernel of this session has forgotten it, which may
    /// have it open since then.
    pub fn is_shared(&self, session: u64, ino: Ino, by_names: bool) -> bool {
        let mut lookups = self.lookups.lock();
        let mut elsewhere = lookups.iter().filter(|(of, _)| ![0, session].contains(of));
        let now = by_names || elsewhere.any(|(_, known)| known.contains_key(&ino));
        match known_here(&mut lookups, session, ino) {
            Some(known) => {
                if now {
                    known.set(Known::SHARED);
                }
                known.has(Known::SHARED)
            }
            None => now,
        }
    }

    /// Notes that the kernel of a session may hold pages of a file from now on. Returns whether it may have had some before, which
    /// cannot be told of an inode that it does not know.
    pub fn note_cached(&self, session: u64, ino: Ino) -> bool {
        let mut lookups = self.lookups.lock();
        let known = known_here(&mut lookups, session, ino);
        known.is_none_or(|known| {
            let before = known.has(Known::CACHED);
            known.set(Known::CACHED);
            before
        })
    }

    /// What [`Fork::note_cached`] would return.
    pub fn may_be_cached(&self, session: u64, ino: Ino) -> bool {
        let mut lookups = self.lookups.lock();
        known_here(&mut lookups, session, ino).is_none_or(|known| known.has(Known::CACHED))
    }

    pub(super) fn is_known(&self, ino: Ino) -> bool {
        let lookups = self.lookups.lock();
        lookups.iter().any(|(_, known)| known.contains_key(&ino))
    }

    /// Removes an orphan. If the log cannot take the record the orphan stays, which only holds room.
    fn drop_orphan(&self, ino: Ino) {
        let Ok(_gate) = self.enter() else { return };
        let mut layers = self.layers.write();
        let edit = Edit::Remove { ino };
        if self.log.lock().append(Request::default(), [&edit]).is_ok() {
            self.drop_room_ahead(&layers, ino);
            let gone = self.apply(&mut layers, &edit);
            drop(layers);
            self.spool.release(gone);
        }
    }

    /// Forgets what a session's kernel knew, and the orphans that only it could reach; returns what that was.
    pub fn end_session(&self, session: u64) -> Vec<Ino> {
        let ended = {
            let mut lookups = self.lookups.lock();
            let at = lookups.iter().position(|(of, _)| *of == session);
            at.map(|at| lookups.swap_remove(at).1)
        };
        self.drop_orphans();
        ended.unwrap_or_default().into_keys().collect()
    }

    /// Removes the orphans that no kernel knows.
    pub fn drop_orphans(&self) {
        let orphans: Vec<Ino> = {
            let layers = self.layers.read();
            let cells = layers.live.inodes.values();
            cells
                .filter(|cell| cell.state.read().orphan && !self.is_known(cell.ino))
                .map(|cell| cell.ino)
                .collect()
        };
        for ino in orphans {
            self.drop_orphan(ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_knows_takes_eight_bytes_and_its_flags_last_till_it_forgets() {
        assert_eq!(size_of::<Known>(), 8);
        let mut known = Known::default();
        for _ in 0..3 {
            known.told();
        }
        known.set(Known::CACHED);
        assert!(known.forget(2));
        assert!(known.has(Known::CACHED) && !known.has(Known::SHARED));
        known.told();
        assert!(known.forget(1) && !known.forget(5));
    }
}
