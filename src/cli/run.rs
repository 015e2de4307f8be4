//! `run`: forks in place, a command, a commit.

mod child;
mod folder;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{ArgMatches, Args};
use serde_json::{Value, json};

use super::client::Client;
use super::ending::When;
use super::exit;
use super::forks::{self, ForkFacts, Traffic, take};
use super::job::suffix;
use super::mounting::{self, By, Mountpoint};
use super::output::{self, warn};
use super::paths::{self, Target, Volumes, Wish};
use super::volumes::version_name;
use super::{Context, ForkOptions};
use crate::protocol::{self, Bytes, Code, Failure, Mount, Request};
use crate::sys::process::{self, Signals};
use crate::sys::{mount as kernel, namespace};
use child::Outcome;
use folder::Folder;
pub use folder::sweep as sweep_folders;

#[derive(Clone, Debug, Args)]
pub struct Run {
    #[command(flatten)]
    volumes: Volumes,
    #[command(flatten)]
    options: ForkOptions,
    /// When to commit
    #[arg(long, value_enum, value_name = "WHEN", default_value = "on-success")]
    commit: When,
    /// Exit statuses that are a success, beside 0
    #[arg(long, value_name = "STATUS", value_delimiter = ',', value_parser = clap::value_parser!(i32).range(0..=255))]
    success: Vec<i32>,
    /// Write what happened into this file, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// In which mount namespace the command runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Isolation {
    /// This process and the command are in a private one; mounts go with it.
    Together,
    /// Only the command is; the forks are mounted outside, with the helper's rights.
    Child,
    /// There is none: forks are mounted at their paths for all to see.
    None,
}

/// A fork in use.
struct InUse {
    fork: ForkFacts,
    /// Seconds until it was there.
    took: f64,
    mount: Mount,
    targets: Vec<Target>,
}

impl InUse {
    /// What became of it.
    fn document(&self, commits: &[Value], failure: Option<&Failure>) -> Value {
        let commit = commits.iter().find(|c| c["fork"] == json!(self.fork.id));
        let version = commit.map(|c| c["version"].clone()).unwrap_or_default();
        let outcome = match (failure, commit) {
            (Some(_), _) => "failed",
            (None, None) => "abandoned",
            (None, Some(_)) if version.is_null() => "unchanged",
            (None, Some(_)) => "committed",
        };
        let paths: Vec<Bytes> = self.targets.iter().map(|t| output::path(&t.path)).collect();
        json!({
            "volume": self.fork.volume,
            "fork": self.fork.id,
            "base": self.fork.base,
            "hit": self.fork.hit,
            "paths": paths,
            "outcome": outcome,
            "version": version,
            "error": failure.map(|f| &f.message),
        })
    }
}

/// Runs the command; the status is the command's own wherever it ran.
pub fn run(context: &Context, run: Run, matches: Option<&ArgMatches>) -> u8 {
    let begun = Instant::now();
    let report = |failure: &Failure, status| {
        exit::report(failure, status, context.json, Some(&context.place))
    };
    let fail = |failure: &Failure| report(failure, exit::RUN_FAILED);
    let signals = match child::watch_signals() {
        Ok(signals) => signals,
        Err(e) => {
            return fail(&Failure::new(
                Code::Failed,
                format!("cannot watch signals: {e}"),
            ));
        }
    };
    let wishes = match run.volumes.wishes(matches) {
        Ok(wishes) => wishes,
        Err(failure) => return fail(&failure),
    };
    let mut job = Job::new(context, &run);
    if let Err(failure) = job.set_up(&wishes) {
        job.give_up();
        return fail(&failure);
    }
    match job.execute(&signals) {
        Ok(outcome) => {
            let (volumes, failed) = job.finish(outcome);
            job.report(outcome, begun, volumes);
            if failed && run.options.strict {
                exit::RUN_FAILED
            } else {
                outcome.status
            }
        }
        Err(not_run) => {
            job.give_up();
            report(&not_run.failure, not_run.status)
        }
    }
}

struct Job<'a> {
    context: &'a Context,
    run: &'a Run,
    /// Where the report goes, whatever the working directory is by then.
    report: Option<PathBuf>,
    isolation: Isolation,
    by: By,
    /// The folder in which the forks are mounted.
    private: Option<Folder>,
    forks: Vec<InUse>,
    /// (folder of a fork, folder that it covers), outer ones first.
    binds: Vec<(PathBuf, PathBuf)>,
}

