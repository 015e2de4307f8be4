//! The volumes of an attach: forked, mounted and put in place, or gone without.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;

use super::plan::Plan;
use super::state::{Job, Jobs, Lock, Spot, Volume};
use super::{Attach, Existing, Link, finish, live_forks, within};
use crate::cli::client::Client;
use crate::cli::ending::When;
use crate::cli::mounting::{self, By, Mountpoint};
use crate::cli::output::warn;
use crate::cli::paths::{self, Target};
use crate::cli::place::real_path;
use crate::cli::{Context, exit, facts, forks};
use crate::protocol::{Bytes, Code, Failure, Request};
use crate::sys::mount as kernel;

/// What clearing up behind an attach that was given up may take.
const UNCOVER: Duration = Duration::from_secs(1);

/// What an attach shares with whoever waits for it, and may give up.
#[derive(Debug, Default)]
pub(super) struct Waiter {
    /// Whether the attach was whole before that: said once, by whoever is first.
    whole: OnceLock<bool>,
    /// What it has put in place: volumes of one path each.
    placed: Mutex<Vec<Volume>>,
}

impl Waiter {
    /// Asked before what was attached is noted as whole; refused where the job was told that it goes without.
    pub(super) fn is_whole(&self) -> Result<(), Failure> {
        match *self.whole.get_or_init(|| true) {
            true => Ok(()),
            false => Err(too_late()),
        }
    }

    pub(super) fn may_give_up(&self) -> bool {
        !*self.whole.get_or_init(|| false)
    }

    /// Nothing is done for the job any more: what is there is for whoever gave up, and for its finish.
    pub(super) fn has_given_up(&self) -> bool {
        self.whole.get() == Some(&false)
    }

    /// Puts something in place, unless that has been given up.
    fn place(&self, put: impl FnOnce() -> Result<Volume, Failure>) -> Result<(), Failure> {
        // Held meanwhile: whoever gives up sees all of it, or it does not happen.
        let mut placed = self.placed.lock();
        if self.has_given_up() {
            return Err(too_late());
        }
        placed.push(put()?);
        Ok(())
    }

    /// Takes away what was put in place.
    pub(super) fn uncover(self: Arc<Waiter>) {
        let uncovered = within(UNCOVER, "the attach", "", move || {
            for volume in self.placed.lock().drain(..).rev() {
                finish::take_apart(None, &volume, By::default_for_caller(), false);
            }
            Ok(())
        });
        if let Err(failure) = uncovered {
            let why = failure.message;
            warn(&format!("what the attach had in place may be there: {why}"));
        }
    }
}

fn too_late() -> Failure {
    Failure::new(Code::Busy, "the attach was given up")
}

/// One path of a volume, by itself.
pub(super) fn piece(volume: &Volume, path: usize) -> Volume {
    Volume {
        paths: volume.paths.get(path).cloned().into_iter().collect(),
        folder: None,
        // Its mount is not the path's.
        shared: true,
        ..volume.clone()
    }
}

/// What is said of a job's trust where no daemon judges it: where jobs are judged, doubt means untrusted.
pub(super) fn unjudged(context: &Context) -> String {
    let trust = context.config.trust();
    trust.map_or("off", |_| "untrusted").into()
}

/// Makes the folder that a job has where its cache cannot be had.
pub(super) fn make_plain(path: &Path) {
    if let Err(error) = fs::create_dir_all(path) {
        warn(&format!("cannot make {}: {error}", path.display()));
    }
}

pub(super) fn empty(plan: &Plan) -> Volume {
    Volume {
        volume: plan.wish.volume.clone(),
        commit: Some(plan.commit),
        fork: None,
        base: None,
        hit: "empty".into(),
        mount: None,
        folder: None,
        paths: Vec::new(),
        degraded: None,
        refused: None,
        never_commits: plan.fork.read_only || plan.fork.ephemeral,
        has_version: false,
        trust: String::new(),
        shared: false,
        took: 0.0,
    }
}

