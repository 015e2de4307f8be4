//! The end of a job: all its volumes committed as one, or dropped; then everything put back as it was.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Value, json};

use super::state::{Job, Jobs, Spot, Volume};
use super::{Finish, Link, job_name, within};
use crate::cli::client::Client;
use crate::cli::ending::End;
use crate::cli::forks::{self, take};
use crate::cli::mounting::{self, By};
use crate::cli::output::{self, warn};
use crate::cli::volumes::version_name;
use crate::cli::{Context, exit};
use crate::protocol::{self, Code, Failure, Request};

pub fn finish(context: &Context, options: &Finish) -> Result<(), Failure> {
    let result = if options.stale {
        let (context, options) = (context.clone(), options.clone());
        within(options.deadline, move || drop_stale(&context))
    } else {
        let name = job_name(options.job.as_deref())?;
        let (context, options) = (context.clone(), options.clone());
        within(options.deadline, move || {
            finish_job(&context, &options, &name)
        })
    };
    match result {
        Ok(document) => output::show(context.json, &document, |_| String::new()),
        Err(failure) if options.strict || failure.code == Code::Usage => Err(failure),
        Err(failure) => {
            warn(&exit::line(&failure));
            output::show(
                context.json,
                &json!({"finish": null, "error": failure.message}),
                |_| String::new(),
            )
        }
    }
}

fn drop_stale(context: &Context) -> Result<Value, Failure> {
    let jobs = Jobs::of(&context.place)?;
    let mut dropped = Vec::new();
    for job in jobs.all()?.iter().filter(|job| job.is_stale()) {
        drop_job(context, &jobs, job)?;
        output::note(&format!(
            "job {} is over without an end: its forks are abandoned",
            job.job
        ));
        dropped.push(job.job.clone());
    }
    Ok(json!({ "stale": dropped }))
}

/// Ends a job without committing anything.
pub fn drop_job(context: &Context, jobs: &Jobs, job: &Job) -> Result<(), Failure> {
    let mut client = context.connect()?;
    for volume in &job.volumes {
        drop_fork(&mut client, volume)?;
        take_apart(Some(&mut client), volume, By::default_for_caller(), true);
    }
    jobs.remove(&job.job)
}

fn drop_fork(client: &mut Client, volume: &Volume) -> Result<(), Failure> {
    let Some(fork) = &volume.fork else {
        return Ok(());
    };
    match client.call(&Request::Abandon {
        forks: vec![fork.clone()],
    }) {
        // Over already.
        Err(failure) if failure.code == Code::NotFound => Ok(()),
        result => result.map(drop),
    }
}

fn finish_job(context: &Context, options: &Finish, name: &str) -> Result<Value, Failure> {
    let jobs = Jobs::of(&context.place)?;
    let Some(mut job) = jobs.load(name)? else {
        return Ok(json!({ "finish": null }));
    };
    let end = options
        .outcome
        .unwrap_or_else(|| End::of_status(options.status.unwrap_or(1)));
    let when = options.commit.unwrap_or(job.commit);
    let mut client = context.connect()?;
    if !options.keep {
        job.end = Some(end);
        jobs.save(&job)?;
    }
    let mut outcomes = BTreeMap::new();
    let result = settle(&mut client, &job, when.at(end), options.keep, &mut outcomes);
    if !options.keep {
        for volume in job.volumes.iter().rev() {
            take_apart(Some(&mut client), volume, By::default_for_caller(), true);
        }
        jobs.remove(name)?;
    }
    result?;
    let said: Vec<String> = outcomes
        .iter()
        .map(|(volume, what)| format!("{volume} {what}"))
        .collect();
    output::note(&format!("job {name}: {}", said.join(", ")));
    Ok(json!({"finish": {"job": name, "outcome": end, "volumes": outcomes}}))
}

