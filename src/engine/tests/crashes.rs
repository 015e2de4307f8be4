//! Ends and races of one fork that once went wrong in filesystems like this one: what was acknowledged is there, byte by byte.

use std::sync::atomic::AtomicU32;

use super::faults::{bench_on, fork_of, kill, some_of};
use super::model::Random;
use super::power::Until;
use super::*;
use crate::fs::Allocate;
use crate::store::Step;

/// Writes over and over into a few ranges that overlap, as long as it is let; returns the bytes of the file as acknowledged.
fn rewrite(fs: &Fs, ino: Ino, mut bytes: Vec<u8>, seed: u64, over: &AtomicBool) -> Vec<u8> {
    let mut random = Random(seed);
    while !over.load(Ordering::Acquire) {
        let at = [0, 3_000, 4_096, 130_000][random.below(4) as usize];
        let data = noise(
            1 + random.below(9_000) as usize,
            seed + random.below(1 << 30),
        );
        fs.write(ME, ino, at as u64, &data, false).unwrap();
        bytes[at..at + data.len()].copy_from_slice(&data);
    }
    bytes
}

#[test]
fn a_commit_with_keep_cut_off_at_any_step_amid_rewrites_of_the_same_ranges_loses_no_byte() {
    let mut made = Bench::new();
    let id = made.fork("v");
    let base = noise(300_000, 1);
    put(&made.fs(id), "f", &base);
    made.commit(id, true);
    made.close();
    let template = made.path();
    let plain = bench_on(&template, &made.retention);
    let fs = plain.fs(id);
    let ino = fs.lookup(ROOT, b"f").unwrap().unwrap().ino;
    fs.write(ME, ino, 0, b"changed", false).unwrap();
    plain.engine().store.steps.watch();
    plain.commit(id, true);
    let reached = plain.engine().store.steps.seen();
    drop((fs, plain));

    let mut seed = u64::from(std::process::id()) | 1;
    let mut versions = std::collections::BTreeSet::new();
    for (step, count) in reached {
        let mut cuts = 0;
        for nth in some_of(count, &mut seed) {
            println!("cut off at {step:?}, {nth} of {count}, seed {seed}");
            let mut bench = bench_on(&template, &made.retention);
            let fs = bench.fs(id);
            fs.write(ME, ino, 0, b"changed", false).unwrap();
            let mut bytes = base.clone();
            bytes[..7].copy_from_slice(b"changed");
            bench.engine().store.steps.cut(step, nth);
            let over = AtomicBool::new(false);
            let bytes = std::thread::scope(|scope| {
                let writer = scope.spawn(|| rewrite(&fs, ino, bytes, seed, &over));
                let result = bench.engine().commit(vec![id], request(true));
                cuts += usize::from(bench.engine().store.steps.is_dead());
                assert!(result.is_ok() || bench.engine().store.steps.is_dead());
                // The fork takes writes whether its commit was done or not.
                std::thread::sleep(Duration::from_millis(5));
                over.store(true, Ordering::Release);
                writer.join().unwrap()
            });
            drop(fs);
            kill(&mut bench);
            assert!(
                get(&bench.fs(id), "f").unwrap() == bytes,
                "after the replay"
            );
            versions.insert(bench.engine().volume("v").unwrap().head);
            check(&bench);
            // What goes on from there is as sound.
            bench
                .fs(id)
                .write(ME, ino, 130_500, b"later", false)
                .unwrap();
            let mut later = bytes;
            later[130_500..130_505].copy_from_slice(b"later");
            bench.commit(id, false).unwrap();
            assert_eq!(fork_of(&bench, "v"), None);
            assert!(get(&bench.fs(bench.fork("v")), "f").unwrap() == later);
            check(&bench);
        }
        assert!(cuts > 0, "{step:?} was never reached");
    }
    assert_eq!(
        versions.into_iter().collect::<Vec<_>>(),
        [Some(1), Some(2)],
        "some cuts lie before the publish and some behind it"
    );
}

