//! Pushes small files into the page cache ahead of a reader who goes through a folder of a read-only fork.
//!
//! A push replaces what the page cache holds, even what somebody is just writing: so it takes a [`ReadOnly`], which a writable
//! fork never gives. A push may wait for a page that waits for the answer to a request: so a thread of its own makes it, which no
//! handler waits for and which holds no lock meanwhile.

mod plan;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crossbeam::channel::{self, Receiver, Sender};
use fuser::{INodeNo, Notifier};
use parking_lot::Mutex;

use super::Requests;
use crate::fs::{Entry, ReadOnly};
use crate::record::{Ino, Kind};
use plan::{File, MOST, Plan, SMALL};

/// Windows that wait for the pusher; what they hold together is bounded by `MOST`.
const WAITING: usize = 64;

/// What the handlers of a session tell of its readers.
pub struct Readers {
    plan: Mutex<Plan>,
    queue: Sender<Vec<File>>,
    /// Bytes in the queue.
    waiting: Arc<AtomicU64>,
}

/// The thread that pushes.
pub struct Pusher {
    content: ReadOnly,
    queue: Receiver<Vec<File>>,
    waiting: Arc<AtomicU64>,
    requests: Arc<Requests>,
}

/// Returns both ends for one session. The pusher ends when the readers are dropped.
pub fn pair(content: ReadOnly, requests: Arc<Requests>) -> (Readers, Pusher) {
    let (sender, queue) = channel::bounded(WAITING);
    let waiting = Arc::new(AtomicU64::new(0));
    let readers = Readers {
        plan: Mutex::default(),
        queue: sender,
        waiting: waiting.clone(),
    };
    let pusher = Pusher {
        content,
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

    /// Notes that a file is read from its start.
    pub fn read(&self, ino: Ino) {
        let room = MOST.saturating_sub(self.waiting.load(Ordering::Relaxed));
        let files = self.plan.lock().read(ino, room);
        if files.is_empty() {
            return;
        }
        let bytes = files.iter().map(|file| u64::from(file.size)).sum();
        self.waiting.fetch_add(bytes, Ordering::Relaxed);
        if self.queue.try_send(files).is_err() {
            self.waiting.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

impl Pusher {
    pub fn start(self, notifier: Notifier) -> io::Result<()> {
        let thread = thread::Builder::new().name("push".into());
        thread.spawn(move || {
            for file in self.queue.iter().flatten() {
                if let Err(error) = self.push(&notifier, file) {
                    log::debug!("nothing more is pushed: {error}");
                    return;
                }
                let size = u64::from(file.size);
                self.waiting.fetch_sub(size, Ordering::Relaxed);
            }
        })?;
        Ok(())
    }

    /// Pushes a whole file; one that the kernel has forgotten is passed over.
    fn push(&self, notifier: &Notifier, file: File) -> io::Result<()> {
        // What is wrong with a file is told to whoever reads it.
        let Ok(bytes) = self.content.read(file.ino, 0, file.size as usize) else {
            return Ok(());
        };
        if bytes.len() == file.size as usize {
            notifier.store(INodeNo(file.ino.0), 0, &bytes)?;
            self.requests.count("store");
        }
        Ok(())
    }
}
