//! fork, mount, commit, abandon, forks.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::client::Client;
use super::facts;
use super::holders;
use super::mounting::{self, By, Manner, Mountpoint};
use super::output::{self, Shown};
use super::values;
use super::volumes::version_name;
use super::{AbandonOptions, CommitOptions, Context, ForkOptions, NewFork};
use crate::protocol::{self, Bytes, Code, Facts, Failure, Mount, Request};
use crate::store::ForkId;
use crate::sys;

/// What a command needs to know of a fork.
#[derive(Clone, Debug, Deserialize)]
pub struct ForkFacts {
    pub id: String,
    pub volume: String,
    pub state: String,
    pub base: Option<String>,
    #[serde(default)]
    pub base_uid_map: Option<String>,
    /// exact, stale, fallback or empty.
    pub hit: String,
    /// off, trusted or untrusted.
    pub trust: String,
    /// Why it will not be committed, as far as that is known.
    pub refused: Option<String>,
    pub mounts: Vec<Mount>,
    /// Bytes written, read by the kernel, and gone through by a commit.
    #[serde(default)]
    pub bytes: u64,
    #[serde(default)]
    pub read: u64,
    #[serde(default)]
    pub ingested: u64,
    pub read_only: bool,
    pub suid: bool,
    pub dev: bool,
}

/// Bytes that were read and written in a fork; None: nobody knows.
pub type Traffic = Option<(u64, u64)>;

/// What became of a volume of a job, for the line at its end.
pub struct Ended<'a> {
    pub volume: &'a str,
    pub hit: &'a str,
    /// Seconds until the fork was there.
    pub took: f64,
    pub traffic: Traffic,
    pub what: &'a str,
    /// Bytes newly stored.
    pub stored: u64,
}

impl Ended<'_> {
    pub fn line(&self) -> String {
        let Ended {
            volume, hit, what, ..
        } = self;
        let traffic = self.traffic.map_or_else(String::new, |(read, written)| {
            let (read, written) = (output::size(read), output::size(written));
            format!(", {read} read, {written} written")
        });
        let stored = match self.stored {
            0 => String::new(),
            stored => format!(", {} newly stored", output::size(stored)),
        };
        let took = self.took * 1e3;
        format!("{volume} ({hit} hit, forked in {took:.0} ms{traffic}) {what}{stored}")
    }
}

/// What was read and written in a fork so far. It only adorns a line: what cannot be had is not said.
pub fn traffic(client: &mut Client, fork: &str) -> Traffic {
    let found = client.call(&Request::Find { fork: fork.into() }).ok()?;
    let facts = take::<ForkFacts>(&found, "/fork").ok()?;
    Some((facts.read, facts.bytes))
}

/// Takes a part of an answer apart.
pub fn take<T: for<'a> Deserialize<'a>>(answer: &Value, pointer: &str) -> Result<T, Failure> {
    let part = answer.pointer(pointer).cloned().unwrap_or_default();
    serde_json::from_value(part).map_err(|e| {
        Failure::new(
            Code::Unreachable,
            format!("the daemon's answer makes no sense: {e}"),
        )
    })
}

/// Makes a fork, which is not mounted yet.
pub fn make(
    context: &Context,
    client: &mut Client,
    volume: &str,
    options: &ForkOptions,
    job: Option<String>,
) -> Result<ForkFacts, Failure> {
    let request = protocol::Fork {
        volume: volume.into(),
        from: options.from.clone(),
        parents: options.parent.clone(),
        read_only: options.read_only,
        ephemeral: options.ephemeral,
        size: options.size.unwrap_or_else(|| context.config.size()),
        labels: labels(options)?,
        excludes: options.exclude.clone(),
        default_excludes: !options.no_default_exclude,
        owner: options.owner,
        acl: options.acl,
        suid: options.suid,
        dev: options.dev,
        job,
        uid_map: sys::namespace::uid_map(),
        facts: facts::of_job(options),
    };
    let own = request.uid_map.clone();
    let answer = client.call(&Request::Fork(Box::new(request)))?;
    let fork: ForkFacts = take(&answer, "/fork")?;
    if fork.base.is_some() && fork.base_uid_map != own {
        let map = |map: &Option<String>| map.clone().unwrap_or_else(|| "none".into());
        output::warn(&format!(
            "{} was written under another map of user ids ({}) than this one's ({}): its files may be others' here",
            fork.base.as_deref().unwrap_or_default(),
            map(&fork.base_uid_map),
            map(&own)
        ));
    }
    Ok(fork)
}

