//! What an engine does by itself: ingest ahead of commits, give room back, drop what jobs left behind, compress what stays, flush
//! when idle.

use std::cell::Cell;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::commit::never_commits;
use super::{Code, Engine, EngineError, Live, Result};
use crate::commit;
use crate::fork::Fork;
use crate::store::{ForkId, Rest, Settled, Step, Verdict};
use crate::sys;

/// How many times longer than its table, or than the limit of one, a log may be.
const LOG_FACTOR: u64 = 4;
const PAUSE: Duration = Duration::from_millis(300);
/// How often the disk is looked at; how long nothing is tried again that did not help; how often retention is asked anyway.
const LOOK: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
/// Files of one fork that are ingested between two looks at the others.
const AT_A_TIME: usize = 4096;
/// How often it is tried, with a pause, to remove what is over.
const TRIES: usize = 200;

/// When the store was looked after.
pub struct Tended {
    /// No look before this: a volume that somebody comes for is forked first.
    next: Instant,
    daily: Option<Instant>,
    for_room: Option<Instant>,
}

impl Default for Tended {
    fn default() -> Tended {
        Tended {
            next: Instant::now() + LOOK,
            daily: None,
            for_room: None,
        }
    }
}

/// Who settles, and when by itself.
pub struct Settling {
    /// Held by who settles.
    alone: Mutex<()>,
    /// How many wait for that: the background makes way for them.
    waiting: AtomicUsize,
    /// No look before this.
    pub(super) next: Mutex<Instant>,
}

/// When something that failed is tried again: later each time.
#[derive(Default)]
pub(super) struct Retry {
    at: Option<Instant>,
    pause: Duration,
}

impl Retry {
    fn is_due(&self) -> bool {
        self.at.is_none_or(|at| Instant::now() >= at)
    }

    fn put_off(&mut self) {
        self.pause = (self.pause * 2).clamp(PAUSE, HOUR);
        self.at = Some(Instant::now() + self.pause);
    }
}

impl Default for Settling {
    fn default() -> Settling {
        Settling {
            alone: Mutex::default(),
            waiting: AtomicUsize::new(0),
            next: Mutex::new(Instant::now() + LOOK),
        }
    }
}

/// Starts the threads that look after an engine until it stops: three for what can wait, at idle priority, one that keeps the
/// tables of forks small, and one that reads ahead.
pub fn start(engine: &Arc<Engine>) -> Result<Vec<thread::JoinHandle<()>>> {
    let idle = |engine: &Engine| engine.look_after();
    let tables = |engine: &Engine| engine.move_large_tables();
    let tend = |engine: &Engine| engine.tend(Instant::now());
    let settle = |engine: &Engine| engine.settle_in_background();
    Ok(vec![
        repeat(engine, "upkeep", true, idle)?,
        repeat(engine, "tables", false, tables)?,
        repeat(engine, "retention", true, tend)?,
        repeat(engine, "settling", true, settle)?,
        read_ahead(engine)?,
    ])
}

