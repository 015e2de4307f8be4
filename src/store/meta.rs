//! Volumes, versions and forks as records, and the inode numbers they use.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::ops::Range;

use rocksdb::WriteBatch;
use serde::{Deserialize, Serialize};

use super::{Store, StoreError, keys};
use crate::chunk::ChunkId;
use crate::record::Ino;
use crate::tree::NodeId;

/// The number of a fork, shown as `f-` and twelve hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ForkId(pub u64);

impl fmt::Display for ForkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "f-{:012x}", self.0)
    }
}

impl std::str::FromStr for ForkId {
    type Err = ();

    fn from_str(text: &str) -> Result<ForkId, ()> {
        let digits = text
            .strip_prefix("f-")
            .filter(|digits| digits.len() == 12)
            .filter(|digits| {
                digits
                    .bytes()
                    .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            })
            .ok_or(())?;
        u64::from_str_radix(digits, 16).map(ForkId).map_err(|_| ())
    }
}

/// Stores an id as text.
macro_rules! serde_as_text {
    ($type:ty, $parse:expr) => {
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<$type, D::Error> {
                let text = String::deserialize(from)?;
                $parse(&text).ok_or_else(|| serde::de::Error::custom("not an id"))
            }
        }
    };
}

serde_as_text!(ForkId, |text: &str| text.parse().ok());
serde_as_text!(NodeId, |text: &str| parse_hex(text).map(NodeId));
serde_as_text!(ChunkId, |text: &str| parse_hex(text).map(ChunkId));

fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let hash = blake3::Hash::from_hex(text).ok()?;
    Some(*hash.as_bytes())
}

/// A version, by volume and number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct VersionRef {
    pub volume: u64,
    pub number: u64,
}

/// A volume: a name with a line of versions.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Volume {
    pub id: u64,
    pub name: String,
    /// Nanoseconds since 1970.
    pub created: i64,
    /// When it was last forked or committed.
    pub used: i64,
    /// The number of the newest version; 0 before the first and after a reset.
    pub head: u64,
    /// The number that the next version gets.
    pub next: u64,
    /// Ranges of versions (first, last) that a rollback took back or a reset left behind: forks of them commit only by force.
    #[serde(default)]
    pub taken_back: Vec<(u64, u64)>,
}

/// A committed, immutable state of a volume.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Version {
    pub volume: u64,
    pub number: u64,
    pub root: NodeId,
    /// The version that its fork was made from.
    pub base: Option<VersionRef>,
    /// The head that it took the place of.
    pub previous: u64,
    pub time: i64,
    pub job: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub message: Option<String>,
    pub files: u64,
    /// Bytes that its files and directories show, each inode once.
    pub logical_bytes: u64,
    /// 512-byte blocks, as statfs counts them.
    pub blocks: u64,
    /// Bytes that its commit added to the store.
    pub new_bytes: u64,
    pub has_acl: bool,
    pub has_links: bool,
    /// /proc/self/uid_map of whoever mounted the fork, if it was not the identity.
    pub uid_map: Option<String>,
    /// What its fork changed and kept to itself.
    #[serde(default, skip_serializing_if = "LeftOut::is_empty")]
    pub excluded: LeftOut,
}

impl Version {
    pub fn at(&self) -> VersionRef {
        VersionRef {
            volume: self.volume,
            number: self.number,
        }
    }

    /// Whether it has all of these labels.
    pub fn has_labels(&self, labels: &BTreeMap<String, String>) -> bool {
        let has = |(key, value)| self.labels.get(key) == Some(value);
        labels.iter().all(has)
    }
}

/// Paths that a commit left out of its version.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LeftOut {
    /// Files, and folders with all below them (with a slash at the end), relative to the volume's root; not all where there are
    /// many.
    pub paths: Vec<String>,
    /// How many there are.
    pub count: u64,
}

impl LeftOut {
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// What a delta adds to the numbers of a version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub files: i64,
    pub logical_bytes: i64,
    pub blocks: i64,
    /// Some file may have several names.
    pub has_links: bool,
    pub has_acl: bool,
}

