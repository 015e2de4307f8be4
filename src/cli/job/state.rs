//! The file of a job.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::join::Shared;
use super::{Link, as_bytes};
use crate::cli::ending::{End, When};
use crate::cli::place::{self, Place};
use crate::protocol::{Code, Failure, Mount};
use crate::sys;
use crate::sys::process;

/// The layout of the file; a file of another is left alone and named.
const SCHEMA: u32 = 1;
/// The longest name of a job as it stands in names of files.
const NAME_MAX: usize = 80;

/// A process, told apart from a later one of the same number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    pub pid: u32,
    /// Clock ticks since boot.
    started: u64,
    /// The pid namespace in which it has that number.
    namespace: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    schema: u32,
    pub job: String,
    /// What was asked for and attached to its end, a line for each volume; the same job attaches the same again or nothing.
    pub asked: String,
    pub commit: When,
    pub strict: bool,
    pub boot: String,
    /// The processes without which it is over.
    #[serde(default)]
    pub agents: Vec<Agent>,
    /// Seconds since 1970.
    pub created: u64,
    pub volumes: Vec<Volume>,
    /// How it ended, once that is known.
    pub end: Option<End>,
    /// It was attached anew after it had lost its forks: what it holds is a part of its work, which is not committed.
    #[serde(default)]
    pub lost: bool,
    /// It is a workspace, for others to join.
    #[serde(default)]
    pub shared: Option<Shared>,
    /// The workspace whose volumes it has.
    #[serde(default)]
    pub joined: Option<String>,
}

/// A volume of a job. What is None could not be had.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Volume {
    pub volume: String,
    /// When it is committed, if not as the job is.
    #[serde(default)]
    pub commit: Option<When>,
    pub fork: Option<String>,
    pub base: Option<String>,
    /// exact, stale, fallback or empty.
    pub hit: String,
    pub mount: Option<Mount>,
    /// The folder of its own in which it is mounted, if it is not mounted at its path.
    #[serde(default, with = "as_bytes::maybe")]
    pub folder: Option<PathBuf>,
    pub paths: Vec<Spot>,
    /// Why the job goes without it.
    pub degraded: Option<String>,
    /// Why it will not be committed, if that is known already.
    pub refused: Option<String>,
    /// It was asked for in a way that is never committed: read-only, or ephemeral.
    #[serde(default)]
    pub never_commits: bool,
    /// It had a version of its own when it was attached.
    #[serde(default)]
    pub has_version: bool,
    /// What the daemon judged of the job: off, trusted or untrusted; empty where it could not be asked.
    #[serde(default)]
    pub trust: String,
    /// How long it took to attach it, in seconds.
    #[serde(default)]
    pub took: f64,
    /// Its mount is a workspace's, which goes on without this job.
    #[serde(default)]
    pub shared: bool,
}

/// A path of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spot {
    #[serde(with = "as_bytes::one")]
    pub path: PathBuf,
    /// The folder of the volume that is there; none for its root.
    pub inner: Option<String>,
    /// None while nothing was put there.
    pub link: Option<Link>,
    /// The mount of that folder by itself, where there is one.
    #[serde(default)]
    pub mount: Option<Mount>,
    /// Folders that were made for it, outer ones first.
    #[serde(with = "as_bytes::many")]
    pub made: Vec<PathBuf>,
}

impl Spot {
    /// A path where nothing was put, with the folders that were made for it.
    pub fn plain(path: PathBuf, made: Vec<PathBuf>) -> Spot {
        Spot {
            path,
            inner: None,
            link: None,
            mount: None,
            made,
        }
    }
}

impl Volume {
    /// All mounts of its fork.
    pub fn mounts(&self) -> impl Iterator<Item = &Mount> {
        let own = self.paths.iter().filter_map(|spot| spot.mount.as_ref());
        self.mount.iter().chain(own)
    }
}

impl Job {
    pub fn new(job: String, commit: When, strict: bool, agents: Vec<Agent>) -> Job {
        Job {
            schema: SCHEMA,
            job,
            asked: String::new(),
            commit,
            strict,
            boot: sys::boot_id().unwrap_or_default().into(),
            agents,
            created: now(),
            volumes: Vec::new(),
            end: None,
            lost: false,
            shared: None,
            joined: None,
        }
    }

