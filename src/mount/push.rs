//! Pushes small files into the page cache ahead of a reader who goes through a folder.
//!
//! [`Plan`] says what a reader will want, [`Claims`] what may be pushed. One thread fetches content. Another one does nothing but hand
//! it to the kernel, which may keep that thread in a call that nothing interrupts: so it holds no lock that a handler takes, and has
//! no descriptor open but the session's.

mod claims;
mod plan;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{io, vec};

use crossbeam::channel::{self, Receiver, Sender};
use crossbeam::select;
use fuser::{INodeNo, Notifier};
use parking_lot::{Mutex, RwLock};

use super::Requests;
use crate::fs::{Entry, Fs};
use crate::record::{Ino, Kind};
use crate::sys::lent::{Lent, page_size};
use crate::sys::process::spawn_with_only;
use claims::Answer;
pub use claims::Claims;
use plan::{File, MOST, Plan, SMALL};

/// Shared by who pushes.
static PUSHING: RwLock<()> = RwLock::new(());
/// Nothing is pushed any more. Asked when one takes part in that.
static OVER: AtomicBool = AtomicBool::new(false);
/// A page that is waited for is one that a handler reads.
const LAST_PUSH: Duration = Duration::from_secs(1);

/// Lets nothing be pushed any more, before the process ends: the kernel would keep a thread of it that waits for a page of which no
/// handler is left to answer.
pub fn end() {
    OVER.store(true, Ordering::Release);
    drop(PUSHING.try_write_for(LAST_PUSH));
}

/// Windows that wait to be fetched; what they hold together is bounded by `MOST`.
const WAITING: usize = 64;
/// Room for files that are pushed one behind the other, in bytes; the largest fits.
const BATCH: usize = 2 * SMALL as usize;
/// So much is fetched before it is handed on.
const ENOUGH: usize = 64 << 10;
/// One is filled while another one is pushed.
const BATCHES: usize = 2;

/// Files to push, in this order.
struct Window {
    files: vec::IntoIter<File>,
    /// Who listed the folder hears that there is no more of it when the first file has been pushed: without that head start it
    /// would ask for that file itself, and for others.
    listing: Option<Answer>,
}

/// Files that were fetched, and where they lie.
struct Batch {
    bytes: Arc<Lent>,
    files: Vec<(Ino, Range<usize>)>,
    listing: Option<Answer>,
}

/// What handlers and threads of a session share.
struct Shared {
    fs: Fs,
    plan: Mutex<Plan>,
    claims: Arc<Claims>,
    /// Bytes in the queue.
    waiting: AtomicU64,
    requests: Arc<Requests>,
    /// What the kernel refused a push with; the thread that pushes cannot say it.
    failed: Mutex<Option<io::Error>>,
}

/// The threads of a session that push: few sessions need them.
enum Threads {
    /// They start with the first window, once it is known how to hand something to the kernel.
    Wanted(Receiver<Window>, Option<(Notifier, RawFd)>),
    Started([JoinHandle<()>; 2]),
    Over,
}

/// What the handlers of a session tell of its readers.
pub struct Readers {
    shared: Arc<Shared>,
    queue: Sender<Window>,
    threads: Arc<Mutex<Threads>>,
}

/// Who pushes, as the session sees it.
pub struct Pusher {
    claims: Arc<Claims>,
    threads: Arc<Mutex<Threads>>,
}