impl Totals {
    pub fn add(&mut self, other: Totals) {
        self.files += other.files;
        self.logical_bytes += other.logical_bytes;
        self.blocks += other.blocks;
        self.has_links |= other.has_links;
        self.has_acl |= other.has_acl;
    }
}

/// What a fork moved from its table to a private root, all of it since the version below.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    pub totals: Totals,
    /// Inodes, each time they were moved.
    pub changed: u64,
    /// Bytes charged against the fork's size.
    pub charged: u64,
    /// Bytes added to the store.
    pub new_bytes: u64,
}

/// What a fork was asked to be.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct ForkOptions {
    pub read_only: bool,
    pub ephemeral: bool,
    /// Room for new data, in bytes.
    pub size: u64,
    pub labels: BTreeMap<String, String>,
    /// Everything is shown and stored as this user's.
    pub owner: Option<(u32, u32)>,
    pub acl: bool,
    pub suid: bool,
    pub dev: bool,
    pub job: Option<String>,
    /// Patterns of paths that are never committed.
    #[serde(default)]
    pub excludes: Vec<String>,
    /// So are those where tools keep credentials.
    #[serde(default)]
    pub default_excludes: bool,
    /// An import unpacks into it, and nobody else has it: it is over with its daemon.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub import: bool,
}

/// Where a fork is mounted.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MountPoint {
    pub path: OsString,
    /// The folder of the fork that is mounted there, relative to its root; empty for all of it.
    pub folder: OsString,
    /// The device number of the mount.
    pub dev: u64,
    /// The mountpoint was made for the fork and goes with it, says who mounted it.
    pub created: bool,
    /// Who mounted it; None if an older version wrote this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
}

/// How well what a fork was made from fits what was wanted, from best to worst.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hit {
    /// The volume's own, with all labels that were wanted.
    Exact,
    /// The volume's own, with other labels.
    Stale,
    /// Another volume's.
    Fallback,
    #[default]
    Empty,
}

/// What was judged of a fork's job when the fork was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Nothing is judged in this store.
    #[default]
    Off,
    Trusted,
    /// Untrusted: it commits nothing.
    Nothing,
    /// Untrusted: its volume is one of its own scope.
    Scope,
}

/// A private, writable view of a version.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Fork {
    pub id: ForkId,
    pub volume: u64,
    pub base: Option<VersionRef>,
    #[serde(default)]
    pub hit: Hit,
    #[serde(default)]
    pub verdict: Verdict,
    /// The base's root, or the fork's private one.
    pub root: NodeId,
    /// None while the root is the base's.
    #[serde(default)]
    pub moved: Option<Moved>,
    pub first_segment: u64,
    pub next_epoch: u64,
    pub boot: String,
    pub options: ForkOptions,
    pub uid: u32,
    pub gid: u32,
    #[serde(default)]
    pub uid_map: Option<String>,
    pub created: i64,
    /// Where it is mounted, or was when it was mounted last.
    pub mounts: Vec<MountPoint>,
}

impl Store {
    /// Returns all volumes by name.
    pub fn volumes(&self) -> Result<Vec<Volume>, StoreError> {
        let mut volumes: Vec<Volume> = self.records(&[keys::VOLUME])?;
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(volumes)
    }

    /// Returns a volume by name.
    pub fn volume(&self, name: &str) -> Result<Option<Volume>, StoreError> {
        let Some(id) = self.meta(&keys::name(name))? else {
            return Ok(None);
        };
        self.volume_by_id(u64_of(&id, "the index of a name")?)
    }

    /// Returns a volume by id.
    pub fn volume_by_id(&self, id: u64) -> Result<Option<Volume>, StoreError> {
        self.record(&keys::one(keys::VOLUME, id))
    }

