//! commit: seal, ingest and publish the forks of one request as one; and the move of a large table to a private root.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{Code, Engine, EngineError, Live, MountInfo, Result, VersionInfo, no_fork, now};
use crate::commit::{Changed, Ingested, changed, charge, prepare};
use crate::fork::Private;
use crate::store::{
    self, ForkChange, ForkId, ForkOptions, Ingest, LeftOut, Publish, StoreError, VersionRef,
};
use crate::tree::NodeId;

/// When a commit makes a version.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    Always,
    /// Only if more than times changed.
    OnChange,
    /// Only if the volume has no version.
    IfMissing,
}

/// What a commit is to be.
#[derive(Clone, Debug)]
pub struct CommitRequest {
    pub keep: bool,
    pub labels: BTreeMap<String, String>,
    pub message: Option<String>,
    /// Refuse unless this is the head.
    pub if_head: Option<String>,
    /// Refuse unless the head is what the fork was made from.
    pub if_base: bool,
    /// Commit even forks of versions that were taken back.
    pub force: bool,
    /// When the commit of each fork makes a version; of one that is not named here: always.
    pub when: BTreeMap<ForkId, When>,
}

/// What came of one fork.
#[derive(Clone, Debug)]
pub struct Committed {
    pub fork: ForkId,
    /// None: neither content nor labels had changed, so there is no new version.
    pub version: Option<VersionInfo>,
    /// The mounts that the caller is to take away.
    pub mounts: Vec<MountInfo>,
    /// What the fork changed and no version gets.
    pub excluded: LeftOut,
}

/// The versions that a publish made, by the place of their forks in the request. Forks without one are unchanged.
type Published = BTreeMap<usize, store::Version>;

/// What a fork was made to be that is never committed, whoever asks.
pub(super) fn never_commits(options: &ForkOptions) -> Option<&'static str> {
    if options.read_only {
        Some("read-only")
    } else if options.ephemeral {
        Some("ephemeral")
    } else {
        None
    }
}

/// What a version of this fork is labelled with: what the fork was wanted with, and what the commit says.
fn labels(options: &ForkOptions, request: &CommitRequest) -> BTreeMap<String, String> {
    let mut labels = options.labels.clone();
    labels.extend(request.labels.clone());
    labels
}

impl Engine {
    /// Commits forks, all or none. The new versions are heads when this returns.
    ///
    /// # Errors
    /// `NotFound`, `Policy`, `HeadMoved`, `NoSpace`; the forks go on as before then.
    pub fn commit(&self, mut forks: Vec<ForkId>, request: CommitRequest) -> Result<Vec<Committed>> {
        forks.sort_unstable();
        forks.dedup();
        let lives = forks
            .iter()
            .map(|id| self.live(*id))
            .collect::<Result<Vec<_>>>()?;
        let _one_each: Vec<_> = lives.iter().map(|live| live.alone()).collect();
        let result = self.commit_locked(&lives, &request);
        if let Err(error) = &result {
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
            log::warn!("commit of {forks:?} refused: {error}");
        }
        result
    }

    fn commit_locked(
        &self,
        lives: &[Arc<Live>],
        request: &CommitRequest,
    ) -> Result<Vec<Committed>> {
        let mut taken = None;
        for live in lives {
            if live.over.load(Ordering::Acquire) {
                return Err(no_fork(&live.id.to_string()));
            }
            live.fork()?;
            let record = live.record.lock().clone();
            if let Some(kind) = never_commits(&record.options) {
                let message = format!("fork {} is {kind} and never commits", live.id);
                return Err(EngineError::new(Code::Policy, message)
                    .hint(format!("`forkvol abandon {}` drops it", live.id)));
            }
            self.check_verdict(&record, &mut taken)?;
        }
        match self.promote(lives, request) {
            // The forks still have all of it.
            Err(error) if error.lost => {
                log::warn!("a commit begins again: {error}");
                self.promote(lives, request)
            }
            result => result,
        }
    }

