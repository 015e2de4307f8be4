//! What is excluded is in no version, and stays in the fork that made it for as long as that goes on.

use std::collections::HashSet;

use super::content::ingest_ahead;
use super::private_root::{folder, view};

use super::*;
use crate::fork::excluded_inodes;

fn excluding(bench: &Bench, volume: &str, patterns: &[&str]) -> ForkId {
    bench.fork_with(volume, |request| {
        request.excludes = patterns.iter().map(|p| (*p).to_owned()).collect();
    })
}

fn make(fs: &Fs, dir: Ino, name: &str, kind: Kind) -> Ino {
    let new = NewNode::new(kind, 0o755);
    fs.make(ME, dir, name.as_bytes(), new).unwrap().ino
}

fn paths(fs: &Fs) -> Vec<String> {
    view(fs).into_keys().collect()
}

fn head(bench: &Bench, volume: &str) -> Fs {
    bench.fs(bench.fork(volume))
}

/// Bytes of content that the store has.
fn stored(bench: &Bench) -> u64 {
    bench.engine().stats().unwrap().unique_bytes
}

/// > A path that `--exclude` names is never committed. A name that a pattern hits and the fork made or changed is left out of the
/// > version, a folder with all below it. The commit says which; `log --json` keeps it. A file with another name that is not
/// > excluded stays by that name. A fork that goes on (`--keep`) goes on with it. It stays charged to the fork, and in the daemon's
/// > memory.
#[test]
fn excluded_paths_are_in_no_version_and_stay_in_the_fork() {
    let mut bench = Bench::new();
    let id = excluding(&bench, "v", &["/secret", "private/", "*.key"]);
    let fs = bench.fs(id);
    put(&fs, "plain", &noise(200_000, 1));
    let shared = put(&fs, "shared", &noise(200_000, 2));
    fs.link(ME, shared, ROOT, b"shared.key").unwrap();
    let secret = put(&fs, "secret", &noise(300_000, 3));
    fs.setxattr(ME, secret, b"user.a", b"1", XattrMode::Any)
        .unwrap();
    let private = folder(&fs, "private");
    let inner = make(&fs, private, "inner", Kind::Directory);
    let deep = make(&fs, inner, "deep", Kind::File);
    fs.write(ME, deep, 0, &noise(300_000, 4), false).unwrap();
    let dir = folder(&fs, "dir");
    make(&fs, dir, "secret", Kind::File);
    let before = view(&fs);

    let mut done = bench.engine().commit(vec![id], request(true)).unwrap();
    let done = done.remove(0);
    assert_eq!(done.excluded.paths, ["private/", "secret", "shared.key"]);
    assert_eq!(done.excluded.count, 3);
    assert_eq!(done.version.unwrap().excluded, done.excluded);
    assert_eq!(bench.engine().log("v").unwrap()[0].excluded, done.excluded);
    assert_eq!(stored(&bench), 400_000, "plain and shared alone");
    let committed = view(&head(&bench, "v"));
    let names: Vec<&str> = committed.keys().map(String::as_str).collect();
    assert_eq!(names, ["/dir", "/dir/secret", "/plain", "/shared"]);
    assert_eq!(committed["/shared"].2, 1);
    assert_eq!(head(&bench, "v").getattr(ROOT).unwrap().nlink, 3);
    check(&bench);

    assert_eq!(view(&fs), before);
    assert!(fs.fork.charged() > 600_000, "{}", fs.fork.charged());
    assert!(fs.fork.layers().live.inodes.contains_key(&secret));
    assert_eq!(fs.getattr(ROOT).unwrap().nlink, 4);
    fs.write(ME, secret, 5, b"goes on", false).unwrap();
    put(&fs, "later", b"1");
    let before = view(&fs);
    drop(fs);
    bench.reopen();
    let fs = bench.fs(id);
    assert_eq!(view(&fs), before, "after a restart");
    assert_eq!(fs.getxattr(secret, b"user.a").unwrap(), b"1");
    assert_eq!(bench.commit(id, false), Some(2));
    let names = paths(&head(&bench, "v"));
    assert_eq!(
        names,
        ["/dir", "/dir/secret", "/later", "/plain", "/shared"]
    );
    check(&bench);
}

