//! Reading ahead where a store lies on the disk alone.
//!
//! The database keeps chunks in the order of their hashes and tells the system that its files are read at random, so that nothing
//! is read ahead: whoever goes through a tree waits for the disk at each file of it. But what one commit wrote lies in a few
//! files of the database, and who reads a part of it mostly reads the rest. So each time that readers have waited for the disk, the
//! file that their reads were from is brought into the page cache a little further, front to back: any place in it is as good as
//! any other. Where all is in memory nobody waits, and this does nothing; a reader at random pays a bounded price.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{self, Receiver, Sender};
use parking_lot::Mutex;

use crate::sys;
use crate::sys::process::blocks_read;

/// Reads that waited for the disk until the next look is worth it.
const MISSES: u32 = 8;
/// Bytes that are read ahead for each such read.
const FOR_EACH: u64 = 128 << 10;
/// The kernel takes no more in one call on a disk with usual settings.
const AT_A_TIME: u64 = 128 << 10;
/// How often files are looked at that nobody read from at the last look.
const LOOK: Duration = Duration::from_millis(250);
/// So many times as long as a look at all files took, none is taken.
const PAUSE: u32 = 4;

/// Counts the reads of a store that waited for the disk.
pub(super) struct Misses {
    count: AtomicU32,
    /// Taken away when the store is to end.
    sender: Mutex<Option<Sender<u32>>>,
    receiver: Receiver<u32>,
}

impl Default for Misses {
    fn default() -> Misses {
        let (sender, receiver) = channel::bounded(1);
        Misses {
            count: AtomicU32::new(0),
            sender: Mutex::new(Some(sender)),
            receiver,
        }
    }
}

impl Misses {
    /// Does a read for somebody who waits for it, and counts it if that was for the disk.
    pub(super) fn count<T>(&self, read: impl FnOnce() -> T) -> T {
        let before = blocks_read();
        let done = read();
        if blocks_read() != before {
            self.add();
        }
        done
    }

    fn add(&self) {
        if self.count.fetch_add(1, Ordering::Relaxed) + 1 < MISSES {
            return;
        }
        if let Some(sender) = self.sender.lock().as_ref() {
            let count = self.count.swap(0, Ordering::Relaxed);
            if count < MISSES || sender.try_send(count).is_err() {
                self.count.fetch_add(count, Ordering::Relaxed);
            }
        }
    }

    /// Whoever reads ahead is told that there is no more.
    pub(super) fn end(&self) {
        self.sender.lock().take();
    }

    /// Who reads ahead in a folder of the database.
    pub(super) fn reader(&self, dir: PathBuf) -> ReadAhead {
        ReadAhead {
            dir,
            misses: self.receiver.clone(),
            files: HashMap::new(),
            looked: None,
        }
    }
}

/// What is known of a file of the database.
#[derive(Default)]
struct Known {
    /// Pages in the cache when it was last looked at.
    cached: u64,
    /// Somebody read from it between the last two looks.
    read: bool,
    /// Where reading ahead goes on, in bytes.
    at: u64,
}

/// Reads ahead in the files of a database, in a thread of its own.
pub struct ReadAhead {
    dir: PathBuf,
    misses: Receiver<u32>,
    files: HashMap<OsString, Known>,
    /// When all files were last looked at, and how long that took.
    looked: Option<(Instant, Duration)>,
}

impl ReadAhead {
    /// Reads ahead until the store ends, or the system turns out not to tell what its page cache holds.
    pub fn run(mut self) {
        while let Ok(misses) = self.misses.recv() {
            if let Err(error) = self.follow(misses) {
                log::debug!("{}: nothing is read ahead: {error}", self.dir.display());
                if error.kind() == io::ErrorKind::Unsupported {
                    return;
                }
            }
        }
    }

    /// Looks where so many reads were, and reads ahead there. What one look has not seen, the next one may.
    fn follow(&mut self, misses: u32) -> io::Result<()> {
        let all = self.is_due();
        let begun = Instant::now();
        if all {
            self.list()?;
        }
        let mut most: Option<(u64, File, &mut Known)> = None;
        for (name, known) in &mut self.files {
            if !all && !known.read {
                continue;
            }
            // One that a compaction has removed is in no later list.
            let Ok(file) = File::open(self.dir.join(name)) else {
                continue;
            };
            let cached = sys::cached_pages(&file)?;
            let grown = cached.saturating_sub(known.cached);
            known.cached = cached;
            known.read = grown > 0;
            if grown > most.as_ref().map_or(0, |(grown, ..)| *grown) {
                most = Some((grown, file, known));
            }
        }
        if all {
            self.looked = Some((Instant::now(), begun.elapsed()));
        }
        let Some((_, file, known)) = most else {
            return Ok(());
        };
        let len = file.metadata()?.len();
        let end = (known.at + u64::from(misses) * FOR_EACH).min(len);
        while known.at < end {
            sys::will_need(&file, known.at, AT_A_TIME)?;
            known.at += AT_A_TIME;
        }
        if known.at >= len {
            known.at = 0;
        }
        known.cached = sys::cached_pages(&file)?;
        Ok(())
    }

