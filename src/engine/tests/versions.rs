//! What becomes of versions behind their commits: moved, taken back, compared, damaged, removed.

use std::collections::BTreeSet;

use super::*;

#[test]
fn a_version_survives_export_and_import() {
    let bench = Bench::new();
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let file = put(&fs, "file", &noise(300_000, 4));
    fs.link(ME, file, ROOT, b"link").unwrap();
    fs.setxattr(ME, file, b"user.k", b"v\0w", XattrMode::Any)
        .unwrap();
    let long = "n".repeat(200);
    let dir = fs
        .make(
            ME,
            ROOT,
            long.as_bytes(),
            NewNode::new(Kind::Directory, 0o750),
        )
        .unwrap()
        .ino;
    let node = NewNode {
        target: b"../file",
        ..NewNode::new(Kind::Symlink, 0)
    };
    fs.make(ME, dir, b"\xff\xfe", node).unwrap();
    fs.make(ME, dir, b"pipe", NewNode::new(Kind::Fifo, 0o640))
        .unwrap();
    fs.make(ME, dir, b"sock", NewNode::new(Kind::Socket, 0o640))
        .unwrap();
    let times = SetAttr {
        mtime: Some(1_600_000_000_123_456_789),
        uid: Some(70_000),
        ..SetAttr::default()
    };
    fs.setattr(ME, dir, times).unwrap();
    bench.commit(id, false);
    let mut tar = Vec::new();
    assert_eq!(
        bench.engine().export("v", &mut tar).unwrap().len(),
        1,
        "the socket"
    );
    let imported = bench
        .engine()
        .import("w", &mut tar.as_slice(), (0, 0))
        .unwrap();
    assert!(imported.warnings.is_empty(), "{:?}", imported.warnings);
    let list = |volume: &str, path: &[u8]| -> Vec<_> {
        let entries = bench.engine().ls(volume, path).unwrap().into_iter();
        entries
            .map(|e| (e.name, e.mode, e.uid, e.size, e.mtime, e.nlink, e.target))
            .collect()
    };
    assert_eq!(list("v", b"/"), list("w", b"/"));
    assert_eq!(list("v", long.as_bytes()), list("w", long.as_bytes()));
    let fs = bench.fs(bench.fork("w"));
    let file = fs.lookup(ROOT, b"link").unwrap().unwrap().ino;
    assert_eq!(fs.getxattr(file, b"user.k").unwrap(), b"v\0w");
    assert_eq!(get(&fs, "file"), Some(noise(300_000, 4)));
}

/// > A fork of a version that a rollback took back commits by `--force` alone.
#[test]
fn a_rollback_is_a_new_version_and_what_it_took_back_commits_only_by_force() {
    let bench = Bench::new();
    for text in ["one", "two"] {
        let id = bench.fork("v");
        if text == "two" {
            bench.fs(id).unlink(ME, ROOT, b"f").unwrap();
        }
        put(&bench.fs(id), "f", text.as_bytes());
        bench.commit(id, false);
    }
    let late = bench.fork("v");
    put(&bench.fs(late), "late", b"1");
    assert_eq!(bench.engine().rollback("v", "1").unwrap().number, 3);
    assert_eq!(get(&bench.fs(bench.fork("v")), "f"), Some(b"one".to_vec()));
    let refused = bench
        .engine()
        .commit(vec![late], request(false))
        .unwrap_err();
    assert_eq!(refused.code, Code::HeadMoved);
    let forced = CommitRequest {
        force: true,
        ..request(false)
    };
    assert!(bench.engine().commit(vec![late], forced).is_ok());
}

/// > `forkvol volume rm` is refused for a volume with a pinned version, or with forks; with `--force` both go with it.
#[test]
fn a_volume_with_a_pinned_version_or_a_fork_is_removed_by_force_alone() {
    let bench = Bench::new();
    for volume in ["v", "w"] {
        for text in [b"1", b"2"] {
            let id = bench.fork(volume);
            put(&bench.fs(id), std::str::from_utf8(text).unwrap(), text);
            bench.commit(id, false);
        }
        bench.engine().pin(&format!("{volume}@1"), true).unwrap();
    }
    let refused = bench.engine().remove_volume("v", false).unwrap_err();
    assert_eq!(refused.code, Code::Policy, "{refused}");
    assert!(refused.message.contains("v@1 is pinned"), "{refused}");
    assert_eq!(bench.engine().volume("v").unwrap().versions, 2);
    bench.engine().pin("v@1", false).unwrap();
    let fork = bench.fork("v");
    let refused = bench.engine().remove_volume("v", false).unwrap_err();
    assert_eq!(refused.code, Code::Busy, "{refused}");
    bench.engine().abandon(fork).unwrap();
    bench.engine().remove_volume("v", false).unwrap();
    bench.fork("w");
    bench.engine().remove_volume("w", true).unwrap();
    assert!(bench.engine().volumes().unwrap().is_empty());
    assert!(bench.engine().forks().unwrap().is_empty());
}

