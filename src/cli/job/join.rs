//! Workspaces: forks that the steps of one build share, at several places and in several containers at once.
//!
//! A workspace is a job of its own without paths; what joins it is a job whose volumes are the workspace's. All of them are binds
//! of one mount, so that a write is seen by all at once, and file watches work.

use serde::{Deserialize, Serialize};

use clap::ValueEnum;

use super::attach::{self, Known};
use super::placing::{self, Waiter, Work};
use super::plan::Plan;
use super::state::{self, Job, Jobs, Spot, Volume};
use super::{Attach, Link, finish};
use crate::cli::client::Client;
use crate::cli::ending::When;
use crate::cli::forks::{self, take};
use crate::cli::mounting::{self, By};
use crate::cli::output::{self, warn};
use crate::cli::paths;
use crate::cli::{Context, facts};
use crate::protocol::{Code, Facts, Failure, Request};
use crate::sys::mount as kernel;

/// A workspace that nobody has joined for so many seconds is over.
const LONELY: u64 = 3600;

/// When a workspace ends, and what becomes of it then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lifetime {
    /// With its last member; thrown away.
    Step,
    /// With `finish --join`; thrown away.
    Stage,
    /// With `finish --join`; thrown away.
    #[default]
    Build,
    /// With `finish --join`; committed as its outcome says.
    Pipeline,
}

/// What makes a job a workspace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shared {
    pub lifetime: Lifetime,
    /// Seconds since 1970: when somebody joined or left it last.
    pub touched: u64,
    /// What the volumes of its first member are called by, if that is not trusted.
    #[serde(default)]
    pub scope: Option<String>,
}

/// The name of a workspace's job.
pub fn job_of(name: &str) -> String {
    format!("workspace.{}", state::safe_name(name))
}

/// Makes a member of a workspace, and the workspace with its first.
pub fn make(
    context: &Context,
    options: &Attach,
    plans: &[Plan],
    name: &str,
    workspace: &str,
    waiter: &Waiter,
) -> Result<Job, Failure> {
    let by = By::default_for_caller();
    if by == By::Helper {
        let message = format!("workspace {workspace} cannot be joined by an ordinary user");
        return Err(Failure::new(Code::Policy, message)
            .hint("only who may bind folders can join: run the hook as root, or in a user namespace of its own"));
    }
    if let Some(plan) = plans.iter().find(|plan| plan.link != Link::Bind) {
        let message = format!(
            "volume {} of a workspace can only be bound",
            plan.wish.volume
        );
        return Err(Failure::new(Code::Usage, message));
    }
    let mut client = context.connect()?;
    let jobs = Jobs::of(&context.place)?;
    let line = |plan| format!("{workspace:?} {}", attach::question(plan));
    let asked: String = plans.iter().map(line).collect();
    let shared = job_of(workspace);
    let _alone = jobs.lock(name)?;
    let _nobody_else = jobs.lock(&shared)?;
    // What was asked before would not know of the workspace that was made while this one waited.
    let live = super::live_forks(&mut client)?;
    match attach::known(&mut client, &jobs, name, &live, false)? {
        Known::Job(job) if job.asked == asked => match jobs.load(&shared)? {
            Some(common) if !common.is_stale(&live) => return Ok(job),
            _ => finish::drop_job(&mut client, &jobs, &job)?,
        },
        Known::Job(_) => return Err(attach::otherwise(name)),
        // It is the workspace that commits.
        Known::None { .. } => {}
    }
    let mut work = Work::new(context, options, &jobs, &live, by, waiter)?;
    let facts = facts::of_job(&options.options);
    let mut common = match jobs.load(&shared)? {
        Some(job) if !job.is_stale(&live) && job.end.is_none() => {
            refuse_stranger(context, &client, &facts, workspace, &job)?;
            refuse_other(&mut client, options, workspace, &job, plans)?;
            job
        }
        left => {
            let lost = left.as_ref().is_some_and(|left| left.has_lost(&live));
            if let Some(left) = left {
                finish::drop_job(&mut client, &jobs, &left)?;
            }
            let lifetime = options.lifetime.unwrap_or_default();
            let when = match lifetime {
                Lifetime::Pipeline => options.commit.unwrap_or(When::OnSuccess),
                _ => When::Never,
            };
            let job = Job::new(shared.clone(), when, true, Vec::new());
            let mut job = attach::begun(job, lost);
            job.shared = Some(Shared {
                lifetime,
                touched: state::now(),
                scope: scope_of(&facts),
            });
            jobs.save(&job)?;
            job
        }
    };
    let made = fill(&mut work, &mut client, &jobs, &mut common, plans);
    if let Err(failure) = made {
        if common.volumes.is_empty() {
            finish::drop_job(&mut client, &jobs, &common)?;
        }
        return Err(failure);
    }
    let strict = options.options.strict;
    let mut job = Job::new(name.into(), When::Never, strict, attach::agents(options));
    job.joined = Some(shared);
    jobs.save(&job)?;
    for plan in plans {
        if let Err(failure) = bind(&work, &mut client, &jobs, &mut job, &common, plan) {
            if waiter.has_given_up() {
                return Err(failure);
            }
            finish::drop_job(&mut client, &jobs, &job)?;
            return Err(failure);
        }
    }
    waiter.is_whole()?;
    job.asked = asked;
    jobs.save(&job)?;
    touch(&jobs, &mut common)?;
    Ok(job)
}

