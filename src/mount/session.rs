//! One mount of a fork: threads that answer the kernel until the connection ends.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam::channel;
use fuser::{Config, INodeNo, Notifier, Session, SessionACL};

use super::push::{self, Claims, Pusher};
use super::{Mount, Requests, Wakeful};
use crate::fs::Fs;
use crate::record::{Ino, ROOT};
use crate::sys::process::spawn_with_only;

/// The kernel greets a new connection at once.
const GREETING: Duration = Duration::from_secs(2);

/// A page that is being read is waited for so long, when caches are dropped.
const DROPPING: Duration = Duration::from_secs(5);

/// What the kernel of a session remembers.
pub struct Caches {
    notifier: Notifier,
    /// The descriptor of the session.
    fuse: RawFd,
    root: Ino,
    /// Where something may be pushed.
    claims: Option<Arc<Claims>>,
}

impl std::fmt::Debug for Caches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Caches").field("root", &self.root).finish()
    }
}

impl Caches {
    /// Makes the kernel ask for these inodes again, and for the folder at the top. The kernel waits for pages that are being read,
    /// in a call that nothing interrupts: so a thread does it that has no descriptor but the session's, and is waited for only as
    /// long as whoever reads may take. Who has a copy of that descriptor can let a page be read for ever.
    pub fn drop(self, known: Vec<Ino>) {
        if let Some(claims) = &self.claims {
            claims.close(DROPPING);
        }
        let notifier = self.notifier.clone();
        let (done, finished) = channel::bounded(1);
        let work = move || {
            let nodes = known.into_iter().filter(|ino| *ino != self.root);
            for node in nodes.chain([ROOT]) {
                // What the kernel has forgotten meanwhile is gone from its memory too.
                notifier.inval_inode(INodeNo(node.0), 0, 0).ok();
            }
            done.send(notifier).unwrap_or_default();
        };
        match spawn_with_only("invalidate", self.fuse, work) {
            Ok(_) => {
                if finished.recv_timeout(DROPPING).is_err() {
                    log::warn!(
                        "a kernel still remembers a mount that is over: a page of it is being read"
                    );
                    // That thread must not be the last one to have the descriptor: it would not close it for the process.
                    std::mem::forget(self.notifier);
                }
            }
            Err(error) => log::warn!("a kernel still remembers a mount that is over: {error}"),
        }
    }
}

/// Serves a fork on a connection that its caller has mounted; returns when the mount is usable. `ended` runs when the
/// connection is over, however it ended.
///
/// # Errors
/// No greeting in time, or what the connection answered: the descriptor is not of a mount.
pub fn serve(
    fs: Fs,
    fd: OwnedFd,
    epoch: u64,
    threads: usize,
    requests: Arc<Requests>,
    wakeful: Arc<Wakeful>,
    ended: impl FnOnce() + Send + 'static,
) -> io::Result<Caches> {
    let root = fs.root();
    let name = fs.fork.id.to_string();
    // Where another kernel writes the same files nothing is heard of it in time.
    let may_push = !fs.shares_links();
    let (readers, pusher) = may_push
        .then(|| push::pair(fs.clone(), requests.clone()))
        .unzip();
    let claims = pusher.as_ref().map(Pusher::claims);
    let number = fd.as_raw_fd();
    let mount = Mount {
        fs,
        epoch,
        requests,
        wakeful,
        readers,
    };
    let mut config = Config::default();
    config.n_threads = Some(threads);
    let (ready, greeted) = channel::bounded(1);
    thread::Builder::new().name(name.clone()).spawn(move || {
        // The greeting has no deadline of its own, so it is read here and awaited there.
        let session = match Session::from_fd(mount, fd, SessionACL::All, config) {
            Ok(session) => session,
            Err(error) => {
                // Nobody waits any more once the deadline is over.
                ready.send(Err(error)).unwrap_or_default();
                return;
            }
        };
        let notifier = session.notifier();
        if let Some(pusher) = &pusher {
            pusher.ready(notifier.clone(), number);
        }
        let caches = Caches {
            notifier: notifier.clone(),
            fuse: number,
            root,
            claims,
        };
        if ready.send(Ok(caches)).is_err() {
            return;
        }
        if let Err(error) = session.run() {
            log::warn!("{name}: the session ended: {error}");
        }
        if let Some(pusher) = pusher {
            pusher.join();
        }
        // Held until here: who pushes has a descriptor of this number too, and must not be the one that closes it.
        drop(notifier);
        ended();
    })?;
    greeted.recv_timeout(GREETING).unwrap_or_else(|_| {
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the kernel did not greet: the descriptor is not of a mount",
        ))
    })
}