#[test]
fn what_is_written_after_a_commit_with_keep_that_failed_is_there_whether_it_was_published_or_not() {
    for (step, head) in [
        (Step::Sealed, 1),
        (Step::Publishing, 1),
        (Step::Written, 2),
        (Step::Synced, 2),
    ] {
        let mut bench = Bench::new();
        let id = bench.fork("v");
        let fs = bench.fs(id);
        let changed = put(&fs, "changed", &noise(300_000, 1));
        let gone = put(&fs, "gone", &noise(200_000, 4));
        bench.commit(id, true);
        let mut bytes = [noise(300_000, 1), noise(100_000, 2), noise(200_000, 4)];
        let copy_whole = |from, to| {
            let mut done = 0;
            while done < 200_000 {
                let (from, to) = ((from, done), (to, done));
                done += fs.copy_range(ME, from, to, 200_000 - done).unwrap();
            }
        };
        let copied = put(&fs, "copied", b"");
        copy_whole(gone, copied);
        fs.unlink(ME, ROOT, b"gone").unwrap();
        fs.forget(gone, 1);
        let write = |ino, bytes: &mut Vec<u8>, at: usize, data: &[u8]| {
            fs.write(ME, ino, at as u64, data, false).unwrap();
            bytes[at..at + data.len()].copy_from_slice(data);
        };
        write(changed, &mut bytes[0], 100_000, &noise(20_000, 3));
        let new = put(&fs, "new", &bytes[1]);
        bench.engine().store.steps.cut(step, 1);
        let failed = bench.engine().commit(vec![id], request(true));
        assert!(failed.is_err(), "{step:?}");
        // Over what the fork had changed before the commit.
        write(changed, &mut bytes[0], 104_000, b"in place");
        write(new, &mut bytes[1], 50_000, b"and here");
        fs.fallocate(ME, new, 8_192, 8_192, Allocate::Punch)
            .unwrap();
        bytes[1][8_192..16_384].fill(0);
        for size in [90_000, 100_000] {
            let size = Some(size);
            let to = SetAttr {
                size,
                ..SetAttr::default()
            };
            fs.setattr(ME, new, to).unwrap();
        }
        bytes[1][90_000..].fill(0);
        // Of pages that only the old root has by this name.
        copy_whole(copied, put(&fs, "copied-again", b""));
        drop(fs);
        kill(&mut bench);
        assert_eq!(bench.engine().volume("v").unwrap().head, Some(head));
        for committed in [false, true] {
            let id = match committed {
                false => id,
                true => bench.fork("v"),
            };
            let fs = bench.fs(id);
            for (name, bytes) in ["changed", "new", "copied"].iter().zip(&bytes) {
                assert!(get(&fs, name).unwrap() == *bytes, "{name} after {step:?}");
            }
            assert!(get(&fs, "copied-again").unwrap() == bytes[2], "{step:?}");
            drop(fs);
            if !committed {
                bench.commit(id, false).unwrap();
            }
        }
        check(&bench);
    }
}

