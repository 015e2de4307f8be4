//! Jobs whose start and end are different processes: `attach`, `finish`, `jobs`.
//!
//! A job is one file: what was attached, where, and by whom. It is written before anything it names is made and removed last, so
//! that whatever was interrupted can be ended by somebody else.

mod as_bytes;
mod attach;
mod finish;
mod join;
mod placing;
mod plan;
mod state;
mod variables;

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use crossbeam::channel::RecvTimeoutError;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::client::Client;
use super::ending::{End, When};
use super::forks::{ForkFacts, take};
use super::output::{self, Shown};
use super::paths::Volumes;
use super::{Context, ForkOptions, values};
use crate::protocol::{Code, Failure, Request};
use state::Jobs;

pub use attach::attach;
pub use finish::finish;
use join::Lifetime;
pub use variables::suffix;

#[derive(Clone, Debug, Args)]
pub struct Attach {
    #[command(flatten)]
    volumes: Volumes,
    /// A file whose cache key says which volumes (default: .forkvol.yml, where nothing else does)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["volume", "path", "pipeline"], value_parser = values::path())]
    config: Option<PathBuf>,
    /// A pipeline.yml whose cache keys say which volumes
    #[arg(long, value_name = "FILE", conflicts_with_all = ["volume", "path"], value_parser = values::path())]
    pipeline: Option<PathBuf>,
    /// The pipeline's step: its key, its label, or #N (default: from the variables of the CI host)
    #[arg(long, value_name = "KEY|LABEL|#N", requires = "pipeline", conflicts_with_all = ["volume", "path", "config"])]
    step: Option<String>,
    /// The caches of a tool, or auto for those that the folder tells of; may be repeated
    #[arg(long, value_name = "NAME|auto")]
    preset: Vec<String>,
    #[command(flatten)]
    options: ForkOptions,
    /// The job's name (default: from the variables of the CI host)
    #[arg(long, value_name = "ID", value_parser = values::name)]
    job: Option<String>,
    /// Where the job is attached already, add these volumes to it; all of them are committed as one
    #[arg(long, conflicts_with = "join")]
    add: bool,
    /// Share the forks with all that join the workspace of this name
    #[arg(long, value_name = "NAME", value_parser = values::name)]
    join: Option<String>,
    /// When the workspace ends (default: build): all but pipeline are thrown away then
    #[arg(long, value_enum, requires = "join", conflicts_with = "add")]
    lifetime: Option<Lifetime>,
    /// A process without which the job is over, beside BUILDKITE_AGENT_PID; may be repeated
    #[arg(long, value_name = "PID")]
    agent_pid: Vec<u32>,
    /// The folder below which forks are mounted
    #[arg(long, value_name = "DIR", value_parser = values::path())]
    mount_root: Option<PathBuf>,
    /// How a path leads to its fork (default: bind)
    #[arg(long, value_enum)]
    link: Option<Link>,
    /// What becomes of content that a path has already (default: hide)
    #[arg(long, value_enum)]
    existing: Option<Existing>,
    /// Write the job's variables into this file instead of printing them
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,
    /// When finish commits (default: on-success)
    #[arg(long, value_enum, value_name = "WHEN")]
    commit: Option<When>,
    /// Go without the cache after this long
    #[arg(long, value_parser = values::duration, default_value = "10s")]
    deadline: Duration,
}

#[derive(Clone, Debug, Args)]
pub struct Finish {
    /// The job's name (default: from the variables of the CI host)
    #[arg(long, value_name = "ID", conflicts_with = "stale", value_parser = values::name)]
    job: Option<String>,
    /// End the workspace of this name
    #[arg(long, value_name = "NAME", conflicts_with_all = ["job", "stale"], value_parser = values::name)]
    join: Option<String>,
    /// The exit status of the job's command
    #[arg(long, value_name = "N", conflicts_with_all = ["outcome", "stale"])]
    status: Option<i32>,
    /// Exit statuses that are a success, beside 0
    #[arg(long, value_name = "STATUS", value_delimiter = ',', conflicts_with_all = ["outcome", "stale"],
          value_parser = clap::value_parser!(i32).range(0..=255))]
    success: Vec<i32>,
    /// How the job ended
    #[arg(long, value_enum, conflicts_with = "stale")]
    outcome: Option<End>,
    /// When to commit (default: as attach was told)
    #[arg(long, value_enum, value_name = "WHEN", conflicts_with = "stale")]
    commit: Option<When>,
    /// Commit the state as of now; the job stays attached
    #[arg(long, conflicts_with = "stale")]
    keep: bool,
    /// End the jobs whose agent, boot or mounts are gone
    #[arg(long)]
    stale: bool,
    /// Leave the rest for later after this long
    #[arg(long, value_parser = values::duration, default_value = "60s")]
    deadline: Duration,
    /// Fail where the cache fails
    #[arg(long)]
    strict: bool,
}

