//! What may be pushed: a file of which the kernel holds no page, and which nobody is about to write.
//!
//! A push copies over what the page cache holds, and a write whose page it meets is lost. Whatever could bring other bytes there than
//! the fork holds is heard of before, by one of two:
//!
//! - Before the kernel writes to a file, or cuts it, it asks whether that has `security.capability` (`file_remove_privs`), and waits
//!   for the answer, holding no page. It may ask only once. So a file that it has asked about is not pushed any more, and the
//!   answer waits until a push of it has ended.
//! - Who stores through a mapping says nothing, but has a page before: one that was pushed, and no file is pushed twice; or one that
//!   was read, and a READ holds its pages from before it is sent until its answer is taken. A push that comes to one of them meanwhile
//!   waits there. So before the answer its bytes are taken from it: when it goes on it copies none of them.
//!
//! What was noted of a file goes when the kernel forgets it. So what was fetched before somebody changed the file is not pushed
//! whatever is known of it by then, and a push notes its file once more at its end: the kernel may have forgotten it and
//! looked it up again before the push came to it.

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::fs::Fs;
use crate::record::Ino;
use crate::sys::lent::Lent;

/// Sends what a request is answered.
pub type Answer = Box<dyn FnOnce() + Send>;

/// The file that is being pushed.
struct Pushed {
    ino: Ino,
    bytes: Arc<Lent>,
    range: Range<usize>,
    taken_back: bool,
}

#[derive(Default)]
struct State {
    closed: bool,
    /// Files whose bytes were fetched, or are, and that nobody has read or changed since.
    fetched: HashSet<Ino>,
    pushed: Option<Pushed>,
    /// What waits until the push has ended.
    behind: Vec<Answer>,
}

/// Decides between who pushes into a session's page cache and who brings other bytes there.
pub struct Claims {
    fs: Fs,
    state: Mutex<State>,
    ended: Condvar,
}

impl Claims {
    pub fn new(fs: Fs) -> Claims {
        Claims {
            fs,
            state: Mutex::default(),
            ended: Condvar::new(),
        }
    }

    /// Whether it is worth to fetch a file. To be asked before, and followed by [`Claims::push`] or [`Claims::give_up`].
    pub fn fetch(&self, ino: Ino) -> bool {
        let mut state = self.state.lock();
        !state.closed && !self.fs.may_be_cached(ino) && state.fetched.insert(ino)
    }

    /// Forgets that a file was fetched.
    pub fn give_up(&self, ino: Ino) {
        self.state.lock().fetched.remove(&ino);
    }

    /// Has `store` push a file that was fetched, if it still may be; returns whether it was, and what is to be answered now.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn push(
        &self,
        ino: Ino,
        bytes: &Arc<Lent>,
        range: Range<usize>,
        store: impl FnOnce(&[u8]) -> io::Result<()>,
    ) -> (io::Result<bool>, Vec<Answer>) {
        {
            let mut state = self.state.lock();
            if !state.fetched.remove(&ino) || state.closed || self.fs.note_cached(ino) {
                return (Ok(false), Vec::new());
            }
            state.pushed = Some(Pushed {
                ino,
                bytes: bytes.clone(),
                range: range.clone(),
                taken_back: false,
            });
        }
        let done = store(bytes.lend(range));
        let mut state = self.state.lock();
        self.fs.note_cached(ino);
        let taken_back = state.pushed.take().is_some_and(|pushed| pushed.taken_back);
        let behind = std::mem::take(&mut state.behind);
        drop(state);
        self.ended.notify_all();
        let done = match done {
            Ok(()) => Ok(true),
            Err(_) if taken_back => Ok(false),
            Err(error) => Err(error),
        };
        (done, behind)
    }

    /// Notes that a file is read, before the answer.
    ///
    /// # Errors
    /// Its bytes cannot be taken from a push: the request must fail.
    pub fn read(&self, ino: Ino) -> io::Result<()> {
        let mut state = self.state.lock();
        self.fs.note_cached(ino);
        state.fetched.remove(&ino);
        match state.pushed.as_mut().filter(|pushed| pushed.ino == ino) {
            Some(pushed) => {
                pushed.taken_back = true;
                pushed.bytes.take_back(pushed.range.clone())
            }
            None => Ok(()),
        }
    }

    /// Answers a request behind which the kernel may change what it holds of a file, now or when a push of that has ended.
    pub fn before_change(&self, ino: Ino, answer: impl FnOnce() + Send + 'static) {
        let mut state = self.state.lock();
        self.fs.note_cached(ino);
        state.fetched.remove(&ino);
        if state
            .pushed
            .as_ref()
            .is_some_and(|pushed| pushed.ino == ino)
        {
            state.behind.push(Box::new(answer));
        } else {
            drop(state);
            answer();
        }
    }

    /// Notes that a file is written. If nothing was heard of it before, this is no kernel that says so, and nothing is pushed any
    /// more.
    pub fn written(&self, ino: Ino) {
        let mut state = self.state.lock();
        state.fetched.remove(&ino);
        if !self.fs.note_cached(ino) && !state.closed {
            state.closed = true;
            log::warn!(
                "nothing is pushed any more: inode {ino} was written without a question before"
            );
        }
    }

    /// Lets nothing be pushed any more.
    pub fn forbid(&self) {
        self.state.lock().closed = true;
    }

    /// The same, and waits for what is, but not for ever. Called by no thread that answers the session.
    pub fn close(&self, deadline: Duration) {
        let until = Instant::now() + deadline;
        let mut state = self.state.lock();
        state.closed = true;
        while state.pushed.is_some() && !self.ended.wait_until(&mut state, until).timed_out() {}
    }
}
