//! The end of a job: all its volumes committed as one, or dropped; then everything put back as it was.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::RangeBounds;
use std::path::Path;

use serde_json::{Value, json};

use super::state::{self, Job, Jobs, Spot, Volume};
use super::variables::HAS_VERSION;
use super::{Finish, Link, job_name, join, live_forks, within};
use crate::cli::client::Client;
use crate::cli::ending::End;
use crate::cli::forks::{self, ForkFacts, take};
use crate::cli::mounting::{self, By};
use crate::cli::output::{self, warn};
use crate::cli::run;
use crate::cli::volumes::version_name;
use crate::cli::{Context, exit};
use crate::protocol::{self, Code, Failure, Mount, Request};

/// For so many seconds from its begin a job that has lost its forks is remembered, if it may be at work still.
const REMEMBERED: u64 = 7 * 24 * 3600;

/// What became of a volume of a job.
#[derive(Default)]
struct Outcome {
    what: String,
    /// Bytes newly stored.
    stored: u64,
    /// Why, where nothing else says so.
    why: Option<String>,
}

impl Outcome {
    fn of(what: impl Into<String>) -> Outcome {
        let what = what.into();
        Outcome {
            what,
            ..Outcome::default()
        }
    }

    fn not_committed(why: &str) -> Outcome {
        Outcome {
            why: Some(why.into()),
            ..Outcome::of("not committed")
        }
    }
}

/// What became of a job's volumes, and what a strict one fails for.
#[derive(Default)]
struct Settled {
    outcomes: BTreeMap<String, Outcome>,
    losses: Vec<String>,
}

