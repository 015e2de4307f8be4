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
//! In this order in each: note it, look what is being pushed, both under one lock.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::fs::Fs;
use crate::record::Ino;
use crate::sys::lent::Lent;

/// Sends what a request is answered. The thread that pushes may run it: it may use no other descriptor than the session's.
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

    /// Has `store` push a file, if it may be; returns whether it was.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn push(
        &self,
        ino: Ino,
        bytes: &Arc<Lent>,
        range: Range<usize>,
        store: impl FnOnce(&[u8]) -> io::Result<()>,
    ) -> io::Result<bool> {
        {
            let mut state = self.state.lock();
            if state.closed || self.fs.note_cached(ino) {
                return Ok(false);
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
        let taken_back = state.pushed.take().is_some_and(|pushed| pushed.taken_back);
        let behind = std::mem::take(&mut state.behind);
        drop(state);
        self.ended.notify_all();
        for answer in behind {
            answer();
        }
        match done {
            Ok(()) => Ok(true),
            Err(_) if taken_back => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Notes that a file is read, before the answer.
    ///
    /// # Errors
    /// Its bytes cannot be taken from a push: the request must fail.
    pub fn read(&self, ino: Ino) -> io::Result<()> {
        let mut state = self.state.lock();
        self.fs.note_cached(ino);
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

    /// Notes that a file has been written. If nothing was heard of that before, this is no kernel that says so, and nothing is pushed
    /// any more.
    pub fn written(&self, ino: Ino) {
        let mut state = self.state.lock();
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

    /// The same, and waits for what is. Called by no thread that answers the session.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        while state.pushed.is_some() {
            self.ended.wait(&mut state);
        }
    }
}