    /// Seals, ingests and publishes forks; they are as before if that fails.
    fn promote(&self, lives: &[Arc<Live>], request: &CommitRequest) -> Result<Vec<Committed>> {
        self.check_heads(lives, request)?;
        let mut prepared: Vec<(usize, Ingested)> = Vec::new();
        for (index, live) in lives.iter().enumerate() {
            live.drop_lost();
            match prepare(live.fork()?, request.keep, self.config.threads) {
                Ok(ingested) => prepared.push((index, ingested)),
                Err(error) => {
                    prepared.iter().for_each(|(_, done)| done.thaw());
                    return Err(error.into());
                }
            }
        }
        let published = loop {
            match self.publish(lives, request, &prepared) {
                Ok(Some(published)) => break published,
                // A head has moved since it was looked at.
                Ok(None) => {}
                Err(error) => {
                    for (index, done) in &prepared {
                        done.thaw();
                        lives[*index].drop_ahead();
                        lives[*index].in_doubt.store(true, Ordering::Release);
                    }
                    // Whatever it ran into then is no damage.
                    return Err(
                        match prepared.iter().any(|(_, done)| done.ingest.is_lost()) {
                            true => StoreError::Lost.into(),
                            false => error,
                        },
                    );
                }
            }
        };
        self.conclude(lives, request, &prepared, &published)
    }

    /// Fails if a head is not what the caller or the history of the volume says it must be; returns the volumes with their heads.
    fn check_heads(&self, lives: &[Arc<Live>], request: &CommitRequest) -> Result<Vec<(u64, u64)>> {
        let mut heads = Vec::new();
        let wanted = request
            .if_head
            .as_deref()
            .map(|text| self.find_version(text))
            .transpose()?;
        for live in lives {
            let (volume, base) = {
                let record = live.record.lock();
                (record.volume, record.base)
            };
            let volume = self.volume_that_stays(volume)?;
            heads.push((volume.id, volume.head));
            let moved = |why: String, hint| Err(EngineError::new(Code::HeadMoved, why).hint(hint));
            let text = |number| match number {
                0 => "nothing".into(),
                _ => format!("{}@{number}", volume.name),
            };
            let own = base
                .filter(|base| base.volume == volume.id)
                .map_or(0, |base| base.number);
            if let Some((_, version)) = &wanted
                && (version.volume, version.number) != (volume.id, volume.head)
            {
                return moved(
                    format!("the head of {} is {}", volume.name, text(volume.head)),
                    "fork that, or commit without --if-head",
                );
            }
            if request.if_base && volume.head != own {
                let (head, own) = (text(volume.head), text(own));
                return moved(
                    format!(
                        "the head of {} is {head}, the fork was made from {own}",
                        volume.name
                    ),
                    "fork the head, or commit without --if-base",
                );
            }
            if let Some(base) = base
                && let Some(why) = self.store.damage(base)?
                && !request.force
            {
                return Err(EngineError::new(
                    Code::Damaged,
                    format!("fork {} was made from a damaged version: {why}", live.id),
                )
                .hint("abandon it; --force commits it all the same"));
            }
            let taken_back = volume
                .taken_back
                .iter()
                .any(|(first, last)| (*first..=*last).contains(&own));
            if taken_back && !request.force {
                return moved(
                    format!(
                        "fork {} was made from {}, which was taken back",
                        live.id,
                        text(own)
                    ),
                    "abandon it; --force commits it all the same",
                );
            }
        }
        Ok(heads)
    }