/// What is judged of a job of which this is said. Asked beside: another question may have been cut off.
pub fn trust(client: &Client, facts: Option<Facts>) -> Option<String> {
    let answer = client.beside()?.call(&Request::Trust { facts }).ok()?;
    take(&answer, "/trust").ok()
}

/// Whether a volume has a version, as far as it can be told.
pub fn has_version(client: &mut Client, volume: &str) -> bool {
    let answer = client.call(&Request::Volume {
        name: volume.into(),
    });
    answer.is_ok_and(|answer| !answer["volume"]["head"].is_null())
}

/// The labels of files first, so that an option wins. A lock file is a label itself: its name, and the hash of what it holds.
fn labels(options: &ForkOptions) -> Result<BTreeMap<String, String>, Failure> {
    let mut labels = BTreeMap::new();
    for path in &options.label_file {
        let wrong = |why: String| Failure::new(Code::Usage, format!("{}: {why}", path.display()));
        let text = fs::read_to_string(path).map_err(|e| cannot_read("--label-file", path, &e))?;
        let mut own = BTreeMap::new();
        for line in text
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty() && !l.starts_with('#'))
        {
            let parts: Vec<&str> = line.splitn(2, '=').map(str::trim).collect();
            let (key, value) = values::label(&parts.join("=")).map_err(wrong)?;
            if own.contains_key(&key) {
                return Err(wrong(format!("the label {key} is there twice")));
            }
            own.insert(key, value);
        }
        labels.extend(own);
    }
    for path in &options.lock_file {
        let hash = || -> std::io::Result<String> {
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader(File::open(path)?)?;
            Ok(hasher.finalize().to_hex()[..16].to_owned())
        };
        let name = path.to_string_lossy().replace('=', "-");
        let hash = hash().map_err(|e| cannot_read("--lock-file", path, &e))?;
        labels.insert(name, hash);
    }
    labels.extend(options.label.iter().cloned());
    Ok(labels)
}

/// That a file which an option names cannot be read.
fn cannot_read(option: &str, path: &Path, error: &std::io::Error) -> Failure {
    let why = output::reason(error);
    Failure::new(Code::Usage, format!("{option} {}: {why}", path.display()))
}

impl ForkFacts {
    pub fn manner(&self, by: By) -> Manner {
        Manner {
            volume: self.volume.clone(),
            read_only: self.read_only,
            suid: self.suid,
            dev: self.dev,
            instead: false,
            by,
        }
    }
}

/// Drops a fork that could not be put to use. What fails here is only a warning: it is about something else already.
pub fn drop_unused(client: &mut Client, fork: &str) {
    let dropped = client.call(&Request::Abandon {
        forks: vec![fork.into()],
    });
    if let Err(failure) = dropped
        && failure.code != Code::NotFound
    {
        output::warn(&format!("fork {fork} is left over: {failure}"));
    }
}

