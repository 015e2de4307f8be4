//! Every operation is cut off at every step that it reaches, as if the process had died there, and the store is opened again: all
//! heads are the old or the new ones, what was acknowledged is there, what was lost is garbage, and the operation can be done again.
//!
//! Closing a database flushes what was written without WAL, which a process that is killed does not do. So the folder is copied
//! as it lies there when everything has been cut off, and the copy is opened in its place.

use std::fs;
use std::path::Path;

use super::private_root::{folder, view};
use super::*;
use crate::store::{Step, copy_folder};

type View = BTreeMap<String, (Option<Vec<u8>>, u16, u32)>;

/// The process ends without a word, and a new one opens what it left.
pub(super) fn kill(bench: &mut Bench) {
    let left = format!("{}-left", bench.place);
    bench
        .engine()
        .store
        .copy_as_it_lies(&bench.dir.path().join(&left));
    bench.close();
    bench.place = left;
    bench.reopen();
}

/// A bench on a copy of a store that nobody has open.
pub(super) fn bench_on(store: &Path, retention: &Policy) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(store, &dir.path().join("store"));
    let mut bench = Bench {
        dir,
        engine: None,
        table: EngineConfig::default().table,
        retention: retention.clone(),
        place: "store".into(),
        // So that each run reaches the same steps as often.
        threads: 1,
        bulk: LITTLE,
    };
    bench.reopen();
    bench
}

pub(super) fn fork_of(bench: &Bench, volume: &str) -> Option<ForkId> {
    let forks = bench.engine().forks().unwrap();
    let found = forks.iter().find(|fork| fork.volume == volume);
    found.map(|fork| fork.id.parse().unwrap())
}

/// What a user can see of a volume.
#[derive(Clone, PartialEq, Debug)]
struct Line {
    head: Option<u64>,
    /// All versions, with the hash of what they show.
    versions: Vec<(u64, blake3::Hash)>,
    taken_back: Vec<(u64, u64)>,
}

/// What a user can see of a store.
#[derive(Clone, PartialEq, Debug)]
struct State {
    volumes: BTreeMap<String, Line>,
    forks: BTreeMap<ForkId, View>,
}

impl State {
    /// `timed`: without the times and inode numbers that no two runs of an operation give alike.
    fn of(bench: &Bench, timed: bool) -> State {
        let engine = bench.engine();
        let mut volumes = BTreeMap::new();
        for volume in engine.volumes().unwrap() {
            let version = |number: u64| {
                let mut shown = Vec::new();
                let name = format!("{}@{number}", volume.name);
                if timed {
                    list(engine, &name, b"", &mut shown);
                } else {
                    engine.export(&name, &mut shown).unwrap();
                }
                (number, blake3::hash(&shown))
            };
            let log = engine.log(&volume.name).unwrap();
            let line = Line {
                head: volume.head,
                versions: log.iter().map(|info| version(info.number)).collect(),
                taken_back: engine.volume_record(&volume.name).unwrap().taken_back,
            };
            volumes.insert(volume.name.clone(), line);
        }
        let forks = engine.forks().unwrap().into_iter().map(|fork| {
            assert_ne!(fork.state, "lost", "{fork:?}");
            let id = fork.id.parse().unwrap();
            (id, view(&bench.fs(id)))
        });
        let forks = forks.collect();
        State { volumes, forks }
    }
}

/// Adds all that a version shows below a path, but for times and inode numbers.
fn list(engine: &Engine, version: &str, path: &[u8], out: &mut Vec<u8>) {
    for mut entry in engine.ls(version, &[path, b"/"].concat()).unwrap() {
        (entry.ino, entry.mtime) = (0, 0);
        let path = [path, b"/", &entry.name].concat();
        out.extend_from_slice(format!("{entry:?}").as_bytes());
        match entry.mode & 0o170_000 {
            0o040_000 => list(engine, version, &path, out),
            0o100_000 => engine.cat(version, &path, out).unwrap(),
            _ => {}
        }
    }
}