    /// Returns the volume of that name, made if there is none.
    pub fn create_volume(&self, name: &str, now: i64) -> Result<Volume, StoreError> {
        let _serial = self.changing(&self.publishing)?;
        if let Some(volume) = self.volume(name)? {
            return Ok(volume);
        }
        let id = match self.meta(keys::NEXT_VOLUME)? {
            Some(bytes) => u64_of(&bytes, "the counter of volumes")?,
            None => 1,
        };
        let next = id
            .checked_add(1)
            .ok_or_else(|| corrupt("the counter of volumes"))?;
        let volume = Volume {
            id,
            name: name.into(),
            created: now,
            used: now,
            head: 0,
            next: 1,
            taken_back: Vec::new(),
        };
        let mut batch = WriteBatch::default();
        let meta = Target::Meta;
        self.put(&mut batch, meta, keys::NEXT_VOLUME, &next.to_be_bytes())?;
        self.put(
            &mut batch,
            meta,
            &keys::one(keys::VOLUME, id),
            &json(&volume),
        )?;
        self.put(&mut batch, meta, &keys::name(name), &id.to_be_bytes())?;
        self.write_unsynced(batch)?;
        Ok(volume)
    }

    /// Notes that a volume is used, unsynced: a note that is lost in a crash is made again by the next use.
    pub fn touch_volume(&self, id: u64, now: i64) -> Result<(), StoreError> {
        let _serial = self.changing(&self.publishing)?;
        let Some(mut volume) = self.volume_by_id(id)? else {
            return Ok(());
        };
        volume.used = now;
        let mut batch = WriteBatch::default();
        let key = keys::one(keys::VOLUME, id);
        self.put(&mut batch, Target::Meta, &key, &json(&volume))?;
        self.write_unsynced(batch)
    }

    /// Changes a volume's record under the lock that commits take.
    pub fn update_volume(
        &self,
        id: u64,
        change: impl FnOnce(&mut Volume),
    ) -> Result<(), StoreError> {
        let _serial = self.changing(&self.publishing)?;
        let Some(mut volume) = self.volume_by_id(id)? else {
            return Err(StoreError::Missing {
                what: format!("volume {id}"),
            });
        };
        change(&mut volume);
        let mut batch = WriteBatch::default();
        let key = keys::one(keys::VOLUME, id);
        self.put(&mut batch, Target::Meta, &key, &json(&volume))?;
        self.write_synced(batch)
    }

    /// Gives a volume another name; false if that is taken.
    pub fn rename_volume(&self, old: &str, new: &str) -> Result<bool, StoreError> {
        let _serial = self.changing(&self.publishing)?;
        if self.volume(new)?.is_some() {
            return Ok(false);
        }
        let Some(mut volume) = self.volume(old)? else {
            return Err(StoreError::Missing {
                what: format!("volume {old}"),
            });
        };
        volume.name = new.into();
        let mut batch = WriteBatch::default();
        let (meta, id) = (Target::Meta, volume.id);
        self.delete(&mut batch, meta, &keys::name(old))?;
        self.put(&mut batch, meta, &keys::name(new), &id.to_be_bytes())?;
        self.put(
            &mut batch,
            meta,
            &keys::one(keys::VOLUME, id),
            &json(&volume),
        )?;
        self.write_synced(batch)?;
        Ok(true)
    }

    /// Removes a volume with all its versions.
    pub fn remove_volume(&self, id: u64) -> Result<(), StoreError> {
        let _serial = self.changing(&self.publishing)?;
        // Its name may be another one by now, and the old one another volume's.
        let Some(volume) = self.volume_by_id(id)? else {
            return Ok(());
        };
        let mut batch = WriteBatch::default();
        for version in self.versions(id)? {
            self.delete_version(&mut batch, version.at())?;
        }
        self.delete(&mut batch, Target::Meta, &keys::one(keys::VOLUME, id))?;
        self.delete(&mut batch, Target::Meta, &keys::name(&volume.name))?;
        self.write_synced(batch)
    }

