//! The start of a job: forks made, mounted and put in place, one after the other, each step noted before the next.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::ArgMatches;
use serde_json::{Value, json};

use super::state::{self, Agent, Job, Jobs, Spot, Volume};
use super::{Attach, Existing, Link, finish, job_name, live_forks, variables, within};
use crate::cli::client::Client;
use crate::cli::forks;
use crate::cli::mounting::{self, By, Mountpoint};
use crate::cli::output::{self, warn};
use crate::cli::paths::{self, Target, Wish};
use crate::cli::{Context, exit};
use crate::protocol::{Code, Failure, Request};
use crate::sys::mount as kernel;
use crate::sys::process;

pub fn attach(
    context: &Context,
    options: Attach,
    matches: Option<&ArgMatches>,
) -> Result<(), Failure> {
    let wishes = options.volumes.wishes(matches)?;
    if wishes.is_empty() {
        output::note("no volume was asked for: nothing is attached");
        return Ok(());
    }
    variables::refuse_clash(&wishes)?;
    let name = job_name(options.job.as_deref())?;
    let strict = options.options.strict;
    let begun = std::time::Instant::now();
    let made = within(options.deadline, {
        let (context, options, wishes, name) = (
            context.clone(),
            options.clone(),
            wishes.clone(),
            name.clone(),
        );
        move || make(&context, &options, &wishes, &name)
    });
    let job = match made {
        Ok(job) => job,
        Err(failure) if strict || failure.code == Code::Usage => return Err(failure),
        Err(failure) => without_cache(&options, &wishes, &name, &failure),
    };
    for volume in &job.volumes {
        if let Some(why) = &volume.degraded {
            warn(&format!("the job goes without {}: {why}", volume.volume));
        }
    }
    let names: Vec<&str> = job.volumes.iter().map(|v| v.volume.as_str()).collect();
    output::note(&format!(
        "job {} has {}: {} hit, {:.0} ms",
        job.job,
        names.join(", "),
        job.hit(),
        begun.elapsed().as_secs_f64() * 1e3
    ));
    tell(context, &options, &job)
}

fn document(job: &Job) -> Value {
    json!({
        "job": job.job,
        "hit": job.hit(),
        "volumes": job.volumes,
        "degraded": job.volumes.iter().any(|v| v.degraded.is_some()),
    })
}

fn tell(context: &Context, options: &Attach, job: &Job) -> Result<(), Failure> {
    let document = document(job);
    let variables = variables::of(job, &document);
    if let Some(path) = &options.env_file {
        variables::write(path, &variables)?;
    }
    output::show(
        context.json,
        &json!({ "attach": document }),
        |_| match options.env_file {
            Some(_) => String::new(),
            None => variables::for_shell(&variables),
        },
    )
}

/// A job whose cache cannot be had at all: empty folders, and why.
fn without_cache(options: &Attach, wishes: &[Wish], name: &str, failure: &Failure) -> Job {
    let mut job = Job::new(
        name.into(),
        String::new(),
        options.commit,
        false,
        Vec::new(),
    );
    for wish in wishes {
        let mut volume = empty(&wish.volume);
        volume.degraded = Some(exit::line(failure));
        for path in &wish.paths {
            if let Err(error) = fs::create_dir_all(path) {
                warn(&format!("cannot make {}: {error}", path.display()));
            }
            volume.paths.push(Spot {
                path: path.clone(),
                inner: None,
                link: None,
                made: Vec::new(),
            });
        }
        job.volumes.push(volume);
    }
    job
}

fn empty(name: &str) -> Volume {
    Volume {
        volume: name.into(),
        fork: None,
        base: None,
        hit: "empty".into(),
        mount: None,
        folder: None,
        paths: Vec::new(),
        degraded: None,
        refused: None,
    }
}

/// What was asked for, as text that is the same for the same question.
fn question(options: &Attach, wishes: &[Wish]) -> String {
    let o = &options.options;
    let fork = (
        &o.from,
        &o.parent,
        o.read_only,
        o.ephemeral,
        o.size,
        &o.label,
        &o.exclude,
    );
    format!(
        "{wishes:?} {fork:?} {:?} {:?} {:?}",
        options.link, options.existing, options.commit
    )
}