    /// The volumes whose attach was cut off: what was asked for is noted behind it.
    pub fn unfinished(&self) -> Range<usize> {
        let all = self.volumes.len();
        let done = match self.shared {
            Some(_) => all,
            None => self.asked.lines().count(),
        };
        done.min(all)..all
    }

    /// The worst hit of all its volumes.
    pub fn hit(&self) -> &str {
        let order = ["exact", "stale", "fallback", "empty"];
        let rank = |volume: &Volume| {
            let hit = volume.hit.as_str();
            order
                .iter()
                .position(|known| *known == hit)
                .unwrap_or(order.len() - 1)
        };
        order[self.volumes.iter().map(rank).max().unwrap_or(0)]
    }

    /// What was judged of it: off, trusted or untrusted.
    pub fn trust(&self) -> &str {
        let volumes = self.volumes.iter();
        let known = volumes.map(|v| v.trust.as_str()).filter(|t| !t.is_empty());
        known.max().unwrap_or("off")
    }

    /// Whether one of its processes, its boot or its mounts are gone. The daemon says which forks are live: what this process sees of mounts
    /// and other processes depends on the container it runs in.
    pub fn is_stale(&self, live: &HashSet<String>) -> bool {
        let mut forks = self
            .volumes
            .iter()
            .filter_map(|v| v.fork.as_ref())
            .peekable();
        self.is_over() || (forks.peek().is_some() && forks.all(|fork| !live.contains(fork)))
    }

    /// Whether nobody can be at work in it any more: one of its processes or its boot is gone.
    fn is_over(&self) -> bool {
        let other_boot = sys::boot_id().is_ok_and(|boot| boot != self.boot);
        other_boot || self.agents.iter().any(Agent::is_gone)
    }

    /// Whether it has no place any more: only that it was is known.
    pub fn is_nowhere(&self) -> bool {
        let is_nowhere = |volume: &Volume| volume.mount.is_none() && volume.paths.is_empty();
        self.volumes.iter().all(is_nowhere)
    }

    /// Whether somebody may still be at work in it who has lost what was written before, as when its daemon was killed.
    pub fn has_lost(&self, live: &HashSet<String>) -> bool {
        let was_attached = self.unfinished().start > 0;
        let goes_on = self.end.is_none() && !self.is_over();
        goes_on && (self.lost || (was_attached && self.is_stale(live)))
    }
}

impl Agent {
    /// The process of this number, as it is now; None if there is none.
    pub fn of(pid: u32) -> Option<Agent> {
        let started = started(pid)?;
        let namespace = pid_namespace();
        Some(Agent {
            pid,
            started,
            namespace,
        })
    }

    /// Whether the process has ended; one of another pid namespace cannot be told.
    fn is_gone(&self) -> bool {
        self.namespace == pid_namespace() && started(self.pid) != Some(self.started)
    }
}

/// What tells this process's pid namespace from others.
fn pid_namespace() -> String {
    let link = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    link.to_string_lossy().into_owned()
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// When a process was started, in clock ticks since boot; None if there is none.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // A process that has ended and is not yet awaited does nothing any more.
    (*fields.first()? != "Z").then_some(())?;
    fields.get(19)?.parse().ok()
}

/// A name as it may stand in the name of a file: what comes from outside becomes harmless, and stays apart from others.
pub fn safe_name(name: &str) -> String {
    let harmless = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts_well && name.len() <= NAME_MAX && name.chars().all(harmless) {
        return name.into();
    }
    let hash = blake3::hash(name.as_bytes()).to_hex();
    let kept: String = name
        .chars()
        .map(|c| if harmless(c) { c } else { '-' })
        .take(NAME_MAX - 17)
        .collect();
    // A name that began with a dash would be an option.
    let kept = match kept.trim_start_matches(['-', '.', '_']) {
        "" => "x",
        kept => kept,
    };
    format!("{kept}-{}", &hash[..8])
}

/// Held by whoever attaches or ends a job. The file goes with it.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    _file: fs::File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            crate::cli::output::warn(&cannot(&self.path, &error).message);
        }
    }
}

/// The folder of one user's jobs in one store.
#[derive(Clone, Debug)]
pub struct Jobs {
    folder: PathBuf,
    /// Where everybody may make folders, the one above counts too.
    above: Option<PathBuf>,
}

