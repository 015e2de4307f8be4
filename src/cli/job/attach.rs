//! The start of a job: forks made, mounted and put in place, one after the other, each step noted before the next.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::ArgMatches;
use serde_json::{Value, json};

use super::placing::{Waiter, Work, current, empty, make_plain, unjudged};
use super::plan::{Plan, plans};
use super::state::{Agent, Job, Jobs, Spot, Volume};
use super::{Attach, finish, job_name, join, live_forks, variables, within, within_unless};
use crate::cli::client::Client;
use crate::cli::ending::When;
use crate::cli::mounting::{self, By};
use crate::cli::output::{self, warn};
use crate::cli::paths::{self, Wish};
use crate::cli::{Context, exit};
use crate::protocol::{Code, Failure};

/// Attaches volumes to a job. A cache that cannot be had is no failure of the job, unless it is strict.
pub fn attach(
    context: &Context,
    options: Attach,
    matches: Option<&ArgMatches>,
) -> Result<(), Failure> {
    let plans = plans(&options, matches)?;
    for pid in &options.agent_pid {
        if Agent::of(*pid).is_none() {
            let message = format!("--agent-pid {pid} is no process");
            return Err(Failure::new(Code::Usage, message)
                .hint("name one that lives as long as the job, or none"));
        }
    }
    if plans.is_empty() {
        output::note("no volume was asked for: nothing is attached");
        if let Some(path) = &options.env_file {
            // What an earlier job was told is not this one's.
            variables::write(path, &[])?;
        }
        return output::show(context.json, &json!({"attach": null}), |_| String::new());
    }
    variables::refuse_clash(plans.iter().map(|plan| plan.wish.volume.as_str()))?;
    let name = job_name(options.job.as_deref())?;
    if let Some(path) = &options.env_file {
        variables::check(path)?;
    }
    let strict = options.options.strict;
    let begun = Instant::now();
    let waiter = Arc::new(Waiter::default());
    let (job, remedy) = (format!("job {name}"), "or give it a longer --deadline");
    let made = within_unless(options.deadline, &job, remedy, || waiter.may_give_up(), {
        let (context, options, plans, name, waiter) = (
            context.clone(),
            options.clone(),
            plans.clone(),
            name.clone(),
            waiter.clone(),
        );
        move || match &options.join {
            Some(workspace) => join::make(&context, &options, &plans, &name, workspace, &waiter),
            None => make(&context, &options, &plans, &name, &waiter),
        }
    });
    if made.is_err() {
        waiter.uncover();
    }
    let whole = |job: Job| match strict {
        true => whole(job, &plans),
        false => Ok(job),
    };
    let job = match made.and_then(whole) {
        Ok(job) => job,
        Err(failure) if strict || failure.code == Code::Usage => return Err(failure),
        Err(failure) => without_cache(context, &plans, &name, &failure),
    };
    for volume in &job.volumes {
        if let Some(why) = &volume.degraded {
            warn(&format!("the job goes without {}: {why}", volume.volume));
        }
    }
    let spots = job.volumes.iter().flat_map(|volume| &volume.paths);
    let bound = spots.filter(|spot| spot.link.is_some());
    let bound: Vec<PathBuf> = bound.map(|spot| spot.path.clone()).collect();
    // An engine that does not answer is waited for no longer than a cache.
    let hidden = within(options.deadline, "the engine", "", move || {
        Ok(mounting::hidden_from_engine(&bound))
    });
    if let Ok(Some(why)) = hidden {
        warn(&why);
    }
    output::note(&format!(
        "job {} {}: {} hit, trust {}, {:.0} ms",
        job.job,
        what_it_has(&job),
        job.hit(),
        job.trust(),
        begun.elapsed().as_secs_f64() * 1e3
    ));
    tell(context, &options, &job)
}

