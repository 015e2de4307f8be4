//! fork: a private view of a version is made, or found again after a restart.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};

use super::{Code, Engine, EngineError, ForkInfo, Live, Result, boot_id, now, trust, usage};
use crate::fork::error::FsError;
use crate::fork::{Excludes, Fork, Origin, Private};
use crate::store::{self, ForkId, ForkOptions, Hit, Step, Store, StoreError, Verdict};
use crate::volume;

/// Whose the files of a fork appear to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
    pub job: Option<String>,
    /// An import unpacks into it.
    pub import: bool,
    /// How the user ids of who asks differ from the machine's.
    pub uid_map: Option<String>,
    pub verdict: Verdict,
    /// What the volumes of an untrusted job are called by.
    pub scope: String,
    /// Who asks.
    pub uid: u32,
    pub gid: u32,
    /// Lives for as long as whoever asks may still come to mount the fork.
    pub asker: Weak<()>,
}

impl Engine {
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
        let volume = request.volume.clone();
        let outcome = self.make_fork(request);
        self.counters.forked(&outcome);
        if let Err(error) = &outcome {
            log::warn!("no fork of {volume}: {error}");
        }
        outcome
    }

    /// As [`Engine::fork`], for the daemon itself.
    pub(super) fn make_fork(&self, request: ForkRequest) -> Result<ForkInfo> {
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
        self.refuse_if_crowded()?;
        let request = trust::confine(self.config.trust.as_ref(), request.verdict, request)?;
        volume::check_name(&request.volume).map_err(usage)?;
        let _stays = self.bases.read();
        loop {
            let base = self.choose_base(&request)?;
            let at = base.as_ref().map(|(_, version)| version.at());
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
        let bits = crate::sys::random()
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
            Some((_, version)) if version.has_labels(&request.labels) => Hit::Exact,
            Some(_) => Hit::Stale,
        };
        let record = store::Fork {
            id,
            volume: volume.id,
            hit,
            verdict: request.verdict,
            base: base.map(|(_, version)| version.at()),
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
                import: request.import,
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
        let live = Arc::new(Live::new(record, Ok(Arc::new(fork)), request.asker.clone()));
        self.forks.lock().insert(id, live.clone());
        let info = self.info(&live)?;
        log::info!(
            "fork {id} of {} from {}",
            info.volume,
            info.base.as_deref().unwrap_or("nothing")
        );
        Ok(info)
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
pub(super) fn reopen(store: &Arc<Store>, record: store::Fork, boot: &str) -> Live {
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
    Live::new(record, fork, Weak::new())
}
