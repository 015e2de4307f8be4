//! What is told of volumes, versions and forks.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use serde::Serialize;

use super::commit::never_commits;
use super::{Counters, Engine, Live, Result, no_volume};
use crate::store::{self, ForkId, LeftOut, MountPoint, Store, VersionRef};

/// Where a fork is mounted, so that its caller can take the mount away.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct MountInfo {
    pub fork: ForkId,
    pub at: MountPoint,
    /// The mount namespace in which it was mounted, while it is served.
    pub namespace: Option<u64>,
}

/// A volume. Times are nanoseconds since 1970, sizes bytes.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct VolumeInfo {
    pub name: String,
    pub head: Option<u64>,
    pub versions: u64,
    pub created: i64,
    pub used: i64,
    pub files: u64,
    pub logical_bytes: u64,
    pub forks: u64,
}

/// A version.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct VersionInfo {
    pub volume: String,
    pub number: u64,
    pub id: String,
    pub time: i64,
    /// The version that its fork was made from, as text.
    pub base: Option<String>,
    /// The head whose place it took.
    pub previous: Option<u64>,
    pub head: bool,
    pub pinned: bool,
    pub damaged: Option<String>,
    pub job: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub message: Option<String>,
    pub files: u64,
    pub logical_bytes: u64,
    pub new_bytes: u64,
    pub excluded: LeftOut,
}

/// A fork.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ForkInfo {
    pub id: String,
    /// live, unmounted or lost.
    pub state: &'static str,
    pub volume: String,
    pub base: Option<String>,
    /// Under which map of user ids the base was written.
    pub base_uid_map: Option<String>,
    pub hit: store::Hit,
    pub verdict: store::Verdict,
    /// Why it will not be committed, as far as that is known.
    pub refused: Option<String>,
    pub mounts: Vec<MountInfo>,
    pub job: Option<String>,
    pub created: i64,
    /// Seconds.
    pub age: f64,
    pub uid: u32,
    pub gid: u32,
    pub read_only: bool,
    pub ephemeral: bool,
    pub suid: bool,
    pub dev: bool,
    pub size: u64,
    /// Inodes that were changed, made or removed.
    pub changed: u64,
    /// Bytes charged against its size.
    pub bytes: u64,
    /// Bytes that its kernel has read, which is less than what programs have.
    pub read: u64,
    /// Bytes of files that the commit under way has gone through, or the last one.
    pub ingested: u64,
    pub requests: BTreeMap<&'static str, u64>,
}

impl Engine {
    /// A version as people write it: `npm@42`.
    pub(super) fn version_text(&self, at: VersionRef) -> Result<String> {
        let volume = self.store.volume_by_id(at.volume)?;
        let name = volume.map_or_else(|| format!("#{}", at.volume), |volume| volume.name);
        Ok(format!("{name}@{}", at.number))
    }

    pub(super) fn info(&self, live: &Live) -> Result<ForkInfo> {
        self.info_of_many(live, &mut None)
    }

    /// The same for one of several forks: `taken` keeps what untrusted volumes take, which is counted once for all.
    pub(super) fn info_of_many(&self, live: &Live, taken: &mut Option<u64>) -> Result<ForkInfo> {
        let namespaces = live.namespaces();
        let record = live.record.lock().clone();
        let volume = self.store.volume_by_id(record.volume)?;
        let delta = live
            .fork
            .as_ref()
            .map(|fork| fork.delta_size())
            .unwrap_or_default();
        Ok(ForkInfo {
            id: live.id.to_string(),
            state: match (&live.fork, !namespaces.is_empty()) {
                (None, _) => "lost",
                (Some(_), true) => "live",
                (Some(_), false) => "unmounted",
            },
            volume: volume.map_or_else(|| format!("#{}", record.volume), |volume| volume.name),
            base: record
                .base
                .map(|base| self.version_text(base))
                .transpose()?,
            base_uid_map: match record.base {
                Some(base) => self
                    .store
                    .version(base)?
                    .and_then(|version| version.uid_map),
                None => None,
            },
            hit: record.hit,
            verdict: record.verdict,
            refused: match never_commits(&record.options) {
                Some(kind) => Some(format!("it is {kind}")),
                None => {
                    let verdict = self.check_verdict(&record, taken);
                    verdict.err().map(|error| error.message)
                }
            },
            mounts: record
                .mounts
                .into_iter()
                .map(|at| MountInfo {
                    fork: record.id,
                    namespace: namespaces.get(&at.folder).copied().flatten(),
                    at,
                })
                .collect(),
            job: record.options.job,
            created: record.created,
            age: (super::now() - record.created) as f64 / 1e9,
            uid: record.uid,
            gid: record.gid,
            read_only: record.options.read_only,
            ephemeral: record.options.ephemeral,
            suid: record.options.suid,
            dev: record.options.dev,
            size: record.options.size,
            changed: delta.changed + record.moved.map_or(0, |moved| moved.changed),
            bytes: delta.bytes,
            read: live.requests.read(),
            ingested: live.fork.as_ref().map_or(0, |fork| fork.ingested()),
            requests: live.requests.counts(),
        })
    }