pub(super) struct Work<'a> {
    context: &'a Context,
    options: &'a Attach,
    jobs: &'a Jobs,
    others: Vec<Job>,
    by: By,
    waiter: &'a Waiter,
}

/// The volume that is being attached: the last one of the job.
pub(super) fn current(job: &mut Job) -> &mut Volume {
    job.volumes
        .last_mut()
        .expect("a volume was added before anything is done for it")
}

impl<'a> Work<'a> {
    pub(super) fn new(
        context: &'a Context,
        options: &'a Attach,
        jobs: &'a Jobs,
        live: &HashSet<String>,
        by: By,
        waiter: &'a Waiter,
    ) -> Result<Work<'a>, Failure> {
        let others = jobs.all()?.into_iter();
        Ok(Work {
            context,
            options,
            jobs,
            others: others.filter(|job| !job.is_stale(live)).collect(),
            by,
            waiter,
        })
    }

    pub(super) fn volume(
        &mut self,
        client: &mut Client,
        job: &mut Job,
        plan: &Plan,
    ) -> Result<(), Failure> {
        let (wish, link) = (&plan.wish, plan.link);
        let direct = self.by == By::Helper && link == Link::Bind;
        let mut targets = Vec::new();
        for path in &wish.paths {
            // Noted before they are made.
            let made = paths::missing(path)?;
            let whole = paths::absolute(path);
            current(job).paths.push(Spot::plain(whole, made));
            self.jobs.save(job)?;
            let placed = self.place(job, plan, path);
            let spots = &mut current(job).paths;
            match (placed, spots.last_mut()) {
                (Ok(target), Some(spot)) => {
                    (spot.path, spot.inner) = (target.path.clone(), target.folder.clone());
                    targets.push(target);
                }
                (placed, _) => {
                    spots.pop();
                    placed?;
                }
            }
        }
        self.jobs.save(job)?;
        let covered: Vec<Option<File>> = targets
            .iter()
            .map(|target| self.look_at(plan, &target.path))
            .collect::<Result<_, _>>()?;

        let fork = forks::make(
            self.context,
            client,
            &wish.volume,
            &paths::excluding(&plan.fork, wish),
            Some(job.job.clone()),
        )?;
        let volume = current(job);
        volume.fork = Some(fork.id.clone());
        volume.base = fork.base.clone();
        volume.hit = fork.hit.clone();
        volume.refused = fork.refused.clone();
        volume.trust = fork.trust.clone();
        volume.has_version =
            plan.commit == When::IfMissing && forks::has_version(client, &fork.volume);
        self.jobs.save(job)?;

        let manner = fork.manner(self.by);
        let mut root = None;
        if !direct || targets.is_empty() {
            let path = self.mount_folder(&job.job, &wish.volume)?;
            current(job).folder = Some(path.clone());
            self.jobs.save(job)?;
            paths::make_folder_open(&path)?;
            let at = Mountpoint {
                path,
                created: false,
            };
            let mount = mounting::mount(client, &fork.id, &Bytes::default(), &at, &manner)?;
            current(job).mount = Some(mount);
            self.jobs.save(job)?;
            root = Some(at.path);
        }
        for (index, (target, covered)) in targets.iter().zip(covered).enumerate() {
            let alone = self.alone_at(client, job, &target.path)?;
            let inside = match &root {
                // Who may not bind mounts each folder by itself.
                None => {
                    let at = Mountpoint {
                        path: target.path.clone(),
                        created: false,
                    };
                    let folder = Bytes(target.folder.clone().unwrap_or_default().into_bytes());
                    self.waiter.place(|| {
                        let mount = mounting::mount(client, &fork.id, &folder, &at, &manner)?;
                        current(job).paths[index].mount = Some(mount);
                        Ok(piece(current(job), index))
                    })?;
                    target.path.clone()
                }
                Some(root) => target
                    .folder
                    .as_ref()
                    .map_or(root.clone(), |f| root.join(f)),
            };
            if target.folder.is_some() && paths::lacks(&inside, &fork, &target.path)? {
                continue;
            }
            current(job).paths[index].link = Some(link);
            self.jobs.save(job)?;
            drop(alone);
            if let (Some(covered), "empty") = (covered, fork.hit.as_str()) {
                seed(&covered, &inside)?;
            }
            if root.is_some() {
                self.put_in_place(link, &inside, &target.path, piece(current(job), index))?;
            }
        }
        Ok(())
    }

    /// Where a path leads; what is missing of it is made.
    pub(super) fn place(&self, job: &Job, plan: &Plan, path: &Path) -> Result<Target, Failure> {
        let is_link = plan.link == Link::Symlink;
        if is_link && path.file_name().is_some_and(|name| name == "node_modules") {
            return Err(Failure::new(
                Code::Policy,
                "node_modules may not be a symlink: npm removes it",
            )
            .hint("bind it, or use forkvol run"));
        }
        // Nothing is made in what another job has.
        if let Ok(path) = real_path(path) {
            refuse_taken(self.others.iter().chain([job]), job, &path)?;
        }
        let target = paths::target(&plan.wish, path, &self.context.place)?;
        self.refuse_to_cover(&target.path)?;
        Ok(target)
    }

    /// Refuses a path that another job has by now. No other notes one while the lock is held: until this job has noted it.
    pub(super) fn alone_at(
        &self,
        client: &mut Client,
        job: &Job,
        path: &Path,
    ) -> Result<Lock, Failure> {
        let lock = self.jobs.lock_paths()?;
        // What cannot be read was named when this attach began.
        let mut others = self.jobs.readable(|_| ())?;
        others.retain(|other| other.job != job.job && taken(other, job, path).is_some());
        if !others.is_empty() {
            let live = live_forks(client)?;
            others.retain(|other| !other.is_stale(&live));
        }
        refuse_taken(others.iter(), job, path).map(|()| lock)
    }

    /// Opens what a path holds, where that is to be copied; refuses content where there may be none.
    pub(super) fn look_at(&self, plan: &Plan, path: &Path) -> Result<Option<File>, Failure> {
        let failed = |e: io::Error| Failure::new(Code::Failed, format!("{}: {e}", path.display()));
        let is_empty = fs::read_dir(path).map_err(failed)?.next().is_none();
        let refuse = |why: &str| {
            let message = format!("{} is not empty", path.display());
            Err(Failure::new(Code::Failed, message).hint(why))
        };
        match (is_empty, plan.existing, plan.link) {
            (true, _, _) => Ok(None),
            (false, Existing::Fail, _) => refuse("--existing hide covers what is there"),
            (false, _, Link::Symlink) => refuse("a symlink cannot cover what is there"),
            (false, Existing::Seed, Link::Bind) => File::open(path).map(Some).map_err(failed),
            (false, Existing::Hide, Link::Bind) => Ok(None),
        }
    }

    /// Refuses a path that would hide the mounts themselves.
    fn refuse_to_cover(&self, path: &Path) -> Result<(), Failure> {
        let root = self.mount_root().ok();
        let root = root.and_then(|root| real_path(&root).ok());
        if root.is_some_and(|root| root.starts_with(path)) {
            let why = "the forks are mounted in it";
            return Err(paths::not_covered(path, why, "choose another --mount-root"));
        }
        Ok(())
    }

    fn mount_root(&self) -> Result<PathBuf, Failure> {
        match &self.options.mount_root {
            // Links to it and a later finish come from other folders.
            Some(root) => std::path::absolute(root)
                .map_err(|e| Failure::new(Code::Failed, format!("{}: {e}", root.display()))),
            None => self.context.place.mount_root(),
        }
    }

    fn mount_folder(&self, job: &str, volume: &str) -> Result<PathBuf, Failure> {
        let root = self.mount_root()?;
        // No name of a volume has this sign, so no two of them meet.
        Ok(root.join(job).join(volume.replace('/', "+")))
    }

    /// Makes a path lead to a folder of a fork; `piece` is how it is taken away again.
    pub(super) fn put_in_place(
        &self,
        link: Link,
        from: &Path,
        to: &Path,
        piece: Volume,
    ) -> Result<(), Failure> {
        let put = || match link {
            Link::Bind => kernel::bind(from, to),
            // It was made, or was empty: it gives way to the link.
            Link::Symlink => fs::remove_dir(to).and_then(|()| symlink(from, to)),
        };
        let failed = |e: io::Error| {
            let message = format!("cannot put a fork at {}: {e}", to.display());
            let failure = Failure::new(Code::Failed, message);
            match e.kind() {
                io::ErrorKind::PermissionDenied => failure.hint(
                    "binding folders needs CAP_SYS_ADMIN: use forkvol run, or --link symlink",
                ),
                _ => failure,
            }
        };
        self.waiter.place(|| put().map_err(failed).map(|()| piece))
    }

    /// Undoes what was done for the current volume; its paths are empty folders then.
    pub(super) fn go_without(
        &mut self,
        client: &mut Client,
        job: &mut Job,
        plan: &Plan,
        failure: &Failure,
    ) -> Result<(), Failure> {
        let volume = current(job);
        volume.degraded = Some(exit::line(failure));
        if let Some(fork) = volume.fork.take()
            && let Err(failure) = client.call(&Request::Abandon { forks: vec![fork] })
        {
            warn(&failure.message);
        }
        finish::take_apart(Some(client), volume, self.by, false);
        for spot in &mut volume.paths {
            spot.link = None;
            spot.mount = None;
            // A link had taken its place.
            make_plain(&spot.path);
        }
        for path in plan.wish.paths.iter().skip(volume.paths.len()) {
            let made = paths::missing(path).unwrap_or_default();
            make_plain(path);
            let path = paths::absolute(path);
            volume.paths.push(Spot::plain(path, made));
        }
        volume.mount = None;
        volume.folder = None;
        volume.hit = "empty".into();
        volume.base = None;
        if volume.trust.is_empty() {
            let judged = forks::trust(client, facts::of_job(&plan.fork));
            volume.trust = judged.unwrap_or_else(|| unjudged(self.context));
        }
        self.jobs.save(job)
    }
}