    /// Makes versions of what was prepared, if the heads are still those that were looked at.
    fn publish(
        &self,
        lives: &[Arc<Live>],
        request: &CommitRequest,
        prepared: &[(usize, Ingested)],
    ) -> Result<Option<Published>> {
        let mut publish = Publish {
            heads: self.check_heads(lives, request)?,
            ..Publish::default()
        };
        let mut ingests: Vec<Arc<Ingest>> = Vec::new();
        // Which fork each version is of.
        let mut made = Vec::new();
        for (index, done) in prepared {
            let live = &lives[*index];
            // Of what gets no version, too: whoever still holds the mount reads it.
            ingests.extend(live.ahead.lock().clone());
            ingests.push(done.ingest.clone());
            let is_new = self.is_new(live, request, done)?;
            if is_new {
                publish
                    .versions
                    .push(self.new_version(live, request, done)?);
                made.push(*index);
            }
            if !request.keep {
                let unused = done.fork.numbers_left();
                publish.forks.push(ForkChange::Remove(live.id, unused));
            }
        }
        // With keep the forks' records name numbers that only the publish gives.
        let versions = if request.keep {
            self.publish_kept(lives, &ingests, publish, prepared, &made)
        } else {
            self.store.publish(&ingests, publish)
        };
        match versions {
            Ok(versions) => Ok(Some(made.into_iter().zip(versions).collect())),
            Err(StoreError::Moved) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Brings forks to where their publish has put them, whatever fails meanwhile.
    fn conclude(
        &self,
        lives: &[Arc<Live>],
        request: &CommitRequest,
        prepared: &[(usize, Ingested)],
        published: &Published,
    ) -> Result<Vec<Committed>> {
        let conclude = |(index, done): &(usize, Ingested)| {
            let (live, version) = (&lives[*index], published.get(index));
            let counter = if version.is_some() {
                &self.counters.commits
            } else {
                &self.counters.unchanged
            };
            counter.fetch_add(1, Ordering::Relaxed);
            // Before the fork is over: it keeps its volume.
            let info = version.map(|version| self.published_info(version));
            let mounts = match version {
                _ if !request.keep => self.finish(live, Some(done.root)),
                Some(version) => {
                    let segment = done.sealed.segment.unwrap_or(1);
                    done.fork.rebase(version.root, segment, None);
                    live.ahead.lock().take();
                    Vec::new()
                }
                None => {
                    done.fork.thaw();
                    Vec::new()
                }
            };
            let version = info.transpose()?;
            if let Some(info) = &version {
                log::info!(
                    "fork {} committed as {}@{}, {} bytes new",
                    live.id,
                    info.volume,
                    info.number,
                    info.new_bytes
                );
            }
            Ok(Committed {
                fork: live.id,
                version,
                mounts,
                excluded: done.sealed.left_out.clone(),
            })
        };
        let concluded: Vec<Result<Committed>> = prepared.iter().map(conclude).collect();
        concluded.into_iter().collect()
    }

    pub(super) fn published_info(&self, version: &store::Version) -> Result<VersionInfo> {
        self.version_info(&self.volume_that_stays(version.volume)?, version)
    }

    /// The volume of a fork or version, which somebody may just have removed.
    fn volume_that_stays(&self, id: u64) -> Result<store::Volume> {
        let removed = || {
            EngineError::new(Code::NotFound, "the volume of the fork was removed")
                .hint("fork another one")
        };
        self.store.volume_by_id(id)?.ok_or_else(removed)
    }

    /// Whether a commit of this fork makes a version.
    fn is_new(&self, live: &Live, request: &CommitRequest, done: &Ingested) -> Result<bool> {
        let record = live.record.lock().clone();
        let (volume, base) = (record.volume, record.base);
        let head = self
            .store
            .volume_by_id(volume)?
            .map_or(0, |volume| volume.head);
        let when = request.when.get(&live.id);
        if when == Some(&When::IfMissing) && head != 0 {
            return Ok(false);
        }
        // Of another volume's version, or of one that is not the head's volume yet: the first version of its own.
        if base.is_some_and(|base| base.volume != volume) && head == 0 {
            return Ok(true);
        }
        let least = if when == Some(&When::OnChange) {
            Changed::Yes
        } else {
            Changed::Times
        };
        let below = self.version_root(base)?;
        if done.root != below && changed(&done.ingest, below, done.root)? >= least {
            return Ok(true);
        }
        // Else whoever wants these labels would find the head stale for ever. What was committed meanwhile stays the head.
        let head = VersionRef {
            volume,
            number: head,
        };
        if base != Some(head) {
            return Ok(false);
        }
        let labels = labels(&record.options, request);
        let version = self.store.version(head)?;
        Ok(version.is_some_and(|version| !version.has_labels(&labels)))
    }

    /// The root of a version, the empty one for none.
    fn version_root(&self, at: Option<VersionRef>) -> Result<NodeId> {
        let version = at.map(|at| self.store.version(at)).transpose()?.flatten();
        Ok(version.map_or_else(|| crate::tree::empty().0, |version| version.root))
    }

    fn new_version(
        &self,
        live: &Live,
        request: &CommitRequest,
        done: &Ingested,
    ) -> Result<store::Version> {
        let record = live.record.lock().clone();
        let below = match record.base {
            Some(base) => self.store.version(base)?,
            None => None,
        };
        let moved = record.moved.unwrap_or_default();
        let mut change = moved.totals;
        change.add(done.change);
        let add = |value: fn(&store::Version) -> u64, change: i64| {
            below
                .as_ref()
                .map_or(0, value)
                .saturating_add_signed(change)
        };
        Ok(store::Version {
            volume: record.volume,
            number: 0,
            root: done.root,
            base: record.base,
            previous: 0,
            time: now(),
            job: record.options.job.clone(),
            labels: labels(&record.options, request),
            message: request.message.clone(),
            files: add(|v| v.files, change.files),
            logical_bytes: add(|v| v.logical_bytes, change.logical_bytes),
            blocks: add(|v| v.blocks, change.blocks),
            new_bytes: moved.new_bytes
                + done.ingest.new_bytes()
                + live
                    .ahead
                    .lock()
                    .as_ref()
                    .map_or(0, |ahead| ahead.new_bytes()),
            has_acl: change.has_acl || record.options.acl,
            has_links: change.has_links || below.as_ref().is_some_and(|v| v.has_links),
            uid_map: record.uid_map,
            excluded: done.sealed.left_out.clone(),
        })
    }

    /// Publishes versions of forks that go on, with their records on top of them.
    fn publish_kept(
        &self,
        lives: &[Arc<Live>],
        ingests: &[Arc<Ingest>],
        publish: Publish,
        prepared: &[(usize, Ingested)],
        made: &[usize],
    ) -> std::result::Result<Vec<store::Version>, StoreError> {
        // What the forks' records say changes with the batch and not before it, and nobody writes them in between.
        let mut records = Vec::new();
        let published = self.store.publish_with(ingests, publish, |versions| {
            for (version, index) in versions.iter().zip(made) {
                let Some((_, done)) = prepared.iter().find(|(at, _)| at == index) else {
                    continue;
                };
                let left = done.fork.numbers_left();
                let held = lives[*index].record.lock();
                let mut record = held.clone();
                record.root = version.root;
                record.moved = None;
                record.first_segment = done.sealed.segment.unwrap_or(record.first_segment);
                record.base = Some(version.at());
                records.push((held, record, left));
            }
            let changes = records.iter();
            changes
                .map(|(_, record, left)| ForkChange::Rebase(Box::new(record.clone()), left.clone()))
                .collect()
        })?;
        for (mut held, record, _) in records {
            *held = record;
        }
        Ok(published)
    }

    /// Moves the table of a fork to a private root, so that memory, log and the next commit stay bounded by recent change. The
    /// fork goes on meanwhile.
    ///
    /// # Errors
    /// What the disk or the store answered; the fork goes on as before.
    pub(super) fn move_to_private_root(&self, live: &Live) -> Result<()> {
        let _one = live.alone();
        if live.over.load(Ordering::Acquire) {
            return Ok(());
        }
        let fork = live.fork()?;
        live.drop_lost();
        let done = prepare(fork, true, self.config.threads)?;
        let result = self.put_private_root(live, &done);
        match &result {
            Ok(private) => {
                let segment = done.sealed.segment.unwrap_or(1);
                fork.rebase(done.root, segment, Some(*private));
                live.ahead.lock().take();
            }
            Err(_) => {
                fork.thaw();
                live.drop_ahead();
                // The disk may have taken the record with that root all the same.
                live.in_doubt.store(true, Ordering::Release);
            }
        }
        result.map(|_| ())
    }

    fn put_private_root(&self, live: &Live, done: &Ingested) -> Result<Private> {
        let record = live.record.lock().clone();
        let version = self.version_root(record.base)?;
        let charged = charge(&done.ingest, version, done.root)?;
        let mut moved = record.moved.unwrap_or_default();
        moved.totals.add(done.change);
        moved.changed += done.sealed.table.changes();
        moved.charged = charged;
        let ahead = live.ahead.lock().clone();
        moved.new_bytes += done.ingest.new_bytes() + ahead.as_ref().map_or(0, |a| a.new_bytes());
        let ingests: Vec<_> = ahead.into_iter().chain([done.ingest.clone()]).collect();
        let mut put = None;
        self.store.publish_with(&ingests, Publish::default(), |_| {
            let held = live.record.lock();
            let mut record = held.clone();
            record.root = done.root;
            record.moved = Some(moved);
            record.first_segment = done.sealed.segment.unwrap_or(record.first_segment);
            put = Some((held, record.clone()));
            vec![ForkChange::Put(Box::new(record))]
        })?;
        if let Some((mut held, record)) = put {
            *held = record;
        }
        Ok(Private { version, charged })
    }
}