/// The processes without which the job is over.
fn agents(options: &Attach) -> Vec<Agent> {
    let named = std::env::var("BUILDKITE_AGENT_PID").ok();
    let named = named.and_then(|pid| pid.parse().ok());
    let pids = named.iter().chain(&options.agent_pid);
    pids.filter_map(|pid| Agent::of(*pid)).collect()
}

fn make(context: &Context, options: &Attach, wishes: &[Wish], name: &str) -> Result<Job, Failure> {
    let jobs = Jobs::of(&context.place)?;
    let asked = question(options, wishes);
    // A store before anything is put into its folder.
    let mut client = context.connect()?;
    let live = live_forks(&mut client)?;
    let _alone = jobs.lock(name)?;
    if let Some(job) = jobs.load(name)? {
        let is_stale = job.is_stale(&live);
        if !is_stale && job.asked == asked {
            return Ok(job);
        }
        if !is_stale {
            let message = format!("job {name} is attached with other volumes, paths or options");
            return Err(
                Failure::new(Code::Usage, message).hint(format!("forkvol finish --job {name}"))
            );
        }
        finish::drop_job(context, &jobs, &job)?;
    }
    let strict = options.options.strict;
    let mut job = Job::new(name.into(), asked, options.commit, strict, agents(options));
    jobs.save(&job)?;
    let mut work = Work {
        context,
        options,
        jobs: &jobs,
        others: jobs
            .all()?
            .into_iter()
            .filter(|job| !job.is_stale(&live))
            .collect(),
        by: By::default_for_caller(),
    };
    for wish in wishes {
        job.volumes.push(empty(&wish.volume));
        if let Err(failure) = work.volume(&mut client, &mut job, wish) {
            if strict {
                finish::drop_job(context, &jobs, &job)?;
                return Err(failure);
            }
            work.go_without(&mut client, &mut job, wish, &failure)?;
        }
    }
    Ok(job)
}

struct Work<'a> {
    context: &'a Context,
    options: &'a Attach,
    jobs: &'a Jobs,
    others: Vec<Job>,
    by: By,
}

/// The volume that is being attached: the last one of the job.
fn current(job: &mut Job) -> &mut Volume {
    job.volumes
        .last_mut()
        .expect("a volume was added before anything is done for it")
}

