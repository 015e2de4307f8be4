//! Random calls on the content of two files, compared with plain bytes in memory as they go. Between the calls the fork is
//! committed, unmounted, or exchanged for the next one, and the calls go on with the same files: so content is written over
//! the base's chunks, over frozen rooms of the spool and over its own, in every mixture.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{Advice, FallocateFlags, OFlags, SeekFrom};
use rustix::fs::{copy_file_range, fadvise, fallocate, fcntl_setfl, seek};

use crate::common::{Random, TestMount, TestStore};

const NAMES: [&str; 2] = ["a", "b"];

/// What is done, and how large.
#[derive(Clone, Copy, Debug)]
struct Plan {
    seed: u64,
    calls: usize,
    /// The files never grow above this.
    limit: u64,
    /// Size of the file that the first base brings.
    base: u64,
    /// The most bytes of one call.
    step: u64,
    /// Calls between two changes of the mount, on average.
    between: u64,
}

#[derive(Clone, Copy, Debug)]
enum Call {
    Read {
        at: u64,
        len: u64,
        direct: bool,
    },
    Write {
        at: u64,
        len: u64,
        direct: bool,
    },
    Truncate {
        size: u64,
    },
    Punch {
        at: u64,
        len: u64,
    },
    Zero {
        at: u64,
        len: u64,
        keep: bool,
    },
    Reserve {
        at: u64,
        len: u64,
        keep: bool,
    },
    Copy {
        at: u64,
        len: u64,
        to: u64,
        other: bool,
    },
    Holes,
    Sync,
    Forget,
}

struct Exerciser {
    plan: Plan,
    random: Random,
    store: TestStore,
    mount: Option<TestMount>,
    files: Vec<File>,
    model: [Vec<u8>; 2],
}

