//! Power cuts: a store is copied as it lies on the disk while commits go on, what had not been synced is taken from the copy, and
//! the copy is opened like a store after a reboot.
//!
//! The model. After each write that is synced the lengths of the segments of the WAL are noted: so much of them outlives a cut. The
//! copy is made by another thread at a random moment, the WAL first (see `Store::copy_as_it_lies`). Then each segment is cut to a
//! random length between what was noted before the copy began and what it has, or what lies behind that is overwritten with zeros
//! or noise, as on a filesystem that had made the file longer and not written its blocks. Of forks nothing is synced: their files
//! are cut anywhere, and their records are of another boot. Spools that are kept are on the disk before the WAL names them. The other files of the database are left as they are: RocksDB syncs
//! them before the manifest names them, and ignores those that it does not name. One thread writes, so that nothing comes between
//! a sync and its note.

use std::fs;
use std::path::Path;

use super::model::Random;
use super::*;
use crate::store::{Step, Store, StoreOptions};

/// The segments of the WAL with the lengths that were synced.
type Synced = BTreeMap<String, u64>;

/// A store as it lay on the disk, with what is known of the moment.
struct Moment {
    dir: tempfile::TempDir,
    synced: Synced,
    /// Commits that had returned before the copy began, and that had begun before it was whole.
    returned: u64,
    begun: u64,
}

/// There are at least so many commits and so many copies.
const COMMITS: u64 = 40;
const COPIES: u64 = 12;
const FILES: u64 = 5;

/// What a version of that number has in the file that its commit wrote.
fn content(seed: u64, number: u64) -> Vec<u8> {
    let mut random = Random(seed ^ (number * 0x9e37_79b9) | 1);
    // Now and then more than goes into one batch.
    let most = [3_000, 200_000, 1_000_000, 12 << 20][[0, 1, 1, 2, 0, 3][random.below(6) as usize]];
    let len = most / 2 + random.below(most / 2);
    noise(len as usize, random.below(1 << 40) + 1)
}

fn wal(dir: &Path) -> Synced {
    let entries = fs::read_dir(dir.join("db")).unwrap();
    let files = entries.map(|entry| entry.unwrap());
    let segments = files.filter(|file| file.file_name().to_str().unwrap().ends_with(".log"));
    let len = |file: fs::DirEntry| {
        let len = file.metadata().ok()?.len();
        Some((file.file_name().into_string().unwrap(), len))
    };
    segments.filter_map(len).collect()
}

/// Ends what goes on beside a test's own work when that has ended, well or not.
pub(super) struct Until<'a>(pub(super) &'a AtomicBool);

impl Drop for Until<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Commits again and again, and cuts the power at random moments meanwhile.
fn commit_and_cut(seed: u64) {
    let mut bench = Bench::new();
    bench.threads = 1;
    bench.reopen();
    let engine = bench.engine().clone();
    let synced = Arc::new(Mutex::new(wal(engine.store.dir())));
    let (noted, path) = (synced.clone(), bench.path());
    engine.store.steps.meanwhile(move |step| {
        if step == Step::Synced {
            *noted.lock() = wal(&path);
        }
    });
    let (begun, returned) = (AtomicU64::new(0), AtomicU64::new(0));
    let over = AtomicBool::new(false);
    let examined = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let copier = scope.spawn(|| {
            let mut random = Random(seed);
            while !over.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_micros(random.below(30_000)));
                let dir = tempfile::tempdir().unwrap();
                let returned = returned.load(Ordering::Acquire);
                let synced = synced.lock().clone();
                engine.store.copy_as_it_lies(dir.path());
                let begun = begun.load(Ordering::Acquire);
                let moment = Moment {
                    dir,
                    synced,
                    returned,
                    begun,
                };
                cut(&moment, &mut random);
                examine(moment, seed);
                examined.fetch_add(1, Ordering::AcqRel);
            }
        });
        let writing = Until(&over);
        let mut id = bench.fork("v");
        let mut number = 0;
        let enough = || examined.load(Ordering::Acquire) >= COPIES || copier.is_finished();
        while number < COMMITS || !enough() {
            number += 1;
            let name = format!("f{}", number % FILES);
            let fs = bench.fs(id);
            if number > FILES {
                fs.unlink(ME, ROOT, name.as_bytes()).unwrap();
            }
            put(&fs, &name, &content(seed, number));
            begun.store(number, Ordering::Release);
            // The spools of those that end are kept.
            let keep = number % 3 > 0;
            assert_eq!(bench.commit(id, keep), Some(number));
            returned.store(number, Ordering::Release);
            if !keep {
                id = bench.fork("v");
            }
            if number % 7 == 0 {
                let garbage = bench.fork("garbage");
                put(&bench.fs(garbage), "f", &content(seed, number + 1));
                bench.commit(garbage, false);
                bench.engine().remove_volume("garbage", false).unwrap();
                bench.engine().gc(false).unwrap();
            }
        }
        drop(writing);
        copier.join().unwrap();
    });
    engine.store.steps.over();
}

