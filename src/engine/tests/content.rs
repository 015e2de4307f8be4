//! Content of files, where calls meet in one page.

use super::model::Random;
use super::*;
use crate::fork::view;
use crate::fs::Allocate;
use crate::record::Value;
use crate::store::Step;

#[test]
fn a_range_zeroed_over_the_end_of_a_file_reads_as_zeros_up_to_its_new_end() {
    let bench = Bench::new();
    let fs = bench.fs(bench.fork("v"));
    let source = put(&fs, "source", &noise(8192, 1));
    let file = put(&fs, "file", b"");
    // The page is shared, so zeroing part of it takes new room, which held something else before.
    let gone = put(&fs, "gone", &noise(1 << 20, 2));
    fs.unlink(ME, ROOT, b"gone").unwrap();
    fs.forget(gone, 1);
    fs.copy_range(ME, (source, 0), (file, 0), 8192).unwrap();
    let size = |size| SetAttr {
        size: Some(size),
        ..SetAttr::default()
    };
    fs.setattr(ME, file, size(2268)).unwrap();
    let zero = Allocate::Zero { keep_size: false };
    fs.fallocate(ME, file, 1846, 24_576, zero).unwrap();
    let mut expected = noise(1846, 1);
    expected.resize(1846 + 24_576, 0);
    assert!(get(&fs, "file").unwrap() == expected);
}

#[test]
fn fallocate_by_another_user_takes_what_the_file_granted() {
    let bench = Bench::new();
    let fs = bench.fs(bench.fork("v"));
    for (number, mode) in [
        Allocate::Reserve { keep_size: false },
        Allocate::Reserve { keep_size: true },
        Allocate::Punch,
        Allocate::Zero { keep_size: true },
    ]
    .into_iter()
    .enumerate()
    {
        let file = put(&fs, &format!("file{number}"), b"program");
        let set = SetAttr {
            mode: Some(0o6777),
            mtime: Some(0),
            ..SetAttr::default()
        };
        fs.setattr(ME, file, set).unwrap();
        let capability = b"security.capability";
        fs.setxattr(ME, file, capability, b"all", XattrMode::Any)
            .unwrap();
        let nobody = Caller { uid: 65534, ..ME };
        fs.fallocate(nobody, file, 0, 3, mode).unwrap();
        let attr = fs.getattr(file).unwrap();
        assert_eq!(attr.mode, 0o777, "{mode:?}");
        assert!(attr.mtime > 0, "{mode:?}");
        assert!(fs.getxattr(file, capability).is_err(), "{mode:?}");
    }
}

#[test]
fn a_hole_of_the_version_at_the_end_of_a_file_stays_one_when_the_file_grows() {
    let bench = Bench::new();
    let id = bench.fork("v");
    let size = |size| SetAttr {
        size: Some(size),
        ..SetAttr::default()
    };
    let fs = bench.fs(id);
    let file = put(&fs, "file", b"");
    fs.setattr(ME, file, size(773)).unwrap();
    bench.commit(id, false);
    let fs = bench.fs(bench.fork("v"));
    let blocks = || fs.getattr(file).unwrap().blocks;
    fs.setattr(ME, file, size(2000)).unwrap();
    assert_eq!((blocks(), get(&fs, "file")), (0, Some(vec![0; 2000])));
    fs.write(ME, file, 1000, b"x", false).unwrap();
    assert_eq!(blocks(), 8);
    fs.fallocate(ME, file, 0, 4096, Allocate::Punch).unwrap();
    assert_eq!(blocks(), 0);
}

/// Ingests what a fork changed ahead of its commit, as soon as it has been quiet for long enough.
pub(super) fn ingest_ahead(bench: &Bench, id: ForkId) {
    let live = bench.engine().live(id).unwrap();
    let ingest = Arc::new(bench.engine().store.ingest());
    ingest_into(&live, &ingest);
    *live.ahead.lock() = Some(ingest);
}