pub fn fork(context: &Context, asked: &NewFork) -> Result<(), Failure> {
    let mut client = context.connect()?;
    let at = Mountpoint::prepare(&asked.mountpoint, &context.place)?;
    let made = make(context, &mut client, &asked.volume, &asked.options, None).and_then(|fork| {
        mounting::mount(
            &mut client,
            &fork.id,
            &Bytes::default(),
            &at,
            &fork.manner(By::default_for_caller()),
        )
        .map(|mount| (fork.clone(), mount))
        .inspect_err(|_| drop_unused(&mut client, &fork.id))
    });
    let (fork, mount) = made.inspect_err(|_| at.remove_if_created())?;
    let document = json!({"fork": {
        "id": fork.id, "volume": fork.volume, "base": fork.base, "mount": mount, "mounts": [mount]
    }});
    output::show(context.json, &document, |_| format!("{}\n", fork.id))
}

pub fn mount(context: &Context, fork: &OsStr, mountpoint: Option<&Path>) -> Result<(), Failure> {
    let mut client = context.connect()?;
    let fork = find(&mut client, fork)?;
    let is_live = fork.state == "live";
    if let Some(mount) = fork
        .mounts
        .iter()
        .find(|mount| is_live && holders::stands(mount))
    {
        let at = mounting::mount_path(mount).display();
        let message = format!("fork {} is mounted already at {at}", fork.id);
        return Err(Failure::new(Code::Busy, message));
    }
    let places: Vec<(&Path, Bytes)> = match mountpoint {
        Some(path) => vec![(path, Bytes::default())],
        None => {
            let known = fork.mounts.iter();
            known
                .map(|mount| (mounting::mount_path(mount), mount.folder.clone()))
                .collect()
        }
    };
    let somebody = |mount: &&Mount| mount.uid.is_some_and(|uid| uid != sys::process::euid());
    if let Some(other) = fork.mounts.iter().find(somebody)
        && mountpoint.is_none()
        && sys::namespace::uid_map().is_none()
    {
        let at = mounting::mount_path(other).display();
        let message = format!("fork {} was mounted at {at} by another user", fork.id);
        return Err(Failure::new(Code::Usage, message).hint("name a path of your own"));
    }
    if places.is_empty() {
        let message = format!("fork {} has no mountpoint", fork.id);
        return Err(Failure::new(Code::Usage, message).hint("name one"));
    }
    if mountpoint.is_none() {
        // What its last daemon has left there.
        for mount in &fork.mounts {
            mounting::detach(&mut client, mount);
        }
    }
    // What is live all the same is held out of sight, as by a container, and ends with this.
    let manner = Manner {
        instead: is_live,
        ..fork.manner(By::default_for_caller())
    };
    let mut mounts = Vec::new();
    for (path, folder) in places {
        let at = Mountpoint::prepare(path, &context.place)?;
        let mount = mounting::mount(&mut client, &fork.id, &folder, &at, &manner)
            .inspect_err(|_| at.remove_if_created())?;
        mounts.push(mount);
    }
    for mount in fork.mounts.iter().filter(|_| is_live) {
        mounting::warn_of_holders(mount);
    }
    let document = json!({"fork": {
        "id": fork.id, "volume": fork.volume, "base": fork.base, "mount": mounts.first(), "mounts": mounts
    }});
    output::show(context.json, &document, |_| format!("{}\n", fork.id))
}

/// Whether what names a fork is a path inside its mount, and no id.
pub fn is_path(fork: &OsStr) -> bool {
    matches!(fork.as_bytes().first(), Some(b'/' | b'.' | b'~'))
}

/// Finds a fork by its id, or by a path inside its mount.
pub fn find(client: &mut Client, fork: &OsStr) -> Result<ForkFacts, Failure> {
    if is_path(fork) {
        let path = values::at_home(fork).map_err(|e| Failure::new(Code::Usage, e))?;
        return find_at(client, &path);
    }
    let id = fork.to_string_lossy().into_owned();
    match client.call(&Request::Find { fork: id.clone() }) {
        Err(failure) if failure.code == Code::NotFound && id.parse::<ForkId>().is_err() => {
            if leads_into_a_fork(Path::new(fork)) {
                return find_at(client, Path::new(fork));
            }
            Err(failure.hint(format!(
                "`forkvol forks` lists them, and none is mounted at ./{id}"
            )))
        }
        answer => take(&answer?, "/fork"),
    }
}

