//! Keeps idle cores from sleeping while requests come in one close behind the other, and for a moment when a command comes in.
//!
//! A request hands over from the program's core to the daemon's and back. Most of what that costs is waking a core that has just
//! gone to sleep: 50 us in a virtual machine, and more where sleep is deep. A command hands over dozens of times. The kernel lets a
//! privileged process ask, for as long as it holds a file open, that idle cores poll instead
//! (Documentation/power/pm_qos_interface.rst). Asked for only while it pays.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::Duration;

use parking_lot::Mutex;

use crate::sys::AwakeCores;

/// How often the stream of requests is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// So many requests between two looks make it dense.
const DENSE: u64 = 20;
/// So many looks without a dense stream let cores sleep again.
const PATIENCE: u32 = 10;

/// The stream of requests of all sessions, and who watches it.
#[derive(Debug, Default)]
pub struct Wakeful {
    requests: AtomicU64,
    /// The watcher is parked until the next request.
    parked: AtomicBool,
    /// None where nobody wants it, or may.
    watcher: OnceLock<Thread>,
    awake: Mutex<Option<AwakeCores>>,
}

impl Wakeful {
    /// Watches the requests if `wanted` and if this process may keep cores awake.
    pub fn start(wanted: bool) -> Arc<Wakeful> {
        let wakeful = Arc::new(Wakeful::default());
        if !wanted {
            return wakeful;
        }
        if let Err(error) = AwakeCores::hold() {
            log::info!("idle cores go to sleep between requests: {error}");
            return wakeful;
        }
        let watched = wakeful.clone();
        let spawned = thread::Builder::new()
            .name("wakeful".into())
            .spawn(move || watched.watch());
        match spawned {
            Ok(thread) => wakeful.watcher.get_or_init(|| thread.thread().clone()),
            Err(error) => {
                log::warn!("idle cores go to sleep between requests: {error}");
                return wakeful;
            }
        };
        wakeful
    }

    /// Counts a request.
    pub fn count(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        if self.parked.load(Ordering::Relaxed)
            && self.parked.swap(false, Ordering::AcqRel)
            && let Some(watcher) = self.watcher.get()
        {
            watcher.unpark();
        }
    }

    /// Keeps idle cores awake from now on, for as long as a dense stream would: a command has come in.
    pub fn rouse(&self) {
        if self.watcher.get().is_some() {
            self.hold();
            self.requests.fetch_add(DENSE, Ordering::Relaxed);
            self.count();
        }
    }

    fn hold(&self) {
        let mut awake = self.awake.lock();
        if awake.is_none() {
            *awake = AwakeCores::hold().ok();
        }
    }

    fn watch(&self) -> ! {
        let mut quiet = 0;
        let mut seen = self.requests.load(Ordering::Relaxed);
        loop {
            thread::sleep(LOOK);
            let now = self.requests.load(Ordering::Relaxed);
            if now - seen >= DENSE {
                quiet = 0;
                self.hold();
            } else {
                quiet += 1;
            }
            seen = now;
            if quiet > PATIENCE {
                *self.awake.lock() = None;
                quiet = 0;
                self.parked.store(true, Ordering::Release);
                // A request between the look and the store is one of few: the next one wakes the watcher.
                thread::park();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held() -> usize {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap();
        let targets = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        targets
            .filter(|target| target.ends_with("cpu_dma_latency"))
            .count()
    }

    #[test]
    fn cores_are_kept_awake_only_while_requests_come_in_fast_and_when_a_command_comes_in() {
        if let Err(error) = AwakeCores::hold() {
            return eprintln!("left out: this process may not keep cores awake: {error}");
        }
        let wakeful = Wakeful::start(true);
        for _ in 0..2 {
            wakeful.rouse();
            assert_eq!(held(), 1);
            while held() > 0 {
                thread::yield_now();
            }
            while held() == 0 {
                (0..DENSE).for_each(|_| wakeful.count());
                thread::yield_now();
            }
            while held() > 0 {
                thread::yield_now();
            }
        }
    }
}