pub fn finish(context: &Context, options: &Finish) -> Result<(), Failure> {
    let result = if options.stale {
        let (context, options) = (context.clone(), options.clone());
        let remedy = "then finish --stale again";
        let deadline = options.deadline;
        within(deadline, "finish --stale", remedy, move || {
            drop_stale(&context, options.strict)
        })
    } else {
        if options.status.is_none() && options.outcome.is_none() {
            let message = "finish is not told how the job ended";
            return Err(Failure::new(Code::Usage, message).hint(
                "give --status N or --outcome success|failure|cancelled|unknown, with --job ID or --join NAME; or --stale",
            ));
        }
        let name = match &options.join {
            Some(workspace) => join::job_of(workspace),
            None => job_name(options.job.as_deref())?,
        };
        let (context, options) = (context.clone(), options.clone());
        let job = format!("job {name}");
        let remedy = "then finish again: it is attached still";
        within(options.deadline, &job, remedy, move || {
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

fn drop_stale(context: &Context, strict: bool) -> Result<Value, Failure> {
    let jobs = Jobs::of(&context.place)?;
    let (mut dropped, mut failed) = (Vec::new(), Vec::new());
    for Job { job: name, .. } in jobs.all()? {
        match drop_if_stale(context, &jobs, &name) {
            Ok(false) => {}
            Ok(true) => {
                output::note(&format!(
                    "job {name} is over without an end: its forks are abandoned"
                ));
                dropped.push(name);
            }
            // The others would get no other answer.
            Err(failure) if failure.code == Code::Unreachable => return Err(failure),
            Err(failure) => {
                warn(&format!("job {name} stays: {}", exit::line(&failure)));
                failed.push(name);
            }
        }
    }
    jobs.sweep();
    run::sweep_folders();
    if strict && !failed.is_empty() {
        let message = format!("not all stale jobs were ended: {}", failed.join(", "));
        return Err(Failure::new(Code::Failed, message));
    }
    Ok(json!({ "stale": dropped, "failed": failed }))
}

fn drop_if_stale(context: &Context, jobs: &Jobs, name: &str) -> Result<bool, Failure> {
    // What is being attached or ended is in good hands, and may take long.
    let Some(_alone) = jobs.try_lock(name)? else {
        return Ok(false);
    };
    let Some(job) = jobs.load(name)? else {
        return Ok(false);
    };
    let mut client = context.connect()?;
    let live = live_forks(&mut client)?;
    if !job.is_stale(&live) && !join::is_lonely(jobs, &job)? && !join::is_left(jobs, &job)? {
        return Ok(false);
    }
    if job.has_lost(&live) && state::now().saturating_sub(job.created) < REMEMBERED {
        return keep_loss(&mut client, jobs, job);
    }
    drop_job(&mut client, jobs, &job)?;
    Ok(true)
}

/// Takes away what is left of a job that has lost its forks, but not that it has: whoever may be at work in it attaches it once more
/// or ends it, and is to hear of that. Whether anything was left.
fn keep_loss(client: &mut Client, jobs: &Jobs, mut job: Job) -> Result<bool, Failure> {
    if job.is_nowhere() {
        return Ok(false);
    }
    take_away(client, jobs, &job)?;
    for volume in &mut job.volumes {
        volume.mount = None;
        volume.folder = None;
        volume.paths.clear();
    }
    job.lost = true;
    jobs.save(&job)?;
    Ok(true)
}

/// Ends a job without committing anything.
pub fn drop_job(client: &mut Client, jobs: &Jobs, job: &Job) -> Result<(), Failure> {
    take_away(client, jobs, job)?;
    jobs.remove(&job.job)
}

/// Drops the forks of a job, and takes them from its places and from those who are in them.
fn take_away(client: &mut Client, jobs: &Jobs, job: &Job) -> Result<(), Failure> {
    if job.shared.is_some() {
        join::dissolve(jobs, &job.job)?;
    }
    for volume in &job.volumes {
        drop_volume(client, volume)?;
    }
    Ok(())
}

/// Drops some of a job's volumes, the last one first, and forgets them.
pub fn drop_volumes(
    client: &mut Client,
    job: &mut Job,
    which: impl RangeBounds<usize>,
) -> Result<(), Failure> {
    for volume in job.volumes.drain(which).rev() {
        drop_volume(client, &volume)?;
    }
    Ok(())
}

/// Drops a volume's fork and takes it from its places.
pub fn drop_volume(client: &mut Client, volume: &Volume) -> Result<(), Failure> {
    drop_fork(client, volume)?;
    take_apart(Some(client), volume, By::default_for_caller(), true);
    Ok(())
}

fn drop_fork(client: &mut Client, volume: &Volume) -> Result<(), Failure> {
    let Some(fork) = volume.fork.clone() else {
        return Ok(());
    };
    // An attach that was cut off may have made a mount that it did not come to note.
    let found = client.call(&Request::Find { fork: fork.clone() });
    let found = found.and_then(|answer| take::<ForkFacts>(&answer, "/fork"));
    let mut mounts = found.map_or(Vec::new(), |fork| fork.mounts);
    match client.call(&Request::Abandon { forks: vec![fork] }) {
        // It may have come behind that question.
        Ok(answer) => mounts.extend(take::<Vec<Mount>>(&answer, "/abandoned/0/mounts")?),
        // Over already.
        Err(failure) if failure.code == Code::NotFound => {}
        Err(failure) => return Err(failure),
    }
    detach_unnoted(client, volume, mounts);
    Ok(())
}

/// Takes the mounts of a fork that is over away that a job knows nothing of.
fn detach_unnoted(client: &mut Client, volume: &Volume, mounts: Vec<Mount>) {
    let place = |mount: &Mount| (mount.path.clone(), mount.device);
    let mut known: Vec<_> = volume.mounts().map(place).collect();
    for mount in mounts {
        if !known.contains(&place(&mount)) {
            mounting::detach(client, &mount);
            known.push(place(&mount));
        }
    }
}

fn finish_job(context: &Context, options: &Finish, name: &str) -> Result<Value, Failure> {
    let jobs = Jobs::of(&context.place)?;
    if jobs.load(name)?.is_none() {
        return Ok(json!({ "finish": null }));
    }
    let _alone = jobs.lock(name)?;
    let Some(mut job) = jobs.load(name)? else {
        return Ok(json!({ "finish": null }));
    };
    if let Some(workspace) = job.joined.clone() {
        for volume in job.volumes.iter().rev() {
            take_apart(None, volume, By::default_for_caller(), true);
        }
        jobs.remove(name)?;
        join::left(context, &jobs, &workspace)?;
        output::note(&format!("job {name} left its workspace"));
        return Ok(json!({"finish": {"job": name, "left": workspace}}));
    }
    if job.shared.is_some() && !options.keep {
        join::dissolve(&jobs, name)?;
    }
    // The job was told that it goes without them.
    for volume in job.unfinished() {
        let cut_off = || "its attach was cut off".into();
        job.volumes[volume].degraded.get_or_insert_with(cut_off);
    }
    let end = options
        .outcome
        .unwrap_or_else(|| End::of_status(options.status.unwrap_or(1), &options.success));
    let of = |volume: &Volume| {
        options
            .commit
            .or(volume.commit)
            .unwrap_or(job.commit)
            .at(end)
    };
    let when: Vec<Option<protocol::When>> = job.volumes.iter().map(of).collect();
    let mut client = context.connect()?;
    if !options.keep {
        job.end = Some(end);
        // On a full disk, too, what it holds there is given back.
        if let Err(failure) = jobs.save(&job) {
            warn(&exit::line(&failure));
        }
    }
    let mut settled = Settled::default();
    let mut traffic = BTreeMap::new();
    for volume in &job.volumes {
        let fork = volume.fork.as_deref();
        let moved = fork.and_then(|fork| forks::traffic(&mut client, fork));
        traffic.extend(moved.map(|moved| (volume.volume.as_str(), moved)));
    }
    let result = settle(&mut client, &job, when, options.keep, &mut settled);
    if let Err(failure) = &result
        && failure.code == Code::Unreachable
    {
        // Nobody knows what became of the forks: the job stays, for the next finish.
        return Err(failure.clone());
    }
    if !options.keep {
        for volume in job.volumes.iter().rev() {
            take_apart(Some(&mut client), volume, By::default_for_caller(), true);
        }
        jobs.remove(name)?;
    }
    let Settled { outcomes, losses } = settled;
    if result.is_ok() && options.strict && !losses.is_empty() {
        let message = format!("job {name}: {}", losses.join(", "));
        return Err(Failure::new(Code::Failed, message));
    }
    losses.iter().for_each(|loss| warn(loss));
    result.map_err(|failure| refused(name, failure, options.keep))?;
    let said: Vec<String> = job
        .volumes
        .iter()
        .filter_map(|volume| {
            let Outcome { what, stored, why } = outcomes.get(&volume.volume)?;
            let why = why.as_ref().map_or(String::new(), |why| format!(": {why}"));
            let ended = forks::Ended {
                volume: &volume.volume,
                hit: &volume.hit,
                took: volume.took,
                traffic: traffic.get(volume.volume.as_str()).copied(),
                what: &format!("{what}{why}"),
                stored: *stored,
            };
            Some(ended.line())
        })
        .collect();
    output::note(&format!("job {name}: {}", said.join(", ")));
    let outcomes: BTreeMap<&String, &String> = outcomes.iter().map(|(v, o)| (v, &o.what)).collect();
    Ok(json!({"finish": {"job": name, "outcome": end, "volumes": outcomes}}))
}

/// A commit that was refused, with a remedy that the end of a job leaves.
fn refused(name: &str, failure: Failure, keep: bool) -> Failure {
    let message = format!("job {name}: {}", failure.message);
    match failure.code {
        // Of the fork it says that it be abandoned, or committed by force.
        Code::HeadMoved | Code::Damaged => Failure::new(failure.code, message).hint(match keep {
            true => "forkvol commit --keep --force PATH commits it all the same",
            false => "what it wrote is dropped; run the job again",
        }),
        code => Failure {
            code,
            message,
            ..failure
        },
    }
}

/// Commits what is to be committed, all or none, and drops the rest. `when` is told for each volume of the job; nothing is committed
/// where it is None.
fn settle(
    client: &mut Client,
    job: &Job,
    mut when: Vec<Option<protocol::When>>,
    keep: bool,
    settled: &mut Settled,
) -> Result<(), Failure> {
    if job.lost && when.iter().any(Option::is_some) {
        let why = format!("the forks of job {} were lost while it ran", job.job);
        settled.losses.push(format!("nothing is committed: {why}"));
        when.fill(None);
    }
    // All or none: what one path lost says that the job was not what it seemed.
    if when.iter().any(Option::is_some) {
        // The job was told that it goes without those that are degraded.
        for volume in job.volumes.iter().filter(|v| v.degraded.is_none()) {
            if let Some(why) = accident(client, volume)? {
                settled.losses.push(format!("nothing is committed: {why}"));
                when.fill(None);
            }
        }
    }
    let mut chosen: Vec<(&Volume, protocol::When)> = Vec::new();
    for (volume, when) in job.volumes.iter().zip(when) {
        let name = &volume.volume;
        let outcome = match (&volume.degraded, &volume.refused, when) {
            (None, None, Some(when)) => {
                chosen.push((volume, when));
                continue;
            }
            (Some(why), _, Some(_)) => {
                let loss = format!("{name} is not committed: {why}");
                settled.losses.push(loss);
                Outcome::of("not committed")
            }
            // As it was asked for.
            (_, Some(why), Some(_)) if volume.never_commits => Outcome::not_committed(why),
            (_, Some(why), Some(_)) => {
                warn(&format!("{name} is not committed: {why}"));
                Outcome::of("not committed")
            }
            (_, _, None) if keep => Outcome::of("not committed"),
            (_, _, None) => Outcome::of("abandoned"),
        };
        settled.outcomes.insert(name.clone(), outcome);
    }
    let result = commit(client, &chosen, keep, settled);
    if !keep {
        for volume in &job.volumes {
            drop_fork(client, volume)?;
        }
    }
    result
}

/// Commits the forks of these volumes as one.
fn commit(
    client: &mut Client,
    chosen: &[(&Volume, protocol::When)],
    keep: bool,
    settled: &mut Settled,
) -> Result<(), Failure> {
    let forks = chosen.iter();
    let forks = forks.filter_map(|(volume, when)| Some((volume.fork.clone()?, *when)));
    let request = protocol::Commit {
        keep,
        ..protocol::Commit::of(forks)
    };
    if request.forks.is_empty() {
        return Ok(());
    }
    let volumes = chosen.iter().map(|(volume, _)| *volume);
    let mounts = volumes.clone().flat_map(|v| v.mounts());
    mounts.for_each(forks::write_back);
    // What their volumes are called in the store, where an untrusted job has one of its own.
    let mut if_missing = BTreeMap::new();
    for (volume, when) in chosen {
        if *when == protocol::When::IfMissing
            && let Some(fork) = &volume.fork
        {
            let found = client.call(&Request::Find { fork: fork.clone() });
            let found = found.and_then(|answer| take::<ForkFacts>(&answer, "/fork"));
            if_missing.extend(found.map(|facts| (volume.volume.as_str(), facts.volume)));
        }
    }
    match forks::watched(client, request) {
        Ok(answer) => {
            let commits: Vec<Value> = take(&answer, "/commits")?;
            commits.iter().for_each(forks::note_excluded);
            for volume in volumes {
                let commit = commits.iter().find(|c| c["fork"] == json!(volume.fork));
                if let Some(commit) = commit {
                    detach_unnoted(client, volume, take(commit, "/mounts")?);
                }
                let name = &volume.volume;
                let outcome = match commit.filter(|c| !c["version"].is_null()) {
                    Some(commit) => Outcome {
                        stored: commit["version"]["new_bytes"].as_u64().unwrap_or_default(),
                        ..Outcome::of(format!("committed as {}", version_name(commit).trim()))
                    },
                    None => match if_missing.get(name.as_str()) {
                        Some(name) if forks::has_version(client, name) => {
                            Outcome::not_committed(HAS_VERSION)
                        }
                        _ => Outcome::of("unchanged"),
                    },
                };
                settled.outcomes.insert(name.clone(), outcome);
            }
        }
        // One batch: where all forks are over an earlier finish had got that far, and else somebody has ended some of them.
        Err(failure) if failure.code == Code::NotFound => {
            let mut left = Vec::new();
            for volume in volumes {
                let lost = volume
                    .fork
                    .as_ref()
                    .map(|fork| forks::was_lost(client, fork));
                let what = match lost.transpose()?.flatten() {
                    None => "ended before",
                    Some(_) => {
                        left.push(volume.volume.as_str());
                        "not committed"
                    }
                };
                let outcome = Outcome::of(what);
                settled.outcomes.insert(volume.volume.clone(), outcome);
            }
            if !left.is_empty() {
                let left = left.join(", ");
                settled.losses.push(format!(
                    "{left}: not committed, for another fork of the job was ended while it ran"
                ));
            }
        }
        Err(failure) => return Err(failure),
    }
    Ok(())
}

/// Why what a volume holds now looks like no job's work: a daemon that was lost, a path that does not lead to it any more, or one
/// that was emptied. What has ended before had none.
fn accident(client: &mut Client, volume: &Volume) -> Result<Option<String>, Failure> {
    if let Some(fork) = &volume.fork {
        match forks::was_lost(client, fork)? {
            None => return Ok(None),
            Some(true) => {
                let name = &volume.volume;
                let why = format!("the daemon of {name} was lost while the job ran");
                return Ok(Some(why));
            }
            Some(false) => {}
        }
    }
    for spot in volume.paths.iter().filter(|spot| spot.link.is_some()) {
        let path = spot.path.display();
        if !leads_to(spot, volume) {
            return Ok(Some(format!(
                "{path} was removed or replaced while the job ran"
            )));
        }
        // A symlink leads to the folder too.
        let folder = &spot.path;
        // A folder that cannot be read has not been emptied.
        let is_empty = fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
        if is_empty && had_content(client, volume, spot)? {
            return Ok(Some(format!("all of {path} was removed while the job ran")));
        }
    }
    Ok(None)
}

/// Whether the version that a volume was forked from had something at a path.
fn had_content(client: &mut Client, volume: &Volume, spot: &Spot) -> Result<bool, Failure> {
    let Some(version) = volume.base.clone() else {
        return Ok(false);
    };
    let inner = spot.inner.clone().unwrap_or_default();
    let path = protocol::Bytes(inner.into_bytes());
    match client.call(&Request::List { version, path }) {
        Ok(answer) => Ok(!take::<Vec<Value>>(&answer, "/entries")?.is_empty()),
        Err(failure) if failure.code == Code::NotFound => Ok(false),
        Err(failure) => Err(failure),
    }
}

fn leads_to(spot: &Spot, volume: &Volume) -> bool {
    let Some(mount) = spot.mount.as_ref().or(volume.mount.as_ref()) else {
        return false;
    };
    match spot.link {
        Some(Link::Symlink) => {
            fs::read_link(&spot.path).is_ok_and(|to| to.starts_with(mounting::mount_path(mount)))
        }
        _ => mounting::is_on_top(&spot.path, mount),
    }
}

/// Puts everything that was made for a volume back as it was. Nothing of it fails: what cannot be done is a warning.
pub fn take_apart(mut client: Option<&mut Client>, volume: &Volume, by: By, with_paths: bool) {
    for spot in volume.paths.iter().rev() {
        if let Some(own) = &spot.mount {
            mounting::detach_by(client.as_deref_mut(), own, by);
            continue;
        }
        match spot.link {
            Some(Link::Symlink) => {
                if leads_to(spot, volume)
                    && let Err(error) = fs::remove_file(&spot.path)
                {
                    warn(&format!(
                        "cannot remove the link {}: {error}",
                        spot.path.display()
                    ));
                }
                put_back(spot);
            }
            Some(Link::Bind) if leads_to(spot, volume) => {
                if let Some(mount) = &volume.mount {
                    mounting::unbind_at_once(&spot.path, mount);
                }
            }
            None => mounting::clear(&spot.path, volume.fork.as_deref(), by),
            _ => {}
        }
    }
    match (&volume.mount, &volume.folder) {
        (Some(mount), _) if !volume.shared => mounting::detach_by(client, mount, by),
        (None, Some(folder)) => mounting::clear(folder, volume.fork.as_deref(), by),
        _ => {}
    }
    remove_folders(volume, with_paths);
}

/// Makes the folder again that a link had taken the place of, if that had been there before the job.
fn put_back(spot: &Spot) {
    if spot.made.contains(&spot.path) {
        return;
    }
    let fine = [
        // The job has put something there, or has removed what it was in.
        io::ErrorKind::AlreadyExists,
        io::ErrorKind::NotFound,
        // It lies in a fork that is over.
        io::ErrorKind::ReadOnlyFilesystem,
    ];
    warn_unless(&fine, fs::create_dir(&spot.path), "make", &spot.path);
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
    let fine = [
        io::ErrorKind::NotFound,
        io::ErrorKind::DirectoryNotEmpty,
        // Another job has it now.
        io::ErrorKind::ResourceBusy,
        // It lies in a fork that is over.
        io::ErrorKind::ReadOnlyFilesystem,
    ];
    warn_unless(&fine, fs::remove_dir(folder), "remove", folder);
}

/// Warns of what could not be done to a path, but for these kinds of errors.
fn warn_unless(fine: &[io::ErrorKind], done: io::Result<()>, what: &str, path: &Path) {
    if let Err(error) = done
        && !fine.contains(&error.kind())
    {
        warn(&format!("cannot {what} {}: {error}", path.display()));
    }
}
