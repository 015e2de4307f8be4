//! Pushes small files into the page cache ahead of a reader who goes through a folder of a read-only fork.
//!
//! A push replaces what the page cache holds, even what somebody is just writing: so it takes a [`ReadOnly`], which a writable
//! fork never gives. A push may wait for a page that waits for the answer to a request: so a thread of its own makes it, which no
//! handler waits for and which holds no lock meanwhile that one takes.

mod plan;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{io, thread, vec};

use crossbeam::channel::{self, Receiver, Sender};
use fuser::{INodeNo, Notifier, ReplyDirectoryPlus};
use parking_lot::{Mutex, RwLock};

use super::Requests;
use crate::fs::{Entry, ReadOnly};
use crate::record::{Ino, Kind};
use plan::{File, MOST, Plan, SMALL};

/// Shared by who pushes, as long as it says that one may.
static MAY_PUSH: RwLock<bool> = RwLock::new(true);
/// A page that is waited for is one that a handler reads.
const LAST_PUSH: Duration = Duration::from_secs(1);

/// Lets nothing be pushed any more, before the process ends: the kernel would keep a thread, and with it all mounts of this process,
/// that waits for a page of which no handler is left to answer.
pub fn end() {
    if let Some(mut may_push) = MAY_PUSH.try_write_for(LAST_PUSH) {
        *may_push = false;
    }
}

/// Windows that wait for the pusher; what they hold together is bounded by `MOST`.
const WAITING: usize = 64;

/// Files to push, in this order.
struct Window {
    files: vec::IntoIter<File>,
    /// Who listed the folder hears that there is no more of it when the first file has been pushed: without that head start it
    /// would ask for that file itself, and for others.
    listing: Option<ReplyDirectoryPlus>,
}

/// What the handlers of a session tell of its readers.
pub struct Readers {
    plan: Arc<Mutex<Plan>>,
    queue: Sender<Window>,
    /// Bytes in the queue.
    waiting: Arc<AtomicU64>,
}

/// The thread that pushes.
pub struct Pusher {
    content: ReadOnly,
    plan: Arc<Mutex<Plan>>,
    queue: Receiver<Window>,
    waiting: Arc<AtomicU64>,
    requests: Arc<Requests>,
}

/// Returns both ends for one session. The pusher ends when the readers are dropped.
pub fn pair(content: ReadOnly, requests: Arc<Requests>) -> (Readers, Pusher) {
    let (sender, queue) = channel::bounded(WAITING);
    let waiting = Arc::new(AtomicU64::new(0));
    let plan = Arc::new(Mutex::default());
    let readers = Readers {
        plan: plan.clone(),
        queue: sender,
        waiting: waiting.clone(),
    };
    let pusher = Pusher {
        content,
        plan,
        queue,
        waiting,
        requests,
    };
    (readers, pusher)
}

/// An entry of a listing, if it may be pushed.
pub fn small(entry: &Entry) -> Option<File> {
    let attr = &entry.attr;
    let is_small = attr.kind == Kind::File && (1..=SMALL).contains(&attr.size);
    is_small.then_some(File {
        ino: entry.ino,
        size: attr.size as u32,
    })
}

impl Readers {
    /// Notes the small files of one reply of a listing, and whether it was the first of them.
    pub fn listed(&self, dir: Ino, starts: bool, files: Vec<File>) {
        self.plan.lock().listed(dir, starts, files);
    }

    /// Answers that a listing has no more, soon.
    pub fn listed_all(&self, dir: Ino, reply: ReplyDirectoryPlus) {
        let files = self.plan.lock().listed_all(dir, self.room());
        self.push(files, Some(reply));
    }

    /// Notes that a file is read from its start.
    pub fn read(&self, ino: Ino) {
        let files = self.plan.lock().read(ino, self.room());
        self.push(files, None);
    }

    fn room(&self) -> u64 {
        MOST.saturating_sub(self.waiting.load(Ordering::Relaxed))
    }

    fn push(&self, files: Vec<File>, mut listing: Option<ReplyDirectoryPlus>) {
        if !files.is_empty() {
            let bytes = files.iter().map(|file| u64::from(file.size)).sum();
            self.waiting.fetch_add(bytes, Ordering::Relaxed);
            let files = files.into_iter();
            let Err(refused) = self.queue.try_send(Window { files, listing }) else {
                return;
            };
            self.waiting.fetch_sub(bytes, Ordering::Relaxed);
            listing = refused.into_inner().listing;
        }
        if let Some(listing) = listing {
            listing.ok();
        }
    }
}

impl Pusher {
    pub fn start(self, notifier: Notifier) -> io::Result<()> {
        let thread = thread::Builder::new().name("push".into());
        thread.spawn(move || self.run(&notifier))?;
        Ok(())
    }

    /// Whoever waits comes first, then the newest window: that is where a reader is.
    fn run(&self, notifier: &Notifier) {
        let mut windows = Vec::new();
        let mut refused = false;
        let mut push_first = |files: &mut vec::IntoIter<File>| {
            let Some(file) = files.next() else {
                return false;
            };
            self.waiting
                .fetch_sub(u64::from(file.size), Ordering::Relaxed);
            if !refused && let Err(error) = self.push(notifier, file) {
                log::debug!("nothing more is pushed: {error}");
                refused = true;
            }
            true
        };
        loop {
            let came = match windows.is_empty() {
                true => self.queue.recv().ok(),
                false => self.queue.try_recv().ok(),
            };
            match (came, windows.last_mut()) {
                (Some(Window { mut files, listing }), _) => {
                    push_first(&mut files);
                    if let Some(listing) = listing {
                        listing.ok();
                    }
                    windows.push(files);
                }
                (None, Some(newest)) => {
                    if !push_first(newest) {
                        windows.pop();
                    }
                }
                (None, None) => return,
            }
        }
    }

    /// Pushes a whole file; one that the kernel has forgotten is passed over.
    fn push(&self, notifier: &Notifier, file: File) -> io::Result<()> {
        let is_read = || self.plan.lock().is_read(file.ino);
        if is_read() {
            return Ok(());
        }
        // What is wrong with a file is told to whoever reads it.
        let Ok(bytes) = self.content.read(file.ino, 0, file.size as usize) else {
            return Ok(());
        };
        // One that is being read would have to be waited for.
        let may_push = MAY_PUSH.read();
        if bytes.len() == file.size as usize && *may_push && !is_read() {
            notifier.store(INodeNo(file.ino.0), 0, &bytes)?;
            self.requests.count("store");
        }
        Ok(())
    }
}
