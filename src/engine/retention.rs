//! What goes by itself: volumes that nobody uses, old versions of those in use, and more where the disk runs short.
//!
//! [`decide`] says what goes, from records and a time alone. Whoever removes looks again under the lock that forks share
//! while they choose their base: so a version is either forked or removed.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::Serialize;

use super::{Code, Engine, EngineError, Result, now, trust};
use crate::store::{self, GcReport, VersionRef};
use crate::volume::Patterns;

/// However short the disk runs, what was used within this time stays.
const IN_USE: Duration = Duration::from_secs(3600);
/// The room that is kept free if nothing else was said: a tenth of the disk, at most this.
const MIN_FREE: u64 = 20 << 30;

/// For how long versions of some volumes stay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Keep {
    /// So many of the newest versions stay,
    pub versions: usize,
    /// and those that are not older than this.
    pub younger: Duration,
    /// A volume goes as a whole when it was neither forked nor committed for so long.
    pub unused: Duration,
}

/// The names of volumes that are for a while only, as patterns: those of branches and of untrusted jobs.
pub const PASSING: [&str; 2] = ["**/branch/**", "**/untrusted/**"];

fn is_passing(volume: &str) -> bool {
    trust::is_untrusted(volume) || format!("/{volume}").contains("/branch/")
}

impl Keep {
    /// What holds for [`PASSING`] volumes where nothing else was said: nobody says when a branch is closed.
    pub fn passing() -> Keep {
        let hour = Duration::from_secs(3600);
        Keep {
            versions: 2,
            younger: hour,
            unused: 72 * hour,
        }
    }
}

impl Default for Keep {
    fn default() -> Keep {
        let day = Duration::from_secs(86_400);
        Keep {
            versions: 10,
            younger: day,
            unused: 14 * day,
        }
    }
}

/// What stays, and how much room it may take.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// The first that matches a volume's name counts.
    rules: Vec<(Patterns, Keep)>,
    /// Bytes that the store may take on disk.
    pub limit: Option<u64>,
    /// Bytes of the disk that are to stay free; None: a tenth, at most 20 GiB.
    pub min_free: Option<u64>,
}

/// What is known of a volume.
#[derive(Clone, Debug)]
struct Facts {
    id: u64,
    used: i64,
    head: u64,
    /// Newest first.
    versions: Vec<Stored>,
    /// Pinned, or the bases of live forks.
    held: BTreeSet<u64>,
    forked: bool,
    /// Its head goes before those of others.
    passing: bool,
    keep: Keep,
}

#[derive(Clone, Copy, Debug)]
struct Stored {
    number: u64,
    time: i64,
    /// Bytes that it brought.
    bytes: u64,
}

/// What is to go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Removal {
    Version(VersionRef),
    /// A whole volume that was last used then.
    Volume {
        id: u64,
        used: i64,
    },
}

impl Removal {
    fn volume(&self) -> u64 {
        match self {
            Removal::Version(at) => at.volume,
            Removal::Volume { id, .. } => *id,
        }
    }
}

/// What gc did, or would do.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Collected {
    #[serde(flatten)]
    pub garbage: GcReport,
    /// Volumes that went, or would go, as a whole.
    pub volumes: Vec<String>,
    /// Versions that went, or would go.
    pub versions: Vec<String>,
}

impl Policy {
    /// Without rules: all volumes are kept as by default.
    pub fn new(limit: Option<u64>, min_free: Option<u64>) -> Policy {
        let rules = Vec::new();
        Policy {
            rules,
            limit,
            min_free,
        }
    }

    /// Bytes of a disk of this size that the store leaves free.
    fn to_stay_free(&self, total: u64) -> u64 {
        let min_free = self.min_free.unwrap_or((total / 10).min(MIN_FREE));
        min_free.min(total)
    }

    /// Adds a rule for the volumes whose names match: `*` stands for anything but a slash, `**` for anything.
    ///
    /// # Errors
    /// What is wrong with the pattern.
    pub fn add(&mut self, pattern: &str, keep: Keep) -> std::result::Result<(), String> {
        self.rules.push((Patterns::of_names([pattern])?, keep));
        Ok(())
    }