/// Whether a path lies in a fork's mount. The one that the working folder is in does not count: every word is a path in that.
pub fn leads_into_a_fork(path: &Path) -> bool {
    let folder = std::env::current_dir().unwrap_or_default();
    mounting::fork_mount_of(path).is_ok_and(|found| !folder.starts_with(found.path))
}

fn find_at(client: &mut Client, path: &Path) -> Result<ForkFacts, Failure> {
    let found = mounting::fork_mount_of(path)?;
    let forks: Vec<ForkFacts> = take(&client.call(&Request::Forks)?, "/forks")?;
    forks
        .into_iter()
        .find(|f| f.state == "live" && f.mounts.iter().any(|m| mounting::is_of(&found, m)))
        .ok_or_else(|| {
            let message = format!(
                "the fork mounted at {} is not of this store",
                found.path.display()
            );
            Failure::new(Code::NotFound, message).hint("name its store with --store")
        })
}

pub fn commit(context: &Context, options: &CommitOptions) -> Result<(), Failure> {
    let mut client = context.connect()?;
    let fork = find(&mut client, &options.fork)?;
    for mount in fork.mounts.iter().filter(|_| fork.state == "live") {
        if !options.keep {
            mounting::respect_busy(mount, options.busy)?;
        }
        write_back(mount);
    }
    let request = protocol::Commit {
        keep: options.keep,
        labels: options.label.iter().cloned().collect(),
        message: options.message.clone(),
        if_head: options.if_head.clone(),
        if_base: options.if_base,
        force: options.force,
        ..protocol::Commit::of([(fork.id.clone(), protocol::When::Always)])
    };
    let answer = watched(&mut client, request)?;
    let commit: Value = take(&answer, "/commits/0")?;
    let mut mounts: Vec<Mount> = take(&commit, "/mounts")?;
    if mounts.is_empty() && !options.keep {
        // What its last daemon has left there, or who unmounted it by hand.
        mounts = fork.mounts;
    }
    for mount in &mounts {
        mounting::detach(&mut client, mount);
    }
    if commit.pointer("/version").is_none_or(Value::is_null) {
        output::note(&format!(
            "fork {} had not changed: there is no new version",
            fork.id
        ));
    }
    note_excluded(&commit);
    output::show(context.json, &json!({"commit": commit}), |_| {
        version_name(&commit)
    })
}

/// Asks for a commit and shows how far it has come, where it takes long and somebody looks.
pub fn watched(client: &mut Client, commit: protocol::Commit) -> Result<Value, Failure> {
    const PATIENCE: Duration = Duration::from_millis(400);
    let bar = output::progress(Some(0));
    if bar.is_hidden() {
        return client.call(&Request::Commit(commit));
    }
    let forks: Vec<String> = commit.forks.keys().cloned().collect();
    let beside = client.beside();
    let (done, is_done) = crossbeam::channel::bounded::<()>(0);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Without a second connection nothing is shown.
            let Some(mut client) = beside else { return };
            while is_done
                .recv_timeout(PATIENCE)
                .is_err_and(|e| e.is_timeout())
            {
                let facts = |fork: &String| {
                    let answer = client.call(&Request::Find { fork: fork.clone() });
                    take::<ForkFacts>(&answer.unwrap_or_default(), "/fork").ok()
                };
                let known: Vec<ForkFacts> = forks.iter().filter_map(facts).collect();
                bar.set_length(known.iter().map(|fork| fork.bytes).sum());
                bar.set_position(known.iter().map(|fork| fork.ingested).sum());
            }
            bar.finish_and_clear();
        });
        let result = client.call(&Request::Commit(commit));
        drop(done);
        result
    })
}