    pub(super) fn version_info(
        &self,
        volume: &store::Volume,
        version: &store::Version,
    ) -> Result<VersionInfo> {
        let at = version.at();
        Ok(VersionInfo {
            volume: volume.name.clone(),
            number: version.number,
            id: format!("x{}", Store::version_id(version).to_hex()),
            time: version.time,
            base: version
                .base
                .map(|base| self.version_text(base))
                .transpose()?,
            previous: (version.previous > 0).then_some(version.previous),
            head: volume.head == version.number,
            pinned: self.store.is_pinned(at)?,
            damaged: self.store.damage(at)?,
            job: version.job.clone(),
            labels: version.labels.clone(),
            message: version.message.clone(),
            files: version.files,
            logical_bytes: version.logical_bytes,
            new_bytes: version.new_bytes,
            excluded: version.excluded.clone(),
        })
    }

    fn volume_info(&self, volume: &store::Volume) -> Result<VolumeInfo> {
        let versions = self.store.versions(volume.id)?;
        let head = versions
            .iter()
            .find(|version| version.number == volume.head);
        let forks = self
            .forks
            .lock()
            .values()
            .filter(|live| live.record.lock().volume == volume.id)
            .count();
        Ok(VolumeInfo {
            name: volume.name.clone(),
            head: head.map(|head| head.number),
            versions: versions.len() as u64,
            created: volume.created,
            used: volume.used,
            files: head.map_or(0, |head| head.files),
            logical_bytes: head.map_or(0, |head| head.logical_bytes),
            forks: forks as u64,
        })
    }

    /// All volumes, by name.
    pub fn volumes(&self) -> Result<Vec<VolumeInfo>> {
        self.store
            .volumes()?
            .iter()
            .map(|volume| self.volume_info(volume))
            .collect()
    }

    pub(super) fn volume_record(&self, name: &str) -> Result<store::Volume> {
        crate::volume::check_name(name).map_err(super::usage)?;
        self.store.volume(name)?.ok_or_else(|| no_volume(name))
    }

    /// One volume.
    pub fn volume(&self, name: &str) -> Result<VolumeInfo> {
        self.volume_info(&self.volume_record(name)?)
    }

    /// The versions of a volume, newest first.
    pub fn log(&self, name: &str) -> Result<Vec<VersionInfo>> {
        let volume = self.volume_record(name)?;
        self.store
            .versions(volume.id)?
            .iter()
            .map(|version| self.version_info(&volume, version))
            .collect()
    }

    /// Counters since the daemon started, by name.
    pub fn counters(&self) -> BTreeMap<&'static str, u64> {
        let Counters {
            forks,
            commits,
            unchanged,
            abandoned,
            refused,
            gcs,
            freed_bytes,
            removed_volumes,
            removed_versions,
            hits_exact,
            hits_stale,
            hits_fallback,
            hits_empty,
            degraded_no_space,
            degraded_policy,
            degraded_damaged,
            degraded_mount,
            degraded_other,
        } = &self.counters;
        let all = [
            ("forks", forks),
            ("commits", commits),
            ("unchanged", unchanged),
            ("abandoned", abandoned),
            ("refused", refused),
            ("gcs", gcs),
            ("freed_bytes", freed_bytes),
            ("removed_volumes", removed_volumes),
            ("removed_versions", removed_versions),
            ("hits_exact", hits_exact),
            ("hits_stale", hits_stale),
            ("hits_fallback", hits_fallback),
            ("hits_empty", hits_empty),
            ("degraded_no_space", degraded_no_space),
            ("degraded_policy", degraded_policy),
            ("degraded_damaged", degraded_damaged),
            ("degraded_mount", degraded_mount),
            ("degraded_other", degraded_other),
        ];
        all.into_iter()
            .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
            .collect()
    }
}