#[test]
fn ingest_ahead_of_a_commit_never_takes_what_a_writer_has_written_over() {
    const FILES: usize = 4;
    const LEN: usize = 90_000;
    let mut bench = Bench::new();
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let stamp =
        |file: usize, round: u32| ((file as u32) << 24 | round).to_le_bytes().repeat(LEN / 4);
    let inos: Vec<Ino> = (0..FILES)
        .map(|n| put(&fs, &format!("f{n}"), &stamp(n, 0)))
        .collect();
    // Files count as quiet from some age of the fork on.
    while fs.fork.age() < 5 {
        std::thread::sleep(Duration::from_millis(50));
    }
    let live = bench.engine().live(id).unwrap();
    let rounds: Vec<AtomicU32> = (0..FILES).map(|_| AtomicU32::new(0)).collect();
    let (over, taken) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for file in 0..FILES {
            let (fs, over, inos, rounds) = (&fs, &over, &inos, &rounds);
            scope.spawn(move || {
                for round in 1.. {
                    fs.write(ME, inos[file], 0, &stamp(file, round), false)
                        .unwrap();
                    rounds[file].store(round, Ordering::Release);
                    if over.load(Ordering::Acquire) {
                        return;
                    }
                    std::thread::sleep(Duration::from_micros(300));
                }
            });
        }
        scope.spawn(|| {
            let fork = live.fork().unwrap();
            while !over.load(Ordering::Acquire) {
                let _one = live.alone();
                let mut ahead = live.ahead.lock();
                let ingest = ahead
                    .get_or_insert_with(|| Arc::new(bench.engine().store.ingest()))
                    .clone();
                drop(ahead);
                for cell in fork.layers().live.inodes.values() {
                    cell.state.write().written = 0;
                }
                let idle = AtomicUsize::new(0);
                let done = crate::commit::ahead(fork, &ingest, FILES, &idle).unwrap();
                taken.fetch_add(done, Ordering::AcqRel);
            }
        });
        let writing = Until(&over);
        let mut versions = 0;
        while versions < 40 || taken.load(Ordering::Acquire) < 200 {
            let least: Vec<u32> = rounds.iter().map(|r| r.load(Ordering::Acquire)).collect();
            // Between two commits nobody may have had the time to write.
            let Some(number) = bench.commit(id, true) else {
                continue;
            };
            let most: Vec<u32> = rounds.iter().map(|r| r.load(Ordering::Acquire)).collect();
            versions += 1;
            for file in 0..FILES {
                let mut out = Vec::new();
                let (version, name) = (format!("v@{number}"), format!("f{file}"));
                bench
                    .engine()
                    .cat(&version, name.as_bytes(), &mut out)
                    .unwrap();
                let word = u32::from_le_bytes(out[..4].try_into().unwrap());
                let round = word & 0xff_ffff;
                assert!(out == stamp(file, round), "{version}:{name} is torn");
                assert!(
                    (least[file]..=most[file] + 1).contains(&round),
                    "{version}:{name} is of round {round}"
                );
            }
        }
        drop(writing);
    });
    drop((fs, live));
    bench.reopen();
    let fs = bench.fs(id);
    for (file, round) in rounds.iter().enumerate() {
        let round = round.load(Ordering::Acquire);
        assert!(get(&fs, &format!("f{file}")).unwrap() == stamp(file, round));
    }
    check(&bench);
}

#[test]
fn a_read_that_meets_a_truncation_never_shows_what_took_the_room() {
    const LEN: usize = 64 << 10;
    let bench = Bench::new();
    let fs = bench.fs(bench.fork("v"));
    let (mine, other) = (put(&fs, "mine", b""), put(&fs, "other", b""));
    let over = AtomicBool::new(false);
    let empty = SetAttr {
        size: Some(0),
        ..SetAttr::default()
    };
    std::thread::scope(|scope| {
        // The room that one of them gives up is what the other takes next.
        scope.spawn(|| {
            for _ in 0..3_000 {
                fs.write(ME, mine, 0, &[b'm'; LEN], false).unwrap();
                fs.setattr(ME, mine, empty).unwrap();
                fs.write(ME, other, 0, &[b'o'; LEN], false).unwrap();
                fs.setattr(ME, other, empty).unwrap();
            }
            over.store(true, Ordering::Release);
        });
        for (ino, letter) in [(mine, b'm'), (other, b'o')] {
            let (fs, over) = (&fs, &over);
            scope.spawn(move || {
                while !over.load(Ordering::Acquire) {
                    let bytes = fs.read(ino, 0, LEN).unwrap();
                    let strange = bytes.iter().find(|byte| **byte != letter);
                    assert_eq!(strange, None, "in {} bytes", bytes.len());
                }
            });
        }
    });
}