/// What a job has already of a path that `job` wants: what lies below the path would be covered too, and what another job has is its
/// own with all that lies in it.
fn taken<'a>(other: &'a Job, job: &Job, path: &Path) -> Option<&'a Path> {
    let is_other = other.job != job.job;
    let inside = |outer: &Path| is_other && path.starts_with(outer);
    let spots = other.volumes.iter().flat_map(|v| &v.paths);
    let mut spots = spots.filter(|spot| spot.link.is_some());
    // A link leads there.
    let mut folders = other.volumes.iter().filter_map(|v| v.folder.as_deref());
    spots
        .find(|spot| spot.path.starts_with(path) || inside(&spot.path))
        .map(|spot| spot.path.as_path())
        .or_else(|| folders.find(|folder| inside(folder)))
}

fn refuse_taken<'a>(
    mut others: impl Iterator<Item = &'a Job>,
    job: &Job,
    path: &Path,
) -> Result<(), Failure> {
    let found = others.find_map(|other| Some((taken(other, job, path)?, &other.job)));
    found.map_or(Ok(()), |(path, other)| {
        let message = format!("{} is attached by job {other}", path.display());
        Err(Failure::new(Code::Busy, message)
            .hint("use forkvol run, which gives each job its own view"))
    })
}

/// Copies what a path held, which is covered now, into its empty fork.
fn seed(covered: &File, into: &Path) -> Result<(), Failure> {
    let from = format!("/proc/{}/fd/{}/.", std::process::id(), covered.as_raw_fd());
    let copied = Command::new("cp")
        .args(["-a", "--", &from])
        .arg(into)
        .output();
    let failed = |why: String| {
        Failure::new(
            Code::Failed,
            format!("cannot copy what was there into {}: {why}", into.display()),
        )
    };
    let output = copied.map_err(|e| failed(e.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(failed(words.lines().next().unwrap_or("cp failed").into()))
}