/// Commits what is to be committed, all or none, and drops the rest.
fn settle(
    client: &mut Client,
    job: &Job,
    when: Option<protocol::When>,
    keep: bool,
    outcomes: &mut BTreeMap<String, String>,
) -> Result<(), Failure> {
    let mut committed: Vec<&Volume> = Vec::new();
    for volume in &job.volumes {
        let why = volume
            .degraded
            .clone()
            .or_else(|| volume.refused.clone())
            .or_else(|| when.and(accident(volume)));
        match (why, when) {
            (None, Some(_)) => committed.push(volume),
            (Some(why), Some(_)) => {
                warn(&format!("{} is not committed: {why}", volume.volume));
                outcomes.insert(volume.volume.clone(), "not committed".into());
            }
            (_, None) => {
                outcomes.insert(volume.volume.clone(), "abandoned".into());
            }
        }
    }
    let forks: Vec<String> = committed.iter().filter_map(|v| v.fork.clone()).collect();
    let mut result = Ok(());
    if let (Some(when), false) = (when, forks.is_empty()) {
        committed
            .iter()
            .filter_map(|v| v.mount.as_ref())
            .for_each(forks::write_back);
        let request = Request::Commit(protocol::Commit {
            keep,
            ..protocol::Commit::of(forks, when)
        });
        match client.call(&request) {
            Ok(answer) => {
                let commits: Vec<Value> = take(&answer, "/commits")?;
                for volume in &committed {
                    let commit = commits.iter().find(|c| c["fork"] == json!(volume.fork));
                    let what = match commit.filter(|c| !c["version"].is_null()) {
                        Some(commit) => format!("committed as {}", version_name(commit).trim()),
                        None => "unchanged".into(),
                    };
                    outcomes.insert(volume.volume.clone(), what);
                }
            }
            // One batch: where one fork is over already, an earlier finish had got that far.
            Err(failure) if failure.code == Code::NotFound => {
                for volume in &committed {
                    outcomes.insert(volume.volume.clone(), "ended before".into());
                }
            }
            Err(failure) => result = Err(failure),
        }
    }
    if !keep {
        for volume in &job.volumes {
            drop_fork(client, volume)?;
        }
    }
    result
}

/// Why what a volume holds now looks like no job's work: a path that does not lead to it any more, or all of it gone.
fn accident(volume: &Volume) -> Option<String> {
    let mount = volume.mount.as_ref()?;
    for spot in volume.paths.iter().filter(|spot| spot.link.is_some()) {
        if !leads_to(spot, volume) {
            return Some(format!(
                "{} was removed or replaced while the job ran",
                spot.path.display()
            ));
        }
    }
    let mut entries = fs::read_dir(mounting::mount_path(mount)).ok()?;
    (volume.base.is_some() && entries.next().is_none())
        .then(|| "all of it was removed while the job ran".into())
}

fn leads_to(spot: &Spot, volume: &Volume) -> bool {
    let Some(mount) = &volume.mount else {
        return false;
    };
    match spot.link {
        Some(Link::Symlink) => {
            fs::read_link(&spot.path).is_ok_and(|to| to.starts_with(mounting::mount_path(mount)))
        }
        _ => mounting::is_on_top(&spot.path, mount.device),
    }
}

/// Puts everything that was made for a volume back as it was. Nothing of it fails: what cannot be done is a warning.
pub fn take_apart(client: Option<&mut Client>, volume: &Volume, by: By, with_paths: bool) {
    let Some(mount) = &volume.mount else {
        return remove_folders(volume, with_paths);
    };
    for spot in volume.paths.iter().rev() {
        match spot.link {
            Some(Link::Symlink) if leads_to(spot, volume) => {
                if let Err(error) = fs::remove_file(&spot.path) {
                    warn(&format!(
                        "cannot remove the link {}: {error}",
                        spot.path.display()
                    ));
                }
            }
            Some(Link::Bind)
                if spot.path != mounting::mount_path(mount) && leads_to(spot, volume) =>
            {
                mounting::unbind_at_once(&spot.path, mount);
            }
            _ => {}
        }
    }
    mounting::detach_by(client, mount, by);
    remove_folders(volume, with_paths);
}

fn remove_folders(volume: &Volume, with_paths: bool) {
    if let Some(folder) = &volume.folder {
        remove_if_empty(folder);
        // The job's folder, with its last volume.
        if let Some(parent) = folder.parent() {
            remove_if_empty(parent);
        }
    }
    if with_paths {
        for folder in volume
            .paths
            .iter()
            .rev()
            .flat_map(|spot| spot.made.iter().rev())
        {
            remove_if_empty(folder);
        }
    }
}

fn remove_if_empty(folder: &Path) {
    match fs::remove_dir(folder) {
        Ok(()) => {}
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
            ) => {}
        Err(error) => warn(&format!("cannot remove {}: {error}", folder.display())),
    }
}