/// The inode of a name that is there.
fn at(fs: &Fs, name: &str) -> Ino {
    fs.lookup(ROOT, name.as_bytes()).unwrap().unwrap().ino
}

/// A request, as a fork gets it.
type Act = Box<dyn Fn(&Fs)>;

/// Everything that a fork shows of every inode, and what it is charged.
fn all(fs: &Fs) -> String {
    let mut out = format!(
        "{} {:?} {:?}\n",
        fs.fork.charged(),
        fs.fork.holds(),
        fs.statfs()
    );
    let mut folders = vec![ROOT];
    while let Some(dir) = folders.pop() {
        let mut entries = Vec::new();
        fs.readdir(dir, 0, |entry| {
            entries.push((entry.name.to_vec(), entry.ino, entry.kind));
            true
        })
        .unwrap();
        for (name, ino, kind) in entries {
            let attr = fs.getattr(ino).unwrap();
            let content = match kind {
                Kind::File => {
                    blake3::hash(&fs.read(ino, 0, attr.size as usize).unwrap()).to_string()
                }
                Kind::Symlink => format!("{:?}", fs.readlink(ino).unwrap()),
                _ => String::new(),
            };
            let xattrs: Vec<_> = fs.listxattr(ME, ino).unwrap();
            let name = String::from_utf8(name).unwrap();
            out += &format!("{dir:?} {name} {ino:?} {attr:?} {content} {xattrs:?}\n");
            if kind == Kind::Directory && name != "." && name != ".." {
                folders.push(ino);
            }
        }
    }
    out
}