/// Returns both ends for one session. The threads end when the readers are dropped.
pub fn pair(fs: Fs, requests: Arc<Requests>) -> (Readers, Pusher) {
    let (sender, queue) = channel::bounded(WAITING);
    let claims = Arc::new(Claims::new(fs.clone()));
    let threads = Arc::new(Mutex::new(Threads::Wanted(queue, None)));
    let shared = Shared {
        fs,
        plan: Mutex::default(),
        claims: claims.clone(),
        waiting: AtomicU64::new(0),
        requests,
        failed: Mutex::default(),
    };
    let readers = Readers {
        shared: Arc::new(shared),
        queue: sender,
        threads: threads.clone(),
    };
    (readers, Pusher { claims, threads })
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
        self.shared.plan.lock().listed(dir, starts, files);
    }

    /// Answers that a listing has no more, soon.
    pub fn listed_all(&self, dir: Ino, answer: impl FnOnce() + Send + 'static) {
        let files = self.shared.plan.lock().listed_all(dir, self.room());
        self.push(files, Some(Box::new(answer)));
    }

    /// Notes that a file is read, before the answer.
    ///
    /// # Errors
    /// The request must fail.
    pub fn read(&self, ino: Ino, offset: u64) -> io::Result<()> {
        self.shared.claims.read(ino)?;
        if offset == 0 {
            let files = self.shared.plan.lock().read(ino, self.room());
            self.push(files, None);
        }
        Ok(())
    }

    /// See [`Claims::before_change`].
    pub fn before_change(&self, ino: Ino, answer: impl FnOnce() + Send + 'static) {
        self.shared.claims.before_change(ino, answer);
    }

    /// See [`Claims::written`].
    pub fn written(&self, ino: Ino) {
        self.shared.claims.written(ino);
    }

    fn room(&self) -> u64 {
        MOST.saturating_sub(self.shared.waiting.load(Ordering::Relaxed))
    }

    fn push(&self, files: Vec<File>, mut listing: Option<Answer>) {
        if !files.is_empty() {
            self.start();
            let waiting = &self.shared.waiting;
            let bytes = files.iter().map(|file| u64::from(file.size)).sum();
            waiting.fetch_add(bytes, Ordering::Relaxed);
            let files = files.into_iter();
            let Err(refused) = self.queue.try_send(Window { files, listing }) else {
                return;
            };
            waiting.fetch_sub(bytes, Ordering::Relaxed);
            listing = refused.into_inner().listing;
        }
        if let Some(listing) = listing {
            listing();
        }
    }

    fn start(&self) {
        let mut threads = self.threads.lock();
        match std::mem::replace(&mut *threads, Threads::Over) {
            Threads::Wanted(queue, Some((notifier, fuse))) => {
                match start(self.shared.clone(), queue, notifier, fuse) {
                    Ok(started) => *threads = Threads::Started(started),
                    Err(error) => log::warn!("nothing is pushed: {error}"),
                }
            }
            others => *threads = others,
        }
    }
}

impl Pusher {
    /// Says how to hand something to the kernel; `fuse` is the descriptor of the session.
    pub fn ready(&self, notifier: Notifier, fuse: RawFd) {
        if let Threads::Wanted(_, how) = &mut *self.threads.lock() {
            *how = Some((notifier, fuse));
        }
    }

    pub fn claims(&self) -> Arc<Claims> {
        self.claims.clone()
    }

    /// Waits for the threads, when the readers have been dropped.
    pub fn join(self) {
        let threads = std::mem::replace(&mut *self.threads.lock(), Threads::Over);
        if let Threads::Started(threads) = threads {
            for thread in threads {
                thread.join().expect("a panic ends the process");
            }
        }
    }
}

/// Starts the thread that fetches and the one that pushes.
fn start(
    shared: Arc<Shared>,
    queue: Receiver<Window>,
    notifier: Notifier,
    fuse: RawFd,
) -> io::Result<[JoinHandle<()>; 2]> {
    let spares = std::iter::repeat_with(|| Lent::new(BATCH).map(Arc::new));
    let spares = spares.take(BATCHES).collect::<io::Result<Vec<_>>>()?;
    let (back, given_back) = channel::unbounded();
    let (batches, fetched) = channel::bounded(BATCHES);
    let pushing = shared.clone();
    let push = spawn_with_only("push", fuse, move || {
        pushing.push(&notifier, &fetched, &back);
    })?;
    let fetch = thread::Builder::new().name("fetch".into());
    let fetch = fetch.spawn(move || {
        shared.fetch(&queue, spares, &batches, &given_back);
        // What is answered late is answered here: the other thread may not even log that it cannot be.
        drop(batches);
        for back in given_back {
            back.answered();
        }
    })?;
    Ok([fetch, push])
}

/// What comes back from the thread that pushes: answers that are due, and room that is free.
struct Back {
    answers: Vec<Answer>,
    room: Option<Arc<Lent>>,
}