impl<'a> Job<'a> {
    fn new(context: &'a Context, run: &'a Run) -> Job<'a> {
        let by = By::default_for_caller();
        let report = run.report.as_deref().map(paths::absolute);
        Job {
            context,
            run,
            report,
            isolation: Isolation::None,
            by,
            private: None,
            forks: Vec::new(),
            binds: Vec::new(),
        }
    }

    fn set_up(&mut self, wishes: &[Wish]) -> Result<(), Failure> {
        if wishes.is_empty() {
            return Ok(());
        }
        // Before any namespace: a daemon started here must not live in it.
        let mut client = self.context.connect()?;
        let mut targets = Vec::new();
        for (at, wish) in wishes.iter().enumerate() {
            let of_volume = paths::targets(wish, &self.context.place)?;
            targets.extend(of_volume.into_iter().map(|target| (target, at)));
        }
        let targets = paths::in_order(targets)?;
        self.isolate()?;
        for (at, wish) in wishes.iter().enumerate() {
            let own: Vec<Target> = targets
                .iter()
                .filter(|(_, of)| *of == at)
                .map(|(t, _)| t.clone())
                .collect();
            self.mount(&mut client, wish, own)?;
        }
        self.put_in_place()
    }

    /// Gives the command a mount namespace of its own where that is permitted.
    fn isolate(&mut self) -> Result<(), Failure> {
        let failed = |e: io::Error| {
            Failure::new(
                Code::Failed,
                format!("cannot make a private mount namespace: {e}"),
            )
        };
        if process::euid() == 0 {
            // Without the right to it, mounting will say what is missing.
            if namespace::private_mounts().is_ok() {
                self.isolation = Isolation::Together;
            }
        } else if !namespace::user_namespaces_work() {
            self.isolation = Isolation::None;
        } else if helper_is_there() {
            self.isolation = Isolation::Child;
        } else {
            namespace::private_mounts_in_user_namespace().map_err(failed)?;
            self.isolation = Isolation::Together;
            self.by = By::Caller;
        }
        Ok(())
    }

    fn mount(
        &mut self,
        client: &mut Client,
        wish: &Wish,
        targets: Vec<Target>,
    ) -> Result<(), Failure> {
        let path = match (self.isolation, targets.as_slice()) {
            (Isolation::None, [only]) => only.path.clone(),
            (Isolation::None, [_, _, ..]) => {
                let message = format!("volume {} cannot have several paths here", wish.volume);
                return Err(Failure::new(Code::Policy, message)
                    .hint("this user may not make mount namespaces: see forkvol doctor"));
            }
            _ => {
                let place = self.forks.len().to_string();
                self.private_folder()?.path().join(place)
            }
        };
        if self.isolation != Isolation::None || targets.is_empty() {
            paths::make_folder(&path)?;
        }
        let begun = Instant::now();
        let job = Some(format!("run-{}", std::process::id()));
        let options = paths::excluding(&self.run.options, wish);
        let fork = forks::make(self.context, client, &wish.volume, &options, job)?;
        let at = Mountpoint {
            path,
            created: false,
        };
        let mount = mounting::mount(
            client,
            &fork.id,
            &Bytes::default(),
            &at,
            &fork.manner(self.by),
        )
        .inspect_err(|_| forks::drop_unused(client, &fork.id))?;
        self.forks.push(InUse {
            fork,
            took: begun.elapsed().as_secs_f64(),
            mount,
            targets,
        });
        Ok(())
    }

    fn private_folder(&mut self) -> Result<&Folder, Failure> {
        let folder = match self.private.take() {
            Some(folder) => folder,
            None => Folder::make()?,
        };
        Ok(self.private.insert(folder))
    }

    /// Covers each path with its folder. In a namespace of the command alone that is left to the command's own process.
    fn put_in_place(&mut self) -> Result<(), Failure> {
        if self.isolation == Isolation::None {
            return Ok(());
        }
        let mut binds = Vec::new();
        for used in &self.forks {
            let root = mounting::mount_path(&used.mount);
            for target in &used.targets {
                let from = match &target.folder {
                    None => root.to_owned(),
                    Some(name) => {
                        let folder = root.join(name);
                        if paths::lacks(&folder, &used.fork, &target.path)? {
                            continue;
                        }
                        folder
                    }
                };
                binds.push((from, target.path.clone()));
            }
        }
        binds.sort_by(|(_, a), (_, b)| a.cmp(b));
        if self.isolation == Isolation::Together {
            let folder = std::env::current_dir();
            for (from, to) in binds {
                // A path within another one may exist only in what was covered.
                if !to.is_dir() {
                    paths::make_folder_open(&to)?;
                }
                kernel::bind(&from, &to).map_err(|e| {
                    Failure::new(
                        Code::Failed,
                        format!("cannot put a fork at {}: {e}", to.display()),
                    )
                })?;
                self.binds.push((from, to));
            }
            // The working directory may have been covered.
            if let Ok(folder) = folder {
                std::env::set_current_dir(&folder).map_err(|e| {
                    Failure::new(
                        Code::Failed,
                        format!("cannot enter {}: {e}", folder.display()),
                    )
                })?;
            }
        } else {
            self.binds = binds;
        }
        Ok(())
    }

    fn execute(&self, signals: &Signals) -> Result<Outcome, child::NotRun> {
        let cancelled = child::cancelled(signals).ok().flatten();
        if let Some(signal) = cancelled {
            return Err(child::NotRun {
                failure: Failure::new(Code::Interrupted, "interrupted before the command began"),
                status: u8::try_from(128 + signal).unwrap_or(exit::RUN_FAILED),
            });
        }
        let binds = (self.isolation == Isolation::Child).then(|| self.binds.clone());
        child::supervise(&self.run.command, &self.variables(), binds, signals)
    }

    /// Where each volume is, for a command that was given no path for it.
    fn variables(&self) -> Vec<(String, PathBuf)> {
        self.forks
            .iter()
            .map(|used| {
                (
                    format!("FORKVOL_DIR_{}", suffix(&used.fork.volume)),
                    mounting::mount_path(&used.mount).to_owned(),
                )
            })
            .collect()
    }

    /// Commits or abandons; returns what became of each volume, and whether the cache failed.
    fn finish(&mut self, outcome: Outcome) -> (Vec<Value>, bool) {
        if self.forks.is_empty() {
            return (Vec::new(), false);
        }
        let result = self.settle(outcome);
        self.clean_up();
        match result {
            Ok((commits, traffic)) => {
                let volumes = self.documents(&commits, None);
                self.tell(&volumes, &traffic);
                (volumes, false)
            }
            Err(failure) => {
                warn(&exit::line(&failure));
                (self.documents(&[], Some(&failure)), true)
            }
        }
    }

    /// Says in a line what became of all.
    fn tell(&self, volumes: &[Value], traffic: &[Traffic]) {
        let each = self.forks.iter().zip(volumes).zip(traffic);
        let lines: Vec<String> = each
            .map(|((used, volume), traffic)| {
                let what = match volume["version"].as_object() {
                    Some(_) => format!("committed as {}", version_name(volume).trim()),
                    None => volume["outcome"].as_str().unwrap_or_default().to_owned(),
                };
                let ended = forks::Ended {
                    volume: &used.fork.volume,
                    hit: &used.fork.hit,
                    took: used.took,
                    traffic: *traffic,
                    what: &what,
                    stored: volume["version"]["new_bytes"].as_u64().unwrap_or_default(),
                };
                ended.line()
            })
            .collect();
        output::note(&lines.join(", "));
    }

    /// Returns the commits that were made, and what was read and written in each fork until then.
    fn settle(&self, outcome: Outcome) -> Result<(Vec<Value>, Vec<Traffic>), Failure> {
        // The daemon does not wait for a client as long as a command may take.
        let mut client = self.context.connect()?;
        let ids: Vec<String> = self.forks.iter().map(|used| used.fork.id.clone()).collect();
        let options = &self.run.options;
        for id in &ids {
            let message = match forks::was_lost(&mut client, id)? {
                Some(false) => continue,
                Some(true) => {
                    "nothing is committed: the daemon was lost while the command ran".to_owned()
                }
                None => format!(
                    "nothing more is committed: fork {id} was committed or abandoned while the command ran"
                ),
            };
            ids.iter()
                .for_each(|id| forks::drop_unused(&mut client, id));
            return Err(Failure::new(Code::Failed, message));
        }
        let traffic = ids.iter().map(|id| forks::traffic(&mut client, id));
        let traffic: Vec<Traffic> = traffic.collect();
        let wanted = !options.read_only && !options.ephemeral;
        let Some(when) = self
            .run
            .commit
            .at(outcome.end(&self.run.success))
            .filter(|_| wanted)
        else {
            client.call(&Request::Abandon { forks: ids })?;
            return Ok((Vec::new(), traffic));
        };
        self.forks
            .iter()
            .for_each(|used| forks::write_back(&used.mount));
        let commit = protocol::Commit::of(ids.iter().map(|id| (id.clone(), when)));
        let answer = forks::watched(&mut client, commit).inspect_err(|_| {
            // Nothing else will come back for them.
            ids.iter()
                .for_each(|id| forks::drop_unused(&mut client, id));
        })?;
        let commits: Vec<Value> = take(&answer, "/commits")?;
        commits.iter().for_each(forks::note_excluded);
        Ok((commits, traffic))
    }

    fn documents(&self, commits: &[Value], failure: Option<&Failure>) -> Vec<Value> {
        self.forks
            .iter()
            .map(|used| used.document(commits, failure))
            .collect()
    }

    /// Takes the mounts and the folders away; nothing of it fails.
    fn clean_up(&self) {
        let mount_of = |from: &Path| {
            self.forks
                .iter()
                .map(|used| &used.mount)
                .find(|mount| from.starts_with(mounting::mount_path(mount)))
        };
        // A busy mount is only left by leaving it.
        std::env::set_current_dir("/").ok();
        if self.isolation == Isolation::Together {
            for (from, to) in self.binds.iter().rev() {
                if let Some(mount) = mount_of(from) {
                    mounting::unbind(to, mount);
                }
            }
        }
        let mut client = self.context.connect().ok();
        for used in &self.forks {
            mounting::detach_by(client.as_mut(), &used.mount, self.by);
        }
        let Some(private) = self.private.as_ref().map(Folder::path) else {
            return;
        };
        let folders = (0..self.forks.len()).map(|n| private.join(n.to_string()));
        for folder in folders.chain([private.to_owned()]) {
            if let Err(error) = fs::remove_dir(&folder) {
                warn(&format!("cannot remove {}: {error}", folder.display()));
            }
        }
    }

    /// Undoes what was set up for a command that did not run.
    fn give_up(&self) {
        if self.forks.is_empty() {
            if let Some(private) = &self.private {
                fs::remove_dir_all(private.path()).ok();
            }
            return;
        }
        let ids = self.forks.iter().map(|used| used.fork.id.clone()).collect();
        let dropped = self
            .context
            .connect()
            .and_then(|mut c| c.call(&Request::Abandon { forks: ids }));
        if let Err(failure) = dropped {
            warn(&exit::line(&failure));
        }
        self.clean_up();
    }

    fn report(&self, outcome: Outcome, begun: Instant, volumes: Vec<Value>) {
        let Some(path) = &self.report else { return };
        let document = report(&self.run.command, outcome, begun, volumes);
        if let Err(error) = fs::write(path, format!("{document}\n")) {
            warn(&format!(
                "cannot write the report {}: {error}",
                path.display()
            ));
        }
    }
}