    /// Removes the record of a version; gc removes what only that named.
    pub fn remove_version(&self, at: VersionRef) -> Result<(), StoreError> {
        let _serial = self.changing(&self.publishing)?;
        let mut batch = WriteBatch::default();
        self.delete_version(&mut batch, at)?;
        self.write_synced(batch)
    }

    fn delete_version(&self, batch: &mut WriteBatch, at: VersionRef) -> Result<(), StoreError> {
        for kind in [keys::VERSION, keys::DAMAGED, keys::PIN] {
            let key = keys::two(kind, at.volume, at.number);
            self.delete(batch, Target::Meta, &key)?;
        }
        Ok(())
    }

    /// Returns the versions of a volume, newest first.
    pub fn versions(&self, volume: u64) -> Result<Vec<Version>, StoreError> {
        let mut versions: Vec<Version> = self.records(&keys::one(keys::VERSION, volume))?;
        versions.reverse();
        Ok(versions)
    }

    /// Returns a version.
    pub fn version(&self, at: VersionRef) -> Result<Option<Version>, StoreError> {
        self.record(&keys::two(keys::VERSION, at.volume, at.number))
    }

    /// Returns the id of a version: the BLAKE3 of its record.
    pub fn version_id(version: &Version) -> blake3::Hash {
        blake3::hash(&json(version))
    }

    /// Whether a version is pinned.
    pub fn is_pinned(&self, at: VersionRef) -> Result<bool, StoreError> {
        Ok(self
            .meta(&keys::two(keys::PIN, at.volume, at.number))?
            .is_some())
    }

    /// Pins a version, or lets it go.
    pub fn set_pin(&self, at: VersionRef, pinned: bool) -> Result<(), StoreError> {
        self.set_mark(keys::PIN, at, pinned.then_some(b"1"))
    }

    /// Why a version was set aside, if it was.
    pub fn damage(&self, at: VersionRef) -> Result<Option<String>, StoreError> {
        let why = self.meta(&keys::two(keys::DAMAGED, at.volume, at.number))?;
        Ok(why.map(|why| String::from_utf8_lossy(&why).into_owned()))
    }

    /// Sets a damaged version aside: nothing is forked from it any more.
    pub fn set_aside(&self, at: VersionRef, why: &str) -> Result<(), StoreError> {
        self.set_mark(keys::DAMAGED, at, Some(why.as_bytes()))
    }

    fn set_mark(&self, kind: u8, at: VersionRef, value: Option<&[u8]>) -> Result<(), StoreError> {
        let key = keys::two(kind, at.volume, at.number);
        let mut batch = WriteBatch::default();
        match value {
            Some(value) => self.put(&mut batch, Target::Meta, &key, value)?,
            None => self.delete(&mut batch, Target::Meta, &key)?,
        }
        self.write_synced(batch)
    }

    /// Returns all forks.
    pub fn forks(&self) -> Result<Vec<Fork>, StoreError> {
        self.records(&[keys::FORK])
    }

    /// Returns a fork.
    pub(super) fn fork(&self, id: ForkId) -> Result<Option<Fork>, StoreError> {
        self.record(&keys::one(keys::FORK, id.0))
    }

