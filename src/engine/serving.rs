//! Sessions: a fork, or folders of it that do not overlap, served to kernels.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{Code, Engine, EngineError, Live, Result, no_fork};
use crate::fork::error::FsError;
use crate::fs::{Caller, Fs, NewNode, Options, Ownership};
use crate::mount::session::{self, Caches};
use crate::record::{Ino, Kind, ROOT};
use crate::store::{ForkId, MountPoint};

/// The sessions of a fork.
#[derive(Debug)]
pub(super) struct Sessions {
    served: Vec<Session>,
    /// When the last one ended, or the fork was opened.
    since: Instant,
}

#[derive(Debug)]
struct Session {
    epoch: u64,
    /// The folder of the fork that it serves.
    folder: OsString,
    /// The mount namespace in which it was mounted, as far as the caller said.
    namespace: Option<u64>,
    /// It is to answer nothing any more.
    ended: Arc<AtomicBool>,
    /// Known once it is served.
    caches: Option<Caches>,
}

impl Default for Sessions {
    fn default() -> Sessions {
        Sessions {
            served: Vec::new(),
            since: Instant::now(),
        }
    }
}

impl Sessions {
    /// How long there has been none.
    pub(super) fn idle(&self) -> Option<Duration> {
        self.served.is_empty().then(|| self.since.elapsed())
    }
}

/// What is to be served, and where.
#[derive(Clone, Debug)]
pub struct Served {
    /// The folder of the fork, relative to its root; empty for all of it.
    pub folder: OsString,
    pub mountpoint: OsString,
    /// The device number of the mount.
    pub dev: u64,
    /// The mount namespace in which it is, by its inode number.
    pub namespace: Option<u64>,
    /// Sessions that serve some of the same are ended: they have been taken away, and live on where nobody sees them.
    pub instead: bool,
    /// The mountpoint was made for the fork and goes with it.
    pub created: bool,
    /// Whose a folder is that has to be made.
    pub owner: (u32, u32),
}

/// Whether one of two folders lies in the other.
fn overlap(a: &OsStr, b: &OsStr) -> bool {
    names(a).zip(names(b)).all(|(a, b)| a == b)
}

fn names(path: &OsStr) -> impl Iterator<Item = &[u8]> {
    let parts = path.as_bytes().split(|byte| *byte == b'/');
    parts.filter(|part| !part.is_empty() && *part != b".")
}

impl Live {
    pub(super) fn is_served(&self) -> bool {
        !self.sessions.lock().served.is_empty()
    }

    /// The folders that are served, and in which mount namespaces, as far as that is known.
    pub(super) fn namespaces(&self) -> HashMap<OsString, Option<u64>> {
        let sessions = self.sessions.lock();
        let served = sessions.served.iter();
        served.map(|s| (s.folder.clone(), s.namespace)).collect()
    }

    fn end_session(&self, epoch: u64) {
        let mut sessions = self.sessions.lock();
        let before = sessions.served.len();
        sessions.served.retain(|session| session.epoch != epoch);
        if sessions.served.len() == before {
            return;
        }
        sessions.since = Instant::now();
        if let Some(fork) = &self.fork {
            fork.end_session(epoch);
        }
    }

    /// Ends sessions whose connection is still there: whatever they are asked from now on is answered with EIO, and their kernels
    /// are made to ask.
    fn end_served(&self, sessions: Vec<Session>) {
        let Some(fork) = &self.fork else { return };
        for session in &sessions {
            session.ended.store(true, Ordering::Release);
        }
        fork.settle();
        for session in sessions {
            let known = fork.end_session(session.epoch);
            if let Some(caches) = session.caches {
                caches.drop(known);
            }
        }
    }
}

impl Engine {
    /// A fork as a filesystem, for whoever uses it without a mount.
    ///
    /// # Errors
    /// `NotFound`, or the fork is lost.
    pub fn fs_of(&self, id: ForkId) -> Result<Fs> {
        let live = self.live(id)?;
        let options = live.record.lock().options.clone();
        let ownership = match options.owner {
            Some((uid, gid)) => Ownership::As { uid, gid },
            None => Ownership::Keep,
        };
        let options = Options {
            read_only: options.read_only,
            ownership,
            acl: options.acl,
        };
        Ok(Fs::new(live.fork()?.clone(), options))
    }

