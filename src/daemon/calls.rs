//! From requests of the protocol to calls of the engine, and back. One arm per request; no decision is made here but who may.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::access::Who;
use super::{Shared, documents, failure};
use crate::engine::{
    self, Asker, CommitRequest, Engine, ForkInfo, ForkRequest, JobFacts, MORE_FILES, Served,
};
use crate::protocol::{
    Answer, Code, Commit, Connection, Facts, Failure, Fork, FrameError, Incoming, Outgoing,
    Request, Serve,
};
use crate::store::{ForkId, Verdict};
use crate::sys::mount;

/// Answers a request. The outer error ends the connection; the inner one is told to the client.
pub fn answer(
    shared: &Shared,
    who: &Who,
    connection: &mut Connection,
    request: Request,
    fds: Vec<OwnedFd>,
) -> Result<Result<Value, Failure>, FrameError> {
    if !fds.is_empty() && !matches!(request, Request::Serve(_)) {
        return Ok(Err(Failure::new(
            Code::Usage,
            "no descriptor belongs to this request",
        )));
    }
    let call = Call {
        shared,
        engine: &shared.engine,
        who,
    };
    Ok(match request {
        Request::Serve(serve) => call.serve(&serve, fds),
        Request::Cat { version, path } => {
            if let Err(failure) = call.may_read(&version) {
                return Ok(Err(failure));
            }
            connection.send(&Answer::Content)?;
            let mut out = Outgoing::new(connection);
            let result = call.engine.cat(&version, &path.0, &mut out);
            out.finish()?;
            result.map(|()| json!({})).map_err(failure)
        }
        Request::Export { version } => {
            if let Err(failure) = call.may_read(&version) {
                return Ok(Err(failure));
            }
            connection.send(&Answer::Content)?;
            let mut out = Outgoing::new(connection);
            let result = call.engine.export(&version, &mut out);
            out.finish()?;
            result
                .map(|warnings| json!({"warnings": warnings}))
                .map_err(failure)
        }
        Request::Import { volume } => {
            if let Err(failure) = who.administer() {
                return Ok(Err(failure));
            }
            connection.send(&Answer::Send)?;
            let mut content = Incoming::new(connection);
            let result = call
                .engine
                .import(&volume, &mut content, (who.peer.uid, who.peer.gid));
            // What the client still sends is read, so that it comes to the answer.
            if std::io::copy(&mut content, &mut std::io::sink()).is_err() || !content.is_ended() {
                return Err(FrameError::Closed);
            }
            let document = |imported: engine::Imported| {
                let version = imported.version.as_ref().map(documents::version);
                json!({"version": version, "warnings": imported.warnings})
            };
            result.map(document).map_err(failure)
        }
        other => call.plain(other),
    })
}

/// Returns the names of the forks that are being served.
pub fn live_fork_names(engine: &Engine) -> Vec<String> {
    engine
        .forks()
        .unwrap_or_default()
        .iter()
        .filter(|fork| fork.state == "live")
        .map(|fork| format!("{} ({})", fork.id, fork.volume))
        .collect()
}

struct Call<'a> {
    shared: &'a Shared,
    engine: &'a Arc<Engine>,
    who: &'a Who,
}

