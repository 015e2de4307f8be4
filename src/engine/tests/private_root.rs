//! A fork whose table moved to a private root shows, charges and commits the same as one whose table did not.

use super::*;

/// The view of a fork: every path with what it holds.
pub(super) fn view(fs: &Fs) -> BTreeMap<String, (Option<Vec<u8>>, u16, u32)> {
    let mut out = BTreeMap::new();
    let mut folders = vec![(String::new(), ROOT)];
    while let Some((path, dir)) = folders.pop() {
        let mut entries = Vec::new();
        fs.readdir(dir, 0, |entry| {
            entries.push((entry.name.to_vec(), entry.ino, entry.kind));
            true
        })
        .unwrap();
        for (name, ino, kind) in entries {
            if name == b"." || name == b".." {
                continue;
            }
            let path = format!("{path}/{}", String::from_utf8(name).unwrap());
            let attr = fs.getattr(ino).unwrap();
            let bytes = (kind == Kind::File)
                .then(|| fs.read(ino, 0, attr.size as usize).unwrap())
                .or_else(|| {
                    folders.push((path.clone(), ino));
                    None
                });
            out.insert(path, (bytes, attr.mode, attr.nlink));
        }
    }
    out
}

pub(super) fn folder(fs: &Fs, name: &str) -> Ino {
    let new = NewNode::new(Kind::Directory, 0o755);
    fs.make(ME, ROOT, name.as_bytes(), new).unwrap().ino
}

/// Some of everything that a table can hold, step by step; `between` is called after each step.
fn work(fs: &Fs, mut between: impl FnMut()) {
    let made = put(fs, "made", &noise(300_000, 1));
    fs.setxattr(ME, made, b"user.a", b"1", XattrMode::Any)
        .unwrap();
    fs.link(ME, made, ROOT, b"made-again").unwrap();
    between();
    let dir = folder(fs, "dir");
    fs.rename(ME, (ROOT, b"base"), (dir, b"moved"), RenameMode::Replace)
        .unwrap();
    fs.write(ME, made, 5_000, b"changed after the move", false)
        .unwrap();
    between();
    fs.unlink(ME, ROOT, b"made-again").unwrap();
    fs.setxattr(ME, made, b"user.b", b"2", XattrMode::Any)
        .unwrap();
    let gone = put(fs, "gone", &noise(50_000, 2));
    between();
    fs.unlink(ME, ROOT, b"gone").unwrap();
    fs.forget(gone, 1);
    let size = SetAttr {
        size: Some(1_234),
        ..SetAttr::default()
    };
    fs.setattr(ME, made, size).unwrap();
    put(fs, "gone", b"another of that name");
    between();
}

fn base(bench: &Bench, volume: &str) -> ForkId {
    let first = bench.fork(volume);
    put(&bench.fs(first), "base", &noise(200_000, 3));
    bench.commit(first, false);
    bench.fork(volume)
}

#[test]
fn moving_the_table_changes_nothing_that_a_fork_shows_or_commits() {
    let mut bench = Bench::new();
    let (plain, moving) = (base(&bench, "plain"), base(&bench, "moving"));
    work(&bench.fs(plain), || ());
    let live = bench.engine().live(moving).unwrap();
    work(&bench.fs(moving), || {
        bench.engine().move_to_private_root(&live).unwrap();
        assert!(live.fork().unwrap().layers().live.is_empty());
    });
    drop(live);
    assert_eq!(view(&bench.fs(moving)), view(&bench.fs(plain)));
    assert_eq!(
        bench.fs(moving).statfs().blocks - bench.fs(moving).statfs().free,
        bench.fs(plain).statfs().blocks - bench.fs(plain).statfs().free
    );
    assert_eq!(
        bench.fs(moving).fork.charged(),
        bench.fs(plain).fork.charged()
    );
    let report = bench.engine().gc(false).unwrap();
    assert!(
        report.garbage.removed_nodes > 0,
        "what the moves left behind is garbage"
    );
    bench.reopen();
    assert_eq!(view(&bench.fs(moving)), view(&bench.fs(plain)));
    assert_eq!(bench.commit(plain, false), Some(2));
    assert_eq!(bench.commit(moving, false), Some(2));
    assert_eq!(
        view(&bench.fs(bench.fork("moving"))),
        view(&bench.fs(bench.fork("plain")))
    );
    let of = |name| bench.engine().log(name).unwrap().remove(0);
    let (plain, moving) = (of("plain"), of("moving"));
    assert_eq!(
        (moving.files, moving.logical_bytes),
        (plain.files, plain.logical_bytes)
    );
    check(&bench);
}

#[test]
fn removing_what_was_moved_gives_its_room_back_at_once() {
    let bench = Bench::new();
    let fork = bench.fork_sized("v", 1 << 20);
    let fs = bench.fs(fork);
    let before = fs.fork.charged();
    let ino = put(&fs, "own", &noise(600_000, 1));
    let live = bench.engine().live(fork).unwrap();
    bench.engine().move_to_private_root(&live).unwrap();
    assert!(fs.fork.charged() > 600_000);
    fs.unlink(ME, ROOT, b"own").unwrap();
    fs.forget(ino, 1);
    assert_eq!(fs.fork.charged(), before);
    put(&fs, "again", &noise(900_000, 2));
}

#[test]
fn a_fork_goes_on_while_its_table_moves() {
    let mut bench = Bench::new();
    let fork = base(&bench, "v");
    let live = bench.engine().live(fork).unwrap();
    let fs = bench.fs(fork);
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            for _ in 0..30 {
                bench.engine().move_to_private_root(&live).unwrap();
            }
        });
        let mut round = 0;
        while !mover.is_finished() || round < 200 {
            let name = format!("f{}", round % 40);
            if round % 3 == 0 && fs.lookup(ROOT, name.as_bytes()).unwrap().is_some() {
                fs.unlink(ME, ROOT, name.as_bytes()).unwrap();
            }
            match fs.lookup(ROOT, name.as_bytes()).unwrap() {
                Some(entry) => {
                    let part = noise(7_000, round);
                    fs.write(ME, entry.ino, 3_000, &part, false).unwrap();
                }
                None => {
                    put(&fs, &name, &noise(20_000, round));
                }
            }
            let mut expected = noise(20_000, round);
            if let Some(bytes) = get(&fs, &name)
                && bytes != expected
            {
                expected[3_000..10_000].copy_from_slice(&noise(7_000, round));
                assert_eq!(
                    bytes[3_000..10_000],
                    expected[3_000..10_000],
                    "round {round}"
                );
            }
            round += 1;
        }
    });
    drop(live);
    let shown = view(&fs);
    drop(fs);
    bench.reopen();
    assert_eq!(view(&bench.fs(fork)), shown);
    assert_eq!(bench.commit(fork, false), Some(2));
    assert_eq!(view(&bench.fs(bench.fork("v"))), shown);
    check(&bench);
}

#[test]
fn a_table_that_passes_its_bound_moves_by_itself() {
    let bench = Bench::with_table(64 << 10);
    let fork = bench.fork("v");
    let fs = bench.fs(fork);
    let live = bench.engine().live(fork).unwrap();
    let mut made = 0;
    while live.record.lock().moved.is_none() {
        put(&fs, &format!("f{made}"), b"x");
        made += 1;
        std::thread::yield_now();
    }
    for n in 0..made {
        assert_eq!(get(&fs, &format!("f{n}")), Some(b"x".to_vec()));
    }
    assert!(bench.engine().find_fork(&fork.to_string()).unwrap().changed >= made);
}