    /// Whether all files are to be looked at: not for more than a part of the time, and less often while it is known which are read.
    fn is_due(&self) -> bool {
        let Some((when, took)) = self.looked else {
            return true;
        };
        let known = self.files.values().any(|known| known.read);
        let pause = if known { LOOK } else { Duration::ZERO };
        when.elapsed() >= pause.max(took * PAUSE)
    }

    /// Takes up new files of the database that hold values, as they are now, and forgets those that are gone.
    fn list(&mut self) -> io::Result<()> {
        let mut before = std::mem::take(&mut self.files);
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let path = self.dir.join(&name);
            if !path
                .extension()
                .is_some_and(|end| end == "blob" || end == "sst")
            {
                continue;
            }
            let known = match before.remove(&name) {
                Some(known) => known,
                None => match File::open(path) {
                    Ok(file) => Known {
                        cached: sys::cached_pages(&file)?,
                        ..Known::default()
                    },
                    Err(_) => continue,
                },
            };
            self.files.insert(name, known);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use rustix::fs::{Advice, fadvise};

    use super::*;

    const PAGE: u64 = 4096;

    /// A file of which nothing is in the page cache, where that can be had and seen.
    fn cold(dir: &Path, name: &str, len: u64) -> Option<File> {
        let path = dir.join(name);
        fs::write(&path, vec![7; len as usize]).unwrap();
        let file = File::open(path).unwrap();
        file.sync_all().unwrap();
        fadvise(&file, 0, None, Advice::Random).unwrap();
        for _ in 0..200 {
            fadvise(&file, 0, None, Advice::DontNeed).unwrap();
            if sys::cached_pages(&file).ok()? == 0 {
                return Some(file);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    }

    #[test]
    fn the_file_that_readers_wait_for_is_brought_into_memory_bit_by_bit_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let len = 4 * u64::from(MISSES) * FOR_EACH;
        let files = ["1.blob", "2.blob", "3.log"].map(|name| cold(dir.path(), name, len));
        let [Some(read), Some(other), Some(log)] = files else {
            println!(
                "left out: this filesystem keeps its files in memory, or the kernel does not tell"
            );
            return;
        };
        let misses = Misses::default();
        let mut ahead = misses.reader(dir.path().into());
        ahead.follow(MISSES).unwrap();
        assert_eq!(sys::cached_pages(&read).unwrap(), 0, "nobody has read yet");

        let mut before = 0;
        for step in 1..=4 {
            // From the back, where nothing was read ahead yet.
            let mut buffer = [0; 10];
            read.read_exact_at(&mut buffer, len - 2 * step * PAGE)
                .unwrap();
            ahead.looked = None;
            ahead.follow(MISSES).unwrap();
            let cached = sys::cached_pages(&read).unwrap() * PAGE;
            assert!(cached > before, "step {step}: {cached}");
            assert!(cached <= step * (u64::from(MISSES) * FOR_EACH + PAGE));
            before = cached;
        }
        for untouched in [&other, &log] {
            assert_eq!(sys::cached_pages(untouched).unwrap(), 0);
        }
    }

    #[test]
    fn files_that_come_and_go_are_no_error_and_the_end_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let misses = Misses::default();
        let mut ahead = misses.reader(dir.path().into());
        ahead.follow(MISSES).unwrap();
        fs::write(dir.path().join("1.blob"), b"text").unwrap();
        ahead.looked = None;
        if let Err(error) = ahead.follow(MISSES) {
            assert_eq!(error.kind(), io::ErrorKind::Unsupported);
            println!("left out: the kernel does not tell what its page cache holds");
            return;
        }
        fs::remove_file(dir.path().join("1.blob")).unwrap();
        ahead.follow(MISSES).unwrap();
        ahead.looked = None;
        ahead.follow(MISSES).unwrap();
        assert!(ahead.files.is_empty());

        for _ in 0..3 * MISSES {
            misses.add();
        }
        misses.end();
        misses.add();
        assert_eq!(ahead.misses.recv(), Ok(MISSES));
        ahead.run();
    }
}