/// What is in the store when nothing is in it that nothing names.
#[derive(PartialEq, Debug)]
struct Held {
    versions: u64,
    chunks: u64,
    bytes: (u64, u64),
    /// None where times make the trees of two runs differ.
    nodes: Option<u64>,
}

impl Held {
    /// Removes the garbage, and then finds none.
    fn after_gc(bench: &Bench, same_nodes: bool) -> Held {
        bench.engine().gc(false).unwrap();
        let found = bench.engine().gc(true).unwrap().garbage;
        assert_eq!((found.removed_nodes, found.removed_chunks), (0, 0));
        let stats = bench.engine().stats().unwrap();
        assert_eq!(stats.chunks, found.kept_chunks);
        Held {
            versions: stats.versions,
            chunks: stats.chunks,
            bytes: (stats.unique_bytes, stats.stored_bytes),
            nodes: same_nodes.then_some(found.kept_nodes),
        }
    }
}

/// An operation that is cut off.
struct Operation {
    /// What is there beside [`furnish`].
    furnish: fn(&Bench),
    /// What goes before it in the same process.
    begin: Option<fn(&Bench)>,
    act: fn(&Bench) -> Result<()>,
    /// It can be done again where it was done already.
    again: bool,
    /// It, or what goes before it, stores times and numbers of its own, so that no two runs make the same tree.
    timed: bool,
    /// All steps that it reaches.
    reaches: &'static [Step],
}

const PLAIN: Operation = Operation {
    furnish: |_| (),
    begin: None,
    act: |_| Ok(()),
    again: false,
    timed: false,
    reaches: &[],
};

use Step::*;

const FORK: &[Step] = &[Writing, Written, DeltaMade];
const UPDATE: &[Step] = &[Writing, Written, Synced];
const PUBLISH: &[Step] = &[Writing, Written, Synced, Gathered, Publishing];
const COMMIT: &[Step] = &[
    Writing, Written, Synced, Taken, Gathered, Publishing, Sealed, Ingested, Ending, Aside,
];
const KEEPS: &[Step] = &[
    Writing, Written, Synced, Taken, Gathered, Publishing, SpoolKept, Sealed, Ingested, Ending,
    Aside,
];
const LARGE: &[Step] = &[
    Writing, Written, Synced, Flushing, Flushed, Taken, Spilling, Gathered, Publishing, Sealed,
    Ingested, Ending, Aside,
];
const GOES_ON: &[Step] = &[
    Writing,
    Written,
    Synced,
    Taken,
    Gathered,
    Publishing,
    Sealed,
    SegmentBegun,
    Carried,
    Ingested,
    Rebased,
    Trimmed,
];
const GC: &[Step] = &[
    Writing, Written, Flushing, Flushed, Marking, Marked, Swept, Compacted,
];
const GC_OF_SPOOLS: &[Step] = &[
    Writing,
    Written,
    Flushing,
    Flushed,
    Marking,
    Marked,
    Swept,
    Compacted,
    SpoolRemoved,
];
const SETTLING: &[Step] = &[
    Writing, Written, Synced, Flushing, Flushed, Compacted, Repacked,
];
const ABANDON: &[Step] = &[Writing, Written, Ending, Aside];
const IMPORT: &[Step] = &[
    Writing, Written, Synced, Taken, Gathered, Publishing, DeltaMade, Sealed, Ingested, Ending,
    Aside, Unpacked,
];