/// > | `write(2)` returned, or any other change | kept: it is in the fork's log and spool | gone with the fork |
#[test]
fn a_restart_between_any_two_requests_changes_nothing_that_a_fork_shows_or_is_charged() {
    let set = SetAttr::default();
    let set = &set;
    let fallocate = |name: &'static str, from: u64, len: u64, mode: Allocate| {
        move |fs: &Fs| fs.fallocate(ME, at(fs, name), from, len, mode).unwrap()
    };
    let change = |name: &'static str, to: SetAttr| {
        move |fs: &Fs| {
            fs.setattr(ME, at(fs, name), to).unwrap();
        }
    };
    let make = |name: &'static str, kind: Kind, target: &'static [u8]| {
        move |fs: &Fs| {
            let node = NewNode {
                target,
                rdev: if kind == Kind::CharDevice { 0x103 } else { 0 },
                ..NewNode::new(kind, 0o640)
            };
            fs.make(ME, ROOT, name.as_bytes(), node).unwrap();
        }
    };
    let rename = |from: &'static str, to: &'static str, mode: RenameMode| {
        move |fs: &Fs| {
            fs.rename(ME, (ROOT, from.as_bytes()), (ROOT, to.as_bytes()), mode)
                .unwrap();
        }
    };
    let write = |name: &'static str, from: u64, len: usize| {
        move |fs: &Fs| {
            assert_eq!(
                fs.write(ME, at(fs, name), from, &noise(len, from + 1), false)
                    .unwrap(),
                len
            );
        }
    };
    let requests: Vec<(&str, Act)> = vec![
        (
            "write over the base",
            Box::new(write("base", 70_001, 9_000)),
        ),
        ("write behind the end", Box::new(write("base", 300_000, 5))),
        ("mknod of a file", Box::new(make("new", Kind::File, b""))),
        ("write of a new file", Box::new(write("new", 0, 50_000))),
        ("write in place", Box::new(write("new", 4_096, 4_096))),
        (
            "append",
            Box::new(|fs| assert_eq!(fs.append(ME, at(fs, "new"), b"more", false).unwrap(), 4)),
        ),
        ("mkdir", Box::new(make("dir", Kind::Directory, b""))),
        (
            "symlink",
            Box::new(make("symlink", Kind::Symlink, b"some/where")),
        ),
        (
            "symlink of long",
            Box::new(make("long", Kind::Symlink, &[b'x'; 3_000])),
        ),
        ("mknod of a pipe", Box::new(make("pipe", Kind::Fifo, b""))),
        (
            "mknod of a device",
            Box::new(make("device", Kind::CharDevice, b"")),
        ),
        (
            "link",
            Box::new(|fs| {
                fs.link(ME, at(fs, "new"), at(fs, "dir"), b"linked")
                    .unwrap();
            }),
        ),
        (
            "rename",
            Box::new(rename("small", "moved", RenameMode::Replace)),
        ),
        (
            "rename over a file",
            Box::new(rename("moved", "gone", RenameMode::Replace)),
        ),
        (
            "exchange",
            Box::new(rename("dir", "base", RenameMode::Exchange)),
        ),
        (
            "exchange back",
            Box::new(rename("dir", "base", RenameMode::Exchange)),
        ),
        (
            "whiteout",
            Box::new(rename("pipe", "pipe-2", RenameMode::Whiteout)),
        ),
        (
            "setxattr",
            Box::new(|fs| {
                fs.setxattr(ME, at(fs, "new"), b"user.k", &[7; 2_000], XattrMode::Create)
                    .unwrap();
            }),
        ),
        (
            "setxattr of the base",
            Box::new(|fs| {
                fs.setxattr(ME, at(fs, "base"), b"user.k", b"v", XattrMode::Any)
                    .unwrap();
            }),
        ),
        (
            "removexattr",
            Box::new(|fs| fs.removexattr(ME, at(fs, "new"), b"user.k").unwrap()),
        ),
        (
            "chmod",
            Box::new(change(
                "base",
                SetAttr {
                    mode: Some(0o4711),
                    ..*set
                },
            )),
        ),
        (
            "chown",
            Box::new(change(
                "new",
                SetAttr {
                    uid: Some(70_000),
                    gid: Some(7),
                    ..*set
                },
            )),
        ),
        (
            "utimens",
            Box::new(change(
                "dir",
                SetAttr {
                    mtime: Some(-5),
                    atime: Some(1),
                    ..*set
                },
            )),
        ),
        (
            "truncate",
            Box::new(change(
                "base",
                SetAttr {
                    size: Some(100_001),
                    ..*set
                },
            )),
        ),
        (
            "growing",
            Box::new(change(
                "base",
                SetAttr {
                    size: Some(260_000),
                    ..*set
                },
            )),
        ),
        (
            "punch",
            Box::new(fallocate("new", 5_000, 20_000, Allocate::Punch)),
        ),
        (
            "zero",
            Box::new(fallocate(
                "base",
                10,
                9_000,
                Allocate::Zero { keep_size: false },
            )),
        ),
        (
            "reserve",
            Box::new(fallocate(
                "new",
                40_000,
                90_000,
                Allocate::Reserve { keep_size: false },
            )),
        ),
        (
            "reserve behind the end",
            Box::new(fallocate(
                "new",
                200_000,
                9_000,
                Allocate::Reserve { keep_size: true },
            )),
        ),
        (
            "write into what is reserved",
            Box::new(write("new", 60_000, 8_000)),
        ),
        (
            "copy of a range",
            Box::new(|fs| {
                let (from, to) = ((at(fs, "base"), 65_536), (at(fs, "new"), 8_192));
                assert_eq!(fs.copy_range(ME, from, to, 32_768).unwrap(), 32_768);
            }),
        ),
        (
            "write over what was copied",
            Box::new(write("base", 70_000, 6_000)),
        ),
        ("write over the copy", Box::new(write("new", 20_000, 6_000))),
        (
            "unlink of one of two",
            Box::new(|fs| fs.unlink(ME, ROOT, b"new").unwrap()),
        ),
        (
            "unlink",
            Box::new(|fs| fs.unlink(ME, ROOT, b"gone").unwrap()),
        ),
        (
            "rmdir of the base",
            Box::new(|fs| fs.rmdir(ME, ROOT, b"old").unwrap()),
        ),
    ];
    let mut bench = Bench::new();
    let first = bench.fork("v");
    let fs = bench.fs(first);
    put(&fs, "base", &noise(250_000, 9));
    put(&fs, "small", b"small");
    put(&fs, "gone", &noise(5_000, 8));
    super::private_root::folder(&fs, "old");
    drop(fs);
    bench.commit(first, false);
    let id = bench.fork("v");
    for (name, request) in &requests {
        let fs = bench.fs(id);
        request(&fs);
        // No kernel knows an inode of a daemon that is gone; what nothing names goes with it.
        fs.fork.end_session(0);
        let before = all(&fs);
        drop(fs);
        bench.reopen();
        let (before, after) = (before.lines(), all(&bench.fs(id)));
        for (before, after) in before.zip(after.lines()) {
            assert_eq!(after, before, "after {name}");
        }
    }
    let before = all(&bench.fs(id));
    bench.commit(id, false).unwrap();
    let after = all(&bench.fs(bench.fork("v")));
    // A new fork is charged nothing and has another room; its first line says so.
    assert!(
        after.lines().skip(1).eq(before.lines().skip(1)),
        "{before}\n{after}"
    );
    check(&bench);
}