    fn keep(&self, name: &str) -> Keep {
        let mut rules = self.rules.iter();
        match rules.find(|(volumes, _)| volumes.name(name.as_bytes(), false)) {
            Some((_, keep)) => *keep,
            None if is_passing(name) => Keep::passing(),
            None => Keep::default(),
        }
    }
}

/// Says what goes: what is old or unused, and if that brings less than `need` bytes, older versions and then whole volumes, the
/// least recently used first, those of branches and untrusted jobs before others. A time of the future is as good as now.
fn decide(now: i64, volumes: &[Facts], need: u64) -> Vec<Removal> {
    let age =
        |time: i64| Duration::from_nanos(u64::try_from(now.saturating_sub(time)).unwrap_or(0));
    let mut volumes: Vec<&Facts> = volumes.iter().collect();
    volumes.sort_by_key(|volume| (volume.used, volume.id));
    let mut gone = Vec::new();
    let mut found = 0;
    let mut left: Vec<(&Facts, Vec<Stored>)> = Vec::new();
    for volume in volumes {
        if volume.is_free() && age(volume.used) > volume.keep.unused {
            gone.push(volume.whole());
            found += volume.versions.iter().map(|v| v.bytes).sum::<u64>();
            continue;
        }
        let mut stay = Vec::new();
        for (nth, version) in volume.versions.iter().enumerate() {
            let kept = nth < volume.keep.versions
                || age(version.time) <= volume.keep.younger
                || !volume.may_lose(version.number);
            if kept {
                stay.push(*version);
            } else {
                gone.push(volume.removal(*version));
                found += version.bytes;
            }
        }
        left.push((volume, stay));
    }
    left.retain(|(volume, _)| age(volume.used) > IN_USE);
    for (volume, stay) in &left {
        for version in stay.iter().rev() {
            if found >= need {
                return gone;
            }
            if volume.may_lose(version.number) {
                gone.push(volume.removal(*version));
                found += version.bytes;
            }
        }
    }
    left.sort_by_key(|(volume, _)| !volume.passing);
    for (volume, stay) in &left {
        if found >= need {
            return gone;
        }
        if volume.is_free() {
            gone.push(volume.whole());
            let head = stay.iter().find(|version| version.number == volume.head);
            found += head.map_or(0, |version| version.bytes);
        }
    }
    gone
}

impl Facts {
    /// Whether the volume may go as a whole.
    fn is_free(&self) -> bool {
        !self.forked && self.held.is_empty()
    }

    fn may_lose(&self, number: u64) -> bool {
        number != self.head && !self.held.contains(&number)
    }

    fn whole(&self) -> Removal {
        let (id, used) = (self.id, self.used);
        Removal::Volume { id, used }
    }

    fn removal(&self, version: Stored) -> Removal {
        Removal::Version(VersionRef {
            volume: self.id,
            number: version.number,
        })
    }
}

impl Engine {
    /// Removes what retention lets go, and then what nothing names any more; `dry_run` only says what the first would be, and
    /// counts the second as it is now.
    ///
    /// # Errors
    /// `Busy` if one runs already; damage, or what the disk answered.
    pub fn gc(&self, dry_run: bool) -> Result<Collected> {
        let (volumes, versions) = self.retain(now(), self.short_of(), dry_run)?;
        let roots = || {
            let versions_stay = self.bases.read();
            let lives: Vec<_> = self.forks.lock().values().cloned().collect();
            let boot = super::boot_id().unwrap_or_default();
            let roots = lives.iter().flat_map(|live| match &live.fork {
                Some(fork) => fork.roots(),
                None => {
                    // The next daemon may be able to open it.
                    let record = live.record.lock();
                    let may_be_opened = record.boot == boot;
                    may_be_opened.then_some(record.root).into_iter().collect()
                }
            });
            (roots.collect(), versions_stay)
        };
        let garbage = self.store.gc(dry_run, roots)?;
        if !dry_run {
            self.counters.gcs.fetch_add(1, Ordering::Relaxed);
            let freed = &self.counters.freed_bytes;
            freed.fetch_add(garbage.freed_bytes, Ordering::Relaxed);
            self.crowded.store(self.short_of() > 0, Ordering::Release);
        }
        log::info!(
            "gc removed {} chunks and freed {} bytes",
            garbage.removed_chunks,
            garbage.freed_bytes
        );
        Ok(Collected {
            garbage,
            volumes,
            versions,
        })
    }