/// Two volumes with a fork that changed something of each.
pub(super) fn furnish(bench: &Bench) {
    for (seed, volume) in [(1, "v"), (2, "w")] {
        let id = bench.fork(volume);
        let fs = bench.fs(id);
        put(&fs, "base", &noise(150_000, seed));
        put(&fs, "gone", &noise(2_000, seed + 10));
        put(&fs, "small", b"small");
        let dir = folder(&fs, "dir");
        let small = fs.lookup(ROOT, b"small").unwrap().unwrap().ino;
        fs.link(ME, small, dir, b"link").unwrap();
        bench.commit(id, true);
        fs.write(ME, small, 3, b"er", false).unwrap();
        bench.commit(id, false);
        let id = bench.fork_with(volume, |request| request.excludes = vec!["/secret".into()]);
        let fs = bench.fs(id);
        let base = fs.lookup(ROOT, b"base").unwrap().unwrap().ino;
        fs.write(ME, base, 70_000, b"changed", false).unwrap();
        put(&fs, "new", &noise(90_000, seed + 20));
        put(&fs, "secret", &noise(5_000, seed + 30));
        fs.unlink(ME, ROOT, b"gone").unwrap();
        fs.setxattr(
            ME,
            base,
            b"user.k",
            &noise(3_000, seed + 40),
            XattrMode::Any,
        )
        .unwrap();
    }
}

fn commit_of(bench: &Bench, volumes: &[&str], keep: bool) -> Result<()> {
    let forks = volumes.iter().map(|v| fork_of(bench, v).unwrap()).collect();
    bench.engine().commit(forks, request(keep)).map(drop)
}

impl Operation {
    /// Cuts the operation off at each step, each time in a copy of the same store.
    fn run(&self, retention: &Policy) {
        let mut made = Bench::new();
        furnish(&made);
        (self.furnish)(&made);
        made.close();
        let template = made.path();
        let open = || {
            let bench = bench_on(&template, retention);
            if let Some(begin) = self.begin {
                begin(&bench);
            }
            bench
        };

        let mut bench = open();
        let before = State::of(&bench, self.timed);
        let steps = &bench.engine().store.steps;
        steps.watch();
        (self.act)(&bench).unwrap();
        let reached = steps.seen();
        steps.over();
        let names: Vec<Step> = reached.keys().copied().collect();
        assert_eq!(names, self.reaches, "the steps of the operation");
        kill(&mut bench);
        let after = State::of(&bench, self.timed);
        let held = Held::after_gc(&bench, !self.timed);
        drop(bench);

        let mut seed = u64::from(std::process::id()) | 1;
        for (step, count) in reached {
            for nth in some_of(count, &mut seed) {
                println!("cut off at {step:?}, {nth} of {count}");
                let mut bench = open();
                assert_eq!(State::of(&bench, self.timed).volumes, before.volumes);
                let before = State {
                    forks: State::of(&bench, self.timed).forks,
                    ..before.clone()
                };
                bench.engine().store.steps.cut(step, nth);
                let result = (self.act)(&bench);
                assert!(bench.engine().store.steps.is_dead(), "{result:?}");
                kill(&mut bench);
                self.examine(&bench, &before, &after);
                assert_eq!(Held::after_gc(&bench, !self.timed), held);
                bench.reopen();
                check(&bench);
            }
        }
    }

    /// What is left of an operation that was cut off is the store before or after it, and it can be done (again).
    fn examine(&self, bench: &Bench, before: &State, after: &State) {
        check(bench);
        let state = State::of(bench, self.timed);
        let moves = before.volumes != after.volumes;
        let is_new = state.volumes == after.volumes;
        assert!(
            is_new || state.volumes == before.volumes,
            "neither {before:#?} nor {after:#?}: {state:#?}"
        );
        let mut is_done = moves && is_new;
        for (id, shown) in &before.forks {
            let stays = after.forks.contains_key(id);
            match state.forks.get(id) {
                Some(now) => {
                    assert!(now == shown, "fork {id} shows something else");
                    assert!(stays || !is_done, "fork {id} is still there");
                }
                None => {
                    assert!(!stays && (is_new || !moves), "fork {id} is lost");
                    is_done = true;
                }
            }
        }
        let is_extra = |id: &&ForkId| !before.forks.contains_key(id);
        let extra = after.forks.keys().find(is_extra);
        for id in state.forks.keys().filter(is_extra) {
            if let Some(extra) = extra {
                assert!(state.forks[id] == after.forks[extra], "the new fork");
            }
            bench.engine().abandon(*id).unwrap();
        }
        if !is_done || self.again {
            (self.act)(bench).unwrap();
        }
        let end = State::of(bench, self.timed);
        assert_eq!(end.volumes, after.volumes);
        assert_eq!(end.forks.len(), after.forks.len());
        check(bench);
        no_strays(bench);
    }
}