/// Fails if a job that was attached before goes without one of these volumes.
fn whole(job: Job, plans: &[Plan]) -> Result<Job, Failure> {
    let is_asked = |volume: &&Volume| plans.iter().any(|p| p.wish.volume == volume.volume);
    for volume in job.volumes.iter().filter(is_asked) {
        if let Some(why) = &volume.degraded {
            let message = format!("job {} goes without {}: {why}", job.job, volume.volume);
            return Err(Failure::new(Code::Failed, message)
                .hint(format!("forkvol finish --job {} ends it", job.job)));
        }
    }
    Ok(job)
}

/// The volumes that a job has, and those that it goes without.
fn what_it_has(job: &Job) -> String {
    let volumes = job.volumes.iter();
    let (gone, had): (Vec<&Volume>, Vec<_>) = volumes.partition(|v| v.degraded.is_some());
    let had: Vec<String> = had.into_iter().map(with_parent).collect();
    let gone: Vec<&str> = gone.into_iter().map(|v| v.volume.as_str()).collect();
    match (had.join(", "), gone.join(", ")) {
        (had, gone) if gone.is_empty() => format!("has {had}"),
        (had, gone) if had.is_empty() => format!("goes without {gone}"),
        (had, gone) => format!("has {had}, goes without {gone}"),
    }
}

/// A volume, and which parent it was begun from where it has nothing of its own.
fn with_parent(volume: &Volume) -> String {
    match (volume.hit.as_str(), &volume.base) {
        ("fallback", Some(base)) => format!("{} from {base}", volume.volume),
        _ => volume.volume.clone(),
    }
}

fn document(job: &Job) -> Value {
    json!({
        "job": job.job,
        "hit": job.hit(),
        "volumes": job.volumes,
        "trust": job.trust(),
        "degraded": job.volumes.iter().any(|v| v.degraded.is_some()),
    })
}

fn tell(context: &Context, options: &Attach, job: &Job) -> Result<(), Failure> {
    let document = document(job);
    let variables = variables::of(job, &document);
    if let Some(path) = &options.env_file {
        variables::write(path, &variables)?;
    }
    match (context.json, &options.env_file) {
        (true, _) => output::print_json(&json!({ "attach": document })),
        (false, Some(_)) => Ok(()),
        (false, None) => output::print(&variables::for_shell(&variables)),
    }
}

/// A job whose cache cannot be had at all: empty folders, and why.
fn without_cache(context: &Context, plans: &[Plan], name: &str, failure: &Failure) -> Job {
    let agents = Vec::new();
    let mut job = Job::new(name.into(), When::Never, false, agents);
    for plan in plans {
        let mut volume = empty(plan);
        volume.degraded = Some(exit::line(failure));
        volume.trust = unjudged(context);
        for path in &plan.wish.paths {
            make_plain(path);
            let path = paths::absolute(path);
            volume.paths.push(Spot::plain(path, Vec::new()));
        }
        job.volumes.push(volume);
    }
    job
}

/// What was asked for one volume, as a line that is the same for the same question, in whatever folder it is asked.
pub(super) fn question(plan: &Plan) -> String {
    let o = &plan.fork;
    let fork = (
        &o.from,
        &o.parent,
        o.read_only,
        o.ephemeral,
        o.size,
        (&o.label, absolute(&o.label_file), absolute(&o.lock_file)),
        &o.exclude,
        o.owner,
    );
    let wish = Wish {
        paths: absolute(&plan.wish.paths),
        ..plan.wish.clone()
    };
    let (link, existing, commit) = (plan.link, plan.existing, plan.commit);
    format!("{wish:?} {fork:?} {link:?} {existing:?} {commit:?}\n")
}

fn absolute(paths: &[PathBuf]) -> Vec<PathBuf> {
    paths.iter().map(paths::absolute).collect()
}

/// The processes without which the job is over.
pub(super) fn agents(options: &Attach) -> Vec<Agent> {
    let named = std::env::var("BUILDKITE_AGENT_PID").ok();
    let named = named.and_then(|pid| pid.parse().ok());
    let pids = named.iter().chain(&options.agent_pid);
    pids.filter_map(|pid| Agent::of(*pid)).collect()
}