#[test]
fn a_copy_that_was_replayed_shares_content_until_either_side_is_written() {
    let mut bench = Bench::new();
    for (on_base, looked_into) in [(false, false), (true, false), (false, true)] {
        let volume = format!("base-{on_base}-{looked_into}");
        let mut id = bench.fork(&volume);
        let mut sides = [noise(200_000, 5), noise(200_000, 5)];
        put(&bench.fs(id), "a", &sides[0]);
        if on_base {
            bench.commit(id, false);
            id = bench.fork(&volume);
        }
        let fs = bench.fs(id);
        let (a, b) = (
            fs.lookup(ROOT, b"a").unwrap().unwrap().ino,
            put(&fs, "b", b""),
        );
        if looked_into {
            // A look into a fork freezes what it has, and thaws it again.
            let name = id.to_string();
            assert!(bench.engine().diff(&name, &name).unwrap().is_empty());
        }
        let mut done = 0;
        while done < 200_000 {
            done += fs
                .copy_range(ME, (a, done), (b, done), 200_000 - done)
                .unwrap();
        }
        let charged = fs.fork.charged();
        drop(fs);
        bench.reopen();
        assert_eq!(
            bench.fs(id).fork.charged(),
            charged,
            "shared after a replay as before it"
        );
        for (side, ino, offset) in [
            (1, b, 4_096),
            (0, a, 4_000),
            (0, a, 100_000),
            (1, b, 150_001),
        ] {
            bench
                .fs(id)
                .write(ME, ino, offset as u64, &[side as u8; 5_000], false)
                .unwrap();
            sides[side][offset..offset + 5_000].fill(side as u8);
            for reopened in [false, true] {
                if reopened {
                    bench.reopen();
                }
                let fs = bench.fs(id);
                assert!(get(&fs, "a").unwrap() == sides[0] && get(&fs, "b").unwrap() == sides[1]);
            }
        }
        let fs = bench.fs(id);
        // One side gone leaves the other whole, though its room is used again.
        fs.unlink(ME, ROOT, b"a").unwrap();
        fs.forget(a, 1);
        fs.fork.end_session(0);
        put(&fs, "c", &noise(400_000, 6));
        assert!(get(&fs, "b").unwrap() == sides[1]);
        drop(fs);
        bench.commit(id, false).unwrap();
        assert!(get(&bench.fs(bench.fork(&volume)), "b").unwrap() == sides[1]);
    }
    check(&bench);
}