impl Exerciser {
    fn new(plan: Plan) -> Exerciser {
        let store = TestStore::new();
        let mut random = Random(plan.seed);
        let mut bytes = vec![0; plan.base as usize];
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next(u64::MAX).to_le_bytes());
        }
        let mount = store.fork("v");
        std::fs::write(mount.path.join("a"), &bytes).unwrap();
        File::create(mount.path.join("b")).unwrap();
        store.commit(mount);
        let mut new = Exerciser {
            plan,
            random,
            store,
            mount: None,
            files: Vec::new(),
            model: [bytes, Vec::new()],
        };
        new.enter(None);
        new
    }

    fn mounted(&self) -> &TestMount {
        self.mount.as_ref().unwrap()
    }

    /// Mounts a new fork, or the old one again, and opens the files there.
    fn enter(&mut self, mount: Option<TestMount>) {
        let mount = mount.unwrap_or_else(|| self.store.fork("v"));
        let open = |name| {
            let mut options = File::options();
            options.read(true).write(true);
            options.open(mount.path.join(name)).unwrap()
        };
        self.files = NAMES.map(open).into();
        self.mount = Some(mount);
    }

    /// Mostly anywhere, often at the border of a page, rarely behind the end.
    fn place(&mut self, size: u64) -> u64 {
        let at = match self.random.next(8) {
            0 => self.random.next(self.plan.limit),
            _ => self.random.next(size.max(1)),
        };
        match self.random.next(3) {
            0 => at & !4095,
            1 => (at & !4095)
                .saturating_add(self.random.next(3))
                .saturating_sub(1),
            _ => at,
        }
    }

    fn call(&mut self, which: usize) -> Call {
        let size = self.model[which].len() as u64;
        let at = self.place(size);
        let len = 1 + self.random.next(self.plan.step);
        let len = if self.random.next(3) == 0 {
            len.next_multiple_of(4096)
        } else {
            len
        };
        let len = len.min(self.plan.limit - at).max(1);
        let keep = self.random.next(2) == 0;
        let direct = self.random.next(6) == 0;
        match self.random.next(40) {
            0..=9 => Call::Read { at, len, direct },
            10..=19 => Call::Write { at, len, direct },
            20..=22 => Call::Truncate { size: at },
            23..=25 => Call::Punch { at, len },
            26..=28 => Call::Zero { at, len, keep },
            29..=30 => Call::Reserve { at, len, keep },
            31..=35 => {
                let other = self.random.next(2) == 0;
                let there = self.model[if other { 1 - which } else { which }].len() as u64;
                let to = self.place(there);
                // Sharing needs whole pages.
                let whole = |n: u64| if keep { n & !4095 } else { n };
                Call::Copy {
                    at: whole(at),
                    len,
                    to: whole(to),
                    other,
                }
            }
            36 => Call::Holes,
            37 => Call::Sync,
            _ => Call::Forget,
        }
    }

    fn run(&mut self, which: usize, call: Call) {
        let file = &self.files[which];
        let direct = |on| {
            let flags = if on { OFlags::DIRECT } else { OFlags::empty() };
            fcntl_setfl(file, flags).unwrap();
        };
        match call {
            Call::Read {
                at,
                len,
                direct: on,
            } => {
                let mut bytes = vec![0xa5; len as usize];
                direct(on);
                let n = file.read_at(&mut bytes, at).unwrap();
                direct(false);
                let model = &self.model[which];
                let from = model.len().min(at as usize);
                let expected = &model[from..model.len().min((at + len) as usize)];
                assert!(
                    n == expected.len(),
                    "{n} bytes were read, not {}",
                    expected.len()
                );
                compare(&bytes[..n], expected, at);
            }
            Call::Write {
                at,
                len,
                direct: on,
            } => {
                let byte = 1 + self.random.next(255) as u8;
                direct(on);
                file.write_all_at(&vec![byte; len as usize], at).unwrap();
                direct(false);
                self.grow(which, at + len);
                self.model[which][at as usize..(at + len) as usize].fill(byte);
            }
            Call::Truncate { size } => {
                file.set_len(size).unwrap();
                self.model[which].resize(size as usize, 0);
            }
            Call::Punch { at, len } => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(file, flags, at, len).unwrap();
                self.fill_zero(which, at, len);
            }
            Call::Zero { at, len, keep } => {
                let flags = FallocateFlags::ZERO_RANGE | kept(keep);
                fallocate(file, flags, at, len).unwrap();
                if !keep {
                    self.grow(which, at + len);
                }
                self.fill_zero(which, at, len);
            }
            Call::Reserve { at, len, keep } => {
                fallocate(file, kept(keep), at, len).unwrap();
                if !keep {
                    self.grow(which, at + len);
                }
            }
            Call::Copy { at, len, to, other } => self.copy(which, at, len, to, other),
            Call::Holes => self.holes(which),
            Call::Sync => file.sync_all().unwrap(),
            Call::Forget => fadvise(file, 0, None, Advice::DontNeed).unwrap(),
        }
        let size = self.files[which].metadata().unwrap().len();
        assert_eq!(size, self.model[which].len() as u64, "the size of the file");
    }

    fn copy(&mut self, which: usize, at: u64, len: u64, to: u64, other: bool) {
        let target = if other { 1 - which } else { which };
        let size = self.model[which].len() as u64;
        let len = len.min(size.saturating_sub(at)).min(self.plan.limit - to);
        if len == 0 || (!other && at < to + len && to < at + len) {
            return;
        }
        let (mut from, mut there) = (at, to);
        let mut left = len;
        while left > 0 {
            let (source, sink) = (&self.files[which], &self.files[target]);
            let n = copy_file_range(
                source,
                Some(&mut from),
                sink,
                Some(&mut there),
                left as usize,
            );
            let n = n.unwrap() as u64;
            assert!(n > 0, "nothing was copied");
            left -= n;
        }
        let bytes = self.model[which][at as usize..(at + len) as usize].to_vec();
        self.grow(target, to + len);
        self.model[target][to as usize..(to + len) as usize].copy_from_slice(&bytes);
    }

    /// What SEEK_HOLE calls a hole reads as zeros, and holes and data alternate up to the end.
    fn holes(&self, which: usize) {
        let (file, model) = (&self.files[which], &self.model[which]);
        let size = model.len() as u64;
        let mut at = 0;
        while at < size {
            let data = seek(file, SeekFrom::Data(at)).unwrap_or(size);
            assert!(data >= at && data <= size);
            let hole = &model[at as usize..data as usize];
            assert!(
                hole.iter().all(|b| *b == 0),
                "data in a hole at {at}..{data}"
            );
            if data == size {
                break;
            }
            at = seek(file, SeekFrom::Hole(data)).unwrap();
            assert!(at > data && at <= size);
        }
    }

    fn grow(&mut self, which: usize, end: u64) {
        let model = &mut self.model[which];
        if end > model.len() as u64 {
            model.resize(end as usize, 0);
        }
    }

    fn fill_zero(&mut self, which: usize, at: u64, len: u64) {
        let model = &mut self.model[which];
        let size = model.len();
        model[size.min(at as usize)..size.min((at + len) as usize)].fill(0);
    }

    /// Commits or mounts anew.
    fn change_mount(&mut self) {
        match self.random.next(4) {
            0..=1 => {
                self.store.commit_as(self.mounted(), true);
            }
            2 => {
                self.files.clear();
                let mount = self.mount.take().unwrap();
                let id = mount.id;
                drop(mount);
                while self.store.engine.find_fork(&id.to_string()).unwrap().state != "unmounted" {
                    std::thread::yield_now();
                }
                let again = self.store.mount(id);
                self.enter(Some(again));
            }
            _ => {
                self.files.clear();
                let mount = self.mount.take().unwrap();
                self.store.commit(mount);
                self.enter(None);
            }
        }
    }

    fn compare_all(&self) {
        for which in 0..2 {
            let mut bytes = vec![0; 1 << 20];
            let model = &self.model[which];
            for (number, expected) in model.chunks(1 << 20).enumerate() {
                let at = (number << 20) as u64;
                let read = &mut bytes[..expected.len()];
                self.files[which].read_exact_at(read, at).unwrap();
                compare(read, expected, at);
            }
        }
    }
}

