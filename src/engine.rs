//! The verbs of forkvol on one open store: what a daemon is asked to do. Owns the store, the forks and their sessions.
//!
//! Lock order: the table of forks is held for a moment and never while anything else is done; a fork's `committing` before its
//! gate; several forks in order of their ids.

mod archive;
mod commit;
mod error;
mod info;
mod read;
mod retention;
mod serving;
#[cfg(test)]
mod tests;
mod trust;
mod upkeep;
mod versions;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, MutexGuard, RwLock};

use crate::fork::error::FsError;
use crate::fork::{Excludes, Fork, Origin, Private};
use crate::mount::{Requests, Wakeful};
use crate::store::{
    self, ForkId, ForkOptions, Hit, Ingest, Step, Store, StoreError, StoreOptions, Verdict,
    VersionRef,
};
use crate::tree::NodeId;
use crate::volume::{self, Found, VersionSpec};

pub use archive::Imported;
pub use commit::{CommitRequest, Committed, When};
use error::Result;
pub use error::{Code, EngineError, MORE_FILES};
pub use info::{ForkInfo, MountInfo, VersionInfo, VolumeInfo};
pub use read::{DiffEntry, DiffKind, ListEntry};
pub use retention::{Collected, Keep, Policy};
pub use serving::Served;
use serving::Sessions;
pub use store::{CheckReport, GcReport, LeftOut, Settled, Stats};
pub use trust::{Asker, JobFacts, TrustPolicy};
pub use versions::Repaired;

/// How an engine works.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Bytes of memory for decoded nodes and chunks.
    pub cache: u64,
    /// Bytes of the disk that forks may not fill; None: 2 %, at least 1 GiB.
    pub reserve: Option<u64>,
    /// Threads that ingest; None: one a core.
    pub threads: Option<usize>,
    /// A job's fork without a mount is abandoned after this.
    pub orphan_after: Duration,
    /// Bytes of memory that the table of a fork may take before it moves to a private root.
    pub table: u64,
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
            threads: None,
            orphan_after,
            table: 64 << 20,
            wakeful: false,
            retention: Policy::default(),
            trust: None,
        }
    }
}

/// Whose the files of a fork appear to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    Keep,
    Ids(u32, Option<u32>),
}

/// What a fork is to be.
#[derive(Clone, Debug)]
pub struct ForkRequest {
    pub volume: String,
    pub from: Option<String>,
    pub parents: Vec<String>,
    pub read_only: bool,
    pub ephemeral: bool,
    pub size: u64,
    pub labels: BTreeMap<String, String>,
    pub excludes: Vec<String>,
    pub default_excludes: bool,
    pub owner: Owner,
    pub acl: bool,
    pub suid: bool,
    pub dev: bool,
    pub strict: bool,
    pub job: Option<String>,
    /// How the user ids of who asks differ from the machine's.
    pub uid_map: Option<String>,
    pub verdict: Verdict,
    /// What the volumes of an untrusted job are called by.
    pub scope: String,
    /// Who asks.
    pub uid: u32,
    pub gid: u32,
}

/// Counters since the daemon started.
#[derive(Debug, Default)]
pub struct Counters {
    pub forks: AtomicU64,
    pub commits: AtomicU64,
    pub unchanged: AtomicU64,
    pub abandoned: AtomicU64,
    pub refused: AtomicU64,
    pub gcs: AtomicU64,
    pub freed_bytes: AtomicU64,
    /// By retention.
    pub removed_volumes: AtomicU64,
    pub removed_versions: AtomicU64,
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
    why_lost: Option<String>,
}

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
        let mut ahead = self.ahead.lock();
        if ahead.as_ref().is_some_and(|ingest| ingest.is_lost()) {
            if let Some(fork) = &self.fork {
                fork.forget_ingested();
            }
            ahead.take();
        }
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
    /// The store is beyond its limit, and gc could not help.
    crowded: AtomicBool,
    counters: Counters,
    wakeful: Arc<Wakeful>,
    stopping: AtomicBool,
    upkeep: Mutex<Vec<std::thread::JoinHandle<()>>>,
    /// Forks that are over and may still be mounted, with the root that a commit gave them.
    leaving: Mutex<Vec<(Weak<Live>, Option<NodeId>)>>,
    /// Abandoned while the disk was full: their records are still there.
    unforgotten: Mutex<Vec<ForkId>>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Engine({})", self.store.dir().display())
    }
}

fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
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
        };
        let store = Store::open(dir, options)?;
        let boot = boot_id()?;
        let mut forks = HashMap::new();
        let records = store.forks().map_err(|error| error.at_open(dir))?;
        for record in records {
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
            unforgotten: Mutex::default(),
        });
        engine.remove_strays();
        *engine.upkeep.lock() = upkeep::start(&engine)?;
        Ok(engine)
    }

    fn fork_dir(&self, id: ForkId) -> PathBuf {
        self.store.dir().join("forks").join(id.to_string())
    }

    fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(2, usize::from);
        self.config.threads.unwrap_or_else(cores)
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

    /// The version that a fork begins with: the one asked for, or the first of head and parents that exists.
    fn choose_base(
        &self,
        request: &ForkRequest,
    ) -> Result<Option<(store::Volume, store::Version)>> {
        if let Some(from) = &request.from {
            return self.find_version(from).map(Some);
        }
        for text in std::iter::once(&request.volume).chain(&request.parents) {
            match self.find_version(text) {
                Ok(found) => return Ok(Some(found)),
                Err(error) if error.code == Code::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Makes a fork. It costs the same whatever the volume holds.
    ///
    /// # Errors
    /// `Usage`, `NotFound`, `NoSpace`; what the disk answered.
    pub fn fork(&self, request: ForkRequest) -> Result<ForkInfo> {
        volume::check_name(&request.volume).map_err(usage)?;
        if self.stopping.load(Ordering::Acquire) {
            return Err(EngineError::new(Code::Busy, "the daemon is stopping"));
        }
        Excludes::new(&request.excludes, request.default_excludes)
            .map_err(|why| EngineError::new(Code::Usage, why))?;
        if self.store.room() == 0 {
            return Err(EngineError::new(
                Code::NoSpace,
                "the disk of the store has no room above its reserve",
            )
            .hint("free some room, or run `forkvol gc`"));
        }
        if self.crowded.load(Ordering::Acquire) {
            return Err(EngineError::new(
                Code::NoSpace,
                "the store is beyond the limit of its configuration",
            )
            .hint("remove volumes, unpin versions, or raise `limit`"));
        }
        let request = trust::confine(self.config.trust.as_ref(), request.verdict, request)?;
        volume::check_name(&request.volume).map_err(usage)?;
        let _stays = self.bases.read();
        loop {
            let base = self.choose_base(&request)?;
            let at = base.as_ref().map(|(volume, version)| VersionRef {
                volume: volume.id,
                number: version.number,
            });
            match (self.fork_of(&request, base), at) {
                // The next one that is whole is taken instead, unless this one was asked for.
                (Err(error), Some(at)) if error.code == Code::Damaged && request.from.is_none() => {
                    self.set_aside(at, &error.message)?;
                }
                (result, _) => return result,
            }
        }
    }

    fn fork_of(
        &self,
        request: &ForkRequest,
        base: Option<(store::Volume, store::Version)>,
    ) -> Result<ForkInfo> {
        let volume = self.store.create_volume(&request.volume, now())?;
        self.store.touch_volume(volume.id, now())?;
        if let Some((of, _)) = base.as_ref().filter(|(of, _)| of.id != volume.id) {
            self.store.touch_volume(of.id, now())?;
        }
        let root = base
            .as_ref()
            .map_or_else(|| crate::tree::empty().0, |(_, version)| version.root);
        // Kept from gc until the fork's own record and lease do it.
        let _lease = self.store.lease(root);
        let mut bits = [0; 8];
        crate::sys::random(&mut bits)
            .map_err(|e| EngineError::new(Code::Failed, format!("random numbers: {e}")))?;
        let id = ForkId(u64::from_le_bytes(bits) >> 16);
        let has_acl = base.as_ref().is_some_and(|(_, version)| version.has_acl);
        let owner = match request.owner {
            Owner::Keep => None,
            Owner::Ids(uid, gid) => Some((uid, gid.unwrap_or(request.gid))),
        };
        let hit = match &base {
            None => Hit::Empty,
            Some((of, _)) if of.id != volume.id => Hit::Fallback,
            Some((_, version)) => {
                let has = |(key, value)| version.labels.get(key) == Some(value);
                if request.labels.iter().all(has) {
                    Hit::Exact
                } else {
                    Hit::Stale
                }
            }
        };
        let record = store::Fork {
            id,
            volume: volume.id,
            hit,
            verdict: request.verdict,
            base: base.map(|(volume, version)| VersionRef {
                volume: volume.id,
                number: version.number,
            }),
            root,
            moved: None,
            first_segment: 1,
            next_epoch: 1,
            boot: boot_id()?,
            options: ForkOptions {
                read_only: request.read_only,
                ephemeral: request.ephemeral,
                size: request.size,
                labels: request.labels.clone(),
                owner,
                acl: request.acl || has_acl,
                suid: request.suid,
                dev: request.dev,
                job: request.job.clone(),
                excludes: request.excludes.clone(),
                default_excludes: request.default_excludes,
            },
            uid: request.uid,
            gid: request.gid,
            uid_map: request.uid_map.clone(),
            created: now(),
            mounts: Vec::new(),
        };
        let origin = origin(&self.store, &record)?;
        let root_owner = owner.unwrap_or((request.uid, request.gid));
        let fork = Fork::create(
            self.store.clone(),
            &self.fork_dir(id),
            origin,
            root_owner,
            now(),
        )?;
        self.store.reach(Step::DeltaMade)?;
        self.store.put_fork(&record)?;
        let live = Arc::new(Live::new(record, Ok(Arc::new(fork))));
        self.forks.lock().insert(id, live.clone());
        self.counters.forks.fetch_add(1, Ordering::Relaxed);
        let info = self.info(&live)?;
        log::info!(
            "fork {id} of {} from {}",
            info.volume,
            info.base.as_deref().unwrap_or("nothing")
        );
        Ok(info)
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
        let mut infos = lives
            .iter()
            .map(|live| self.info(live))
            .collect::<Result<Vec<_>>>()?;
        infos.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        Ok(infos)
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
        let live = self.live(id)?;
        let _one = live.alone();
        match self.store.remove_fork(id) {
            Ok(()) => {}
            // What it wrote may be all that fills the disk, so that goes first; the record follows when there is room.
            Err(StoreError::NoSpace) => self.unforgotten.lock().push(id),
            Err(error) => return Err(error.into()),
        }
        self.counters.abandoned.fetch_add(1, Ordering::Relaxed);
        log::info!("fork {id} abandoned");
        Ok(self.finish(&live, None))
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
            self.leaving.lock().push((Arc::downgrade(live), root));
        } else {
            self.remove_delta(live);
        }
        mounts.into_iter().map(MountInfo::from).collect()
    }

    /// Forks of jobs whose mount is gone.
    pub fn orphans(&self) -> Vec<ForkId> {
        let forks = self.forks.lock();
        let gone = forks
            .values()
            .filter(|live| !live.is_served() && live.record.lock().options.job.is_some());
        gone.map(|live| live.id).collect()
    }

    /// Takes no new forks from now on.
    pub fn drain(&self) {
        self.stopping.store(true, Ordering::Release);
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
        Ok(self.store.flush()?)
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
    fn new(record: store::Fork, fork: std::result::Result<Arc<Fork>, String>) -> Live {
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
            why_lost,
        }
    }
}

/// What a fork is made from, by its record.
fn origin(store: &Store, record: &store::Fork) -> std::result::Result<Origin, StoreError> {
    let version = match record.base {
        Some(base) => store.version(base)?,
        None => None,
    };
    let (blocks, files) = version.as_ref().map_or((0, 0), |v| (v.blocks, v.files));
    let totals = record.moved.unwrap_or_default().totals;
    Ok(Origin {
        id: record.id,
        root: record.root,
        private: record.moved.map(|moved| Private {
            version: version
                .as_ref()
                .map_or_else(|| crate::tree::empty().0, |v| v.root),
            charged: moved.charged,
        }),
        holds: (
            blocks.saturating_add_signed(totals.blocks),
            files.saturating_add_signed(totals.files),
        ),
        first_segment: record.first_segment,
        has_links: totals.has_links || version.as_ref().is_some_and(|v| v.has_links),
        size: record.options.size,
        excludes: Excludes::new(&record.options.excludes, record.options.default_excludes)
            .map_err(|what| StoreError::Corrupt { what })?,
    })
}

/// Opens a fork that an earlier daemon left behind.
fn reopen(store: &Arc<Store>, record: store::Fork, boot: &str) -> Live {
    let fork = if record.boot == boot {
        let id = record.id;
        let dir = store.dir().join("forks").join(id.to_string());
        let opened = origin(store, &record)
            .map_err(FsError::from)
            .and_then(|origin| Fork::open(store.clone(), &dir, origin));
        opened.map(Arc::new).map_err(|error| {
            log::error!("fork {id} cannot be opened: {error}");
            error.to_string()
        })
    } else {
        Err("it is of another boot of this machine".into())
    };
    if let Ok(fork) = &fork {
        // Nobody reaches the orphans of a session that is gone.
        fork.drop_orphans();
    }
    Live::new(record, fork)
}