/// > What the base has there stays while it is unchanged; once it was changed it is in no later version.
#[test]
fn what_the_base_has_there_stays_until_the_fork_changes_it() {
    let mut bench = Bench::new();
    let first = bench.fork("v");
    put(&bench.fs(first), "one.key", &noise(300_000, 1));
    put(&bench.fs(first), "other.key", &noise(300_000, 2));
    put(&bench.fs(first), "plain", b"1");
    bench.commit(first, false);

    let id = excluding(&bench, "v", &["*.key"]);
    let fs = bench.fs(id);
    put(&fs, "new", b"1");
    assert_eq!(bench.commit(id, true), Some(2));
    let all = ["/new", "/one.key", "/other.key", "/plain"];
    assert_eq!(paths(&head(&bench, "v")), all);
    let one = fs.lookup(ROOT, b"one.key").unwrap().unwrap().ino;
    fs.write(ME, one, 100_000, &[7; 10], false).unwrap();
    assert_eq!(bench.commit(id, true), Some(3));
    assert_eq!(paths(&head(&bench, "v")), ["/new", "/other.key", "/plain"]);
    check(&bench);

    for version in ["v@1", "v@2"] {
        let at = bench.engine().find_version(version).unwrap().1;
        let (volume, number) = (at.volume, at.number);
        let at = VersionRef { volume, number };
        bench.engine().store.remove_version(at).unwrap();
    }
    bench.engine().gc(false).unwrap();
    let mut expected = noise(300_000, 1);
    expected[100_000..100_010].fill(7);
    assert_eq!(get(&fs, "one.key"), Some(expected.clone()));
    drop(fs);
    bench.reopen();
    assert_eq!(get(&bench.fs(id), "one.key"), Some(expected));
}

#[test]
fn a_folder_of_the_base_that_was_moved_to_an_excluded_place_comes_back_whole() {
    let bench = Bench::new();
    let first = bench.fork("v");
    let fs = bench.fs(first);
    let dir = folder(&fs, "dir");
    let inner = make(&fs, dir, "inner", Kind::Directory);
    let file = make(&fs, inner, "file", Kind::File);
    fs.write(ME, file, 0, &noise(300_000, 1), false).unwrap();
    fs.setxattr(ME, file, b"user.a", b"1", XattrMode::Any)
        .unwrap();
    fs.link(ME, file, ROOT, b"also").unwrap();
    make(&fs, inner, "gone", Kind::File);
    bench.commit(first, false);

    let id = excluding(&bench, "v", &["/tmp/"]);
    let fs = bench.fs(id);
    let tmp = folder(&fs, "tmp");
    fs.rename(ME, (ROOT, b"dir"), (tmp, b"moved"), RenameMode::Replace)
        .unwrap();
    let before = view(&fs);
    assert_eq!(bench.commit(id, true), Some(2));
    assert_eq!(paths(&head(&bench, "v")), ["/also"]);
    assert_eq!(view(&fs), before);
    check(&bench);
    fs.unlink(ME, inner, b"gone").unwrap();
    fs.rename(ME, (tmp, b"moved"), (ROOT, b"back"), RenameMode::Replace)
        .unwrap();
    let before = view(&fs);
    assert_eq!(bench.commit(id, false), Some(3));
    let fs = head(&bench, "v");
    let mut after = view(&fs);
    assert_eq!(after["/back/inner/file"].2, 2);
    after.insert("/tmp".into(), before["/tmp"].clone());
    assert_eq!(after, before);
    assert_eq!(fs.getxattr(file, b"user.a").unwrap(), b"1");
    check(&bench);
}

#[test]
fn a_commit_that_makes_no_version_leaves_everything_in_the_fork() {
    let mut bench = Bench::new();
    let first = bench.fork("v");
    put(&bench.fs(first), "a.key", &noise(300_000, 1));
    bench.commit(first, false);
    let id = excluding(&bench, "v", &["*.key"]);
    let fs = bench.fs(id);
    let a = fs.lookup(ROOT, b"a.key").unwrap().unwrap().ino;
    fs.write(ME, a, 7, b"changed", false).unwrap();
    put(&fs, "b.key", &noise(300_000, 2));
    let dir = folder(&fs, "d.key");
    make(&fs, dir, "x", Kind::File);
    let before = view(&fs);
    let if_missing = CommitRequest {
        when: [(id, When::IfMissing)].into(),
        ..request(true)
    };
    let done = bench.engine().commit(vec![id], if_missing).unwrap();
    assert!(done[0].version.is_none());
    assert_eq!(view(&fs), before);
    drop(fs);
    bench.reopen();
    let fs = bench.fs(id);
    assert_eq!(view(&fs), before, "after a restart");
    let rename = |from: &str, to: &str| {
        let (from, to) = ((ROOT, from.as_bytes()), (ROOT, to.as_bytes()));
        fs.rename(ME, from, to, RenameMode::Replace).unwrap();
    };
    rename("a.key", "a");
    rename("b.key", "b");
    rename("d.key", "d");
    let before = view(&fs);
    assert_eq!(bench.commit(id, false), Some(2));
    assert_eq!(view(&head(&bench, "v")), before);
    check(&bench);
}