impl Jobs {
    pub fn of(place: &Place) -> Result<Jobs, Failure> {
        let folders = match place {
            Place::Embedded { store, .. } => return Jobs::checked(store.join("jobs"), None),
            Place::Service => place::state_folders(),
        };
        let inside = |folder: PathBuf| Jobs::checked(folder.join("jobs"), Some(folder));
        let mut found = folders.into_iter().map(inside);
        let first = found.next().expect("every user has a folder");
        // Where somebody else was quicker to make it, the next one is better than none.
        first.or_else(|refused| found.find_map(Result::ok).ok_or(refused))
    }

    fn checked(folder: PathBuf, above: Option<PathBuf>) -> Result<Jobs, Failure> {
        let jobs = Jobs { folder, above };
        jobs.check()?;
        Ok(jobs)
    }

    /// Fails where the folder is there and somebody else's.
    fn check(&self) -> Result<(), Failure> {
        for folder in self.above.iter().chain([&self.folder]) {
            let metadata = match fs::symlink_metadata(folder) {
                Ok(metadata) => metadata,
                // Made with the first job, which knows that there is a store.
                Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                Err(e) => return Err(cannot(folder, &e)),
            };
            let others = metadata.mode() & 0o022 != 0;
            let owners = [process::euid(), 0];
            if !metadata.is_dir() || others || !owners.contains(&metadata.uid()) {
                let message = format!("{} is not this user's own folder", folder.display());
                return Err(Failure::new(Code::Policy, message).hint("remove it"));
            }
        }
        Ok(())
    }

    fn file(&self, job: &str) -> PathBuf {
        self.folder.join(format!("{job}.json"))
    }

    /// Reads a job's file, if there is one.
    pub fn load(&self, job: &str) -> Result<Option<Job>, Failure> {
        let path = self.file(job);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(cannot(&path, &e)),
        };
        let damaged = |why: String| {
            let message = format!("{} cannot be read: {why}", path.display());
            Failure::new(Code::Failed, message)
                .hint("see forkvol forks; abandon what it stood for, and remove the file")
        };
        let found: Job = serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
        if found.schema != SCHEMA {
            return Err(damaged(format!("it has layout {}", found.schema)));
        }
        // Its name is where it is written to and removed from.
        if found.job != job {
            return Err(damaged(format!("it is that of job {:?}", found.job)));
        }
        Ok(Some(found))
    }

    /// All jobs that can be read; the others are named in warnings.
    pub fn all(&self) -> Result<Vec<Job>, Failure> {
        self.readable(|failure| crate::cli::output::warn(&failure.message))
    }

    /// All jobs that can be read; why another cannot goes to `unreadable`.
    pub fn readable(&self, unreadable: impl Fn(&Failure)) -> Result<Vec<Job>, Failure> {
        let mut jobs = Vec::new();
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(jobs),
            Err(e) => return Err(cannot(&self.folder, &e)),
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(job) = name.to_str().and_then(|n| n.strip_suffix(".json")) else {
                continue;
            };
            match self.load(job) {
                Ok(job) => jobs.extend(job),
                Err(failure) => unreadable(&failure),
            }
        }
        jobs.sort_by(|a, b| (a.created, &a.job).cmp(&(b.created, &b.job)));
        Ok(jobs)
    }

    /// Puts a job's file in place as one step.
    pub fn save(&self, job: &Job) -> Result<(), Failure> {
        let path = self.file(&job.job);
        let aside = self
            .folder
            .join(format!(".{}.{}", job.job, std::process::id()));
        self.make()?;
        let write = || -> io::Result<()> {
            let mut file = fs::File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&aside)?;
            file.write_all(&serde_json::to_vec_pretty(job).map_err(io::Error::other)?)?;
            fs::rename(&aside, &path)
        };
        write().map_err(|e| {
            fs::remove_file(&aside).unwrap_or_default();
            cannot(&path, &e)
        })
    }

    /// Waits until no other process attaches or ends this job.
    pub fn lock(&self, job: &str) -> Result<Lock, Failure> {
        let lock = self.lock_by(job, |file| file.lock().map(|()| true))?;
        Ok(lock.expect("whoever waits for a lock gets it or an error"))
    }

    /// As [`Jobs::lock`]; None where another process does.
    pub fn try_lock(&self, job: &str) -> Result<Option<Lock>, Failure> {
        self.lock_by(job, |file| match file.try_lock() {
            Ok(()) => Ok(true),
            Err(fs::TryLockError::WouldBlock) => Ok(false),
            Err(fs::TryLockError::Error(e)) => Err(e),
        })
    }

    /// Locks a job's file in a way that says whether it has.
    fn lock_by(
        &self,
        job: &str,
        way: impl Fn(&fs::File) -> io::Result<bool>,
    ) -> Result<Option<Lock>, Failure> {
        let path = self.folder.join(format!("{job}.lock"));
        self.make()?;
        let lock = || -> io::Result<Option<Lock>> {
            loop {
                let file = fs::File::options()
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .mode(0o600)
                    .open(&path)?;
                if !way(&file)? {
                    return Ok(None);
                }
                let held = file.metadata()?.ino();
                // Whoever had it before has removed it, and then it locks nothing.
                if fs::metadata(&path).is_ok_and(|named| named.ino() == held) {
                    let path = path.clone();
                    return Ok(Some(Lock { path, _file: file }));
                }
            }
        };
        lock().map_err(|e| cannot(&path, &e))
    }

    /// Waits until no other process notes a path. Whoever holds it waits for no lock of a job.
    pub fn lock_paths(&self) -> Result<Lock, Failure> {
        // No job has a name that begins so.
        self.lock(".paths")
    }

    /// Removes what a kill leaves: locks that nobody holds, and files that did not come to their place.
    pub fn sweep(&self) {
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let half = name
                .strip_prefix('.')
                .and_then(|rest| rest.rsplit_once('.'))
                .filter(|(_, pid)| pid.parse::<u32>().is_ok())
                .map(|(job, _)| job);
            let Some(job) = half.or(name.strip_suffix(".lock")) else {
                continue;
            };
            // Who saves a file holds the lock, and the lock goes with its holder. What cannot be removed now is left for the next.
            if let Ok(Some(_alone)) = self.try_lock(job)
                && half.is_some()
            {
                fs::remove_file(entry.path()).ok();
            }
        }
    }

    /// Makes the folder. Somebody may have been faster, so it is looked at behind that.
    fn make(&self) -> Result<(), Failure> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .map_err(|e| cannot(&self.folder, &e))?;
        self.check()
    }

    pub fn remove(&self, job: &str) -> Result<(), Failure> {
        let path = self.file(job);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(cannot(&path, &e)),
            _ => Ok(()),
        }
    }
}

