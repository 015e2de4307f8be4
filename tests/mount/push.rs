//! Pages that are pushed ahead of readers: what the file holds, and nothing that somebody may be about to write.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;

use crate::common::{Random, TestMount, TestStore, sh, wait_for};

type Tree = BTreeMap<PathBuf, Vec<u8>>;

/// A volume with these files.
fn bench(tree: &Tree) -> TestStore {
    let bench = TestStore::new();
    let mount = bench.fork("v");
    for (path, bytes) in tree {
        let path = mount.path.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    assert_eq!(bench.commit(mount), Some(1));
    bench
}

fn bytes(random: &mut Random, size: u64) -> Vec<u8> {
    (0..size).map(|_| random.next(256) as u8).collect()
}

/// How often a fork was asked for something, or pushed a file.
fn count(bench: &TestStore, mount: &TestMount, kind: &str) -> u64 {
    let fork = bench.engine.find_fork(&mount.id.to_string()).unwrap();
    fork.requests.get(kind).copied().unwrap_or_default()
}

fn wait_for_pushes(bench: &TestStore, mount: &TestMount, files: u64) {
    wait_for(|| count(bench, mount, "store") >= files);
}

#[test]
fn what_was_pushed_is_the_whole_file_and_is_not_asked_for() {
    let mut random = Random(5);
    let sizes = [0, 1, 4095, 4096, 4097, 131_072, 131_073];
    let name = |size: u64| PathBuf::from(format!("d/{size}"));
    let mut tree: Tree = sizes
        .map(|size| (name(size), bytes(&mut random, size)))
        .into();
    tree.insert("d/first".into(), b"a".to_vec());
    tree.insert("d/second".into(), b"b".to_vec());
    let bench = bench(&tree);
    for read_only in [true, false] {
        let mount = bench.fork_with("v", |request| request.read_only = read_only);
        read_two(&mount, 9);
        wait_for_pushes(&bench, &mount, 5);
        let asked = count(&bench, &mount, "read");
        for size in sizes {
            if size == 131_073 {
                assert_eq!(count(&bench, &mount, "read"), asked);
            }
            let path = mount.path.join(name(size));
            assert_eq!(fs::metadata(&path).unwrap().len(), size);
            assert!(fs::read(path).unwrap() == tree[&name(size)], "{size}");
        }
        assert!(
            count(&bench, &mount, "read") > asked,
            "it is too large to be pushed"
        );
        assert_eq!(count(&bench, &mount, "store"), 5);
    }
}

/// Lists a folder of so many files, and reads the two that are a sign that somebody goes through it.
fn read_two(mount: &TestMount, files: usize) {
    let entries = fs::read_dir(mount.path.join("d")).unwrap();
    assert_eq!(entries.count(), files);
    fs::read(mount.path.join("d/first")).unwrap();
    fs::read(mount.path.join("d/second")).unwrap();
}

#[test]
fn a_file_that_was_read_before_or_may_be_written_from_now_on_is_not_pushed() {
    let names = ["first", "second", "last", "read", "asked", "cut"];
    let file = |name| (PathBuf::from("d").join(name), vec![1; 9000]);
    let tree: Tree = names.map(file).into();
    let bench = bench(&tree);
    let mount = bench.fork("v");
    let path = |name: &str| mount.path.join("d").join(name);
    let mut byte = [0];
    fs::File::open(path("read"))
        .unwrap()
        .read_exact_at(&mut byte, 5000)
        .unwrap();
    // What the kernel asks before it writes to a file the first time, and only then.
    let asked = rustix::fs::getxattr(path("asked"), "security.capability", &mut byte[..]);
    assert_eq!(asked, Err(rustix::io::Errno::NODATA));
    fs::File::options()
        .write(true)
        .open(path("cut"))
        .unwrap()
        .set_len(5000)
        .unwrap();
    read_two(&mount, names.len());
    wait_for_pushes(&bench, &mount, 1);
    for name in names {
        let expected = if name == "cut" { 5000 } else { 9000 };
        assert_eq!(fs::read(path(name)).unwrap(), vec![1; expected], "{name}");
    }
    assert_eq!(count(&bench, &mount, "store"), 1, "the last one alone");
}

#[test]
fn the_thread_that_the_kernel_may_keep_has_nothing_else_of_the_process_open() {
    let file = |name| (PathBuf::from("d").join(name), vec![1]);
    let tree: Tree = ["first", "second", "third"].map(file).into();
    let bench = bench(&tree);
    let mount = bench.fork("v");
    read_two(&mount, 3);
    wait_for_pushes(&bench, &mount, 1);
    let is_alone = |thread: &Path| {
        let open = fs::read_dir(thread.join("fd")).ok()?;
        let targets = open.map(|fd| fs::read_link(fd.ok()?.path()).ok());
        let targets: Vec<_> = targets.collect::<Option<_>>()?;
        Some(targets.len() == 1 && targets[0].ends_with("fuse"))
    };
    // Those of other tests begin and end meanwhile.
    wait_for(|| {
        let threads = fs::read_dir("/proc/self/task").unwrap();
        let paths = threads.map(|thread| thread.unwrap().path());
        let is_push = |path: &PathBuf| {
            fs::read_to_string(path.join("comm")).is_ok_and(|name| name == "push\n")
        };
        let pushing: Vec<_> = paths.filter(is_push).collect();
        !pushing.is_empty() && pushing.iter().all(|path| is_alone(path) == Some(true))
    });
}

/// Reads everything in the order of listings, the folders from some point on; returns how many files were as they should be.
fn compare(root: &Path, tree: &Tree, from: usize) -> usize {
    let list = |path: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(path).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let mut folders = list(root);
    folders.rotate_left(from);
    let files = folders.iter().flat_map(|folder| list(folder));
    let right = files.filter(|path| {
        let expected = &tree[path.strip_prefix(root).unwrap()];
        fs::read(path).unwrap() == *expected
    });
    right.count()
}

#[test]
fn several_readers_beside_each_other_read_what_the_files_hold() {
    let seed = 1 + u64::from(std::process::id());
    println!("seed {seed}");
    let mut random = Random(seed);
    let mut tree = Tree::new();
    for folder in 0..20 {
        for file in 0..40 {
            let size = random.next(15_000);
            let path = PathBuf::from(format!("d{folder}/f{file}"));
            tree.insert(path, bytes(&mut random, size));
        }
    }
    let bench = bench(&tree);
    for read_only in [true, false] {
        let mount = bench.fork_with("v", |request| request.read_only = read_only);
        thread::scope(|scope| {
            let read = |from| {
                let (root, tree) = (&mount.path, &tree);
                scope.spawn(move || compare(root, tree, from))
            };
            for reader in [0, 0, 5, 13].map(read) {
                assert_eq!(reader.join().unwrap(), tree.len());
            }
        });
        wait_for_pushes(&bench, &mount, 1);
    }
}

#[test]
fn a_walk_pushes_nothing_and_a_reader_of_a_read_only_fork_looks_nothing_up() {
    let file = |n| (PathBuf::from(format!("d/{n}")), vec![1]);
    let tree: Tree = (0..1000).map(file).collect();
    let bench = bench(&tree);
    for read_only in [true, false] {
        let mount = bench.fork_with("v", |request| request.read_only = read_only);
        sh(&mount.path, "find . -printf %s");
        assert_eq!(count(&bench, &mount, "read"), 0);
        assert_eq!(count(&bench, &mount, "store"), 0);
    }
    let mount = bench.fork_with("v", |request| request.read_only = true);
    sh(&mount.path, "tar c . | cat >/dev/null");
    assert_eq!(count(&bench, &mount, "lookup"), 0);
    wait_for_pushes(&bench, &mount, 1);
}

#[test]
fn a_reader_of_one_folder_finds_the_first_file_of_the_next_when_he_has_listed_it() {
    let file = |n: u64| (PathBuf::from(format!("{}/{n}", n / 10)), vec![1; 5000]);
    let tree: Tree = (0..30).map(file).collect();
    let bench = bench(&tree);
    for read_only in [true, false] {
        let mount = bench.fork_with("v", |request| request.read_only = read_only);
        let list = |folder: &str| -> Vec<PathBuf> {
            let entries = fs::read_dir(mount.path.join(folder)).unwrap();
            entries.map(|entry| entry.unwrap().path()).collect()
        };
        for path in list("0") {
            fs::read(path).unwrap();
        }
        for folder in ["1", "2"] {
            let asked = count(&bench, &mount, "read");
            let paths = list(folder);
            assert_eq!(paths.len(), 10);
            assert_eq!(fs::read(&paths[0]).unwrap(), vec![1; 5000]);
            assert_eq!(count(&bench, &mount, "read"), asked, "folder {folder}");
            wait_for_pushes(&bench, &mount, 10);
        }
    }
}