#[test]
fn a_private_root_gets_nothing_that_is_excluded() {
    let bench = Bench::new();
    let id = excluding(&bench, "v", &["*.key"]);
    let fs = bench.fs(id);
    put(&fs, "a.key", &noise(300_000, 1));
    put(&fs, "plain", &noise(100_000, 2));
    let before = view(&fs);
    let live = bench.engine().live(id).unwrap();
    for _ in 0..2 {
        bench.engine().move_to_private_root(&live).unwrap();
        assert_eq!(view(&fs), before);
        assert_eq!(stored(&bench), 100_000);
    }
    assert_eq!(
        fs.fork.weight().0,
        0,
        "what was carried over is no reason to move again"
    );
    assert_eq!(bench.commit(id, false), Some(1));
    assert_eq!(paths(&head(&bench, "v")), ["/plain"]);
    assert_eq!(stored(&bench), 100_000);
    check(&bench);
}

#[test]
fn what_nobody_touched_is_excluded_when_its_folder_is_moved_into_place() {
    let moves: [fn(&Bench, ForkId); 3] = [
        |bench, id| {
            let live = bench.engine().live(id).unwrap();
            bench.engine().move_to_private_root(&live).unwrap();
        },
        |bench, id| {
            bench.commit(id, true);
        },
        |bench, id| {
            bench
                .engine()
                .diff(&id.to_string(), &id.to_string())
                .unwrap();
        },
    ];
    for (patterns, below) in [(&["/.aws/cred"][..], ""), (&["**/sso/cache/"], "sso/")] {
        for step in moves {
            let bench = Bench::new();
            let id = excluding(&bench, "v", patterns);
            let fs = bench.fs(id);
            let new = folder(&fs, ".aws.new");
            make(&fs, new, "config", Kind::File);
            let secret = make(&fs, new, "cred", Kind::File);
            fs.write(ME, secret, 0, &noise(100_000, 1), false).unwrap();
            let inner = make(
                &fs,
                new,
                if below.is_empty() { "other" } else { "later" },
                Kind::Directory,
            );
            let cache = make(&fs, inner, "cache", Kind::Directory);
            make(&fs, cache, "token", Kind::File);
            step(&bench, id);
            let replace = RenameMode::Replace;
            if !below.is_empty() {
                fs.rename(ME, (new, b"later"), (new, b"sso"), replace)
                    .unwrap();
            }
            fs.rename(ME, (ROOT, b".aws.new"), (ROOT, b".aws"), replace)
                .unwrap();
            let before = view(&fs);
            bench.commit(id, true).unwrap();
            assert_eq!(view(&fs), before, "the fork goes on with it");
            let committed = paths(&head(&bench, "v"));
            match below {
                "" => assert!(!committed.contains(&"/.aws/cred".into()), "{committed:?}"),
                _ => assert!(
                    !committed.contains(&"/.aws/sso/cache".into()),
                    "{committed:?}"
                ),
            }
            assert!(committed.contains(&"/.aws/config".into()), "{committed:?}");
            check(&bench);
        }
    }
}

