//! The verbs of forkvol on one open store: what a daemon is asked to do. Owns the store, the forks and their sessions.
//!
//! Lock order: the table of forks is held for a moment and never while anything else is done; a fork's `committing` before its
//! gate; several forks in order of their ids.

mod archive;
mod commit;
mod error;
mod forking;
mod info;
mod read;
mod retention;
mod serving;
#[cfg(test)]
mod tests;
mod trust;
mod upkeep;
mod versions;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard, RwLock};

use crate::fork::Fork;
use crate::mount::{Requests, Wakeful};
use crate::store::{self, ForkId, Hit, Ingest, Lease, Store, StoreError, StoreOptions};
use crate::sys::now;
use crate::tree::NodeId;
use crate::volume::{self, Found, VersionSpec};

pub use archive::Imported;
pub use commit::{CommitRequest, Committed, When};
use error::Result;
pub use error::{Code, EngineError, MORE_FILES};
use forking::reopen;
pub use forking::{ForkRequest, Owner};
pub use info::{ForkInfo, MountInfo, VersionInfo, VolumeInfo};
pub use read::{DiffEntry, DiffKind, ListEntry};
pub use retention::{Collected, Keep, PASSING, Policy};
pub use serving::Served;
use serving::Sessions;
pub use store::{CheckReport, GcReport, LeftOut, Settled, Stats};
pub use trust::{Asker, JobFacts, TrustPolicy, scope};
use upkeep::Retry;
pub use versions::Repaired;

/// How an engine works.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Bytes of memory for decoded nodes and chunks.
    pub cache: u64,
    /// Bytes of the disk that forks may not fill; None: 2 %, at least 1 GiB.
    pub reserve: Option<u64>,
    /// Threads that ingest. The default is one a core; finding out how many there are takes a while.
    pub threads: usize,
    /// A job's fork without a mount is abandoned after this.
    pub orphan_after: Duration,
    /// Bytes of memory that the table of a fork may take before it moves to a private root.
    pub table: u64,
    /// Bytes of what cannot be compressed from which on a commit leaves them where the fork wrote them.
    pub bulk: u64,
    /// Idle cores may be kept from sleeping while requests come in fast.
    pub wakeful: bool,
    pub retention: Policy,
    /// None: all who may use the store are trusted.
    pub trust: Option<TrustPolicy>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        let orphan_after = Duration::from_secs(3600);
        EngineConfig {
            cache: 128 << 20,
            reserve: None,
            threads: std::thread::available_parallelism().map_or(2, usize::from),
            orphan_after,
            table: 64 << 20,
            bulk: StoreOptions::default().bulk,
            wakeful: false,
            retention: Policy::default(),
            trust: None,
        }
    }
}

/// Counters since the daemon started.
#[derive(Debug, Default)]
pub struct Counters {
    pub forks: AtomicU64,
    pub commits: AtomicU64,
    pub unchanged: AtomicU64,
    pub abandoned: AtomicU64,
    /// Commits and forks.
    pub refused: AtomicU64,
    pub gcs: AtomicU64,
    pub freed_bytes: AtomicU64,
    /// By retention.
    pub removed_volumes: AtomicU64,
    pub removed_versions: AtomicU64,
    /// Forks by how well they fitted what was wanted.
    pub hits_exact: AtomicU64,
    pub hits_stale: AtomicU64,
    pub hits_fallback: AtomicU64,
    pub hits_empty: AtomicU64,
    /// What was to be a fork and is none, by reason; `degraded_mount`: it was never mounted.
    pub degraded_no_space: AtomicU64,
    pub degraded_policy: AtomicU64,
    pub degraded_damaged: AtomicU64,
    pub degraded_mount: AtomicU64,
    pub degraded_other: AtomicU64,
}