    /// Bytes that the store takes too many: beyond its limit, or of what is to stay free on its disk.
    pub(super) fn short_of(&self) -> u64 {
        let (free, kept_free) = self.free();
        self.beyond_limit().max(kept_free.saturating_sub(free))
    }

    /// Fails while the store takes too much room and gc could not help.
    pub(super) fn refuse_if_crowded(&self) -> Result<()> {
        if !self.crowded.load(Ordering::Acquire) || self.short_of() == 0 {
            return Ok(());
        }
        let (why, hint) = match self.beyond_limit() {
            0 => (
                "the disk of the store has less than `min-free` left, and nothing more may go",
                "free some room, remove volumes, unpin versions, or lower `min-free`",
            ),
            _ => (
                "the store is beyond the limit of its configuration",
                "remove volumes, unpin versions, or raise `limit`",
            ),
        };
        Err(EngineError::new(Code::NoSpace, why).hint(hint))
    }

    /// Bytes that the store may take beside what it has, until it would take too many.
    pub(super) fn spare(&self) -> u64 {
        let (free, kept_free) = self.free();
        let limit = self.config.retention.limit.unwrap_or(u64::MAX);
        let within = limit.saturating_sub(self.store.disk_bytes());
        within
            .min(free.saturating_sub(kept_free))
            .min(self.store.room())
    }

    /// Bytes of the store's disk that are free, and that are to stay so.
    fn free(&self) -> (u64, u64) {
        let (free, total) = self.store.disk();
        (free, self.config.retention.to_stay_free(total))
    }

    pub(super) fn beyond_limit(&self) -> u64 {
        let limit = self.config.retention.limit;
        limit.map_or(0, |limit| self.store.disk_bytes().saturating_sub(limit))
    }

    /// Removes the volumes and versions that may go at a time, and names them.
    pub(super) fn retain(
        &self,
        now: i64,
        need: u64,
        dry_run: bool,
    ) -> Result<(Vec<String>, Vec<String>)> {
        let (mut volumes, mut versions) = (Vec::new(), Vec::new());
        let facts = self.store.volumes()?;
        let facts = facts.iter().map(|volume| self.facts(volume));
        for removal in decide(now, &facts.collect::<Result<Vec<_>>>()?, need) {
            if self.stopping.load(Ordering::Acquire) {
                break;
            }
            let _alone = self.bases.write();
            // What was forked, pinned or committed since stays.
            let Some(volume) = self.store.volume_by_id(removal.volume())? else {
                continue;
            };
            let facts = self.facts(&volume)?;
            match removal {
                Removal::Volume { used, .. } if facts.is_free() && facts.used == used => {
                    if !dry_run {
                        self.store.remove_volume(volume.id)?;
                        self.counters
                            .removed_volumes
                            .fetch_add(1, Ordering::Relaxed);
                        log::info!("volume {} removed by retention", volume.name);
                    }
                    volumes.push(volume.name);
                }
                Removal::Version(at) if facts.may_lose(at.number) => {
                    if !dry_run {
                        self.store.remove_version(at)?;
                        self.counters
                            .removed_versions
                            .fetch_add(1, Ordering::Relaxed);
                        log::info!("{}@{} removed by retention", volume.name, at.number);
                    }
                    versions.push(format!("{}@{}", volume.name, at.number));
                }
                _ => {}
            }
        }
        Ok((volumes, versions))
    }