#[test]
fn ingest_ahead_of_a_commit_asks_for_every_name_of_a_file() {
    let bench = Bench::new();
    let first = bench.fork("v");
    let of_base = put(&bench.fs(first), "base.key", &noise(300_000, 1));
    bench.commit(first, false);
    let id = excluding(&bench, "v", &["*.key", "/private/"]);
    let fs = bench.fs(id);
    fs.write(ME, of_base, 0, b"1", false).unwrap();
    let plain = put(&fs, "plain", b"1");
    let linked = put(&fs, "linked", b"1");
    fs.link(ME, linked, ROOT, b"linked.key").unwrap();
    let private = folder(&fs, "private");
    let below = make(&fs, private, "below", Kind::File);
    let mut expected = HashSet::from([of_base, linked, below]);
    // More than are looked at together.
    for i in 0..1_500 {
        put(&fs, &format!("file {i}"), b"1");
        expected.insert(put(&fs, &format!("{i}.key"), b"1"));
    }
    let cells: Vec<_> = fs.fork.layers().live.inodes.values().cloned().collect();
    assert!(cells.iter().any(|cell| cell.ino == plain));
    let excluded = excluded_inodes(&fs.fork, &cells, || false).unwrap();
    expected.insert(private);
    assert_eq!(excluded, Some(expected));
    assert_eq!(excluded_inodes(&fs.fork, &cells, || true).unwrap(), None);
}

/// > A file that was ingested ahead of the commit and then moved to an excluded name leaves chunks that no version names, until the
/// > next gc.
#[test]
fn what_was_ingested_ahead_and_then_excluded_is_in_no_version_and_goes_with_the_next_gc() {
    let bench = Bench::copying();
    let id = excluding(&bench, "v", &["*.key"]);
    let fs = bench.fs(id);
    put(&fs, "plain", &noise(100_000, 1));
    put(&fs, "file", &noise(300_000, 2));
    ingest_ahead(&bench, id);
    fs.rename(
        ME,
        (ROOT, b"file"),
        (ROOT, b"file.key"),
        RenameMode::Replace,
    )
    .unwrap();
    drop(fs);
    assert_eq!(bench.commit(id, false), Some(1));
    assert_eq!(paths(&head(&bench, "v")), ["/plain"]);
    assert_eq!(stored(&bench), 400_000);
    bench.engine().gc(false).unwrap();
    assert_eq!(stored(&bench), 100_000);
    check(&bench);
}

#[test]
fn what_was_ingested_ahead_and_excluded_for_one_commit_is_whole_in_the_next_whatever_gc_took() {
    let bench = Bench::new();
    let id = excluding(&bench, "v", &["*.key"]);
    let fs = bench.fs(id);
    let name = |from: &str, to: &str| {
        let (from, to) = ((ROOT, from.as_bytes()), (ROOT, to.as_bytes()));
        fs.rename(ME, from, to, RenameMode::Replace).unwrap();
    };
    put(&fs, "plain", b"1");
    put(&fs, "file", &noise(300_000, 2));
    ingest_ahead(&bench, id);
    name("file", "file.key");
    assert_eq!(bench.commit(id, true), Some(1));
    bench.engine().gc(false).unwrap();
    name("file.key", "file");
    drop(fs);
    assert_eq!(bench.commit(id, false), Some(2));
    check(&bench);
    assert_eq!(get(&head(&bench, "v"), "file"), Some(noise(300_000, 2)));
}

#[test]
fn a_pattern_that_makes_no_sense_is_a_usage_error() {
    let bench = Bench::new();
    let mut request = fork_request("v");
    request.excludes = vec!["a{".into()];
    let error = bench.engine().fork(request).unwrap_err();
    assert_eq!(error.code, Code::Usage);
}

/// Does the same random work in a fork with patterns and in one without: they show the same all the time, and what the first one
/// commits is what the second one shows but for excluded names.
///
/// > A path that `--exclude` names is never committed.
#[test]
fn any_work_commits_as_what_it_shows_without_excluded_names() {
    for seed in 1..=12 {
        random_work(seed);
    }
}

