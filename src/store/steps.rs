//! The steps of whatever changes a store, where a test ends it as a killed process ends, or lets something else happen.
//!
//! Each store has its own, so that tests run side by side. Outside of tests [`Store::reach`] is nothing at all.

use super::{Store, StoreError};

macro_rules! steps {
    ($($(#[$what:meta])* $name:ident),* $(,)?) => {
        /// A step; what it is called says what has just been done, or is about to be.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub enum Step {
            $($(#[$what])* $name,)*
        }

        #[cfg(test)]
        impl Step {
            /// Every step there is, so that a test that goes through them knows a new one at once.
            pub const ALL: &[Step] = &[$(Step::$name,)*];
        }
    };
}

steps! {
    /// Any batch is about to be written.
    Writing,
    /// Any batch is written.
    Written,
    /// A batch is on the disk, with all before it.
    Synced,
    /// A flush is about to begin.
    Flushing,
    /// A flush is done.
    Flushed,
    /// An id was taken in hand, and looked for.
    Taken,
    /// Content is known to be on its way, and about to be written without WAL.
    Spilling,
    /// The content of a publish is in its batch or written ahead.
    Gathered,
    /// The batch of a publish is whole and about to be written.
    Publishing,
    /// A gc knows the roots of forks and leases, and not those of versions yet.
    Marking,
    /// A gc knows what stays.
    Marked,
    /// A gc has swept one family.
    Swept,
    /// A gc has compacted one family.
    Compacted,
    /// The spool of a fork has the name under which it stays.
    SpoolKept,
    /// A spool of which no chunk names anything is gone, and its record still there.
    SpoolRemoved,
    /// A chunk was compressed anew, and not put in the old one's place yet.
    Repacked,
    /// A new fork has its folder and no record.
    DeltaMade,
    /// A fork was frozen.
    Sealed,
    /// A fork that goes on has begun its next segment.
    SegmentBegun,
    /// Something was carried over into the next segment.
    Carried,
    /// The new root of a fork is known.
    Ingested,
    /// A fork is on top of its new root and has its old segments still.
    Rebased,
    /// The old segments are gone.
    Trimmed,
    /// A fork is over and has its folder still.
    Ending,
    /// The folder of a fork that is over has been put aside.
    Aside,
    /// A tar file has been unpacked into the fork that takes it in.
    Unpacked,
}

impl Store {
    /// Says that a step is reached.
    ///
    /// # Errors
    /// Never outside of tests; in a test, where it cuts what is done off here.
    #[inline(always)]
    pub fn reach(&self, step: Step) -> Result<(), StoreError> {
        #[cfg(test)]
        return self.steps.reach(step);
        #[cfg(not(test))]
        {
            let _ = step;
            Ok(())
        }
    }
}

#[cfg(test)]
pub use watch::{Steps, copy_folder};

#[cfg(test)]
mod watch {
    use std::collections::BTreeMap;
    use std::fs;
    use std::io;
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use parking_lot::Mutex;

    use super::Step;
    use crate::store::{Store, StoreError};

    type Meanwhile = Arc<dyn Fn(Step) + Send + Sync>;

    /// What the steps of a store lead to.
    #[derive(Default)]
    pub struct Steps {
        /// The process is as good as dead: every further step fails, so that nothing is written any more.
        dead: AtomicBool,
        /// The disk is as good as full: every write fails.
        full: AtomicBool,
        /// The next write that is done is answered with an error of the disk.
        doubt: AtomicBool,
        state: Mutex<State>,
    }

    #[derive(Default)]
    struct State {
        seen: BTreeMap<Step, usize>,
        cut: Option<(Step, usize)>,
        meanwhile: Option<Meanwhile>,
    }

    impl Steps {
        /// Counts from now on.
        pub fn watch(&self) {
            *self.state.lock() = State::default();
        }

        /// Counts from now on, and cuts everything off when a step is reached for the `nth` time.
        pub fn cut(&self, step: Step, nth: usize) {
            *self.state.lock() = State {
                cut: Some((step, nth)),
                ..State::default()
            };
        }

        /// Calls something at each step from now on, before it goes on.
        pub fn meanwhile(&self, call: impl Fn(Step) + Send + Sync + 'static) {
            self.state.lock().meanwhile = Some(Arc::new(call));
        }

        /// Lets every write fail as on a full disk, or no longer.
        pub fn fill(&self, full: bool) {
            self.full.store(full, Ordering::Release);
        }

        /// Lets the next write be done, and fail all the same.
        pub fn doubt(&self) {
            self.doubt.store(true, Ordering::Release);
        }

        /// Forgets what was asked for.
        pub fn over(&self) {
            *self.state.lock() = State::default();
        }

        /// How often each step was reached.
        pub fn seen(&self) -> BTreeMap<Step, usize> {
            self.state.lock().seen.clone()
        }

        /// Whether everything was cut off.
        pub fn is_dead(&self) -> bool {
            self.dead.load(Ordering::Acquire)
        }

        pub(super) fn reach(&self, step: Step) -> Result<(), StoreError> {
            let cut_off = || StoreError::Io {
                what: format!("cut off by a test at {step:?}"),
                source: io::ErrorKind::Interrupted.into(),
            };
            let meanwhile = {
                let mut state = self.state.lock();
                let count = state.seen.entry(step).or_default();
                *count += 1;
                let reached = (step, *count);
                if state.cut == Some(reached) {
                    self.dead.store(true, Ordering::Release);
                }
                state.meanwhile.clone()
            };
            if self.is_dead() {
                return Err(cut_off());
            }
            if let Some(meanwhile) = meanwhile {
                meanwhile(step);
            }
            if step == Step::Written && self.doubt.swap(false, Ordering::AcqRel) {
                let nowhere = rocksdb::DB::open_default("/dev/null/db");
                return nowhere.map(drop).map_err(StoreError::Database);
            }
            match step == Step::Writing && self.full.load(Ordering::Acquire) {
                true => Err(StoreError::NoSpace { wants: 0 }),
                false => Ok(()),
            }
        }
    }

    impl Store {
        /// Copies the store as it lies on the disk while it is open. The segments of the WAL come first, then what says which
        /// files count, then the others, of which none goes meanwhile: so nothing is in the copy without what was written
        /// before it.
        pub fn copy_as_it_lies(&self, to: &Path) {
            // No spool goes meanwhile that the WAL may name.
            let _stay = self.hold_spools();
            let (from, to_db) = (self.dir().join("db"), to.join("db"));
            fs::create_dir_all(&to_db).unwrap();
            self.with(|db| Ok(db.disable_file_deletions()?)).unwrap();
            let parts = [".log", "CURRENT", "MANIFEST", ""];
            for part in parts {
                for entry in fs::read_dir(&from).unwrap() {
                    let name = entry.unwrap().file_name();
                    let text = name.to_str().unwrap();
                    let belongs = parts.iter().find(|part| text.contains(**part));
                    if belongs == Some(&part) && text != "LOCK" {
                        copy_file(&from.join(&name), &to_db.join(&name));
                    }
                }
            }
            self.with(|db| Ok(db.enable_file_deletions()?)).unwrap();
            for folder in ["spools", "forks", "log"] {
                copy_folder(&self.dir().join(folder), &to.join(folder));
            }
            copy_file(&self.dir().join("state"), &to.join("state"));
        }
    }

    /// Copies a folder; what goes meanwhile is left out.
    pub fn copy_folder(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        let Ok(entries) = fs::read_dir(from) else {
            return;
        };
        for entry in entries {
            let path = entry.unwrap().path();
            let to = to.join(path.file_name().unwrap());
            if path.is_dir() {
                copy_folder(&path, &to);
            } else {
                copy_file(&path, &to);
            }
        }
    }

    fn copy_file(from: &Path, to: &Path) {
        match fs::copy(from, to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            copied => drop(copied.unwrap()),
        }
    }
}