fn cannot(path: &Path, error: &io::Error) -> Failure {
    let code = match error.kind() {
        io::ErrorKind::StorageFull => Code::NoSpace,
        _ => Code::Failed,
    };
    Failure::new(code, format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_from_outside_is_harmless_and_stays_apart_from_others() {
        assert_eq!(safe_name("0190-ab_c.1"), "0190-ab_c.1");
        let hostile = [
            "../../etc/x",
            "a b",
            "a/b",
            ".hidden",
            "",
            &"x".repeat(300),
            "ä",
        ];
        let mut seen = std::collections::HashSet::new();
        for name in hostile {
            let safe = safe_name(name);
            assert!(
                safe.len() <= NAME_MAX
                    && !safe.contains('/')
                    && safe.starts_with(|c: char| c.is_ascii_alphanumeric()),
                "{safe}"
            );
            assert!(!safe.is_empty() && seen.insert(safe));
        }
    }

    fn volume(hit: &str) -> Volume {
        Volume {
            trust: String::new(),
            shared: false,
            took: 0.0,
            volume: "v".into(),
            commit: None,
            fork: None,
            base: None,
            hit: hit.into(),
            mount: None,
            folder: None,
            paths: Vec::new(),
            degraded: None,
            refused: None,
            never_commits: false,
            has_version: false,
        }
    }

    #[test]
    fn a_job_is_stale_when_its_agent_or_its_boot_is_gone() {
        let live = HashSet::from(["f-1".to_owned()]);
        let job = |agents: &[Agent]| {
            let agents = agents.to_vec();
            Job::new("j".into(), When::Always, false, agents)
        };
        assert!(!job(&[]).is_stale(&live));
        let mut agent = Agent::of(std::process::id()).unwrap();
        let alive = agent.clone();
        assert!(!job(std::slice::from_ref(&alive)).is_stale(&live));
        agent.started += 1;
        assert!(job(std::slice::from_ref(&agent)).is_stale(&live));
        assert!(
            job(&[alive, agent.clone()]).is_stale(&live),
            "it takes one of them to be gone"
        );
        agent.namespace = "pid:[1]".into();
        assert!(
            !job(&[agent]).is_stale(&live),
            "it cannot be seen from here"
        );
        let mut other = job(&[]);
        other.boot = "another".into();
        assert!(other.is_stale(&live));
        for (fork, stale) in [("f-1", false), ("f-2", true)] {
            let mut job = job(&[]);
            job.volumes.push(volume("v"));
            job.volumes[0].fork = Some(fork.into());
            assert_eq!(job.is_stale(&live), stale, "{fork}");
            assert!(!job.has_lost(&live), "its attach was cut off");
            job.asked = "v\n".into();
            assert_eq!(job.has_lost(&live), stale, "{fork}");
            job.end = Some(End::Success);
            assert!(!job.has_lost(&live));
        }
    }

    #[test]
    fn the_hit_of_a_job_is_the_worst_of_its_volumes() {
        let mut job = Job::new("j".into(), When::Always, false, Vec::new());
        assert_eq!(job.hit(), "exact");
        for (hit, worst) in [("stale", "stale"), ("exact", "stale"), ("empty", "empty")] {
            job.volumes.push(volume(hit));
            assert_eq!(job.hit(), worst);
        }
    }

    fn jobs() -> (tempfile::TempDir, Jobs) {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs {
            folder: dir.path().join("jobs"),
            above: None,
        };
        (dir, jobs)
    }

    fn full() -> Job {
        let mut job = Job::new("j".into(), When::OnChange, true, Vec::new());
        job.asked = "asked\n".into();
        job.agents.extend(Agent::of(std::process::id()));
        job.end = Some(End::Cancelled);
        let spot = Spot {
            path: "/w/node_modules".into(),
            inner: Some("n".into()),
            link: Some(Link::Bind),
            mount: None,
            made: vec!["/w".into()],
        };
        job.volumes = vec![Volume {
            fork: Some("f-000000000001".into()),
            base: Some("v@3".into()),
            mount: Some(Mount {
                path: crate::protocol::Bytes(b"/m\xff".to_vec()),
                folder: crate::protocol::Bytes(b"n".to_vec()),
                device: 7,
                created: true,
                uid: Some(1000),
                namespace: Some(4_026_531_841),
                fork: Some("f-000000000001".into()),
            }),
            folder: Some("/run/x".into()),
            paths: vec![spot],
            degraded: Some("why".into()),
            ..volume("stale")
        }];
        job
    }

    #[test]
    fn a_file_under_another_name_is_not_taken_for_the_job() {
        let (_dir, jobs) = jobs();
        let mut job = full();
        jobs.save(&job).unwrap();
        assert_eq!(jobs.load("j").unwrap(), Some(job.clone()));
        job.job = "../../elsewhere".into();
        fs::write(jobs.file("j"), serde_json::to_vec(&job).unwrap()).unwrap();
        let failure = jobs.load("j").unwrap_err();
        assert!(failure.message.contains("it is that of job"), "{failure}");
        assert!(jobs.all().unwrap().is_empty());
    }

    proptest::proptest! {
        #[test]
        fn a_hostile_file_is_a_job_or_is_named(bytes in crate::hostile::bytes(proptest::prelude::Just(serde_json::to_vec(&full()).unwrap()))) {
            let (_dir, jobs) = jobs();
            jobs.make().unwrap();
            fs::write(jobs.file("j"), &bytes).unwrap();
            match jobs.load("j") {
                Ok(job) => {
                    let job = job.unwrap();
                    job.hit();
                    job.is_stale(&HashSet::new());
                    jobs.save(&job).unwrap();
                    assert_eq!(jobs.load("j").unwrap(), Some(job));
                }
                Err(failure) => {
                    assert!(failure.message.contains("j.json cannot be read: "), "{failure}");
                    assert_eq!(fs::read(jobs.file("j")).unwrap(), bytes);
                }
            }
        }

        #[test]
        fn any_name_is_made_harmless(name in ".{0,120}", other in ".{0,12}") {
            let safe = safe_name(&name);
            assert!((1..=NAME_MAX).contains(&safe.len()) && !safe.contains('/') && safe.starts_with(|c: char| c.is_ascii_alphanumeric()), "{safe}");
            assert_eq!(safe_name(&safe_name(&safe)), safe_name(&safe));
            assert!(name == other || safe_name(&other) != safe, "{name:?} and {other:?}");
        }
    }
}