/// Says what a commit left out of its version.
pub fn note_excluded(commit: &Value) {
    let count = commit["excluded"]["count"].as_u64().unwrap_or_default();
    if count == 0 {
        return;
    }
    let named = commit["excluded"]["paths"].as_array();
    let named: Vec<String> = named
        .into_iter()
        .flatten()
        .take(3)
        .map(output::path_text)
        .collect();
    let more = if count > named.len() as u64 {
        ", ..."
    } else {
        ""
    };
    output::note(&format!(
        "excluded from fork {}, so in no version: {count} ({}{more})",
        output::path_text(&commit["fork"]),
        named.join(", ")
    ));
}

/// Asks the kernel to write what it holds dirty. A courtesy to programs that forget msync; nothing relies on it.
pub fn write_back(mount: &Mount) {
    let path = mounting::mount_path(mount);
    let is_ours =
        sys::mount::device_at(path).is_ok_and(|found| found == sys::device_numbers(mount.device));
    if is_ours && let Ok(folder) = File::open(path) {
        sys::syncfs(&folder).ok();
    }
}

/// Whether a fork lost its daemon, and with it what was written since. None for one that is over already.
pub fn was_lost(client: &mut Client, fork: &str) -> Result<Option<bool>, Failure> {
    let request = Request::Find { fork: fork.into() };
    match client.call(&request) {
        Ok(answer) => Ok(Some(take::<ForkFacts>(&answer, "/fork")?.state != "live")),
        Err(failure) if failure.code == Code::NotFound => Ok(None),
        Err(failure) => Err(failure),
    }
}

pub fn abandon(context: &Context, options: &AbandonOptions) -> Result<(), Failure> {
    let mut client = context.connect()?;
    let forks: Vec<ForkFacts> = match &options.fork {
        Some(fork) => vec![find(&mut client, fork)?],
        None => {
            let all: Vec<ForkFacts> = take(&client.call(&Request::Forks)?, "/forks")?;
            let orphans: Vec<String> = take(&client.call(&Request::Orphans)?, "/orphans")?;
            all.into_iter()
                .filter(|f| options.all || orphans.contains(&f.id))
                .collect()
        }
    };
    let ids: Vec<String> = forks.iter().map(|f| f.id.clone()).collect();
    let answer = match ids.is_empty() {
        true => json!({"abandoned": [], "failed": null}),
        false => client.call(&Request::Abandon { forks: ids })?,
    };
    let abandoned: Vec<Value> = take(&answer, "/abandoned")?;
    for fork in &forks {
        let is_gone = abandoned
            .iter()
            .any(|a| a.get("fork") == Some(&json!(fork.id)));
        for mount in fork.mounts.iter().filter(|_| is_gone) {
            mounting::detach(&mut client, mount);
        }
    }
    output::show(context.json, &json!({"abandoned": abandoned}), |_| {
        let lines = abandoned.iter().filter_map(|a| a.get("fork"));
        lines
            .map(|id| format!("{}\n", output::path_text(id)))
            .collect()
    })?;
    match take::<Option<Failure>>(&answer, "/failed")? {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}

pub fn list(context: &Context) -> Result<(), Failure> {
    let answer = context.ask(&Request::Forks)?;
    let forks: Vec<Value> = take(&answer, "/forks")?;
    output::show(context.json, &answer, |_| {
        output::table(
            &forks,
            &[
                ("FORK", "/id", Shown::Plain),
                ("STATE", "/state", Shown::Plain),
                ("VOLUME", "/volume", Shown::Plain),
                ("BASE", "/base", Shown::Plain),
                ("AGE", "/age", Shown::Seconds),
                ("CHANGED", "/changed", Shown::Plain),
                ("BYTES", "/bytes", Shown::Size),
                ("OWNER", "/uid", Shown::Plain),
                ("JOB", "/job", Shown::Plain),
                ("MOUNTPOINT", "/mount/path", Shown::Plain),
            ],
        )
    })
}