/// The document of a run.
fn report(words: &[OsString], outcome: Outcome, begun: Instant, volumes: Vec<Value>) -> Value {
    let command: Vec<Bytes> = words.iter().map(|w| output::path(Path::new(w))).collect();
    json!({"run": {
        "command": command,
        "status": outcome.status,
        "signal": outcome.signal,
        "cancelled": outcome.cancelled,
        "seconds": begun.elapsed().as_secs_f64(),
        "volumes": volumes,
    }})
}

fn helper_is_there() -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|folder| folder.join("fusermount3").is_file())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_as_the_manual_says() {
        let manual = include_str!("../../docs/json.md");
        let (_, rest) = manual.split_once("```json run\n").unwrap();
        let example: Value = serde_json::from_str(rest.split("```").next().unwrap()).unwrap();
        let fork = ForkFacts {
            bytes: 0,
            read: 0,
            ingested: 0,
            trust: "off".into(),
            refused: None,
            id: "f-0123456789ab".into(),
            volume: "npm".into(),
            state: "live".into(),
            base: Some("npm@42".into()),
            base_uid_map: None,
            hit: "exact".into(),
            mounts: Vec::new(),
            read_only: false,
            suid: false,
            dev: false,
        };
        let mount = Mount {
            folder: Bytes::default(),
            path: protocol::Bytes(b"/x".to_vec()),
            device: 1,
            created: false,
            uid: None,
            namespace: None,
            fork: None,
        };
        let target = Target {
            path: "/home/ci/.npm".into(),
            folder: None,
        };
        let used = InUse {
            took: 0.0,
            fork,
            mount,
            targets: vec![target],
        };
        let commits = [json!({"fork": "f-0123456789ab", "version": null})];
        let volumes = vec![used.document(&commits, None)];
        let outcome = Outcome {
            status: 0,
            signal: None,
            cancelled: false,
        };
        let words = ["make".into(), "-j2".into()];
        let mut made = report(&words, outcome, Instant::now(), volumes);
        made["run"]["seconds"] = json!(12.5);
        assert_eq!(made, example);
    }
}