fn make(
    context: &Context,
    options: &Attach,
    plans: &[Plan],
    name: &str,
    waiter: &Waiter,
) -> Result<Job, Failure> {
    let jobs = Jobs::of(&context.place)?;
    let asked: String = plans.iter().map(question).collect();
    // A store before anything is put into its folder.
    let mut client = context.connect()?;
    let _alone = jobs.lock(name)?;
    // What was asked before would not know of forks that were made while this one waited.
    let live = live_forks(&mut client)?;
    let strict = options.options.strict;
    let mut job = match known(&mut client, &jobs, name, &live, options.add)? {
        Known::Job(job) if job.asked == asked => return Ok(job),
        Known::Job(job) if options.add && job.joined.is_none() => job,
        Known::Job(_) => return Err(otherwise(name)),
        Known::None { lost } => {
            let job = Job::new(name.into(), When::OnSuccess, strict, agents(options));
            begun(job, lost)
        }
    };
    let is_new = |plan: &&Plan| {
        !job.asked
            .split_inclusive('\n')
            .any(|had| had == question(plan))
    };
    let plans: Vec<&Plan> = plans.iter().filter(is_new).collect();
    let had = job.volumes.len();
    let names = job.volumes.iter().map(|volume| volume.volume.as_str());
    variables::refuse_clash(names.chain(plans.iter().map(|plan| plan.wish.volume.as_str())))?;
    jobs.save(&job)?;
    let by = By::default_for_caller();
    let mut work = Work::new(context, options, &jobs, &live, by, waiter)?;
    for plan in &plans {
        job.volumes.push(empty(plan));
        let begun = Instant::now();
        let made = work.volume(&mut client, &mut job, plan);
        current(&mut job).took = begun.elapsed().as_secs_f64();
        if let Err(failure) = made {
            if waiter.has_given_up() {
                return Err(failure);
            }
            if strict {
                finish::drop_volumes(&mut client, &mut job, had..)?;
                match had {
                    0 => jobs.remove(name)?,
                    _ => jobs.save(&job)?,
                }
                return Err(failure);
            }
            work.go_without(&mut client, &mut job, plan, &failure)?;
        }
    }
    waiter.is_whole()?;
    job.asked += &plans.into_iter().map(question).collect::<String>();
    jobs.save(&job)?;
    Ok(job)
}

/// What an attach finds of its job.
pub(super) enum Known {
    Job(Job),
    /// Nothing any more. `lost`: it was at work, and what it wrote is gone.
    None {
        lost: bool,
    },
}

/// A job that begins, or begins once more.
pub(super) fn begun(mut job: Job, lost: bool) -> Job {
    job.lost = lost;
    if lost && job.commit != When::Never {
        let name = &job.job;
        warn(&format!(
            "the forks of job {name} were lost while it ran: it is attached anew, and nothing of it will be committed"
        ));
    }
    job
}

/// The job as it is; what is left of an earlier one of that name, of an attach or of an end that was cut off, is taken away.
pub(super) fn known(
    client: &mut Client,
    jobs: &Jobs,
    name: &str,
    live: &HashSet<String>,
    add: bool,
) -> Result<Known, Failure> {
    let Some(mut job) = jobs.load(name)? else {
        return Ok(Known::None { lost: false });
    };
    let unfinished = job.unfinished();
    if job.is_stale(live) || job.end.is_some() || (unfinished.start == 0 && job.shared.is_none()) {
        let lost = job.has_lost(live);
        if lost && add {
            let message = format!("job {name} has lost its forks while it ran: nothing is added");
            return Err(Failure::new(Code::Failed, message).hint(
                "attach it without --add: it goes on with the last versions, and commits nothing",
            ));
        }
        finish::drop_job(client, jobs, &job)?;
        return Ok(Known::None { lost });
    }
    finish::drop_volumes(client, &mut job, unfinished)?;
    jobs.save(&job)?;
    Ok(Known::Job(job))
}

/// That a job has something else than what is asked for.
pub(super) fn otherwise(name: &str) -> Failure {
    let message = format!("job {name} is attached with other volumes, paths or options");
    Failure::new(Code::Usage, message).hint(format!("forkvol finish --job {name}"))
}