impl Call<'_> {
    /// Requests with one question and one answer.
    fn plain(&self, request: Request) -> Result<Value, Failure> {
        let engine = self.engine;
        let value = match request {
            Request::Fork(fork) => return self.fork(*fork),
            Request::Trust { facts } => {
                json!({"trust": documents::trust(self.judge(facts.as_ref()).0)})
            }
            Request::Find { fork } => {
                json!({"fork": documents::fork(&engine.find_fork(&fork).map_err(failure)?)})
            }
            Request::Commit(commit) => return self.commit(commit),
            Request::Abandon { forks } => return self.abandon(&forks),
            Request::Orphans => {
                let ids: Vec<String> = engine.orphans().iter().map(ToString::to_string).collect();
                json!({"orphans": ids})
            }
            Request::Forks => {
                let forks = engine.forks().map_err(failure)?;
                json!({"forks": documents::list(&forks, documents::fork)})
            }
            Request::Volumes => {
                let volumes = engine.volumes().map_err(failure)?;
                json!({"volumes": documents::list(&volumes, documents::volume)})
            }
            Request::Volume { name } => {
                self.may_read(&name)?;
                json!({"volume": documents::volume(&engine.volume(&name).map_err(failure)?)})
            }
            Request::RemoveVolume { name, force } => {
                self.administer()?;
                let mounts = engine.remove_volume(&name, force).map_err(failure)?;
                json!({"removed": name, "mounts": documents::mounts(&mounts)})
            }
            Request::RenameVolume { old, new } => {
                self.administer()?;
                engine.rename_volume(&old, &new).map_err(failure)?;
                json!({"renamed": old, "to": new})
            }
            Request::ResetVolume { name } => {
                self.administer()?;
                engine.reset_volume(&name).map_err(failure)?;
                json!({"reset": name})
            }
            Request::Log { volume } => {
                self.may_read(&volume)?;
                let versions = engine.log(&volume).map_err(failure)?;
                json!({"volume": volume, "versions": documents::list(&versions, documents::version)})
            }
            Request::Rollback { volume, version } => {
                self.administer()?;
                let version = engine.rollback(&volume, &version).map_err(failure)?;
                json!({"version": documents::version(&version)})
            }
            Request::Pin { version, pinned } => {
                self.administer()?;
                let version = engine.pin(&version, pinned).map_err(failure)?;
                json!({"version": documents::version(&version)})
            }
            Request::Diff { a, b } => {
                self.may_read(&a)?;
                self.may_read(&b)?;
                let a = engine.whole_name(a).map_err(failure)?;
                let b = engine.whole_name(b).map_err(failure)?;
                let changes = engine.diff(&a, &b).map_err(failure)?;
                json!({"a": a, "b": b, "changes": documents::list(&changes, documents::change)})
            }
            Request::List { version, path } => {
                self.may_read(&version)?;
                let version = engine.whole_name(version).map_err(failure)?;
                let entries = engine.ls(&version, &path.0).map_err(failure)?;
                json!({"version": version, "path": path, "entries": documents::list(&entries, documents::entry)})
            }
            Request::Stats => {
                json!({"stats": engine.stats().map_err(failure)?, "counters": engine.counters()})
            }
            Request::Gc { dry_run, settle } => {
                self.administer()?;
                let mut answer = json!({"gc": engine.gc(dry_run).map_err(failure)?});
                if settle {
                    answer["settled"] = json!(engine.settle().map_err(failure)?);
                }
                answer
            }
            Request::Check => {
                // It reads all there is, and names paths of any volume.
                self.administer()?;
                json!({"check": engine.check().map_err(failure)?})
            }
            Request::Repair { remove } => {
                self.administer()?;
                json!({"repair": engine.repair(remove).map_err(failure)?})
            }
            Request::Hello(_)
            | Request::Status
            | Request::Stop(_)
            | Request::Serve(_)
            | Request::Detached
            | Request::Cat { .. }
            | Request::Export { .. }
            | Request::Import { .. } => {
                return Err(Failure::new(
                    Code::Usage,
                    "this request is answered elsewhere",
                ));
            }
        };
        Ok(value)
    }

    fn administer(&self) -> Result<(), Failure> {
        self.who.administer()
    }

    /// What the client's jobs may do, and the name of their scope where they are untrusted.
    fn judge(&self, said: Option<&Facts>) -> (Verdict, String) {
        let Some(policy) = self.engine.trust() else {
            return (Verdict::Off, String::new());
        };
        let facts = said.map(|said| JobFacts {
            foreign: said.foreign,
            protected: said.protected,
        });
        let asker = self.who.asker(policy, facts);
        let named = said.and_then(|said| said.scope.as_deref());
        let scope = engine::scope(&asker, named, self.who.peer.uid);
        (policy.judge(&asker), scope)
    }

    /// Fails where a version, or a fork, is not the client's to read.
    fn may_read(&self, text: &str) -> Result<(), Failure> {
        let Some(policy) = self.engine.trust() else {
            return Ok(());
        };
        let Asker::User(uid) = self.who.asker(policy, None) else {
            return Ok(());
        };
        if text.parse::<ForkId>().is_ok() {
            return self.own(text).map(drop);
        }
        let volume = text.split('@').next().unwrap_or_default();
        if policy.may_user_read(volume, uid) {
            return Ok(());
        }
        Err(
            Failure::new(Code::Policy, format!("user {uid} may not read {volume}")).hint(
                "the owner of the store says in [trust] which volumes untrusted jobs may read",
            ),
        )
    }

    /// Finds a fork that the client may change.
    fn own(&self, fork: &str) -> Result<(ForkId, ForkInfo), Failure> {
        let info = self.engine.find_fork(fork).map_err(failure)?;
        let is_trusted = info.verdict == Verdict::Trusted;
        self.who.use_fork(info.uid, is_trusted, fork)?;
        let id = info
            .id
            .parse()
            .map_err(|()| Failure::new(Code::NotFound, format!("no fork {fork}")))?;
        Ok((id, info))
    }

    fn fork(&self, fork: Fork) -> Result<Value, Failure> {
        if self.shared.closing.load(Ordering::Acquire) {
            return Err(Failure::new(
                Code::Busy,
                "the daemon is stopping and takes no new forks",
            )
            .hint("try again when those that `forkvol forks` lists as live are committed or abandoned"));
        }
        if fork.suid || fork.dev {
            self.who.mount_suid(self.shared.options.shared_socket)?;
        }
        let (verdict, scope) = self.judge(fork.facts.as_ref());
        let info = self
            .engine
            .fork(ForkRequest {
                volume: fork.volume,
                from: fork.from,
                parents: fork.parents,
                read_only: fork.read_only,
                ephemeral: fork.ephemeral,
                size: fork.size,
                labels: fork.labels,
                excludes: fork.excludes,
                default_excludes: fork.default_excludes,
                import: false,
                owner: fork.owner,
                acl: fork.acl,
                suid: fork.suid,
                dev: fork.dev,
                job: fork.job,
                uid_map: fork.uid_map,
                verdict,
                scope,
                uid: self.who.peer.uid,
                gid: self.who.peer.gid,
                asker: self.who.connected(),
            })
            .map_err(failure)?;
        Ok(json!({"fork": documents::fork(&info)}))
    }

    fn serve(&self, serve: &Serve, fds: Vec<OwnedFd>) -> Result<Value, Failure> {
        let usage = |message: &str| Failure::new(Code::Usage, message);
        if fds.is_empty() {
            let message = "no descriptor came with serve: the client sent none, or the daemon has too many open files";
            return Err(Failure::new(Code::Failed, message).hint(MORE_FILES));
        }
        let mut fds = fds.into_iter();
        let (Some(fd), None) = (fds.next(), fds.next()) else {
            return Err(usage("exactly one descriptor must come with serve"));
        };
        let servable = mount::is_servable(&fd)
            .map_err(|e| usage(&format!("cannot look at the descriptor: {e}")))?;
        if !servable {
            return Err(usage(
                "the descriptor is not /dev/fuse, or its reads do not wait",
            ));
        }
        let (id, _) = self.own(&serve.fork)?;
        if !serve.mountpoint.0.starts_with(b"/") {
            return Err(usage("the mountpoint is not a whole path"));
        }
        let served = Served {
            folder: OsString::from_vec(serve.folder.0.clone()),
            mountpoint: OsString::from_vec(serve.mountpoint.0.clone()),
            dev: serve.device,
            created: serve.created,
            namespace: serve.namespace,
            instead: serve.instead,
            owner: (self.who.peer.uid, self.who.peer.gid),
        };
        self.engine.serve(id, fd, &served).map_err(failure)?;
        Ok(json!({}))
    }

    fn commit(&self, commit: Commit) -> Result<Value, Failure> {
        let forks = commit
            .forks
            .iter()
            .map(|(fork, when)| Ok((self.own(fork)?.0, *when)))
            .collect::<Result<BTreeMap<_, _>, Failure>>()?;
        let request = CommitRequest {
            keep: commit.keep,
            labels: commit.labels,
            message: commit.message,
            if_head: commit.if_head,
            if_base: commit.if_base,
            force: commit.force,
            when: forks.clone(),
        };
        let forks = forks.into_keys().collect();
        let commits = self.engine.commit(forks, request).map_err(failure)?;
        Ok(json!({"commits": documents::list(&commits, documents::commit)}))
    }

    /// Drops one fork after the other; what could not be dropped is told with the rest.
    fn abandon(&self, forks: &[String]) -> Result<Value, Failure> {
        let mut abandoned = Vec::new();
        let mut failed = None;
        for fork in forks {
            match self.own(fork).and_then(|(id, info)| {
                let mounts = self.engine.abandon(id).map_err(failure)?;
                let mount = mounts.first().map(documents::mount);
                let mounts = documents::mounts(&mounts);
                Ok(json!({"fork": info.id, "volume": info.volume, "mount": mount, "mounts": mounts}))
            }) {
                Ok(value) => abandoned.push(value),
                Err(failure) => failed = Some(failure),
            }
        }
        match failed {
            Some(failure) if abandoned.is_empty() => Err(failure),
            failure => Ok(json!({"abandoned": abandoned, "failed": failure})),
        }
    }
}
