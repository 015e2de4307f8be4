//! What moves heads, or takes versions away, beside a commit: rollback, reset, rename, removal, pins, repair.

use std::sync::Arc;

use super::{Code, Engine, EngineError, Live, MountInfo, Result, VersionInfo, now};
use crate::store::{self, ForkId, Publish, VersionRef};

impl Engine {
    /// Makes an older version the head again, as a new version.
    pub fn rollback(&self, name: &str, text: &str) -> Result<VersionInfo> {
        let volume = self.volume_record(name)?;
        let text = if text.bytes().all(|b| b.is_ascii_digit()) {
            format!("{name}@{text}")
        } else {
            text.into()
        };
        let _stays = self.bases.read();
        let (from, version) = self.find_version(&text)?;
        if from.id != volume.id {
            return Err(EngineError::new(
                Code::Usage,
                format!("{text} is not a version of {name}"),
            ));
        }
        let at = version.at();
        if let Some(why) = self.store.damage(at)? {
            let message = format!("{text} was set aside: {why}");
            return Err(EngineError::new(Code::Damaged, message).hint(format!(
                "`forkvol log {name}` shows which versions are whole"
            )));
        }
        let again = store::Version {
            base: Some(at),
            time: now(),
            message: Some(format!("rollback to {}", version.number)),
            new_bytes: 0,
            ..version.clone()
        };
        let made = self.store.publish(
            &[],
            Publish {
                versions: vec![again],
                takes_back: vec![(volume.id, version.number)],
                ..Publish::default()
            },
        )?;
        let made = made
            .first()
            .ok_or_else(|| EngineError::new(Code::Failed, "nothing was published"))?;
        log::info!(
            "{name} rolled back to {} as {}",
            version.number,
            made.number
        );
        self.published_info(made)
    }

    /// Lets the next fork of a volume start empty; its history stays.
    pub fn reset_volume(&self, name: &str) -> Result<()> {
        let volume = self.volume_record(name)?;
        log::info!("{name} reset");
        Ok(self.store.update_volume(volume.id, |volume| {
            if volume.head > 0 {
                volume.taken_back.push((1, volume.next - 1));
            }
            volume.head = 0;
        })?)
    }

    /// Removes a volume with its versions.
    ///
    /// # Errors
    /// `Busy` while it has forks and `Policy` while a version is pinned, unless `force`, which abandons and removes all the same.
    pub fn remove_volume(&self, name: &str, force: bool) -> Result<Vec<MountInfo>> {
        let volume = self.volume_record(name)?;
        let mut mounts = Vec::new();
        loop {
            // Nothing is forked from it between the look and the end.
            let alone = self.bases.write();
            let forks = self.forks_of(volume.id);
            if forks.is_empty() {
                if !force {
                    self.refuse_pinned(&volume)?;
                }
                self.store.remove_volume(volume.id)?;
                log::info!("volume {name} removed");
                return Ok(mounts);
            }
            drop(alone);
            if !force {
                let ids: Vec<String> = forks.iter().map(ToString::to_string).collect();
                return Err(EngineError::new(
                    Code::Busy,
                    format!("volume {name} has forks: {}", ids.join(", ")),
                )
                .hint("commit or abandon them, or use --force, which abandons them"));
            }
            for id in forks {
                match self.abandon(id) {
                    Ok(taken) => mounts.extend(taken),
                    // Somebody else ended it.
                    Err(error) if error.code == Code::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }

    fn refuse_pinned(&self, volume: &store::Volume) -> Result<()> {
        for version in self.store.versions(volume.id)? {
            let at = version.at();
            if self.store.is_pinned(at)? {
                let name = format!("{}@{}", volume.name, version.number);
                let message = format!("{name} is pinned, so {} stays", volume.name);
                return Err(EngineError::new(Code::Policy, message)
                    .hint(format!("forkvol unpin {name}, or use --force")));
            }
        }
        Ok(())
    }

    /// The forks of a volume, and those of others that were made from it.
    fn forks_of(&self, volume: u64) -> Vec<ForkId> {
        let is_of = |live: &&Arc<Live>| {
            let record = live.record.lock();
            record.volume == volume || record.base.is_some_and(|base| base.volume == volume)
        };
        let forks = self.forks.lock();
        forks.values().filter(is_of).map(|live| live.id).collect()
    }

    /// Gives a volume another name; its forks go on.
    pub fn rename_volume(&self, old: &str, new: &str) -> Result<()> {
        self.volume_record(old)?;
        crate::volume::check_name(new).map_err(super::usage)?;
        if !self.store.rename_volume(old, new)? {
            let message = format!("there is a volume {new} already");
            return Err(EngineError::new(Code::Usage, message)
                .hint("choose another name, or remove that volume"));
        }
        log::info!("volume {old} is {new} now");
        Ok(())
    }

    /// Keeps a version from being removed, or lets it go.
    pub fn pin(&self, text: &str, pinned: bool) -> Result<VersionInfo> {
        let _stays = self.bases.read();
        let (volume, version) = self.find_version(text)?;
        self.store.set_pin(version.at(), pinned)?;
        self.version_info(&volume, &version)
    }

    /// Sets damaged versions aside and makes the newest whole one of each volume the head. With `remove` the damaged ones are
    /// removed, but for those that forks are made from.
    ///
    /// # Errors
    /// What the disk answered.
    pub fn repair(&self, remove: bool) -> Result<Repaired> {
        let check = self.store.check()?;
        let mut repaired = Repaired::default();
        for problem in &check.problems {
            if let Some(at) = problem.at {
                self.set_aside(at, &problem.what)?;
            }
        }
        for volume in self.store.volumes()? {
            let head = crate::volume::head(&self.store, &volume)?;
            let number = head.map_or(0, |version| version.number);
            let damaged = volume.head;
            if number != damaged {
                let mut is_moved = false;
                self.store.update_volume(volume.id, |volume| {
                    // What was committed meanwhile is whole, and stays the head.
                    is_moved = volume.head == damaged;
                    if is_moved {
                        volume.head = number;
                    }
                })?;
                if is_moved {
                    log::warn!("the head of {} is {number} now", volume.name);
                    repaired.heads.push((volume.name.clone(), number));
                }
            }
            for version in self.store.versions(volume.id)? {
                let at = version.at();
                if self.store.damage(at)?.is_none() {
                    continue;
                }
                let name = format!("{}@{}", volume.name, version.number);
                let alone = self.bases.write();
                let removed = remove && !self.is_forked(at);
                if removed {
                    self.store.remove_version(at)?;
                }
                drop(alone);
                if removed {
                    log::warn!("{name} removed: it is damaged");
                    repaired.removed.push(name);
                } else {
                    repaired.set_aside.push(name);
                }
            }
        }
        repaired.check = check;
        Ok(repaired)
    }

    /// Lets nothing be forked from a damaged version any more.
    pub(super) fn set_aside(&self, at: VersionRef, why: &str) -> Result<()> {
        if self.store.damage(at)?.is_none() {
            self.store.set_aside(at, why)?;
            log::error!("{} set aside: {why}", self.version_text(at)?);
        }
        Ok(())
    }

    fn is_forked(&self, at: VersionRef) -> bool {
        let forks = self.forks.lock();
        forks
            .values()
            .any(|live| live.record.lock().base == Some(at))
    }
}

/// What a repair did.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Repaired {
    #[serde(flatten)]
    pub check: store::CheckReport,
    /// Damaged versions that are kept, by name.
    pub set_aside: Vec<String>,
    pub removed: Vec<String>,
    /// Volumes that have another head now; 0 for none.
    pub heads: Vec<(String, u64)>,
}