#[test]
fn a_diff_names_paths_that_were_added_removed_changed_and_renamed() {
    let bench = Bench::new();
    let id = bench.fork("v");
    for name in ["same", "changed", "removed", "old"] {
        put(&bench.fs(id), name, name.as_bytes());
    }
    bench.commit(id, true);
    let fs = bench.fs(id);
    let changed = fs.lookup(ROOT, b"changed").unwrap().unwrap().ino;
    fs.write(ME, changed, 0, b"CHANGED", false).unwrap();
    fs.unlink(ME, ROOT, b"removed").unwrap();
    fs.rename(ME, (ROOT, b"old"), (ROOT, b"new"), RenameMode::Replace)
        .unwrap();
    put(&fs, "added", b"1");
    let expected = [
        (DiffKind::Added, "/added"),
        (DiffKind::Changed, "/changed"),
        (DiffKind::Renamed, "/new"),
        (DiffKind::Removed, "/removed"),
    ];
    let against = |other: &str| -> Vec<(DiffKind, String)> {
        let found = bench.engine().diff("v@1", other).unwrap().into_iter();
        found
            .map(|d| (d.kind, String::from_utf8(d.path).unwrap()))
            .collect()
    };
    let expected: Vec<_> = expected
        .iter()
        .map(|(kind, path)| (*kind, (*path).to_string()))
        .collect();
    assert_eq!(against(&id.to_string()), expected, "against the fork");
    bench.commit(id, false);
    assert_eq!(against("v@2"), expected, "against the version");
}

#[test]
fn a_damaged_head_is_set_aside_and_the_newest_whole_version_is_forked() {
    let bench = Bench::new();
    for n in [1_u64, 2] {
        let id = bench.fork("v");
        if n == 2 {
            bench.fs(id).unlink(ME, ROOT, b"f").unwrap();
        }
        put(&bench.fs(id), "f", &noise(50_000, n));
        bench.commit(id, false);
    }
    let chunk = crate::chunk::ChunkId::of(&noise(50_000, 2));
    bench.engine().store.damage_chunk(chunk);
    let doomed = bench.fork("v");
    put(&bench.fs(doomed), "g", b"of a damaged version");
    let done = bench.engine().repair(false).unwrap();
    let problems = &done.check.problems;
    assert_eq!(problems.len(), 1);
    assert_eq!(
        (problems[0].number, &problems[0].paths),
        (2, &vec!["/f".to_string()])
    );
    assert_eq!(done.set_aside, ["v@2"]);
    assert_eq!(bench.engine().volume("v").unwrap().head, Some(1));
    assert_eq!(get(&bench.fs(bench.fork("v")), "f"), Some(noise(50_000, 1)));
    let refused = bench.engine().commit(vec![doomed], request(false));
    assert_eq!(refused.unwrap_err().code, Code::Damaged);
    assert!(
        bench.engine().repair(true).unwrap().removed.is_empty(),
        "it has a fork"
    );
    let root = bench.engine().find_version("v@2").unwrap().1.root;
    bench.engine().store.damage_node(root);
    bench.engine().gc(false).unwrap();
    bench.engine().abandon(doomed).unwrap();
    assert_eq!(bench.engine().repair(true).unwrap().removed, ["v@2"]);
    check(&bench);
    assert_eq!(bench.engine().log("v").unwrap().len(), 1);
}

#[test]
fn a_fork_of_a_head_that_cannot_be_read_is_made_from_the_newest_whole_version() {
    let bench = Bench::new();
    for n in [1_u64, 2] {
        let id = bench.fork("v");
        put(&bench.fs(id), &format!("f{n}"), b"x");
        bench.commit(id, false);
    }
    let head = bench.engine().find_version("v").unwrap().1;
    bench.engine().store.damage_node(head.root);
    let fork = bench
        .engine()
        .find_fork(&bench.fork("v").to_string())
        .unwrap();
    assert_eq!(fork.base.as_deref(), Some("v@1"));
    assert!(bench.engine().log("v").unwrap()[0].damaged.is_some());
}

#[test]
fn of_forks_and_renames_to_one_name_at_once_each_volume_keeps_a_name_of_its_own() {
    let bench = Bench::new();
    let olds: Vec<String> = (0..8).map(|n| format!("old{n}")).collect();
    for old in &olds {
        bench.commit(bench.fork(old), false);
    }
    let start = std::sync::Barrier::new(olds.len() + 1);
    let renamed = std::thread::scope(|scope| {
        let rename = |old| {
            start.wait();
            bench.engine().rename_volume(old, "new").is_ok()
        };
        let all: Vec<_> = olds
            .iter()
            .map(|old| scope.spawn(move || rename(old)))
            .collect();
        start.wait();
        bench.fork("new");
        let done = all.into_iter().map(|one| one.join().unwrap());
        done.filter(|renamed| *renamed).count()
    });
    assert!(renamed <= 1);
    let volumes = bench.engine().volumes().unwrap();
    let names: BTreeSet<&str> = volumes.iter().map(|v| v.name.as_str()).collect();
    assert_eq!(names.len(), volumes.len(), "{names:?}");
}

#[test]
fn a_volume_goes_only_when_nothing_is_forked_from_it() {
    let bench = Bench::new();
    let first = bench.fork("v");
    put(&bench.fs(first), "f", b"x");
    bench.commit(first, false);
    let other = bench.fork_with("other", |request| request.from = Some("v".into()));
    let refused = bench.engine().remove_volume("v", false).unwrap_err();
    assert_eq!(refused.code, Code::Busy);
    assert_eq!(get(&bench.fs(other), "f"), Some(b"x".to_vec()));
    bench.engine().remove_volume("v", true).unwrap();
    assert!(bench.engine().volume("v").is_err());
    assert!(bench.engine().forks().unwrap().is_empty());
    check(&bench);
}