fn kept(keep: bool) -> FallocateFlags {
    if keep {
        FallocateFlags::KEEP_SIZE
    } else {
        FallocateFlags::empty()
    }
}

fn compare(read: &[u8], expected: &[u8], at: u64) {
    if let Some(wrong) = read.iter().zip(expected).position(|(a, b)| a != b) {
        let (read, expected) = (read[wrong], expected[wrong]);
        panic!("byte {} is {read}, not {expected}", at + wrong as u64);
    }
}

/// Tells at which call a plan failed.
struct Progress(Plan, usize, Call);

impl Drop for Progress {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{:?}: call {}: {:?}", self.0, self.1, self.2);
        }
    }
}

fn exercise(plan: Plan) {
    let mut exerciser = Exerciser::new(plan);
    let mut progress = Progress(plan, 0, Call::Sync);
    for number in 0..plan.calls {
        let which = (exerciser.random.next(4) == 0) as usize;
        let call = exerciser.call(which);
        (progress.1, progress.2) = (number, call);
        exerciser.run(which, call);
        if exerciser.random.next(plan.between) == 0 {
            exerciser.change_mount();
            if plan.limit < 1 << 24 || exerciser.random.next(20) == 0 {
                exerciser.compare_all();
            }
        }
    }
    exerciser.compare_all();
    exerciser.files.clear();
    let mount = exerciser.mount.take().unwrap();
    exerciser.store.commit(mount);
    exerciser.enter(None);
    exerciser.compare_all();
    exerciser.files.clear();
    drop(exerciser.mount.take());
    exerciser.store.check();
}

const SMALL: Plan = Plan {
    seed: 1,
    calls: 4000,
    limit: 400_000,
    base: 300_000,
    step: 60_000,
    between: 100,
};

#[test]
fn content_is_what_was_written_across_commits_and_mounts() {
    for seed in 1..=3 {
        exercise(Plan { seed, ..SMALL });
    }
}

#[test]
fn content_of_a_larger_file_is_what_was_written_across_commits_and_mounts() {
    exercise(Plan {
        seed: 4,
        calls: 2000,
        limit: 40 << 20,
        base: 32 << 20,
        step: 1 << 20,
        between: 200,
    });
}

/// The long form, for `scripts/conformance fsx`.
#[test]
#[ignore = "takes minutes"]
fn exerciser_long() {
    for seed in 101..=108 {
        println!("seed {seed}: {} calls on small files", 20_000);
        exercise(Plan {
            seed,
            calls: 20_000,
            ..SMALL
        });
    }
    let large = Plan {
        seed: 201,
        calls: 40_000,
        limit: 1100 << 20,
        base: 1 << 30,
        step: 256 << 10,
        between: 3000,
    };
    println!(
        "seed {}: {} calls on a file of 1 GiB",
        large.seed, large.calls
    );
    exercise(large);
}