/// Takes from a copy what the power cut took.
fn cut(moment: &Moment, random: &mut Random) {
    let dir = moment.dir.path();
    for (name, len) in wal(dir) {
        let least = moment.synced.get(&name).copied().unwrap_or(0).min(len);
        let keep = match random.below(3) {
            0 => least,
            _ => least + random.below(len - least + 1),
        };
        let path = dir.join("db").join(&name);
        let mut bytes = fs::read(&path).unwrap();
        let lost = (len - keep) as usize;
        bytes.truncate(keep as usize);
        match random.below(4) {
            0 => bytes.resize(len as usize, 0),
            1 => bytes.extend(noise(lost, random.below(1 << 40) + 1)),
            _ => {}
        }
        fs::write(&path, bytes).unwrap();
    }
    for fork in fs::read_dir(dir.join("forks")).unwrap() {
        for file in fs::read_dir(fork.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            let len = fs::metadata(&path).unwrap().len();
            let file = fs::File::options().write(true).open(&path).unwrap();
            file.set_len(random.below(len + 1)).unwrap();
        }
    }
    let store = Store::open(dir, StoreOptions::default()).unwrap();
    for mut fork in store.forks().unwrap() {
        fork.boot = "before the power cut".into();
        store.put_fork(&fork).unwrap();
    }
}

/// Opens what the power cut left.
fn examine(moment: Moment, seed: u64) {
    let place = moment.dir.path().file_name().unwrap().to_owned();
    let mut bench = Bench {
        dir: moment.dir,
        engine: None,
        table: EngineConfig::default().table,
        retention: Policy::new(None, Some(0)),
        place: ".".into(),
        threads: 1,
        bulk: LITTLE,
    };
    bench.reopen();
    check(&bench);
    let log = bench.engine().log("v").unwrap_or_default();
    let head = log.first().map_or(0, |version| version.number);
    let wanted = moment.returned..=moment.begun;
    assert!(wanted.contains(&head), "{place:?}: {head} of {wanted:?}");
    for version in log {
        for number in (1..=version.number).rev().take(FILES as usize) {
            let mut bytes = Vec::new();
            let path = format!("f{}", number % FILES);
            let version = format!("v@{}", version.number);
            let engine = bench.engine();
            engine.cat(&version, path.as_bytes(), &mut bytes).unwrap();
            assert!(bytes == content(seed, number), "{path} of {version}");
        }
    }
    for fork in bench.engine().forks().unwrap() {
        assert_eq!(fork.state, "lost");
        bench.engine().abandon(fork.id.parse().unwrap()).unwrap();
    }
    let id = bench.fork("v");
    put(&bench.fs(id), "after", b"the cut");
    assert_eq!(bench.commit(id, false), Some(head + 1));
    bench.engine().gc(false).unwrap();
    check(&bench);
    let left = bench.engine().gc(true).unwrap().garbage;
    assert_eq!((left.removed_nodes, left.removed_chunks), (0, 0));
}

/// > | `forkvol commit` returned | kept | kept: the version and the head are on disk |
/// > | `forkvol commit` was interrupted | the head is the old or the new version, never anything else | the same |
/// > Versions outlive it.
#[test]
fn a_power_cut_leaves_every_commit_that_returned_and_nothing_half_done() {
    let seed = u64::try_from(now()).unwrap() | 1;
    println!("seed {seed}");
    commit_and_cut(seed);
}