    fn facts(&self, volume: &store::Volume) -> Result<Facts> {
        let mut forked = false;
        let mut held = BTreeSet::new();
        for live in self.forks.lock().values() {
            let record = live.record.lock();
            forked |= record.volume == volume.id;
            let base = record.base.filter(|base| base.volume == volume.id);
            held.extend(base.map(|base| base.number));
        }
        let mut versions = Vec::new();
        for version in self.store.versions(volume.id)? {
            let at = version.at();
            if self.store.is_pinned(at)? {
                held.insert(version.number);
            }
            versions.push(Stored {
                number: version.number,
                time: version.time,
                bytes: version.new_bytes,
            });
        }
        Ok(Facts {
            id: volume.id,
            used: volume.used,
            head: volume.head,
            versions,
            held,
            forked,
            passing: is_passing(&volume.name),
            keep: self.config.retention.keep(&volume.name),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3600 * 1_000_000_000;
    const DAY: i64 = 24 * HOUR;
    const NOW: i64 = 1000 * DAY;

    /// A volume last used at `used`, with `versions` of 100 bytes that are as old, newest first, in days.
    fn volume(id: u64, used: i64, ages: &[i64]) -> Facts {
        let count = ages.len() as u64;
        let stored = |(nth, age): (usize, &i64)| Stored {
            number: count - nth as u64,
            time: NOW - age * DAY,
            bytes: 100,
        };
        Facts {
            id,
            used,
            head: count,
            versions: ages.iter().enumerate().map(stored).collect(),
            held: BTreeSet::new(),
            forked: false,
            passing: false,
            keep: Keep::default(),
        }
    }

    /// What goes, as text: `1` for a volume, `1@2` for a version.
    fn gone(volumes: &[Facts], need: u64) -> Vec<String> {
        let text = |removal: Removal| match removal {
            Removal::Volume { id, .. } => id.to_string(),
            Removal::Version(at) => format!("{}@{}", at.volume, at.number),
        };
        decide(NOW, volumes, need).into_iter().map(text).collect()
    }

    /// > A volume that was neither forked nor committed for 14 days goes, head included. A pinned version, the base of a live fork
    /// > and a volume with a live fork stay always, and a head as long as its volume.
    #[test]
    fn an_unused_volume_goes_with_its_head_unless_it_is_pinned_or_forked() {
        let unused = volume(1, NOW - 15 * DAY, &[15, 16]);
        let mut pinned = volume(2, NOW - 15 * DAY, &[15, 16]);
        pinned.held.insert(1);
        let mut forked = volume(3, NOW - 15 * DAY, &[15]);
        forked.forked = true;
        let used = volume(4, NOW - 13 * DAY, &[100]);
        let empty = volume(5, NOW - 15 * DAY, &[]);
        assert_eq!(gone(&[unused, pinned, forked, used, empty], 0), ["1", "5"]);
    }

    /// > Of one in use the newest 10 versions stay, and those of the last 24 hours. A pinned version, the base of a live fork and a
    /// > volume with a live fork stay always, and a head as long as its volume.
    #[test]
    fn the_newest_ten_and_those_of_a_day_and_what_is_held_stay() {
        let mut ages = vec![0; 12];
        ages.extend([2, 3, 4, 5]);
        let many = volume(1, NOW, &ages);
        assert_eq!(gone(&[many], 0), ["1@4", "1@3", "1@2", "1@1"]);
        let mut held = volume(2, NOW, &[2; 13]);
        held.held.insert(2);
        held.head = 1;
        assert_eq!(gone(&[held], 0), ["2@3"]);
        let few = volume(3, NOW, &[100; 10]);
        assert!(gone(&[few], 0).is_empty());
    }

    /// > Where the store is beyond its `limit`, or its disk has less than `min-free` (a tenth, at most 20 GiB) left, older versions
    /// > go and then whole volumes, the least recently used first, those of branches and untrusted jobs before others; nothing of a
    /// > volume that was used within the last hour.
    #[test]
    fn for_room_older_versions_go_before_heads_and_the_least_recently_used_first() {
        let all = [
            volume(1, NOW - 2 * DAY, &[2, 3]),
            volume(2, NOW - 5 * DAY, &[5, 6]),
            volume(3, NOW, &[0, 1]),
        ];
        assert!(gone(&all, 0).is_empty());
        assert_eq!(gone(&all, 1), ["2@1"]);
        assert_eq!(gone(&all, 200), ["2@1", "1@1"]);
        assert_eq!(gone(&all, 201), ["2@1", "1@1", "2"]);
        assert_eq!(gone(&all, 10_000), ["2@1", "1@1", "2", "1"], "3 is in use");
    }

    /// > Where the store is beyond its `limit`, or its disk has less than `min-free` (a tenth, at most 20 GiB) left, older versions
    /// > go and then whole volumes, the least recently used first, those of branches and untrusted jobs before others; nothing of a
    /// > volume that was used within the last hour.
    #[test]
    fn a_tenth_of_the_disk_stays_free_and_at_most_20_gib_unless_the_owner_says_otherwise() {
        let free = |min_free, total| Policy::new(None, min_free).to_stay_free(total);
        assert_eq!(free(None, 50 << 30), 5 << 30);
        assert_eq!(free(None, 500 << 30), 20 << 30);
        assert_eq!(free(Some(70), 500 << 30), 70);
        assert_eq!(free(Some(70), 60), 60);
    }

    /// > A pinned version, the base of a live fork and a volume with a live fork stay always, and a head as long as its volume.
    /// > Where the store is beyond its `limit`, or its disk has less than `min-free` (a tenth, at most 20 GiB) left, older versions
    /// > go and then whole volumes, the least recently used first, those of branches and untrusted jobs before others; nothing of a
    /// > volume that was used within the last hour.
    #[test]
    fn for_room_the_heads_of_branches_go_before_those_of_the_main_line() {
        let mut branch = volume(1, NOW - DAY, &[1]);
        branch.passing = true;
        let main = volume(2, NOW - 5 * DAY, &[5]);
        assert_eq!(gone(&[main.clone(), branch.clone()], 1), ["1"]);
        assert_eq!(gone(&[main, branch], 101), ["1", "2"]);
    }

    /// > Volumes of branches and of untrusted jobs (`**/branch/**`, `**/untrusted/**`) go after 3 days without use, and keep 2
    /// > versions and those of the last hour: nobody says when a branch is closed.
    #[test]
    fn branches_and_untrusted_scopes_pass_soon_unless_a_rule_says_otherwise() {
        let mut policy = Policy::default();
        for (name, passing) in [
            ("shop/branch/x", true),
            ("branch/x", true),
            ("shop/untrusted/pr-1", true),
            ("shop/untrusted/uid/7", true),
            ("shop", false),
            ("shop/branches", false),
            ("shop/mybranch/x", false),
        ] {
            assert_eq!(policy.keep(name) == Keep::passing(), passing, "{name}");
            // The patterns that people are shown say the same.
            let mut shown = Policy::default();
            let keep = Keep {
                versions: 99,
                ..Keep::default()
            };
            for pattern in PASSING {
                shown.add(pattern, keep).unwrap();
            }
            assert_eq!(shown.keep(name) == keep, passing, "{name}");
        }
        let own = Keep::default();
        policy.add("shop/branch/**", own).unwrap();
        assert_eq!(policy.keep("shop/branch/x"), own);
        let day = Duration::from_secs(86_400);
        let soon = Keep::passing();
        assert_eq!((soon.versions, soon.unused), (2, 3 * day));
        assert_eq!(soon.younger, Duration::from_secs(3600));
        assert_eq!(policy.keep("app/branch/x"), Keep::passing());
    }

    #[test]
    fn what_is_held_stays_however_short_the_disk_runs() {
        let mut pinned = volume(1, NOW - 5 * DAY, &[5, 6, 7]);
        pinned.held.insert(2);
        let mut forked = volume(2, NOW - 5 * DAY, &[5]);
        forked.forked = true;
        assert_eq!(gone(&[pinned, forked], 10_000), ["1@1"]);
    }

    #[test]
    fn a_clock_that_was_ahead_removes_nothing() {
        let future = volume(1, NOW + 100 * DAY, &[-100, -100]);
        assert!(gone(&[future], 10_000).is_empty());
    }

    /// > `config.toml` says otherwise: the first table whose pattern matches the volume's name counts, before what is built in;
    /// > what it does not say is 10 versions, 24 hours and 14 days. `*` stops at a slash and `**` does not.
    #[test]
    fn the_first_rule_that_matches_a_name_counts() {
        let keep = |versions| Keep {
            versions,
            ..Keep::default()
        };
        let mut policy = Policy::default();
        policy.add("shop/*", keep(1)).unwrap();
        policy.add("**", keep(2)).unwrap();
        assert_eq!(policy.keep("shop/npm").versions, 1);
        assert_eq!(policy.keep("shop/branch/npm").versions, 2);
        assert_eq!(policy.keep("npm").versions, 2);
        assert_eq!(Policy::default().keep("npm"), Keep::default());
        assert!(policy.add("a{", keep(1)).is_err());
    }
}