fn scope_of(facts: &Option<Facts>) -> Option<String> {
    facts.as_ref().and_then(|facts| facts.scope.clone())
}

/// Refuses a job that is trusted otherwise than who made the workspace: the one would read what the other wrote, or commit it.
fn refuse_stranger(
    context: &Context,
    client: &Client,
    facts: &Option<Facts>,
    name: &str,
    common: &Job,
) -> Result<(), Failure> {
    let judged = forks::trust(client, facts.clone());
    let judged = judged.unwrap_or_else(|| placing::unjudged(context));
    let scope = common.shared.as_ref().and_then(|s| s.scope.clone());
    let is_other = judged != common.trust();
    if !is_other && (judged != "untrusted" || scope == scope_of(facts)) {
        return Ok(());
    }
    let message = match is_other {
        true => format!(
            "the workspace {name} is {}, and this job {judged}",
            common.trust()
        ),
        false => format!("the workspace {name} is that of another untrusted job"),
    };
    Err(Failure::new(Code::Policy, message).hint("join one with a name of its own"))
}

/// Refuses what a workspace that is there already cannot have any more.
fn refuse_other(
    client: &mut Client,
    options: &Attach,
    name: &str,
    common: &Job,
    plans: &[Plan],
) -> Result<(), Failure> {
    let refuse = |what: String, option: &str| {
        let message = format!("the workspace {name} has {what} already");
        Err(Failure::new(Code::Usage, message).hint(format!(
            "join it without {option}, or end it with forkvol finish --join {name}"
        )))
    };
    let has = common.shared.as_ref().map(|shared| shared.lifetime);
    if let (Some(has), Some(wanted)) = (has, options.lifetime)
        && has != wanted
    {
        let value = has.to_possible_value();
        let value = value.map_or_else(String::new, |value| value.get_name().to_owned());
        return refuse(format!("the lifetime {value}"), "--lifetime");
    }
    let Some(wanted) = options.options.size else {
        return Ok(());
    };
    let is_wanted = |volume: &&Volume| plans.iter().any(|p| p.wish.volume == volume.volume);
    for volume in common.volumes.iter().filter(is_wanted) {
        let Some(fork) = volume.fork.clone() else {
            continue;
        };
        let size: u64 = take(&client.call(&Request::Find { fork })?, "/fork/size")?;
        if size != wanted {
            let what = format!("{} with a size of {}", volume.volume, output::size(size));
            return refuse(what, "--size");
        }
    }
    Ok(())
}

/// Gives a workspace the volumes that it does not have yet.
fn fill(
    work: &mut Work<'_>,
    client: &mut Client,
    jobs: &Jobs,
    common: &mut Job,
    plans: &[Plan],
) -> Result<(), Failure> {
    let lifetime = common.shared.as_ref().map(|shared| shared.lifetime);
    let commits = lifetime == Some(Lifetime::Pipeline);
    // A join that was cut off left them, and nobody is in them.
    while let Some(half) = common.volumes.iter().position(|v| v.mount.is_none()) {
        finish::drop_volume(client, &common.volumes[half])?;
        common.volumes.remove(half);
        jobs.save(common)?;
    }
    for plan in plans {
        if common.volumes.iter().any(|v| v.volume == plan.wish.volume) {
            continue;
        }
        let mut plan = plan.clone();
        plan.fork = paths::excluding(&plan.fork, &plan.wish);
        plan.wish.paths.clear();
        plan.commit = common.commit;
        plan.fork.ephemeral |= !commits;
        // That concerns the member, not the workspace.
        plan.fork.read_only = false;
        common.volumes.push(placing::empty(&plan));
        if let Err(failure) = work.volume(client, common, &plan) {
            if let Some(volume) = common.volumes.pop() {
                finish::drop_volume(client, &volume)?;
            }
            jobs.save(common)?;
            return Err(failure);
        }
    }
    jobs.save(common)
}