/// How a path leads to its fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Link {
    Bind,
    Symlink,
}

/// What becomes of content that a path has already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Existing {
    /// It is covered, and back after the job.
    Hide,
    /// It is copied into a fork that is empty.
    Seed,
    Fail,
}

/// The job's name: as given, or from the variables of the host.
fn job_name(given: Option<&str>) -> Result<String, Failure> {
    if let Some(name) = given {
        return Ok(state::safe_name(name));
    }
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let hosts: [&[&str]; 4] = [
        &["BUILDKITE_JOB_ID"],
        &[
            "GITHUB_RUN_ID",
            "GITHUB_RUN_ATTEMPT",
            "GITHUB_JOB",
            "RUNNER_NAME",
            "RUNNER_WORKSPACE",
        ],
        &["CI_SERVER_HOST", "CI_JOB_ID"],
        &["BUILD_TAG", "NODE_NAME", "EXECUTOR_NUMBER", "WORKSPACE"],
    ];
    hosts
        .iter()
        .find_map(|names| {
            let parts: Option<Vec<String>> = names.iter().map(|name| variable(name)).collect();
            // No value has this sign, so no two jobs have one name.
            parts.map(|parts| state::safe_name(&parts.join("\0")))
        })
        .ok_or_else(|| {
            Failure::new(Code::Usage, "no CI host's variables name a job").hint("name it: --job ID")
        })
}

/// `jobs`: what is attached.
pub fn jobs(context: &Context) -> Result<(), Failure> {
    let jobs = Jobs::of(&context.place)?.all()?;
    let live = match jobs.is_empty() {
        true => HashSet::new(),
        false => live_forks(&mut context.connect()?)?,
    };
    let rows: Vec<Value> = jobs
        .into_iter()
        .map(|job| {
            let volumes: Vec<&str> = job.volumes.iter().map(|v| v.volume.as_str()).collect();
            let age = state::now().saturating_sub(job.created);
            json!({
                "job": job.job,
                "state": match job.is_stale(&live) {
                    true if job.lost && job.is_nowhere() => "lost",
                    true => "stale",
                    false => "attached",
                },
                "hit": job.hit(),
                "age": age,
                "names": volumes.join(" "),
                "volumes": job.volumes,
                "agent": job.agents.first().map(|agent| agent.pid),
            })
        })
        .collect();
    output::show(context.json, &json!({ "jobs": rows }), |_| {
        output::table(
            &rows,
            &[
                ("JOB", "/job", Shown::Plain),
                ("STATE", "/state", Shown::Plain),
                ("HIT", "/hit", Shown::Plain),
                ("AGE", "/age", Shown::Seconds),
                ("VOLUMES", "/names", Shown::Plain),
            ],
        )
    })
}

/// The forks that are mounted somewhere, whatever this process sees of it.
fn live_forks(client: &mut Client) -> Result<HashSet<String>, Failure> {
    let forks: Vec<ForkFacts> = take(&client.call(&Request::Forks)?, "/forks")?;
    let live = forks.into_iter().filter(|fork| fork.state == "live");
    Ok(live.map(|fork| fork.id).collect())
}

/// Does something for a job in a thread of its own, and goes on without it when the deadline has passed.
fn within<T: Send + 'static>(
    deadline: Duration,
    job: &str,
    remedy: &str,
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    within_unless(deadline, job, remedy, || true, work)
}

/// As [`within`], but who would go on without it asks first. Where it may not give up any more, the work is done but for a moment.
fn within_unless<T: Send + 'static>(
    deadline: Duration,
    job: &str,
    remedy: &str,
    may_give_up: impl FnOnce() -> bool,
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let (done, result) = crossbeam::channel::bounded(1);
    std::thread::spawn(move || {
        // Nobody waits any more when the deadline has passed.
        done.send(work()).unwrap_or_default();
    });
    let late = || {
        let seconds = deadline.as_secs_f64();
        let failure = Failure::new(Code::Busy, format!("{job} is not done within {seconds} s"));
        Err(failure.hint(format!("see forkvol daemon status, {remedy}")))
    };
    match result.recv_timeout(deadline) {
        Ok(done) => done,
        Err(RecvTimeoutError::Timeout) if !may_give_up() => {
            result.recv().unwrap_or_else(|_| late())
        }
        Err(_) => late(),
    }
}