fn random_work(seed: u64) {
    let mut bench = Bench::new();
    let (id, twin) = (excluding(&bench, "v", &["x*"]), bench.fork("twin"));
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for round in 0..40 {
        for _ in 0..12 {
            let mut step = [0usize; 5];
            for part in &mut step {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *part = (state >> 20) as usize;
            }
            random_step(&bench.fs(id), step);
            random_step(&bench.fs(twin), step);
        }
        let shown = view(&bench.fs(twin));
        assert_eq!(view(&bench.fs(id)), shown, "seed {seed}, round {round}");
        match round % 4 {
            0 => {
                bench.commit(id, true);
                let live = bench.engine().live(id).unwrap();
                assert!(live.fork().unwrap().layers().frozen.is_none());
            }
            1 => {
                let live = bench.engine().live(id).unwrap();
                bench.engine().move_to_private_root(&live).unwrap();
            }
            2 => {
                let f = id.to_string();
                bench.engine().diff(&f, &f).unwrap();
            }
            _ => bench.reopen(),
        }
        assert_eq!(
            view(&bench.fs(id)),
            shown,
            "seed {seed}, after round {round}"
        );
        check(&bench);
    }
    put(&bench.fs(id), "end", b"1");
    put(&bench.fs(twin), "end", b"1");
    let without = |fs: &Fs| -> BTreeMap<String, (Option<Vec<u8>>, u16)> {
        let all = view(fs).into_iter();
        let kept = all.filter(|(path, _)| !path.contains("/x"));
        kept.map(|(path, (bytes, mode, _))| (path, (bytes, mode)))
            .collect()
    };
    let expected = without(&bench.fs(twin));
    bench.commit(id, false).unwrap();
    let committed = head(&bench, "v");
    assert_eq!(without(&committed), expected, "seed {seed}");
    assert_eq!(view(&committed).len(), expected.len(), "seed {seed}");
    check(&bench);
}

/// One change by chance; what cannot be done is not.
fn random_step(fs: &Fs, [what, a, b, c, d]: [usize; 5]) {
    let names = ["a", "b", "c", "xa", "xb", "d", "xd"];
    let is_folder = |ino: Ino| fs.getattr(ino).unwrap().kind == Kind::Directory;
    // A place at most two folders deep.
    let place = |n: usize| -> (Ino, &[u8]) {
        let mut dir = ROOT;
        for folder in [n % 7, n / 7 % 7] {
            match fs.lookup(dir, names[folder].as_bytes()).unwrap() {
                Some(entry) if is_folder(entry.ino) => dir = entry.ino,
                _ => break,
            }
        }
        (dir, names[n / 49 % 7].as_bytes())
    };
    let ((dir, name), (to, new)) = (place(a), place(b));
    let found = fs.lookup(dir, name).unwrap().map(|entry| entry.ino);
    match (what % 9, found) {
        (0 | 1, None) => {
            fs.make(ME, dir, name, NewNode::new(Kind::File, 0o644))
                .unwrap();
        }
        (2, None) => {
            fs.make(ME, dir, name, NewNode::new(Kind::Directory, 0o755))
                .unwrap();
        }
        (0 | 3, Some(ino)) if !is_folder(ino) => {
            let bytes = noise(c % 20_000 + 1, d as u64 | 1);
            fs.write(ME, ino, (d % 50_000) as u64, &bytes, false)
                .unwrap();
        }
        (4, Some(ino)) if !is_folder(ino) => {
            let size = Some((c % 60_000) as u64);
            fs.setattr(
                ME,
                ino,
                SetAttr {
                    size,
                    ..SetAttr::default()
                },
            )
            .unwrap();
        }
        (5, Some(_)) => drop(fs.unlink(ME, dir, name)),
        (6, Some(_)) => drop(fs.rmdir(ME, dir, name)),
        (7, Some(ino)) => drop(fs.link(ME, ino, to, new)),
        (_, Some(_)) => drop(fs.rename(ME, (dir, name), (to, new), RenameMode::Replace)),
        _ => {}
    }
}

/// > | an `--exclude` pattern | 4,096 bytes, braces 32 deep | refused |
#[test]
fn patterns_that_no_path_is_as_long_or_deep_as_are_refused_before_they_are_read() {
    let deep = format!("{}a{}", "{".repeat(100_000), "}".repeat(100_000));
    let long = "a".repeat(5000);
    let folded = "{a,".repeat(300);
    for pattern in [deep, long, folded] {
        let error = Excludes::new(&["ok".into(), pattern], false).unwrap_err();
        assert!(error.contains("is longer or deeper than"), "{error}");
        assert!(error.len() < 200, "{error}");
    }
    let nested = format!("{}a{}", "{".repeat(30), "}".repeat(30));
    assert!(Excludes::new(&[nested], false).is_ok());
}

proptest::proptest! {
    #[test]
    fn any_pattern_is_one_or_is_named_in_one_line(pattern in crate::hostile::text("(!?/?(\\*\\*/|[a-z]{1,3}|\\[a-z\\]|\\{a,b\\}|\\\\.|\\?){1,6}/?)")) {
        if let Err(error) = Excludes::new(&[pattern], false) {
            assert!(error.starts_with("the pattern"), "{error}");
            assert!(!error.contains(char::is_control), "{error}");
        }
    }
}