/// Puts a volume of a workspace in a member's places.
fn bind(
    work: &Work<'_>,
    client: &mut Client,
    jobs: &Jobs,
    job: &mut Job,
    common: &Job,
    plan: &Plan,
) -> Result<(), Failure> {
    let known = common.volumes.iter().find(|v| v.volume == plan.wish.volume);
    let Some((volume, mount)) = known.and_then(|v| v.mount.as_ref().map(|mount| (v, mount))) else {
        let message = format!("the workspace has no volume {}", plan.wish.volume);
        return Err(Failure::new(Code::Failed, message));
    };
    let root = mounting::mount_path(mount);
    if !mounting::is_on_top(root, mount) {
        let message = format!(
            "the workspace's mount {} is not seen from here",
            root.display()
        );
        return Err(Failure::new(Code::Policy, message)
            .hint("it was made in another mount namespace: give this container the folder of the mounts, bound rshared"));
    }
    job.volumes.push(Volume {
        fork: None,
        folder: None,
        paths: Vec::new(),
        shared: true,
        ..volume.clone()
    });
    let at = job.volumes.len() - 1;
    for path in &plan.wish.paths {
        let made = paths::missing(path)?;
        let target = work.place(job, plan, path)?;
        work.look_at(plan, &target.path)?;
        let inside = match &target.folder {
            Some(folder) => root.join(folder),
            None => root.to_owned(),
        };
        if !inside.is_dir() {
            paths::make_folder_open(&inside)?;
        }
        let alone = work.alone_at(client, job, &target.path)?;
        job.volumes[at].paths.push(Spot {
            inner: target.folder,
            link: Some(Link::Bind),
            ..Spot::plain(target.path.clone(), made)
        });
        jobs.save(job)?;
        drop(alone);
        let piece = placing::piece(&job.volumes[at], job.volumes[at].paths.len() - 1);
        work.put_in_place(Link::Bind, &inside, &target.path, piece)?;
        if plan.fork.read_only {
            kernel::make_bind_read_only(&target.path).map_err(|e| {
                let message = format!("{} cannot be made read-only: {e}", target.path.display());
                Failure::new(Code::Failed, message)
            })?;
        }
    }
    jobs.save(job)
}

fn touch(jobs: &Jobs, common: &mut Job) -> Result<(), Failure> {
    if let Some(shared) = &mut common.shared {
        shared.touched = state::now();
    }
    jobs.save(common)
}

fn members(jobs: &Jobs, workspace: &str) -> Result<Vec<Job>, Failure> {
    let of = |job: &Job| job.joined.as_deref() == Some(workspace);
    Ok(jobs.all()?.into_iter().filter(of).collect())
}

/// After a member has left: the workspace ends with its last one if that was its lifetime.
pub fn left(context: &Context, jobs: &Jobs, workspace: &str) -> Result<(), Failure> {
    let _nobody_else = jobs.lock(workspace)?;
    let Some(mut common) = jobs.load(workspace)? else {
        return Ok(());
    };
    let lifetime = common.shared.as_ref().map(|shared| shared.lifetime);
    let is_step = lifetime == Some(Lifetime::Step);
    if is_step && members(jobs, workspace)?.is_empty() {
        return finish::drop_job(&mut context.connect()?, jobs, &common);
    }
    touch(jobs, &mut common)
}

/// Takes a workspace from those who are in it still, before it ends.
pub fn dissolve(jobs: &Jobs, workspace: &str) -> Result<(), Failure> {
    for job in members(jobs, workspace)? {
        warn(&format!(
            "job {} is in the workspace still; it is gone for it",
            job.job
        ));
        for volume in &job.volumes {
            finish::take_apart(None, volume, By::default_for_caller(), true);
        }
        jobs.remove(&job.job)?;
    }
    Ok(())
}

/// Whether a job was in a workspace that is gone.
pub fn is_left(jobs: &Jobs, job: &Job) -> Result<bool, Failure> {
    match &job.joined {
        Some(workspace) => Ok(jobs.load(workspace)?.is_none()),
        None => Ok(false),
    }
}

/// Whether nobody has been in a workspace for long.
pub fn is_lonely(jobs: &Jobs, job: &Job) -> Result<bool, Failure> {
    let Some(shared) = &job.shared else {
        return Ok(false);
    };
    let alone = members(jobs, &job.job)?.is_empty();
    Ok(alone && state::now().saturating_sub(shared.touched) > LONELY)
}