impl Back {
    /// Sends the answers; returns the room.
    fn answered(self) -> Option<Arc<Lent>> {
        for answer in self.answers {
            answer();
        }
        self.room
    }
}

impl Shared {
    /// Fetches what is to be pushed: whoever waits comes first, then the newest window, for that is where a reader is. Sends the
    /// answers that are due.
    fn fetch(
        &self,
        queue: &Receiver<Window>,
        mut spares: Vec<Arc<Lent>>,
        batches: &Sender<Batch>,
        given_back: &Receiver<Back>,
    ) {
        let mut windows: Vec<vec::IntoIter<File>> = Vec::new();
        loop {
            while let Ok(back) = given_back.try_recv() {
                spares.extend(back.answered());
            }
            let came = if windows.is_empty() {
                select! {
                    recv(queue) -> window => match window {
                        Ok(window) => Some(window),
                        Err(_) => return,
                    },
                    recv(given_back) -> back => match back {
                        Ok(back) => {
                            spares.extend(back.answered());
                            continue;
                        }
                        Err(_) => return,
                    },
                }
            } else {
                queue.try_recv().ok()
            };
            let listing = came.and_then(|window| {
                windows.push(window.files);
                window.listing
            });
            while spares.is_empty() {
                let Ok(back) = given_back.recv() else { return };
                spares.extend(back.answered());
            }
            let (Some(newest), Some(bytes)) = (windows.last_mut(), spares.pop()) else {
                return;
            };
            if let Some(error) = self.failed.lock().take() {
                log::debug!("nothing more is pushed: {error}");
            }
            let batch = self.batch(newest, bytes, listing);
            if newest.len() == 0 {
                windows.pop();
            }
            if batches.send(batch).is_err() {
                return;
            }
        }
    }

    /// Fetches some files of a window; the first alone, if somebody waits for it.
    fn batch(
        &self,
        window: &mut vec::IntoIter<File>,
        mut bytes: Arc<Lent>,
        listing: Option<Answer>,
    ) -> Batch {
        let mut files = Vec::new();
        let mut end = 0;
        let enough = if listing.is_some() { 1 } else { ENOUGH };
        let room = Arc::get_mut(&mut bytes).map(Lent::fill);
        let room = room.and_then(Result::ok).unwrap_or_default();
        while end < enough
            && let Some(file) = window.next()
        {
            let size = file.size as usize;
            self.waiting.fetch_sub(size as u64, Ordering::Relaxed);
            // What is wrong with a file is told to whoever reads it.
            if let Some(place) = room.get_mut(end..end + size)
                && self.claims.fetch(file.ino)
            {
                if matches!(self.fs.read_into(file.ino, 0, place), Ok(read) if read == size) {
                    files.push((file.ino, end..end + size));
                    end += size.next_multiple_of(page_size());
                } else {
                    self.claims.give_up(file.ino);
                }
            }
        }
        Batch {
            bytes,
            files,
            listing,
        }
    }

    /// Pushes what was fetched. Uses no descriptor but the session's, and does nothing that logs.
    fn push(&self, notifier: &Notifier, fetched: &Receiver<Batch>, back: &Sender<Back>) {
        for batch in fetched {
            let mut listing = batch.listing;
            for (ino, range) in batch.files {
                let pushing = PUSHING.read();
                let (pushed, mut answers) = match OVER.load(Ordering::Acquire) {
                    true => (Ok(false), Vec::new()),
                    false => self.claims.push(ino, &batch.bytes, range, |bytes| {
                        notifier.store(INodeNo(ino.0), 0, bytes)
                    }),
                };
                drop(pushing);
                match pushed {
                    Ok(true) => self.requests.count("store"),
                    Ok(false) => {}
                    Err(error) => {
                        self.claims.forbid();
                        *self.failed.lock() = Some(error);
                    }
                }
                answers.extend(listing.take());
                let room = None;
                // The other thread ends behind this one: it takes everything.
                if !answers.is_empty() && back.send(Back { answers, room }).is_err() {
                    return;
                }
            }
            let (answers, room) = (Vec::from_iter(listing), Some(batch.bytes));
            if back.send(Back { answers, room }).is_err() {
                return;
            }
        }
    }
}