/// The first times of so many, the last, and some between them.
pub(super) fn some_of(count: usize, seed: &mut u64) -> Vec<usize> {
    *seed = u64::from_le_bytes(noise(8, *seed).try_into().unwrap());
    let other = 1 + *seed as usize % count;
    let mut some = vec![1, 2.min(count), count - count / 3, other, count];
    some.sort_unstable();
    some.dedup();
    some
}

/// In the end there is a folder for each fork and no other, and no spool that nobody has.
pub(super) fn no_strays(bench: &Bench) {
    let forks = bench.engine().forks().unwrap();
    let mut expected: Vec<String> = forks.into_iter().map(|fork| fork.id).collect();
    expected.sort();
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let entries = fs::read_dir(bench.path().join("forks")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        if names == expected && bench.engine().store.stray_spools().is_empty() {
            return;
        }
        assert!(Instant::now() < until, "{names:?} for {expected:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

macro_rules! operations {
    ($($name:ident: $operation:expr,)*) => {
        $(
            /// > | `forkvol commit` was interrupted | the head is the old or the new version, never anything else | the same |
            #[test]
            fn $name() {
                let operation: Operation = $operation;
                operation.run(&Policy::new(None, Some(0)));
            }
        )*

        #[test]
        fn every_step_is_reached_by_some_operation() {
            let operations: &[Operation] = &[$($operation,)*];
            for step in Step::ALL {
                let reached = operations.iter().any(|o| o.reaches.contains(step));
                assert!(reached, "no operation reaches {step:?}");
            }
        }
    };
}

operations! {
    a_fork: Operation {
        act: |bench| bench.engine().fork(fork_request("v")).map(drop),
        again: true,
        timed: true,
        reaches: FORK,
        ..PLAIN
    },
    a_fork_of_a_new_volume: Operation {
        act: |bench| bench.engine().fork(fork_request("another")).map(drop),
        again: true,
        timed: true,
        reaches: FORK,
        ..PLAIN
    },
    a_small_commit: Operation {
        act: |bench| commit_of(bench, &["v"], false),
        reaches: COMMIT,
        ..PLAIN
    },
    a_commit_of_two_forks: Operation {
        act: |bench| commit_of(bench, &["v", "w"], false),
        reaches: COMMIT,
        ..PLAIN
    },
    a_large_commit: Operation {
        furnish: |bench| {
            let fs = bench.fs(fork_of(bench, "v").unwrap());
            // It can be made smaller, so it is copied.
            put(&fs, "large", &codes(14 << 20, 77));
        },
        act: |bench| commit_of(bench, &["v"], false),
        reaches: LARGE,
        ..PLAIN
    },
    a_commit_that_keeps_the_spool: Operation {
        furnish: |bench| {
            let fs = bench.fs(fork_of(bench, "v").unwrap());
            put(&fs, "dense", &noise(700_000, 78));
        },
        act: |bench| commit_of(bench, &["v", "w"], false),
        reaches: KEEPS,
        ..PLAIN
    },
    a_commit_of_a_fork_that_goes_on: Operation {
        begin: Some(|bench| {
            let fs = bench.fs(fork_of(bench, "v").unwrap());
            for name in ["base", "new"] {
                let ino = fs.lookup(ROOT, name.as_bytes()).unwrap().unwrap().ino;
                fs.link(ME, ino, ROOT, format!("{name}-again").as_bytes()).unwrap();
            }
            let ino = put(&fs, "orphan", &noise(20_000, 5));
            fs.unlink(ME, ROOT, b"orphan").unwrap();
            fs.write(ME, ino, 20_000, b"more", false).unwrap();
        }),
        act: |bench| commit_of(bench, &["v"], true),
        timed: true,
        reaches: GOES_ON,
        ..PLAIN
    },
    a_move_to_a_private_root: Operation {
        act: |bench| {
            let live = bench.engine().live(fork_of(bench, "v").unwrap())?;
            bench.engine().move_to_private_root(&live)
        },
        again: true,
        reaches: GOES_ON,
        ..PLAIN
    },
    a_commit_on_top_of_a_private_root: Operation {
        furnish: |bench| {
            let live = bench.engine().live(fork_of(bench, "v").unwrap()).unwrap();
            bench.engine().move_to_private_root(&live).unwrap();
            let fs = bench.fs(live.id);
            put(&fs, "later", &noise(30_000, 6));
        },
        act: |bench| commit_of(bench, &["v"], false),
        reaches: COMMIT,
        ..PLAIN
    },
    a_gc: Operation {
        furnish: |bench| {
            let id = bench.fork("garbage");
            for n in 0..8 {
                put(&bench.fs(id), &format!("f{n}"), &noise(60_000, 100 + n));
            }
            bench.commit(id, false);
            bench.engine().remove_volume("garbage", false).unwrap();
        },
        act: |bench| bench.engine().gc(false).map(drop),
        again: true,
        reaches: GC,
        ..PLAIN
    },
    a_gc_of_spools: Operation {
        furnish: |bench| {
            for (volume, seed) in [("shared", 100), ("stays", 100), ("goes", 200)] {
                let id = bench.fork(volume);
                let fs = bench.fs(id);
                put(&fs, "dense", &noise(300_000, seed));
                put(&fs, volume, &noise(200_000, seed + volume.len() as u64));
                bench.commit(id, false);
            }
            for volume in ["shared", "goes"] {
                bench.engine().remove_volume(volume, false).unwrap();
            }
        },
        act: |bench| bench.engine().gc(false).map(drop),
        again: true,
        reaches: GC_OF_SPOOLS,
        ..PLAIN
    },
    a_settling: Operation {
        furnish: |bench| {
            let id = bench.fork("texts");
            let fs = bench.fs(id);
            let line = |byte: &u8| format!("{byte} of the same words, again and again;\n");
            for n in 0..1_050 {
                let text: String = noise(70, 1_000 + n).iter().map(line).collect();
                put(&fs, &format!("f{n}"), text.as_bytes());
            }
            bench.commit(id, false);
        },
        act: |bench| bench.engine().settle().map(drop),
        again: true,
        reaches: SETTLING,
        ..PLAIN
    },
    a_removal_of_a_volume: Operation {
        furnish: |bench| {
            bench.engine().abandon(fork_of(bench, "v").unwrap()).unwrap();
        },
        act: |bench| bench.engine().remove_volume("v", false).map(drop),
        reaches: UPDATE,
        ..PLAIN
    },
    an_abandoned_fork: Operation {
        act: |bench| match fork_of(bench, "v") {
            Some(id) => bench.engine().abandon(id).map(drop),
            None => Ok(()),
        },
        reaches: ABANDON,
        ..PLAIN
    },
    a_rollback: Operation {
        act: |bench| bench.engine().rollback("v", "1").map(drop),
        reaches: PUBLISH,
        ..PLAIN
    },
    a_reset: Operation {
        act: |bench| bench.engine().reset_volume("v"),
        reaches: UPDATE,
        ..PLAIN
    },
    a_rename: Operation {
        act: |bench| bench.engine().rename_volume("v", "x"),
        reaches: UPDATE,
        ..PLAIN
    },
    an_import: Operation {
        act: |bench| {
            let mut tar = Vec::new();
            bench.engine().export("w", &mut tar)?;
            bench.engine().import("v", &mut tar.as_slice(), (0, 0)).map(drop)
        },
        timed: true,
        reaches: IMPORT,
        ..PLAIN
    },
}