    /// Serves a fork on a connection to the kernel that its caller mounted; returns when it is usable.
    ///
    /// # Errors
    /// `Busy` if what is to be served is served already, in whole or in part, and not by sessions that are to end; `Policy` for a folder that cannot be one; `Failed` if
    /// the descriptor is not of a mount.
    pub fn serve(self: &Arc<Self>, id: ForkId, fd: OwnedFd, served: &Served) -> Result<()> {
        let live = self.live(id)?;
        // A commit or an end comes before this or behind it: what it removed is not written again, and what it takes away is there.
        let _one = live.alone();
        if live.over.load(Ordering::Acquire) {
            return Err(no_fork(&id.to_string()));
        }
        let fs = self.fs_of(id)?;
        let ended = Arc::new(AtomicBool::new(false));
        let (epoch, older) = self.begin_session(&live, served, ended.clone())?;
        live.end_served(older);
        let fs = folder_of(&fs, served)
            .and_then(|root| fs.for_session(epoch, root, ended))
            .map_err(|error| {
                live.end_session(epoch);
                explain(&served.folder, error)
            })?;
        let (engine, ended) = (Arc::downgrade(self), live.clone());
        let (requests, wakeful) = (live.requests.clone(), self.wakeful.clone());
        let caches = session::serve(fs, fd, epoch, 2, requests, wakeful, move || {
            ended.end_session(epoch);
            if ended.over.load(Ordering::Acquire)
                && !ended.is_served()
                && let Some(engine) = engine.upgrade()
            {
                engine.remove_delta(&ended);
            }
        });
        let caches = caches.map_err(|error| {
            live.end_session(epoch);
            let at = served.mountpoint.to_string_lossy();
            EngineError::new(
                Code::Failed,
                format!("fork {id} cannot be served at {at}: {error}"),
            )
        })?;
        let mut sessions = live.sessions.lock();
        if let Some(session) = sessions.served.iter_mut().find(|s| s.epoch == epoch) {
            session.caches = Some(caches);
        }
        Ok(())
    }

    /// Gives a session its number and notes where it is; returns those whose place it takes.
    fn begin_session(
        &self,
        live: &Live,
        served: &Served,
        ended: Arc<AtomicBool>,
    ) -> Result<(u64, Vec<Session>)> {
        let mut sessions = live.sessions.lock();
        let mut record = live.record.lock();
        let taken = |folder: &OsStr| overlap(folder, &served.folder);
        if !served.instead && sessions.served.iter().any(|s| taken(&s.folder)) {
            let mount = record.mounts.iter().find(|m| taken(&m.folder));
            let at = mount.map_or_else(String::new, |m| m.path.to_string_lossy().into_owned());
            return Err(EngineError::new(
                Code::Busy,
                format!("fork {} is mounted already, at {at}", live.id),
            ));
        }
        let mut changed = record.clone();
        let epoch = changed.next_epoch;
        changed.next_epoch += 1;
        changed.mounts.retain(|m| !taken(&m.folder));
        changed.mounts.push(MountPoint {
            path: served.mountpoint.clone(),
            folder: served.folder.clone(),
            dev: served.dev,
            created: served.created,
            uid: Some(served.owner.0),
        });
        self.store.put_fork(&changed)?;
        *record = changed;
        let older = sessions.served.extract_if(.., |s| taken(&s.folder));
        let older = older.collect();
        sessions.served.push(Session {
            epoch,
            folder: served.folder.clone(),
            namespace: served.namespace,
            ended,
            caches: None,
        });
        Ok((epoch, older))
    }
}

fn explain(folder: &OsStr, error: FsError) -> EngineError {
    let folder = folder.to_string_lossy();
    match error {
        FsError::NotDirectory => EngineError::new(
            Code::Policy,
            format!("{folder} is not a folder in the fork, so it cannot be mounted by itself"),
        )
        .hint("a path must be a folder that is reached without links"),
        other => other.into(),
    }
}

/// Finds the folder that is to be served, and makes what is missing of it.
fn folder_of(fs: &Fs, served: &Served) -> std::result::Result<Ino, FsError> {
    let mut at = ROOT;
    for name in names(&served.folder) {
        if name == b".." {
            return Err(FsError::Invalid);
        }
        let found = match fs.lookup(at, name)? {
            Some(found) => found,
            None => {
                let (uid, gid) = served.owner;
                let caller = Caller {
                    uid,
                    gid,
                    ..Caller::default()
                };
                fs.make(caller, at, name, NewNode::new(Kind::Directory, 0o755))?
            }
        };
        fs.forget(found.ino, 1);
        if found.attr.kind != Kind::Directory {
            return Err(FsError::NotDirectory);
        }
        at = found.ino;
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_overlap_where_one_lies_in_the_other() {
        for (a, b, together) in [
            ("", "a", true),
            ("a", "a/b", true),
            ("a/b", "./a//b/", true),
            ("a", "ab", false),
            ("a/b", "a/c", false),
        ] {
            assert_eq!(overlap(a.as_ref(), b.as_ref()), together, "{a} {b}");
            assert_eq!(overlap(b.as_ref(), a.as_ref()), together, "{b} {a}");
        }
    }
}