fn ingest_into(live: &Live, ingest: &Arc<Ingest>) {
    let until = Instant::now() + Duration::from_secs(20);
    while crate::commit::ahead(live.fork().unwrap(), ingest, 10, &live.waiting).unwrap() == 0 {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn what_was_ingested_ahead_and_written_over_again_and_again_is_not_held_for_ever() {
    let bench = Bench::copying();
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let len = 20 << 20;
    let ino = put(&fs, "f", &codes(len, 1));
    let live = bench.engine().live(id).unwrap();
    let stored = || {
        bench.engine().gc(false).unwrap();
        bench.engine().stats().unwrap().stored_bytes
    };
    let mut most = 0;
    for round in 0..6 {
        live.drop_superseded();
        let ingest = live.ahead.lock().clone();
        let ingest = ingest.unwrap_or_else(|| Arc::new(bench.engine().store.ingest()));
        *live.ahead.lock() = Some(ingest.clone());
        ingest_into(&live, &ingest);
        drop(ingest);
        most = most.max(stored());
        for (n, part) in codes(len, 2 + round).chunks(1 << 20).enumerate() {
            fs.write(ME, ino, (n as u64) << 20, part, false).unwrap();
        }
    }
    assert!(most > 60 << 20, "nothing of it is written over: {most}");
    assert!(most < 90 << 20, "all of it is held: {most}");
    drop(fs);
    assert_eq!(bench.commit(id, false), Some(1));
    check(&bench);
    assert_eq!(get(&bench.fs(bench.fork("v")), "f"), Some(codes(len, 7)));
}

#[test]
fn what_is_ingested_ahead_is_progress_of_a_commit_when_that_takes_it_and_not_before() {
    let bench = Bench::new();
    let id = bench.fork("v");
    put(&bench.fs(id), "quiet", &noise(300_000, 3));
    let ingested = || {
        let fork = bench.engine().find_fork(&id.to_string());
        fork.unwrap().ingested
    };
    ingest_ahead(&bench, id);
    assert_eq!(ingested(), 0);
    put(&bench.fs(id), "new", &noise(50_000, 4));
    assert_eq!(bench.commit(id, true), Some(1));
    assert_eq!(ingested(), 350_000);
}

#[test]
fn what_was_ingested_ahead_of_one_commit_is_no_hint_for_the_next_whatever_gc_took() {
    let bench = Bench::new();
    let id = bench.fork("v");
    let fs = bench.fs(id);
    put(&fs, "f", &noise(1 << 20, 3));
    ingest_ahead(&bench, id);
    // So short that the commit makes one chunk of it.
    let file = fs.lookup(ROOT, b"f").unwrap().unwrap().ino;
    let short = SetAttr {
        size: Some(100_000),
        ..SetAttr::default()
    };
    fs.setattr(ME, file, short).unwrap();
    let (fork, during) = (fs.clone(), Arc::new(AtomicUsize::new(0)));
    let count = during.clone();
    bench.engine().store.steps.meanwhile(move |step| {
        if step == Step::Ingested {
            let mode = SetAttr {
                mode: Some(0o600),
                ..SetAttr::default()
            };
            fork.setattr(ME, file, mode).unwrap();
            count.fetch_add(1, Ordering::AcqRel);
        }
    });
    assert_eq!(bench.commit(id, true), Some(1));
    bench.engine().store.steps.over();
    assert_eq!(during.load(Ordering::Acquire), 1);
    bench.engine().gc(false).unwrap();
    let more = noise(300_000, 4);
    fs.write(ME, file, 100_000, &more, false).unwrap();
    drop(fs);
    assert_eq!(bench.commit(id, false), Some(2));
    check(&bench);
    let whole = [&noise(1 << 20, 3)[..100_000], &more].concat();
    assert_eq!(get(&bench.fs(bench.fork("v")), "f"), Some(whole));
}

#[test]
fn what_was_ingested_ahead_and_lost_is_ingested_again() {
    let bench = Bench::new();
    let id = bench.fork("v");
    put(&bench.fs(id), "large", &noise(12 << 20, 7));
    ingest_ahead(&bench, id);
    bench.engine().store.lose_what_is_not_flushed();
    assert_eq!(bench.commit(id, false), Some(1));
    check(&bench);
    assert_eq!(
        get(&bench.fs(bench.fork("v")), "large"),
        Some(noise(12 << 20, 7))
    );
}

#[test]
fn what_was_ingested_ahead_of_a_commit_that_failed_is_in_the_next_one() {
    for keep in [false, true] {
        let bench = Bench::new();
        let id = bench.fork("v");
        put(&bench.fs(id), "file", &noise(90_000, 7));
        ingest_ahead(&bench, id);
        bench.engine().store.steps.fill(true);
        bench.engine().commit(vec![id], request(keep)).unwrap_err();
        let live = bench.engine().live(id).unwrap();
        bench.engine().move_to_private_root(&live).unwrap_err();
        bench.engine().store.steps.fill(false);
        assert_eq!(bench.commit(id, keep), Some(1));
        check(&bench);
        let found = get(&bench.fs(bench.fork("v")), "file");
        assert!(found == Some(noise(90_000, 7)));
    }
}

#[test]
fn a_file_that_grows_is_ingested_meanwhile_and_only_the_rest_is_left_for_the_commit() {
    const GROWN: usize = 32 << 20;
    let bench = Bench::copying();
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let bytes = noise(2 * GROWN + 5000, 13);
    let live = bench.engine().live(id).unwrap();
    let ingest = Arc::new(bench.engine().store.ingest());
    let ahead = || crate::commit::ahead(live.fork().unwrap(), &ingest, 10, &live.waiting).unwrap();
    let file = put(&fs, "file", &bytes[..GROWN + 5]);
    assert_eq!(ahead(), 1);
    let first = ingest.new_bytes();
    assert!(first > GROWN as u64 * 99 / 100, "{first}");
    let append = |from: usize, to: usize| {
        let written = fs.write(ME, file, from as u64, &bytes[from..to], false);
        assert_eq!(written.unwrap(), to - from);
    };
    append(GROWN + 5, GROWN + 77_777);
    let quiet = fs.fork.age() + 1;
    if ahead() == 1 {
        assert!(
            fs.fork.age() > quiet,
            "it was ingested, and had hardly grown"
        );
    }
    append(GROWN + 77_777, bytes.len());
    assert_eq!(ahead(), 1);
    let rest = noise(3 * GROWN, 17);
    let other = put(&fs, "fast", &rest);
    if ahead() == 1 {
        assert!(
            fs.fork.age() > quiet,
            "it was ingested where all was written at once"
        );
    }
    fs.unlink(ME, ROOT, b"fast").unwrap();
    fs.forget(other, 1);
    let both = ingest.new_bytes();
    assert!(
        both < bytes.len() as u64 + (1 << 20),
        "its beginning was stored twice: {both}"
    );
    *live.ahead.lock() = Some(ingest.clone());
    let done = bench.engine().commit(vec![id], request(true)).unwrap();
    let brought = done[0].version.as_ref().unwrap().new_bytes;
    assert!(brought < both + 100_000, "{brought} {both}");
    let progress = bench.engine().find_fork(&id.to_string()).unwrap().ingested;
    assert_eq!(progress, bytes.len() as u64);
    assert!(get(&bench.fs(bench.fork("v")), "file") == Some(bytes));
    check(&bench);
}

#[test]
fn whatever_becomes_of_a_file_that_was_ingested_ahead_the_version_has_it_as_it_is_and_cut_as_ever()
{
    const FILES: usize = 40;
    let seed = u64::from(std::process::id()) | 1;
    eprintln!("seed {seed}");
    let mut random = Random(seed);
    let bench = Bench::new();
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let mut files: Vec<(Ino, Vec<u8>)> = (0..FILES)
        .map(|n| {
            let bytes = noise(1 + random.below(1_000_000) as usize, n as u64 + 1);
            (put(&fs, &format!("f{n}"), &bytes), bytes)
        })
        .collect();
    let live = bench.engine().live(id).unwrap();
    let ingest = Arc::new(bench.engine().store.ingest());
    let mut ingested = 0;
    for round in 0..3 {
        let until = fs.fork.age() + 3;
        while fs.fork.age() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        ingested += crate::commit::ahead(&fs.fork, &ingest, FILES, &live.waiting).unwrap();
        for (n, (ino, bytes)) in files.iter_mut().enumerate() {
            for _ in 0..random.below(3) {
                let len = bytes.len();
                let at = random.below(len as u64 + 1) as usize;
                match random.below(4) {
                    // Appended, overwritten, cut off, grown within its last page: a hole would be cut otherwise.
                    kind @ (0 | 1) => {
                        let at = if kind == 0 { len } else { at };
                        let new = noise(
                            1 + random.below(200_000) as usize,
                            1 + random.below(1 << 60),
                        );
                        fs.write(ME, *ino, at as u64, &new, false).unwrap();
                        bytes.resize(len.max(at + new.len()), 0);
                        bytes[at..at + new.len()].copy_from_slice(&new);
                    }
                    kind => {
                        let size = if kind == 2 {
                            at
                        } else {
                            len + random.below(9000) as usize
                                % (1 + len.next_multiple_of(4096) - len)
                        };
                        let set = SetAttr {
                            size: Some(size as u64),
                            ..SetAttr::default()
                        };
                        fs.setattr(ME, *ino, set).unwrap();
                        bytes.resize(size, 0);
                    }
                }
            }
            assert!(
                get(&fs, &format!("f{n}")).as_ref() == Some(bytes),
                "f{n}, round {round}"
            );
        }
    }
    assert!(ingested > FILES, "{ingested}");
    *live.ahead.lock() = Some(ingest);
    assert_eq!(bench.commit(id, false), Some(1));
    check(&bench);
    let fs = bench.fs(bench.fork("v"));
    for (n, (_, bytes)) in files.iter().enumerate() {
        assert!(get(&fs, &format!("f{n}")).as_ref() == Some(bytes), "f{n}");
    }
    // What is cut in one go, from the same bytes, is there already.
    let again = bench.fork("again");
    let fs = bench.fs(again);
    for (n, (_, bytes)) in files.iter().enumerate() {
        put(&fs, &format!("f{n}"), bytes);
    }
    let done = bench.engine().commit(vec![again], request(false)).unwrap();
    let brought = done[0].version.as_ref().unwrap().new_bytes;
    assert!(brought < 200_000, "{brought} bytes were cut otherwise");
}

/// The content values of the file `f` in the newest version.
fn values_of(bench: &Bench, volume: &str) -> Vec<(u64, Value)> {
    let fs = bench.fs(bench.fork(volume));
    let ino = fs.lookup(ROOT, b"f").unwrap().unwrap().ino;
    view::base_content(&fs.fork.store, fs.fork.root().id, ino, 0, 1 << 40).unwrap()
}

#[test]
fn a_long_file_is_cut_alike_by_one_thread_and_by_many() {
    let all = noise(24 << 20, 11);
    // Most of it is cut by length alone, and not in step with the segments of threads.
    let mut little = vec![0; 24 << 20];
    little[..700_000].copy_from_slice(&noise(700_000, 12));
    little[20 << 20..][..50_000].copy_from_slice(&noise(50_000, 13));
    for (bytes, least) in [(all, 24 << 20), (little, 750_000)] {
        let mut bench = Bench::new();
        let mut cut: Vec<Vec<Vec<(u64, Value)>>> = Vec::new();
        let mut brought = Vec::new();
        for (threads, volume) in [(1, "one"), (4, "many"), (3, "three")] {
            bench.threads = threads;
            bench.reopen();
            let mut seen = Vec::new();
            let mut committed = |change: &dyn Fn(&Fs, Ino)| {
                let id = bench.fork(volume);
                let fs = bench.fs(id);
                let ino = match fs.lookup(ROOT, b"f").unwrap() {
                    Some(entry) => entry.ino,
                    None => put(&fs, "f", b""),
                };
                change(&fs, ino);
                drop(fs);
                let done = bench.engine().commit(vec![id], request(false)).unwrap();
                seen.push(values_of(&bench, volume));
                done[0].version.as_ref().unwrap().new_bytes
            };
            let write = |fs: &Fs, ino: Ino, at: u64, bytes: &[u8]| {
                for (n, part) in bytes.chunks(1 << 20).enumerate() {
                    let at = at + (n << 20) as u64;
                    fs.write(ME, ino, at, part, false).unwrap();
                }
            };
            brought.push(committed(&|fs, ino| write(fs, ino, 0, &bytes)));
            let found = get(&bench.fs(bench.fork(volume)), "f");
            assert!(found.as_ref() == Some(&bytes));
            committed(&|fs, ino| {
                for at in [5_000_000, 12 << 20, 20_000_000] {
                    write(fs, ino, at, &noise(10_000, at));
                }
            });
            let resize = |fs: &Fs, ino: Ino, size: u64| {
                let size = SetAttr {
                    size: Some(size),
                    ..SetAttr::default()
                };
                fs.setattr(ME, ino, size).unwrap();
            };
            // A hole, and behind it nothing is where it was before.
            committed(&|fs, ino| {
                resize(fs, ino, 9 << 20);
                write(fs, ino, 10 << 20, &bytes[1_000_000..]);
            });
            committed(&|fs, ino| {
                resize(fs, ino, 0);
                write(fs, ino, 0, &bytes[123_456..]);
            });
            cut.push(seen);
        }
        assert!(brought[0] > least, "{brought:?}");
        assert!(brought[1..].iter().all(|n| *n < 100_000), "{brought:?}");
        assert!(cut[0].iter().all(|values| values.len() > 90));
        assert!(cut[1..].iter().all(|seen| *seen == cut[0]));
        check(&bench);
    }
}

/// > | a name | 255 bytes | ENAMETOOLONG |
/// > | target of a symbolic link | 4,095 bytes | ENAMETOOLONG |
/// > | a file | 8 EiB less a page | EFBIG |
/// > | an extended attribute | 64 KiB | E2BIG |
/// > | all names of extended attributes of an inode | 64 KiB | ENOSPC |
#[test]
fn what_is_beyond_a_limit_of_the_manual_is_refused() {
    let bench = Bench::new();
    let fs = bench.fs(bench.fork("v"));
    let file = put(&fs, "file", b"1");
    let make = |name: &[u8], target: usize| {
        let target = vec![b't'; target];
        let new = NewNode {
            target: &target,
            ..NewNode::new(Kind::Symlink, 0o777)
        };
        fs.make(ME, ROOT, name, new).map(|entry| entry.ino)
    };
    let longest = make(&[b'n'; 255], 4095).unwrap();
    assert_eq!(fs.readlink(longest).unwrap().len(), 4095);
    let long = make(&[b'n'; 256], 1);
    assert!(matches!(long, Err(FsError::NameTooLong)));
    assert!(matches!(make(b"n", 4096), Err(FsError::NameTooLong)));

    let size = |size| SetAttr {
        size: Some(size),
        ..SetAttr::default()
    };
    let most = crate::fs::SIZE_MAX;
    fs.setattr(ME, file, size(most)).unwrap();
    let beyond = fs.setattr(ME, file, size(most + 1));
    assert!(matches!(beyond, Err(FsError::TooLarge)));
    let beyond = fs.append(ME, file, b"1", false);
    assert!(matches!(beyond, Err(FsError::TooLarge)));

    let set = |name: &str, len: usize| {
        let value = vec![1; len];
        fs.setxattr(ME, file, name.as_bytes(), &value, XattrMode::Any)
    };
    for prefix in ["user.", "trusted.", "security."] {
        assert!(matches!(set(prefix, 1), Err(FsError::Invalid)), "{prefix}");
    }
    set("user.largest", 65_536).unwrap();
    let large = set("user.larger", 65_537);
    assert!(matches!(large, Err(FsError::AttributeTooLarge)));
    fs.removexattr(ME, file, b"user.largest").unwrap();
    // 256 names of 255 bytes and a NUL are 64 KiB.
    for number in 0..256 {
        set(&format!("user.{number:0250}"), 1).unwrap();
    }
    assert!(matches!(set("user.one", 1), Err(FsError::NoSpace)));
    assert_eq!(fs.listxattr(ME, file).unwrap().len(), 65_536);
}

/// > Reading changes no access time, so that reading makes no version.
#[test]
fn reading_makes_no_version() {
    let bench = Bench::new();
    let first = bench.fork("v");
    put(&bench.fs(first), "file", &noise(100_000, 1));
    bench.commit(first, false);
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let ino = fs.lookup(ROOT, b"file").unwrap().unwrap().ino;
    let before = fs.getattr(ino).unwrap();
    assert_eq!(fs.read(ino, 0, 100_000).unwrap().len(), 100_000);
    fs.readdir(ROOT, 0, |_| true).unwrap();
    assert_eq!(fs.getattr(ino).unwrap(), before);
    assert_eq!(fs.fork.delta_size().changed, 0);
    assert_eq!(bench.commit(id, false), None);
}

#[test]
fn what_goes_while_its_fork_is_looked_into_is_charged_no_more_and_keeps_its_attributes_till_then() {
    let bench = Bench::new();
    let fs = bench.fs(bench.fork("v"));
    let before = fs.fork.charged();
    let inos = ["gone", "open"].map(|name| put(&fs, name, &noise(10_000, 1)));
    fs.setxattr(ME, inos[1], b"user.a", b"1", XattrMode::Any)
        .unwrap();
    fs.forget(inos[0], 1);
    let looked = crate::commit::prepare(&fs.fork, true, 1).unwrap();
    for name in ["gone", "open"] {
        fs.unlink(ME, ROOT, name.as_bytes()).unwrap();
    }
    looked.thaw();
    assert_eq!(fs.getxattr(inos[1], b"user.a").unwrap(), b"1");
    assert_eq!(fs.read(inos[1], 0, 20_000).unwrap(), noise(10_000, 1));
    assert!(fs.fork.charged() > before);
    fs.forget(inos[1], 1);
    assert_eq!(fs.fork.charged(), before);
}

/// > | links of an inode | 1,048,576 | EMLINK |
#[test]
fn an_inode_takes_as_many_links_as_the_manual_says_and_no_more() {
    use crate::fs::LINK_MAX;
    assert_eq!(LINK_MAX, 1_048_576);
    let bench = Bench::new();
    let fs = bench.fs(bench.fork("v"));
    let file = put(&fs, "file", b"1");
    // So many are too slow to make one by one.
    let cell = fs.fork.cell(file).unwrap().unwrap();
    cell.state.write().attr.nlink = LINK_MAX - 1;
    let last = fs.link(ME, file, ROOT, b"last").unwrap();
    assert_eq!(last.attr.nlink, LINK_MAX);
    let more = fs.link(ME, file, ROOT, b"more");
    assert!(matches!(more, Err(FsError::TooManyLinks)));
    // Each folder links to the one that it is in.
    let folder = || fs.make(ME, ROOT, b"folder", NewNode::new(Kind::Directory, 0o755));
    let root = fs.fork.cell(ROOT).unwrap().unwrap();
    root.state.write().attr.nlink = LINK_MAX;
    assert!(matches!(folder(), Err(FsError::TooManyLinks)));
    root.state.write().attr.nlink -= 1;
    folder().unwrap();
}

/// > 128 names of one directory may share a hash; one more gives ENOSPC.
#[test]
fn so_many_names_of_one_hash_fit_in_a_folder_as_the_manual_says_and_no_more() {
    let bench = Bench::new();
    let fs = bench.fs(bench.fork("v"));
    let file = put(&fs, "file", b"1");
    // Nobody knows two names of one hash, so the entries are given that of the name to come.
    let hash = crate::record::hash56(b"new");
    let enter = |names: std::ops::Range<u32>| {
        let mut tx = fs.fork.begin().unwrap();
        tx.lock(&[ROOT, file]).unwrap();
        for n in names {
            let name = format!("collides {n}");
            tx.set_entry(ROOT, hash, name.as_bytes(), Some((file, Kind::File)));
        }
        tx.finish(ME.request).unwrap();
    };
    enter(0..127);
    put(&fs, "new", b"the 128th");
    fs.unlink(ME, ROOT, b"new").unwrap();
    enter(127..128);
    let node = NewNode::new(Kind::File, 0o644);
    let full = fs.make(ME, ROOT, b"new", node);
    assert!(matches!(full, Err(FsError::NoSpace)));
    assert_eq!(get(&fs, "file"), Some(b"1".to_vec()));
    fs.make(ME, ROOT, b"of another hash", node).unwrap();
}

/// > A listing is in the order of hashes of names. They have 56 bits, so 32-bit programs without large-file support cannot list a
/// > directory.
#[test]
fn a_listing_is_in_the_order_of_hashes_that_32_bits_cannot_hold() {
    let bench = Bench::new();
    let fs = bench.fs(bench.fork("v"));
    for n in 0..100 {
        put(&fs, &format!("file {n}"), b"");
    }
    let mut listed = Vec::new();
    fs.readdir(ROOT, 2, |entry| {
        listed.push((crate::record::hash56(&entry.name), entry.cookie));
        true
    })
    .unwrap();
    assert_eq!(listed.len(), 100);
    assert!(listed.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1));
    let large = listed
        .iter()
        .filter(|(_, cookie)| *cookie > u64::from(u32::MAX));
    assert!(large.count() > 90, "{listed:?}");
}

/// > A fork is charged the data that its base did not give it, in 4 KiB units, once however many files share it, and 512 bytes a
/// > created inode. Deleting what the base brought gives no room back; deleting its own data does.
#[test]
fn a_fork_is_charged_its_own_pages_once_and_its_inodes() {
    let bench = Bench::new();
    let first = bench.fork("v");
    put(&bench.fs(first), "base", &noise(100_000, 1));
    put(&bench.fs(first), "other", &noise(100_000, 2));
    bench.commit(first, false);
    let fs = bench.fs(bench.fork("v"));
    let charged = || fs.fork.charged();
    assert_eq!(charged(), 0);
    let base = fs.lookup(ROOT, b"base").unwrap().unwrap().ino;
    let one = put(&fs, "one", b"1");
    assert_eq!(charged(), 4096 + 512);
    fs.write(ME, base, 8191, b"22", false).unwrap();
    assert_eq!(charged(), 3 * 4096 + 512, "two pages");
    let copy = put(&fs, "copy", b"");
    assert_eq!(
        fs.copy_range(ME, (base, 0), (copy, 0), 65_536).unwrap(),
        65_536
    );
    assert_eq!(
        charged(),
        3 * 4096 + 2 * 512,
        "shared with the base, and with the fork's own"
    );
    fs.link(ME, one, ROOT, b"again").unwrap();
    fs.setattr(
        ME,
        one,
        SetAttr {
            mode: Some(0o600),
            ..SetAttr::default()
        },
    )
    .unwrap();
    assert_eq!(charged(), 3 * 4096 + 2 * 512);
    let full = charged();
    fs.unlink(ME, ROOT, b"other").unwrap();
    assert_eq!(charged(), full, "that was the base's");
    fs.unlink(ME, ROOT, b"copy").unwrap();
    fs.forget(copy, 1);
    assert_eq!(charged(), full - 512, "its data is the other's too");
    for name in [&b"one"[..], b"again"] {
        fs.unlink(ME, ROOT, name).unwrap();
    }
    fs.forget(one, 2);
    assert_eq!(charged(), 2 * 4096);
}

/// Takes all the room that a fork has left, in whole pages.
fn fill(fs: &Fs, name: &str) -> Ino {
    let file = put(fs, name, b"");
    let mut at = 0;
    while fs.write(ME, file, at, &[9; 4096], false).is_ok() {
        at += 4096;
    }
    assert_eq!(fs.statfs().free, 0);
    file
}

#[test]
fn a_write_that_runs_out_of_room_says_how_much_it_wrote_and_changes_nothing_where_that_is_nothing()
{
    let bench = Bench::new();
    let id = bench.fork_sized("v", 1 << 20);
    let fs = bench.fs(id);
    let file = put(&fs, "file", &noise(8192, 1));
    let end = put(&fs, "end", &noise(4000, 2));
    let old = SetAttr {
        mtime: Some(5),
        ..SetAttr::default()
    };
    let size = SetAttr {
        size: Some(20_000),
        ..SetAttr::default()
    };
    fs.setattr(ME, file, size).unwrap();
    let full = fill(&fs, "full");
    let mut expected = noise(8192, 1);
    expected.resize(20_000, 0);

    fs.setattr(ME, file, old).unwrap();
    assert_eq!(fs.write(ME, file, 5000, &[7; 9000], false).unwrap(), 3192);
    expected[5000..8192].fill(7);
    let attr = fs.getattr(file).unwrap();
    assert!(attr.mtime > 5);
    assert_eq!((attr.size, attr.blocks), (20_000, 16));
    assert!(get(&fs, "file").unwrap() == expected);
    let copied = fs.copy_range(ME, (full, 1), (file, 4096), 8192).unwrap();
    assert_eq!(copied, 4096);
    expected[4096..8192].fill(9);
    assert!(get(&fs, "file").unwrap() == expected);

    let before = fs.setattr(ME, file, old).unwrap();
    let error = fs.write(ME, file, 8192, &[7; 9000], false).unwrap_err();
    assert!(matches!(error, FsError::NoSpace));
    assert_eq!(fs.getattr(file).unwrap(), before);
    assert!(get(&fs, "file").unwrap() == expected);

    assert_eq!(fs.append(ME, end, &[7; 200], false).unwrap(), 96);
    let attr = fs.getattr(end).unwrap();
    assert_eq!((attr.size, attr.blocks), (4096, 8));
    assert_eq!(get(&fs, "end").unwrap()[4000..], [7; 96]);
    drop(fs);
    bench.commit(id, false);
    check(&bench);
    assert!(get(&bench.fs(bench.fork("v")), "file").unwrap() == expected);
}

#[test]
fn room_is_reserved_for_every_kind_of_hole() {
    const SIZE: u64 = 40_960;
    let bench = Bench::new();
    let id = bench.fork("v");
    let size = SetAttr {
        size: Some(SIZE),
        ..SetAttr::default()
    };
    let fs = bench.fs(id);
    for name in ["of the base", "of the base too"] {
        let file = put(&fs, name, b"data");
        fs.setattr(ME, file, size).unwrap();
    }
    drop(fs);
    bench.commit(id, false);

    let fs = bench.fs(bench.fork_sized("v", 1 << 20));
    let ino = |name: &str| fs.lookup(ROOT, name.as_bytes()).unwrap().unwrap().ino;
    let punched = put(&fs, "punched", &noise(SIZE as usize, 3));
    fs.fallocate(ME, punched, 4096, SIZE - 4096, Allocate::Punch)
        .unwrap();
    let new = put(&fs, "new", b"data");
    fs.setattr(ME, new, size).unwrap();
    let copies = [
        ("copy", new),
        ("copy of the base's", ino("of the base too")),
    ];
    for (name, source) in copies {
        let copy = put(&fs, name, b"");
        assert_eq!(
            fs.copy_range(ME, (source, 0), (copy, 0), SIZE).unwrap(),
            SIZE
        );
    }
    let names = [
        "of the base",
        "punched",
        "new",
        "copy",
        "copy of the base's",
    ];
    for name in names {
        let before = fs.statfs().free;
        for _ in 0..2 {
            let reserve = Allocate::Reserve { keep_size: false };
            fs.fallocate(ME, ino(name), 0, SIZE, reserve).unwrap();
            assert_eq!(before - fs.statfs().free, 9, "{name}");
        }
    }
    fill(&fs, "full");
    let bytes = noise(SIZE as usize - 4096, 4);
    for name in names {
        let written = fs.write(ME, ino(name), 4096, &bytes, false);
        assert_eq!(written.unwrap(), bytes.len(), "{name}");
        assert!(get(&fs, name).unwrap()[4096..] == bytes, "{name}");
        assert_eq!(fs.getattr(ino(name)).unwrap().blocks, 80, "{name}");
    }
}