impl Work<'_> {
    fn volume(&mut self, client: &mut Client, job: &mut Job, wish: &Wish) -> Result<(), Failure> {
        let link = self.options.link;
        let direct = self.by == By::Helper && link == Link::Bind;
        if direct && wish.paths.len() > 1 {
            let message = format!("volume {} cannot have several paths here", wish.volume);
            return Err(Failure::new(Code::Policy, message)
                .hint("only root can bind folders: use forkvol run, a volume for each path, or --link symlink"));
        }
        let mut targets = Vec::new();
        for path in &wish.paths {
            let (target, made) = self.place(wish, path)?;
            current(job).paths.push(Spot {
                path: target.path.clone(),
                inner: target.folder.clone(),
                link: None,
                made,
            });
            targets.push(target);
        }
        self.jobs.save(job)?;
        let covered: Vec<Option<File>> = targets
            .iter()
            .map(|target| self.look_at(&target.path))
            .collect::<Result<_, _>>()?;

        let fork = forks::make(
            self.context,
            client,
            &wish.volume,
            &self.options.options,
            Some(job.job.clone()),
        )?;
        let volume = current(job);
        volume.fork = Some(fork.id.clone());
        volume.base = fork.base.clone();
        volume.hit = fork.hit.clone();
        let options = &self.options.options;
        volume.refused = match (options.read_only, options.ephemeral) {
            (true, _) => Some("it is read-only".into()),
            (_, true) => Some("it is ephemeral".into()),
            _ => None,
        };
        self.jobs.save(job)?;

        let path = match targets.first().filter(|_| direct) {
            Some(target) => target.path.clone(),
            None => self.mount_folder(&job.job, &wish.volume)?,
        };
        if !direct || targets.is_empty() {
            current(job).folder = Some(path.clone());
            self.jobs.save(job)?;
        }
        let at = Mountpoint {
            path,
            created: false,
        };
        let mount = mounting::mount(client, &fork.id, &at, &fork.manner(self.by))?;
        current(job).mount = Some(mount);
        self.jobs.save(job)?;
        for (at_index, (target, covered)) in targets.iter().zip(covered).enumerate() {
            let from = match &target.folder {
                None => at.path.clone(),
                Some(inner) => at.path.join(inner),
            };
            if target.folder.is_some() && !from.is_dir() {
                paths::make_folder_open(&from)?;
            }
            if let (Some(covered), "empty") = (covered, fork.hit.as_str()) {
                seed(&covered, &from)?;
            }
            if !direct {
                self.put_in_place(&from, &target.path)?;
            }
            current(job).paths[at_index].link = Some(link);
            self.jobs.save(job)?;
        }
        Ok(())
    }

    /// Where a path leads, with the folders that had to be made for it.
    fn place(&self, wish: &Wish, path: &Path) -> Result<(Target, Vec<PathBuf>), Failure> {
        let is_link = self.options.link == Link::Symlink;
        if is_link && path.file_name().is_some_and(|name| name == "node_modules") {
            return Err(Failure::new(
                Code::Policy,
                "node_modules may not be a symlink: npm removes it",
            )
            .hint("bind it, or use forkvol run"));
        }
        let missing = paths::missing(path)?;
        let target = paths::target(wish, path, &self.context.place)?;
        let taken = |job: &&Job| {
            let mut spots = job.volumes.iter().flat_map(|v| &v.paths);
            spots.any(|s| s.link.is_some() && s.path == target.path)
        };
        if let Some(other) = self.others.iter().find(taken) {
            let message = format!("{} is attached by job {}", target.path.display(), other.job);
            return Err(Failure::new(Code::Busy, message)
                .hint("use forkvol run, which gives each job its own view"));
        }
        Ok((target, missing))
    }

    /// Opens what a path holds, where that is to be copied; refuses content where there may be none.
    fn look_at(&self, path: &Path) -> Result<Option<File>, Failure> {
        let failed = |e: io::Error| Failure::new(Code::Failed, format!("{}: {e}", path.display()));
        let is_empty = fs::read_dir(path).map_err(failed)?.next().is_none();
        let refuse = |why: &str| {
            let message = format!("{} is not empty", path.display());
            Err(Failure::new(Code::Failed, message).hint(why))
        };
        match (is_empty, self.options.existing, self.options.link) {
            (true, _, _) => Ok(None),
            (false, Existing::Fail, _) => refuse("--existing hide covers what is there"),
            (false, _, Link::Symlink) => refuse("a symlink cannot cover what is there"),
            (false, Existing::Seed, Link::Bind) => File::open(path).map(Some).map_err(failed),
            (false, Existing::Hide, Link::Bind) => Ok(None),
        }
    }

    fn mount_folder(&self, job: &str, volume: &str) -> Result<PathBuf, Failure> {
        let root = match &self.options.mount_root {
            Some(root) => root.clone(),
            None if process::euid() == 0 => "/cache/forkvol".into(),
            None => state::runtime_folder().join("mnt"),
        };
        // No name of a volume has this sign, so no two of them meet.
        let folder = root.join(job).join(volume.replace('/', "+"));
        paths::make_folder_open(&folder)?;
        Ok(folder)
    }

    fn put_in_place(&self, from: &Path, to: &Path) -> Result<(), Failure> {
        let result = match self.options.link {
            Link::Bind => kernel::bind(from, to),
            // It was made, or was empty: it gives way to the link.
            Link::Symlink => fs::remove_dir(to).and_then(|()| symlink(from, to)),
        };
        result.map_err(|e| {
            let message = format!("cannot put a fork at {}: {e}", to.display());
            let failure = Failure::new(Code::Failed, message);
            match e.kind() {
                io::ErrorKind::PermissionDenied => failure.hint(
                    "binding folders needs CAP_SYS_ADMIN: use forkvol run, or --link symlink",
                ),
                _ => failure,
            }
        })
    }

    /// Undoes what was done for the current volume; its paths are empty folders then.
    fn go_without(
        &mut self,
        client: &mut Client,
        job: &mut Job,
        wish: &Wish,
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
        volume.paths.iter_mut().for_each(|spot| spot.link = None);
        for path in wish.paths.iter().skip(volume.paths.len()) {
            let made = paths::missing(path).unwrap_or_default();
            if let Err(error) = fs::create_dir_all(path) {
                warn(&format!("cannot make {}: {error}", path.display()));
            }
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            volume.paths.push(Spot {
                path,
                inner: None,
                link: None,
                made,
            });
        }
        volume.mount = None;
        volume.folder = None;
        volume.hit = "empty".into();
        volume.base = None;
        self.jobs.save(job)
    }
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