fn read_ahead(engine: &Engine) -> Result<thread::JoinHandle<()>> {
    let ahead = engine.store.read_ahead();
    spawn("ahead", move || ahead.run())
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<thread::JoinHandle<()>> {
    let thread = thread::Builder::new().name(name.into()).spawn(run);
    thread.map_err(|e| EngineError::new(Code::Failed, format!("a thread for background work: {e}")))
}

/// Does some work again and again until the engine stops, with a pause whenever there is no more to do at once.
fn repeat(
    engine: &Arc<Engine>,
    name: &str,
    idle: bool,
    work: impl Fn(&Engine) -> bool + Send + 'static,
) -> Result<thread::JoinHandle<()>> {
    let weak = Arc::downgrade(engine);
    let run = move || {
        if idle && let Err(error) = sys::idle_priority() {
            log::debug!("background work runs at normal priority: {error}");
        }
        loop {
            let Some(engine) = weak.upgrade() else { return };
            if engine.stopping.load(Ordering::Acquire) {
                return;
            }
            let busy = work(&engine);
            drop(engine);
            if !busy {
                thread::park_timeout(PAUSE);
            }
        }
    };
    spawn(name, run)
}

impl Engine {
    /// Looks after every fork once; returns whether there is more to do at once.
    pub(super) fn look_after(&self) -> bool {
        let lives: Vec<Arc<Live>> = self.forks.lock().values().cloned().collect();
        let mut busy = false;
        for live in &lives {
            if self.stopping.load(Ordering::Acquire) {
                return false;
            }
            self.remember(live);
            busy |= self.ingest_ahead(live);
            if let Some(fork) = &live.fork
                && let Err(error) = tend_spool(fork)
            {
                log::debug!("fork {}: its spool: {error}", live.id);
            }
            self.set_damage_aside(live);
            self.drop_orphan(live);
        }
        self.free_what_lingers();
        self.forget();
        busy
    }

    /// Puts the record of a fork whose commit failed, once there is room: without it the fork would be over for the next daemon.
    fn remember(&self, live: &Live) {
        if !live.in_doubt.load(Ordering::Acquire) {
            return;
        }
        let Some(_one) = live.committing.try_lock() else {
            return;
        };
        let record = live.record.lock().clone();
        if !live.over.load(Ordering::Acquire) && self.store.put_fork(&record).is_ok() {
            live.in_doubt.store(false, Ordering::Release);
        }
    }

    /// Lets go what retention lets go: once a day, and when the disk runs short.
    pub(super) fn tend(&self, now: Instant) -> bool {
        let mut tended = self.tended.lock();
        if now < tended.next {
            return false;
        }
        tended.next = now + LOOK;
        let short = self.short_of() > 0;
        let before = |at: Option<Instant>, than: Duration| at.is_none_or(|at| now - at > than);
        let due = before(tended.daily, DAY) || (short && before(tended.for_room, HOUR));
        if !due {
            self.crowded.store(short, Ordering::Release);
            return false;
        }
        // A daemon that lives for minutes finds the same garbage each time: it looks for it only when something went.
        let first = tended.daily.is_none();
        tended.daily = Some(now);
        let gone = match first && !short {
            true => self.retain(super::now(), 0, true),
            false => Ok(Default::default()),
        };
        let result = gone.and_then(|(volumes, versions)| {
            if first && !short && volumes.is_empty() && versions.is_empty() {
                return Ok(());
            }
            self.gc(false).map(drop)
        });
        if let Err(error) = result {
            log::warn!("the store was not tidied up: {error}");
            self.crowded.store(short, Ordering::Release);
        }
        if short {
            tended.for_room = Some(now);
        }
        false
    }

    /// Compresses everything once more that has not been yet, whatever its age.
    ///
    /// # Errors
    /// What the disk answered.
    pub fn settle(&self) -> Result<Settled> {
        self.settling.waiting.fetch_add(1, Ordering::AcqRel);
        let _alone = self.settling.alone.lock();
        self.settling.waiting.fetch_sub(1, Ordering::AcqRel);
        let go_on = || !self.stopping.load(Ordering::Acquire);
        let work = || {
            sys::step_back();
            self.store.settle_all(super::now(), &go_on)
        };
        // A thread that has stepped back stays behind.
        let settled = thread::scope(|scope| scope.spawn(work).join());
        Ok(settled.expect("a panic ends the process")?)
    }

    /// Compresses once more what has been in the store for a day, as long as nobody wants anything.
    pub(super) fn settle_in_background(&self) -> bool {
        let mut next = self.settling.next.lock();
        if Instant::now() < *next || self.wants_quiet() {
            return false;
        }
        let Some(_alone) = self.settling.alone.try_lock() else {
            return false;
        };
        *next = Instant::now() + LOOK;
        if !self.has_room_to_settle() {
            return false;
        }
        let looked = Cell::new(Instant::now());
        let go_on = || {
            if self.wants_quiet() {
                return false;
            }
            let again = looked.get().elapsed() > Duration::from_secs(1);
            if again {
                looked.set(Instant::now());
            }
            !again || self.has_room_to_settle()
        };
        match self.store.settle(super::now(), &go_on) {
            Ok(settled) => {
                if settled.settled_chunks > 0 {
                    log::debug!("compressed again: {settled:?}");
                }
                if !settled.whole {
                    *next = Instant::now();
                }
            }
            Err(error) => {
                log::warn!("what stays is not compressed again: {error}");
                *next = Instant::now() + HOUR;
            }
        }
        false
    }

    /// Whether somebody wants the machine or the store for something that cannot wait.
    fn wants_quiet(&self) -> bool {
        let commits = |live: &Arc<Live>| {
            live.committing.is_locked() || live.waiting.load(Ordering::Acquire) > 0
        };
        self.stopping.load(Ordering::Acquire)
            || self.settling.waiting.load(Ordering::Acquire) > 0
            || self.forks.lock().values().any(commits)
    }

    /// Old and new values lie side by side until a compaction, which needs as much room as all of them take; what is short of room
    /// loses versions. So there must be that much to spare.
    fn has_room_to_settle(&self) -> bool {
        self.spare() >= self.store.disk_bytes()
    }

    /// Frees the room of forks that are over and whose mount somebody holds on to. What was committed stays readable there.
    fn free_what_lingers(&self) {
        for (live, root) in std::mem::take(&mut *self.leaving.lock()) {
            let Some(live) = live.upgrade().filter(|live| live.is_served()) else {
                continue;
            };
            let Some(fork) = &live.fork else { continue };
            if let Some(root) = root {
                fork.rebase(root.root(), u64::MAX, None);
            }
            let rest = self.rest_of_spool(live.id);
            if let Err(error) = fork.spool.clear().and_then(|()| rest.give_back()) {
                log::warn!("fork {}: its room is not given back: {error}", live.id);
            }
        }
    }

    /// Moves tables that have grown large, or whose log has grown far beyond them, to private roots.
    fn move_large_tables(&self) -> bool {
        let lives: Vec<Arc<Live>> = self.forks.lock().values().cloned().collect();
        let limit = self.config.table;
        for live in &lives {
            let Some(fork) = &live.fork else { continue };
            let (table, log) = fork.weight();
            if table <= limit && log <= LOG_FACTOR * table.max(limit) {
                continue;
            }
            if !live.moving.lock().is_due() {
                continue;
            }
            match self.move_to_private_root(live) {
                Ok(()) => {
                    *live.moving.lock() = Retry::default();
                    log::info!("fork {}: its table moved to a private root", live.id);
                }
                // The fork works on with what it has. What keeps failing would ingest all of it each time.
                Err(error) => {
                    live.moving.lock().put_off();
                    log::warn!("fork {}: its table stays in memory: {error}", live.id);
                }
            }
        }
        false
    }

    fn ingest_ahead(&self, live: &Live) -> bool {
        let Some(fork) = &live.fork else { return false };
        let will_commit = {
            let record = live.record.lock();
            never_commits(&record.options).is_none() && record.verdict != Verdict::Nothing
        };
        // The last of the room is for what is asked for.
        if !will_commit || !live.is_served() || self.store.is_short() {
            return false;
        }
        // A commit does the work itself, and faster.
        let Some(_one) = live.committing.try_lock() else {
            return false;
        };
        live.drop_lost();
        live.drop_superseded();
        let ingest = live
            .ahead
            .lock()
            .get_or_insert_with(|| Arc::new(self.store.ingest()))
            .clone();
        match commit::ahead(fork, &ingest, AT_A_TIME, &live.waiting) {
            Ok(files) => files == AT_A_TIME,
            Err(error) => {
                log::debug!("fork {}: nothing was ingested ahead: {error}", live.id);
                // What was to be written may be gone.
                live.drop_ahead();
                false
            }
        }
    }

    /// Keeps the next fork from a version in which this one met damage.
    fn set_damage_aside(&self, live: &Live) {
        let (base, moved) = {
            let record = live.record.lock();
            (record.base, record.moved.is_some())
        };
        // What is damaged in a private root is not the version's.
        if let Some(fork) = live.fork.as_ref().filter(|_| !moved)
            && let (Some(base), Some(why)) = (base, fork.damage())
            && let Err(error) = self.set_aside(base, why)
        {
            log::warn!(
                "fork {}: its damaged base is not set aside: {error}",
                live.id
            );
        }
    }

    /// Abandons the fork of a job whose mount has been gone for long.
    fn drop_orphan(&self, live: &Arc<Live>) {
        let is_orphan = || {
            let idle = live.sessions.lock().idle();
            let is_gone = idle.is_some_and(|idle| idle > self.config.orphan_after);
            is_gone && live.record.lock().options.job.is_some()
        };
        if !is_orphan() {
            return;
        }
        // Whoever was busy with it may just have mounted it.
        let _one = live.alone();
        if !is_orphan() {
            return;
        }
        log::info!("fork {} of a job that is gone is abandoned", live.id);
        match self.drop_alone(live) {
            Ok(_) => {
                self.counters.abandoned.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => log::warn!("fork {} was not abandoned: {error}", live.id),
        }
    }

    /// Removes the folder of a fork that is over, in the background.
    pub(super) fn remove_delta(&self, live: &Live) {
        if let Some(fork) = &live.fork {
            fork.end();
        }
        if self.store.reach(Step::Ending).is_err() || !self.put_aside(live.id) {
            return;
        }
        if self.store.reach(Step::Aside).is_ok() {
            let stays = self.unforgotten.lock().contains(&live.id);
            self.remove_in_background(aside(&self.fork_dir(live.id)), stays);
        }
    }

    /// Gives the folder of a fork that is over a name that says so, to whoever opens the store next; false if it kept its own.
    pub(super) fn put_aside(&self, id: ForkId) -> bool {
        let dir = self.fork_dir(id);
        match fs::rename(&dir, aside(&dir)) {
            // It is there already, or never was anything but a name.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                aside(&dir).exists() || fs::create_dir(aside(&dir)).is_ok()
            }
            Err(error) => {
                log::warn!("{}: {error}", dir.display());
                false
            }
            Ok(()) => true,
        }
    }

    /// Removes the records of forks that were abandoned while the disk was full, and then what says that they were.
    pub(super) fn forget(&self) {
        let mut left = self.unforgotten.lock();
        left.retain(|id| match self.store.remove_fork(*id) {
            Ok(()) => {
                self.remove_in_background(aside(&self.fork_dir(*id)), false);
                false
            }
            Err(error) => {
                log::debug!("the record of fork {id} is still there: {error}");
                true
            }
        });
    }

    /// Removes folders that no fork's record names.
    pub(super) fn remove_strays(&self) {
        let Ok(entries) = fs::read_dir(self.store.dir().join("forks")) else {
            return;
        };
        for entry in entries.filter_map(std::result::Result::ok) {
            let name = entry.file_name();
            let id = name.to_str().and_then(|name| name.parse().ok());
            if id.is_none_or(|id| !self.forks.lock().contains_key(&id)) {
                let left = self.unforgotten.lock();
                let stays = left
                    .iter()
                    .any(|id| aside(&self.fork_dir(*id)) == entry.path());
                self.remove_in_background(entry.path(), stays);
            }
        }
    }

    /// What no version has of the spool of a fork that nobody reads any more.
    fn rest_of_spool(&self, id: ForkId) -> Rest {
        self.store.end_spool(id).unwrap_or_else(|error| {
            log::warn!("the spool of fork {id} is left for the next gc: {error}");
            Rest::Nothing
        })
    }

    /// Removes the folder of a fork with what is in it, or that alone if its name is to stay, and what no version has of the spool.
    fn remove_in_background(&self, dir: PathBuf, stays: bool) {
        let id = dir.file_stem().and_then(|name| name.to_str()?.parse().ok());
        let rest = id.map_or(Rest::Nothing, |id| self.rest_of_spool(id));
        let work = move || {
            if let Err(error) = sys::idle_priority() {
                log::debug!("{}: removed at normal priority: {error}", dir.display());
            }
            // Where no more files can be opened some are closed soon.
            for left in (0..TRIES).rev() {
                match remove_slowly(&dir, stays) {
                    Ok(()) => break,
                    Err(error) if left == 0 => {
                        log::warn!("{} was not removed: {error}", dir.display());
                    }
                    Err(_) => thread::sleep(PAUSE),
                }
            }
            if let Err(error) = rest.give_back() {
                log::warn!("{}: its spool is not given back: {error}", dir.display());
            }
        };
        // Without a thread the folder stays, and goes at the next start.
        if let Err(error) = thread::Builder::new().name("remove".into()).spawn(work) {
            log::warn!("a thread to remove a fork: {error}");
        }
    }
}

/// Gives room back that a fork does not use, and brings to the disk what its commit may leave where it is.
fn tend_spool(fork: &Fork) -> std::io::Result<()> {
    let written = match fork.is_bulk(fork.hashed()) {
        true => fork.spool.write_back(),
        false => Ok(()),
    };
    fork.spool.punch().and(written)
}

/// The name that the folder of a fork has when the fork is over.
fn aside(dir: &Path) -> PathBuf {
    dir.with_extension("gone")
}

/// Whether the folder of a fork says that it is over.
pub(super) fn is_aside(dir: &Path) -> bool {
    !dir.exists() && aside(dir).exists()
}

fn remove_slowly(dir: &Path, stays: bool) -> std::io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        // It is removed twice at once where the record went meanwhile.
        sys::unless_gone(sys::remove_slowly(&entry?.path()))?;
    }
    match stays {
        true => Ok(()),
        false => sys::unless_gone(fs::remove_dir(dir)),
    }
}