    /// Writes a fork's record, unsynced: a fork does not outlive a reboot.
    pub fn put_fork(&self, fork: &Fork) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        self.put(
            &mut batch,
            Target::Meta,
            &keys::one(keys::FORK, fork.id.0),
            &json(fork),
        )?;
        self.write_unsynced(batch)
    }

    /// Removes a fork's record, and gives its unused inode numbers back.
    pub fn remove_fork(&self, id: ForkId) -> Result<(), StoreError> {
        let _serial = self.changing(&self.numbering)?;
        let mut batch = WriteBatch::default();
        self.delete(&mut batch, Target::Meta, &keys::one(keys::FORK, id.0))?;
        let leased = self.end_leases(&mut batch, id)?;
        self.free_inodes(&mut batch, &leased)?;
        self.write_unsynced(batch)
    }

    /// Ends the leases of a fork on inode numbers; returns what it had leased.
    pub(super) fn end_leases(
        &self,
        batch: &mut WriteBatch,
        id: ForkId,
    ) -> Result<Vec<Range<u64>>, StoreError> {
        let mut leased = Vec::new();
        for (key, len) in self.entries(Target::Meta, &keys::one(keys::LEASE, id.0))? {
            let wrong = || corrupt("the leases of inode numbers");
            let start = keys::second_number(&key).ok_or_else(wrong)?;
            let len = u64_of(&len, "the leases of inode numbers")?;
            leased.push(start..start.checked_add(len).ok_or_else(wrong)?);
            self.delete(batch, Target::Meta, &key)?;
        }
        Ok(leased)
    }

    /// Notes that a fork has these inode numbers, which no version holds.
    pub(super) fn put_lease(
        &self,
        batch: &mut WriteBatch,
        id: ForkId,
        lease: &Range<u64>,
    ) -> Result<(), StoreError> {
        if lease.is_empty() {
            return Ok(());
        }
        let count = (lease.end - lease.start).to_be_bytes();
        let key = keys::two(keys::LEASE, id.0, lease.start);
        self.put(batch, Target::Meta, &key, &count)
    }

    /// Adds inode numbers that no version holds to the free ones.
    pub(super) fn free_inodes(
        &self,
        batch: &mut WriteBatch,
        unused: &[Range<u64>],
    ) -> Result<(), StoreError> {
        for range in unused.iter().filter(|range| !range.is_empty()) {
            let count = (range.end - range.start).to_be_bytes();
            self.put(
                batch,
                Target::Meta,
                &keys::one(keys::FREE, range.start),
                &count,
            )?;
        }
        Ok(())
    }

    /// Gives a fork up to `count` inode numbers that nobody has.
    pub fn lease_inodes(&self, fork: ForkId, count: u64) -> Result<Range<u64>, StoreError> {
        let _serial = self.changing(&self.numbering)?;
        let mut batch = WriteBatch::default();
        let free = self.first(&[keys::FREE])?;
        let lease = if let Some((key, len)) = free {
            let free = || corrupt("the free inode numbers");
            let start = keys::number(&key).ok_or_else(free)?;
            let len = u64_of(&len, "the free inode numbers")?;
            let end = numbers_end(start, len).ok_or_else(free)?;
            let middle = end.min(start.saturating_add(count));
            self.delete(&mut batch, Target::Meta, &key)?;
            self.free_inodes(&mut batch, std::slice::from_ref(&(middle..end)))?;
            start..middle
        } else {
            let next = match self.meta(keys::NEXT_INO)? {
                Some(bytes) => u64_of(&bytes, "the counter of inode numbers")?,
                None => 2,
            };
            let counter = || corrupt("the counter of inode numbers");
            let end = numbers_end(next, count).ok_or_else(counter)?;
            self.put(&mut batch, Target::Meta, keys::NEXT_INO, &end.to_be_bytes())?;
            next..end
        };
        self.put_lease(&mut batch, fork, &lease)?;
        self.write_unsynced(batch)?;
        Ok(lease)
    }
}

/// Which family a record belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Target {
    Meta,
    Nodes,
    Chunks,
    Sizes,
}

/// Where a run of inode numbers ends; `None` if there is no such run.
fn numbers_end(start: u64, len: u64) -> Option<u64> {
    let end = start.checked_add(len)?;
    // 1 is every volume's root directory.
    (start > 1 && len > 0 && Ino::of(end).is_some()).then_some(end)
}

pub(super) fn json<T: Serialize>(record: &T) -> Vec<u8> {
    serde_json::to_vec(record).expect("records have nothing that JSON cannot hold")
}

pub(super) fn corrupt(what: &str) -> StoreError {
    StoreError::Corrupt { what: what.into() }
}

pub(super) fn u64_of(bytes: &[u8], what: &str) -> Result<u64, StoreError> {
    bytes
        .try_into()
        .map(u64::from_be_bytes)
        .map_err(|_| corrupt(what))
}

#[cfg(test)]
mod tests;