impl Counters {
    /// Counts what came of a wish for a fork.
    fn forked(&self, outcome: &Result<ForkInfo>) {
        let counter = match outcome {
            Ok(fork) => {
                self.forks.fetch_add(1, Ordering::Relaxed);
                match fork.hit {
                    Hit::Exact => &self.hits_exact,
                    Hit::Stale => &self.hits_stale,
                    Hit::Fallback => &self.hits_fallback,
                    Hit::Empty => &self.hits_empty,
                }
            }
            Err(error) => {
                let counter = match error.code {
                    Code::NoSpace => &self.degraded_no_space,
                    Code::Policy => &self.degraded_policy,
                    Code::Damaged => &self.degraded_damaged,
                    // The caller's mistake.
                    Code::Usage => return,
                    _ => &self.degraded_other,
                };
                self.refused.fetch_add(1, Ordering::Relaxed);
                counter
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// One fork as the engine keeps it.
struct Live {
    id: ForkId,
    /// None for one of another boot, or whose log is damaged: it can only be abandoned.
    fork: Option<Arc<Fork>>,
    record: Mutex<store::Fork>,
    sessions: Mutex<Sessions>,
    requests: Arc<Requests>,
    committing: Mutex<()>,
    /// How many wait for `committing`: background work makes way for them.
    waiting: AtomicUsize,
    /// What background ingest has in hand for the next commit.
    ahead: Mutex<Option<Arc<Ingest>>>,
    /// Published or abandoned: what is left goes with the session.
    over: AtomicBool,
    /// A commit of it failed, or a move to a private root: if the disk has taken that all the same, the record of the fork may be
    /// gone, or name that root.
    in_doubt: AtomicBool,
    /// When its table is moved to a private root again, if that failed.
    moving: Mutex<Retry>,
    why_lost: Option<String>,
    /// Who made it and may still come to mount it.
    asker: Weak<()>,
}

/// So many stored bytes may be ingested ahead of a commit, however little a fork has.
const AHEAD_LEAST: u64 = 64 << 20;

impl Live {
    fn fork(&self) -> Result<&Arc<Fork>> {
        self.fork.as_ref().ok_or_else(|| {
            let why = self
                .why_lost
                .as_deref()
                .unwrap_or("it is of another boot of this machine");
            EngineError::new(Code::Failed, format!("fork {} is lost: {why}", self.id))
                .hint(format!("`forkvol abandon {}` drops it", self.id))
        })
    }

    /// Waits until nobody else commits or drops this fork.
    fn alone(&self) -> MutexGuard<'_, ()> {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let alone = self.committing.lock();
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        alone
    }

    /// Lets go of what was ingested ahead if it went with a failed write, so that it is ingested again. Called by who holds
    /// `committing`.
    fn drop_lost(&self) {
        let is_lost = |ingest: &Arc<Ingest>| ingest.is_lost();
        if self.ahead.lock().as_ref().is_some_and(is_lost) {
            self.drop_ahead();
        }
    }

    /// Lets go of what was ingested ahead if much of that was written over since: no gc takes anything of it before. Called by who
    /// holds `committing`.
    fn drop_superseded(&self) {
        let Some(fork) = &self.fork else { return };
        let most = AHEAD_LEAST.max(2 * fork.charged());
        let is_beyond = |ingest: &Arc<Ingest>| ingest.new_bytes() > most;
        if self.ahead.lock().as_ref().is_some_and(is_beyond) {
            self.drop_ahead();
        }
    }

    /// Lets go of what was ingested ahead of a commit that failed: it may have gone with it. Called by who holds `committing`.
    fn drop_ahead(&self) {
        if let Some(fork) = &self.fork {
            fork.forget_ingested();
        }
        self.ahead.lock().take();
    }
}

/// The engine of one store.
pub struct Engine {
    pub store: Arc<Store>,
    config: EngineConfig,
    forks: Mutex<HashMap<ForkId, Arc<Live>>>,
    /// Shared by whoever chooses a version until something holds it, alone by who removes versions.
    bases: RwLock<()>,
    tended: Mutex<upkeep::Tended>,
    settling: upkeep::Settling,
    /// The store takes too much room, and gc could not help.
    crowded: AtomicBool,
    counters: Counters,
    wakeful: Arc<Wakeful>,
    stopping: AtomicBool,
    upkeep: Mutex<Vec<std::thread::JoinHandle<()>>>,
    /// Forks that are over and may still be mounted, with the root that a commit gave them, which is held.
    leaving: Mutex<Vec<(Weak<Live>, Option<Lease>)>>,
    /// Abandoned while the disk was full: their records are still there.
    unforgotten: Mutex<Vec<ForkId>>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Engine({})", self.store.dir().display())
    }
}

fn boot_id() -> Result<String> {
    let id = crate::sys::boot_id();
    id.map(Into::into)
        .map_err(|e| EngineError::new(Code::Failed, format!("the id of this boot: {e}")))
}

impl Engine {
    /// Looks whether a folder is a store, or can become one, and changes nothing there.
    ///
    /// # Errors
    /// Why it is none for this program and this user.
    pub fn recognise(dir: &Path) -> Result<()> {
        Ok(Store::recognise(dir)?)
    }

    /// Opens the store in `dir` and the forks that it knows.
    ///
    /// # Errors
    /// Whatever keeps the store from being opened; nothing was changed then.
    pub fn open(dir: &Path, config: EngineConfig) -> Result<Arc<Engine>> {
        let options = StoreOptions {
            node_cache: config.cache * 3 / 5,
            chunk_cache: config.cache * 2 / 5,
            reserve: config.reserve,
            bulk: config.bulk,
        };
        let store = Store::open(dir, options)?;
        let boot = boot_id()?;
        let (mut forks, mut over) = (HashMap::new(), Vec::new());
        let records = store.forks().map_err(|error| error.at_open(dir))?;
        for record in records {
            if upkeep::is_aside(&dir.join("forks").join(record.id.to_string())) {
                over.push(record.id);
                continue;
            }
            let live = reopen(&store, record, &boot);
            forks.insert(live.id, Arc::new(live));
        }
        let engine = Arc::new(Engine {
            store,
            wakeful: Wakeful::start(config.wakeful),
            config,
            forks: Mutex::new(forks),
            bases: RwLock::default(),
            tended: Mutex::default(),
            settling: upkeep::Settling::default(),
            crowded: AtomicBool::new(false),
            counters: Counters::default(),
            stopping: AtomicBool::new(false),
            upkeep: Mutex::default(),
            leaving: Mutex::default(),
            unforgotten: Mutex::new(over),
        });
        engine.forget();
        engine.remove_strays();
        engine.drop_cut_off_imports();
        *engine.upkeep.lock() = upkeep::start(&engine)?;
        Ok(engine)
    }

    /// Abandons what imports unpacked into that ended with their daemon.
    fn drop_cut_off_imports(&self) {
        let lives: Vec<Arc<Live>> = self.forks.lock().values().cloned().collect();
        for live in lives {
            if live.record.lock().options.import
                && let Err(error) = self.drop_fork(live.id)
            {
                log::warn!("fork {} of an import stays: {error}", live.id);
            }
        }
    }

    fn fork_dir(&self, id: ForkId) -> PathBuf {
        self.store.dir().join("forks").join(id.to_string())
    }

    /// Finds the version that a text names.
    fn find_version(&self, text: &str) -> Result<(store::Volume, store::Version)> {
        let spec: VersionSpec = text.parse().map_err(usage)?;
        match volume::find(&self.store, &spec)? {
            Found::Version(found) => Ok(*found),
            Found::Ambiguous => Err(EngineError::new(
                Code::Usage,
                format!("{text} names more than one version"),
            )
            .hint("write more digits")),
            Found::Nothing(None) => Err(no_volume(&spec.volume)),
            Found::Nothing(Some(_)) => Err(EngineError::new(
                Code::NotFound,
                format!("there is no version {text}"),
            )
            .hint(format!("`forkvol log {}` lists them", spec.volume))),
        }
    }

    /// What the administrator says of trust.
    pub fn trust(&self) -> Option<&TrustPolicy> {
        self.config.trust.as_ref()
    }

    fn live(&self, id: ForkId) -> Result<Arc<Live>> {
        self.forks
            .lock()
            .get(&id)
            .cloned()
            .ok_or_else(|| no_fork(&id.to_string()))
    }

    /// Finds a fork by its id, as text.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn find_fork(&self, text: &str) -> Result<ForkInfo> {
        let id = text.parse().map_err(|()| no_fork(text))?;
        self.info(&*self.live(id)?)
    }

    /// All forks, oldest first.
    pub fn forks(&self) -> Result<Vec<ForkInfo>> {
        let lives: Vec<Arc<Live>> = self.forks.lock().values().cloned().collect();
        let mut taken = None;
        let mut infos = lives
            .iter()
            .map(|live| self.info_of_many(live, &mut taken))
            .collect::<Result<Vec<_>>>()?;
        infos.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        Ok(infos)
    }

    /// A command has come in, which will hand over from core to core: none of them is to fall asleep meanwhile.
    pub fn rouse(&self) {
        self.wakeful.rouse();
    }

    /// How many forks are served to somebody.
    pub fn live_forks(&self) -> usize {
        self.forks
            .lock()
            .values()
            .filter(|live| live.is_served())
            .count()
    }

    /// Drops what a fork changed; returns the mounts that its caller is to take away. Never fails for being busy.
    ///
    /// # Errors
    /// `NotFound`; what the disk answered.
    pub fn abandon(&self, id: ForkId) -> Result<Vec<MountInfo>> {
        let never_mounted = self.live(id)?.record.lock().mounts.is_empty();
        let mounts = self.drop_fork(id)?;
        self.counters.abandoned.fetch_add(1, Ordering::Relaxed);
        if never_mounted {
            self.counters.degraded_mount.fetch_add(1, Ordering::Relaxed);
        }
        Ok(mounts)
    }

    fn drop_fork(&self, id: ForkId) -> Result<Vec<MountInfo>> {
        let live = self.live(id)?;
        let _one = live.alone();
        self.drop_alone(&live)
    }

    /// The same for who holds `committing`.
    fn drop_alone(&self, live: &Arc<Live>) -> Result<Vec<MountInfo>> {
        let id = live.id;
        if live.over.load(Ordering::Acquire) {
            return Err(no_fork(&id.to_string()));
        }
        match self.store.remove_fork(id) {
            Ok(()) => {}
            // What it wrote may be all that fills the disk, so that goes first; the record follows when there is room. Until then
            // the name of its folder says that it is over.
            Err(error @ StoreError::NoSpace { .. }) => {
                if !self.put_aside(id) {
                    return Err(error.into());
                }
                self.unforgotten.lock().push(id);
            }
            Err(error) => return Err(error.into()),
        }
        log::info!("fork {id} abandoned");
        Ok(self.finish(live, None))
    }

    /// Takes a fork off the list that was abandoned, or committed as `root`; what is left of it goes with its session, or at once
    /// if there is none.
    fn finish(&self, live: &Arc<Live>, root: Option<NodeId>) -> Vec<MountInfo> {
        self.forks.lock().remove(&live.id);
        live.ahead.lock().take();
        let mounts = match live.is_served() {
            true => live.record.lock().mounts.clone(),
            false => Vec::new(),
        };
        if root.is_none()
            && let Some(fork) = &live.fork
        {
            fork.end();
        }
        live.over.store(true, Ordering::Release);
        if live.is_served() {
            let root = root.map(|root| self.store.lease(root));
            self.leaving.lock().push((Arc::downgrade(live), root));
        } else {
            self.remove_delta(live);
        }
        let info = |at| MountInfo {
            fork: live.id,
            at,
            namespace: None,
        };
        mounts.into_iter().map(info).collect()
    }

    /// Forks of jobs whose mount is gone, and not those whose job is still on its way to mount them.
    pub fn orphans(&self) -> Vec<ForkId> {
        let forks = self.forks.lock();
        let gone = forks.values().filter(|live| {
            !live.is_served()
                && live.asker.strong_count() == 0
                && live.record.lock().options.job.is_some()
        });
        gone.map(|live| live.id).collect()
    }

    /// Takes no new forks from now on, and ends what would take long.
    pub fn drain(&self) {
        self.stopping.store(true, Ordering::Release);
        // What is ingested ahead makes way for good.
        for live in self.forks.lock().values() {
            live.waiting.fetch_add(1, Ordering::AcqRel);
        }
        self.store.end_soon();
    }

    /// Ends the engine: what was acknowledged is in the logs of the forks, and the database is flushed.
    ///
    /// # Errors
    /// `Busy` while forks are served, unless `force`; what the disk answered.
    pub fn shutdown(&self, force: bool) -> Result<()> {
        if !force && self.live_forks() > 0 {
            return Err(EngineError::new(Code::Busy, "forks are live")
                .hint("commit or abandon them, or stop with --drain or --force"));
        }
        self.drain();
        for thread in std::mem::take(&mut *self.upkeep.lock()) {
            thread.thread().unpark();
            thread.join().expect("a panic ends the process");
        }
        self.forget();
        Ok(self.store.end()?)
    }
}

fn usage(error: volume::NameError) -> EngineError {
    EngineError::new(Code::Usage, error.to_string())
}

fn no_volume(name: &str) -> EngineError {
    EngineError::new(Code::NotFound, format!("there is no volume {name}"))
        .hint("`forkvol volumes` lists them")
}

fn no_fork(text: &str) -> EngineError {
    EngineError::new(Code::NotFound, format!("there is no fork {text}"))
        .hint("`forkvol forks` lists them")
}

impl Live {
    fn new(
        record: store::Fork,
        fork: std::result::Result<Arc<Fork>, String>,
        asker: Weak<()>,
    ) -> Live {
        let (fork, why_lost) = match fork {
            Ok(fork) => (Some(fork), None),
            Err(why) => (None, Some(why)),
        };
        Live {
            id: record.id,
            fork,
            record: Mutex::new(record),
            sessions: Mutex::default(),
            requests: Arc::default(),
            committing: Mutex::default(),
            waiting: AtomicUsize::new(0),
            ahead: Mutex::default(),
            over: AtomicBool::new(false),
            in_doubt: AtomicBool::new(false),
            moving: Mutex::default(),
            why_lost,
            asker,
        }
    }
}
